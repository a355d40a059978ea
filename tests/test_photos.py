"""Every mode and every kind of broken file: what a person would see, or one clear error."""

from __future__ import annotations

import io
import re
from pathlib import Path

import numpy as np
import pytest
from packaging.requirements import Requirement
from PIL import Image, ImageFile

from lavis_xformer.data.photos import PhotoError, open_photo, to_rgb


@pytest.fixture
def jpeg(tmp_path: Path) -> Path:
    path = tmp_path / "photo.jpg"
    noise = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    return path


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "I", "F"])
def test_every_mode_becomes_rgb(mode: str) -> None:
    rgb = to_rgb(Image.new("RGB", (5, 7), "red").convert("L" if mode == "PA" else "RGB").convert(mode))
    assert rgb.mode == "RGB"
    assert rgb.size == (5, 7)


def test_sixteen_bit_grey_is_scaled_not_clipped(tmp_path: Path) -> None:
    path = tmp_path / "deep.png"
    Image.fromarray(np.array([[0, 257 * 100, 65535]], dtype=np.uint16)).save(path)
    assert np.asarray(open_photo(path))[0, :, 0].tolist() == [0, 100, 255]


def test_transparent_pixels_are_white_and_hide_their_colour() -> None:
    assert to_rgb(Image.new("RGBA", (1, 1), (255, 0, 0, 0))).getpixel((0, 0)) == (255, 255, 255)
    assert to_rgb(Image.new("RGBA", (1, 1), (255, 0, 0, 255))).getpixel((0, 0)) == (255, 0, 0)


def test_palette_transparency_is_white() -> None:
    image = Image.new("RGB", (2, 1), "red").quantize(2)
    buffer = io.BytesIO()
    image.save(buffer, "png", transparency=image.getpixel((0, 0)))
    assert to_rgb(Image.open(buffer)).getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize("value", [None, "photo.jpg", np.zeros((4, 4, 3), dtype=np.uint8)])
def test_what_is_no_image_is_refused(value: object) -> None:
    with pytest.raises(PhotoError, match="takes a PIL image"):
        to_rgb(value)  # type: ignore[arg-type]


def test_an_image_without_pixels_is_refused() -> None:
    with pytest.raises(PhotoError, match="empty: 0 x 5"):
        to_rgb(Image.new("RGB", (0, 5)))


def test_a_good_file_is_read_exactly(jpeg: Path) -> None:
    assert np.array_equal(np.asarray(open_photo(jpeg)), np.asarray(Image.open(jpeg).convert("RGB")))


@pytest.mark.parametrize("keep", [0, 10, 0.5])
def test_a_cut_file_is_named_even_when_pil_was_told_to_be_lenient(
    jpeg: Path, keep: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)  # as LAVIS's import does
    data = jpeg.read_bytes()
    jpeg.write_bytes(data[: int(keep * len(data)) if keep < 1 else int(keep)])
    with pytest.raises(PhotoError, match=r"photo\.jpg: "):
        open_photo(jpeg)
    assert ImageFile.LOAD_TRUNCATED_IMAGES is True


def test_missing_file_and_folder_are_named(tmp_path: Path) -> None:
    with pytest.raises(PhotoError, match="no such image file"):
        open_photo(tmp_path / "nowhere.jpg")
    with pytest.raises(PhotoError, match=tmp_path.name):
        open_photo(tmp_path)


@pytest.mark.parametrize("limit", [2000, 1000])
def test_a_decompression_bomb_is_refused(jpeg: Path, limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)  # the photo has 3072: PIL warns, then fails
    with pytest.raises(PhotoError, match="decompression bomb"):
        open_photo(jpeg)


def test_the_pillows_that_are_allowed_know_transparency() -> None:
    setup = (Path(__file__).parents[1] / "setup.py").read_text()
    (bound,) = [Requirement(line) for line in re.findall(r'"(pillow[^"]*)"', setup)]
    assert "10.1" in bound.specifier
    assert "10.0.1" not in bound.specifier, "Image.has_transparency_data is of 10.1"


def test_photos_are_turned_as_they_were_held(tmp_path: Path) -> None:
    picture = Image.new("RGB", (4, 2), "black")
    picture.putpixel((0, 0), (255, 0, 0))
    exif = Image.Exif()
    exif[0x0112] = 6  # held upright: to be turned a quarter clockwise
    picture.save(tmp_path / "a.png", exif=exif)
    turned = open_photo(tmp_path / "a.png")
    assert (turned.size, turned.getpixel((1, 0))) == ((2, 4), (255, 0, 0))
