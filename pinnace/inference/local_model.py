"""A model in this process: its predictor, and one request's way through the four handlers."""

from __future__ import annotations

import logging
import os
import threading
import uuid
from collections.abc import Callable, Set
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np

from pinnace.errors import InvalidInput, ModelFileNotFound, ModelNotReady, PredictorError, StartupError, one_line
from pinnace.inference.admission import check_instances
from pinnace.inference.batch import Predicted, Prepared
from pinnace.inference.batching import Batcher
from pinnace.inference.model import Model
from pinnace.inference.scheduler import Scheduler
from pinnace.observability.logging import banner
from pinnace.observability.metrics import Metrics
from pinnace.observability.timings import Latency
from pinnace.predictor import ModelMetadata, Predictor, Request, Response
from pinnace.settings import Settings

logger = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class ModelContext:
    """What the models of one process share; whoever makes it closes the threads."""

    threads: Scheduler
    metrics: Metrics


class LocalModel(Model):
    """A fresh predictor at each load, ready once that has succeeded.

    A request keeps the predictor that it began with, so what an unload frees is free when the last of them is answered.
    """

    def __init__(
        self, predictor_class: type[Predictor], settings: Settings, model_dir: Path | None, shared: ModelContext
    ) -> None:
        """Named as `settings` say."""
        super().__init__(settings.model_name)
        self._class = predictor_class
        self._settings = settings
        self._model_dir = model_dir
        self._loaded: Predictor | None = None
        self._changing = threading.Lock()
        self._metrics = shared.metrics
        self._batcher = Batcher(
            self.name, shared.threads, shared.metrics, settings.max_batch_size, settings.max_batch_delay_ms
        )

    @property
    def ready(self) -> bool:
        return self._loaded is not None

    @property
    def metadata(self) -> ModelMetadata:
        """Of a model that is not loaded, what its class says."""
        return ModelMetadata.of(self._loaded or self._class)

    def load(self) -> None:
        with self._changing:
            self._loaded = self._loaded or self._load()

    def unload(self) -> None:
        with self._changing:
            self._loaded = None

    async def infer(self, decode: Callable[[], Request], encode: Callable[[Response], T], latency: Latency) -> T:
        return await self._batcher.answered(
            partial(self._prepare, decode, latency), partial(self._answer, encode, latency)
        )

    def close(self) -> None:
        """The threads are not the model's own."""

    def _load(self) -> Predictor:
        if self._model_dir and not os.access(self._model_dir, os.R_OK):
            problem = "may not be read" if os.access(self._model_dir, os.F_OK) else "does not exist"
            raise ModelFileNotFound(f"{self._model_dir}, where {self.name} should be, {problem}: see --model_dir")
        try:
            predictor = self._class(self._settings, self._model_dir)
            predictor.load()
        except StartupError:
            raise
        except (Exception, SystemExit) as error:
            raise PredictorError(
                f"{self._class.__qualname__} failed to load: {type(error).__name__}: {one_line(error)}"
            ) from error
        if predictor.warning:
            for line in banner(f"{self.name}: {predictor.warning}"):
                logger.warning(line)
        return predictor

    def _prepare(self, decode: Callable[[], Request], latency: Latency) -> Prepared:
        with self._metrics.stage("decode"):
            request = decode()
            predictor = self._loaded
            if predictor is None:
                raise ModelNotReady(self.name)
            if not (asked := request.count_rows(predictor.inputs)):
                raise InvalidInput("the request has no instances")
            check_instances(asked, self._settings)
            if predictor.outputs:
                _check_outputs(request, {spec.name for spec in predictor.outputs})
            request = replace(request, id=request.id or str(uuid.uuid4()))
            with latency.of("preprocess", self.name):
                rows = {name: np.asarray(array) for name, array in predictor.preprocess(request).items()}
            sizes = {len(array) for array in rows.values()}
            if len(sizes) != 1 or 0 in sizes:
                gave = f"with as many rows in each, one at least, and gave {sizes or 'none'}"
                raise ValueError(f"preprocess must give arrays {gave}")
            return Prepared(predictor, request, rows)

    def _answer(self, encode: Callable[[Response], T], latency: Latency, prepared: Prepared, predicted: Predicted) -> T:
        request = prepared.request
        latency.seconds["predict"] = predicted.run_seconds
        with self._metrics.stage("encode"):
            with latency.of("postprocess", self.name):
                response = prepared.predictor.postprocess(predicted.rows, request)
            outputs = {tensor.name: tensor for tensor in response.outputs}
            _check_outputs(request, outputs.keys())
            chosen = [outputs[output.name] for output in request.outputs] or list(outputs.values())
            return encode(replace(response, outputs=chosen, model_name=self.name, id=request.id))


def _check_outputs(request: Request, offered: Set[str]) -> None:
    names = [output.name for output in request.outputs]
    for name in names:
        if name not in offered:
            raise InvalidInput(f"Unexpected inference output '{name}' for model '{request.model_name}'")
    if len(names) != len(set(names)):
        raise InvalidInput("an output is requested twice")
