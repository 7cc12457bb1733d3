"""Real photographs from the packages that ship them, and pictures of every mode and format made from one of them."""

from __future__ import annotations

import base64
import importlib.util
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tests.servers import PROJECT

TUTORIAL_REQUEST = PROJECT.parent / "shared/samples/input.json"


def _package(name: str) -> Path:
    found = importlib.util.find_spec(name)
    assert found and found.origin
    return Path(found.origin).parent


def _photographs() -> dict[str, bytes]:
    files = [_package("skimage") / "data" / name for name in (
        "astronaut.png", "chelsea.png", "coffee.png", "hubble_deep_field.jpg", "motorcycle_left.png", "retina.jpg",
        "rocket.jpg",
    )]  # fmt: skip
    files += [_package("sklearn") / "datasets/images" / name for name in ("china.jpg", "flower.jpg")]
    files += [_package("matplotlib") / "mpl-data/sample_data/grace_hopper.jpg"]
    photographs = {file.name: file.read_bytes() for file in files}
    if TUTORIAL_REQUEST.exists():
        request = json.loads(TUTORIAL_REQUEST.read_text())
        photographs["the tutorial's"] = base64.b64decode(request["instances"][0]["image"]["b64"])
    return photographs


PHOTOGRAPHS = _photographs()
CAT = PHOTOGRAPHS["chelsea.png"]


def encoded(picture: Image.Image, file_format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, file_format, **options)
    return buffer.getvalue()


def _modes() -> dict[str, bytes]:
    cat = Image.open(io.BytesIO(CAT)).convert("RGB")
    grey16 = Image.fromarray((np.asarray(cat.convert("L")).astype(np.uint16) << 8) + 77)
    alpha = Image.linear_gradient("L").resize(cat.size)
    transparent = cat.copy()
    transparent.putalpha(alpha)
    palette = cat.quantize(64)
    return {
        "JPEG": encoded(cat, "JPEG"),
        "JPEG progressive": encoded(cat, "JPEG", progressive=True),
        "JPEG grey": encoded(cat.convert("L"), "JPEG"),
        "JPEG CMYK": encoded(cat.convert("CMYK"), "JPEG"),
        "PNG": encoded(cat, "PNG"),
        "PNG grey": encoded(cat.convert("L"), "PNG"),
        "PNG grey with alpha": encoded(transparent.convert("LA"), "PNG"),
        "PNG black and white": encoded(cat.convert("1"), "PNG"),
        "PNG palette": encoded(palette, "PNG"),
        "PNG palette with transparency": encoded(palette, "PNG", transparency=bytes(range(64))),
        "PNG RGBA": encoded(transparent, "PNG"),
        "WebP": encoded(cat, "WEBP", quality=80),
        "WebP lossless RGBA": encoded(transparent, "WEBP", lossless=True),
        "GIF": encoded(palette, "GIF"),
        "GIF animated": encoded(palette, "GIF", save_all=True, append_images=[palette.rotate(90)]),
        "BMP": encoded(cat, "BMP"),
        "TIFF": encoded(cat, "TIFF"),
        "TIFF CMYK": encoded(cat.convert("CMYK"), "TIFF"),
        "one pixel wide": encoded(cat.resize((1, 120)), "PNG"),
        "one pixel high": encoded(cat.resize((200, 1)), "PNG"),
        "one pixel": encoded(cat.resize((1, 1)), "PNG"),
        "smaller than the crop": encoded(cat.resize((31, 47)), "PNG"),
        "odd sizes": encoded(cat.resize((333, 257)), "PNG"),
        "PNG 16 bit": encoded(grey16, "PNG"),
        "TIFF 16 bit": encoded(grey16, "TIFF"),
    }


MODES = _modes()
SIXTEEN_BIT = ("PNG 16 bit", "TIFF 16 bit")


def v1_request(*pictures: bytes) -> str:
    return json.dumps({"instances": [{"image": {"b64": base64.b64encode(picture).decode()}} for picture in pictures]})
