"""Verification of an exported model: its answers on photographs, by the server's own predictor, against torch's."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from model_export.errors import DependencyMissing, VerificationError
from model_export.source import Source
from model_export.torchvision_compat import torchvision
from pinnace.models.classifier import Classifier
from pinnace.predictor import Request
from pinnace.settings import Settings
from pinnace.tensors import Tensor

MAX_LOGITS_DIFFERENCE = 1e-4
MAX_PIXELS_DIFFERENCE = 1e-6
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
    """The largest absolute differences between the exported model and the original, over all photographs."""

    pixels: float
    logits: float
    photographs: int

    def __str__(self) -> str:
        return f"{self.photographs} photographs: pixels within {self.pixels:.1e}, logits within {self.logits:.1e}"


def find_photographs() -> list[Path]:
    """Return the paths of scikit-image's colour photographs, of several sizes. Raises DependencyMissing."""
    package = importlib.util.find_spec("skimage")
    if package is None or package.origin is None:
        raise DependencyMissing(
            "scikit-image, on whose photographs an export is verified, is not installed: "
            "install requirements-export.txt"
        )
    return [Path(package.origin).parent / "data" / name for name in PHOTOGRAPHS]


def compare(source: Source, model_dir: Path) -> Differences:
    """Compare the exported model with the original.

    The server's predictor gets all photographs as one batch; torchvision and torch get one at a time.
    """
    paths = find_photographs()
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
    """Return the differences between the exported model and the original. Raises VerificationError if too large."""
    differences = compare(source, model_dir)
    # Not `>`: every comparison with NaN is false, and NaN must fail.
    if not (differences.pixels <= MAX_PIXELS_DIFFERENCE and differences.logits <= MAX_LOGITS_DIFFERENCE):
        raise VerificationError(
            f"the exported model differs from the original on {differences}; at most {MAX_PIXELS_DIFFERENCE:.0e} and "
            f"{MAX_LOGITS_DIFFERENCE:.0e} are allowed: use the versions in requirements-export.txt"
        )
    return differences
