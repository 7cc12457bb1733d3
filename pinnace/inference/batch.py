"""One run of a model with the rows of several requests: to each its own predictions, or its own error."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextvars import Context, copy_context
from dataclasses import dataclass, field
from itertools import accumulate

import numpy as np

from pinnace.errors import ServingError
from pinnace.observability.logging import to_client_error
from pinnace.observability.metrics import Metrics
from pinnace.predictor import Arrays, Predictor, Request


@dataclass(frozen=True, slots=True)
class Prepared:
    """A decoded request, and the predictor that answers it."""

    predictor: Predictor
    request: Request
    rows: Arrays
    context: Context = field(default_factory=copy_context)  # with the request's id, for what is logged of it

    def goes_with(self, other: Prepared) -> bool:
        """Whether the rows of both are arrays of the same kinds, for the same predictor."""
        return self.predictor is other.predictor and self._kinds() == other._kinds()

    def _kinds(self) -> dict[str, object]:
        return {name: (array.dtype, array.shape[1:]) for name, array in self.rows.items()}


@dataclass(frozen=True, slots=True)
class Predicted:
    """The predictions for one request's rows, and how long the run took that they came from."""

    rows: Arrays
    run_seconds: float


class Runs:
    """Of one model, of no more rows than are allowed."""

    def __init__(self, model_name: str, metrics: Metrics, max_rows: int) -> None:
        self._model_name = model_name
        self._metrics = metrics
        self._max_rows = max_rows

    def answers(self, batch: Sequence[Prepared]) -> Sequence[Predicted | ServingError]:
        """To each its own. Where a run of several fails, each runs alone: only who is to blame fails then."""
        try:
            return self._predicted(batch)
        except BaseException as error:
            if len(batch) == 1:
                return [batch[0].context.run(to_client_error, error)]
        answers: list[Predicted | ServingError] = []
        for prepared in batch:
            self._metrics.batch(self._model_name, "alone")
            answers += self.answers([prepared])
        return answers

    def _predicted(self, batch: Sequence[Prepared]) -> list[Predicted]:
        predictor, rows = batch[0].predictor, batch[0].rows
        if len(batch) > 1:
            rows = {name: np.concatenate([prepared.rows[name] for prepared in batch]) for name in rows}
        sizes = [num_rows(prepared.rows) for prepared in batch]
        ends = list(accumulate(sizes))
        started_at = time.perf_counter()
        try:
            pieces = [
                self._piece(predictor, {name: array[start : start + self._max_rows] for name, array in rows.items()})
                for start in range(0, ends[-1], self._max_rows)
            ]
        finally:
            run_seconds = time.perf_counter() - started_at
            for _ in batch:
                self._metrics.inferred(self._model_name, run_seconds)
        predictions = {name: np.concatenate([piece[name] for piece in pieces]) for name in pieces[0]}
        return [
            Predicted({name: array[end - size : end] for name, array in predictions.items()}, run_seconds)
            for size, end in zip(sizes, ends, strict=True)
        ]

    def _piece(self, predictor: Predictor, rows: Arrays) -> Arrays:
        size = num_rows(rows)
        self._metrics.run(self._model_name, size)
        predictions = predictor.predict(rows)
        for name, array in predictions.items():
            if len(array) != size:
                raise ValueError(f"predict was given {size} rows and gave {len(array)} of {name}")
        return predictions


def num_rows(rows: Arrays) -> int:
    """How many rows they are."""
    return len(next(iter(rows.values())))
