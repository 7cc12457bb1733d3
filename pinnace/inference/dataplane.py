"""One request in, one response out, whichever protocol it came by: limits, counts and the line in the log."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from pinnace.errors import DeadlineExceeded, ServingError
from pinnace.inference.admission import Admission, ByteBudget
from pinnace.inference.repository import Repository
from pinnace.observability.metrics import Metrics
from pinnace.observability.timings import Latency
from pinnace.predictor import Request, Response
from pinnace.settings import Settings

T = TypeVar("T")


class DataPlane:
    """Between the transports and the models; `bodies` are what the transports hold for both."""

    def __init__(self, repository: Repository, settings: Settings, metrics: Metrics) -> None:
        self.repository = repository
        self.metrics = metrics
        self.settings = settings
        self.bodies = ByteBudget(settings.max_queue_bytes)
        self._admissions = {name: Admission(settings) for name in repository.names}

    @property
    def in_flight(self) -> int:
        return sum(admission.in_flight for admission in self._admissions.values())

    def check_open(self, model_name: str) -> None:
        """Whether a request for it would be taken now, before it is read. Raises ServingError."""
        self.repository.get_ready(model_name)
        self._admissions[model_name].check()

    @contextmanager
    def counted(self, protocol: str) -> Iterator[None]:
        """Around all that a transport does for one inference request: counts how it ended."""
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
            self.metrics.ended(protocol, outcome)

    async def infer(
        self, model_name: str, decode: Callable[[], Request], encode: Callable[[Response], T]
    ) -> tuple[T, Latency]:
        """Answer one request, and tell where its time went; `decode` and `encode` are the transport's, for threads.

        Raises ServingError. Cancelled, it gives up what has not started.
        """
        model = self.repository.get_ready(model_name)
        latency = Latency(self.metrics)
        seconds = self.settings.request_timeout_seconds
        try:
            with self._admissions[model_name].ticket() as ticket, self.metrics.in_flight.track_inprogress():

                def counted_decode() -> Request:
                    request = decode()
                    ticket.rows = request.count_rows(model.metadata.inputs)
                    return request

                async with asyncio.timeout(seconds):
                    answer = await model.infer(counted_decode, encode, latency)
        except TimeoutError:
            raise DeadlineExceeded(seconds) from None
        if self.settings.enable_latency_logging:
            latency.log()
        return answer, latency

    @property
    def extensions(self) -> list[str]:
        """Of the Open Inference Protocol, over REST and gRPC."""
        return ["classification", *(["model_repository_extension"] if self.repository.mutable else [])]
