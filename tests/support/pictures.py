"""Photographs from installed packages, and pictures of every mode and format made from one of them."""

from __future__ import annotations

import base64
import importlib.util
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tests.support.servers import PROJECT

TUTORIAL_REQUEST = PROJECT.parent / "shared/samples/input.json"


def _find_package(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    assert spec and spec.origin
    return Path(spec.origin).parent


def _load_photographs() -> dict[str, bytes]:
    files = [_find_package("skimage") / "data" / name for name in (
        "astronaut.png", "chelsea.png", "coffee.png", "hubble_deep_field.jpg", "motorcycle_left.png", "retina.jpg",
        "rocket.jpg",
    )]  # fmt: skip
    files += [_find_package("sklearn") / "datasets/images" / name for name in ("china.jpg", "flower.jpg")]
    files += [_find_package("matplotlib") / "mpl-data/sample_data/grace_hopper.jpg"]
    photographs = {file.name: file.read_bytes() for file in files}
    if TUTORIAL_REQUEST.exists():
        request = json.loads(TUTORIAL_REQUEST.read_text())
        photographs["the tutorial's"] = base64.b64decode(request["instances"][0]["image"]["b64"])
    return photographs


PHOTOGRAPHS = _load_photographs()
CAT = PHOTOGRAPHS["chelsea.png"]


def encode_picture(picture: Image.Image, file_format: str, **options: Any) -> bytes:
    """Return the picture as a file of that format."""
    buffer = io.BytesIO()
    picture.save(buffer, file_format, **options)
    return buffer.getvalue()


def _make_modes() -> dict[str, bytes]:
    cat = Image.open(io.BytesIO(CAT)).convert("RGB")
    grey16 = Image.fromarray((np.asarray(cat.convert("L")).astype(np.uint16) << 8) + 77)
    alpha = Image.linear_gradient("L").resize(cat.size)
    transparent = cat.copy()
    transparent.putalpha(alpha)
    palette = cat.quantize(64)
    return {
        "JPEG": encode_picture(cat, "JPEG"),
        "JPEG progressive": encode_picture(cat, "JPEG", progressive=True),
        "JPEG grey": encode_picture(cat.convert("L"), "JPEG"),
        "JPEG CMYK": encode_picture(cat.convert("CMYK"), "JPEG"),
        "PNG": encode_picture(cat, "PNG"),
        "PNG grey": encode_picture(cat.convert("L"), "PNG"),
        "PNG grey with alpha": encode_picture(transparent.convert("LA"), "PNG"),
        "PNG black and white": encode_picture(cat.convert("1"), "PNG"),
        "PNG palette": encode_picture(palette, "PNG"),
        "PNG palette with transparency": encode_picture(palette, "PNG", transparency=bytes(range(64))),
        "PNG RGBA": encode_picture(transparent, "PNG"),
        "WebP": encode_picture(cat, "WEBP", quality=80),
        "WebP lossless RGBA": encode_picture(transparent, "WEBP", lossless=True),
        "GIF": encode_picture(palette, "GIF"),
        "GIF animated": encode_picture(palette, "GIF", save_all=True, append_images=[palette.rotate(90)]),
        "BMP": encode_picture(cat, "BMP"),
        "TIFF": encode_picture(cat, "TIFF"),
        "TIFF CMYK": encode_picture(cat.convert("CMYK"), "TIFF"),
        "one pixel wide": encode_picture(cat.resize((1, 120)), "PNG"),
        "one pixel high": encode_picture(cat.resize((200, 1)), "PNG"),
        "one pixel": encode_picture(cat.resize((1, 1)), "PNG"),
        "smaller than the crop": encode_picture(cat.resize((31, 47)), "PNG"),
        "odd sizes": encode_picture(cat.resize((333, 257)), "PNG"),
        "PNG 16 bit": encode_picture(grey16, "PNG"),
        "TIFF 16 bit": encode_picture(grey16, "TIFF"),
    }


MODES = _make_modes()
SIXTEEN_BIT = ("PNG 16 bit", "TIFF 16 bit")
