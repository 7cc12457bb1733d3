"""--engine=ray: models as deployments of Ray Serve, in replica processes on this machine or in a cluster.

The server still does the transports, limits and errors; Ray Serve's proxies are not used. A replica receives a decoded
request, with large tensors in Ray's shared memory. Images are decoded in the replica.
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
from typing import Any

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
from pinnace.runtimes.ray_replica import Replica, ReplicaResult
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

RAY_ADDRESS_ENV = "RAY_ADDRESS"  # Ray's own variable: the address of the cluster to join
START_SECONDS = 600.0
PROGRESS_SECONDS = 10.0
POLL_SECONDS = 0.1
DESCRIBE_TIMEOUT_SECONDS = 60.0
HEAD_POLL_SECONDS = 1.0
HEAD_TIMEOUT_SECONDS = 10.0  # after 60 s without its head, Ray ends this process with requests in flight
MAX_ATTEMPTS = 2  # not more, because the request itself may have crashed its replica
MAX_REASON_CHARACTERS = 500


class RayModel(Model):
    """A model in Ray Serve. It is ready while a replica runs; one that may scale to zero needs none to be ready."""

    def __init__(
        self, predictor_class: type[Predictor], settings: Settings, model_dir: Path | None, context: ModelContext
    ) -> None:
        """Define the deployment. Raises ConfigurationError if Ray rejects its options."""
        super().__init__(settings.model_name, ModelMetadata.of(predictor_class))
        try:
            self._application = _application(predictor_class, settings, model_dir and model_dir.resolve())
        except (ValueError, TypeError) as error:  # pydantic's errors are ValueErrors
            raise ConfigurationError(
                f"--ray_actor_options or --autoscaling_config is invalid: {one_line(error)}"
            ) from error
        self._scheduler, self._metrics = context.scheduler, context.metrics
        self._settings = settings
        self._scales_to_zero = json.loads(settings.autoscaling_config).get("min_replicas") == 0
        self._handle: Any = None
        self._deployed = False

    def load(self) -> None:
        """Deploy the model and wait until a replica runs. Raises RayUnavailable."""
        if self.is_ready:
            return
        _connect_ray()
        try:
            # The application has the model's name: with Ray Serve's default name it would replace another model.
            target = serve.RunTarget(self._application, name=self.name, route_prefix=None)
            (self._handle,) = serve.run_many([target], wait_for_applications_running=False)
            self._await_running()
            self.metadata = self._handle.describe.remote().result(timeout_s=DESCRIBE_TIMEOUT_SECONDS)
        except (RayError, RayServeException, TimeoutError) as error:
            raise RayUnavailable(f"Ray Serve cannot run {self.name}: {one_line(error)}") from error
        self.is_ready = self._deployed = True

    def unload(self) -> None:
        """Delete the deployment."""
        self.is_ready = self._deployed = False
        serve.delete(self.name)

    async def infer(self, call: InferenceCall) -> EncodedResponse:
        """Decode and encode in this process, and run the model in a replica. Raises ServingError."""
        request = await self._scheduler.submit_decode(partial(self._decode, call))
        with self._metrics.queued_or_running.track_inprogress():
            result = await self._call_replica(request, call.timings)
        self._metrics.replay(result.metric_calls)
        call.timings.update(result.stages, result.handlers)
        if isinstance(result.answer, ServingError):
            raise result.answer
        return await self._scheduler.submit_encode(partial(call.encode, result.answer, request))

    def _decode(self, call: InferenceCall) -> Request:
        if not self.is_ready:  # unloaded or lost while the body was read
            raise ModelNotReady(self.name)
        return call.decode(self.metadata.inputs, self._settings)

    async def wait_until_ready_changes(self) -> None:
        """Return when the model becomes ready or stops being ready. Raises RayHeadLost."""
        while True:
            await asyncio.sleep(HEAD_POLL_SECONDS)
            try:
                await _check_head()
            except RayHeadLost:
                self.is_ready = self._deployed = False
                raise
            try:
                running = self._deployed and await asyncio.to_thread(self._is_running)
            except (RayError, RayServeException):  # Ray is restarting its controller
                running = False
            running = running and self._deployed  # it may have been unloaded meanwhile
            if running != self.is_ready:
                self.is_ready = running
                return

    def close(self) -> None:
        """Delete the deployment from a cluster. A local Ray ends with this process."""
        if self._deployed and RAY_ADDRESS_ENV in os.environ:
            serve.delete(self.name, _blocking=False)

    async def _call_replica(self, request: Request, timings: RequestTimings) -> ReplicaResult:
        """Run the request in a replica, and once more in another one if the first is lost. Raises ReplicaLost."""
        request = replace(request, response_format=None)  # only this server needs it, and it may hold a whole event
        for left in reversed(range(MAX_ATTEMPTS)):
            age_seconds = time.perf_counter() - request.started_at
            response = self._handle.infer.remote(request, age_seconds, timings.request_id)
            try:
                result: ReplicaResult = await response
            except asyncio.CancelledError:
                response.cancel()  # otherwise the replica would continue
                raise
            except RayTaskError as error:  # raised in the replica outside of the handlers: a bug of this server
                raise to_client_error(error) from None
            except (RayError, RayServeException) as error:
                logger.warning("%s: a request lost its replica: %s", self.name, one_line(error))
                if not left or not isinstance(error, RayActorError):
                    raise ReplicaLost(self.name) from None
            else:
                return result
        raise AssertionError

    def _await_running(self) -> None:
        """Wait until the model is ready, and log the progress. Raises RayUnavailable."""
        started_at = logged_at = time.monotonic()
        while not self._is_running():
            now, (state, reason) = time.monotonic(), self._state()
            if state == "DEPLOY_FAILED" or now - started_at > START_SECONDS:
                serve.delete(self.name)
                raise RayUnavailable(f"Ray Serve cannot run {self.name}: {reason[-MAX_REASON_CHARACTERS:]}")
            if now - logged_at > PROGRESS_SECONDS:
                logged_at = now
                logger.info("%s is %s: %s", self.name, state, reason)
            time.sleep(POLL_SECONDS)

    def _is_running(self) -> bool:
        application = serve.status().applications.get(self.name)
        if application is None:
            return False
        if self._scales_to_zero:
            return bool(application.status == "RUNNING")
        return any(deployment.replica_states.get("RUNNING") for deployment in application.deployments.values())

    def _state(self) -> tuple[str, str]:
        """Return the application's state in Ray Serve, and the reason."""
        application = serve.status().applications[self.name]
        reasons = [*(deployment.message for deployment in application.deployments.values()), application.message]
        return application.status, one_line(next(filter(None, reasons), "its replicas are starting"))


