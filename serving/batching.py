"""Rows of many requests become one run of the model.

A lone request never waits: an idle engine takes at once what is there, and while it is busy, arrivals queue and go
together next. On two cores AlexNet takes 25 to 29 ms for one image and 14.5 for each of eight (measured).

Decoding and a run that takes every core take turns: side by side on two cores they cost 4 to 13 % more CPU a request
(measured), since a thread of ONNX Runtime spins while it waits for one that a decoder has displaced.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from contextvars import Context, copy_context
from dataclasses import dataclass, field
from itertools import accumulate

import numpy as np

from serving.errors import ServingError
from serving.logs import public
from serving.metrics import Metrics
from serving.predictor import Predictor, Rows

WORTH_RUNS = 4  # as long as so many runs take, rows wait for those that are being decoded


@dataclass(frozen=True, slots=True)
class Predicted:
    """The predictions for one request's rows, and how long the run took that they came from."""

    rows: Rows
    run_seconds: float


@dataclass(slots=True)
class _Waiting:
    predictor: Predictor
    model_name: str
    rows: Rows
    answer: asyncio.Future[Predicted]
    since: float = field(default_factory=time.perf_counter)
    context: Context = field(default_factory=copy_context)  # with the request's id, for what is logged of it

    @property
    def size(self) -> int:
        return _size(self.rows)

    def goes_with(self, other: _Waiting) -> bool:
        """Whether the rows of both are arrays of the same kinds, for the same predictor."""
        return self.predictor is other.predictor and self._kinds() == other._kinds()

    def _kinds(self) -> dict[str, object]:
        return {name: (array.dtype, array.shape[1:]) for name, array in self.rows.items()}


