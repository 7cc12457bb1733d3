"""Does the served model answer what the original answers? On real photographs, with the server's own predictor."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from model_export.errors import Mismatch
from model_export.source import Source
from model_export.vision import torchvision
from pinnace.models.classifier import Classifier
from pinnace.predictor import Request
from pinnace.settings import Settings
from pinnace.tensors import Tensor

MOST_LOGITS_DIFFERENCE = 1e-4
MOST_PIXELS_DIFFERENCE = 1e-6
PHOTOGRAPHS = (
    "astronaut.png",
    "chelsea.png",
    "coffee.png",
    "hubble_deep_field.jpg",
    "motorcycle_left.png",
    "motorcycle_right.png",
    "retina.jpg",
    "rocket.jpg",
)


@dataclass(frozen=True, slots=True)
class Differences:
    """The largest absolute difference over all photographs."""

    pixels: float
    logits: float
    photographs: int

    def __str__(self) -> str:
        return f"{self.photographs} photographs: pixels within {self.pixels:.1e}, logits within {self.logits:.1e}"


def photographs() -> list[Path]:
    """Real ones, colour, of several sizes: those that scikit-image ships."""
    package = importlib.util.find_spec("skimage")
    if package is None or package.origin is None:
        raise Mismatch(
            "scikit-image, whose photographs an export is checked on, is missing: see requirements-export.txt"
        )
    return [Path(package.origin).parent / "data" / name for name in PHOTOGRAPHS]


def compare(source: Source, model_dir: Path) -> Differences:
    """All photographs as one batch through the server's predictor, against each alone through torchvision and torch."""
    paths = photographs()
    classifier = Classifier(Settings(device="cpu"), model_dir)
    classifier.load()
    images = Tensor.from_values("image", "BYTES", [len(paths)], [path.read_bytes() for path in paths])
    rows = classifier.preprocess(Request("model", (images,)))
    logits = classifier.predict(rows)["logits"]
    originals = [source.preset(torchvision.datasets.folder.pil_loader(str(path))) for path in paths]
    with torch.inference_mode():
        expected = [source.model(pixels[None])[0].numpy() for pixels in originals]
    return Differences(
        pixels=float(np.abs(rows["pixels"] - np.stack([pixels.numpy() for pixels in originals])).max()),
        logits=float(np.abs(logits - np.stack(expected)).max()),
        photographs=len(paths),
    )


def verify(source: Source, model_dir: Path) -> Differences:
    """Raises Mismatch beyond the bounds."""
    differences = compare(source, model_dir)
    # Written so that not-a-number fails too.
    if not (differences.pixels <= MOST_PIXELS_DIFFERENCE and differences.logits <= MOST_LOGITS_DIFFERENCE):
        raise Mismatch(
            f"the exported model differs from the original on {differences}; "
            f"at most {MOST_PIXELS_DIFFERENCE:.0e} and {MOST_LOGITS_DIFFERENCE:.0e} are allowed"
        )
    return differences
