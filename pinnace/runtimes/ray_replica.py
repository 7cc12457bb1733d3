"""What runs in a replica of Ray Serve: one model, with its own threads and batches, answering requests as they are.

What it measures goes back with its answers, since Prometheus asks the server and not its replicas.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, replace
from pathlib import Path

from pinnace.errors import ServingError
from pinnace.inference.local_model import LocalModel, ModelContext
from pinnace.inference.scheduler import Scheduler
from pinnace.observability.logging import REQUEST_ID, set_up_logging, to_client_error
from pinnace.observability.metrics import MetricCall, ReplicaMetrics
from pinnace.observability.timings import Latency
from pinnace.predictor import ModelMetadata, Predictor, Request, Response
from pinnace.settings import Settings


@dataclass(frozen=True, slots=True)
class Outcome:
    """An answer, or the error for the client; seconds in each handler; and what the replica measured meanwhile."""

    answer: Response | ServingError
    seconds: dict[str, float]
    measured: list[MetricCall]


class Replica:
    """Loaded when it exists: Ray Serve counts it as running from then on."""

    def __init__(self, predictor_class: type[Predictor], settings: Settings, model_dir: Path | None) -> None:
        set_up_logging(settings, os.environ)
        self._metrics = ReplicaMetrics()
        shared = ModelContext(Scheduler(settings.max_asyncio_workers), self._metrics)
        self._model = LocalModel(predictor_class, settings, model_dir, shared)
        self._model.load()

    async def describe(self) -> ModelMetadata:
        return self._model.metadata

    async def infer(self, request: Request, age_seconds: float, request_id: str) -> Outcome:
        """`age_seconds` is how long the request has been under way: clocks differ from node to node."""
        REQUEST_ID.set(request_id)
        latency = Latency(self._metrics)
        request = replace(request, started_at=time.perf_counter() - age_seconds)
        answer: Response | ServingError
        try:
            answer = await self._model.infer(lambda: request, _as_it_is, latency)
        except Exception as error:
            answer = to_client_error(error)
        return Outcome(answer, latency.seconds, self._metrics.taken())


def _as_it_is(response: Response) -> Response:
    return response
