"""The life of the server process, from top to bottom: bind, load, listen, ready, drain, stop."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from pinnace.auth import Authenticator
from pinnace.cpus import available_cpus
from pinnace.errors import ConfigurationError, RayHeadLost, ShutdownTimeout
from pinnace.grpc.health import HealthService
from pinnace.grpc.inference import InferenceService
from pinnace.grpc.reflection import ReflectionService
from pinnace.grpc.server import GrpcServer
from pinnace.grpc.service import Service
from pinnace.http.app import make_http_app
from pinnace.http.server import HttpServer
from pinnace.inference.dataplane import DataPlane
from pinnace.inference.local_model import ModelContext
from pinnace.inference.repository import Repository
from pinnace.inference.scheduler import Scheduler
from pinnace.memory import default_decode_bytes, limit_malloc_arenas
from pinnace.models.loader import load, make_models
from pinnace.observability.metrics import Metrics
from pinnace.process import STOP_SIGNALS
from pinnace.process.sockets import (
    FORCE_EXIT,
    PING,
    READY,
    STOP,
    WorkerSockets,
    bind_http,
    raise_fd_limit,
    worker_sockets,
)
from pinnace.process.summary import summarize
from pinnace.runtimes.shared_weights import remove_shared_models
from pinnace.settings import Settings

logger = logging.getLogger(__name__)

CANCEL_SECONDS = 0.1
MIN_DECODERS = 2  # also on one CPU: while one thread decodes a large picture, the other decodes small ones


def run(settings: Settings) -> None:
    """Serve until a stop signal, then answer the requests in flight. Raises StartupError."""
    raise_fd_limit()
    limit_malloc_arenas()
    factory = loop_factory(settings.event_loop)
    supervised = worker_sockets(os.environ)
    # Bound before a model is loaded, so that a port in use is reported at once.
    sockets = supervised.http if supervised else bind_http(settings.host, settings.http_port)
    http = HttpServer(sockets, settings, shared=supervised is not None)
    authenticator = Authenticator(settings)
    with open_dataplane(settings) as dataplane, asyncio.Runner(loop_factory=factory) as runner:
        runner.run(_serve(http, dataplane, authenticator, settings, supervised))


@contextmanager
def open_dataplane(settings: Settings, require_all: bool = False) -> Iterator[DataPlane]:
    """Yield the data plane with its models loaded, and close it at the end.

    Raises StartupError if no model loads, or, with `require_all`, if any model does not.
    """
    metrics = Metrics()
    scheduler = Scheduler(
        settings.max_asyncio_workers or max(MIN_DECODERS, settings.threads or available_cpus()),
        settings.max_decode_bytes or default_decode_bytes(),
        settings.max_concurrent_requests // 2,
    )
    models = make_models(settings, ModelContext(scheduler, metrics))
    load(models, require_all)
    repository = Repository(models, metrics, settings.enable_model_repository)
    try:
        yield DataPlane(repository, settings, metrics, scheduler)
    finally:
        scheduler.close()
        repository.close()


async def _serve(
    http: HttpServer,
    dataplane: DataPlane,
    authenticator: Authenticator,
    settings: Settings,
    supervised: WorkerSockets | None,
) -> None:
    """Listen, report ready, serve until a stop, drain, and stop. Raises ShutdownTimeout and RayHeadLost."""
    stop, force_exit, stop_accepting = asyncio.Event(), asyncio.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()

    is_signalled = False

    def on_signal() -> None:
        # Only this process's second signal forces the exit: the supervisor may have set `stop` already, since systemd
        # signals it and its workers at the same time.
        nonlocal is_signalled
        (force_exit if is_signalled else stop).set()
        is_signalled = True

    for number in STOP_SIGNALS:
        loop.add_signal_handler(number, on_signal)
    services = _services(dataplane, settings)
    grpc = None
    if services:
        grpc = GrpcServer(services, authenticator, dataplane.byte_budget, settings, shared=supervised is not None)
        await grpc.start()
    http.listen()
    logger.info(
        "ready after %.2f s: model %s, HTTP port %d, %s%s",
        _seconds_since_exec(),
        ", ".join(dataplane.repository.names),
        http.port,
        f"gRPC port {grpc.port}" if grpc else "no gRPC",
        f", protocol {settings.protocol}" if settings.protocol else "",
    )
    for line in summarize(dataplane.repository, settings):
        logger.info(line)
    if supervised:
        _connect_supervisor(supervised.control_socket, stop, force_exit)
    async with asyncio.TaskGroup() as tasks:
        watcher = tasks.create_task(_watch_models(dataplane, stop))
        listeners = [
            tasks.create_task(http.serve(make_http_app(dataplane, services, authenticator, settings), stop_accepting))
        ]
        if grpc:
            listeners.append(tasks.create_task(grpc.serve(stop_accepting)))
        await stop.wait()
        deadline = loop.time() + settings.grace_period_seconds
        dataplane.repository.drain()
        http.drain()
        logger.info("stopping: %d requests in flight", dataplane.in_flight)
        forced = tasks.create_task(force_exit.wait())
        await asyncio.wait({forced}, timeout=settings.drain_delay_seconds)
        stop_accepting.set()
        finished: asyncio.Future[Any] = asyncio.gather(*listeners, return_exceptions=True)
        left_seconds = max(0.0, deadline - loop.time())
        await asyncio.wait({forced, finished}, timeout=left_seconds, return_when=asyncio.FIRST_COMPLETED)
        # Counted here: cancelling a request takes it out of the count.
        unanswered = dataplane.in_flight + (grpc.num_unsent if grpc else 0)
        await _cancel({*listeners, forced, watcher})
    for number in STOP_SIGNALS:  # the exit code is decided: further signals must not change it
        loop.remove_signal_handler(number)
        signal.signal(number, signal.SIG_IGN)
    if unanswered:
        why = "at a second signal" if force_exit.is_set() else "at the end of --grace_period_seconds"
        raise ShutdownTimeout(f"stopped {why} with {unanswered} requests unanswered")
    if not watcher.cancelled() and (lost := watcher.result()):
        raise lost
    logger.info("stopped")


async def _cancel(tasks: set[asyncio.Task[Any]]) -> None:
    """Cancel repeatedly until all tasks end: Hypercorn treats the first cancellation as a request to drain."""
    while tasks := {task for task in tasks if not task.done()}:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks, timeout=CANCEL_SECONDS)


async def _watch_models(dataplane: DataPlane, stop: asyncio.Event) -> RayHeadLost | None:
    """Keep the models' states up to date until cancelled. If Ray's head is lost, set `stop` and return the error."""
    lost = None
    try:
        await dataplane.watch()
    except* RayHeadLost as group:
        lost = next(error for error in group.exceptions if isinstance(error, RayHeadLost))
        stop.set()
    return lost


def _connect_supervisor(control_socket: socket.socket, stop: asyncio.Event, force_exit: asyncio.Event) -> None:
    """Report ready to the supervisor; from then on answer its pings, and set `stop` or `force_exit` as it says.

    If the supervisor disappears, set `stop`, and remove the shared models, which it can no longer do.
    """
    with suppress(BrokenPipeError):  # the supervisor is gone: on_message receives the end of the stream
        control_socket.send(READY)
    loop = asyncio.get_running_loop()

    def on_message() -> None:
        message = b""
        with suppress(ConnectionResetError):
            message = control_socket.recv(len(STOP))
        if message == PING:
            with suppress(OSError):  # the supervisor is gone, which the next message says
                control_socket.send(READY)
            return
        (force_exit if message == FORCE_EXIT else stop).set()
        if not message:
            loop.remove_reader(control_socket)
            remove_shared_models()

    loop.add_reader(control_socket, on_message)


def _services(dataplane: DataPlane, settings: Settings) -> list[Service]:
    if not settings.enable_grpc:
        return []
    reflection = [ReflectionService()] if settings.enable_grpc_reflection else []
    return [InferenceService(dataplane), HealthService(dataplane), *reflection]


def loop_factory(event_loop: str) -> Callable[[], asyncio.AbstractEventLoop] | None:
    """Return the factory for --event_loop; None stands for asyncio's default. Raises ConfigurationError."""
    if event_loop != "uvloop":
        return None
    try:
        import uvloop
    except ImportError:
        raise ConfigurationError("--event_loop=uvloop, but uvloop is not installed: `pip install uvloop`") from None
    return uvloop.new_event_loop


def _seconds_since_exec() -> float:
    """Return the age of this process since its exec, which includes the start of the interpreter."""
    started_ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    return time.clock_gettime(time.CLOCK_BOOTTIME) - started_ticks / os.sysconf("SC_CLK_TCK")
