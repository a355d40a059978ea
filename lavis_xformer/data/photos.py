"""Open a photo of any format, and say plainly which one can't be opened.

PIL alone clips 16-bit pixels, shows what an alpha channel hides, and, once LAVIS has been imported,
fills the missing part of a truncated file with grey. Here each image becomes what a person would see,
or an error.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageFile

from lavis_xformer.errors import UserError, first_line

PIXELS_VARIABLE = "LAVIS_XFORMER_MAX_PIXELS"
_DEEP_GREY = ("I", "I;16", "I;16L", "I;16B", "I;16N")
_TURNS = {  # the transpose that turns a photo upright, by its EXIF orientation
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class PhotoError(UserError):
    """One image file is missing, unreadable or not an image; the message names it."""


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert any PIL mode to 8-bit RGB without losing what the picture shows.

    16-bit grey is scaled (PIL would clip it at 255), and so are float pixels of at most 1 (PIL would make them black);
    transparency is composited over white (PIL would reveal the hidden colours); every other mode, such as L, P, CMYK
    or YCbCr, goes through PIL's own conversion.

    Args:
        image: an image of any mode, W x H pixels.

    Returns:
        The same W x H pixels in mode RGB; an RGB image without transparency is returned as it is.

    Raises:
        PhotoError: not a PIL image, or one without pixels.
    """
    if not isinstance(image, Image.Image):
        raise PhotoError(f"an image processor got {type(image).__name__}; it takes a PIL image")
    if 0 in image.size:
        raise PhotoError(f"the image is empty: {image.width} x {image.height} pixels")
    if image.mode == "RGB" and not image.has_transparency_data:
        return image
    if image.mode in _DEEP_GREY:
        levels = np.asarray(image)
        eight_bits = image.mode == "I" and levels.max() <= 255
        return _grey(levels if eight_bits else levels / 257)  # 65535 -> 255
    if image.mode == "F" and (shares := np.asarray(image)).max() <= 1:
        return _grey(255 * shares)
    if image.mode == "La":  # grey, multiplied by its opacity
        image = image.convert("LA")
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")
    return image.convert("RGB")


def _grey(levels: NDArray[Any]) -> Image.Image:
    return Image.fromarray(levels.round().clip(0, 255).astype(np.uint8)).convert("RGB")


def open_photo(path: str | Path) -> Image.Image:
    """Read one image file completely, as RGB and upright: turned as its EXIF data say.

    Args:
        path: an image file of any format and mode that PIL knows.

    Returns:
        The decoded image in mode RGB.

    Raises:
        PhotoError: the file is missing, empty, truncated, not an image, or so large that it looks
            like a decompression bomb (see :func:`strict_decoding`).
    """
    try:
        with strict_decoding(), Image.open(path) as image:
            image.load()
            turn = _TURNS.get(image.getexif().get(ExifTags.Base.Orientation))
            upright = to_rgb(image if turn is None else image.transpose(turn))
            upright.info.pop("exif", None)  # so that nobody turns it again
            return upright
    except FileNotFoundError as error:
        raise PhotoError(f"{path}: no such image file") from error
    except Exception as error:  # whatever a broken file makes a decoder raise
        raise PhotoError(f"{path}: {describe(error)}") from error


@contextmanager
def strict_decoding() -> Iterator[None]:
    """Let PIL fail on truncated files, whatever other code has set, and on decompression bombs.

    The latter are images of more pixels than ``LAVIS_XFORMER_MAX_PIXELS`` or, if that is not set, than PIL allows:
    twice ``PIL.Image.MAX_IMAGE_PIXELS``.

    Raises:
        UserError: ``LAVIS_XFORMER_MAX_PIXELS`` is not a whole number.
    """
    before = ImageFile.LOAD_TRUNCATED_IMAGES, Image.MAX_IMAGE_PIXELS
    ImageFile.LOAD_TRUNCATED_IMAGES = False
    if most := os.environ.get(PIXELS_VARIABLE):
        if not most.isdecimal():
            raise UserError(f"{PIXELS_VARIABLE} is {most!r}; it must be a whole number, such as 400000000")
        Image.MAX_IMAGE_PIXELS = int(most) // 2
    try:
        yield
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES, Image.MAX_IMAGE_PIXELS = before


def describe(error: BaseException) -> str:
    """Say in one short line why a sample could not be read."""
    if isinstance(error, KeyError):
        return f"no key {error}"
    if isinstance(error, Image.UnidentifiedImageError):
        return "not an image that PIL can read, or an empty file"
    if isinstance(error, Image.DecompressionBombError):
        return f"{error} If it is not, set the environment variable {PIXELS_VARIABLE} to a higher value"
    return first_line(error)
