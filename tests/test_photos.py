"""Every mode and every kind of broken file: what a person would see, or one clear error."""

from __future__ import annotations

import io
import re
import struct
import warnings
from pathlib import Path

import numpy as np
import pytest
from packaging.requirements import Requirement
from PIL import Image, ImageFile, ImageOps

from lavis_xformer.data.photos import PhotoError, open_photo, strict_decoding, to_rgb


@pytest.fixture
def jpeg(tmp_path: Path) -> Path:
    path = tmp_path / "photo.jpg"
    noise = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    return path


@pytest.mark.parametrize(
    "mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "I", "F", "La", "RGBa"]
)
def test_every_mode_becomes_rgb(mode: str) -> None:
    by = {"PA": "L", "La": "LA", "RGBa": "RGBA"}.get(mode, "RGB")
    rgb = to_rgb(Image.new("RGB", (5, 7), "red").convert(by).convert(mode))
    assert rgb.mode == "RGB"
    assert rgb.size == (5, 7)


def test_sixteen_bit_grey_is_scaled_not_clipped(tmp_path: Path) -> None:
    path = tmp_path / "deep.png"
    Image.fromarray(np.array([[0, 257 * 200, 65535]], dtype=np.uint16)).save(path)
    assert np.asarray(open_photo(path))[0, :, 0].tolist() == [0, 200, 255]


def test_transparent_pixels_are_white_and_hide_their_colour() -> None:
    assert to_rgb(Image.new("RGBA", (1, 1), (255, 0, 0, 0))).getpixel((0, 0)) == (255, 255, 255)
    assert to_rgb(Image.new("RGBA", (1, 1), (255, 0, 0, 255))).getpixel((0, 0)) == (255, 0, 0)


def test_a_transparent_colour_of_an_rgb_image_is_white() -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (1, 1), "red").save(buffer, "png", transparency=(255, 0, 0))
    once = to_rgb(Image.open(buffer))
    assert once.getpixel((0, 0)) == (255, 255, 255)
    assert to_rgb(once) is once


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


def test_a_decompression_bomb_is_refused_unless_it_is_allowed(jpeg: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1500)  # PIL refuses twice as many; the photo has 3072
    with pytest.raises(PhotoError, match=r"photo\.jpg: .*3072 pixels.*set the environment variable LAVIS_XFORMER_MAX_"):
        open_photo(jpeg)
    monkeypatch.setenv("LAVIS_XFORMER_MAX_PIXELS", "6144")
    assert open_photo(jpeg).size == (64, 48)
    assert Image.MAX_IMAGE_PIXELS == 1500
    monkeypatch.setenv("LAVIS_XFORMER_MAX_PIXELS", "3000")
    with pytest.raises(PhotoError, match="exceeds limit of 3000 pixels"):
        open_photo(jpeg)
    monkeypatch.setenv("LAVIS_XFORMER_MAX_PIXELS", "4e8")
    with pytest.raises(PhotoError, match="'4e8'; it must be a whole number"):
        open_photo(jpeg)


def test_what_pil_warns_of_is_said_once_and_not_for_every_photo() -> None:
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("default")
        for _ in range(3):
            with strict_decoding():
                warnings.warn("Tag data larger than file", UserWarning, stacklevel=1)
    assert len(said) == 1


def test_the_pillows_that_are_allowed_know_transparency() -> None:
    setup = (Path(__file__).parents[1] / "setup.py").read_text()
    (bound,) = [Requirement(line) for line in re.findall(r'"(pillow[^"]*)"', setup)]
    assert "10.1" in bound.specifier
    assert "10.0.1" not in bound.specifier, "Image.has_transparency_data is of 10.1"


@pytest.mark.parametrize("orientation", range(10))
def test_photos_are_turned_as_they_were_held(tmp_path: Path, orientation: int) -> None:
    picture = Image.fromarray(np.arange(24, dtype=np.uint8).reshape(2, 4, 3) * 10)
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture.save(tmp_path / "a.png", exif=exif)
    expected = ImageOps.exif_transpose(Image.open(tmp_path / "a.png"))
    upright = open_photo(tmp_path / "a.png")
    assert np.array_equal(np.asarray(upright), np.asarray(expected))
    assert np.array_equal(np.asarray(ImageOps.exif_transpose(upright)), np.asarray(expected)), "turned once"
    assert (expected.size == (2, 4)) == (5 <= orientation <= 8)


def test_exif_data_that_cannot_be_written_again_harm_nothing(tmp_path: Path) -> None:
    a_float_for_a_width = b"\1\0\0\x0b\0\0\0\1\0\0\0\5"
    turned = b"\1\x12\0\3\0\0\0\1\0\6\0\0"
    exif = b"Exif\0\0MM\0*\0\0\0\x08\0\2" + a_float_for_a_width + turned + bytes(4)
    Image.new("RGB", (4, 2)).save(tmp_path / "a.jpg", exif=exif)
    with pytest.raises(struct.error):
        ImageOps.exif_transpose(Image.open(tmp_path / "a.jpg"))
    assert open_photo(tmp_path / "a.jpg").size == (2, 4)


def test_fractions_are_scaled(tmp_path: Path) -> None:
    for name, values in (("fractions", [-0.1, 0, 0.4, 1]), ("levels", [-9, 0, 102, 255])):
        Image.fromarray(np.array([values], dtype=np.float32)).save(tmp_path / f"{name}.tif")
        assert np.asarray(open_photo(tmp_path / f"{name}.tif"))[0, :, 0].tolist() == [0, 0, 102, 255]


def test_32_bit_grey_is_of_16_bits_only_beyond_255() -> None:
    for levels, expected in (([0, 100, 255], [0, 100, 255]), ([0, 25700, 65535], [0, 100, 255])):
        image = Image.fromarray(np.array([levels], dtype=np.int32))
        assert image.mode == "I"
        assert np.asarray(to_rgb(image))[0, :, 0].tolist() == expected
