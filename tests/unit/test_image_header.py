"""The readers of image headers alone: sizes and costs against Pillow's own, and the limits on structure."""

from __future__ import annotations

import io
import struct
import zlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pinnace.errors import InvalidInput, ServingError, TooLarge
from pinnace.models.image import decode
from pinnace.models.image_header import (
    MAX_GIF_BLOCKS,
    MAX_JPEG_SCANS,
    MAX_JPEG_SEGMENTS,
    MAX_PNG_CHUNKS,
    MAX_TIFF_STRIPS,
    MAX_TIFF_TAGS,
    read_header,
)
from tests.support.pictures import CAT, MODES, PHOTOGRAPHS, encode_picture

PICTURES = {**PHOTOGRAPHS, **MODES}
MANY_PIXELS = 10**9
SCAN = b"\xff\xda\0\x08\x01\x01\0\0\x3f\0"
COMMENT = b"\xff\xfe\0\x04xx"


def insert(data: bytes, marker: bytes, inserted: bytes) -> bytes:
    """Return the file with something inserted before the first occurrence of a marker."""
    position = data.index(marker)
    return data[:position] + inserted + data[position:]


@pytest.mark.parametrize("name", PICTURES)
def test_size_and_format_are_those_that_pillow_finds(name: str) -> None:
    header = read_header(PICTURES[name])

    with Image.open(io.BytesIO(PICTURES[name])) as picture:
        assert (header.format, header.width, header.height) == (picture.format, *picture.size)


@pytest.mark.parametrize("name", PICTURES)
def test_a_picture_takes_at_least_the_memory_of_its_pixels_and_works_on_each_once(name: str) -> None:
    header = read_header(PICTURES[name])

    assert header.decode_bytes >= 4 * header.pixels
    assert header.work_pixels >= header.pixels
    assert header.decode_seconds > 0


@given(name=st.sampled_from(sorted(MODES)), data=st.data())
@settings(max_examples=300, deadline=None)
def test_a_damaged_header_gives_a_clear_error_or_a_picture_of_the_size_that_it_says(
    name: str, data: st.DataObject
) -> None:
    damaged = bytearray(MODES[name])
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, min(len(damaged), 700) - 1))] = data.draw(st.integers(0, 255))
    try:
        header = read_header(bytes(damaged))
        picture = decode(bytes(damaged), 1_000_000)
    except ServingError:
        return
    assert picture.size == (header.width, header.height)


@pytest.mark.parametrize("name", MODES)
@pytest.mark.parametrize("share", [0.0, 0.01, 0.1, 0.5])
def test_a_truncated_file_gives_a_header_or_a_clear_error(name: str, share: float) -> None:
    data = MODES[name]
    try:
        header = read_header(data[: 2 + int(len(data) * share)])
    except InvalidInput:
        return
    assert header.pixels > 0


def test_metadata_is_left_out_of_what_is_decoded() -> None:
    exif = Image.Exif()
    exif[0x010E] = "a secret"
    jpeg = encode_picture(Image.open(io.BytesIO(CAT)).convert("RGB"), "JPEG", exif=exif, comment=b"a secret")
    text = zlib.compress(b"a secret")
    png = insert(MODES["PNG"], b"IDAT", b"")  # the length of the chunk stands before its name
    position = png.index(b"IDAT") - 4
    chunk = struct.pack(">I", len(text) + 2) + b"zTXt" + b"\0\0" + text + b"\0\0\0\0"  # whose checksum is wrong
    png = png[:position] + chunk + png[position:]

    for data in (jpeg, png):
        assert read_header(data).select(data) != data
        assert b"a secret" not in read_header(data).select(data)
        assert decode(data, MANY_PIXELS).size == Image.open(io.BytesIO(CAT)).size


def test_a_jpeg_of_ten_scans_counts_once_and_one_of_forty_four_times() -> None:
    progressive = MODES["JPEG progressive"]
    header = read_header(progressive)
    assert header.work_pixels == header.pixels

    scans = progressive.count(b"\xff\xda")
    more = insert(progressive, b"\xff\xd9", SCAN * (40 - scans))

    assert read_header(more).work_pixels == 4 * header.pixels


