"""A model in this process: its predictor, and the path of one request through the predictor's handlers."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Coroutine, Set
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from pinnace.errors import InvalidInput, ModelFileNotFound, ModelNotReady, PredictorError, StartupError, one_line
from pinnace.inference.batch import PreprocessedRequest
from pinnace.inference.batching import Batcher
from pinnace.inference.call import InferenceCall
from pinnace.inference.codec import EncodedResponse
from pinnace.inference.model import Model
from pinnace.inference.scheduler import Scheduler
from pinnace.memory import is_out_of_memory
from pinnace.observability.logging import banner
from pinnace.observability.metrics import Metrics
from pinnace.predictor import Arrays, ModelMetadata, Predictor, PreprocessCost, Request
from pinnace.settings import Settings

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ModelContext:
    """The scheduler and the metrics that the models of one process share. Its creator closes the scheduler."""

    scheduler: Scheduler
    metrics: Metrics


class LocalModel(Model):
    """A model in this process: ready once its predictor is loaded. Each load creates a new predictor.

    A request keeps the predictor that it began with, so an unload frees the memory when the last such request is
    answered.
    """

    def __init__(
        self, predictor_class: type[Predictor], settings: Settings, model_dir: Path | None, context: ModelContext
    ) -> None:
        """Create the model `settings.model_name`, not loaded yet."""
        super().__init__(settings.model_name, ModelMetadata.of(predictor_class))
        self._class = predictor_class
        self._settings = settings
        self._model_dir = model_dir
        self._predictor: Predictor | None = None
        self._load_lock = threading.Lock()
        self._batcher = Batcher(
            self.name, context.scheduler, context.metrics, settings.max_batch_size, settings.max_batch_delay_ms
        )

    def load(self) -> None:
        """Create and load a predictor, unless there is one. Raises StartupError."""
        with self._load_lock:
            if self._predictor is None:
                predictor = self._load()
                self.metadata = ModelMetadata.of(predictor)
                self._predictor = predictor
                self.is_ready = True

    def unload(self) -> None:
        """Forget the predictor: its memory is freed when the last request that uses it is answered."""
        with self._load_lock:
            self.is_ready = False
            self._predictor = None
            self.metadata = ModelMetadata.of(self._class)

    def infer(self, call: InferenceCall) -> Coroutine[Any, Any, EncodedResponse]:
        """Answer one request on worker threads, in a batch with others. Raises ServingError."""
        return self._batcher.submit(_Steps(self._get_predictor, self._settings, call), call.timings)

    def close(self) -> None:
        """Do nothing: the worker threads are not the model's own."""

    def _load(self) -> Predictor:
        if self._model_dir and not os.access(self._model_dir, os.R_OK):
            problem = "cannot be read" if os.access(self._model_dir, os.F_OK) else "does not exist"
            raise ModelFileNotFound(f"the path of {self.name}, {self._model_dir}, {problem}: see --model_dir")
        try:
            predictor = self._class(self._settings, self._model_dir)
            predictor.load()
        except StartupError:
            raise
        except (Exception, SystemExit) as error:
            problem = "not enough memory, " if is_out_of_memory(error) else ""
            raise PredictorError(
                f"{self._class.__qualname__} failed to load: {problem}{type(error).__name__}: {one_line(error)}"
            ) from error
        if predictor.warning:
            for line in banner(f"{self.name}: {predictor.warning}"):
                logger.warning(line)
        return predictor

    def _get_predictor(self) -> Predictor:
        """Return the predictor. Raises ModelNotReady if the model was unloaded while a request waited."""
        predictor = self._predictor
        if predictor is None:
            raise ModelNotReady(self.name)
        return predictor


class _Steps:
    """The steps of one request: it is decoded, goes through the predictor's handlers, and its response is encoded."""

    def __init__(self, get_predictor: Callable[[], Predictor], settings: Settings, call: InferenceCall) -> None:
        self._get_predictor = get_predictor
        self._settings = settings
        self._call = call

    def estimate(self) -> PreprocessCost:
        """Decode the request, and return the predictor's estimate of its cost."""
        self._predictor = predictor = self._get_predictor()
        self._request = request = self._call.decode(predictor.inputs, self._settings)
        if predictor.outputs:
            _check_outputs(request, {spec.name for spec in predictor.outputs})
        return predictor.estimate_preprocess(request)

    def preprocess(self, is_abandoned: Callable[[], bool]) -> PreprocessedRequest:
        """Convert the request to arrays."""
        predictor, request = self._predictor, replace(self._request, is_abandoned=is_abandoned)
        returned = self._call.timings.time_handler("preprocess", predictor.preprocess, request)
        arrays = {name: np.asarray(array) for name, array in returned.items()}
        sizes = {len(array) for array in arrays.values()}
        if len(sizes) != 1 or 0 in sizes:
            raise ValueError(
                "preprocess must return arrays that have the same number of rows, at least 1; "
                f"it returned {sorted(sizes) or 'none'}"
            )
        return PreprocessedRequest(predictor, request, arrays, sizes.pop())

    def postprocess(self, preprocessed: PreprocessedRequest, predictions: Arrays) -> EncodedResponse:
        """Convert the predictions to the encoded response."""
        predictor, request = preprocessed.predictor, preprocessed.request
        response = self._call.timings.time_handler("postprocess", predictor.postprocess, predictions, request)
        outputs = {tensor.name: tensor for tensor in response.outputs}
        _check_outputs(request, outputs.keys())
        chosen = [outputs[output.name] for output in request.outputs] or list(outputs.values())
        name = self._settings.model_name
        return self._call.encode(replace(response, outputs=chosen, model_name=name, id=request.id), request)


def _check_outputs(request: Request, offered: Set[str]) -> None:
    names = [output.name for output in request.outputs]
    for name in names:
        if name not in offered:
            raise InvalidInput(f"Unexpected inference output '{name}' for model '{request.model_name}'")
    if len(names) != len(set(names)):
        raise InvalidInput("an output is requested twice")
