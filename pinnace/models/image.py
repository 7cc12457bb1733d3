"""Image decoding and preprocessing: encoded bytes to the pixels of torchvision's ImageClassification preset.

The pixels are bit-equal to torchvision's for the same image, with one exception: 16-bit grey images keep their high
byte (as torchvision.transforms.functional.convert_image_dtype does); torchvision's image loader clips them to white.

Pillow's own limit on image sizes, `PIL.Image.MAX_IMAGE_PIXELS`, is one number for the whole process. It stays as it is
for `PIL.Image.open` and does not apply here: the `max_pixels` of `decode` is the only limit.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import BmpImagePlugin, GifImagePlugin, Image, JpegImagePlugin, PngImagePlugin, TiffImagePlugin, WebPImagePlugin
from PIL.ImageFile import ImageFile

from pinnace.base64_text import from_base64
from pinnace.errors import InvalidInput, TooLarge
from pinnace.models.image_header import COLOUR, DAMAGED, SIGNATURES, ImageHeader, read_header

EXTENT = "extent"  # key in `info`: the exact size of the image content, whose last row and column may be half filled

MAX_RESIZED_PIXELS = 65_536  # of the longer side: an aspect ratio of 1 : 256 for a shorter side of 256
FILTER_RADIUS = 3  # source pixels, times the scale: the widest of Pillow's filters
MAX_GIF_PIXELS = 2 * 65_535  # of one side: a GIF's position and size are 16 bits each
WEBP_PREFIX_BYTES = 16


def image_bytes(element: bytes) -> bytes:
    """Return the encoded image in a BYTES element: base64 text is decoded, raw bytes are returned unchanged.

    The Open Inference Protocol does not say which of the two a BYTES element holds, and clients send both. The base64
    text of an image in a supported format never begins with one of the signatures.
    """
    if element.startswith(SIGNATURES):
        return element
    try:
        return from_base64(element)
    except InvalidInput:
        return element  # decode() raises the error for data that is neither


def read_size(data: bytes, max_pixels: int) -> ImageHeader:
    """Read the header of an encoded image.

    Raises:
        InvalidInput: `data` is not an image in one of FORMATS, or its header is damaged.
        TooLarge: The image has more than `max_pixels` pixels, or too many scans, segments or chunks.
    """
    header = read_header(data)
    if header.pixels > max_pixels:
        raise TooLarge(f"an image of {header.width} × {header.height} exceeds max_image_pixels ({max_pixels})")
    return header


def decode(data: bytes, max_pixels: int, shorter_pixels: int = 0) -> Image.Image:
    """Decode the first frame to an RGB image and drop transparency.

    Args:
        data: An encoded image in one of FORMATS.
        max_pixels: The largest width times height that is decoded.
        shorter_pixels: Decode a JPEG at a half, a quarter or an eighth of its size if its shorter side stays at least
            this long. 0 decodes at full size.

    Raises:
        InvalidInput: `data` is not an image in one of FORMATS, or is damaged.
        TooLarge: The image has more than `max_pixels` pixels, or too many scans, segments or chunks.
    """
    header = read_size(data, max_pixels)
    try:
        with OPENERS[header.format](header.select(data)) as picture:
            if picture.size != (header.width, header.height):  # decoding would not cost what the header says
                raise InvalidInput(DAMAGED)
            if shorter_pixels:
                scale = shorter_pixels / min(picture.size)
                drafted = picture.draft("RGB", (math.ceil(picture.width * scale), math.ceil(picture.height * scale)))
                if drafted:
                    picture.info[EXTENT] = drafted[1][2:]
            return _to_rgb(picture)
    except Exception:  # Pillow's plugins raise nearly any exception on hostile bytes
        raise InvalidInput(DAMAGED) from None


class _ShortFirstRead(io.BytesIO):
    """A WebP file that returns no more than 16 bytes from a sized read.

    Pillow's plugin looks for the image's size in its first read and compares it with Pillow's limit. The size is not
    within the first 16 bytes.
    """

    def read(self, size: int | None = -1) -> bytes:
        return super().read(size if size is None or size < 0 else min(size, WEBP_PREFIX_BYTES))


class _UnguardedGif(GifImagePlugin.GifImageFile):
    """A GIF's first frame, without Pillow's limit on its size."""

    def _seek(self, frame: int, update_image: bool = True) -> None:
        width, height = self._size
        # The plugin checks a frame only if it exceeds the screen, whose size a GIF declares separately.
        self._size = (MAX_GIF_PIXELS, MAX_GIF_PIXELS)
        super()._seek(frame, update_image)
        _, _, right, bottom = self.dispose_extent or (0, 0, width, height)
        self._size = (max(width, right), max(height, bottom))

    @property
    def disposal_method(self) -> int:
        """Return 0, "unspecified": the first frame does not depend on how it is cleared before the second.

        For other values the plugin fills memory of the frame's size while it opens the file: 4 GB for a file of 44
        bytes.
        """
        return 0

    @disposal_method.setter
    def disposal_method(self, _: int) -> None:
        pass


class _UnguardedTiff(TiffImagePlugin.TiffImageFile):
    """A TIFF image without Pillow's limit on its size: the plugin checks it only before it allocates the image."""

    def load_prepare(self) -> None:
        if self._im is None:
            self.im = Image.new(self.mode, self._tile_size, None).im
        super().load_prepare()


