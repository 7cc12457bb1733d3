"""Rows of many requests become one run of the model.

A lone request never waits: an idle engine takes at once what is there, and while it is busy, arrivals queue and go
together next. On two cores AlexNet takes 25 to 29 ms for one image and 14.5 for each of eight (measured).

Requests that arrive are decoded meanwhile, unless the run takes every core: see cores.py.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from contextvars import Context, copy_context
from dataclasses import dataclass, field
from itertools import accumulate

import numpy as np

from serving.cores import Cores
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
    """The rows that wait for one model, and the one thread that runs it.

    One, since ONNX Runtime uses every core for one batch: with a session and a thread for each core, 16 connections got
    52 requests a second instead of 56, and a lone one waited 45 ms instead of 31 (measured). A predictor whose runs
    take every core is not run beside decoding, either: a batch is decoded, then run, then the next one is decoded.
    """

    def __init__(
        self, model_name: str, cores: Cores, metrics: Metrics, max_batch_size: int, max_batch_delay_ms: int
    ) -> None:
        self._model_name = model_name
        self._cores = cores
        self._metrics = metrics
        self._max_rows = max_batch_size
        self._delay_seconds = max_batch_delay_ms / 1000
        self._queue: deque[_Waiting] = deque()
        self._coming = 0
        self._ran_until = self._run_seconds = 0.0
        self._changed = threading.Condition()
        self._closed = False
        threading.Thread(target=self._work, name=f"engine of {model_name}", daemon=True).start()

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

    def queue(self, predictor: Predictor, rows: Rows) -> asyncio.Future[Predicted]:
        """Have one request's rows predicted. Gives ServingError. Cancelled before its run, it has none."""
        waiting = _Waiting(predictor, rows, asyncio.get_running_loop().create_future())
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
        reason = self._await_rows()
        if not reason:
            return False
        with self._turn():
            batch = self._take(reason)
            if batch:
                started_at = time.perf_counter()
                self._run(batch)
                with self._changed:
                    self._ran_until = time.perf_counter()
                    self._run_seconds = self._ran_until - started_at
        return True

    def _turn(self) -> AbstractContextManager[None]:
        """What the next run needs of the cores. Only this thread takes from the queue: there is an oldest."""
        return self._cores.taken() if self._queue[0].predictor.takes_every_core else nullcontext()

    def _await_rows(self) -> str:
        """Returns when the oldest request should run, and why no more may be with it; empty when closed."""
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
                else:
                    return reason
        return ""

    def _take(self, reason: str) -> list[_Waiting]:
        """The oldest request whose client has not left, and those behind it that fit in its run."""
        batch: list[_Waiting] = []
        others: deque[_Waiting] = deque()
        free = self._max_rows
        with self._changed:
            for waiting in self._queue:
                if waiting.answer.cancelled():
                    self._metrics.dropped(self._model_name)
                elif not batch or (waiting.size <= free and waiting.goes_with(batch[0])):
                    batch.append(waiting)
                    free -= waiting.size
                else:
                    others.append(waiting)
            self._queue = others
        for waiting in batch:
            self._metrics.staged("queue", time.perf_counter() - waiting.since)
        if batch:
            self._metrics.batch(self._model_name, "full" if others or free <= 0 else reason)
        return batch

    def _run(self, batch: Sequence[_Waiting]) -> None:
        """Answer each of them. Where a run of several fails, each runs alone: only who is to blame fails then."""
        answers: Sequence[Predicted | ServingError]
        try:
            answers = self._predicted(batch)
        except Exception as error:
            if len(batch) > 1:
                for waiting in batch:
                    self._metrics.batch(self._model_name, "alone")
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
            for _ in batch:
                self._metrics.inferred(self._model_name, run_seconds)
        predictions = {name: np.concatenate([piece[name] for piece in pieces]) for name in pieces[0]}
        return [
            Predicted({name: array[end - waiting.size : end] for name, array in predictions.items()}, run_seconds)
            for waiting, end in zip(batch, ends, strict=True)
        ]

    def _piece(self, first: _Waiting, rows: Rows) -> Rows:
        """One run, of no more rows than are allowed."""
        size = _size(rows)
        self._metrics.run(self._model_name, size)
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
