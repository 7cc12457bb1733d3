"""The model card: metadata that model_export writes into the .onnx file and the classifier reads."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class ModelCard:
    """Facts about one image classifier; `resize_pixels` to `std` are the parameters of torchvision's preset for it.

    Attributes:
        weights: Where the weights came from: pretrained:NAME, file:NAME or seeded:N.
        interpolation: The name of a PIL.Image.Resampling.
        mean, std: One per channel, for values from 0 to 1.
        labels: One per class.
        precision_error: How far the logits are from those in fp32, and on which images; empty for fp32 itself.
    """

    architecture: str
    weights: str
    weights_sha256: str
    precision: str
    resize_pixels: int
    crop_pixels: int
    interpolation: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    labels: tuple[str, ...] = field(repr=False)
    opset: int
    versions: Mapping[str, str]
    precision_error: Mapping[str, Any] = field(default_factory=dict)

    @property
    def warning(self) -> str:
        """Return a warning if the weights are not trained, else an empty text."""
        if not self.weights.startswith("seeded:"):
            return ""
        return f"UNTRAINED WEIGHTS ({self.weights}): the answers are meaningless, for tests and benchmarks only"

    def to_properties(self) -> dict[str, str]:
        """Return the card as metadata for the .onnx file, whose keys and values are text: each value is JSON."""
        return {name: json.dumps(value) for name, value in dataclasses.asdict(self).items()}

    @classmethod
    def from_properties(cls, properties: Mapping[str, str]) -> ModelCard:
        """Read a card from an .onnx file's metadata. Raises KeyError and ValueError if it holds no card."""
        values: dict[str, Any] = {entry.name: json.loads(properties[entry.name]) for entry in dataclasses.fields(cls)}
        for name in ("mean", "std", "labels"):
            values[name] = tuple(values[name])
        return cls(**values)
