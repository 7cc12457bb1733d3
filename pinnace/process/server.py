"""The life of the process, told top to bottom: bind, load, listen, ready, drain, stop."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import chain, repeat
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
from pinnace.memory import limit_malloc_arenas
from pinnace.models.loader import load, make_models
from pinnace.observability.metrics import Metrics
from pinnace.process import STOP_SIGNALS
from pinnace.process.sockets import FORCE_EXIT, READY, STOP, WorkerSockets, bind_http, raise_fd_limit, worker_sockets
from pinnace.process.summary import summary
from pinnace.runtimes.shared_weights import remove_shared_models
from pinnace.settings import Settings

logger = logging.getLogger(__name__)

CANCEL_SECONDS = 0.1


def run(settings: Settings) -> None:
    """Serve until a signal, and answer what was accepted before it. Raises StartError."""
    raise_fd_limit()
    limit_malloc_arenas()
    factory = loop_factory(settings.event_loop)
    supervised = worker_sockets(os.environ)
    # Bound at once: that a port is in use is known before a model is loaded.
    sockets = supervised.http if supervised else bind_http(settings.host, settings.http_port)
    http = HttpServer(sockets, settings, shared=supervised is not None)
    credentials = Authenticator(settings)
    with open_dataplane(settings) as dataplane, asyncio.Runner(loop_factory=factory) as runner:
        runner.run(_serve(http, dataplane, credentials, settings, supervised))


@contextmanager
def open_dataplane(settings: Settings, require_all: bool = False) -> Iterator[DataPlane]:
    """All below the transports, the models loaded, one at least or `every` one. Raises StartError."""
    metrics = Metrics()
    threads = Scheduler(settings.max_asyncio_workers or settings.threads or available_cpus())
    models = make_models(settings, ModelContext(threads, metrics))
    load(models, require_all)
    repository = Repository(models, metrics, settings.enable_model_repository)
    try:
        yield DataPlane(repository, settings, metrics)
    finally:
        threads.close()
        repository.close()


async def _serve(
    http: HttpServer,
    dataplane: DataPlane,
    credentials: Authenticator,
    settings: Settings,
    supervised: WorkerSockets | None,
) -> None:
    stop, force_exit, stop_accepting = asyncio.Event(), asyncio.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()
    signalled = chain([stop], repeat(force_exit))
    for number in STOP_SIGNALS:
        loop.add_signal_handler(number, lambda: next(signalled).set())
    services = _services(dataplane, settings)
    grpc = GrpcServer(services, credentials, settings, shared=supervised is not None) if services else None
    if grpc:
        await grpc.start()
    http.listen()
    logger.info(
        "ready after %.2f s: model %s, HTTP port %d, %s%s",
        _age_seconds(),
        ", ".join(dataplane.repository.names),
        http.port,
        f"gRPC port {grpc.port}" if grpc else "no gRPC",
        f", of which the platform wants {settings.protocol}" if settings.protocol else "",
    )
    for line in summary(dataplane.repository, settings):
        logger.info(line)
    if supervised:
        _report(supervised.supervisor, stop, force_exit)
    async with asyncio.TaskGroup() as tasks:
        watch = tasks.create_task(_watch(dataplane.repository, stop))
        listeners = [
            tasks.create_task(http.serve(make_http_app(dataplane, services, credentials, settings), stop_accepting))
        ]
        if grpc:
            listeners.append(tasks.create_task(grpc.serve(stop_accepting)))
        await stop.wait()
        deadline = loop.time() + settings.grace_period_seconds
        dataplane.repository.drain()
        http.drain()
        logger.info("stopping: %d requests to answer", dataplane.in_flight)
        forced = tasks.create_task(force_exit.wait())
        await asyncio.wait({forced}, timeout=settings.drain_delay_seconds)
        stop_accepting.set()
        finished: set[asyncio.Future[Any]] = {forced, asyncio.gather(*listeners, return_exceptions=True)}
        left_seconds = max(0.0, deadline - loop.time())
        await asyncio.wait(finished, timeout=left_seconds, return_when=asyncio.FIRST_COMPLETED)
        unanswered = dataplane.in_flight  # counted before the cancellation counts them out
        await _cancel({*listeners, forced, watch})
    for number in STOP_SIGNALS:  # the exit code is settled
        loop.remove_signal_handler(number)
        signal.signal(number, signal.SIG_IGN)
    if unanswered:
        why = "at a second signal" if force_exit.is_set() else "at the end of --grace_period_seconds"
        raise ShutdownTimeout(f"stopped {why} with {unanswered} requests unanswered")
    if not watch.cancelled() and (lost := watch.result()):
        raise lost
    logger.info("stopped")


async def _cancel(tasks: set[asyncio.Task[Any]]) -> None:
    """Until all have ended: Hypercorn takes a first cancellation, where it has not begun to drain, as a wish to."""
    while tasks := {task for task in tasks if not task.done()}:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks, timeout=CANCEL_SECONDS)


async def _watch(repository: Repository, stop: asyncio.Event) -> RayHeadLost | None:
    """Until it is cancelled, or an engine is lost: then all stops."""
    lost = None
    try:
        await repository.watch()
    except* RayHeadLost as group:
        lost = next(error for error in group.exceptions if isinstance(error, RayHeadLost))
        stop.set()
    return lost


def _report(supervisor: socket.socket, stop: asyncio.Event, force_exit: asyncio.Event) -> None:
    """Say that this worker is ready, and do as it is told; stop as well when nobody is left to tell."""
    with suppress(BrokenPipeError):  # it is gone already, as is heard at once
        supervisor.send(READY)
    loop = asyncio.get_running_loop()

    def told() -> None:
        said = b""
        with suppress(ConnectionResetError):
            said = supervisor.recv(len(STOP))
        (force_exit if said == FORCE_EXIT else stop).set()
        if not said:
            loop.remove_reader(supervisor)
            remove_shared_models()

    loop.add_reader(supervisor, told)


def _services(dataplane: DataPlane, settings: Settings) -> list[Service]:
    if not settings.enable_grpc:
        return []
    reflection = [ReflectionService()] if settings.enable_grpc_reflection else []
    return [InferenceService(dataplane), HealthService(dataplane), *reflection]


def loop_factory(event_loop: str) -> Callable[[], asyncio.AbstractEventLoop] | None:
    """None is asyncio's own. Raises BadSetting."""
    if event_loop != "uvloop":
        return None
    try:
        import uvloop
    except ImportError:
        raise ConfigurationError("--event_loop=uvloop, but uvloop is not installed: `pip install uvloop`") from None
    return uvloop.new_event_loop


def _age_seconds() -> float:
    """Since this process was started by exec, the interpreter's own start included."""
    started_ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    return time.clock_gettime(time.CLOCK_BOOTTIME) - started_ticks / os.sysconf("SC_CLK_TCK")
