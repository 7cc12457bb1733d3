"""One request in, one response out, whichever protocol it came by: limits, threads, ids and errors.

Decoding, encoding and the handlers beside predict run on a pool of threads, predict on the batcher's; the event loop
only waits.
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
import time
import uuid
from collections.abc import Callable, Iterator, Set
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import TypeVar

from serving.batching import Batcher
from serving.cpus import available_cpus
from serving.errors import InvalidInput, Overloaded, ServingError, TooLarge
from serving.logs import REQUEST_ID, TRACE, public
from serving.metrics import Metrics
from serving.predictor import Predictor, Request, Response, Rows
from serving.repository import Repository
from serving.settings import Settings

trace = logging.getLogger(TRACE)

T = TypeVar("T")

TURNS = 2  # batches: one that runs, and one that is made ready


class DataPlane:
    """Owns the threads and the count of requests under way; `close` when both listeners have stopped."""

    def __init__(self, repository: Repository, settings: Settings, metrics: Metrics) -> None:
        self.repository = repository
        self.metrics = metrics
        self.under_way = 0
        self.settings = settings
        self._decoders = ThreadPoolExecutor(
            settings.max_asyncio_workers or settings.threads or available_cpus(), "decoder"
        )
        self._encoder = ThreadPoolExecutor(1, "encoder")  # of its own: an answer never waits behind what is to come
        # Decoded further ahead, rows would only fill memory: 0.6 MB for each picture.
        self._turns = asyncio.Semaphore(TURNS * settings.max_batch_size)
        self._batcher = Batcher(metrics, settings.max_batch_size, settings.max_batch_delay_ms)

    @contextmanager
    def counted(self, protocol: str) -> Iterator[None]:
        """Around all that a transport does for one inference request: counts how it ended."""
        outcome = "failed"
        try:
            yield
            outcome = "answered"
        except ServingError as error:
            outcome = error.outcome
            raise
        except asyncio.CancelledError:
            outcome = "cancelled"
            raise
        finally:
            self.metrics.ended(protocol, outcome)

    async def infer(self, decode: Callable[[], Request], encode: Callable[[Response], T]) -> T:
        """Answer one request; `decode` and `encode` are the transport's, called on a worker thread.

        Raises ServingError. Cancelled, it gives up what has not started.
        """
        latency = _Latency(self.metrics)
        with self._admitted():
            with self.metrics.stage("turn"):
                await self._turns.acquire()
            try:
                with self._batcher.coming():
                    predictor, request, rows = await _run(self._decoders, partial(self._prepare, decode, latency))
                    queued = self._batcher.queue(predictor, request.model_name, rows)
                with self.metrics.at_model.track_inprogress():
                    predicted = await queued
            finally:
                self._turns.release()
            latency.took("predict", predicted.run_seconds)
            work = partial(self._answer, predictor, request, predicted.rows, encode, latency)
            answer = await _run(self._encoder, work)
        if self.settings.enable_latency_logging:
            trace.info("requestId: %s, %s", REQUEST_ID.get() or "N.A.", latency)
        return answer

    @property
    def extensions(self) -> list[str]:
        """Of the Open Inference Protocol, over REST and gRPC."""
        return ["classification", *(["model_repository_extension"] if self.repository.may_change else [])]

    def close(self) -> None:
        """Ends the threads without waiting for work that is still running."""
        for pool in (self._decoders, self._encoder):
            pool.shutdown(wait=False, cancel_futures=True)
        self._batcher.close()

    @contextmanager
    def _admitted(self) -> Iterator[None]:
        if self.under_way >= self.settings.max_concurrent_requests:
            raise Overloaded
        self.under_way += 1
        try:
            with self.metrics.under_way.track_inprogress():
                yield
        finally:
            self.under_way -= 1

    def _prepare(self, decode: Callable[[], Request], latency: _Latency) -> tuple[Predictor, Request, Rows]:
        self._batcher.await_cores()
        with self.metrics.stage("decode"):
            request = decode()
            predictor = self.repository.predictor(request.model_name)
            if request.rows == 0:
                raise InvalidInput("the request has no instances")
            if request.rows > self.settings.max_instances:
                raise TooLarge(f"{request.rows} instances exceed max_instances ({self.settings.max_instances})")
            if predictor.outputs:
                _check_outputs(request, {spec.name for spec in predictor.outputs})
            request = replace(request, id=request.id or str(uuid.uuid4()))
            with latency.of("preprocess", request.model_name):
                rows = predictor.preprocess(request)
            sizes = {len(array) for array in rows.values()}
            if len(sizes) != 1:
                raise ValueError(f"preprocess must give arrays with as many rows in each, and gave {sizes or 'none'}")
            return predictor, request, rows

    def _answer(
        self,
        predictor: Predictor,
        request: Request,
        predictions: Rows,
        encode: Callable[[Response], T],
        latency: _Latency,
    ) -> T:
        with self.metrics.stage("encode"):
            with latency.of("postprocess", request.model_name):
                response = predictor.postprocess(predictions, request)
            outputs = {tensor.name: tensor for tensor in response.outputs}
            _check_outputs(request, outputs.keys())
            chosen = [outputs[output.name] for output in request.outputs] or response.outputs
            return encode(replace(response, outputs=chosen, model_name=request.model_name, id=request.id))


class _Latency:
    """Milliseconds of one request in each handler, as KServe logs them; in its histograms as well."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._milliseconds = {"preprocess": 0.0, "explain": 0.0, "predict": 0.0, "postprocess": 0.0}

    @contextmanager
    def of(self, handler: str, model_name: str) -> Iterator[None]:
        """Times one call of it, also where it raises."""
        started_at = time.perf_counter()
        try:
            yield
        finally:
            seconds = time.perf_counter() - started_at
            self._metrics.handled(handler, model_name, seconds)
            self.took(handler, seconds)

    def took(self, handler: str, seconds: float) -> None:
        self._milliseconds[handler] = round(seconds * 1000, 9)

    def __str__(self) -> str:
        return ", ".join(f"{handler}_ms: {value:g}" for handler, value in self._milliseconds.items())


def _check_outputs(request: Request, offered: Set[str]) -> None:
    names = [output.name for output in request.outputs]
    for name in names:
        if name not in offered:
            raise InvalidInput(f"Unexpected inference output '{name}' for model '{request.model_name}'")
    if len(names) != len(set(names)):
        raise InvalidInput("an output is requested twice")


async def _run(pool: ThreadPoolExecutor, work: Callable[[], T]) -> T:
    context = contextvars.copy_context()  # the request's id, for what is logged on the thread
    return await asyncio.get_running_loop().run_in_executor(pool, context.run, _guarded, work)


def _guarded(work: Callable[[], T]) -> T:
    """On the thread already, since a StopIteration would never reach the one who waits."""
    try:
        return work()
    except Exception as error:
        raise public(error) from None
