"""Names to models: where a model is found, which predictor serves it, and whether it would answer now."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Iterable
from pathlib import Path

from serving.errors import ModelMissing, ModelNotFound, ModelNotReady, PredictorBroken, StartError, one_line
from serving.logs import banner
from serving.predictor import Predictor
from serving.settings import Settings

logger = logging.getLogger(__name__)

MODEL_PLACES = (Path("/mnt/models"), Path(__file__).parent.parent / "model")  # KServe mounts a model at the first


class Model:
    """A predictor under the name that clients use; ready once it is loaded."""

    def __init__(self, name: str, predictor: Predictor) -> None:
        self.name = name
        self.predictor = predictor
        self.ready = False

    def load(self) -> None:
        """Raises StartError."""
        try:
            self.predictor.load()
        except StartError:
            raise
        except Exception as error:
            raise PredictorBroken(
                f"{type(self.predictor).__qualname__} failed to load: {type(error).__name__}: {one_line(error)}"
            ) from error
        if self.predictor.warning:
            for line in banner(f"{self.name}: {self.predictor.warning}"):
                logger.warning(line)
        self.ready = True


class Models:
    """The models that are served, by name, in the order of their registration."""

    def __init__(self, models: Iterable[Model]) -> None:
        self._models = {model.name: model for model in models}

    @property
    def names(self) -> list[str]:
        return list(self._models)

    @property
    def ready(self) -> bool:
        return all(model.ready for model in self._models.values())

    def get(self, name: str) -> Model:
        """Raises ModelNotFound."""
        try:
            return self._models[name]
        except KeyError:
            raise ModelNotFound(name) from None

    def get_ready(self, name: str) -> Model:
        """Raises ModelNotFound and ModelNotReady."""
        model = self.get(name)
        if not model.ready:
            raise ModelNotReady(name)
        return model


def make_model(settings: Settings) -> Model:
    """The model of the settings, not loaded yet. Raises PredictorBroken and ModelMissing."""
    return Model(settings.model_name, _predictor_class(settings.predictor)(settings, _model_dir(settings)))


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
        return next((place for place in MODEL_PLACES if place.exists()), None)
    if not settings.model_dir.exists():
        raise ModelMissing(f"--model_dir={settings.model_dir} does not exist")
    return settings.model_dir
