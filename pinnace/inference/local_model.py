"""A model in this process: its predictor, and the path of one request through the predictor's handlers."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Coroutine, Set
from dataclasses import dataclass, replace
from functools import partial
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
from pinnace.predictor import Arrays, ModelMetadata, Predictor, Request
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
        return self._batcher.submit(partial(self._preprocess, call), partial(self._postprocess, call), call.timings)

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

    def _preprocess(self, call: InferenceCall) -> PreprocessedRequest:
        """Decode the request and convert it to arrays, on a worker thread."""
        predictor = self._predictor
        if predictor is None:  # unloaded while the request waited
            raise ModelNotReady(self.name)
        request = call.decode(predictor.inputs, self._settings)
        if predictor.outputs:
            _check_outputs(request, {spec.name for spec in predictor.outputs})
        returned = call.timings.time_handler("preprocess", predictor.preprocess, request)
        arrays = {name: np.asarray(array) for name, array in returned.items()}
        sizes = {len(array) for array in arrays.values()}
        if len(sizes) != 1 or 0 in sizes:
            raise ValueError(
                "preprocess must return arrays that have the same number of rows, at least 1; "
                f"it returned {sorted(sizes) or 'none'}"
            )
        return PreprocessedRequest(predictor, request, arrays, sizes.pop())

    def _postprocess(
        self, call: InferenceCall, preprocessed: PreprocessedRequest, predictions: Arrays
    ) -> EncodedResponse:
        """Convert the predictions to the encoded response, on a worker thread."""
        predictor, request = preprocessed.predictor, preprocessed.request
        response = call.timings.time_handler("postprocess", predictor.postprocess, predictions, request)
        outputs = {tensor.name: tensor for tensor in response.outputs}
        _check_outputs(request, outputs.keys())
        chosen = [outputs[output.name] for output in request.outputs] or list(outputs.values())
        return call.encode(replace(response, outputs=chosen, model_name=self.name, id=request.id), request)


def _check_outputs(request: Request, offered: Set[str]) -> None:
    names = [output.name for output in request.outputs]
    for name in names:
        if name not in offered:
            raise InvalidInput(f"Unexpected inference output '{name}' for model '{request.model_name}'")
    if len(names) != len(set(names)):
        raise InvalidInput("an output is requested twice")
