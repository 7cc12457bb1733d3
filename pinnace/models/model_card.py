"""What an exported model says of itself, in its own file: written by model_export, read by the classifier."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class ModelCard:
    """Facts of one image classifier; `resize_pixels` to `std` describe torchvision's preset for it.

    `weights` is what the export was asked for and found, as pretrained:NAME, file:NAME or seeded:N; `interpolation`
    is a name of PIL.Image.Resampling; `mean` and `std` are of values in 0..1, one a channel; `labels` is one a class.
    `precision_error` is how far the logits are from those in fp32, and on what images; empty for fp32 itself.
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
        """Why nobody should believe the answers; empty where the weights are trained."""
        if not self.weights.startswith("seeded:"):
            return ""
        return f"UNTRAINED WEIGHTS ({self.weights}): the answers are meaningless, for tests and benchmarks only"

    def to_properties(self) -> dict[str, str]:
        """For the ONNX file's metadata, which maps text to text: each value is JSON."""
        return {name: json.dumps(value) for name, value in dataclasses.asdict(self).items()}

    @classmethod
    def from_properties(cls, properties: Mapping[str, str]) -> ModelCard:
        """Raises KeyError and ValueError where the properties are not those of an exported classifier."""
        values: dict[str, Any] = {entry.name: json.loads(properties[entry.name]) for entry in dataclasses.fields(cls)}
        for name in ("mean", "std", "labels"):
            values[name] = tuple(values[name])
        return cls(**values)
