"""pinnace/models/image.py against torchvision's preset and loader: bit-equal pixels."""

from __future__ import annotations

import base64
import io
import struct
import subprocess
import sys
import zlib
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from PIL import Image

from pinnace.errors import InvalidInput, TooLarge
from pinnace.models.image import Preprocessing, decode, image_bytes
from tests.conftest import TORCH_REASON
from tests.support.hostile import make_png
from tests.support.pictures import CAT, MODES, PHOTOGRAPHS, SIXTEEN_BIT, encode_picture
from tests.support.reference import preprocess_with_torchvision
from tests.support.servers import PROJECT

if TYPE_CHECKING:
    from model_export.source import Source

MANY_PIXELS = 100_000_000


@pytest.fixture(scope="module")
def preprocessing(original: Source) -> Preprocessing:
    from model_export.export import make_card

    card = make_card(original)
    return Preprocessing(card.resize_pixels, card.crop_pixels, card.interpolation, card.mean, card.std)


@pytest.mark.parametrize("name", [*PHOTOGRAPHS, *MODES])
def test_pixels_are_bit_equal_to_torchvisions(name: str, preprocessing: Preprocessing, original: Source) -> None:
    data = {**PHOTOGRAPHS, **MODES}[name]

    pixels = preprocessing(decode(data, MANY_PIXELS))

    assert pixels.dtype == np.float32
    np.testing.assert_array_equal(pixels, preprocess_with_torchvision(original, data))


@pytest.mark.parametrize("name", SIXTEEN_BIT)
def test_a_16_bit_picture_is_scaled_and_not_clipped_to_white(name: str) -> None:
    grey = np.asarray(Image.open(io.BytesIO(CAT)).convert("L"))

    np.testing.assert_array_equal(np.asarray(decode(MODES[name], MANY_PIXELS))[:, :, 0], grey)


@pytest.mark.parametrize("architecture", ["resnet50", "efficientnet_b0", "inception_v3", "vit_h_14", "swin_v2_t"])
def test_presets_of_other_architectures_give_torchvisions_pixels(architecture: str) -> None:
    pytest.importorskip("torch", reason=TORCH_REASON)
    from model_export.torchvision_compat import torchvision

    preset: Any = torchvision.models.get_model_weights(architecture).DEFAULT.transforms()
    preprocessing = Preprocessing(
        preset.resize_size[0], preset.crop_size[0], preset.interpolation.name, tuple(preset.mean), tuple(preset.std)
    )

    pixels = preprocessing(decode(CAT, MANY_PIXELS))

    np.testing.assert_array_equal(pixels, preset(Image.open(io.BytesIO(CAT)).convert("RGB")).numpy())


@pytest.mark.parametrize("size", [(1, 2000), (2000, 1), (2, 10_000), (300, 100_000)])
def test_only_the_cropped_part_of_a_narrow_strip_is_resized(
    size: tuple[int, int], preprocessing: Preprocessing
) -> None:
    ramp = Image.linear_gradient("L").resize(size).convert("RGB")

    pixels = preprocessing(decode(encode_picture(ramp, "PNG"), MANY_PIXELS))

    middle = np.asarray(ramp)[size[1] // 2, size[0] // 2]
    mean, std = np.array(preprocessing.mean), np.array(preprocessing.std)
    shown = (pixels[:, 112, 112] * std + mean) * 255
    assert np.abs(shown - middle).max() <= 2


def test_only_the_first_frame_is_decoded() -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]

    for file_format in ("GIF", "WEBP", "TIFF", "PNG"):
        options = {"save_all": True, "append_images": frames[1:]}
        if file_format == "WEBP":
            options["lossless"] = True
        assert decode(encode_picture(frames[0], file_format, **options), MANY_PIXELS).getpixel((4, 4)) == (255, 0, 0)


@pytest.mark.parametrize("name", MODES)
def test_a_bytes_element_is_an_image_or_base64_text_of_one(name: str) -> None:
    data = MODES[name]

    assert image_bytes(data) == data
    assert image_bytes(base64.b64encode(data)) == data
    assert image_bytes(base64.encodebytes(data)) == data


