"""Which models there are: their names, where each lies, which predictor serves it and on which engine."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from serving.errors import BadSetting, PredictorBroken, StartError, one_line
from serving.local_model import LocalModel, Shared
from serving.memory import collect_for_good
from serving.model import Model
from serving.predictor import Predictor
from serving.settings import DEFAULT_PREDICTOR, Settings
from serving.storage import MOUNTED, model_of

logger = logging.getLogger(__name__)

MODEL_PLACES = (MOUNTED, Path(__file__).parent.parent / "model")


def make_models(settings: Settings, shared: Shared) -> list[Model]:
    """The models of the settings, not loaded yet. Raises StartError."""
    places = _places(settings)
    predictors = _predictors(settings.predictor, places)
    if settings.engine == "ray":
        from serving.ray_engine import RayModel  # which imports Ray

        kind: type[LocalModel | RayModel] = RayModel
    else:
        kind = LocalModel
    return [kind(predictors[name], replace(settings, model_name=name), place, shared) for name, place in places.items()]


def load(models: Sequence[Model], every: bool = False) -> None:
    """One after the other. One of several may fail, unless `every` is wanted, and is not ready then.

    Raises StartError where none can be had.
    """
    failures: dict[str, StartError] = {}
    for model in models:
        try:
            model.load()
        except StartError as error:
            failures[model.name] = error
    if len(failures) == len(models) or (every and failures):
        raise next(iter(failures.values()))
    collect_for_good()
    for name, failure in failures.items():
        logger.error("%s is NOT SERVED, the others are: %s", name, failure)


def _places(settings: Settings) -> dict[str, Path | None]:
    """Where each model lies."""
    if not settings.model:
        found = (place for place in MODEL_PLACES if place.exists())
        place = settings.model_dir or model_of(settings) or next(found, None)
        return {**_models_in(place)} or {settings.model_name: place}
    places: dict[str, Path | None] = {}
    for text in settings.model:
        name, _, directory = text.partition("=")
        if name in places:
            raise BadSetting(f"--model names {name} twice")
        places[name] = Path(directory) if directory else None
    return places


def _models_in(place: Path | None) -> dict[str, Path]:
    """Of a directory with nothing but directories, those that hold an exported model."""
    try:
        if not place or not place.is_dir() or not all(entry.is_dir() for entry in place.iterdir()):
            return {}
        return {entry.name: entry for entry in sorted(place.iterdir()) if any(entry.glob("*.onnx"))}
    except PermissionError:  # as its load will say
        return {}


def _predictors(texts: Sequence[str], places: Mapping[str, Path | None]) -> dict[str, type[Predictor]]:
    """The predictor of each model: the one with its name before, or else the one without a name."""
    paths = {name: path for name, _, path in (text.rpartition("=") for text in texts)}
    if unknown := paths.keys() - {"", *places}:
        raise BadSetting(f"--predictor names {min(unknown)}, which is no model: there are {', '.join(places)}")
    return {name: _predictor_class(paths.get(name) or paths.get("") or DEFAULT_PREDICTOR) for name in places}


def _predictor_class(path: str) -> type[Predictor]:
    module, _, name = path.partition(":")
    try:
        found = getattr(importlib.import_module(module), name)
    except (Exception, SystemExit) as error:
        raise PredictorBroken(
            f"--predictor={path} cannot be imported: {type(error).__name__}: {one_line(error)}"
        ) from error
    if not (isinstance(found, type) and issubclass(found, Predictor)):
        raise PredictorBroken(f"--predictor={path} is no subclass of serving.predictor.Predictor")
    return found
