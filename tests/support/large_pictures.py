"""Pictures of some 50 megapixels, of the kinds that take the most memory or time to decode."""

from __future__ import annotations

import struct
from functools import cache

import numpy as np
from PIL import Image

from tests.support.pictures import encode_picture

SIDE = 7070
PHONE_SIZE = (8192, 6144)  # 50.3 megapixels
PHONES = "JPEG of a phone"


def _plain(mode: str) -> Image.Image:
    return Image.new(mode, (SIDE, SIDE))


def _palette() -> bytes:
    picture = _plain("P")
    picture.putpalette(bytes(range(256)) * 3)
    return encode_picture(picture, "PNG", transparency=bytes(range(256)), compress_level=1)


def _grey_16() -> bytes:
    return encode_picture(Image.fromarray(np.zeros((SIDE, SIDE), np.uint16)), "PNG", compress_level=1)


def _photograph() -> bytes:
    """Return a phone's largest picture: a baseline JPEG of about 12 MiB."""
    noise = np.random.default_rng(0).integers(0, 256, (PHONE_SIZE[1] // 6, PHONE_SIZE[0] // 6, 3), np.uint8)
    large = Image.fromarray(noise).resize(PHONE_SIZE, Image.Resampling.BILINEAR)
    return encode_picture(large, "JPEG", quality=80)


KINDS = {
    "JPEG": lambda: encode_picture(_plain("RGB"), "JPEG"),
    "JPEG, progressive": lambda: encode_picture(_plain("RGB"), "JPEG", progressive=True),
    "JPEG, progressive 4:4:4": lambda: encode_picture(_plain("RGB"), "JPEG", progressive=True, subsampling=0),
    "JPEG, CMYK": lambda: encode_picture(_plain("CMYK"), "JPEG", progressive=True),
    "PNG": lambda: encode_picture(_plain("RGB"), "PNG", compress_level=1),
    "PNG, RGBA": lambda: encode_picture(_plain("RGBA"), "PNG", compress_level=1),
    "PNG, palette with transparency": _palette,
    "PNG, 16-bit grey": _grey_16,
    "TIFF, floating point": lambda: encode_picture(_plain("F"), "TIFF", compression="tiff_adobe_deflate"),
    "WebP": lambda: encode_picture(Image.new("RGB", (16383, 3000)), "WEBP", lossless=True, quality=0, method=0),
    PHONES: _photograph,
}


@cache
def make_large_picture(kind: str) -> bytes:
    """Return a picture of one of KINDS."""
    return KINDS[kind]()


def make_progressive_jpeg(num_bytes: int, width: int = 7000, height: int = 7000) -> bytes:
    """Return a grey progressive JPEG with as many scans as fit into so many bytes.

    The first scan has the mean of each block; all others have the same coefficient, of which every block has none: a
    run of 32,767 empty blocks takes 15 bits. A scan takes 4.5 ms of CPU (measured) and about 50 bytes.
    """
    num_blocks = ((width + 7) // 8) * ((height + 7) // 8)
    quantization = b"\xff\xdb\0\x43\0" + b"\1" * 64
    frame = b"\xff\xc2" + struct.pack(">HBHHB", 11, 8, height, width, 1) + b"\1\x11\0"
    one_code = bytes([1] + [0] * 15)
    tables = [
        b"\xff\xc4" + struct.pack(">HB", 20, kind) + one_code + symbol for kind, symbol in ((0, b"\0"), (16, b"\xe0"))
    ]
    means = b"\xff\xda" + struct.pack(">HB", 8, 1) + b"\1\0\0\0\0" + bytes((num_blocks + 7) // 8)
    runs = "0" + "1" * 14
    bits = runs * -(-num_blocks // 32_767)
    bits += "1" * (-len(bits) % 8)
    empty = int(bits, 2).to_bytes(len(bits) // 8, "big").replace(b"\xff", b"\xff\0")
    scan = b"\xff\xda" + struct.pack(">HB", 8, 1) + b"\1\0\1\x3f\0" + empty
    head = b"\xff\xd8" + quantization + frame + b"".join(tables) + means
    return head + scan * max(0, (num_bytes - len(head) - 2) // len(scan)) + b"\xff\xd9"
