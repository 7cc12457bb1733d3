"""The data plane: the path of every inference request, whichever protocol it came by.

`run_inference` is what V1, V2 and gRPC call. It counts the request and its outcome; `DataPlane.infer` applies the
limits and the deadline, and hands the call to its model.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AbstractAsyncContextManager, contextmanager, nullcontext

from pinnace.errors import DeadlineExceeded, ServingError
from pinnace.inference.admission import Admission, ByteBudget
from pinnace.inference.call import InferenceCall
from pinnace.inference.codec import Codec, EncodedRequest, EncodedResponse
from pinnace.inference.repository import Repository
from pinnace.observability.metrics import Metrics
from pinnace.observability.timings import RequestTimings, current_timings
from pinnace.settings import Settings


class DataPlane:
    """What the transports share: the models, the limits on requests, the bytes held for them, and the metrics."""

    def __init__(self, repository: Repository, settings: Settings, metrics: Metrics) -> None:
        self.repository = repository
        self.settings = settings
        self.metrics = metrics
        self.byte_budget = ByteBudget(settings.max_queue_bytes)
        self._admissions = {name: Admission(settings) for name in repository.names}

    @property
    def in_flight(self) -> int:
        """Return the number of inference requests that were accepted and are not answered yet."""
        return sum(admission.in_flight for admission in self._admissions.values())

    @property
    def extensions(self) -> list[str]:
        """Return the extensions of the Open Inference Protocol that both REST and gRPC have."""
        return ["classification", *(["model_repository_extension"] if self.repository.mutable else [])]

    def check_capacity(self, model_name: str) -> None:
        """Check, before the body is read, that a request for the model would be accepted now.

        Raises ModelNotFound, ModelNotReady and Overloaded.
        """
        self.repository.get_ready(model_name)
        self._admissions[model_name].check()

    @contextmanager
    def observe_request(self, protocol: str, timings: RequestTimings) -> Iterator[None]:
        """Count one inference request by its outcome, and observe its timings, when the `with` statement ends."""
        outcome = "failed"
        try:
            yield
            outcome = "answered"
        except ServingError as error:
            outcome = error.outcome
            raise
        except asyncio.CancelledError:
            outcome = "cancelled"
            raise
        finally:
            self.metrics.observe_request(protocol, outcome, timings)

    async def infer(self, call: InferenceCall) -> EncodedResponse:
        """Answer one call within the limits and before the deadline.

        If cancelled, steps that have not started are skipped.
        When this returns, `call.request` and `call.response` are what the predictor received and returned.

        Raises:
            ServingError: The error for the client, such as Overloaded or DeadlineExceeded.
        """
        name = call.encoded.model_name
        model = self.repository.get_ready(name)
        call.timings.model_name = name
        seconds = self.settings.request_timeout_seconds
        try:
            with self._admissions[name].acquire() as call.permit, self.metrics.in_flight.track_inprogress():
                async with asyncio.timeout(seconds):
                    encoded = await model.infer(call)
        except TimeoutError:
            raise DeadlineExceeded(seconds) from None
        if self.settings.enable_latency_logging:
            call.timings.log_handlers()
        return encoded


async def run_inference(
    dataplane: DataPlane,
    codec: Codec,
    read: Callable[[], Awaitable[EncodedRequest]],
    while_answering: AbstractAsyncContextManager[None] | None = None,
) -> EncodedResponse:
    """Read one inference request, answer it and count it: the one path of V1, V2 and gRPC.

    Args:
        dataplane: The models and limits.
        codec: The codec of the request's protocol.
        read: Reads the request from the network. May raise a ServingError.
        while_answering: Entered once the request is read, left when it is answered.

    Raises:
        ServingError: The error for the client.
    """
    timings = current_timings()
    with dataplane.observe_request(codec.protocol, timings):
        encoded = await read()
        dataplane.metrics.count_received_bytes(codec.protocol, len(encoded.body))
        async with while_answering or nullcontext():
            response = await dataplane.infer(InferenceCall(codec, encoded, timings))
        dataplane.metrics.count_sent_bytes(codec.protocol, len(response.body))
        return response
