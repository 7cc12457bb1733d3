"""pinnace/image.py against torchvision's own preset and loader: the same pixels, to the bit."""

from __future__ import annotations

import base64
import io
import struct
import zlib
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from pinnace.errors import InvalidInput, TooLarge
from pinnace.models.image import Preprocessing, decode, image_bytes
from tests.conftest import TORCH_REASON
from tests.pictures import CAT, MODES, PHOTOGRAPHS, SIXTEEN_BIT, encoded

if TYPE_CHECKING:
    from model_export.source import Source

MANY_PIXELS = 100_000_000


@pytest.fixture(scope="module")
def preprocessing(original: Source) -> Preprocessing:
    from model_export.export import make_card

    card = make_card(original)
    return Preprocessing(card.resize_pixels, card.crop_pixels, card.interpolation, card.mean, card.std)


def torchvisions_pixels(original: Source, data: bytes) -> NDArray[np.float32]:
    pixels: NDArray[np.float32] = original.preset(torchvisions_picture(data)).numpy()
    return pixels


def torchvisions_picture(data: bytes) -> Image.Image:
    """As torchvision.datasets' loader makes it, which reads files."""
    picture = Image.open(io.BytesIO(data))
    if picture.mode == "I;16":
        import torch

        from model_export.vision import torchvision

        # That loader clips 16 bits to white; this is torchvision's own conversion to eight.
        wide = torch.from_numpy(np.asarray(picture).astype(np.int32) << 15)
        narrow = torchvision.transforms.functional.convert_image_dtype(wide, torch.uint8)
        return Image.fromarray(narrow.numpy()).convert("RGB")
    if "transparency" in picture.info:
        picture.info.pop("transparency")  # Pillow warns of it, and drops it
    return picture.convert("RGB")


@pytest.mark.parametrize("name", [*PHOTOGRAPHS, *MODES])
def test_pixels_equal_torchvisions_to_the_bit(name: str, preprocessing: Preprocessing, original: Source) -> None:
    data = {**PHOTOGRAPHS, **MODES}[name]

    pixels = preprocessing(decode(data, MANY_PIXELS))

    assert pixels.dtype == np.float32
    np.testing.assert_array_equal(pixels, torchvisions_pixels(original, data))


@pytest.mark.parametrize("name", SIXTEEN_BIT)
def test_sixteen_bits_keep_their_picture_instead_of_going_white(name: str) -> None:
    grey = np.asarray(Image.open(io.BytesIO(CAT)).convert("L"))

    np.testing.assert_array_equal(np.asarray(decode(MODES[name], MANY_PIXELS))[:, :, 0], grey)


@pytest.mark.parametrize("architecture", ["resnet50", "efficientnet_b0", "inception_v3", "vit_h_14", "swin_v2_t"])
def test_other_architectures_presets_give_torchvisions_pixels_too(architecture: str) -> None:
    pytest.importorskip("torch", reason=TORCH_REASON)
    from model_export.vision import torchvision

    preset: Any = torchvision.models.get_model_weights(architecture).DEFAULT.transforms()
    preprocessing = Preprocessing(
        preset.resize_size[0], preset.crop_size[0], preset.interpolation.name, tuple(preset.mean), tuple(preset.std)
    )

    pixels = preprocessing(decode(CAT, MANY_PIXELS))

    np.testing.assert_array_equal(pixels, preset(Image.open(io.BytesIO(CAT)).convert("RGB")).numpy())


@pytest.mark.parametrize("size", [(1, 2000), (2000, 1), (2, 10_000), (300, 100_000)])
def test_an_extreme_strip_is_resized_only_where_it_is_cropped(
    size: tuple[int, int], preprocessing: Preprocessing
) -> None:
    ramp = Image.linear_gradient("L").resize(size).convert("RGB")

    pixels = preprocessing(decode(encoded(ramp, "PNG"), MANY_PIXELS))

    middle = np.asarray(ramp)[size[1] // 2, size[0] // 2]
    mean, std = np.array(preprocessing.mean), np.array(preprocessing.std)
    shown = (pixels[:, 112, 112] * std + mean) * 255
    assert np.abs(shown - middle).max() <= 2


def test_only_the_first_frame_is_shown() -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]

    for file_format in ("GIF", "WEBP", "TIFF", "PNG"):
        options = {"save_all": True, "append_images": frames[1:]}
        if file_format == "WEBP":
            options["lossless"] = True
        assert decode(encoded(frames[0], file_format, **options), MANY_PIXELS).getpixel((4, 4)) == (255, 0, 0)


@pytest.mark.parametrize("name", MODES)
def test_an_image_is_found_in_a_bytes_element_raw_or_as_base64_text(name: str) -> None:
    data = MODES[name]

    assert image_bytes(data) == data
    assert image_bytes(base64.b64encode(data)) == data
    assert image_bytes(base64.encodebytes(data)) == data


@pytest.mark.parametrize("data", [b"", b"hello", b"%PDF-1.7", b"<svg/>", b"P6 1 1 255 abc", b"\0\0\1\0" + b"\0" * 60])
def test_what_is_no_image_of_the_promised_formats_is_refused(data: bytes) -> None:
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
