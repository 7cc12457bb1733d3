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
from pinnace.process.sockets import FORCE_EXIT, SOCKETS_ENV, STOP, bind_http, reserve_grpc
from pinnace.runtimes.shared_weights import SHARED_WEIGHTS_ENV
from pinnace.settings import Settings

logger = logging.getLogger(__name__)

MIN_BACKOFF_SECONDS, MAX_BACKOFF_SECONDS = 0.5, 30.0
STABLE_SECONDS = 60.0  # a worker that ran this long has started successfully, and the backoff is reset
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
    in_memory = SHARED_MEMORY if SHARED_MEMORY.is_dir() else None
    with (
        tempfile.TemporaryDirectory(prefix="pinnace-metrics-", dir=in_memory) as metrics_dir,
        tempfile.TemporaryDirectory(prefix="pinnace-weights-", dir=_weights_directory()) as weights_dir,
    ):
        environment = {MULTIPROCESS_ENV: metrics_dir, SHARED_WEIGHTS_ENV: weights_dir}
        supervisor = Supervisor(command, http, environment, settings.grace_period_seconds)
        return asyncio.run(supervisor.run(settings.workers))


def _weights_directory() -> str:
    """Return the directory for shared weights: the temporary directory, or /dev/shm if nothing else is writable.

    If the weights do not fit there, the workers do not share them.
    """
    try:
        return tempfile.gettempdir()
    except FileNotFoundError:
        return str(SHARED_MEMORY)


class Supervisor:
    """Starts workers, restarts those that fail, and stops all. If a worker fails before it is ever ready, all stop."""

    def __init__(
        self,
        command: list[str],
        http: list[socket.socket],
        environment: Mapping[str, str],
        grace_period_seconds: float,
    ) -> None:
        """Prepare to start workers.

        Args:
            command: The command line of a worker.
            http: The bound sockets of the HTTP port. Workers inherit them; the stop closes them.
            environment: The workers' variables besides this process's own. MULTIPROCESS_ENV must be one of them.
            grace_period_seconds: The limit that workers keep when they stop. A worker that runs KILL_SECONDS longer
                is killed.
        """
        self._command = command
        self._http = http
        self._environment = environment
        self._kill_after_seconds = grace_period_seconds + KILL_SECONDS
        self._stop = asyncio.Event()
        self._control_sockets: dict[asyncio.subprocess.Process, socket.socket] = {}

    async def run(self, workers: int) -> int:
        """Run that many workers until a stop signal. Return the first exit code that is not 0, else 0."""
        for number in STOP_SIGNALS:
            asyncio.get_running_loop().add_signal_handler(number, self._on_signal)
        async with asyncio.TaskGroup() as tasks:
            slots = [tasks.create_task(self._supervise(number)) for number in range(1, workers + 1)]
        logger.info("stopped, with all workers")
        return next((task.result() for task in slots if task.result()), 0)

    def _on_signal(self) -> None:
        """Stop the workers; at a second signal, make them exit at once."""
        if self._stop.is_set():
            for process, control_socket in self._control_sockets.items():
                _send(process, control_socket, FORCE_EXIT)
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
            self._control_sockets[process] = control_socket
            code = await self._wait_for_exit(process, control_socket)
            del self._control_sockets[process]
            # Keeps the worker's counters in the metrics, and removes its gauges, such as the requests in flight.
            mark_process_dead(process.pid, self._environment[MULTIPROCESS_ENV])  # type: ignore[no-untyped-call]
            return code, _is_ready(control_socket)

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

    async def _wait_for_exit(self, process: asyncio.subprocess.Process, control_socket: socket.socket) -> int:
        """Wait until the worker exits. When the supervisor stops, close the HTTP sockets and tell the worker to stop.

        Returns its exit code: that of ShutdownTimeout if it had to be killed, 0 if the stop came before it was ready,
        128 plus the number of any other signal that ended it.
        """
        exited, stopped = asyncio.create_task(process.wait()), asyncio.create_task(self._stop.wait())
        await asyncio.wait({exited, stopped}, return_when=asyncio.FIRST_COMPLETED)
        stopped.cancel()
        if not exited.done():
            for listener in self._http:
                listener.close()
            _send(process, control_socket, STOP)
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


def _send(process: asyncio.subprocess.Process, control_socket: socket.socket, message: bytes) -> None:
    """Send a message to a worker over its control socket. A worker that is not ready yet gets SIGTERM instead.

    systemd signals every process of a service, so a signal from here would be a ready worker's second one and force
    its exit with requests unanswered.
    """
    with suppress(OSError):  # it has just exited
        if _is_ready(control_socket):
            control_socket.send(message)
        else:
            process.send_signal(signal.SIGTERM)


def _is_ready(control_socket: socket.socket) -> bool:
    """Return whether the worker has reported that it is ready."""
    # No message may be there although the worker has exited: a process that it started may keep the socket open.
    with suppress(OSError):
        return bool(control_socket.recv(1, socket.MSG_PEEK))
    return False