class Batcher:
    """The rows that wait, and the one thread that runs models.

    One, since ONNX Runtime uses every core for one batch: with a session and a thread for each core, 16 connections got
    52 requests a second instead of 56, and a lone one waited 45 ms instead of 31 (measured). A predictor whose runs
    take every core is not run beside decoding, either: a batch is decoded, then run, then the next one is decoded.
    """

    def __init__(self, metrics: Metrics, max_batch_size: int, max_batch_delay_ms: int) -> None:
        self._metrics = metrics
        self._max_rows = max_batch_size
        self._delay_seconds = max_batch_delay_ms / 1000
        self._queue: deque[_Waiting] = deque()
        self._coming, self._cores_taken = 0, False
        self._ran_until = self._run_seconds = 0.0
        self._changed = threading.Condition()
        self._closed = False
        threading.Thread(target=self._work, name="engine", daemon=True).start()

    @contextmanager
    def coming(self) -> Iterator[None]:
        """Around the decoding of a request, up to its `queue`: a run that takes every core may wait for it."""
        self._coming += 1
        try:
            yield
        finally:
            with self._changed:
                self._coming -= 1
                self._changed.notify_all()

    def await_cores(self) -> None:
        """Before decoding, on its thread: returns when no run takes every core."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or not self._cores_taken)

    def queue(self, predictor: Predictor, model_name: str, rows: Rows) -> asyncio.Future[Predicted]:
        """Have one request's rows predicted. Gives ServingError. Cancelled before its run, it has none."""
        waiting = _Waiting(predictor, model_name, rows, asyncio.get_running_loop().create_future())
        with self._changed:
            self._queue.append(waiting)
            self._changed.notify_all()
        return waiting.answer

    def close(self) -> None:
        """Runs nothing more, and does not wait for a run that is under way."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _work(self) -> None:
        while self._run_next():
            pass  # and nothing here holds on to a batch, whose model may be unloaded meanwhile

    def _run_next(self) -> bool:
        batch = self._next()
        for waiting in batch:
            self._metrics.queued(waiting.since)
        if batch:
            started_at = time.perf_counter()
            self._cores_taken = batch[0].predictor.takes_every_core
            self._run(batch)
            with self._changed:
                self._ran_until = time.perf_counter()
                self._run_seconds = self._ran_until - started_at
                self._cores_taken = False
                self._changed.notify_all()
        return bool(batch)

    def _next(self) -> list[_Waiting]:
        """The oldest request, and those behind it that fit in its run; empty when closed."""
        reason = "queued"
        with self._changed:
            while not self._closed:
                if not self._queue:
                    reason = "idle"
                    self._changed.wait()
                    continue
                full = sum(waiting.size for waiting in self._queue) >= self._max_rows
                now, oldest = time.perf_counter(), self._queue[0]
                delayed_seconds = oldest.since + self._delay_seconds - now
                worth_seconds = max(oldest.since, self._ran_until) + WORTH_RUNS * self._run_seconds - now
                if not full and delayed_seconds > 0:
                    reason = "delay"
                    self._changed.wait(delayed_seconds)
                elif not full and self._coming and oldest.predictor.takes_every_core and worth_seconds > 0:
                    self._changed.wait(worth_seconds)
                elif batch := self._take():
                    full = bool(self._queue) or sum(waiting.size for waiting in batch) >= self._max_rows
                    self._metrics.batch(batch[0].model_name, "full" if full else reason)
                    return batch
        return []

    def _take(self) -> list[_Waiting]:
        batch: list[_Waiting] = []
        others: deque[_Waiting] = deque()
        free = self._max_rows
        for waiting in self._queue:
            if waiting.answer.cancelled():
                self._metrics.dropped(waiting.model_name)
            elif not batch or (waiting.size <= free and waiting.goes_with(batch[0])):
                batch.append(waiting)
                free -= waiting.size
            else:
                others.append(waiting)
        self._queue = others
        return batch

    def _run(self, batch: Sequence[_Waiting]) -> None:
        """Answer each of them. Where a run of several fails, each runs alone: only who is to blame fails then."""
        answers: Sequence[Predicted | ServingError]
        try:
            answers = self._predicted(batch)
        except Exception as error:
            if len(batch) > 1:
                for waiting in batch:
                    self._metrics.batch(waiting.model_name, "alone")
                    self._run([waiting])
                return
            answers = [batch[0].context.run(public, error)]
        with suppress(RuntimeError):  # the loop is closed: nobody waits any more
            batch[0].answer.get_loop().call_soon_threadsafe(_settle, batch, answers)

    def _predicted(self, batch: Sequence[_Waiting]) -> list[Predicted]:
        first, rows = batch[0], batch[0].rows
        if len(batch) > 1:
            rows = {name: np.concatenate([waiting.rows[name] for waiting in batch]) for name in rows}
        ends = list(accumulate(waiting.size for waiting in batch))
        started_at = time.perf_counter()
        try:
            pieces = [
                self._piece(first, {name: array[start : start + self._max_rows] for name, array in rows.items()})
                for start in range(0, ends[-1], self._max_rows)
            ]
        finally:
            run_seconds = time.perf_counter() - started_at
            for waiting in batch:
                self._metrics.inferred(waiting.model_name, run_seconds)
        predictions = {name: np.concatenate([piece[name] for piece in pieces]) for name in pieces[0]}
        return [
            Predicted({name: array[end - waiting.size : end] for name, array in predictions.items()}, run_seconds)
            for waiting, end in zip(batch, ends, strict=True)
        ]

    def _piece(self, first: _Waiting, rows: Rows) -> Rows:
        """One run, of no more rows than are allowed."""
        size = _size(rows)
        self._metrics.run(first.model_name, size)
        predictions = first.predictor.predict(rows)
        for name, array in predictions.items():
            if len(array) != size:
                raise ValueError(f"predict was given {size} rows and gave {len(array)} of {name}")
        return predictions


def _size(rows: Rows) -> int:
    return len(next(iter(rows.values())))


def _settle(batch: Sequence[_Waiting], answers: Sequence[Predicted | ServingError]) -> None:
    for waiting, answer in zip(batch, answers, strict=True):
        if waiting.answer.cancelled():
            continue
        if isinstance(answer, ServingError):
            waiting.answer.set_exception(answer)
        else:
            waiting.answer.set_result(answer)
