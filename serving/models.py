"""A model: where it is found, which predictor serves it, and whether that is loaded."""

from __future__ import annotations

import importlib
import logging
import threading
from pathlib import Path

from serving.errors import ModelMissing, ModelNotReady, PredictorBroken, StartError, one_line
from serving.logs import banner
from serving.predictor import Predictor
from serving.settings import Settings
from serving.storage import MOUNTED, model_of

logger = logging.getLogger(__name__)

MODEL_PLACES = (MOUNTED, Path(__file__).parent.parent / "model")


class Model:
    """A predictor under the name that clients use: a fresh one at each load, ready once that has succeeded.

    A request keeps the predictor that it began with, so what an unload frees is free when the last of them is answered.
    """

    def __init__(self, name: str, predictor_class: type[Predictor], settings: Settings, model_dir: Path | None) -> None:
        self.name = name
        self._class = predictor_class
        self._arguments = (settings, model_dir)
        self._loaded: Predictor | None = None
        self._changing = threading.Lock()

    @property
    def ready(self) -> bool:
        return self._loaded is not None

    @property
    def state(self) -> str:
        """As the index of Triton's model repository says it."""
        return "READY" if self.ready else "UNAVAILABLE"

    @property
    def described(self) -> Predictor | type[Predictor]:
        """For the metadata: of a model that is not loaded, what its class says."""
        return self._loaded or self._class

    @property
    def predictor(self) -> Predictor:
        """Raises ModelNotReady."""
        if self._loaded is None:
            raise ModelNotReady(self.name)
        return self._loaded

    def load(self) -> None:
        """Takes seconds; nothing, where the model is loaded already. Raises StartError."""
        with self._changing:
            self._loaded = self._loaded or self._load()

    def unload(self) -> None:
        with self._changing:
            self._loaded = None

    def _load(self) -> Predictor:
        try:
            predictor = self._class(*self._arguments)
            predictor.load()
        except StartError:
            raise
        except Exception as error:
            raise PredictorBroken(
                f"{self._class.__qualname__} failed to load: {type(error).__name__}: {one_line(error)}"
            ) from error
        if predictor.warning:
            for line in banner(f"{self.name}: {predictor.warning}"):
                logger.warning(line)
        return predictor


def make_model(settings: Settings) -> Model:
    """The model of the settings, not loaded yet. Raises StartError."""
    return Model(settings.model_name, _predictor_class(settings.predictor), settings, _model_dir(settings))


def _predictor_class(path: str) -> type[Predictor]:
    module, _, name = path.partition(":")
    try:
        found = getattr(importlib.import_module(module), name)
    except Exception as error:
        raise PredictorBroken(
            f"--predictor={path} cannot be imported: {type(error).__name__}: {one_line(error)}"
        ) from error
    if not (isinstance(found, type) and issubclass(found, Predictor)):
        raise PredictorBroken(f"--predictor={path} is no subclass of serving.predictor.Predictor")
    return found


def _model_dir(settings: Settings) -> Path | None:
    if settings.model_dir is None:
        return model_of(settings) or next((place for place in MODEL_PLACES if place.exists()), None)
    if not settings.model_dir.exists():
        raise ModelMissing(f"--model_dir={settings.model_dir} does not exist")
    return settings.model_dir
