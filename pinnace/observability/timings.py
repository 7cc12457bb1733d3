"""What one request spends in each of a predictor's handlers, as KServe logs it and counts it in its histograms."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager

from pinnace.observability.logging import LATENCY_LOGGER, REQUEST_ID
from pinnace.observability.metrics import Metrics

trace = logging.getLogger(LATENCY_LOGGER)


class Latency:
    """Of one request."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._started_at = time.perf_counter()
        self.seconds = {"preprocess": 0.0, "explain": 0.0, "predict": 0.0, "postprocess": 0.0}

    @contextmanager
    def of(self, handler: str, model_name: str) -> Iterator[None]:
        """Times one call of it, also where it raises."""
        started_at = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[handler] = time.perf_counter() - started_at
            self._metrics.handled(handler, model_name, self.seconds[handler])

    @property
    def server_timing(self) -> str:
        """W3C's header, in milliseconds; `other` is what has gone by outside the handlers: waiting, JSON."""
        spent = {name: seconds for name, seconds in self.seconds.items() if seconds}
        spent["other"] = time.perf_counter() - self._started_at - sum(spent.values())
        return ", ".join(f"{name};dur={seconds * 1000:.3f}" for name, seconds in spent.items())

    def log(self) -> None:
        """The line of --enable_latency_logging."""
        handlers = ", ".join(f"{name}_ms: {round(seconds * 1000, 9):g}" for name, seconds in self.seconds.items())
        trace.info("requestId: %s, %s", REQUEST_ID.get() or "N.A.", handlers)
