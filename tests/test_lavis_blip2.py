"""LAVIS's own BLIP-2 classes as a side of a comparison: built from local parts, equal to ``fusion: none``."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lavis.common.registry import registry
from lavis.models import load_model
from lavis.models.blip2_models.blip2_qformer import Blip2Qformer
from omegaconf import OmegaConf

import lavis_xformer
from lavis_xformer.errors import UserError
from lavis_xformer.images import clip_to_mae
from lavis_xformer.models import towers


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Both models take the likeliest negative; the process group that LAVIS needs ends with the test."""
    lavis_xformer.register()
    monkeypatch.setattr(torch, "multinomial", lambda weights, count, generator=None: weights.argmax(-1, keepdim=True))
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@pytest.fixture
def images() -> torch.Tensor:
    """Two images as our processors pack them, (2, 6, 64, 64)."""
    clip = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    return torch.cat([clip, clip_to_mae(clip)], dim=1)


def variant_cell(name: str, stage: str) -> Any:
    from lavis_xformer.compare.plan import read_plan

    return next(c for c in read_plan("projects/xformer/compare/lavis.yaml").cells([name]) if c.stage.name == stage)


def build(cell: Any) -> Any:
    """The model of a cell, as its run would build it."""
    from lavis.common.registry import registry

    from lavis_xformer.config.load import load_config

    options = [f"{key}={value}" for key, value in cell.options.items() if key.startswith("model.")]
    cfg = load_config(cell.stage.config, [o for o in options if "pretrained" not in o]).model_cfg
    return registry.get_model_class(cfg.arch).from_config(cfg)


def test_laviss_class_has_no_fusion() -> None:
    from lavis.common.registry import registry

    cls = registry.get_model_class("lavis_blip2")
    cfg = OmegaConf.load(cls.default_config_path("mini")).model
    with pytest.raises(UserError, match=r"model\.fusion is dual, but LAVIS's own BLIP-2 has none"):
        cls.from_config(OmegaConf.merge(cfg, {"fusion": "dual"}))


@pytest.mark.parametrize("name", ["lavis_blip2", "blip2"])
def test_the_settings_of_a_cell_can_be_read(name: str) -> None:
    from lavis_xformer.config.load import load_config
    from lavis_xformer.engine.options import RunOptions

    for stage in ("stage1", "stage2"):
        cell = variant_cell(name, stage)
        options = [f"{key}={value}" for key, value in cell.options.items() if key.startswith("model.f")]
        options += [f"model.arch={cell.options['model.arch']}"] if "model.arch" in cell.options else []
        assert RunOptions.from_config(load_config(cell.stage.config, options).run_cfg).next_command


def test_a_cell_of_lavis_class_gives_our_losses_with_equal_weights(images: torch.Tensor) -> None:
    theirs, ours = (build(variant_cell(name, "stage1")).eval() for name in ("lavis_blip2", "blip2"))
    assert isinstance(theirs, Blip2Qformer)
    ours.load_state_dict(theirs.state_dict())
    batch = {"image": images, "text_input": ["a red circle", "two blue squares on the left"]}
    expected, found = theirs(batch), ours(batch)
    for name in ("loss", "loss_itc", "loss_itm", "loss_itg"):
        assert found[name].item() == pytest.approx(expected[name].item(), abs=1e-5), name
    features = [model.extract_features(batch, "image").image_embeds_proj for model in (ours, theirs)]
    assert torch.allclose(*features, atol=1e-5)


@pytest.mark.parametrize("arch", ["lavis_blip2", "lavis_blip2_opt"])
def test_images_of_our_processors_give_what_clips_view_alone_gives(arch: str, images: torch.Tensor) -> None:
    model, *_ = lavis_xformer.load_model_and_preprocess(arch, "mini", is_eval=True)
    clip, given = images[:, :3], {"image": images}
    with torch.no_grad():
        assert torch.equal(model.visual_encoder(images), model.visual_encoder(clip))
        assert len(model.generate(given)) == 2
        assert model.generate(given, False, 2, 12) == model.generate({"image": clip}, False, 2, 12), "as LAVIS takes it"
        if arch == "lavis_blip2":
            for packed, plain in zip(model.forward_image(images), model.forward_image(clip), strict=True):
                assert torch.equal(packed, plain)
            features = [model.extract_features({"image": image}, "image").image_embeds for image in (images, clip)]
            assert torch.equal(*features)
    with pytest.raises(UserError, match="wants at least one image of 64 x 64"):
        model.generate({"image": images[..., :32, :32]})


