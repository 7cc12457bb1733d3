"""`--workers N`: N processes of this server on the same ports, restarted when they fail and stopped together.

The workers share one HTTP socket and, by SO_REUSEPORT, the gRPC port. Hypercorn's own worker processes are not used:
they drop requests at SIGTERM, all stop when one of them fails, and exit with 0 after a failure (measured with 0.18).
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from prometheus_client.multiprocess import mark_process_dead

from pinnace.cpus import available_cpus
from pinnace.errors import ShutdownTimeout, one_line
from pinnace.memory import default_decode_bytes
from pinnace.models.storage import fetch_model
from pinnace.observability.metrics import MULTIPROCESS_ENV
from pinnace.process import STOP_SIGNALS
from pinnace.process.sockets import FORCE_EXIT, PING, SOCKETS_ENV, STOP, bind_http, reserve_grpc
from pinnace.runtimes.directory_lock import temporary_directory
from pinnace.runtimes.shared_weights import SHARED_WEIGHTS_ENV
from pinnace.settings import Settings

logger = logging.getLogger(__name__)

MIN_BACKOFF_SECONDS, MAX_BACKOFF_SECONDS = 0.5, 30.0
STABLE_SECONDS = 60.0  # a worker that ran this long has started successfully, and the backoff is reset
PING_SECONDS = 1.0
KILL_SECONDS = 5.0  # after the grace period, which the workers observe themselves
SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 files are only created in a private directory below it


def run(settings: Settings) -> int:
    """Serve until a stop signal. Return the exit code of the first worker that failed, else 0. Raises StartupError."""
    http = bind_http(settings.host, settings.http_port)
    grpc = reserve_grpc(settings.host, settings.grpc_port) if settings.enable_grpc else None
    flags: dict[str, int | Path] = {
        "workers": 1,
        "http_port": http[0].getsockname()[1],
        "grpc_port": grpc.getsockname()[1] if grpc else settings.grpc_port,
        "threads": settings.threads or max(1, available_cpus() // settings.workers),
        "max_decode_bytes": (settings.max_decode_bytes or default_decode_bytes()) // settings.workers,
    }
    if model := fetch_model(settings):
        flags["model_dir"] = model
    command = [sys.executable, *sys.orig_argv[1:], *(f"--{name}={value}" for name, value in flags.items())]
    in_memory = SHARED_MEMORY if SHARED_MEMORY.is_dir() else Path(tempfile.gettempdir())
    with (
        temporary_directory("pinnace-worker-metrics-", in_memory) as metrics_dir,
        temporary_directory("pinnace-worker-weights-", _weights_directory()) as weights_dir,
    ):
        environment = {MULTIPROCESS_ENV: str(metrics_dir), SHARED_WEIGHTS_ENV: str(weights_dir)}
        supervisor = Supervisor(
            command, http, environment, settings.grace_period_seconds, settings.worker_timeout_seconds
        )
        return asyncio.run(supervisor.run(settings.workers))


def _weights_directory() -> Path:
    """Return the directory for shared weights: the temporary directory, or /dev/shm if nothing else is writable.

    If the weights do not fit there, the workers do not share them.
    """
    try:
        return Path(tempfile.gettempdir())
    except FileNotFoundError:
        return SHARED_MEMORY


class Worker:
    """A worker's process, and the control socket over which it reports that it is ready and answers pings."""

    def __init__(self, process: asyncio.subprocess.Process, control_socket: socket.socket) -> None:
        self.process = process
        self._control_socket = control_socket
        self._is_ready = False
        self.unanswered_pings = 0

    @property
    def is_ready(self) -> bool:
        """Return whether the worker has reported that it is ready; a worker that has exited may have."""
        # Nothing may have come although the worker has exited: a process that it started may keep the socket open.
        with suppress(OSError):
            if self._control_socket.recv(1024):
                self._is_ready, self.unanswered_pings = True, 0
        return self._is_ready

    def ping(self) -> None:
        """Count what the worker has answered, and ping it again if it is ready."""
        if self.is_ready:
            self.unanswered_pings += 1
            with suppress(OSError):  # it has just exited
                self._control_socket.send(PING)

    def send(self, message: bytes) -> None:
        """Send a message to the worker. A worker that is not ready yet gets SIGTERM instead.

        systemd signals every process of a service, so a signal from here would be a ready worker's second one and force
        its exit with requests unanswered.
        """
        with suppress(OSError):  # it has just exited
            if self.is_ready:
                self._control_socket.send(message)
            else:
                self.process.send_signal(signal.SIGTERM)


