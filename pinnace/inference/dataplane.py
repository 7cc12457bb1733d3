"""The data plane: the path of every inference request, whichever protocol it came by.

`run_inference` is what V1, V2 and gRPC call. It counts the request and its outcome; `DataPlane.infer` applies the
limits and the deadline, and hands the call to its model.
"""

from __future__ import annotations

import asyncio
from typing import TypeVar

from pinnace.errors import DeadlineExceeded, ServingError
from pinnace.inference.admission import Admission, ByteBudget
from pinnace.inference.call import InferenceCall
from pinnace.inference.codec import Codec, EncodedRequest, EncodedResponse, IncomingRequest
from pinnace.inference.model import Model
from pinnace.inference.repository import Repository
from pinnace.inference.scheduler import Scheduler
from pinnace.observability.metrics import Metrics
from pinnace.observability.timings import RequestTimings
from pinnace.settings import Settings

R = TypeVar("R")

WATCH_SECONDS = 1.0


class DataPlane:
    """The state that all transports share: the models, the limits on requests and on their bytes, and the metrics."""

    def __init__(
        self, repository: Repository, settings: Settings, metrics: Metrics, scheduler: Scheduler | None = None
    ) -> None:
        self.repository = repository
        self.settings = settings
        self.metrics = metrics
        self.byte_budget = ByteBudget(settings.max_queue_bytes)
        self._scheduler = scheduler
        self._admissions = {name: Admission(settings) for name in repository.names}

    @property
    def in_flight(self) -> int:
        """Return the number of inference requests that were accepted and are not answered yet."""
        return sum(admission.in_flight for admission in self._admissions.values())

    @property
    def extensions(self) -> list[str]:
        """Return the extensions of the Open Inference Protocol that both REST and gRPC have."""
        return ["classification", *(["model_repository_extension"] if self.repository.mutable else [])]

    def get_model(self, name: str) -> Model:
        """Return the model if it would accept a request now. Raises ModelNotFound, ModelNotReady and Overloaded."""
        model = self.repository.get_ready(name)
        self._admissions[name].check()
        return model

    async def watch(self) -> None:
        """Publish changes of readiness that are no load or unload, such as a lost replica, until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self.repository.watch())
            if self._scheduler:
                tasks.create_task(self._watch_threads(self._scheduler))

    async def _watch_threads(self, scheduler: Scheduler) -> None:
        """Report the server not ready while all decode threads, or a run, are busy for longer than a request may be."""
        while True:
            await asyncio.sleep(WATCH_SECONDS)
            self.repository.set_stuck(scheduler.stuck_seconds > self.settings.request_timeout_seconds)

    async def infer(self, model: Model, call: InferenceCall) -> EncodedResponse:
        """Answer one call within the limits and before the deadline.

        If cancelled, steps that have not started are skipped. When this returns, `call.request` and `call.response` are
        what the predictor received and returned.

        Raises:
            ServingError: The error for the client, such as Overloaded or DeadlineExceeded.
        """
        seconds = self.settings.request_timeout_seconds
        try:
            with self._admissions[model.name].admit() as call.permit, self.metrics.in_flight.track_inprogress():
                async with asyncio.timeout(seconds):
                    encoded = await model.infer(call)
        except TimeoutError:
            raise DeadlineExceeded(seconds) from None
        if self.settings.enable_latency_logging:
            call.timings.log_handlers()
        return encoded


async def run_inference(dataplane: DataPlane, codec: Codec, incoming: IncomingRequest[R], timings: RequestTimings) -> R:
    """Read one inference request, answer it and count it: the one path of V1, V2 and gRPC.

    A request that would be refused now is refused before its body is read. Returns the transport's response.

    Raises:
        ServingError: The error for the client.
    """
    outcome, received_bytes, sent_bytes = "failed", 0, 0
    try:
        model = dataplane.get_model(incoming.model_name)
        timings.model_name = model.name
        body = await incoming.read()
        received_bytes = len(body)
        call = InferenceCall(codec, EncodedRequest(model.name, body, incoming.headers), timings)
        async with incoming.while_answering():
            encoded = await dataplane.infer(model, call)
        response = incoming.make_response(encoded)
        outcome, sent_bytes = "answered", len(encoded.body)
        return response
    except ServingError as error:
        outcome = error.outcome
        raise
    except asyncio.CancelledError:
        outcome = "cancelled"
        raise
    finally:
        dataplane.metrics.observe_request(codec.protocol, outcome, timings, received_bytes, sent_bytes)