@pytest.mark.parametrize("arch", ["lavis_blip2", "lavis_blip2_opt"])
def test_cross_attention_is_as_frequent_as_configured(arch: str) -> None:
    from lavis.common.registry import registry

    cls = registry.get_model_class(arch)
    cfg = OmegaConf.load(cls.default_config_path("mini")).model
    layers = cls.from_config(OmegaConf.merge(cfg, {"cross_attention_freq": 1})).Qformer.bert.encoder.layer
    assert all(layer.has_cross_attention for layer in layers)


def test_the_parts_are_built_as_configured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"patch_size": 8, "embed_dim": 20, "depth": 2, "num_heads": 2, "mlp_ratio": 2, "qkv_bias": True}
    monkeypatch.setattr(towers, "EVA_CLIP_G", sizes)
    state = towers.eva_vit(img_size=64, **sizes).state_dict()
    torch.save(state, tmp_path / "eva.pth")
    cls = registry.get_model_class("lavis_blip2")
    cfg = OmegaConf.load(cls.default_config_path("mini")).model
    encoder = {"vit_model": "eva_clip_g", "vit_weights": str(tmp_path / "eva.pth"), "drop_path_rate": 0.1}
    model = cls.from_config(cfg | encoder | {"pretrained": None})
    assert torch.equal(model.visual_encoder.cls_token, state["cls_token"])
    assert model.visual_encoder.blocks[-1].drop_path.drop_prob == pytest.approx(0.1)
    assert model.query_tokens.std().item() == pytest.approx(model.Qformer.config.initializer_range, rel=0.1)


def test_lavis_class_has_only_its_own_types() -> None:
    from lavis.common.registry import registry

    with pytest.raises(UserError, match=r"LavisBlip2 has no 'my/export'; there is: mini"):
        registry.get_model_class("lavis_blip2").default_config_path("my/export")


def test_stage2_of_lavis_class_reads_its_stage1_and_says_what_ours_says(images: torch.Tensor, tmp_path: Path) -> None:
    from lavis.common.registry import registry

    def make(arch: str, **changes: Any) -> Any:
        cls = registry.get_model_class(arch)
        cfg = OmegaConf.load(cls.default_config_path("mini")).model
        return cls.from_config(OmegaConf.merge(cfg, changes)).eval()

    def save(model: Any, name: str) -> str:
        state = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
        torch.save({"model": state}, tmp_path / name)
        return str(tmp_path / name)

    stage1 = save(make("lavis_blip2"), "stage1.pth")
    theirs = make("lavis_blip2_opt", pretrained=stage1).float()
    ours = make("xformer_opt", fusion="none", pretrained=save(theirs, "stage2.pth"))
    batch = {"image": images, "text_input": ["a red circle", "two blue squares"]}
    assert ours(batch)["loss_lm"].item() == pytest.approx(theirs(batch)["loss_lm"].item(), abs=1e-4)
    assert ours.generate(batch, num_beams=1, max_length=5) == theirs.generate(batch, num_beams=1, max_length=5)
    with pytest.raises(UserError, match="missing: Qformer"):
        theirs.load_checkpoint(save(make("lavis_blip2_opt").requires_grad_(False), "empty.pth"))
    with pytest.raises(UserError, match="captions only"):
        theirs({**batch, "answer": ["two", "one"]})


@pytest.mark.parametrize("arch", ["lavis_blip2", "lavis_blip2_opt"])
def test_a_whole_model_is_saved_and_read(arch: str) -> None:
    model, file = load_model(arch, "mini"), io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    again = torch.load(file, weights_only=False)
    assert type(again) is type(model) is registry.get_model_class(arch)
    assert torch.equal(again.query_tokens, model.query_tokens)
