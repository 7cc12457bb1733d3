"""The loader: creates the models that the settings name, each with its path, its predictor and its runtime."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from pinnace.errors import ConfigurationError, PredictorError, StartupError, one_line
from pinnace.inference.local_model import LocalModel, ModelContext
from pinnace.inference.model import Model
from pinnace.memory import collect_and_freeze
from pinnace.models.storage import MOUNTED, fetch_model
from pinnace.predictor import Predictor
from pinnace.settings import DEFAULT_PREDICTOR, Settings

logger = logging.getLogger(__name__)

ROOT = Path(__file__).parent.parent.parent  # a clone, /app in an image, or site-packages


def make_models(settings: Settings, context: ModelContext) -> list[Model]:
    """Return the models of the settings, not loaded yet. Raises StartupError."""
    paths = _model_paths(settings)
    predictors = _predictor_classes(settings.predictor, paths)
    if settings.engine == "ray":
        from pinnace.runtimes.ray_model import RayModel  # imported here, because it imports Ray

        model_class: type[LocalModel | RayModel] = RayModel
    else:
        model_class = LocalModel
    return [
        model_class(predictors[name], replace(settings, model_name=name), path, context) for name, path in paths.items()
    ]


def load(models: Sequence[Model], require_all: bool = False) -> None:
    """Load the models one after the other. A model that fails is logged and stays not ready.

    Raises StartupError, that of the first failure, if no model loads; with `require_all`, if any model fails.
    """
    failures: dict[str, StartupError] = {}
    for model in models:
        try:
            model.load()
        except StartupError as error:
            failures[model.name] = error
    if len(failures) == len(models) or (require_all and failures):
        raise next(iter(failures.values()))
    collect_and_freeze()
    for name, failure in failures.items():
        logger.error("%s failed to load and is NOT SERVED; the other models are served: %s", name, failure)


def _model_paths(settings: Settings) -> dict[str, Path | None]:
    """Return the path of each model by name; None if no model is found on disk."""
    if not settings.model:
        path = settings.model_dir or fetch_model(settings) or _default_path()
        return {**_models_in(path)} or {settings.model_name: path}
    paths: dict[str, Path | None] = {}
    for text in settings.model:
        name, _, directory = text.partition("=")
        if name in paths:
            raise ConfigurationError(f"--model names {name} twice")
        paths[name] = Path(directory) if directory else None
    return paths


def _default_path() -> Path | None:
    """Return the first that exists of KServe's mount, `model` in the working directory, and `model` beside app.py."""
    paths = [MOUNTED, Path("model").absolute()]
    if (ROOT / "app.py").exists() and ROOT.name not in ("site-packages", "dist-packages"):
        paths.append(ROOT / "model")
    return next((path for path in paths if path.exists()), None)


def _models_in(path: Path | None) -> dict[str, Path]:
    """Return the subdirectories with an exported model, by name, if `path` contains nothing but directories."""
    try:
        if not path or not path.is_dir() or not all(entry.is_dir() for entry in path.iterdir()):
            return {}
        return {entry.name: entry for entry in sorted(path.iterdir()) if any(entry.glob("*.onnx"))}
    except PermissionError:  # the load of the model will report it
        return {}


def _predictor_classes(texts: Sequence[str], paths: Mapping[str, Path | None]) -> dict[str, type[Predictor]]:
    """Return the predictor class of each model: the NAME=… that names it, else the one without a name."""
    classes = {name: class_path for name, _, class_path in (text.rpartition("=") for text in texts)}
    if unknown := classes.keys() - {"", *paths}:
        raise ConfigurationError(
            f"--predictor names {min(unknown)}, which is not a model: the models are {', '.join(paths)}"
        )
    return {name: _predictor_class(classes.get(name) or classes.get("") or DEFAULT_PREDICTOR) for name in paths}


def _predictor_class(class_path: str) -> type[Predictor]:
    module, _, name = class_path.partition(":")
    try:
        found = getattr(importlib.import_module(module), name)
    except (Exception, SystemExit) as error:
        raise PredictorError(
            f"--predictor={class_path} cannot be imported: {type(error).__name__}: {one_line(error)}"
        ) from error
    if not (isinstance(found, type) and issubclass(found, Predictor)):
        raise PredictorError(f"--predictor={class_path} is not a subclass of pinnace.Predictor")
    return found
