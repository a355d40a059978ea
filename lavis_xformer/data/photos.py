"""Open a photo whatever its format, and say plainly which one can't be opened.

PIL alone clips 16-bit pixels, shows what an alpha channel hides, and, once LAVIS has been imported,
fills the missing half of a truncated file with grey. Here each becomes what a person would see, or
an error.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image, ImageFile, ImageOps

from lavis_xformer.errors import UserError

_DEEP_GREY = ("I", "I;16", "I;16L", "I;16B", "I;16N")


class PhotoError(UserError):
    """One image file is missing, unreadable or not an image; the message names it."""


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert any PIL mode to 8-bit RGB without losing what the picture shows.

    16-bit grey is scaled (PIL would clip it at 255), transparency is laid over white (PIL would
    uncover the hidden colours); every other mode, such as L, P, CMYK or YCbCr, goes through PIL's
    own conversion.

    Args:
        image: an image of any mode, W x H pixels.

    Returns:
        The same W x H pixels in mode RGB; an RGB image is returned as it is.

    Raises:
        PhotoError: not a PIL image, or one without pixels.
    """
    if not isinstance(image, Image.Image):
        raise PhotoError(f"an image processor got {type(image).__name__}; it takes a PIL image")
    if 0 in image.size:
        raise PhotoError(f"the image is empty: {image.width} x {image.height} pixels")
    if image.mode == "RGB":
        return image
    if image.mode in _DEEP_GREY:
        grey = np.asarray(image).astype(np.float64) / 257  # 65535 -> 255
        return Image.fromarray(grey.round().clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")
    return image.convert("RGB")


def open_photo(path: str | Path) -> Image.Image:
    """Read one image file completely, as RGB and as it was held: turned as its EXIF data say.

    Args:
        path: an image file of any format and mode that PIL knows.

    Returns:
        The decoded image in mode RGB.

    Raises:
        PhotoError: the file is missing, empty, truncated, not an image, or so large that it looks
            like a decompression bomb (more than ``PIL.Image.MAX_IMAGE_PIXELS`` pixels).
    """
    try:
        with strict_decoding(), Image.open(path) as image:
            image.load()
            return to_rgb(ImageOps.exif_transpose(image))
    except FileNotFoundError as error:
        raise PhotoError(f"{path}: no such image file") from error
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        raise PhotoError(f"{path}: {describe(error)}") from error
    except Image.DecompressionBombWarning as error:
        raise PhotoError(f"{path}: {describe(error)}") from error


@contextmanager
def strict_decoding() -> Iterator[None]:
    """Let PIL fail on truncated files and on decompression bombs, whatever other code has set."""
    lenient = ImageFile.LOAD_TRUNCATED_IMAGES
    ImageFile.LOAD_TRUNCATED_IMAGES = False
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            yield
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = lenient


def describe(error: BaseException) -> str:
    """Say in one short line why a sample could not be read."""
    if isinstance(error, KeyError):
        return f"no key {error}"
    if isinstance(error, Image.UnidentifiedImageError):
        return "not an image, or an empty file"
    if isinstance(error, Image.DecompressionBombError | Image.DecompressionBombWarning):
        return f"more than {Image.MAX_IMAGE_PIXELS} pixels: looks like a decompression bomb"
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
