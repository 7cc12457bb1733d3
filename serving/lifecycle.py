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

from serving import STOP_SIGNALS
from serving.cpus import available_cpus
from serving.credentials import Credentials
from serving.dataplane import DataPlane
from serving.errors import BadSetting, DrainCut, EngineLost
from serving.local_model import Shared
from serving.memory import share_memory
from serving.metrics import Metrics
from serving.models import load, make_models
from serving.repository import Repository
from serving.settings import Settings
from serving.shared_weights import forget_shared_models
from serving.sockets import AT_ONCE, READY, STOP, Inherited, allow_descriptors, bind_http, inherited
from serving.summary import summary
from serving.threads import Threads
from serving.transports.grpc_health import HealthService
from serving.transports.grpc_messages import Service
from serving.transports.grpc_reflection import ReflectionService
from serving.transports.grpc_server import GrpcServer
from serving.transports.grpc_service import InferenceService
from serving.transports.http_app import make_http_app
from serving.transports.http_server import HttpServer

logger = logging.getLogger(__name__)

CANCEL_SECONDS = 0.1


def run(settings: Settings) -> None:
    """Serve until a signal, and answer what was accepted before it. Raises StartError."""
    allow_descriptors()
    share_memory()
    factory = loop_factory(settings.event_loop)
    supervised = inherited(os.environ)
    # Bound at once: that a port is in use is known before a model is loaded.
    sockets = supervised.http if supervised else bind_http(settings.host, settings.http_port)
    http = HttpServer(sockets, settings, shared=supervised is not None)
    credentials = Credentials(settings)
    with loaded(settings) as dataplane, asyncio.Runner(loop_factory=factory) as runner:
        runner.run(_serve(http, dataplane, credentials, settings, supervised))


@contextmanager
def loaded(settings: Settings, every: bool = False) -> Iterator[DataPlane]:
    """All below the transports, the models loaded, one at least or `every` one. Raises StartError."""
    metrics = Metrics()
    threads = Threads(settings.max_asyncio_workers or settings.threads or available_cpus())
    models = make_models(settings, Shared(threads, metrics))
    load(models, every)
    repository = Repository(models, metrics, settings.enable_model_repository)
    try:
        yield DataPlane(repository, settings, metrics)
    finally:
        threads.close()
        repository.close()


async def _serve(
    http: HttpServer, dataplane: DataPlane, credentials: Credentials, settings: Settings, supervised: Inherited | None
) -> None:
    stop, at_once, closing = asyncio.Event(), asyncio.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()
    signalled = chain([stop], repeat(at_once))
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
        _report(supervised.supervisor, stop, at_once)
    async with asyncio.TaskGroup() as tasks:
        watch = tasks.create_task(_watch(dataplane.repository, stop))
        listeners = [tasks.create_task(http.serve(make_http_app(dataplane, services, credentials, settings), closing))]
        if grpc:
            listeners.append(tasks.create_task(grpc.serve(closing)))
        await stop.wait()
        deadline = loop.time() + settings.grace_period_seconds
        dataplane.repository.drain()
        http.drain()
        logger.info("stopping: %d requests to answer", dataplane.under_way)
        hurry = tasks.create_task(at_once.wait())
        await asyncio.wait({hurry}, timeout=settings.drain_delay_seconds)
        closing.set()
        ends: set[asyncio.Future[Any]] = {hurry, asyncio.gather(*listeners, return_exceptions=True)}
        left_seconds = max(0.0, deadline - loop.time())
        await asyncio.wait(ends, timeout=left_seconds, return_when=asyncio.FIRST_COMPLETED)
        unanswered = dataplane.under_way  # counted before the cancellation counts them out
        await _cancel({*listeners, hurry, watch})
    for number in STOP_SIGNALS:  # the exit code is settled
        loop.remove_signal_handler(number)
        signal.signal(number, signal.SIG_IGN)
    if unanswered:
        why = "at a second signal" if at_once.is_set() else "at the end of --grace_period_seconds"
        raise DrainCut(f"stopped {why} with {unanswered} requests unanswered")
    if not watch.cancelled() and (lost := watch.result()):
        raise lost
    logger.info("stopped")


async def _cancel(tasks: set[asyncio.Task[Any]]) -> None:
    """Until all have ended: Hypercorn takes a first cancellation, where it has not begun to drain, as a wish to."""
    while tasks := {task for task in tasks if not task.done()}:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks, timeout=CANCEL_SECONDS)


async def _watch(repository: Repository, stop: asyncio.Event) -> EngineLost | None:
    """Until it is cancelled, or an engine is lost: then all stops."""
    lost = None
    try:
        await repository.watch()
    except* EngineLost as group:
        lost = next(error for error in group.exceptions if isinstance(error, EngineLost))
        stop.set()
    return lost


def _report(supervisor: socket.socket, stop: asyncio.Event, at_once: asyncio.Event) -> None:
    """Say that this worker is ready, and do as it is told; stop as well when nobody is left to tell."""
    with suppress(BrokenPipeError):  # it is gone already, as is heard at once
        supervisor.send(READY)
    loop = asyncio.get_running_loop()

    def told() -> None:
        said = b""
        with suppress(ConnectionResetError):
            said = supervisor.recv(len(STOP))
        (at_once if said == AT_ONCE else stop).set()
        if not said:
            loop.remove_reader(supervisor)
            forget_shared_models()

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
        raise BadSetting("--event_loop=uvloop, but uvloop is not installed: `pip install uvloop`") from None
    return uvloop.new_event_loop


def _age_seconds() -> float:
    """Since this process was started by exec, the interpreter's own start included."""
    started_ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    return time.clock_gettime(time.CLOCK_BOOTTIME) - started_ticks / os.sysconf("SC_CLK_TCK")
