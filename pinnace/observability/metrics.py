"""Metrics for Prometheus: KServe's four histograms under their own names, and what an operator needs beyond them."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable
from functools import partial
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.exposition import choose_encoder
from prometheus_client.gc_collector import GCCollector
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.platform_collector import PlatformCollector
from prometheus_client.process_collector import ProcessCollector

from pinnace.observability.timings import RequestTimings

# KServe's names and descriptions of its own histograms.
HANDLERS = {
    "preprocess": "pre-process request latency",
    "predict": "predict request latency",
    "postprocess": "post-process request latency",
    "explain": "explain request latency",
}
STAGES = (
    "Seconds per stage of an inference request: read its body, wait for a decoder (decode_queue), decode, wait for the "
    "model (queue), infer, encode"
)
RECORDED = ("count_batch", "observe_batch_rows", "count_dropped", "observe_abandoned")
MULTIPROCESS_ENV = "PROMETHEUS_MULTIPROC_DIR"  # prometheus-client's own; the supervisor sets it for its workers
SECONDS_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
ROWS_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128)
MAX_RECORDED_CALLS = 10_000

MetricCall = tuple[str, tuple[Any, ...]]
"""The name of a method of Metrics, and its arguments."""


class Metrics:
    """The metrics of this process, in a registry of their own. Safe to use from any thread.

    With several workers, each worker renders the metrics of all.
    """

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        for collector in (ProcessCollector, PlatformCollector, GCCollector):
            collector(registry=self._registry)
        histogram = partial(Histogram, registry=self._registry)
        counter, gauge = partial(Counter, registry=self._registry), partial(Gauge, registry=self._registry)
        model = ["model_name"]
        self._handlers = {name: histogram(f"request_{name}_seconds", text, model) for name, text in HANDLERS.items()}
        self._stages = histogram("pinnace_stage_seconds", STAGES, ["stage"], buckets=SECONDS_BUCKETS)
        self._requests = counter(
            "pinnace_requests", "Inference requests that have ended, by outcome", ["protocol", "outcome"]
        )
        self._rows = histogram("pinnace_batch_rows", "Rows per run of a model", model, buckets=ROWS_BUCKETS)
        self._batches = counter("pinnace_batches", "Batches, by why they were not larger", [*model, "reason"])
        self._dropped = counter("pinnace_dropped_requests", "Requests cancelled while they waited for the model", model)
        self._received = counter("pinnace_received_bytes", "Bytes of inference requests' bodies", ["protocol"])
        self._sent = counter("pinnace_sent_bytes", "Bytes of inference responses' bodies", ["protocol"])
        self.in_flight = gauge(
            "pinnace_requests_in_flight", "Inference requests in flight now", multiprocess_mode="livesum"
        )
        self.queued_or_running = gauge(
            "pinnace_requests_queued_or_running",
            "Requests in flight that wait for the model or run in it now",
            multiprocess_mode="livesum",
        )
        self._models = gauge(
            "pinnace_model_info", "1 for each model, ready or not", [*model, "platform"], multiprocess_mode="max"
        )
        self._ready = gauge("pinnace_model_ready", "1 while the model is loaded", model, multiprocess_mode="livemin")

    def observe_request(
        self, protocol: str, outcome: str, timings: RequestTimings, received_bytes: int, sent_bytes: int
    ) -> None:
        """Count one inference request that has ended, with its bytes, and observe its stages and handlers."""
        self._requests.labels(protocol, outcome).inc()
        self._received.labels(protocol).inc(received_bytes)
        self._sent.labels(protocol).inc(sent_bytes)
        for stage, seconds in timings.stages.copy().items():  # a cancelled request's worker may still add to it
            self._stages.labels(stage).observe(seconds)
        for handler, seconds in timings.handlers.copy().items():
            self._handlers[handler].labels(timings.model_name).observe(seconds)

    def observe_abandoned(self, model_name: str, stage: str, handler: str, timings: RequestTimings) -> None:
        """Observe a stage, and the handler in it, that went on after its request had been observed."""
        if stage in timings.stages:
            self._stages.labels(stage).observe(timings.stages[stage])
        if handler in timings.handlers:
            self._handlers[handler].labels(model_name).observe(timings.handlers[handler])

    def count_batch(self, model_name: str, reason: str) -> None:
        """Count one batch, by the reason why it was closed."""
        self._batches.labels(model_name, reason).inc()

    def observe_batch_rows(self, model_name: str, num_rows: int) -> None:
        """Observe the number of rows of one run of a model."""
        self._rows.labels(model_name).observe(num_rows)

    def count_dropped(self, model_name: str, num_requests: int) -> None:
        """Count requests that were cancelled before their turn."""
        self._dropped.labels(model_name).inc(num_requests)

    def set_model_state(self, name: str, platform: str, is_ready: bool) -> None:
        """Publish whether a model is ready."""
        self._models.labels(name, platform).set(1)
        self._ready.labels(name).set(is_ready)

    def replay(self, calls: Iterable[MetricCall]) -> None:
        """Repeat the calls that a replica has recorded."""
        for name, arguments in calls:
            getattr(self, name)(*arguments)

    def render(self, accept: str) -> tuple[bytes, str]:
        """Return the exposition and its content type: OpenMetrics if `accept` asks for it. Takes a millisecond."""
        registry = self._registry
        if MULTIPROCESS_ENV in os.environ:  # the supervisor's directory has the numbers of all workers
            registry = CollectorRegistry()
            MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
        encode, content_type = choose_encoder(accept)
        return encode(registry), content_type


class ReplicaMetrics(Metrics):
    """The metrics of a replica: it records the calls, and the server that called the replica repeats them."""

    def __init__(self) -> None:
        super().__init__()
        self._calls: deque[MetricCall] = deque(maxlen=MAX_RECORDED_CALLS)
        for name in RECORDED:
            setattr(self, name, partial(self._record, name))

    def _record(self, name: str, *arguments: Any) -> None:
        self._calls.append((name, arguments))

    def drain(self) -> list[MetricCall]:
        """Return the calls recorded since the last drain."""
        return [self._calls.popleft() for _ in range(len(self._calls))]
