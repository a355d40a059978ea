"""Both views of one crop: equal to LAVIS's for CLIP, to torchvision's own chain for MAE."""

from __future__ import annotations

import pickle
from collections.abc import Callable

import numpy as np
import pytest
import torch
from lavis.common.registry import registry
from lavis.processors.blip_processors import Blip2ImageTrainProcessor, BlipImageEvalProcessor
from omegaconf import OmegaConf
from PIL import Image
from torch.utils.data import default_collate
from torchvision import transforms
from torchvision.transforms.functional import InterpolationMode

from lavis_xformer.data.processors import XFormerImageEvalProcessor, XFormerImageTrainProcessor
from lavis_xformer.errors import UserError
from lavis_xformer.images import IMAGENET_MEAN, IMAGENET_STD, clip_to_mae, unpack


@pytest.fixture
def photo() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8))


def views(packed: torch.Tensor, clip_size: int, mae_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    clip, mae = unpack(packed[None], clip_size=clip_size, mae_size=mae_size)
    return clip[0], mae[0]


def seeded(function: Callable[[Image.Image], torch.Tensor], photo: Image.Image, seed: int) -> torch.Tensor:
    torch.manual_seed(seed)
    return function(photo)


def mae_chain(*geometry: Callable[[Image.Image], Image.Image]) -> transforms.Compose:
    normalize = transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD)
    return transforms.Compose([*geometry, transforms.ToTensor(), normalize])


@pytest.mark.parametrize("sizes", [(32, 32), (32, 24), (24, 40)])
def test_eval_equals_lavis_and_torchvision_bit_for_bit(photo: Image.Image, sizes: tuple[int, int]) -> None:
    clip_size, mae_size = sizes
    processor = XFormerImageEvalProcessor(image_size=clip_size, mae_image_size=mae_size)
    clip, mae = views(processor(photo), clip_size, mae_size)
    resize = transforms.Resize((mae_size, mae_size), interpolation=InterpolationMode.BICUBIC)
    assert torch.equal(clip, BlipImageEvalProcessor(image_size=clip_size)(photo))
    assert torch.equal(mae, mae_chain(resize)(photo))


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("sizes", [(32, 32), (32, 24)])
def test_train_equals_lavis_and_torchvision_bit_for_bit(photo: Image.Image, sizes: tuple[int, int], seed: int) -> None:
    clip_size, mae_size = sizes
    processor = XFormerImageTrainProcessor(image_size=clip_size, mae_image_size=mae_size, min_scale=0.3)
    clip, mae = views(seeded(processor, photo, seed), clip_size, mae_size)
    crop = transforms.RandomResizedCrop(mae_size, (0.3, 1.0), interpolation=InterpolationMode.BICUBIC)
    lavis = Blip2ImageTrainProcessor(image_size=clip_size, min_scale=0.3)
    assert torch.equal(clip, seeded(lavis, photo, seed))
    assert torch.equal(mae, seeded(mae_chain(crop, transforms.RandomHorizontalFlip()), photo, seed))


def test_both_views_show_the_same_crop_and_flip(photo: Image.Image) -> None:
    processor = XFormerImageTrainProcessor(image_size=16, min_scale=0.1)
    for seed in range(10):
        clip, mae = views(seeded(processor, photo, seed), 16, 16)
        torch.testing.assert_close(clip_to_mae(clip), mae, atol=1e-5, rtol=0)


def test_hflip_is_true_or_false() -> None:
    with pytest.raises(UserError, match="image processor: hflip is 'False'; it must be True or False"):
        XFormerImageTrainProcessor(hflip="False")  # type: ignore[arg-type]


