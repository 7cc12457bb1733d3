"""The threads beside the event loop, which all models share, and what each of them does next.

Whoever is free encodes an answer, else runs a batch that is due, else decodes a request; and goes on with what came of
its own work. So a lone request is decoded, run and encoded by one thread: with a thread for each, int8 AlexNet took
11.8 ms instead of 10.2, most of it since a woken thread and those of ONNX Runtime began on the same core (measured).
"""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from contextvars import copy_context
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from pinnace.observability.logging import to_client_error

T = TypeVar("T")

Job = Callable[[], None]


class Source(Protocol):
    """Where work comes from. Both methods are called with the lock of the threads held."""

    def due_at(self, now: float) -> float:
        """When its next work may begin, on the clock of time.perf_counter; the past is now, infinity is never."""

    def take(self) -> Job:
        """The next work, which is due. It raises nothing."""


class Line:
    """Work in the order of its coming, so much of it at a time."""

    def __init__(self, threads: Scheduler, most_at_once: int, beside_runs: bool) -> None:
        """Not `beside_runs`, none of it begins while a run has every core."""
        self._threads = threads
        self._most = most_at_once
        self._beside_runs = beside_runs
        self._under_way = 0
        self._jobs: deque[Job] = deque()

    def append(self, job: Job) -> None:
        """With the lock held."""
        self._jobs.append(job)

    def due_at(self, _: float) -> float:
        free = self._jobs and self._under_way < self._most and (self._beside_runs or not self._threads.cores_taken)
        return 0.0 if free else math.inf

    def take(self) -> Job:
        job = self._jobs.popleft()
        self._under_way += 1

        def done() -> None:
            try:
                job()
            finally:
                with self._threads.lock:
                    self._under_way -= 1

        return done


@dataclass(eq=False, slots=True)
class _Asleep:
    """One idle thread: it looks again `at` that time, or when it is woken."""

    at: float
    wake: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))


class Scheduler:
    """As many decode at once as are named, one encodes, and each model may run beside them."""

    def __init__(self, decoders: int) -> None:
        self.lock = threading.Lock()
        self.cores_taken = False
        """By a run that takes every core: nothing is decoded then, and no other such run begins."""
        self.decoding, self.encoding = Line(self, decoders, beside_runs=False), Line(self, 1, beside_runs=True)
        self._runs: list[Source] = []
        self._idle: list[_Asleep] = []  # the last to fall asleep is the first to be woken: its memory is warm
        self._waking = self._closed = False
        for _ in range(decoders + 1):
            self._start()

    def add(self, runs: Source) -> None:
        """Of one more model. Whose work has waited longest comes first."""
        with self.lock:
            self._runs.append(runs)
        self._start()

    async def decode(self, work: Callable[[], T]) -> T:
        """Raises ServingError alone."""
        return await self._done(self.decoding, work)

    async def encode(self, work: Callable[[], T]) -> T:
        """Raises ServingError alone."""
        return await self._done(self.encoding, work)

    def look(self) -> None:
        """With the lock held, after a change: wake somebody for work, or a time to watch, that nobody will see to.

        Not needed from work itself, whose thread looks next; and who is woken looks for the others.
        """
        if self._idle and not self._waking:
            due_at, _ = self._next(time.perf_counter())
            if due_at < min(one.at for one in self._idle):
                self._idle.pop().wake.release()
                self._waking = True

    def close(self) -> None:
        """Without waiting for work that is under way; what is not begins no more."""
        with self.lock:
            self._closed = True
            while self._idle:
                self._idle.pop().wake.release()

    async def _done(self, line: Line, work: Callable[[], T]) -> T:
        done: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        context = copy_context()

        def job() -> None:
            if not done.cancelled():
                resolve(done, *context.run(capture, work))

        with self.lock:
            line.append(job)
            self.look()
        return await done

    def _start(self) -> None:
        threading.Thread(target=self._work, name="worker", daemon=True).start()

    def _work(self) -> None:
        while not self._closed:
            self._work_once()

    def _work_once(self) -> None:
        """A method of its own, so that an idle thread holds on to nothing of a model that is unloaded meanwhile."""
        with self.lock:
            self._waking = False
            due_at, source = self._next(now := time.perf_counter())
            if due_at <= now and source:
                job = source.take()
                self.look()
            else:
                asleep = _Asleep(due_at)
                self._idle.append(asleep)
        if due_at <= now:
            job()
        elif not asleep.wake.acquire(timeout=None if due_at == math.inf else due_at - now):
            with self.lock:
                if asleep in self._idle:
                    self._idle.remove(asleep)

    def _next(self, now: float) -> tuple[float, Source | None]:
        """What is to be done, and from when on: the first kind of which something is due, else what is due first."""
        soonest: tuple[float, Source | None] = (math.inf, None)
        for kind in ([self.encoding], self._runs, [self.decoding]):
            for source in kind:
                soonest = min(soonest, (source.due_at(now), source), key=lambda one: one[0])
            if soonest[0] <= now:
                break
        return soonest


def capture(work: Callable[[], T]) -> tuple[T | None, Exception | None]:
    """What work on a thread gives, or the ServingError for what it raised; what nobody foresaw is logged here.

    That is SystemExit as well: the threads are everybody's.
    """
    try:
        return work(), None
    except BaseException as error:
        return None, to_client_error(error)


def resolve(answer: asyncio.Future[Any], result: object, error: Exception | None) -> None:
    """From a thread."""
    with suppress(RuntimeError):  # the loop is closed: nobody waits any more
        answer.get_loop().call_soon_threadsafe(_settle, answer, result, error)


def _settle(answer: asyncio.Future[Any], result: object, error: Exception | None) -> None:
    if answer.cancelled():
        return
    if error:
        answer.set_exception(error)
    else:
        answer.set_result(result)