class Supervisor:
    """Starts workers, restarts those that fail, and stops all. If a worker fails before it is ever ready, all stop."""

    def __init__(
        self,
        command: list[str],
        http: list[socket.socket],
        environment: Mapping[str, str],
        grace_period_seconds: float,
        worker_timeout_seconds: float,
    ) -> None:
        """Prepare to start workers.

        Args:
            command: The command line of a worker.
            http: The bound sockets of the HTTP port. Workers inherit them; the stop closes them.
            environment: The workers' variables besides this process's own. MULTIPROCESS_ENV must be one of them.
            grace_period_seconds: The limit that workers keep when they stop. A worker that runs KILL_SECONDS longer
                is killed.
            worker_timeout_seconds: How long a ready worker may leave pings unanswered before it is killed.
        """
        self._command = command
        self._http = http
        self._environment = environment
        self._kill_after_seconds = grace_period_seconds + KILL_SECONDS
        self._max_unanswered_pings = worker_timeout_seconds / PING_SECONDS
        self._stop = asyncio.Event()
        self._workers: set[Worker] = set()

    async def run(self, workers: int) -> int:
        """Run that many workers until a stop signal. Return the first exit code that is not 0, else 0."""
        for number in STOP_SIGNALS:
            asyncio.get_running_loop().add_signal_handler(number, self._on_signal, number)
        async with asyncio.TaskGroup() as tasks:
            slots = [tasks.create_task(self._supervise(number)) for number in range(1, workers + 1)]
        logger.info("stopped, with all workers")
        return next((task.result() for task in slots if task.result()), 0)

    def _on_signal(self, number: int) -> None:
        """Stop the workers; at a second signal, make them exit at once.

        SIGHUP is not a second signal: it comes twice when a terminal closes, or beside SIGTERM.
        """
        if self._stop.is_set() and number != signal.SIGHUP:
            for worker in self._workers:
                worker.send(FORCE_EXIT)
        self._stop.set()

    async def _supervise(self, number: int) -> int:
        """Run one worker after the other until the stop. Return the last one's exit code."""
        backoff_seconds, was_ready = MIN_BACKOFF_SECONDS, False
        while True:
            started_at = time.monotonic()
            try:
                code, is_ready = await self._run_worker()
                was_ready |= is_ready
            except OSError as error:  # out of memory or processes, perhaps only for now
                logger.error("worker %d cannot be started: %s", number, one_line(error))
                code = 1
            if self._stop.is_set():
                return code
            if not was_ready:
                self._stop.set()
                return code or 1
            if time.monotonic() - started_at > STABLE_SECONDS:
                backoff_seconds = MIN_BACKOFF_SECONDS
            logger.error("worker %d exited with code %d: restarting in %.1f s", number, code, backoff_seconds)
            try:
                await asyncio.wait_for(self._stop.wait(), backoff_seconds)
                return 0
            except TimeoutError:
                backoff_seconds = min(2 * backoff_seconds, MAX_BACKOFF_SECONDS)

    async def _run_worker(self) -> tuple[int, bool]:
        """Run a worker until it exits. Return its exit code, and whether it was ready before. Raises OSError."""
        process, control_socket = await self._start()
        with control_socket:
            worker = Worker(process, control_socket)
            self._workers.add(worker)
            code = await self._wait_for_exit(worker)
            self._workers.remove(worker)
            # Keeps the worker's counters in the metrics, and removes its gauges, such as the requests in flight.
            mark_process_dead(process.pid, self._environment[MULTIPROCESS_ENV])  # type: ignore[no-untyped-call]
            return code, worker.is_ready

    async def _start(self) -> tuple[asyncio.subprocess.Process, socket.socket]:
        """Start a worker. Return it and its control socket, over which it reports that it is ready. Raises OSError."""
        control_socket, workers_end = socket.socketpair()
        with workers_end:
            descriptors = [workers_end.fileno(), *(listener.fileno() for listener in self._http)]
            try:
                process = await asyncio.create_subprocess_exec(
                    *self._command,
                    pass_fds=descriptors,
                    env={**os.environ, **self._environment, SOCKETS_ENV: ",".join(map(str, descriptors))},
                    start_new_session=True,  # Ctrl-C signals only the supervisor, which stops the workers
                )
            except BaseException:
                control_socket.close()
                raise
        control_socket.setblocking(False)
        return process, control_socket

    async def _wait_for_exit(self, worker: Worker) -> int:
        """Wait until the worker exits. When the supervisor stops, close the HTTP sockets and tell the worker to stop.

        Until then kill it if it leaves pings unanswered. Pings are counted, not seconds, so that a pause of supervisor
        and workers together, as of a container, kills nobody.

        Returns its exit code: that of ShutdownTimeout if it had to be killed, 0 if the stop came before it was ready,
        128 plus the number of any other signal that ended it.
        """
        process = worker.process
        exited, stopped = asyncio.create_task(process.wait()), asyncio.create_task(self._stop.wait())
        while not exited.done() and not stopped.done():
            await asyncio.wait({exited, stopped}, timeout=PING_SECONDS, return_when=asyncio.FIRST_COMPLETED)
            worker.ping()
            if worker.unanswered_pings > self._max_unanswered_pings:
                logger.error(
                    "worker process %d has not responded for %d s (worker_timeout_seconds): killed",
                    process.pid,
                    self._max_unanswered_pings * PING_SECONDS,
                )
                process.kill()
                await exited
        stopped.cancel()
        if not exited.done():
            for listener in self._http:
                listener.close()
            worker.send(STOP)
            try:
                await asyncio.wait_for(asyncio.shield(exited), self._kill_after_seconds)
            except TimeoutError:
                logger.error("worker process %d did not stop in time: killed", process.pid)
                process.kill()
                await exited
                return ShutdownTimeout.exit_code
            if exited.result() == -signal.SIGTERM:  # it was still starting
                return 0
        code = exited.result()
        return 128 - code if code < 0 else code
