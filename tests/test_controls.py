"""The controls beside a comparison: C in place of M, an untrained MAE, a deeper Q-Former, no image."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import lavis_xformer
from lavis_xformer.errors import UserError
from lavis_xformer.images import clip_to_mae


def trained(model: Any) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


@pytest.fixture
def configured() -> Any:
    """Build stage 1 of a configuration: ``configured(toy.model, key=value)``."""
    from lavis_xformer.models.stage1 import XFormer

    def build(cfg: Any, **changes: Any) -> Any:
        return XFormer.from_config(cfg.copy() | changes)

    return build


@pytest.fixture
def toy(stage2_config: Any) -> Any:
    cfg = stage2_config.model.copy()
    del cfg["opt_model"]
    return cfg


def test_c_in_place_of_m(configured: Any, toy: Any, batch: dict[str, Any]) -> None:
    model = configured(toy, mae_source="clip")
    assert model.mae is None
    tokens = model.encode_image(batch["image"])
    assert torch.equal(tokens.mae_tokens, tokens.clip)
    assert not tokens.mae_tokens.requires_grad
    assert tokens.pixels is None
    terms = model(batch)
    assert "loss_rec" not in terms
    terms["loss"].backward()
    silent = [n for n, p in model.fusion.named_parameters() if p.grad is None]
    assert silent == []


def test_c_in_place_of_m_passes_through_lavis_retrieval(configured: Any, toy: Any, batch: dict[str, Any]) -> None:
    model = configured(toy, mae_source="clip").eval()
    text = model.tokenize(batch["text_input"])
    with torch.no_grad():
        _, joined = model.forward_image(batch["image"])
        tokens = model.encode_image(batch["image"])
        scores = model.compute_itm(joined, text.input_ids, text.attention_mask)
        expected = model.match(tokens.clip, tokens.mae_tokens, text.input_ids, text.attention_mask)[:, 1]
    assert torch.allclose(scores, expected, atol=1e-6)


def test_an_untrained_mae_is_the_same_one_every_time(configured: Any, toy: Any, batch: dict[str, Any]) -> None:
    pixels = clip_to_mae(batch["image"])
    torch.manual_seed(1)
    first = configured(toy, mae_source="random")
    torch.manual_seed(2)
    second = configured(toy, mae_source="random")
    m = first.mae.encode(pixels).tokens
    assert torch.equal(m, second.mae.encode(pixels).tokens)
    assert not torch.allclose(m, configured(toy).mae.encode(pixels).tokens)
    assert not any(p.requires_grad for p in first.mae.parameters())


def test_a_deeper_qformer_is_a_larger_blip2(configured: Any, toy: Any, batch: dict[str, Any]) -> None:
    plain, deep = configured(toy, fusion="none"), configured(toy, fusion="none", qformer_layers=6)
    assert trained(deep) > trained(plain)
    assert len(deep.Qformer.bert.encoder.layer) == 6
    assert torch.isfinite(deep(batch)["loss"])


def test_the_wide_blip2_of_the_mini_world_has_x_formers_size() -> None:
    lavis_xformer.register()
    from lavis.common.registry import registry
    from omegaconf import OmegaConf

    for arch in ("xformer", "xformer_opt"):
        cls = registry.get_model_class(arch)
        cfg = OmegaConf.load(cls.default_config_path("mini")).model
        wide = cls.from_config(cfg.copy() | {"fusion": "none", "qformer_layers": 6})
        assert trained(wide) == pytest.approx(trained(cls.from_config(cfg)), rel=0.1)


def test_mistakes_are_named(configured: Any, toy: Any) -> None:
    with pytest.raises(UserError, match=r"model\.mae_source: 'clipp' .*did you mean 'clip'"):
        configured(toy, mae_source="clipp")
    with pytest.raises(UserError, match="'clip' with fusion 'concat'"):
        configured(toy, mae_source="clip", fusion="concat")


def test_a_language_model_answers_without_an_image(make_stage2: Any, batch: dict[str, Any]) -> None:
    model = make_stage2("opt").eval()
    questions = ["how many circles?", "where is it?"]
    alone = model.predict_answers({"text_input": questions}, num_beams=2, max_len=3)
    assert len(alone) == 2
    model.projection.weight.data.normal_()
    assert model.predict_answers({"text_input": questions}, num_beams=2, max_len=3) == alone
