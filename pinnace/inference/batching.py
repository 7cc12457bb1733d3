"""Rows of many requests become one run of the model.

A lone request never waits: an idle model takes at once what is there, and while it is busy, arrivals queue and go
together next. On two cores AlexNet takes 25 to 29 ms for one image and 14.5 for each of eight (measured).

A run that takes every core waits for requests that are being decoded, and nothing is decoded beside it: side by side
the two cost 4 to 13 % more CPU a request, since a thread of ONNX Runtime waits for one that a decoder has displaced
(measured).
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextvars import Context, copy_context
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

from pinnace.errors import ServingError
from pinnace.inference.batch import Predicted, Prepared, Runs, num_rows
from pinnace.inference.scheduler import Job, Scheduler, capture, resolve
from pinnace.observability.metrics import Metrics

T = TypeVar("T")

DECODE_WAIT_RUNS = 4  # as long as so many runs take, rows wait for those that are being decoded
PIPELINE_DEPTH = 2  # one that runs, and one that is made ready: beyond it, rows would only fill memory


@dataclass(eq=False, slots=True)
class _Asked:
    """One request, with what turns it into rows and predictions into its answer."""

    prepare: Callable[[], Prepared]
    encode: Callable[[Prepared, Predicted], Any]
    answer: asyncio.Future[Any]
    since: float = field(default_factory=time.perf_counter)
    context: Context = field(default_factory=copy_context)
    is_queued: bool = False


@dataclass(frozen=True, slots=True)
class _Waiting:
    asked: _Asked
    prepared: Prepared
    since: float = field(default_factory=time.perf_counter)


class Batcher:
    """The requests to one model: decoded in the order of their coming, run together, one run at a time.

    One, since ONNX Runtime uses every core for one batch: with a session and a thread for each core, 16 connections got
    52 requests a second instead of 56, and a lone one waited 45 ms instead of 31 (measured).
    """

    def __init__(
        self, model_name: str, threads: Scheduler, metrics: Metrics, max_batch_size: int, max_batch_delay_ms: int
    ) -> None:
        self._model_name = model_name
        self._threads = threads
        self._metrics = metrics
        self._max_rows = max_batch_size
        self._runs = Runs(model_name, metrics, max_batch_size)
        self._delay_seconds = max_batch_delay_ms / 1000
        # All that changes below does so under the lock of the threads.
        self._asked: deque[_Asked] = deque()
        self._queue: deque[_Waiting] = deque()
        self._coming = 0  # with the decoders
        self._ahead = 0  # and queued, and in the run
        self._is_running = False
        self._ran_until = self._run_seconds = 0.0
        threads.add(self)

    async def answered(self, prepare: Callable[[], Prepared], encode: Callable[[Prepared, Predicted], T]) -> T:
        """One request's way through `prepare`, a run and `encode`, on threads. Cancelled, what has not begun does not.

        Raises ServingError.
        """
        asked = _Asked(prepare, encode, asyncio.get_running_loop().create_future())
        with self._threads.lock:
            self._asked.append(asked)
            self._admit()
            self._threads.look()
        try:
            answer: T = await asked.answer
        finally:
            with self._threads.lock:
                was_queued = asked.is_queued
                if asked.answer.cancelled() and asked in self._asked:
                    self._asked.remove(asked)  # or its body would be held until its turn
            if was_queued:
                self._metrics.queued_or_running.dec()
        return answer

    def due_at(self, now: float) -> float:
        if self._is_running or not self._queue:
            return math.inf
        oldest = self._queue[0]
        due_at = oldest.since + self._delay_seconds
        if oldest.prepared.predictor.uses_all_cores:
            if self._threads.cores_taken:
                return math.inf
            if self._coming:
                due_at = max(due_at, max(oldest.since, self._ran_until) + DECODE_WAIT_RUNS * self._run_seconds)
        if due_at > now and sum(num_rows(waiting.prepared.rows) for waiting in self._queue) >= self._max_rows:
            return oldest.since
        return due_at

    def take(self) -> Job:
        """The run of the oldest request whose client has not left, and of those behind it that fit in."""
        batch: list[_Waiting] = []
        others: deque[_Waiting] = deque()
        dropped, free = 0, self._max_rows
        for waiting in self._queue:
            size = num_rows(waiting.prepared.rows)
            if waiting.asked.answer.cancelled():
                dropped += 1
            elif not batch or (size <= free and waiting.prepared.goes_with(batch[0].prepared)):
                batch.append(waiting)
                free -= size
            else:
                others.append(waiting)
        self._queue = others
        self._left(dropped)
        if batch:
            self._is_running = True
            self._threads.cores_taken |= batch[0].prepared.predictor.uses_all_cores
        return partial(self._run, batch, dropped, "full" if others or free <= 0 else "")

    def _admit(self) -> None:
        """Of those that have asked, as many to the decoders as are to be there."""
        while self._asked and self._ahead < PIPELINE_DEPTH * self._max_rows:
            self._threads.decoding.append(partial(self._decode, self._asked.popleft()))
            self._coming += 1
            self._ahead += 1

    def _left(self, requests: int) -> None:
        self._ahead -= requests
        self._admit()

    def _decode(self, asked: _Asked) -> None:
        prepared: Prepared | None = None
        error: Exception | None = None
        if not asked.answer.cancelled():
            self._metrics.staged("turn", time.perf_counter() - asked.since)
            prepared, error = asked.context.run(capture, asked.prepare)
        with self._threads.lock:
            self._coming -= 1
            if prepared and not asked.answer.cancelled():
                asked.is_queued = True
                self._metrics.queued_or_running.inc()
                self._queue.append(_Waiting(asked, prepared))
            else:
                self._left(1)
        if error:
            resolve(asked.answer, None, error)

    def _run(self, batch: Sequence[_Waiting], dropped: int, reason: str) -> None:
        started_at = time.perf_counter()
        for _ in range(dropped):
            self._metrics.dropped(self._model_name)
        if not batch:
            return
        for waiting in batch:
            self._metrics.staged("queue", started_at - waiting.since)
        self._metrics.batch(self._model_name, reason or self._reason(batch[0]))
        answers = self._runs.answers([waiting.prepared for waiting in batch])
        with self._threads.lock:
            self._is_running = False
            self._threads.cores_taken &= not batch[0].prepared.predictor.uses_all_cores
            self._ran_until = time.perf_counter()
            self._run_seconds = self._ran_until - started_at
            self._left(len(batch))
            for waiting, answer in zip(batch, answers, strict=True):
                self._threads.encoding.append(partial(_encode, waiting, answer))

    def _reason(self, oldest: _Waiting) -> str:
        """Why no more may be with it."""
        if self._delay_seconds:
            return "delay"
        return "queued" if oldest.since < self._ran_until else "idle"


def _encode(waiting: _Waiting, answer: Predicted | ServingError) -> None:
    asked = waiting.asked
    if asked.answer.cancelled():
        return
    if isinstance(answer, ServingError):
        resolve(asked.answer, None, answer)
    else:
        resolve(asked.answer, *asked.context.run(capture, partial(asked.encode, waiting.prepared, answer)))