def test_a_thumbnail_inside_a_segment_is_no_scan() -> None:
    thumbnail = encode_picture(Image.new("RGB", (8, 8)), "JPEG", progressive=True) * 20
    segment = b"\xff\xe1" + struct.pack(">H", len(thumbnail) + 2) + thumbnail

    header = read_header(insert(MODES["JPEG"], b"\xff\xdb", segment))

    assert header.work_pixels == header.pixels


def test_what_follows_the_end_of_a_jpeg_is_not_read() -> None:
    assert read_header(MODES["JPEG"] + SCAN * 1000) == read_header(MODES["JPEG"])


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (insert(MODES["JPEG progressive"], b"\xff\xd9", SCAN * MAX_JPEG_SCANS), "a JPEG of more than 100 scans"),
        (insert(MODES["JPEG"], b"\xff\xd9", SCAN * MAX_JPEG_SCANS), "a JPEG of more than 100 scans"),
        (insert(MODES["JPEG"], b"\xff\xdb", COMMENT * MAX_JPEG_SEGMENTS), "a JPEG of more than 2000 segments"),
        (
            insert(MODES["JPEG"], b"\xff\xdb", (b"\xff\xdb\xff\xff" + bytes(65533)) * 5),
            "a JPEG with more than 262144 bytes of tables",
        ),
        (
            MODES["PNG"][:33] + (struct.pack(">I", 0) + b"tEXt" + bytes(4)) * MAX_PNG_CHUNKS + MODES["PNG"][33:],
            "a PNG of more than 20000 chunks",
        ),
        (
            insert(MODES["GIF"], b"\x2c\0\0\0\0", b"!\xfe" + b"\x01x" * MAX_GIF_BLOCKS + b"\0"),
            "a GIF with more than 4096 blocks before its first frame",
        ),
        (insert(MODES["GIF"], b"\x2c\0\0\0\0", b"!\xfe\0" * (MAX_GIF_BLOCKS + 1)), "a GIF with more than 4096 blocks"),
        (b"BM" + bytes(12) + struct.pack("<IiiHHI", 40, 100_000, 1, 1, 8, 1) + bytes(99), "a run-length encoded BMP"),
        (
            b"II*\0\x08\0\0\0" + struct.pack("<HHHII", 1, 273, 4, MAX_TIFF_STRIPS + 1, 0),
            "a TIFF image with more than 20000 values in tag 273",
        ),
        (
            b"II*\0\x08\0\0\0" + struct.pack("<H", 9999) + struct.pack("<HHII", 700, 3, 1, 0) * (MAX_TIFF_TAGS + 1),
            "a TIFF image with more than 1000 tags",
        ),
    ],
)
def test_a_structure_that_costs_time_or_memory_is_refused_before_it_is_decoded(data: bytes, text: str) -> None:
    with pytest.raises(TooLarge, match=f"^{text}"):
        read_header(data)


def test_a_tiff_whose_strips_are_the_same_bytes_is_refused() -> None:
    tags = {256: 1000, 257: 1000, 258: 8, 259: 5, 262: 1, 277: 1, 278: 1}
    entries = [struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items()]
    lists = [struct.pack("<HHII", tag, 4, 1000, 1000) for tag in (273, 279)]
    data = b"II*\0\x08\0\0\0" + struct.pack("<H", len(entries) + 2) + b"".join(entries + lists) + bytes(1000)
    data = data[:1000] + struct.pack("<I", 4000) * 1000

    with pytest.raises(InvalidInput):
        read_header(data)


def test_a_tile_larger_than_its_picture_counts_with_its_memory() -> None:
    tags = {256: 8, 257: 8, 258: 8, 259: 5, 262: 1, 277: 1, 322: 40_000, 323: 40_000}
    entries = [struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items()]
    data = b"II*\0\x08\0\0\0" + struct.pack("<H", len(entries)) + b"".join(entries) + bytes(4)

    assert read_header(data).decode_bytes >= 40_000**2
