"""Image headers: what decoding an image will cost, read before a decoder sees the image.

Pillow's plugins cannot be asked: they allocate and work while they open a file. The WebP plugin allocates two canvases
(400 MiB for 50 megapixels), the JPEG plugin takes 0.3 µs for each of any number of segments, and the GIF plugin's time
for a comment grows with the square of its length: 8 MiB of it take a minute (measured). The readers here look at sizes
and structure only, in a time that a limit bounds, and name the parts of the file that decoding needs.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pinnace.errors import InvalidInput, ServingError, TooLarge

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
DAMAGED = "a truncated, damaged or unsupported image"

# Limits on the structure of a file. Each is many times what encoders write, and keeps its reader below 50 ms.
MAX_JPEG_SCANS = 100  # progressive encoders write about 10
MAX_JPEG_SEGMENTS = 2_000  # a large depth map or colour profile has 200
MAX_JPEG_TABLE_BYTES = 256 * 1024  # of the quantization and Huffman tables: encoders write 2 KiB
MAX_PNG_CHUNKS = 20_000  # libpng writes 8 KiB per chunk: 1,600 in 12 MiB
MAX_GIF_BLOCKS = 4_096  # before the first frame: comments, colour profiles
MAX_TIFF_TAGS = 1_000
MAX_TIFF_STRIPS = 20_000  # or tiles
MAX_TIFF_VALUES = 200_000  # integers of any other tag: a 16-bit palette has 196,608
MAX_RLE_BYTES = 2 * 1024 * 1024  # Pillow decodes run-length encoded BMPs in Python: 1 MiB takes half a second

USUAL_SCANS = 10
SEARCH_BYTES = 65_536  # searched at a time for a JPEG's next marker: other threads can run in between

# Bytes per pixel of Pillow's modes, and of the RGB image that is made of them (measured: Pillow stores RGB in 4 bytes).
GREY, COLOUR = 1, 4
GREY_16_BYTES = 7  # with the copies that are made of its high bytes
WEBP_BYTES = 16.5  # two canvases and a copy of the decoder's, and the image
COEFFICIENT_BYTES = 2  # libjpeg keeps all coefficients of an image of several scans

# Nanoseconds of CPU per pixel, measured on noisy pictures of 50 megapixels; resizing included.
NANOSECONDS_PER_PIXEL = {"JPEG": 15, "PNG": 50, "WEBP": 35, "GIF": 15, "BMP": 10, "TIFF": 50}

JPEG_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")
START_OF_IMAGE, END_OF_IMAGE, START_OF_SCAN, HUFFMAN_TABLES, TEMPORARY = 0xD8, 0xD9, 0xDA, 0xC4, 0x01
FRAMES = {*range(0xC0, 0xD0)} - {HUFFMAN_TABLES, 0xC8, 0xCC}
ARITHMETIC_FRAMES = {0xC9, 0xCA, 0xCB, 0xCD, 0xCE, 0xCF}
PROGRESSIVE_FRAMES = {0xC2, 0xC6, 0xCA, 0xCE}
JPEG_TABLES = FRAMES | {HUFFMAN_TABLES, 0xCC, 0xDB, 0xDD, 0xE0, 0xEE}  # and JFIF's and Adobe's segments: the colours

PNG_CHUNKS = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND")
PNG_BYTES = {0: GREY, 2: COLOUR, 3: GREY, 4: COLOUR, 6: COLOUR}  # by colour type
RGB_TYPE, PALETTE_TYPE = 2, 3

GIF_EXTENSION, GIF_FRAME, GIF_CONTROL = 0x21, 0x2C, 0xF9

RLE = (1, 2)  # compressions of BMP
MAX_RLE_WIDTH = 65_535  # a jump in the data makes Pillow allocate up to 255 rows at once

WIDTH, HEIGHT, BITS, COMPRESSION, PHOTOMETRIC, STRIP_OFFSETS, ORIENTATION, SAMPLES, ROWS_PER_STRIP, STRIP_SIZES = (
    256, 257, 258, 259, 262, 273, 274, 277, 278, 279
)  # fmt: skip
TILE_WIDTH, TILE_HEIGHT, TILE_OFFSETS, TILE_SIZES = 322, 323, 324, 325
TIFF_LISTS = {STRIP_OFFSETS, STRIP_SIZES, TILE_OFFSETS, TILE_SIZES}
TIFF_TAGS = TIFF_LISTS | {
    WIDTH, HEIGHT, BITS, COMPRESSION, PHOTOMETRIC, ORIENTATION, SAMPLES, ROWS_PER_STRIP, TILE_WIDTH, TILE_HEIGHT
}  # fmt: skip
TIFF_INTEGERS = {3: "H", 4: "I", 8: "h", 9: "i", 13: "I", 16: "Q", 17: "q", 18: "Q"}  # by type, as struct names them
TIFF_DEFAULTS = {COMPRESSION: 1, SAMPLES: 1, PHOTOMETRIC: 0, ORIENTATION: 1}
LAB = 8  # a photometric interpretation
SIDEWAYS = (5, 6, 7, 8)  # orientations
JPEG_COMPRESSIONS = (6, 7)
# None, CCITT's three, LZW, JPEG's two, Deflate's two, PackBits. With others a file of some kilobytes demands gigabytes.
TIFF_COMPRESSIONS = (1, 2, 3, 4, 5, *JPEG_COMPRESSIONS, 8, 32773, 32946)


@dataclass(frozen=True, slots=True)
class ImageHeader:
    """The format and the size of an image, and what decoding it to RGB costs at most."""

    format: str
    """One of FORMATS."""
    width: int
    """In pixels, as decoded."""
    height: int
    decode_bytes: int
    """Peak of the memory while the image is decoded and converted to RGB, the RGB image included."""
    work_pixels: int
    """Pixels that the decoder processes: those of the image, times a tenth of its scans if there are more than 10; with
    arithmetic coding, times all its scans."""
    parts: Sequence[slice] = (slice(None),)
    """The parts of the file that decoding needs, without metadata."""

    @property
    def pixels(self) -> int:
        """Return width times height."""
        return self.width * self.height

    @property
    def decode_seconds(self) -> float:
        """Return the CPU time of decoding and resizing, estimated."""
        return self.work_pixels * NANOSECONDS_PER_PIXEL[self.format] * 1e-9

    def select(self, data: bytes) -> bytes:
        """Return the parts of the file that decoding needs. `data` is the file that the header was read from."""
        return b"".join([data[part] for part in self.parts]) if len(self.parts) > 1 else data[self.parts[0]]


def read_header(data: bytes) -> ImageHeader:
    """Read the header of an encoded image, in at most 50 ms.

    Raises:
        InvalidInput: `data` is not an image in one of FORMATS, or its header is damaged.
        TooLarge: The structure of the file exceeds one of the limits above.
    """
    for signature, read in READERS.items():
        if data.startswith(signature):
            try:
                return read(data)
            except ServingError:
                raise
            except Exception:  # an index or a number that does not fit, and what Pillow raises for a TIFF image
                raise InvalidInput(DAMAGED) from None
    raise InvalidInput(f"neither an image ({', '.join(FORMATS)}) nor base64 text of one")


def _read_jpeg(data: bytes) -> ImageHeader:
    """Read a JPEG's segments up to its end. Every marker counts that libjpeg would see."""
    parts, table_bytes, num_segments, num_scans = [slice(0, 2)], 0, 0, 0
    frame_code, frame = 0, b""
    position = 2
    while (marker := _find_marker(data, position)) >= 0 and (code := data[marker + 1]) != END_OF_IMAGE:
        num_segments += 1
        if num_segments > MAX_JPEG_SEGMENTS:
            raise TooLarge(f"a JPEG of more than {MAX_JPEG_SEGMENTS} segments")
        if code in (START_OF_IMAGE, TEMPORARY):  # they have no length
            position = marker + 2
            continue
        (length,) = struct.unpack_from(">H", data, marker + 2)
        position = marker + 2 + length
        if code == START_OF_SCAN:
            num_scans += 1
            if num_scans > MAX_JPEG_SCANS:
                raise TooLarge(f"a JPEG of more than {MAX_JPEG_SCANS} scans")
            if num_scans == 1:
                parts.append(slice(marker, None))
        elif code in JPEG_TABLES and not num_scans:
            table_bytes += length
            parts.append(slice(marker, position))
            if code in FRAMES and not frame:
                frame_code, frame = code, data[marker + 4 : position]
    if table_bytes > MAX_JPEG_TABLE_BYTES:
        raise TooLarge(f"a JPEG with more than {MAX_JPEG_TABLE_BYTES} bytes of tables")
    if not num_scans:
        raise InvalidInput(DAMAGED)
    height, width, num_components = struct.unpack_from(">xHHB", frame)
    factors = [(frame[7 + 3 * index] >> 4, frame[7 + 3 * index] & 15) for index in range(num_components)]
    largest = max(x for x, _ in factors) * max(y for _, y in factors)
    decoded = GREY if num_components == 1 else COLOUR
    coefficients = 0.0
    if frame_code in PROGRESSIVE_FRAMES or num_scans > 1:
        coefficients = COEFFICIENT_BYTES * sum(x * y for x, y in factors) / largest
    bytes_per_pixel = decoded + max(coefficients, 0 if num_components == 3 else COLOUR)
    # Arithmetic decoding takes as long for a scan without any data as for one with it.
    repetitions = num_scans if frame_code in ARITHMETIC_FRAMES else max(1.0, num_scans / USUAL_SCANS)
    pixels = width * height
    return ImageHeader("JPEG", width, height, int(pixels * bytes_per_pixel), int(pixels * repetitions), parts)


