"""The original: torchvision's architecture, its preprocessing preset, and weights from wherever they were asked for."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from model_export.errors import BadRequest, WeightsMissing
from model_export.vision import torchvision
from pinnace.observability.logging import banner

LOGITS_STD = 5.0


@dataclass(frozen=True, slots=True)
class Source:
    """A torchvision classifier in evaluation mode, and what is known of it.

    `preset` is torchvision's ImageClassification for the architecture; `weights` as in the model card.
    """

    architecture: str
    model: torch.nn.Module
    preset: Any
    labels: tuple[str, ...]
    weights: str

    @property
    def weights_sha256(self) -> str:
        digest = hashlib.sha256()
        for name, tensor in self.model.state_dict().items():
            digest.update(name.encode())
            digest.update(tensor.contiguous().numpy().tobytes())
        return digest.hexdigest()


def load_source(architecture: str, weights: str) -> Source:
    """`weights` is pretrained, auto, seeded:N or the path of a state dict. Raises BadRequest and WeightsMissing."""
    if architecture not in torchvision.models.list_models(module=torchvision.models):
        raise BadRequest(f"--arch {architecture} is none of torchvision's classifiers, such as alexnet or resnet50")
    entry = torchvision.models.get_model_weights(architecture).DEFAULT
    preset = entry.transforms()
    if weights == "auto":
        try:
            model, weights = _pretrained(architecture, entry)
        except WeightsMissing as error:
            warning = "Taking UNTRAINED weights instead (seeded:0): the answers will be meaningless"
            print(error, *banner(warning), sep="\n")
            model, weights = _seeded(architecture, 0, preset.crop_size[0]), "seeded:0"
    elif weights == "pretrained":
        model, weights = _pretrained(architecture, entry)
    elif weights.startswith("seeded:"):
        seed = weights.removeprefix("seeded:")
        if not seed.isdecimal():
            raise BadRequest(f"--weights {weights}: the seed must be a whole number, as in seeded:0")
        model = _seeded(architecture, int(seed), preset.crop_size[0])
    else:
        model, weights = _from_file(architecture, Path(weights)), f"file:{Path(weights).name}"
    return Source(architecture, model.eval(), preset, tuple(entry.meta["categories"]), weights)


def _pretrained(architecture: str, entry: Any) -> tuple[torch.nn.Module, str]:
    try:
        model = torchvision.models.get_model(architecture, weights=entry, progress=True)
    except (OSError, RuntimeError) as error:  # no network or no disk; a wrong hash
        raise WeightsMissing(
            f"torchvision's weights of {architecture} cannot be had ({error}): "
            "try again, or give a downloaded file as --weights FILE.pth"
        ) from error
    return model, f"pretrained:{entry.name}"


def _seeded(architecture: str, seed: int, crop_pixels: int) -> torch.nn.Module:
    """Untrained weights whose logits spread like a trained model's.

    With torchvision's own initial weights AlexNet's logits differ by 0.001 from picture to picture, and no comparison
    within 1e-4 would notice a wrong pixel. He-normal layers carry the signal through; the last one sets its scale.
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
        layers[-1].weight *= float(f"{LOGITS_STD / spread:.2g}")  # rounded: the same weights on every machine
    return model


def _from_file(architecture: str, path: Path) -> torch.nn.Module:
    model: torch.nn.Module = torchvision.models.get_model(architecture, weights=None)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise WeightsMissing(
            f"--weights {path}: {error.strerror}; it takes pretrained, auto, seeded:N or a file"
        ) from error
    except Exception as error:  # whatever unpickling raises
        raise BadRequest(f"--weights {path} is no state dict saved by torch.save") from error
    try:
        model.load_state_dict(state)
    except (RuntimeError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise BadRequest(f"--weights {path} does not fit {architecture}: {reason}") from error
    return model