@pytest.mark.parametrize("data", [b"", b"hello", b"%PDF-1.7", b"<svg/>", b"P6 1 1 255 abc", b"\0\0\1\0" + b"\0" * 60])
def test_data_of_an_unsupported_format_is_refused(data: bytes) -> None:
    with pytest.raises(
        InvalidInput, match=r"^neither an image \(JPEG, PNG, WEBP, GIF, BMP, TIFF\) nor base64 text of one$"
    ):
        decode(data, MANY_PIXELS)


@pytest.mark.parametrize("name", ["JPEG", "JPEG progressive", "PNG", "WebP", "GIF", "BMP", "TIFF"])
@pytest.mark.parametrize("share", [0.0001, 0.02, 0.5, 0.9])
def test_a_truncated_image_is_refused(name: str, share: float) -> None:
    data = MODES[name]

    with pytest.raises(InvalidInput, match=r"^a truncated, damaged or unsupported image$"):
        decode(data[: 4 + int(len(data) * share)], MANY_PIXELS)


def test_too_many_pixels_are_refused_from_the_header_alone() -> None:
    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    chunks = b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in ((b"IHDR", header), (b"IDAT", b""), (b"IEND", b""))
    )

    with pytest.raises(TooLarge, match=r"^an image of 60000 × 60000 exceeds max_image_pixels \(50000000\)$"):
        decode(b"\x89PNG\r\n\x1a\n" + chunks, 50_000_000)


def test_pillows_own_limit_stays_on_for_everybody_else() -> None:
    script = """
import warnings
from PIL import Image
limit = Image.MAX_IMAGE_PIXELS
from pinnace.models.image import decode
from tests.support.hostile import make_png
from tests.support.pictures import CAT
import io
decode(CAT, 10**9)
assert Image.MAX_IMAGE_PIXELS == limit == 89_478_485
warnings.simplefilter("error")
for side in (10_000, 14_000):
    try:
        Image.open(io.BytesIO(make_png(side, side)))
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        print(type(error).__name__)
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=PROJECT, capture_output=True, text=True, check=True)

    assert done.stdout.split() == ["DecompressionBombWarning", "DecompressionBombError"]


@pytest.mark.parametrize("side", [10_000, 14_000])
def test_an_image_beyond_pillows_limit_is_judged_by_max_image_pixels_alone(side: int) -> None:
    with pytest.raises(TooLarge, match=rf"^an image of {side} × {side} exceeds max_image_pixels \(50000000\)$"):
        decode(make_png(side, side), 50_000_000)
    with pytest.raises(InvalidInput, match=r"^a truncated, damaged or unsupported image$"):  # it has no pixels
        decode(make_png(side, side), side * side)


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("name", MODES)
def test_every_format_is_decoded_and_resized_beyond_pillows_limit(
    name: str, fast: bool, preprocessing: Preprocessing, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pillow's limit is lowered, since a picture beyond its own takes a gigabyte."""
    preprocessing = replace(preprocessing, fast=fast)
    expected = preprocessing(decode(MODES[name], MANY_PIXELS))

    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", preprocessing.crop_pixels**2)

    np.testing.assert_array_equal(preprocessing(decode(MODES[name], MANY_PIXELS)), expected)


def gif(screen: tuple[int, int], frame: tuple[int, int, int, int], disposal: int) -> bytes:
    control = b"!\xf9\x04" + bytes([disposal << 2]) + b"\0\0\0\0"
    return b"GIF89a" + struct.pack("<HHBBB", *screen, 0, 0, 0) + control + b"," + struct.pack("<HHHHB", *frame, 0)


@pytest.mark.parametrize("disposal", range(4))
def test_a_gifs_frame_beyond_its_screen_counts(disposal: int) -> None:
    data = gif((1, 1), (60_000, 60_000, 40_000, 40_000), disposal) + b"\x02\x02\x4c\x01\0;"

    with pytest.raises(TooLarge, match=r"^an image of 100000 × 100000 exceeds max_image_pixels \(100000000\)$"):
        decode(data, MANY_PIXELS)
