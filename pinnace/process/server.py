"""The life of the server process, from top to bottom: bind, load, listen, ready, drain, stop."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, cast

from pinnace.auth import Authenticator
from pinnace.cpus import available_cpus
from pinnace.errors import ConfigurationError, RayHeadLost, ShutdownTimeout, StartupError
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
from pinnace.process.descriptors import fit_max_connections, raise_fd_limit
from pinnace.process.exit import StopDeadline
from pinnace.process.sockets import FORCE_EXIT, PING, READY, STOP, WorkerSockets, bind_http, worker_sockets
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
    stop, force_exit, stop_accepting, cut = asyncio.Event(), asyncio.Event(), asyncio.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()
    final_error: list[StartupError | None] = []  # empty until the grace period is over
    grpc: GrpcServer | None = None

    def get_final_error() -> StartupError | None:
        """Return the error that the server ends with, if it is cut now."""
        if final_error:
            return final_error[0]
        unanswered = dataplane.in_flight + http.num_sending + (grpc.num_unsent if grpc else 0)
        why = "at a second signal" if force_exit.is_set() else "at the end of --grace_period_seconds"
        return ShutdownTimeout(f"stopped {why} with {unanswered} requests unanswered") if unanswered else None

    stop_deadline = StopDeadline(settings.grace_period_seconds, get_final_error)
    is_signalled = False

    def on_signal(number: int, *_: Any) -> None:
        # Only this process's second signal forces the exit: the supervisor may have set `stop` already, since systemd
        # signals it and its workers at the same time.
        nonlocal is_signalled
        if is_signalled and number == signal.SIGHUP:  # it comes twice when a terminal closes, or beside SIGTERM
            return
        (stop_deadline.force if is_signalled else stop_deadline.start)()
        loop.call_soon_threadsafe((force_exit if is_signalled else stop).set)
        is_signalled = True

    for number in STOP_SIGNALS:
        signal.signal(number, on_signal)  # not the loop's own handler: it waits while the loop is busy
    settings = _fit_to_descriptors(settings)
    http.limit_connections(settings.max_connections)
    services = _services(dataplane, settings)
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
        _connect_supervisor(supervised.control_socket, stop, force_exit, stop_deadline)
    async with asyncio.TaskGroup() as tasks:
        watcher = tasks.create_task(_watch_models(dataplane, stop))
        app = make_http_app(dataplane, services, authenticator, settings)
        listeners = [tasks.create_task(_until_cut(http.serve(app, dataplane.byte_budget, stop_accepting), cut))]
        if grpc:
            listeners.append(tasks.create_task(_until_cut(grpc.serve(stop_accepting), cut)))
        await stop.wait()
        stop_deadline.start()
        dataplane.repository.drain()
        http.drain()
        logger.info("stopping: %d requests in flight", dataplane.in_flight)
        forced = tasks.create_task(force_exit.wait())
        await asyncio.wait({forced}, timeout=min(settings.drain_delay_seconds, stop_deadline.left_seconds))
        stop_accepting.set()
        finished: asyncio.Future[Any] = asyncio.gather(*listeners, return_exceptions=True)
        left_seconds = stop_deadline.left_seconds
        await asyncio.wait({forced, finished}, timeout=left_seconds, return_when=asyncio.FIRST_COMPLETED)
        final_error.append(get_final_error())  # before requests are cancelled, which takes them out of the count
        cut.set()
        http.abort()
        await _cancel({*listeners, forced, watcher})
    for number in STOP_SIGNALS:  # the exit code is decided: further signals must not change it
        signal.signal(number, signal.SIG_IGN)
    if not final_error[0] and not watcher.cancelled():
        final_error[0] = watcher.result()
    if final_error[0]:
        raise final_error[0]
    logger.info("stopped")


def _fit_to_descriptors(settings: Settings) -> Settings:
    """Return the settings with the limit on connections that open files leave. Raises ConfigurationError."""
    fitted = fit_max_connections(settings)
    if fitted.max_connections < settings.max_connections:
        logger.warning(
            "max_connections is %d per port instead of %d: the limit on open files (ulimit -n) is %d",
            fitted.max_connections,
            settings.max_connections,
            raise_fd_limit(),
        )
    return fitted


async def _until_cut(listener: Awaitable[None], cut: asyncio.Event) -> None:
    """Run a listener. What it raises once its connections are cut off is not an error of the server."""
    try:
        await listener
    except Exception as error:
        if not cut.is_set():
            raise
        logger.debug("a listener failed while its connections were cut off: %r", error)


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
        leaf: BaseException = group  # of nested groups, one per task group
        while isinstance(leaf, BaseExceptionGroup):
            leaf = leaf.exceptions[0]
        lost = cast(RayHeadLost, leaf)
        stop.set()
    return lost


def _connect_supervisor(
    control_socket: socket.socket, stop: asyncio.Event, force_exit: asyncio.Event, stop_deadline: StopDeadline
) -> None:
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
        if message == FORCE_EXIT:
            stop_deadline.force()
            force_exit.set()
        stop.set()
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