def _find_marker(data: bytes, position: int) -> int:
    """Return where the next marker of a JPEG is, -1 if there is none. Restart markers and stuffed bytes are not one."""
    while position < len(data):
        if found := JPEG_MARKER.search(data, position, position + SEARCH_BYTES):
            return found.start()
        position += SEARCH_BYTES - 1
    return -1


def _read_png(data: bytes) -> ImageHeader:
    """Read a PNG's chunks. Those that decoding does not need, such as compressed texts, are left out."""
    kind, width, height, depth, colour_type = struct.unpack_from(">4x4sIIBB", data, 8)
    if kind != b"IHDR":
        raise InvalidInput(DAMAGED)
    parts, num_chunks, has_transparency = [slice(0, 8)], 0, False
    position = 8
    while position + 8 <= len(data) and kind != b"IEND":
        num_chunks += 1
        if num_chunks > MAX_PNG_CHUNKS:
            raise TooLarge(f"a PNG of more than {MAX_PNG_CHUNKS} chunks")
        length, kind = struct.unpack_from(">I4s", data, position)
        end = position + 12 + length
        if kind in PNG_CHUNKS:
            has_transparency |= kind == b"tRNS"
            if parts[-1].stop == position:
                parts[-1] = slice(parts[-1].start, end)
            else:
                parts.append(slice(position, end))
        position = end
    if colour_type == 0 and depth == 16:
        bytes_per_pixel = GREY_16_BYTES
    elif colour_type == RGB_TYPE:
        bytes_per_pixel = COLOUR
    elif colour_type == PALETTE_TYPE and has_transparency:
        bytes_per_pixel = GREY + 2 * COLOUR
    else:
        bytes_per_pixel = PNG_BYTES[colour_type] + COLOUR
    return ImageHeader("PNG", width, height, width * height * bytes_per_pixel, width * height, parts)


