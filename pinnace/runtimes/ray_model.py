"""Models as deployments of Ray Serve: each in processes of its own, on this machine or on a cluster's.

The transports, limits and errors stay this server's. What crosses to a replica is a decoded request, large tensors
by reference to Ray's shared memory; pictures are decoded where the model runs. Ray Serve's proxies are not used.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from pinnace.errors import (
    ConfigurationError,
    ModelNotReady,
    RayHeadLost,
    RayUnavailable,
    ReplicaLost,
    ServingError,
    one_line,
)
from pinnace.inference.call import InferenceCall
from pinnace.inference.codec import EncodedResponse
from pinnace.inference.local_model import ModelContext
from pinnace.inference.model import Model
from pinnace.observability.logging import to_client_error
from pinnace.observability.timings import RequestTimings
from pinnace.predictor import ModelMetadata, Predictor, Request
from pinnace.runtimes.ray_replica import Outcome, Replica
from pinnace.settings import Settings

try:
    import ray
    from ray import serve
    from ray.exceptions import RayActorError, RayError, RayTaskError
    from ray.serve.exceptions import RayServeException
except ImportError:
    raise RayUnavailable(
        "--engine=ray needs Ray: `pip install 'pinnace[ray]'`, or in a clone `pip install -r requirements-ray.txt`"
    ) from None

logger = logging.getLogger(__name__)

T = TypeVar("T")

ADDRESS = "RAY_ADDRESS"  # Ray's own: the cluster to join
START_SECONDS = 600.0
PROGRESS_SECONDS = 10.0
POLL_SECONDS = 0.1
DESCRIBE_TIMEOUT_SECONDS = 60.0
HEAD_POLL_SECONDS = 1.0
HEAD_TIMEOUT_SECONDS = 10.0  # after 60 without its head Ray ends this process, whatever is under way
MAX_ATTEMPTS = 2  # no more: the request may be what its replica died of
MAX_REASON_CHARACTERS = 500


class RayModel(Model):
    """Ready while a replica runs, or where none has to; how many there are and where is Ray Serve's business."""

    def __init__(
        self, predictor_class: type[Predictor], settings: Settings, model_dir: Path | None, context: ModelContext
    ) -> None:
        super().__init__(settings.model_name)
        try:
            self._application = _application(predictor_class, settings, model_dir and model_dir.resolve())
        except (ValueError, TypeError) as error:  # pydantic's are ValueErrors
            raise ConfigurationError(f"--ray_actor_options or --autoscaling_config: {one_line(error)}") from error
        self._scheduler, self._metrics = context.scheduler, context.metrics
        self._max_instances = settings.max_instances
        self._scales_to_zero = json.loads(settings.autoscaling_config).get("min_replicas") == 0
        self._handle: Any = None
        self._ready = self._deployed = False
        self._metadata = ModelMetadata.of(predictor_class)

    @property
    def is_ready(self) -> bool:
        return self._ready

    @property
    def metadata(self) -> ModelMetadata:
        return self._metadata

    def load(self) -> None:
        if self._ready:
            return
        _join()
        try:
            # Under a name of its own: without, it would take the place of the model before.
            target = serve.RunTarget(self._application, name=self.name, route_prefix=None)
            (self._handle,) = serve.run_many([target], wait_for_applications_running=False)
            self._await_running()
            self._metadata = self._handle.describe.remote().result(timeout_s=DESCRIBE_TIMEOUT_SECONDS)
        except (RayError, RayServeException, TimeoutError) as error:
            raise RayUnavailable(f"Ray Serve cannot run {self.name}: {one_line(error)}") from error
        self._ready = self._deployed = True

    def unload(self) -> None:
        self._ready = self._deployed = False
        serve.delete(self.name)

    async def infer(self, call: InferenceCall) -> EncodedResponse:
        """Answer one request: decoded and encoded here, run in a replica. Raises ServingError."""
        request = await self._scheduler.submit_decode(partial(self._decode, call))
        with self._metrics.queued_or_running.track_inprogress():
            outcome = await self._call_replica(request, call.timings)
        self._metrics.replay(outcome.metric_calls)
        call.timings.update(outcome.stages, outcome.handlers)
        if isinstance(outcome.result, ServingError):
            raise outcome.result
        return await self._scheduler.submit_encode(partial(call.encode, outcome.result, request))

    def _decode(self, call: InferenceCall) -> Request:
        if not self._ready:  # unloaded or lost while the body was read
            raise ModelNotReady(self.name)
        return call.decode(self._metadata.inputs, self._max_instances)

    async def wait_until_ready_changes(self) -> None:
        """Return when a replica was lost or found. Raises RayHeadLost."""
        while True:
            await asyncio.sleep(HEAD_POLL_SECONDS)
            try:
                await _check_head()
            except RayHeadLost:
                self._ready = self._deployed = False
                raise
            try:
                running = self._deployed and await asyncio.to_thread(self._running)
            except (RayError, RayServeException):  # Ray is starting its controller again
                running = False
            running = running and self._deployed  # an unload may have come meanwhile
            if running != self._ready:
                self._ready = running
                return

    def close(self) -> None:
        """A local Ray ends with this process; in a cluster that was joined the model would stay."""
        if self._deployed and ADDRESS in os.environ:
            serve.delete(self.name, _blocking=False)

    async def _call_replica(self, request: Request, timings: RequestTimings) -> Outcome:
        """Call a replica, and another one if the first is lost. Raises ReplicaLost."""
        for left in reversed(range(MAX_ATTEMPTS)):
            response = self._handle.infer.remote(request, timings.age_seconds, timings.request_id)
            try:
                outcome: Outcome = await response
            except asyncio.CancelledError:
                response.cancel()  # the replica would go on otherwise
                raise
            except RayTaskError as error:  # raised in the replica, by none of the handlers: a fault of ours
                raise to_client_error(error) from None
            except (RayError, RayServeException) as error:
                logger.warning("%s: a request lost its replica: %s", self.name, one_line(error))
                if not left or not isinstance(error, RayActorError):
                    raise ReplicaLost(self.name) from None
            else:
                return outcome
        raise AssertionError

    def _await_running(self) -> None:
        """Raises EngineMissing."""
        started_at = told_at = time.monotonic()
        while not self._running():
            now, (state, reason) = time.monotonic(), self._state()
            if state == "DEPLOY_FAILED" or now - started_at > START_SECONDS:
                serve.delete(self.name)
                raise RayUnavailable(f"Ray Serve cannot run {self.name}: {reason[-MAX_REASON_CHARACTERS:]}")
            if now - told_at > PROGRESS_SECONDS:
                told_at = now
                logger.info("%s is %s: %s", self.name, state, reason)
            time.sleep(POLL_SECONDS)

    def _running(self) -> bool:
        application = serve.status().applications.get(self.name)
        if application is None:
            return False
        if self._scales_to_zero:
            return bool(application.status == "RUNNING")
        return any(deployment.replica_states.get("RUNNING") for deployment in application.deployments.values())

    def _state(self) -> tuple[str, str]:
        """As Ray Serve says it, and why."""
        application = serve.status().applications[self.name]
        reasons = [*(deployment.message for deployment in application.deployments.values()), application.message]
        return application.status, one_line(next(filter(None, reasons), "its replicas are started"))


