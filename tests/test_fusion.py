"""The fusion seam: shapes, identity start, permutation, gradients."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from lavis_xformer.errors import UserError
from lavis_xformer.models.fusion import (
    FUSIONS,
    Attention,
    CrossAttentionBlock,
    DualCrossAttention,
    EarlyCrossAttention,
    build_fusion,
)
from lavis_xformer.models.parts import check_values
from lavis_xformer.models.stage1 import XFormer

SIZES = {"query_width": 32, "clip_width": 20, "mae_width": 24, "heads": 4}


@pytest.fixture
def tokens() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """C (2, 17, 20), M (2, 9, 24), Zq (2, 5, 32)."""
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(2, n, d, generator=generator) for n, d in ((17, 20), (9, 24), (5, 32)))


@pytest.mark.parametrize(("name", "seen"), [("dual", 17), ("none", 17), ("concat", 26), ("early", 17)])
def test_shapes(name: str, seen: int, tokens: tuple[torch.Tensor, ...]) -> None:
    clip, mae, queries = tokens
    fusion = build_fusion(name, **SIZES)
    assert fusion.visual_tokens(clip, mae).shape == (2, seen, 20)
    z, aligned = fusion.refine(queries, mae)
    assert z.shape == queries.shape
    assert aligned is not None
    assert aligned.shape == mae.shape


def test_concat_puts_m_behind_c(tokens: tuple[torch.Tensor, ...]) -> None:
    clip, mae, _ = tokens
    joined = build_fusion("concat", **SIZES).visual_tokens(clip, mae)
    assert torch.equal(joined[:, :17], clip)


def test_dual_asks_m_prime_and_teaches_both_steps(tokens: tuple[torch.Tensor, ...]) -> None:
    """M' = CA1(M, Zq), then Z' = CA2(Zq, M'): a loss on Z' alone reaches the first step too."""
    _, mae, queries = tokens
    fusion = build_fusion("dual", **SIZES, init="normal", std=0.3)
    z, aligned = fusion.refine(queries, mae)
    assert torch.equal(aligned, fusion.align(mae, queries))
    assert torch.equal(z, fusion.enrich(queries, aligned))
    assert not torch.allclose(z, fusion.enrich(queries, mae), atol=1e-3)
    z.square().sum().backward()
    assert [n for n, p in fusion.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize("name", ["dual", "early", "none"])
def test_identity_start_is_exact(name: str, tokens: tuple[torch.Tensor, ...]) -> None:
    clip, mae, queries = tokens
    fusion = build_fusion(name, **SIZES, init="identity", depth=2)
    z, aligned = fusion.refine(queries, mae)
    assert torch.equal(z, queries)
    assert torch.equal(aligned, mae)
    assert torch.equal(fusion.visual_tokens(clip, mae), clip)


@pytest.mark.parametrize(("name", "stacks"), [("dual", ["align_blocks", "enrich_blocks"]), ("early", ["blocks"])])
def test_a_deeper_fusion_has_more_blocks_of_one_kind_and_passes_all(
    name: str, stacks: list[str], tokens: tuple[torch.Tensor, ...]
) -> None:
    clip, mae, queries = tokens
    fusion = build_fusion(name, **SIZES, init="normal", depth=3, self_attention=False)
    assert [len(getattr(fusion, stack)) for stack in stacks] == [3] * len(stacks)
    (fusion.visual_tokens(clip, mae).sum() + fusion.refine(queries, mae)[0].sum()).backward()
    assert [part for part, p in fusion.named_parameters() if "self_" in part or p.grad is None] == []


def test_normal_start_is_not_the_identity(tokens: tuple[torch.Tensor, ...]) -> None:
    _, mae, queries = tokens
    z, aligned = build_fusion("dual", **SIZES, init="normal").refine(queries, mae)
    assert not torch.allclose(z, queries)
    assert not torch.allclose(aligned, mae)


@pytest.mark.parametrize("name", ["dual", "concat", "early"])
@pytest.mark.parametrize("std", [0.02, 0.06])
def test_weights_start_as_wide_as_asked(name: str, std: float) -> None:
    fusion = build_fusion(name, **SIZES, init="normal", std=std)
    weights = torch.cat([p.flatten() for p in fusion.parameters() if p.ndim == 2])
    assert weights.std().item() == pytest.approx(std, rel=0.1)
    assert not any(m.bias.any() for m in fusion.modules() if isinstance(m, torch.nn.Linear)), "as in BERT"


def test_the_fusion_starts_as_wide_as_the_q_former(stage2_config: Any, tmp_path: Path) -> None:
    cfg, wanted = stage2_config.model.copy(), 0.1
    del cfg["opt_model"]
    bert = shutil.copytree(cfg.bert, tmp_path / "bert")
    sizes = json.loads((bert / "config.json").read_text())
    (bert / "config.json").write_text(json.dumps(sizes | {"initializer_range": wanted}))
    changes = {"bert": str(bert), "fusion": "dual", "fusion_init": "normal", "itg_source": "xformer"}
    model = XFormer.from_config(cfg | changes)
    for part in (model.fusion, model.itg_reader.cross_attention.query, model.Qformer.bert.encoder):
        weights = torch.cat([p.flatten() for p in part.parameters() if p.ndim == 2])
        assert weights.std().item() == pytest.approx(wanted, rel=0.1)
    assert model.query_tokens.std().item() == pytest.approx(wanted, rel=0.2)


def test_early_cross_attention_has_as_many_heads_as_clip(stage2_config: Any) -> None:
    cfg = stage2_config.model.copy()
    del cfg["opt_model"]
    heads = {}
    for name in ("early", "dual"):
        fusion = XFormer.from_config(cfg | {"fusion": name}).fusion
        heads[name] = next(m.heads for m in fusion.modules() if isinstance(m, Attention))
    assert heads == {"early": 2, "dual": 4}  # CLIP's, the Q-Former's
    early = XFormer.from_config(cfg | {"fusion": "early", "vit_model": cfg.mae_model}).fusion
    assert early.blocks[0].cross_attention.heads == 2  # a MAE's where one stands for CLIP
    with pytest.raises(UserError, match=r"model\.fusion_heads: 3 heads don't divide the attention width 20"):
        XFormer.from_config(cfg | {"fusion": "early", "fusion_heads": 3})


def test_dual_reads_m_as_a_set_and_moves_m_prime_with_it(tokens: tuple[torch.Tensor, ...]) -> None:
    _, mae, queries = tokens
    fusion = build_fusion("dual", **SIZES, init="normal")
    order = torch.randperm(9, generator=torch.Generator().manual_seed(1))
    z, aligned = fusion.refine(queries, mae)
    z_shuffled, aligned_shuffled = fusion.refine(queries, mae[:, order])
    assert torch.allclose(z, z_shuffled, atol=1e-5)
    assert torch.allclose(aligned[:, order], aligned_shuffled, atol=1e-5)


def test_dual_depends_on_both_streams(tokens: tuple[torch.Tensor, ...]) -> None:
    _, mae, queries = tokens
    fusion = build_fusion("dual", **SIZES, init="normal")
    z, aligned = fusion.refine(queries, mae)
    z_other, _ = fusion.refine(queries, mae.flip(0))
    _, aligned_other = fusion.refine(queries.flip(0), mae)
    assert not torch.allclose(z, z_other)
    assert not torch.allclose(aligned, aligned_other)


def test_gradients_reach_every_parameter_after_one_step_from_the_identity(
    tokens: tuple[torch.Tensor, ...],
) -> None:
    _, mae, queries = tokens
    fusion = build_fusion("dual", **SIZES)
    optimizer = torch.optim.SGD(fusion.parameters(), lr=0.1)
    generator = torch.Generator().manual_seed(2)
    goal_z, goal_m = torch.randn(queries.shape, generator=generator), torch.randn(mae.shape, generator=generator)
    for _ in range(2):
        optimizer.zero_grad()
        z, aligned = fusion.refine(queries, mae)
        ((z - goal_z).square().mean() + (aligned - goal_m).square().mean()).backward()
        optimizer.step()
    silent = [n for n, p in fusion.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert [n for n in silent if "key.bias" not in n] == []  # softmax is blind to a constant added to all keys


def test_attention_equals_torchs_own() -> None:
    torch.manual_seed(0)
    ours = Attention(width=16, context_width=12, heads=4)
    theirs = torch.nn.MultiheadAttention(16, 4, kdim=12, vdim=12, batch_first=True)
    with torch.no_grad():
        theirs.q_proj_weight.copy_(ours.query.weight)
        theirs.k_proj_weight.copy_(ours.key.weight)
        theirs.v_proj_weight.copy_(ours.value.weight)
        theirs.in_proj_bias.copy_(torch.cat([ours.query.bias, ours.key.bias, ours.value.bias]))
        theirs.out_proj.weight.copy_(ours.out.weight)
        theirs.out_proj.bias.copy_(ours.out.bias)
    x, context = torch.randn(2, 5, 16), torch.randn(2, 7, 12)
    expected, weights = theirs(x, context, context, average_attn_weights=False)
    assert torch.allclose(ours(x, context), expected, atol=1e-6)
    for found, wanted in zip(ours.with_map(x, context), (expected, weights), strict=True):
        assert torch.allclose(found, wanted, atol=1e-6)


def test_a_block_is_torchs_own_decoder_layer() -> None:
    torch.manual_seed(0)
    ours = CrossAttentionBlock(width=16, context_width=16, heads=4, init="normal", std=0.3)
    theirs = torch.nn.TransformerDecoderLayer(16, 4, 64, 0.0, "gelu", batch_first=True, norm_first=True)
    pairs = [(ours.self_attention, theirs.self_attn), (ours.cross_attention, theirs.multihead_attn)]
    norms = [(ours.self_norm, theirs.norm1), (ours.cross_norm, theirs.norm2), (ours.feed_forward_norm, theirs.norm3)]
    with torch.no_grad():
        for attention, reference in pairs:
            for kind in ("weight", "bias"):
                parts = [getattr(part, kind) for part in (attention.query, attention.key, attention.value)]
                getattr(reference, f"in_proj_{kind}").copy_(torch.cat(parts))
            reference.out_proj.load_state_dict(attention.out.state_dict())
        for norm, reference in norms:
            torch.nn.init.normal_(norm.weight)
            reference.load_state_dict(norm.state_dict())
        torch.nn.init.normal_(ours.context_norm.weight)
    theirs.linear1.load_state_dict(ours.feed_forward[0].state_dict())
    theirs.linear2.load_state_dict(ours.feed_forward[2].state_dict())
    x, context = torch.randn(2, 5, 16), torch.randn(2, 7, 16)
    assert torch.allclose(ours(x, context), theirs(x, ours.context_norm(context)), atol=1e-5)


def test_full_size_blocks_add_about_twenty_million() -> None:
    sizes = {"query_width": 768, "clip_width": 1408, "mae_width": 1280, "heads": 12}
    with torch.device("meta"):
        with_self = build_fusion("dual", **sizes)
        without = build_fusion("dual", **sizes, self_attention=False)
        block = CrossAttentionBlock(width=768, context_width=768, heads=12)

    def count(module: torch.nn.Module) -> int:
        return sum(p.numel() for p in module.parameters())

    attention = 4 * (768 * 768 + 768)
    feed_forward = 2 * 768 * 3072 + 3072 + 768
    norms = 4 * 2 * 768  # self, cross, context, feed-forward
    assert count(block) == 2 * attention + feed_forward + norms
    assert count(with_self) == 21_662_208
    assert count(with_self) - count(without) == 2 * (attention + 2 * 768)


def test_what_a_fusion_does_not_know_is_refused(stage2_config: Any) -> None:
    sizes = {"query_width": 32, "mae_width": 48, "heads": 4}
    with pytest.raises(TypeError, match="dept"):
        DualCrossAttention(**sizes, dept=3)
    with pytest.raises(UserError, match="init: 'Identity'; did you mean 'identity'"):
        DualCrossAttention(**sizes, init="Identity")
    with pytest.raises(UserError, match=r"model\.fusion_heads is 0; it must be a whole number, 1 or more"):
        DualCrossAttention(**{**sizes, "heads": 0})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shuffle_mae": "Flase"}, r"model\.shuffle_mae is 'Flase'; it must be True or False"),
        ({"load_pretrained": "no!"}, r"model\.load_pretrained is 'no!'; it must be True or False"),
        ({"fusion_heads": -2}, r"model\.fusion_heads is -2; it must be a whole number, 1 or more"),
        ({"qformer_layers": 0}, r"model\.qformer_layers is 0; "),
        ({"embed_dim": 64.5}, r"model\.embed_dim is 64\.5; "),
        ({"image_size": "64"}, r"model\.image_size is '64'; "),
        ({"image_size": None}, r"model\.image_size is None; it must be a whole number, 1 or more"),
        ({"clip_layer": 5.5}, r"model\.clip_layer is 5\.5; it must be a whole number, 1 or more"),
        ({"token_positions": 3}, r"model\.token_positions: 3 is not a list; write \[3\]"),
        ({"vit_model": 3}, r"model\.vit_model is 3; it must be text: quote it"),
        ({"bert": None}, r"model\.bert is None; it must be text"),
        ({"opt_model": 3}, r"model\.opt_model is 3; it must be text"),
        ({"pretrained": 3}, r"model\.pretrained is 3; it must be text"),
        ({"mask_ratio": "0,5"}, r"model\.mask_ratio is '0,5'; it must be a finite number"),
        ({"vqa_length_penalty": "a"}, r"model\.vqa_length_penalty is 'a'; it must be a finite number"),
    ],
)
def test_values_of_a_wrong_kind_are_named(stage2_config: Any, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_values(OmegaConf.merge(stage2_config.model, changes))


class Gated(DualCrossAttention):
    """A fusion of a user's own: it passes on what it doesn't name, and has an option."""

    def __init__(self, *, gate: float = 1.0, **passed_on: Any) -> None:
        super().__init__(**passed_on)
        self.gate = gate


def test_a_derived_fusion_gets_what_its_base_takes_and_its_own_option(
    stage2_config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(FUSIONS, "gated", Gated)
    given = {"fusion": "gated", "fusion_depth": 3, "fusion_self_attention": False, "fusion_gate": 0.3}
    cfg = OmegaConf.merge(stage2_config.model, {"arch": "xformer", "opt_model": None}, given)
    fusion = XFormer.from_config(cfg).fusion
    assert (len(fusion.align_blocks), fusion.gate) == (3, 0.3)
    assert not any("self_attention" in name for name, _ in fusion.named_modules())
    with pytest.raises(UserError, match="model: 'fusion_gaet'; did you mean 'fusion_gate'"):
        check_values(OmegaConf.merge(cfg, {"fusion_gaet": 0.3}))
    for key in ("fusion_std", "fusion_args"):
        with pytest.raises(UserError, match=f"model: '{key}'"):
            check_values(OmegaConf.merge(cfg, {key: 1}))


def test_heads_are_those_of_the_module_that_attends(stage2_config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FUSIONS, "mine", type("Mine", (EarlyCrossAttention,), {}))
    cfg = OmegaConf.merge(stage2_config.model, {"arch": "xformer", "opt_model": None, "fusion": "mine"})
    assert XFormer.from_config(cfg).fusion.blocks[0].cross_attention.heads == 2, "CLIP's, not the Q-Former's 4"
