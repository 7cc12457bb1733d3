"""Timings: when one request began, and how long it spends in each stage of the server and in each handler.

There is one `RequestTimings` per request. The access log starts it; transports and models add to it; the access log,
the `server-timing` header, the latency log line and the metrics read it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from typing import ParamSpec, TypeVar

from pinnace.errors import escape_unprintable

LATENCY_LOGGER = "kserve.trace"
HANDLERS = ("preprocess", "explain", "predict", "postprocess")

P = ParamSpec("P")
T = TypeVar("T")

latency_logger = logging.getLogger(LATENCY_LOGGER)


class RequestTimings:
    """The times of one request, in seconds. Only the thread that works on the request writes to it."""

    __slots__ = ("handlers", "model_name", "request_id", "stages", "started_at")

    def __init__(self, request_id: str = "") -> None:
        """Start the clock. `request_id` is the client's x-request-id, empty if it sent none."""
        self.request_id = escape_unprintable(request_id)
        self.started_at = time.perf_counter()
        self.model_name = ""
        """The model that the request is for, once it is known to exist."""
        self.stages: dict[str, float] = {}
        """Seconds by stage: read, decode_queue, decode, queue, infer, encode."""
        self.handlers: dict[str, float] = {}
        """Seconds by handler of the predictor: preprocess, predict, postprocess."""

    def time_handler(self, handler: str, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Call a handler of the predictor and record how long it takes, also if it raises."""
        started_at = time.perf_counter()
        try:
            return function(*args, **kwargs)
        finally:
            self.handlers[handler] = time.perf_counter() - started_at

    def record_run(self, seconds: float) -> None:
        """Record the run of the model that the request's rows were part of."""
        self.stages["infer"] = self.handlers["predict"] = seconds

    def update(self, stages: Mapping[str, float], handlers: Mapping[str, float]) -> None:
        """Add times that another process measured for this request."""
        self.stages |= stages
        self.handlers |= handlers

    @property
    def server_timing(self) -> str:
        """Return the value of the `server-timing` header, in milliseconds (https://www.w3.org/TR/server-timing/).

        `other` is the time since the body was read that no handler accounts for: waiting, JSON, base64.
        """
        entries = {name: self.handlers[name] for name in HANDLERS if name in self.handlers}
        entries["other"] = time.perf_counter() - self.started_at - self.stages.get("read", 0.0) - sum(entries.values())
        return ", ".join(f"{name};dur={seconds * 1000:.3f}" for name, seconds in entries.items())

    def log_handlers(self) -> None:
        """Write the line of --enable_latency_logging, in KServe's format."""
        handlers = ", ".join(f"{name}_ms: {round(self.handlers.get(name, 0.0) * 1000, 9):g}" for name in HANDLERS)
        latency_logger.info("requestId: %s, %s", self.request_id or "N.A.", handlers)


_current: ContextVar[RequestTimings | None] = ContextVar("request_timings", default=None)


def start_timings(request_id: str) -> RequestTimings:
    """Start the timings of a request and make them the current ones of this task and of the jobs it submits."""
    timings = RequestTimings(request_id)
    _current.set(timings)
    return timings


def current_timings() -> RequestTimings:
    """Return the timings of the request that this task or job works on; new ones if there is none."""
    return _current.get() or RequestTimings()


def current_request_id() -> str:
    """Return the x-request-id of the request that this task or job works on; empty if there is none."""
    timings = _current.get()
    return timings.request_id if timings else ""
