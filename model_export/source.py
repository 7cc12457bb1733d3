"""The original model: torchvision's architecture and preprocessing preset, with the weights that --weights names."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from model_export.errors import UsageError, WeightsUnavailable
from model_export.torchvision_compat import torchvision
from pinnace.observability.logging import banner

LOGITS_STD = 5.0
MAX_SEED = 2**63 - 1  # torch.manual_seed takes a signed 64-bit number


@dataclass(frozen=True, slots=True)
class Source:
    """A torchvision classifier in evaluation mode, with its provenance.

    `preset` is torchvision's ImageClassification transform for the architecture; `labels` are in the order of the
    logits; `weights` is written as in the model card (`pretrained:NAME`, `file:NAME` or `seeded:N`).
    """

    architecture: str
    model: torch.nn.Module
    preset: Any
    labels: tuple[str, ...]
    weights: str

    @property
    def weights_sha256(self) -> str:
        """Return the SHA-256 of all parameters and buffers, with their names."""
        digest = hashlib.sha256()
        for name, tensor in self.model.state_dict().items():
            digest.update(name.encode())
            digest.update(tensor.contiguous().numpy().tobytes())
        return digest.hexdigest()


def load_source(architecture: str, weights: str) -> Source:
    """Return the classifier `architecture` with `weights`: pretrained, auto, seeded:N or the path of a state dict.

    Raises UsageError for an unknown architecture, a bad seed or weights that do not fit, and WeightsUnavailable if the
    weights cannot be read or downloaded.
    """
    if architecture not in torchvision.models.list_models(module=torchvision.models):
        raise UsageError(
            f"--arch {architecture}: torchvision has no such classifier; use a name such as alexnet or resnet50"
        )
    entry = torchvision.models.get_model_weights(architecture).DEFAULT
    preset = entry.transforms()
    if weights == "auto":
        try:
            model, weights = _pretrained(architecture, entry)
        except WeightsUnavailable as error:
            warning = "Using UNTRAINED weights instead (seeded:0): the answers will be meaningless"
            print(error, *banner(warning), sep="\n")
            model, weights = _seeded(architecture, 0, preset.crop_size[0]), "seeded:0"
    elif weights == "pretrained":
        model, weights = _pretrained(architecture, entry)
    elif weights.startswith("seeded:"):
        seed = weights.removeprefix("seeded:")
        if not seed.isdecimal() or int(seed) > MAX_SEED:
            raise UsageError(f"--weights {weights}: the seed must be a whole number from 0 to {MAX_SEED}")
        model = _seeded(architecture, int(seed), preset.crop_size[0])
    else:
        model, weights = _from_file(architecture, Path(weights)), f"file:{Path(weights).name}"
    return Source(architecture, model.eval(), preset, tuple(entry.meta["categories"]), weights)


def _pretrained(architecture: str, entry: Any) -> tuple[torch.nn.Module, str]:
    try:
        model = torchvision.models.get_model(architecture, weights=entry, progress=True)
    except (OSError, RuntimeError) as error:  # no network, a full disk, or a wrong hash
        raise WeightsUnavailable(
            f"torchvision's weights for {architecture} cannot be downloaded ({error}): "
            "try again, or pass a downloaded file as --weights FILE.pth"
        ) from error
    return model, f"pretrained:{entry.name}"


def _seeded(architecture: str, seed: int, crop_pixels: int) -> torch.nn.Module:
    """Return the architecture with untrained weights whose logits vary as much as a trained model's.

    With torchvision's own initial weights AlexNet's logits differ by 0.001 from image to image, and a comparison within
    1e-4 would not notice a wrong pixel. He-normal initialisation keeps the signal's variance from layer to layer; the
    last layer is then scaled until the standard deviation of the logits is LOGITS_STD.
    """
    torch.manual_seed(seed)
    model: torch.nn.Module = torchvision.models.get_model(architecture, weights=None).eval()
    layers = [layer for layer in model.modules() if isinstance(layer, (torch.nn.Conv2d, torch.nn.Linear))]
    with torch.no_grad():
        for layer in layers:
            torch.nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            if layer.bias is not None:
                layer.bias.zero_()
        spread = model(torch.randn(4, 3, crop_pixels, crop_pixels)).std().item()
        layers[-1].weight *= float(f"{LOGITS_STD / spread:.2g}")  # rounded, so that every machine gets the same weights
    return model


def _from_file(architecture: str, path: Path) -> torch.nn.Module:
    model: torch.nn.Module = torchvision.models.get_model(architecture, weights=None)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise WeightsUnavailable(
            f"--weights {path}: {error.strerror}; use pretrained, auto, seeded:N or the path of a file"
        ) from error
    except Exception as error:  # unpickling can raise anything
        raise UsageError(f"--weights {path} is not a state dict that torch.save wrote") from error
    try:
        model.load_state_dict(state)
    except (RuntimeError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UsageError(f"--weights {path} does not fit {architecture}: {reason}") from error
    return model
