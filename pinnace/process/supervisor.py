"""`--workers N`: N processes of this server on the same two ports, replaced when they die and stopped together.

Hypercorn's own way to several processes drops requests at SIGTERM, ends when one worker dies, and exits 0 after a
failure (measured with 0.18). Here the workers share one HTTP socket and, by SO_REUSEPORT, the gRPC port.
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
from pinnace.models.storage import model_of
from pinnace.observability.metrics import MULTIPROCESS
from pinnace.process import STOP_SIGNALS
from pinnace.process.sockets import FORCE_EXIT, STOP, VARIABLE, bind_http, reserve_grpc
from pinnace.runtimes.shared_weights import VARIABLE as SHARED_WEIGHTS
from pinnace.settings import Settings

logger = logging.getLogger(__name__)

MIN_BACKOFF_SECONDS, MAX_BACKOFF_SECONDS = 0.5, 30.0
STABLE_SECONDS = 60.0  # a worker that lived as long did not fail at its start
KILL_SECONDS = 5.0  # beyond the grace period that the workers keep to themselves
SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 a private directory is made in it


def run(settings: Settings) -> int:
    """Serve until a signal. The exit code is that of the first worker that failed, else 0. Raises StartError."""
    http = bind_http(settings.host, settings.http_port)
    grpc = reserve_grpc(settings.host, settings.grpc_port) if settings.enable_grpc else None
    flags: dict[str, int | Path] = {
        "workers": 1,
        "http_port": http[0].getsockname()[1],
        "grpc_port": grpc.getsockname()[1] if grpc else settings.grpc_port,
        "threads": settings.threads or max(1, available_cpus() // settings.workers),
        "max_asyncio_workers": settings.max_asyncio_workers or max(1, available_cpus() // settings.workers),
    }
    if model := model_of(settings):
        flags["model_dir"] = model
    command = [sys.executable, *sys.orig_argv[1:], *(f"--{name}={value}" for name, value in flags.items())]
    in_memory = SHARED_MEMORY if SHARED_MEMORY.is_dir() else None
    with (
        tempfile.TemporaryDirectory(prefix="pinnace-metrics-", dir=in_memory) as metrics_dir,
        tempfile.TemporaryDirectory(prefix="pinnace-weights-", dir=_disk()) as weights_dir,
    ):
        shared = {MULTIPROCESS: metrics_dir, SHARED_WEIGHTS: weights_dir}
        supervisor = Supervisor(command, http, shared, settings.grace_period_seconds)
        return asyncio.run(supervisor.run(settings.workers))


def _disk() -> str:
    """Where the weights may lie; on a root that is read-only in memory, and if they do not fit, nowhere."""
    try:
        return tempfile.gettempdir()
    except FileNotFoundError:
        return str(SHARED_MEMORY)


class Supervisor:
    """Starts workers and waits for them; a worker that ends at its first start, before it is ready, ends them all."""

    def __init__(
        self, command: list[str], http: list[socket.socket], shared: Mapping[str, str], grace_period_seconds: float
    ) -> None:
        """`shared` is what the workers find in their environment, the directory of the metrics among it."""
        self._command = command
        self._http = http
        self._shared = shared
        self._kill_after_seconds = grace_period_seconds + KILL_SECONDS
        self._stop = asyncio.Event()
        self._workers: dict[asyncio.subprocess.Process, socket.socket] = {}

    async def run(self, workers: int) -> int:
        for number in STOP_SIGNALS:
            asyncio.get_running_loop().add_signal_handler(number, self._signalled)
        async with asyncio.TaskGroup() as tasks:
            kept = [tasks.create_task(self._keep(number)) for number in range(1, workers + 1)]
        logger.info("stopped, with all workers")
        return next((task.result() for task in kept if task.result()), 0)

    def _signalled(self) -> None:
        """The second signal is for the workers as it is for us: they stop at once."""
        if self._stop.is_set():
            for process, line in self._workers.items():
                _tell(process, line, FORCE_EXIT)
        self._stop.set()

    async def _keep(self, number: int) -> int:
        """One worker after the other, until the stop; the last one's exit code."""
        pause_seconds, was_ready = MIN_BACKOFF_SECONDS, False
        while True:
            started_at = time.monotonic()
            try:
                code, is_ready = await self._one()
                was_ready |= is_ready
            except OSError as error:  # no memory, or no process more: for now
                logger.error("worker %d cannot be started: %s", number, one_line(error))
                code = 1
            if self._stop.is_set():
                return code
            if not was_ready:
                self._stop.set()
                return code or 1
            if time.monotonic() - started_at > STABLE_SECONDS:
                pause_seconds = MIN_BACKOFF_SECONDS
            logger.error("worker %d ended, exit code %d: another starts in %.1f s", number, code, pause_seconds)
            try:
                await asyncio.wait_for(self._stop.wait(), pause_seconds)
                return 0
            except TimeoutError:
                pause_seconds = min(2 * pause_seconds, MAX_BACKOFF_SECONDS)

    async def _one(self) -> tuple[int, bool]:
        """One worker's exit code, and whether it was ready before. Raises OSError."""
        process, line = await self._start()
        with line:
            self._workers[process] = line
            code = await self._until_it_ends(process, line)
            del self._workers[process]
            # Its counts stay in the metrics; what it had under way does not.
            mark_process_dead(process.pid, self._shared[MULTIPROCESS])  # type: ignore[no-untyped-call]
            return code, _is_ready(line)

    async def _start(self) -> tuple[asyncio.subprocess.Process, socket.socket]:
        """A worker and the line to it, on which it says when it is ready. Raises OSError."""
        ours, theirs = socket.socketpair()
        with theirs:
            handed = [theirs.fileno(), *(listener.fileno() for listener in self._http)]
            try:
                process = await asyncio.create_subprocess_exec(
                    *self._command,
                    pass_fds=handed,
                    env={**os.environ, **self._shared, VARIABLE: ",".join(map(str, handed))},
                    start_new_session=True,  # Ctrl-C is for the supervisor, who tells the workers
                )
            except BaseException:
                ours.close()
                raise
        ours.setblocking(False)
        return process, ours

    async def _until_it_ends(self, process: asyncio.subprocess.Process, line: socket.socket) -> int:
        """Its exit code, as a shell has it; stopped when the supervisor is, and killed if it does not stop."""
        ended, stopped = asyncio.create_task(process.wait()), asyncio.create_task(self._stop.wait())
        await asyncio.wait({ended, stopped}, return_when=asyncio.FIRST_COMPLETED)
        stopped.cancel()
        if not ended.done():
            for listener in self._http:
                listener.close()
            _tell(process, line, STOP)
            try:
                await asyncio.wait_for(asyncio.shield(ended), self._kill_after_seconds)
            except TimeoutError:
                logger.error("worker of process %d does not stop: killed", process.pid)
                process.kill()
                await ended
                return ShutdownTimeout.exit_code
            if ended.result() == -signal.SIGTERM:  # it was only starting
                return 0
        code = ended.result()
        return 128 - code if code < 0 else code


def _tell(process: asyncio.subprocess.Process, line: socket.socket, what: bytes) -> None:
    """By its line, once it is ready: whoever stops the supervisor may signal the workers as well, as systemd does.

    A signal from here would be the second one then, and cut what is to be answered.
    """
    with suppress(OSError):  # it has just ended
        if _is_ready(line):
            line.send(what)
        else:
            process.send_signal(signal.SIGTERM)


def _is_ready(line: socket.socket) -> bool:
    """Whether the worker has said so."""
    with suppress(OSError):  # it has not; what it has started may hold the line when it has ended
        return bool(line.recv(1, socket.MSG_PEEK))
    return False
