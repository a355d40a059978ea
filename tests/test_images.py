"""One image for two encoders: exact normalisation, packing that loses nothing, errors that name the size."""

from __future__ import annotations

import pytest
import torch
from lavis.processors.blip_processors import BlipImageBaseProcessor
from torchvision.transforms.functional import InterpolationMode, normalize
from torchvision.transforms.functional import resize as torchvisions_resize
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from lavis_xformer.errors import UserError
from lavis_xformer.images import CLIP_MEAN, CLIP_STD, IMAGENET_MEAN, IMAGENET_STD, clip_to_mae, pack, resize, unpack


def test_each_encoder_has_the_pixels_it_was_trained_on() -> None:
    lavis = BlipImageBaseProcessor().normalize
    assert (lavis.mean, lavis.std) == (CLIP_MEAN, CLIP_STD)
    assert (list(IMAGENET_MEAN), list(IMAGENET_STD)) == (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)


def test_renormalising_equals_normalising_the_pixels() -> None:
    pixels = torch.rand(2, 3, 8, 8)
    ours = clip_to_mae(normalize(pixels, CLIP_MEAN, CLIP_STD))
    assert torch.allclose(ours, normalize(pixels, IMAGENET_MEAN, IMAGENET_STD), atol=1e-6)


@pytest.mark.parametrize(("clip_size", "mae_size"), [(8, 8), (12, 8), (8, 12)])
def test_packing_can_be_undone(clip_size: int, mae_size: int) -> None:
    clip, mae = torch.rand(3, clip_size, clip_size), torch.rand(3, mae_size, mae_size)
    batch = torch.stack([pack(clip, mae)] * 2)
    views = unpack(batch, clip_size=clip_size, mae_size=mae_size)
    assert torch.equal(views[0][1], clip)
    assert torch.equal(views[1][1], mae)


@pytest.mark.parametrize(
    ("clip_size", "mae_size", "packed"), [(12, 8, (12, 12)), (8, 12, (12, 12)), (12, 8, (12, 10)), (8, 12, (9, 12))]
)
def test_larger_views_than_the_models_are_refused(clip_size: int, mae_size: int, packed: tuple[int, int]) -> None:
    batch = torch.stack([pack(*(torch.rand(3, side, side) for side in packed))] * 2)
    with pytest.raises(UserError, match=rf"image_size .* to {clip_size} pixels .* mae_image_size to {mae_size}"):
        unpack(batch, clip_size=clip_size, mae_size=mae_size)


def test_three_channels_serve_a_mae_of_another_size() -> None:
    clip, mae = unpack(torch.rand(2, 3, 16, 16), clip_size=16, mae_size=8)
    assert (clip.shape, mae.shape) == ((2, 3, 16, 16), (2, 3, 8, 8))


def test_resize_keeps_a_constant_image_and_one_that_fits() -> None:
    image = torch.full((1, 3, 9, 9), 0.3)
    assert torch.allclose(resize(image, 6), torch.full((1, 3, 6, 6), 0.3), atol=1e-6)
    assert resize(image, 9) is image


def test_resize_is_torchvisions_as_in_the_processors() -> None:
    image = torch.rand(2, 3, 16, 16)
    expected = torchvisions_resize(image, [6, 6], InterpolationMode.BICUBIC, antialias=True)
    assert torch.allclose(resize(image, 6), expected, atol=1e-6)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((2, 1, 8, 8), r"\(2, 1, 8, 8\); expected \(B, 3, 8, 8\)"),
        ((3, 8, 8), "expected"),
        ((2, 3, 9, 9), "8 x 8"),
        ((2, 6, 9, 9), "8 x 8"),
        ((0, 3, 8, 8), "at least one image"),
    ],
)
def test_wrong_shapes_are_named(shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(UserError, match=message):
        unpack(torch.zeros(shape), clip_size=8, mae_size=8)