# By format. Image.open would also check Pillow's limit on image sizes; these plugins check none, or not any more.
OPENERS: dict[str, Callable[[bytes], ImageFile]] = {
    "JPEG": lambda data: JpegImagePlugin.JpegImageFile(io.BytesIO(data)),
    "PNG": lambda data: PngImagePlugin.PngImageFile(io.BytesIO(data)),
    "WEBP": lambda data: WebPImagePlugin.WebPImageFile(_ShortFirstRead(data)),
    "GIF": lambda data: _UnguardedGif(io.BytesIO(data)),
    "BMP": lambda data: BmpImagePlugin.BmpImageFile(io.BytesIO(data)),
    "TIFF": lambda data: _UnguardedTiff(io.BytesIO(data)),
}


def _to_rgb(picture: Image.Image) -> Image.Image:
    if picture.mode == "I" or picture.mode.startswith("I;16"):
        picture = Image.fromarray(_high_bytes(np.asarray(picture)))
    elif picture.mode == "P" and isinstance(picture.info.get("transparency"), bytes):
        picture = picture.convert("RGBA")  # the same colours; Pillow warns if it converts directly to RGB
    picture.load()
    return picture if picture.mode == "RGB" else picture.convert("RGB")  # convert() always copies: 0.1 ms of 5


def _high_bytes(grey: NDArray[np.integer]) -> NDArray[np.uint8]:
    """Return the high byte of 16-bit values. 32-bit values are clipped to 16 bits."""
    if grey.dtype.itemsize > 2:
        grey = np.clip(grey, 0, 0xFFFF).astype("<u2")
    high = 0 if grey.dtype.byteorder == ">" else 1
    return np.ascontiguousarray(grey[..., np.newaxis].view(np.uint8)[..., high])


@dataclass(frozen=True, slots=True)
class Preprocessing:
    """The model's preprocessing: resize the shorter side, crop the centre, normalise.

    `interpolation` is the name of a PIL.Image.Resampling. `mean` and `std` apply to values from 0 to 1, one per
    channel.
    """

    resize_pixels: int
    crop_pixels: int
    interpolation: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    fast: bool = False
    """Resize only the part that the crop keeps: a third faster, but a few pixels differ by one grey level."""

    def __call__(self, picture: Image.Image, planes: NDArray[np.float32] | None = None) -> NDArray[np.float32]:
        """Return an RGB image as normalised FP32 pixels of shape [3, crop_pixels, crop_pixels].

        They are written to `planes` if it is given.
        """
        pixels = np.asarray(self._resize_and_crop(picture))
        mean, std = np.array(self.mean, np.float32), np.array(self.std, np.float32)
        planes = np.empty((3, self.crop_pixels, self.crop_pixels), np.float32) if planes is None else planes
        # Plane by plane, in torchvision's order of operations: 0.12 ms, a seventh of the whole-array expression.
        for channel, plane in enumerate(planes):
            np.divide(pixels[:, :, channel], np.float32(255), out=plane)
            plane -= mean[channel]
            plane /= std[channel]
        return planes

    def resize_bytes(self, width: int, height: int) -> int:
        """Return the memory that resizing an RGB image of this size takes, in addition to the image."""
        shorter, longer = sorted((width, height))
        resized = self.resize_pixels * longer // max(1, shorter)
        if resized <= MAX_RESIZED_PIXELS and not self.fast:
            resized_width, resized_height = (
                (self.resize_pixels, resized) if width <= height else (resized, self.resize_pixels)
            )
            return COLOUR * resized_width * (height + resized_height)  # Pillow resizes the width first
        return COLOUR * shorter * (shorter + self.crop_pixels)

    def _resize_and_crop(self, picture: Image.Image) -> Image.Image:
        width, height = picture.info.get(EXTENT, picture.size)
        longer = int(self.resize_pixels * max(width, height) / min(width, height))
        resized = (self.resize_pixels, longer) if width <= height else (longer, self.resize_pixels)
        left, top = (round((size - self.crop_pixels) / 2) for size in resized)
        box = (left, top, left + self.crop_pixels, top + self.crop_pixels)
        resampling = Image.Resampling[self.interpolation]
        if longer <= MAX_RESIZED_PIXELS and not self.fast:
            return picture.resize(resized, resampling).crop(box)
        # Resize only the crop's source pixels: an image of 1 × 10,000 would grow to 256 × 2,560,000. The results differ
        # slightly from resizing the whole image, because Pillow's filter weights are rounded differently.
        x_first, x_last, x_low, x_high = _source_range(left, left + self.crop_pixels, width / resized[0], picture.width)
        y_first, y_last, y_low, y_high = _source_range(top, top + self.crop_pixels, height / resized[1], picture.height)
        # Such a resize is an exact crop. Image.crop() would check Pillow's limit on image sizes.
        source = picture.resize(
            (x_last - x_first, y_last - y_first), Image.Resampling.NEAREST, box=(x_first, y_first, x_last, y_last)
        )
        return source.resize((self.crop_pixels, self.crop_pixels), resampling, box=(x_low, y_low, x_high, y_high))


def _source_range(low: int, high: int, scale: float, size: int) -> tuple[int, int, float, float]:
    """Return the source pixels that resized pixels low..high of one axis come from, and where low..high lie in them."""
    margin = math.ceil(FILTER_RADIUS * max(1.0, scale))
    first, last = max(0, math.floor(low * scale) - margin), min(size, math.ceil(high * scale) + margin)
    return first, last, low * scale - first, high * scale - first
