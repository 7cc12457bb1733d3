"""Small predictors, requests and a metrics reader for the unit tests."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray
from prometheus_client.parser import text_string_to_metric_families

from pinnace.inference.batch import PreprocessedRequest
from pinnace.observability.metrics import Metrics
from pinnace.predictor import Arrays, Predictor, PreprocessCost, Request, Response
from pinnace.settings import Settings
from pinnace.tensors import Tensor

MODEL = "custom-model"
TIMEOUT_SECONDS = 20
FREE = PreprocessCost()


class Recorder(Predictor):
    """Returns its input and records the rows of each run. A run waits for `gate`; a row of -1 makes it fail."""

    def __init__(self, settings: Settings | None = None, model_dir: Path | None = None) -> None:
        super().__init__(settings or Settings(), model_dir)
        self.runs: list[list[float]] = []
        self.has_started = threading.Event()
        self.gate = threading.Event()
        self.gate.set()

    def preprocess(self, request: Request) -> Arrays:
        return {"x": request.input.array}

    def predict(self, batch: Arrays) -> Arrays:
        self.has_started.set()
        if not self.gate.wait(TIMEOUT_SECONDS):
            raise TimeoutError("the test did not open the gate")
        self.runs.append(batch["x"].tolist())
        if -1 in batch["x"]:
            raise RuntimeError("a row of -1")
        return {"y": batch["x"]}

    def postprocess(self, predictions: Arrays, request: Request) -> Response:
        return Response([Tensor("y", predictions["y"])])


class AllCores(Recorder):
    """The same, with runs that use all cores."""

    uses_all_cores = True


def preprocessed(predictor: Predictor, rows: Sequence[float], dtype: DTypeLike = np.float32) -> PreprocessedRequest:
    """Return a request with one array of the given rows."""
    array: NDArray[Any] = np.array(rows, dtype)
    return PreprocessedRequest(predictor, Request(MODEL, (Tensor("x", array),)), {"x": array}, len(array))


class Steps:
    """The steps of a request, of functions. It is submitted by `Batcher.submit`."""

    def __init__(
        self,
        preprocess: Callable[[], PreprocessedRequest],
        postprocess: Callable[[PreprocessedRequest, Arrays], Any],
        cost: PreprocessCost = FREE,
    ) -> None:
        self._preprocess = preprocess
        self._cost = cost
        self.postprocess = postprocess

    def estimate(self) -> PreprocessCost:
        return self._cost

    def preprocess(self, _: Callable[[], bool]) -> PreprocessedRequest:
        return self._preprocess()


def sample(metrics: Metrics, name: str, **labels: str) -> float:
    """Return the value of one sample; 0 if there is none."""
    text, _ = metrics.render("")
    for family in text_string_to_metric_families(text.decode()):
        for found in family.samples:
            if found.name == name and found.labels == labels:
                return found.value
    return 0.0
