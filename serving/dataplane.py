"""One request in, one response out, whichever protocol it came by: limits, threads, ids and errors.

Decoding, handlers and encoding run on threads: one pool for what is done per request, and one thread that predicts,
since the engine uses all cores for one batch. The event loop only waits.
"""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import TypeVar

from serving.cpus import available_cpus
from serving.errors import InternalError, InvalidInput, Overloaded, ServingError, TooLarge
from serving.models import Model, Models
from serving.predictor import Request, Response, Rows
from serving.settings import Settings

logger = logging.getLogger(__name__)

T = TypeVar("T")


class DataPlane:
    """Owns the threads and the count of requests under way; `close` when both listeners have stopped."""

    def __init__(self, models: Models, settings: Settings) -> None:
        self.models = models
        self.under_way = 0
        self.draining = False
        self._settings = settings
        self._workers = ThreadPoolExecutor(settings.threads or available_cpus(), "worker")
        self._engine = ThreadPoolExecutor(1, "engine")

    @property
    def ready(self) -> bool:
        """Whether an inference would be answered now."""
        return self.models.ready and not self.draining

    async def infer(self, decode: Callable[[], Request], encode: Callable[[Response], T]) -> T:
        """Answer one request; `decode` and `encode` are the transport's, called on a worker thread.

        Raises ServingError. Cancelled, it gives up what has not started.
        """
        with self._admitted():
            model, request, rows = await _run(self._workers, partial(self._prepare, decode))
            predictions = await _run(self._engine, partial(model.predictor.predict, rows))
            return await _run(self._workers, partial(self._answer, model, request, predictions, encode))

    def close(self) -> None:
        """Ends the threads without waiting for work that is still running."""
        self._workers.shutdown(wait=False, cancel_futures=True)
        self._engine.shutdown(wait=False, cancel_futures=True)

    @contextmanager
    def _admitted(self) -> Iterator[None]:
        if self.under_way >= self._settings.max_concurrent_requests:
            raise Overloaded
        self.under_way += 1
        try:
            yield
        finally:
            self.under_way -= 1

    def _prepare(self, decode: Callable[[], Request]) -> tuple[Model, Request, Rows]:
        request = decode()
        model = self.models.get_ready(request.model_name)
        rows, limit = sum(tensor.rows for tensor in request.inputs), self._settings.max_instances
        if rows == 0:
            raise InvalidInput("the request has no instances")
        if rows > limit * max(1, len(model.predictor.inputs)):
            raise TooLarge(f"{rows} instances exceed max_instances ({limit})")
        request = replace(request, id=request.id or str(uuid.uuid4()))
        return model, request, model.predictor.preprocess(request)

    def _answer(self, model: Model, request: Request, predictions: Rows, encode: Callable[[Response], T]) -> T:
        response = model.predictor.postprocess(predictions, request)
        return encode(replace(response, model_name=model.name, id=request.id))


async def _run(pool: ThreadPoolExecutor, work: Callable[[], T]) -> T:
    return await asyncio.get_running_loop().run_in_executor(pool, _guarded, work)


def _guarded(work: Callable[[], T]) -> T:
    """On the thread already, since a StopIteration would never reach the one who waits."""
    try:
        return work()
    except ServingError:
        raise
    except Exception:
        logger.exception("an inference failed")
        raise InternalError from None
