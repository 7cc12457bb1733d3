"""The scheduler: the worker threads that all models share, and what each of them does next.

A free worker takes, in this order, a response to encode, a batch that is ready to run, a request to decode. It goes on
with what its own work has made possible, so a lone request is decoded, run and encoded by one thread. With a thread per
step int8 AlexNet took 11.8 ms instead of 10.2 ms, because a woken thread and ONNX Runtime's threads began on the same
core (measured).
"""

from __future__ import annotations

import asyncio
import math
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from contextvars import copy_context
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol, TypeVar

from pinnace.errors import ServingError
from pinnace.inference.decode_budget import DecodeBudget
from pinnace.observability.logging import to_client_error

T = TypeVar("T")

UNLIMITED = sys.maxsize

Job = Callable[[], None]
"""A piece of work for one worker. It raises nothing."""


class Source(Protocol):
    """A model's runs. Its attributes change, and its method is called, only while the scheduler's lock is held."""

    ready_at: float
    """When the next run may start, on the clock of time.perf_counter: the past means now, infinity means never."""
    uses_all_cores: bool
    """Whether the next run uses all cores."""
    running_since: float
    """When the run that is going on started, on the same clock; infinity if there is none."""

    def next_job(self) -> Job:
        """Return the next run, which is ready. Raises nothing."""


class JobQueue:
    """Jobs that run in order of arrival, at most `max_concurrency` at a time."""

    def __init__(self, scheduler: Scheduler, max_concurrency: int, concurrent_with_runs: bool) -> None:
        """Create an empty queue. Unless `concurrent_with_runs`, no job starts while a run uses all cores."""
        self._scheduler = scheduler
        self._max_concurrency = max_concurrency
        self._concurrent_with_runs = concurrent_with_runs
        self._started_at: list[float] = []  # of the jobs that run
        self._jobs: deque[Job] = deque()

    def append(self, job: Job) -> None:
        """Add a job. Call with the scheduler's lock held."""
        self._jobs.append(job)

    @property
    def is_ready(self) -> bool:
        """Return whether a job may start now."""
        has_capacity = len(self._started_at) < self._max_concurrency
        is_allowed = self._concurrent_with_runs or not self._scheduler.has_exclusive_run
        return bool(self._jobs) and has_capacity and is_allowed

    def next_job(self) -> Job:
        """Return the oldest job, counted as running until it ends."""
        self._started_at.append(started_at := time.perf_counter())
        return partial(self._run, self._jobs.popleft(), started_at)

    def busy_seconds(self, now: float) -> float:
        """Return for how many seconds all slots have been busy. Call with the scheduler's lock held."""
        return now - max(self._started_at) if len(self._started_at) >= self._max_concurrency else 0.0

    def _run(self, job: Job, started_at: float) -> None:
        try:
            job()
        finally:
            with self._scheduler.lock:
                self._started_at.remove(started_at)


@dataclass(eq=False, slots=True)
class _IdleWorker:
    """A sleeping worker: it checks the queues again at `wakes_at`, or when `wake` is released."""

    wakes_at: float
    wake: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))


