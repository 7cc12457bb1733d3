"""Batching: combine the rows of waiting requests into one run of the model.

A request that finds the model idle runs at once; requests that arrive during a run are queued and share the next one.
On two cores AlexNet takes 25 to 29 ms for one image and 14.5 ms for each of eight (measured). Nothing waits for a batch
to fill, unless max_batch_delay_ms is set.

When the model uses all cores, decoding and inference take turns. Running both at once costs 4-13 % more CPU per request
(measured), because ONNX Runtime's threads wait for the core that a decoder occupies.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from collections.abc import Sequence
from functools import partial
from typing import TypeVar, cast

from pinnace.errors import ServingError
from pinnace.inference.batch import PendingRequest, PreprocessedRequest, Steps, run_batch
from pinnace.inference.decode_budget import Share
from pinnace.inference.scheduler import Job, Scheduler, capture, resolve
from pinnace.observability.metrics import Metrics
from pinnace.observability.timings import RequestTimings
from pinnace.predictor import Arrays, PreprocessCost

T = TypeVar("T")

DECODE_WAIT_RUNS = 4  # a batch waits at most this many run times for requests that are still being decoded
PIPELINE_DEPTH = 2  # one batch running and one being prepared: more would only use memory


class Batcher:
    """The requests to one model: decoded in order of arrival, run together, one run at a time.

    There is one run at a time because ONNX Runtime uses every core for one batch. With a session and a thread per core,
    16 connections got 52 requests per second instead of 56, and a lone request took 45 ms instead of 31 (measured).
    """

    def __init__(
        self, model_name: str, scheduler: Scheduler, metrics: Metrics, max_batch_size: int, max_batch_delay_ms: int
    ) -> None:
        self._model_name = model_name
        self._scheduler = scheduler
        self._budget = scheduler.decode_budget
        self._metrics = metrics
        self._max_rows = max_batch_size
        self._delay_seconds = max_batch_delay_ms / 1000
        # Everything below changes only while the scheduler's lock is held.
        self._backlog: deque[PendingRequest] = deque()  # submitted
        self._queue: deque[PendingRequest] = deque()  # decoded
        self._num_decoding = 0
        self._num_in_pipeline = 0  # being decoded, queued, or in the run
        self.running_since = math.inf
        self._run_ended_at = self._run_seconds = 0.0
        self.ready_at = math.inf
        self.uses_all_cores = False
        scheduler.add_source(self)

    async def submit(self, steps: Steps[T], timings: RequestTimings) -> T:
        """Run one request through `preprocess`, the model and `postprocess`, and return the result of `postprocess`.

        The steps run on worker threads. If cancelled, steps that have not started are skipped.

        Raises:
            ServingError: What a step raised; for an exception that is no ServingError, InternalError.
        """
        pending = PendingRequest(steps, timings, asyncio.get_running_loop().create_future())
        try:
            result: T = await self._scheduler.submit(pending.result, partial(self._enqueue, pending))
            return result
        finally:
            with self._scheduler.lock:
                was_decoded = pending.is_decoded
                if pending.result.cancelled() and pending in self._backlog:
                    self._backlog.remove(pending)  # otherwise its body would stay in memory until its turn
                if not pending.is_preprocessing:
                    self._release_share(pending)
                    self._scheduler.wake_worker()
            if was_decoded:
                self._metrics.queued_or_running.dec()
            del pending  # an error would keep this frame, and so the request's body, until a garbage collection

    def next_job(self) -> Job:
        """Return the run of the oldest request that is not cancelled, with those queued that fit into its batch."""
        batch: list[PendingRequest] = []
        others: deque[PendingRequest] = deque()
        num_cancelled, free_rows = 0, self._max_rows
        for pending in self._queue:
            preprocessed = pending.preprocessed
            if pending.result.cancelled():
                num_cancelled += 1
            elif not batch or (
                preprocessed.num_rows <= free_rows and preprocessed.can_batch_with(batch[0].preprocessed)
            ):
                batch.append(pending)
                free_rows -= preprocessed.num_rows
            else:
                others.append(pending)
        self._queue = others
        self._finish(num_cancelled)
        if batch:
            self.running_since = time.perf_counter()
            self._scheduler.has_exclusive_run |= batch[0].preprocessed.predictor.uses_all_cores
        self._update_ready_at()
        return partial(self._run, batch, num_cancelled, is_full=bool(others) or free_rows <= 0)

    def _enqueue(self, pending: PendingRequest) -> None:
        self._backlog.append(pending)
        self._start_decoding()
        self._update_ready_at()

    def _start_decoding(self) -> None:
        """Move requests from the backlog to the decode queue until PIPELINE_DEPTH batches are in the pipeline."""
        while self._backlog and self._num_in_pipeline < PIPELINE_DEPTH * self._max_rows:
            self._scheduler.decode_queue.append(partial(self._decode, self._backlog.popleft()))
            self._num_decoding += 1
            self._num_in_pipeline += 1

    def _finish(self, num_requests: int) -> None:
        """Take requests out of the pipeline, and let others in."""
        self._num_in_pipeline -= num_requests
        self._start_decoding()

    def _update_ready_at(self) -> None:
        """Set when the next batch may run, and whether it uses all cores: after each change of what they depend on."""
        if self.running_since < math.inf or not self._queue:
            self.ready_at = math.inf
            return
        oldest = self._queue[0]
        self.uses_all_cores = oldest.preprocessed.predictor.uses_all_cores
        self.ready_at = oldest.enqueued_at + self._delay_seconds
        if self.uses_all_cores and self._num_decoding:
            waits_since = max(oldest.enqueued_at, self._run_ended_at)
            self.ready_at = max(self.ready_at, waits_since + DECODE_WAIT_RUNS * self._run_seconds)
        if sum(pending.preprocessed.num_rows for pending in self._queue) >= self._max_rows:
            self.ready_at = oldest.enqueued_at

    def _decode(self, pending: PendingRequest) -> None:
        """Decode a request and estimate its cost. If its share is granted, preprocess it; else it waits for it."""
        error: ServingError | None = None
        if not pending.result.cancelled():
            started_at = time.perf_counter()
            cost, error = pending.context.run(capture, pending.steps.estimate)
            pending.timings.stages["decode_queue"] = started_at - pending.enqueued_at
            pending.timings.stages["decode"] = time.perf_counter() - started_at
            if cost and not (error := self._request_share(pending, cost)):
                if pending.is_preprocessing:
                    self._preprocess(pending)
                return
        with self._scheduler.lock:
            self._num_decoding -= 1
            self._finish(1)
            self._update_ready_at()
        if error:
            resolve(pending.result, None, error)

    def _request_share(self, pending: PendingRequest, cost: PreprocessCost) -> ServingError | None:
        """Request the share of a decoded request. If it has to wait, the pipeline goes on without the request.

        Returns the error if the request can never be preprocessed, or not now.
        """
        pending.enqueued_at = time.perf_counter()
        with self._scheduler.lock:
            try:
                pending.share = share = self._budget.request(cost, partial(self._resume, pending))
            except ServingError as error:
                return error
            pending.is_preprocessing = share.is_granted
            if pending.result.cancelled() and not pending.is_preprocessing:
                self._release_share(pending)  # `submit` has ended, and could not do it
            if share.is_slow or not pending.is_preprocessing:
                self._num_decoding -= 1  # no batch waits for it
            if not pending.is_preprocessing:
                self._finish(1)
            self._update_ready_at()
        return None

    def _release_share(self, pending: PendingRequest) -> None:
        """Give the share of a request back, if it has one: the request has ended. Called with the lock held."""
        if pending.share:
            self._budget.release(pending.share)
            pending.share = None  # it refers to the request, which would stay in memory until a garbage collection

    def _resume(self, pending: PendingRequest) -> None:
        """Queue a request whose share has been granted. Called with the lock held."""
        pending.is_preprocessing = True
        self._num_in_pipeline += 1
        self._num_decoding += not (pending.share and pending.share.is_slow)
        self._scheduler.decode_queue.append(partial(self._preprocess, pending))
        self._update_ready_at()

    def _preprocess(self, pending: PendingRequest) -> None:
        """Preprocess a request that has its share, and queue it for the model."""
        preprocessed: PreprocessedRequest | None = None
        error: ServingError | None = None
        share = cast(Share, pending.share)
        is_awaited = not share.is_slow
        stages = pending.timings.stages
        if not pending.result.cancelled():
            started_at = time.perf_counter()
            stages["decode_queue"] += started_at - pending.enqueued_at
            preprocess = partial(pending.steps.preprocess, pending.result.cancelled)
            preprocessed, error = pending.context.run(capture, preprocess)
            stages["decode"] += time.perf_counter() - started_at
            self._observe_if_abandoned(pending, "decode", "preprocess")
        with self._scheduler.lock:
            pending.is_preprocessing = False
            self._num_decoding -= is_awaited
            if preprocessed and not pending.result.cancelled():
                self._budget.finish_decoding(share, sum(array.nbytes for array in preprocessed.arrays.values()))
                pending.preprocessed, pending.is_decoded = preprocessed, True
                pending.enqueued_at = time.perf_counter()
                self._metrics.queued_or_running.inc()
                self._queue.append(pending)
            else:
                self._release_share(pending)
                self._finish(1)
            self._update_ready_at()
        if error:
            resolve(pending.result, None, error)

    def _run(self, batch: Sequence[PendingRequest], num_cancelled: int, is_full: bool) -> None:
        started_at = time.perf_counter()
        if num_cancelled:
            self._metrics.count_dropped(self._model_name, num_cancelled)
        if not batch:
            return
        for pending in batch:
            pending.timings.stages["queue"] = started_at - pending.enqueued_at
        self._metrics.count_batch(self._model_name, "full" if is_full else self._why_not_larger(batch[0]))
        results = run_batch(batch, self._model_name, self._max_rows, self._metrics)
        for pending in batch:
            self._observe_if_abandoned(pending, "infer", "predict")
        with self._scheduler.lock:
            self.running_since = math.inf
            self._scheduler.has_exclusive_run &= not batch[0].preprocessed.predictor.uses_all_cores
            self._run_ended_at = time.perf_counter()
            self._run_seconds = self._run_ended_at - started_at
            self._finish(len(batch))
            self._update_ready_at()
            for pending, result in zip(batch, results, strict=True):
                self._scheduler.encode_queue.append(partial(self._encode, pending, result))

    def _why_not_larger(self, oldest: PendingRequest) -> str:
        """Return why a batch that left no request waiting is not larger.

        It is `delay` if max_batch_delay_ms is set, `queued` if its oldest request waited for the last run, else `idle`.
        """
        if self._delay_seconds:
            return "delay"
        return "queued" if oldest.enqueued_at < self._run_ended_at else "idle"

    def _encode(self, pending: PendingRequest, predictions: Arrays | ServingError) -> None:
        if pending.result.cancelled():
            return
        if isinstance(predictions, ServingError):
            resolve(pending.result, None, predictions)
            return
        started_at = time.perf_counter()
        postprocess = partial(pending.steps.postprocess, pending.preprocessed, predictions)
        value, error = pending.context.run(capture, postprocess)
        pending.timings.stages["encode"] = time.perf_counter() - started_at
        self._observe_if_abandoned(pending, "encode", "postprocess")
        resolve(pending.result, value, error)

    def _observe_if_abandoned(self, pending: PendingRequest, stage: str, handler: str) -> None:
        """Observe work that outlived its request: the request was observed without it when it ended."""
        if pending.result.cancelled():
            self._metrics.observe_abandoned(self._model_name, stage, handler, pending.timings)