def _connect_ray() -> None:
    """Start a local Ray, or connect to the cluster of RAY_ADDRESS, unless done before. Raises RayUnavailable."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # otherwise Ray sends usage statistics to its developers
    try:
        if not ray.is_initialized():
            local = {} if RAY_ADDRESS_ENV in os.environ else {"address": "local", "include_dashboard": False}
            ray.init(**local, logging_level=logging.WARNING)
        serve.start(proxy_location="Disabled")
    except (ConnectionError, RuntimeError, ValueError, RayError) as error:
        raise RayUnavailable(f"Ray cannot be started or joined: {one_line(error)}; see {RAY_ADDRESS_ENV}") from error


async def _check_head() -> None:
    """Check that Ray's head accepts connections: a call to Ray itself would block forever if the head is gone.

    Raises RayHeadLost after HEAD_TIMEOUT_SECONDS without a connection.
    """
    host, _, port = ray.get_runtime_context().gcs_address.rpartition(":")
    lost_at = time.monotonic() + HEAD_TIMEOUT_SECONDS
    while True:
        try:
            async with asyncio.timeout(HEAD_TIMEOUT_SECONDS):
                _, writer = await asyncio.open_connection(host.strip("[]"), int(port))
        except (OSError, TimeoutError):
            if time.monotonic() > lost_at:
                raise RayHeadLost(
                    f"the connection to Ray's head at {host}:{port} was lost: restart this server"
                ) from None
            await asyncio.sleep(HEAD_POLL_SECONDS)
        else:
            writer.close()
            return


def _application(predictor_class: type[Predictor], settings: Settings, model_dir: Path | None) -> Any:
    options = json.loads(settings.ray_actor_options)
    threads = settings.threads or max(1, int(options.get("num_cpus", 1)))
    autoscaling = json.loads(settings.autoscaling_config)
    scaling = {"autoscaling_config": autoscaling} if autoscaling else {"num_replicas": settings.num_replicas}
    deployment = serve.deployment(
        name=settings.model_name,
        ray_actor_options=options,
        max_ongoing_requests=settings.max_ongoing_requests,
        logging_config={"enable_access_log": False, "log_level": "WARNING"},
        **scaling,
    )(Replica)
    replica_settings = replace(
        settings,
        threads=threads,
        max_asyncio_workers=settings.max_asyncio_workers or max(2, threads),
        gpu_memory_percent=gpu_memory_percent(settings, options.get("num_gpus", 0)),
    )
    return deployment.bind(predictor_class, replica_settings, model_dir)


def gpu_memory_percent(settings: Settings, gpus: float) -> int:
    """Return the share of a GPU's memory that a replica may use: no more than its fraction of the GPU.

    Ray only schedules by fractions of a GPU, and does not limit the memory.
    """
    return min(settings.gpu_memory_percent, int(gpus * 100)) if 0.01 <= gpus < 1 else settings.gpu_memory_percent
