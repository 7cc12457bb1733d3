"""What Prometheus is told: KServe's four histograms under their names, and what an operator needs beyond them."""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.exposition import choose_encoder
from prometheus_client.gc_collector import GCCollector
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.platform_collector import PlatformCollector
from prometheus_client.process_collector import ProcessCollector

# As KServe describes its own.
HANDLERS = {
    "preprocess": "pre-process request latency",
    "predict": "predict request latency",
    "postprocess": "post-process request latency",
    "explain": "explain request latency",
}
STAGES = (
    "Time of an inference request in reading its body, waiting for its turn, decoding it to rows, waiting for the "
    "model, the model, and encoding the answer"
)
RECORDED = ("handled", "staged", "batch", "run", "dropped")
MULTIPROCESS = "PROMETHEUS_MULTIPROC_DIR"  # prometheus-client's own; set by the supervisor for its workers
SECONDS_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
ROWS_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128)
MAX_RECORDED_CALLS = 10_000

MetricCall = tuple[str, tuple[Any, ...]]
"""A method of Metrics and its arguments."""


class Metrics:
    """In a registry of their own; safe to use from any thread. Of several workers, each answers for all of them."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        for collector in (ProcessCollector, PlatformCollector, GCCollector):
            collector(registry=self._registry)
        histogram = partial(Histogram, registry=self._registry)
        counter, gauge = partial(Counter, registry=self._registry), partial(Gauge, registry=self._registry)
        model = ["model_name"]
        self._handlers = {name: histogram(f"request_{name}_seconds", text, model) for name, text in HANDLERS.items()}
        self._stages = histogram("pinnace_stage_seconds", STAGES, ["stage"], buckets=SECONDS_BUCKETS)
        self._requests = counter("pinnace_requests", "Inference requests ended", ["protocol", "outcome"])
        self._rows = histogram("pinnace_batch_rows", "Rows in one run of a model", model, buckets=ROWS_BUCKETS)
        self._batches = counter("pinnace_batches", "Batches by why they were not larger", [*model, "reason"])
        self._dropped = counter(
            "pinnace_dropped_requests", "Requests whose client left while they waited for the model", model
        )
        self._received = counter("pinnace_received_bytes", "Bodies and messages of inference requests", ["protocol"])
        self._sent = counter("pinnace_sent_bytes", "Bodies and messages of their answers", ["protocol"])
        self.in_flight = gauge("pinnace_requests_in_flight", "Inference requests now", multiprocess_mode="livesum")
        self.queued_or_running = gauge(
            "pinnace_requests_queued_or_running",
            "Of those, waiting for the model or in it now",
            multiprocess_mode="livesum",
        )
        self._models = gauge(
            "pinnace_model_info", "1 for each model, ready or not", [*model, "platform"], multiprocess_mode="max"
        )
        self._ready = gauge("pinnace_model_ready", "1 while the model is loaded", model, multiprocess_mode="livemin")

    def handled(self, name: str, model_name: str, seconds: float) -> None:
        """One call of a predictor's handler has ended."""
        self._handlers[name].labels(model_name).observe(seconds)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        started_at = time.perf_counter()
        try:
            yield
        finally:
            self.staged(name, time.perf_counter() - started_at)

    def staged(self, name: str, seconds: float) -> None:
        """One request has spent so long there."""
        self._stages.labels(name).observe(seconds)

    def batch(self, model_name: str, reason: str) -> None:
        """A batch was put together, for that reason."""
        self._batches.labels(model_name, reason).inc()

    def run(self, model_name: str, rows: int) -> None:
        self._rows.labels(model_name).observe(rows)

    def inferred(self, model_name: str, seconds: float) -> None:
        """One request's rows were in a run that took so long."""
        self.staged("infer", seconds)
        self.handled("predict", model_name, seconds)

    def dropped(self, model_name: str) -> None:
        """A request whose client had left by the time that its turn came."""
        self._dropped.labels(model_name).inc()

    def received(self, protocol: str, size_bytes: int) -> None:
        self._received.labels(protocol).inc(size_bytes)

    def sent(self, protocol: str, size_bytes: int) -> None:
        self._sent.labels(protocol).inc(size_bytes)

    def ended(self, protocol: str, outcome: str) -> None:
        self._requests.labels(protocol, outcome).inc()

    def replay(self, measured: Iterable[MetricCall]) -> None:
        """Count what a replica has recorded."""
        for name, arguments in measured:
            getattr(self, name)(*arguments)

    def model(self, name: str, platform: str, ready: bool) -> None:
        self._models.labels(name, platform).set(1)
        self._ready.labels(name).set(ready)

    def render(self, accept: str) -> tuple[bytes, str]:
        """The text and its content type, OpenMetrics where the Accept header asks for it; takes a millisecond."""
        registry = self._registry
        if MULTIPROCESS in os.environ:  # and in the supervisor's directory the numbers of all workers
            registry = CollectorRegistry()
            MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
        encode, content_type = choose_encoder(accept)
        return encode(registry), content_type


class ReplicaMetrics(Metrics):
    """In a replica: what it measures goes along with its next answer, and is counted by the server that asked."""

    def __init__(self) -> None:
        super().__init__()
        self._measured: deque[MetricCall] = deque(maxlen=MAX_RECORDED_CALLS)
        for name in RECORDED:
            setattr(self, name, partial(self._record, name))

    def _record(self, name: str, *arguments: Any) -> None:
        self._measured.append((name, arguments))

    def taken(self) -> list[MetricCall]:
        """What has been recorded since the last time."""
        return [self._measured.popleft() for _ in range(len(self._measured))]