def _join() -> None:
    """A local Ray, or the cluster of RAY_ADDRESS; once. Raises EngineMissing."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # a Ray that starts here would send usage data to its makers
    try:
        if not ray.is_initialized():
            local = {} if ADDRESS in os.environ else {"address": "local", "include_dashboard": False}
            ray.init(**local, logging_level=logging.WARNING)
        serve.start(proxy_location="Disabled")
    except (ConnectionError, RuntimeError, ValueError, RayError) as error:
        raise RayUnavailable(f"Ray cannot be had: {one_line(error)}; see {ADDRESS}") from error


async def _check_head() -> None:
    """Raises EngineLost where nothing listens there for too long; asking Ray itself would wait for ever."""
    host, _, port = ray.get_runtime_context().gcs_address.rpartition(":")
    lost_at = time.monotonic() + HEAD_TIMEOUT_SECONDS
    while True:
        try:
            async with asyncio.timeout(HEAD_TIMEOUT_SECONDS):
                _, writer = await asyncio.open_connection(host.strip("[]"), int(port))
        except (OSError, TimeoutError):
            if time.monotonic() > lost_at:
                raise RayHeadLost(f"Ray's head at {host}:{port} is gone: start this server again") from None
            await asyncio.sleep(HEAD_POLL_SECONDS)
        else:
            writer.close()
            return


def _application(predictor_class: type[Predictor], settings: Settings, model_dir: Path | None) -> Any:
    options = json.loads(settings.ray_actor_options)
    threads = settings.threads or max(1, int(options.get("num_cpus", 1)))
    autoscaling = json.loads(settings.autoscaling_config)
    number = {"autoscaling_config": autoscaling} if autoscaling else {"num_replicas": settings.num_replicas}
    deployment = serve.deployment(
        name=settings.model_name,
        ray_actor_options=options,
        max_ongoing_requests=settings.max_ongoing_requests,
        logging_config={"enable_access_log": False, "log_level": "WARNING"},
        **number,
    )(Replica)
    shares = replace(
        settings,
        threads=threads,
        max_asyncio_workers=settings.max_asyncio_workers or threads,
        gpu_memory_percent=gpu_memory_percent(settings, options.get("num_gpus", 0)),
    )
    return deployment.bind(predictor_class, shares, model_dir)


def gpu_memory_percent(settings: Settings, gpus: float) -> int:
    """Ray only counts fractions of a GPU: that two models of a half fit in it is ours to see to."""
    return min(settings.gpu_memory_percent, int(gpus * 100)) if 0.01 <= gpus < 1 else settings.gpu_memory_percent
