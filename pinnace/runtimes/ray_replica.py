"""A replica of Ray Serve: one model with worker threads and batches of its own, which answers decoded requests.

What a replica measures returns with its responses, because Prometheus scrapes the server and not its replicas.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

from pinnace.errors import ServingError
from pinnace.inference.call import InferenceCall
from pinnace.inference.codec import EncodedRequest, EncodedResponse
from pinnace.inference.local_model import LocalModel, ModelContext
from pinnace.inference.scheduler import Scheduler
from pinnace.memory import default_decode_bytes
from pinnace.observability.logging import set_up_logging, to_client_error
from pinnace.observability.metrics import MetricCall, ReplicaMetrics
from pinnace.observability.timings import start_timings
from pinnace.predictor import ModelMetadata, Predictor, Request, Response
from pinnace.settings import MIB, Settings

MAX_DECODE_BYTES = 512 * MIB  # unless --max_decode_bytes is set: other replicas use the same machine


@dataclass(frozen=True, slots=True)
class ReplicaResult:
    """The result of one request: its response or error, its times, and the metric calls since the last result."""

    answer: Response | ServingError
    stages: dict[str, float]
    """Seconds by stage."""
    handlers: dict[str, float]
    """Seconds by handler of the predictor."""
    metric_calls: list[MetricCall]


class DecodedRequest:
    """A codec for a request that the server has decoded already, and whose response the server will encode."""

    protocol: ClassVar[str] = "ray"

    def __init__(self, request: Request) -> None:
        self._request = request

    def decode(self, _: EncodedRequest) -> Request:
        """Return the request."""
        return self._request

    def encode(self, _: Response, __: Request) -> EncodedResponse:
        """Return an empty body: the response itself goes to the server."""
        return EncodedResponse(b"")


class Replica:
    """A replica. Its constructor loads the model, because Ray Serve counts a constructed replica as running."""

    def __init__(self, predictor_class: type[Predictor], settings: Settings, model_dir: Path | None) -> None:
        set_up_logging(settings, os.environ)
        self._metrics = ReplicaMetrics()
        scheduler = Scheduler(
            settings.max_asyncio_workers,
            settings.max_decode_bytes or min(default_decode_bytes(), MAX_DECODE_BYTES),
            settings.max_ongoing_requests // 2,
        )
        context = ModelContext(scheduler, self._metrics)
        self._model = LocalModel(predictor_class, settings, model_dir, context)
        self._model.load()

    async def describe(self) -> ModelMetadata:
        """Return the metadata of the loaded model."""
        return self._model.metadata

    async def infer(self, request: Request, age_seconds: float, request_id: str) -> ReplicaResult:
        """Run the model on one request.

        Args:
            request: The decoded request.
            age_seconds: The time since the server decoded the request. The time itself would be wrong here, because the
                clocks of nodes differ.
            request_id: The client's request id, for the log.
        """
        timings = start_timings(request_id)
        request = replace(request, started_at=time.perf_counter() - age_seconds)
        call = InferenceCall(DecodedRequest(request), EncodedRequest(request.model_name, b""), timings)
        answer: Response | ServingError | None
        try:
            await self._model.infer(call)
            answer = call.response
        except Exception as error:
            answer = to_client_error(error)
        if answer is None:
            answer = to_client_error(RuntimeError("the model has answered without a response"))
        return ReplicaResult(answer, timings.stages, timings.handlers, self._metrics.drain())