def test_hflip_false_never_mirrors(photo: Image.Image) -> None:
    settings = {"image_size": 16, "min_scale": 1.0, "max_scale": 1.0}
    upright = [seeded(XFormerImageTrainProcessor(hflip=False, **settings), photo, s) for s in range(8)]
    either = [seeded(XFormerImageTrainProcessor(**settings), photo, s) for s in range(8)]
    same = [torch.equal(a, b) for a, b in zip(upright, either, strict=True)]
    mirrored = [torch.equal(a.flip(-1), b) for a, b in zip(upright, either, strict=True)]
    assert any(mirrored)
    assert all(s != m for s, m in zip(same, mirrored, strict=True))


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK", "I;16"])
def test_other_modes_stack_with_rgb(photo: Image.Image, mode: str) -> None:
    deep = Image.fromarray(np.asarray(photo.convert("L")).astype(np.uint16) * 257)
    other = deep if mode == "I;16" else photo.convert(mode)
    for processor in (
        XFormerImageTrainProcessor(image_size=16),
        XFormerImageEvalProcessor(image_size=16),
    ):
        images = [processor(photo), processor(other)]
        assert default_collate(images).shape == torch.stack(images).shape == (2, 6, 16, 16)


@pytest.mark.parametrize("name", ["xformer_image_train", "xformer_image_eval"])
def test_registry_builds_from_nothing_and_from_yaml(photo: Image.Image, name: str) -> None:
    cls = registry.get_processor_class(name)
    config = OmegaConf.create({"name": name, "image_size": 16, "mae_image_size": None, "mean": [0.5, 0.5, 0.5]})
    assert cls.from_config(None)(photo).shape == (6, 224, 224)
    assert cls.from_config(config)(photo).shape == (6, 16, 16)


@pytest.mark.parametrize("cls", [XFormerImageTrainProcessor, XFormerImageEvalProcessor])
def test_spawned_loader_workers_can_be_given_them(photo: Image.Image, cls: type[XFormerImageEvalProcessor]) -> None:
    processor = cls(image_size=16)
    assert torch.equal(seeded(pickle.loads(pickle.dumps(processor)), photo, 0), seeded(processor, photo, 0))


def test_each_view_is_normalised_as_the_yaml_says(photo: Image.Image) -> None:
    norms = {"mean": [0.1, 0.2, 0.3], "std": [1.0, 2.0, 4.0], "mae_mean": [0.4, 0.5, 0.6], "mae_std": [0.5, 0.5, 0.5]}
    clip, mae = views(XFormerImageEvalProcessor.from_config({"image_size": 16, **norms})(photo), 16, 16)
    pixels = transforms.ToTensor()(photo.resize((16, 16), Image.Resampling.BICUBIC))
    for view, mean, std in ((clip, "mean", "std"), (mae, "mae_mean", "mae_std")):
        torch.testing.assert_close(view, transforms.Normalize(norms[mean], norms[std])(pixels))


def test_mistakes_are_named(photo: Image.Image) -> None:
    with pytest.raises(UserError, match="did you mean 'min_scale'"):
        XFormerImageTrainProcessor.from_config({"min_scael": 0.5})
    with pytest.raises(UserError, match=r"0 < min_scale <= max_scale"):
        XFormerImageTrainProcessor(min_scale=0.9, max_scale=0.5)
    with pytest.raises(UserError, match="image_size is -3"):
        XFormerImageEvalProcessor(image_size=-3)
    with pytest.raises(UserError, match="empty"):
        XFormerImageEvalProcessor()(Image.new("RGB", (4, 0)))
    with pytest.raises(UserError, match="takes a PIL image"):
        XFormerImageEvalProcessor()("photo.jpg")  # type: ignore[arg-type]


def test_null_means_the_default(photo: Image.Image) -> None:
    given = dict.fromkeys(("image_size", "mae_image_size", "mean", "std", "mae_mean", "mae_std"))
    for cls in (XFormerImageEvalProcessor, XFormerImageTrainProcessor):
        assert torch.equal(seeded(cls.from_config(given), photo, 1), seeded(cls.from_config(None), photo, 1))


def test_a_crop_is_no_larger_than_its_image() -> None:
    with pytest.raises(UserError, match=r"max_scale 1\.5 must satisfy"):
        XFormerImageTrainProcessor(max_scale=1.5)
