"""Batches: one run of a model with the rows of several requests, and each request's share of the result."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from contextvars import Context, copy_context
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, Protocol, TypeVar

import numpy as np

from pinnace.errors import ServingError
from pinnace.inference.decode_budget import Share
from pinnace.observability.logging import to_client_error
from pinnace.observability.metrics import Metrics
from pinnace.observability.timings import RequestTimings
from pinnace.predictor import Arrays, Predictor, PreprocessCost, Request

Result = TypeVar("Result", covariant=True)


@dataclass(frozen=True, slots=True)
class PreprocessedRequest:
    """A decoded request, the arrays that `preprocess` returned for it, and the predictor that answers it."""

    predictor: Predictor
    request: Request
    arrays: Arrays
    num_rows: int

    def can_batch_with(self, other: PreprocessedRequest) -> bool:
        """Return whether both have arrays of the same names, dtypes and row shapes, for the same predictor."""
        return self.predictor is other.predictor and self._signature() == other._signature()

    def _signature(self) -> Mapping[str, object]:
        return {name: (array.dtype, array.shape[1:]) for name, array in self.arrays.items()}


class Steps(Protocol[Result]):
    """The steps of one request before and after the model. They run one after another, on worker threads."""

    def estimate(self) -> PreprocessCost:
        """Decode the request, and return what `preprocess` will cost. Raises ServingError."""

    def preprocess(self, is_abandoned: Callable[[], bool]) -> PreprocessedRequest:
        """Convert the request to arrays. `is_abandoned` says whether nobody waits any more. Raises ServingError."""

    def postprocess(self, preprocessed: PreprocessedRequest, predictions: Arrays) -> Result:
        """Convert the predictions for the request's rows to the result of the request. Raises ServingError."""


@dataclass(eq=False, slots=True)
class PendingRequest:
    """One request in the batcher, from its submission to its result. Its steps run on worker threads."""

    steps: Steps[Any]
    timings: RequestTimings
    result: asyncio.Future[Any]
    context: Context = field(default_factory=copy_context)  # carries the request's id to what is logged for it
    enqueued_at: float = field(default_factory=time.perf_counter)
    """When it joined the queue that it is in: the backlog, the wait for its share, the queue of decoded requests."""
    preprocessed: PreprocessedRequest = field(init=False)
    """The result of `preprocess`; unset before it."""
    is_decoded: bool = False
    share: Share | None = None
    """Its share of the decode budget, from the estimate of its cost until its result."""
    is_preprocessing: bool = False
    """Whether a worker runs `preprocess`, and gives the share back itself if the request is cancelled meanwhile."""


def run_batch(
    requests: Sequence[PendingRequest], model_name: str, max_rows: int, metrics: Metrics
) -> list[Arrays | ServingError]:
    """Run the model once for several requests, in chunks of at most `max_rows` rows.

    If the batch fails, its requests run again one by one, so that only the faulty request fails.

    Returns:
        For each request the predictions for its rows, or its error.
    """
    try:
        return list(_predict(requests, model_name, max_rows, metrics))
    except BaseException as error:
        if len(requests) == 1:
            return [requests[0].context.run(to_client_error, error)]
    results: list[Arrays | ServingError] = []
    for request in requests:
        metrics.count_batch(model_name, "alone")
        results += run_batch([request], model_name, max_rows, metrics)
    return results


def _predict(requests: Sequence[PendingRequest], model_name: str, max_rows: int, metrics: Metrics) -> list[Arrays]:
    batch = [request.preprocessed for request in requests]
    predictor, arrays = batch[0].predictor, batch[0].arrays
    if len(batch) > 1:
        arrays = {name: np.concatenate([request.arrays[name] for request in batch]) for name in arrays}
    sizes = [request.num_rows for request in batch]
    ends = list(accumulate(sizes))
    started_at = time.perf_counter()
    try:
        chunks = []
        for start in range(0, ends[-1], max_rows):
            end = min(start + max_rows, ends[-1])
            metrics.observe_batch_rows(model_name, end - start)
            chunk = {name: array[start:end] for name, array in arrays.items()}
            chunks.append(_predict_chunk(predictor, chunk, end - start))
    finally:
        run_seconds = time.perf_counter() - started_at
        for request in requests:
            request.timings.record_run(run_seconds)
    predictions = {name: np.concatenate([chunk[name] for chunk in chunks]) for name in chunks[0]}
    return [
        {name: array[end - size : end] for name, array in predictions.items()}
        for size, end in zip(sizes, ends, strict=True)
    ]


def _predict_chunk(predictor: Predictor, chunk: Arrays, num_rows: int) -> Arrays:
    predictions = predictor.predict(chunk)
    for name, array in predictions.items():
        if len(array) != num_rows:
            raise ValueError(f"predict received {num_rows} rows and returned {len(array)} of {name}")
    return predictions