def _read_webp(data: bytes) -> ImageHeader:
    """Read the size of a WebP's canvas (RFC 9649)."""
    if data[8:12] != b"WEBP":
        raise InvalidInput(DAMAGED)
    if data[12:16] == b"VP8X":
        width, height = (int.from_bytes(data[start : start + 3], "little") + 1 for start in (24, 27))
    elif data[12:16] == b"VP8L":
        (bits,) = struct.unpack_from("<I", data, 21)
        width, height = (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    else:
        width, height = (size & 0x3FFF for size in struct.unpack_from("<HH", data, 26))
    return ImageHeader("WEBP", width, height, int(width * height * WEBP_BYTES), width * height)


def _read_gif(data: bytes) -> ImageHeader:
    """Read a GIF up to its first frame. Of what precedes it only the last control extension is needed."""
    width, height, flags = struct.unpack_from("<HHB", data, 6)
    position = 13 + (3 << (flags & 7) + 1 if flags & 0x80 else 0)
    screen, control = slice(0, position), slice(0, 0)
    num_blocks = 0
    while (kind := data[position]) != GIF_FRAME:
        start = position
        position += 1
        num_blocks += 1
        if kind == GIF_EXTENSION:
            is_control = data[position] == GIF_CONTROL
            position += 1
            while (length := data[position]) and num_blocks <= MAX_GIF_BLOCKS:
                position += 1 + length
                num_blocks += 1
            position += 1
            control = slice(start, position) if is_control else control
        if num_blocks > MAX_GIF_BLOCKS:
            raise TooLarge(f"a GIF with more than {MAX_GIF_BLOCKS} blocks before its first frame")
    left, top, frame_width, frame_height = struct.unpack_from("<HHHH", data, position + 1)
    width, height = max(width, left + frame_width), max(height, top + frame_height)
    parts = [screen, control, slice(position, None)]
    return ImageHeader("GIF", width, height, width * height * (GREY + COLOUR), width * height, parts)


def _read_bmp(data: bytes) -> ImageHeader:
    header_size, width, height = struct.unpack_from("<III", data, 14)
    if header_size == 12:
        width, height, bits, compression = *struct.unpack_from("<HHxxH", data, 18), 0
    else:
        height = 2**32 - height if data[25] == 0xFF else height  # a negative height: the first row is the top one
        bits, compression = struct.unpack_from("<HI", data, 28)
    pixels = width * height
    decode_bytes = pixels * (COLOUR if bits in (16, 24) else GREY + COLOUR if bits <= 8 else 2 * COLOUR)
    if compression in RLE:
        if width > MAX_RLE_WIDTH or len(data) > MAX_RLE_BYTES:
            raise TooLarge(
                f"a run-length encoded BMP of more than {MAX_RLE_BYTES} bytes, or wider than {MAX_RLE_WIDTH}"
            )
        decode_bytes += 3 * pixels + 255 * width
    return ImageHeader("BMP", width, height, decode_bytes, pixels)


def _read_tiff(data: bytes) -> ImageHeader:
    """Read the tags of a TIFF's first image that say how it is stored (TIFF 6.0, and BigTIFF)."""
    tags = _read_tiff_tags(data)
    (width,), (height,) = tags[WIDTH], tags[HEIGHT]
    (compression, *_), (samples, *_), (photometric, *_), (orientation, *_) = (
        tags.get(tag, (default,))
        for tag, default in ((COMPRESSION, 1), (SAMPLES, 1), (PHOTOMETRIC, 0), (ORIENTATION, 1))
    )
    bits = max(tags.get(BITS, (1,)))
    if compression not in TIFF_COMPRESSIONS:
        raise InvalidInput(DAMAGED)
    pixels = width * height
    strip_pixels = width * min(height, tags.get(ROWS_PER_STRIP, (height,))[0])
    if TILE_WIDTH in tags:
        strip_pixels = tags[TILE_WIDTH][0] * tags[TILE_HEIGHT][0]
    if samples == 1:
        bytes_per_pixel = GREY + COLOUR if bits <= 8 else GREY_16_BYTES if bits == 16 else 3 * COLOUR + GREY
    else:
        bytes_per_pixel = COLOUR if samples == 3 and photometric != LAB else 2 * COLOUR
    if orientation != 1:  # Pillow turns the picture, which takes a copy
        bytes_per_pixel += COLOUR
    decode_bytes, work_pixels = pixels * bytes_per_pixel, pixels
    if compression != 1:
        if sum(tags.get(STRIP_SIZES, ())) + sum(tags.get(TILE_SIZES, ())) > 2 * len(data):
            raise InvalidInput(DAMAGED)  # libtiff would read the same bytes again for each strip
        decode_bytes += strip_pixels * max(COLOUR, samples * bits // 8)
    if compression in JPEG_COMPRESSIONS:
        decode_bytes += strip_pixels * COEFFICIENT_BYTES * samples
        work_pixels = max(pixels, data.count(b"\xff\xda") * strip_pixels)
    if orientation in SIDEWAYS:
        width, height = height, width
    return ImageHeader("TIFF", width, height, decode_bytes, work_pixels)


def _read_tiff_tags(data: bytes) -> dict[int, tuple[int, ...]]:
    """Return the values of the tags in TIFF_TAGS, each at its first occurrence.

    Raises TooLarge for a tag, whichever it is, with more numbers than an image has: Pillow makes Python integers of
    them, which take ten times the memory.
    """
    order = "<" if data[:2] == b"II" else ">"
    if data[2:4] in (b"\x2b\0", b"\0\x2b"):  # BigTIFF
        count, entry, offset, start = "Q", "HHQ", "Q", 8
    else:
        count, entry, offset, start = "H", "HHI", "I", 4
    (position,) = struct.unpack_from(order + offset, data, start)
    (num_entries,) = struct.unpack_from(order + count, data, position)
    position += struct.calcsize(order + count)
    tags: dict[int, tuple[int, ...]] = {}
    for _ in range(min(num_entries, MAX_TIFF_TAGS + 1)):
        tag, value_type, num_values = struct.unpack_from(order + entry, data, position)
        position += struct.calcsize(order + entry)
        if value_type in TIFF_INTEGERS:
            limit = MAX_TIFF_STRIPS if tag in TIFF_LISTS else MAX_TIFF_VALUES
            if num_values > limit:
                raise TooLarge(f"a TIFF image with more than {limit} values in tag {tag}")
            if tag in TIFF_TAGS and tag not in tags:
                values = f"{order}{num_values}{TIFF_INTEGERS[value_type]}"
                at = position
                if struct.calcsize(values) > struct.calcsize(order + offset):
                    (at,) = struct.unpack_from(order + offset, data, position)
                tags[tag] = struct.unpack_from(values, data, at)
        position += struct.calcsize(order + offset)
    if num_entries > MAX_TIFF_TAGS:
        raise TooLarge(f"a TIFF image with more than {MAX_TIFF_TAGS} tags")
    return tags


READERS: dict[bytes, Callable[[bytes], ImageHeader]] = {
    b"\xff\xd8\xff": _read_jpeg,
    b"\x89PNG": _read_png,
    b"RIFF": _read_webp,
    b"GIF8": _read_gif,
    b"BM": _read_bmp,
    b"II*\0": _read_tiff,
    b"MM\0*": _read_tiff,
    b"II\x2b\0": _read_tiff,
    b"MM\0\x2b": _read_tiff,
}
"""The readers by the first bytes of their format."""

SIGNATURES = tuple(READERS)
