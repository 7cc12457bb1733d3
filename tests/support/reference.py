"""The expected pixels and logits, computed by torchvision and torch. Torch is imported only when they are needed."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import Image

if TYPE_CHECKING:
    from model_export.source import Source


def preprocess_with_torchvision(original: Source, picture: bytes) -> NDArray[np.float32]:
    """Return the FP32 pixels [3, height, width] that torchvision's preset makes of an encoded picture."""
    pixels: NDArray[np.float32] = original.preset(_load_with_torchvision(picture)).numpy()
    return pixels


def compute_original_logits(original: Source, picture: bytes) -> NDArray[np.float32]:
    """Return the FP32 logits [classes] of the original model in torch for an encoded picture."""
    import torch

    pixels = torch.from_numpy(preprocess_with_torchvision(original, picture))
    with torch.inference_mode():
        logits: torch.Tensor = original.model(pixels[None])[0]
    return logits.numpy()


def _load_with_torchvision(data: bytes) -> Image.Image:
    """Decode `data` as the loader of torchvision.datasets does, which reads files only."""
    picture = Image.open(io.BytesIO(data))
    if picture.mode == "I;16":
        import torch

        from model_export.torchvision_compat import torchvision

        # That loader clips 16 bits to white; this is torchvision's own conversion to eight bits.
        wide = torch.from_numpy(np.asarray(picture).astype(np.int32) << 15)
        narrow = torchvision.transforms.functional.convert_image_dtype(wide, torch.uint8)
        return Image.fromarray(narrow.numpy()).convert("RGB")
    if "transparency" in picture.info:
        picture.info.pop("transparency")  # Pillow warns about it, and drops it
    return picture.convert("RGB")