class Scheduler:
    """A pool of worker threads: `decoders` decode slots, one encode slot, and one run slot per model."""

    def __init__(self, decoders: int, max_decode_bytes: int = UNLIMITED, max_waiting: int = UNLIMITED) -> None:
        """Start the workers. The last two arguments are those of the decode budget, which all models share."""
        self.lock = threading.Lock()
        self.decode_budget = DecodeBudget(max_decode_bytes, decoders, max_waiting)
        self.has_exclusive_run = False
        """Whether a run uses all cores. Meanwhile nothing is decoded, and no other such run starts."""
        self.decode_queue = JobQueue(self, decoders, concurrent_with_runs=False)
        self.encode_queue = JobQueue(self, 1, concurrent_with_runs=True)
        self._models: list[Source] = []
        self._idle: list[_IdleWorker] = []  # the last one to sleep is woken first: its memory is still in the caches
        self._is_waking = self._is_closed = False
        for _ in range(decoders + 1):
            self._start_worker()

    def add_source(self, model: Source) -> None:
        """Add the runs of one more model, and a worker for them."""
        with self.lock:
            self._models.append(model)
        self._start_worker()

    async def submit_decode(self, work: Callable[[], T]) -> T:
        """Run `work` on a decode slot and return its result. Raises ServingError only."""
        return await self._submit_to(self.decode_queue, work)

    async def submit_encode(self, work: Callable[[], T]) -> T:
        """Run `work` on the encode slot and return its result. Raises ServingError only."""
        return await self._submit_to(self.encode_queue, work)

    async def submit(self, result: asyncio.Future[T], enqueue: Callable[[], None]) -> T:
        """Call `enqueue` with the lock held, wake a worker, and wait for the result that some job will set."""
        with self.lock:
            enqueue()
            self.wake_worker()
        try:
            return await result
        finally:
            del result, enqueue  # an error that is raised would otherwise refer to itself, and to the request's body

    def wake_worker(self) -> None:
        """Wake one idle worker if none is due to check the queues in time. Call with the lock held after queueing work.

        Jobs need not call this: their worker checks the queues when the job ends, and wakes further workers.
        """
        if self._idle and not self._is_waking:
            ready_at, _ = self._next_source(time.perf_counter())
            if ready_at < min(worker.wakes_at for worker in self._idle):
                self._idle.pop().wake.release()
                self._is_waking = True

    @property
    def stuck_seconds(self) -> float:
        """Return for how long no decode could start, or, if that is longer, how long the longest run has lasted."""
        with self.lock:
            now = time.perf_counter()
            return max(self.decode_queue.busy_seconds(now), *(now - model.running_since for model in self._models), 0.0)

    def close(self) -> None:
        """End the workers without waiting for jobs that run; jobs that have not started never will."""
        with self.lock:
            self._is_closed = True
            while self._idle:
                self._idle.pop().wake.release()

    async def _submit_to(self, queue: JobQueue, work: Callable[[], T]) -> T:
        result: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        context = copy_context()

        def job() -> None:
            if not result.cancelled():
                resolve(result, *context.run(capture, work))

        return await self.submit(result, partial(queue.append, job))

    def _start_worker(self) -> None:
        threading.Thread(target=self._work, name="worker", daemon=True).start()

    def _work(self) -> None:
        while not self._is_closed:
            self._work_once()

    def _work_once(self) -> None:
        """Run one job, or sleep. A separate method, so that an idle worker's frame keeps no reference to a model."""
        with self.lock:
            self._is_waking = False
            ready_at, source = self._next_source(now := time.perf_counter())
            if ready_at <= now and source:
                job = source.next_job()
                self.wake_worker()
            else:
                idle = _IdleWorker(ready_at)
                self._idle.append(idle)
        if ready_at <= now:
            job()
        elif not idle.wake.acquire(timeout=None if ready_at == math.inf else ready_at - now):
            with self.lock:
                if idle in self._idle:
                    self._idle.remove(idle)

    def _next_source(self, now: float) -> tuple[float, Source | JobQueue | None]:
        """Return when the next job may start, and its source.

        A response to encode comes first, then a run that is ready, then a request to decode. If none of them is ready,
        the source is that of the earliest run.
        """
        if self.encode_queue.is_ready:
            return 0.0, self.encode_queue
        earliest: tuple[float, Source | None] = (math.inf, None)
        for model in self._models:
            if model.ready_at < earliest[0] and not (model.uses_all_cores and self.has_exclusive_run):
                earliest = (model.ready_at, model)
        if earliest[0] > now and self.decode_queue.is_ready:
            return 0.0, self.decode_queue
        return earliest


def capture(work: Callable[[], T]) -> tuple[T | None, ServingError | None]:
    """Return (result, None) or (None, error).

    Unexpected exceptions, SystemExit included, are logged and become InternalError: all models share the threads.
    """
    try:
        return work(), None
    except BaseException as error:
        client_error = to_client_error(error)
    # Its frames would keep the request's body in memory until a garbage collection.
    client_error.__context__ = client_error.__cause__ = None
    return None, client_error.with_traceback(None)


def resolve(result: asyncio.Future[Any], value: object, error: Exception | None) -> None:
    """Set a future's result or error from a worker thread."""
    with suppress(RuntimeError):  # the loop is closed: nobody waits for the result any more
        result.get_loop().call_soon_threadsafe(_set_result, result, value, error)


def _set_result(result: asyncio.Future[Any], value: object, error: Exception | None) -> None:
    if result.cancelled():
        return
    if error:
        result.set_exception(error)
    else:
        result.set_result(value)
