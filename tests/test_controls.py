"""The controls beside a comparison: CLIP or nothing in place of M, another M, MAE alone, a deeper Q-Former, blind."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from lavis.models import eva_vit
from transformers import BertConfig, BertForMaskedLM

import lavis_xformer
from lavis_xformer.errors import UserError
from lavis_xformer.images import clip_to_mae
from lavis_xformer.losses import NO_TARGET, token_losses
from lavis_xformer.models import towers
from lavis_xformer.models.frozen import train_only


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


@pytest.mark.parametrize("layer", [1, 2])
def test_a_middle_block_of_clip_in_place_of_m(configured: Any, toy: Any, batch: dict[str, Any], layer: int) -> None:
    model = configured(toy, mae_source="clip", clip_layer=layer)
    tokens = model.encode_image(batch["image"])
    blocks = model.visual_encoder.get_intermediate_layers(batch["image"])  # LAVIS's own
    expected = torch.nn.functional.layer_norm(blocks[layer - 1], blocks[0].shape[-1:])
    assert torch.allclose(tokens.mae_tokens, expected, atol=1e-6)
    assert not tokens.mae_tokens.requires_grad
    assert torch.equal(tokens.clip, configured_like(model, clip_layer=None).encode_image(batch["image"]).clip)
    model(batch)["loss"].backward()
    assert not model.visual_encoder.blocks[layer - 1]._forward_hooks, "the hook is gone with the pass"


def configured_like(model: Any, **attributes: Any) -> Any:
    for name, value in attributes.items():
        setattr(model, name, value)
    return model


def test_a_block_of_clip_l_is_read_too() -> None:
    from lavis.models.clip_vit import VisionTransformer

    from lavis_xformer.models import towers

    model = VisionTransformer(32, 8, 16, 3, 2, False).eval()
    with torch.no_grad(), towers.tap(model, len(model.transformer.resblocks)) as last:
        out = model(torch.randn(2, 3, 32, 32))
    assert torch.equal(last[0], out)  # (B, Nc, Dc), though it computes with (Nc, B, Dc)


def test_the_qformer_may_read_mae_alone(configured: Any, toy: Any, batch: dict[str, Any]) -> None:
    model = configured(toy, fusion="none", vit_model=toy.mae_model)
    own = configured(toy).mae.encode(clip_to_mae(batch["image"])).tokens
    clip = model.encode_image(batch["image"]).clip
    assert torch.allclose(clip, model.ln_vision(own), atol=1e-6)
    model.train()(batch)["loss"].backward()
    assert [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None] == []
    with pytest.raises(UserError, match=r"model\.image_size is 64, but .* 32 pixels"):
        configured(toy, fusion="none", vit_model=toy.mae_model, image_size=64)
    with pytest.raises(UserError, match=r"model\.freeze_vit is False, but a MAE as model\.vit_model stays frozen"):
        configured(toy, fusion="none", vit_model=toy.mae_model, freeze_vit=False)


@pytest.mark.parametrize(("key", "file"), [("vit_model", "clip"), ("mae_model", "mae")])
def test_torn_weights_of_an_encoder_are_one_line(
    key: str, file: str, configured: Any, toy: Any, tmp_path: Path
) -> None:
    folder = tmp_path / file
    shutil.copytree(toy[key], folder)
    (weights,) = (path for path in folder.iterdir() if path.suffix in (".safetensors", ".bin"))
    weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
    with pytest.raises(UserError, match=rf"model\.{key}: .*{file}.*(intact|can't be read)"):
        configured(toy, **{key: str(folder)})
    (folder / "config.json").write_text("{")
    with pytest.raises(UserError, match=rf"model\.{key}: .*{file}.*(not valid JSON|can't be read)"):
        configured(toy, **{key: str(folder)})


def test_files_as_image_encoders_are_named_by_their_key(configured: Any, toy: Any, tmp_path: Path) -> None:
    for name in ("eva_vit_g.pth", "mae_pretrain_vit_x_full.pth"):
        torch.save({"model": {"blocks.0": torch.zeros(1)}}, tmp_path / name)
    with pytest.raises(UserError, match=r"model\.vit_model: .* set vit_model: eva_clip_g and vit_weights: .*eva_vit_g"):
        configured(toy, fusion="none", vit_model=str(tmp_path / "eva_vit_g.pth"))
    with pytest.raises(UserError, match=r"model\.vit_model: .*_full\.pth' holds MAE's encoder only"):
        configured(toy, fusion="none", vit_model=str(tmp_path / "mae_pretrain_vit_x_full.pth"))
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub/config.json").write_text('{"model_type": "clip", "patch_size": 14}')
    with pytest.raises(UserError, match=r"model\.vit_model: .*hub' is not an EVA ViT: its config\.json lacks img_size"):
        configured(toy, fusion="none", vit_model=str(tmp_path / "hub"))
    with pytest.raises(UserError, match=r"model\.vit_model: there is no file '.*mae_nothing"):
        configured(toy, fusion="none", vit_model=str(tmp_path / "mae_nothing.pth"))


def test_m_may_come_with_positions(configured: Any, toy: Any, batch: dict[str, Any]) -> None:
    plain, placed = configured(toy).eval(), configured(toy, token_positions=["mae"]).eval()
    placed.load_state_dict(plain.state_dict())
    table = plain.mae.model.vit.embeddings.position_embeddings  # (1, 1 + N, Dm)
    own, other = (model.encode_image(batch["image"]).mae_tokens for model in (plain, placed))
    assert torch.allclose(other - own, table.expand_as(own), atol=1e-5)
    noise = torch.rand(4, 16)
    seen, hidden = (model.encode_image(batch["image"], mask_ratio=0.5, noise=noise) for model in (plain, placed))
    kept = noise.argsort(dim=1)[:, :8]  # the visible patches, in the order of their tokens
    assert torch.allclose((hidden.mae_tokens - seen.mae_tokens)[:, 1:], table[0, 1:][kept], atol=1e-5)
    assert torch.allclose(hidden.mae_tokens[:, 0], seen.mae_tokens[:, 0]), "CLS lies nowhere"
    losses = [model.reconstruction_loss(of.mae_tokens, of) for model, of in ((plain, seen), (placed, hidden))]
    assert torch.allclose(*losses, atol=1e-5), "MAE's decoder gets M' without them"


@pytest.mark.parametrize("changes", [{"fusion": "none"}, {"fusion": "dual"}, {"mae_source": "clip"}])
def test_c_may_come_with_positions(configured: Any, toy: Any, batch: dict[str, Any], changes: dict[str, str]) -> None:
    plain, placed = (configured(toy, token_positions=names, **changes).eval() for names in ([], ["clip"]))
    placed.load_state_dict(plain.state_dict())
    own, other = (model.encode_image(batch["image"]) for model in (plain, placed))
    assert_lie_apart(other.clip - own.clip)
    if changes != {"fusion": "none"}:
        assert torch.equal(other.mae_tokens, own.mae_tokens), "of C's alone, though M may be C"


def test_c_in_place_of_m_has_positions_as_m_would(configured: Any, toy: Any, batch: dict[str, Any]) -> None:
    tokens = configured(toy, mae_source="clip", token_positions=["mae"]).encode_image(batch["image"])
    assert_lie_apart(tokens.mae_tokens - tokens.clip)


def assert_lie_apart(added: torch.Tensor) -> None:
    """What was added to (B, 1 + N, D) tokens: for all images the same, at each patch another vector, for CLS 0."""
    assert torch.allclose(added, added[:1].expand_as(added), atol=1e-5)
    assert torch.allclose(added[:, 0], torch.zeros_like(added[:, 0]), atol=1e-5)
    assert len(added[0].mul(1e3).round().unique(dim=0)) == added.shape[1]


def test_positions_are_of_an_encoder(configured: Any, toy: Any) -> None:
    with pytest.raises(UserError, match=r"model\.token_positions: 'mea'; did you mean 'mae'"):
        configured(toy, token_positions=["mea"])


@pytest.mark.parametrize("changes", [{}, {"mae_source": "clip"}, {"mae_source": "clip", "clip_layer": 1}])
def test_each_image_may_get_anothers_m(
    configured: Any, toy: Any, batch: dict[str, Any], changes: dict[str, Any]
) -> None:
    model = configured(toy, **changes)
    own, passes = model.encode_image(batch["image"]), []
    for part in (model.visual_encoder, *([model.mae.model.vit.encoder] if model.mae else [])):
        part.register_forward_hook(lambda part, _, out: passes.append(type(part).__name__))
    model.shuffle_mae = True
    other = model.encode_image(batch["image"])
    assert len(passes) == (4 if model.mae else 2), "two of each encoder"
    assert torch.equal(other.clip, own.clip)
    assert torch.equal(other.mae_tokens, own.mae_tokens[[2, 3, 0, 1]])
    if model.mae is not None:  # what is reconstructed is what MAE saw
        noise = torch.rand(4, 16)
        seen = model.encode_image(batch["image"], mask_ratio=0.5, noise=noise)
        model.shuffle_mae = False
        straight = model.encode_image(batch["image"][[2, 3, 0, 1]], mask_ratio=0.5, noise=noise)
        assert torch.equal(seen.pixels, straight.pixels)
        loss, expected = (model.reconstruction_loss(of.mae_tokens, of) for of in (seen, straight))
        assert torch.allclose(loss, expected, atol=1e-6)


@pytest.mark.parametrize("changes", [{}, {"mae_source": "clip"}])
def test_an_image_alone_gets_the_m_of_the_one_before(
    configured: Any, toy: Any, batch: dict[str, Any], changes: dict[str, Any]
) -> None:
    model = configured(toy, shuffle_mae=True, **changes)
    with pytest.raises(UserError, match=r"model\.shuffle_mae needs two different images, .* found one"):
        model.encode_image(batch["image"][:1])
    model.encode_image(batch["image"][:3])
    alone = model.encode_image(batch["image"][3:])
    model.shuffle_mae = False
    own = model.encode_image(batch["image"])
    assert torch.allclose(alone.mae.tokens, own.mae.tokens[2:3], atol=1e-5)
    assert torch.allclose(alone.clip, own.clip[3:], atol=1e-5)


@pytest.mark.parametrize("changes", [{}, {"mae_source": "clip"}])
def test_no_image_gets_its_own_m(configured: Any, toy: Any, batch: dict[str, Any], changes: dict[str, Any]) -> None:
    a, b, c, _ = batch["image"]
    model = configured(toy, **changes)
    own = dict(zip("abc", model.encode_image(torch.stack([a, b, c])).mae_tokens, strict=True))
    model.shuffle_mae = True

    def given(*images: torch.Tensor) -> str:
        """The names of the images whose M each one gets."""
        tokens = model.encode_image(torch.stack(images)).mae_tokens
        return "".join(
            n for m in tokens for n in own if m.shape == own[n].shape and torch.allclose(m, own[n], atol=1e-5)
        )

    with pytest.raises(UserError, match="two different images"):
        given(a, a)  # which is one image
    assert given(b) == "a"
    assert given(b) == "a", "and again, as with a second question about it"
    assert given(b, b, b, b) == "aaaa"
    assert given(a, a, b, b, b) == "bbaaa"
    assert given(a, b, c) == "cab"
    assert given(c) == "b"
    assert given(a) == "c"


def test_two_passes_of_mae_give_the_m_of_one_other_image(configured: Any, toy: Any, batch: dict[str, Any]) -> None:
    model = configured(toy, shuffle_mae=True, mask_vl=False).eval()
    model.encode_image(batch["image"][:2])
    lone = {"image": batch["image"][2:3], "text_input": batch["text_input"][2:3]}
    seen, whole = model._encode_for_training(lone["image"], None)
    assert seen.mae_tokens.shape[1] < whole.mae_tokens.shape[1]
    assert torch.equal(seen.pixels, whole.pixels)
    assert torch.equal(seen.pixels, clip_to_mae(batch["image"][1:2]))
    terms = model(lone)
    assert {"loss_rec", "rec_mae"} < terms.keys()
    assert all(torch.isfinite(term) for term in terms.values())
    again = model.encode_image(batch["image"][3:])
    assert again.mae_tokens.shape == whole.mae_tokens.shape, "nothing of it is masked"

    seen, whole = model._encode_for_training(batch["image"], torch.rand(4, 16))
    assert torch.equal(seen.pixels, whole.pixels)
    assert torch.equal(whole.pixels, clip_to_mae(batch["image"][[2, 3, 0, 1]]))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_images_of_any_floats_are_read(configured: Any, toy: Any, batch: dict[str, Any], dtype: torch.dtype) -> None:
    model = configured(toy)
    image = batch["image"].to(dtype)
    tokens, expected = model.encode_image(image), model.encode_image(image.float())
    assert torch.equal(tokens.clip, expected.clip)
    assert torch.equal(tokens.mae_tokens, expected.mae_tokens)
    with pytest.raises(UserError, match=r"samples\['image'\] is a torch\.uint8, not a float tensor"):
        model.encode_image(batch["image"].byte())
    with pytest.raises(UserError, match=r"samples\['image'\] is a ndarray, not a float tensor"):
        model.encode_image(batch["image"].numpy())


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
    assert not torch.equal(first.query_tokens, second.query_tokens), "all else is drawn as the run's seed says"


def test_the_qformer_starts_from_berts_weights(configured: Any, toy: Any, tmp_path: Path) -> None:
    bert = BertForMaskedLM(BertConfig.from_pretrained(toy.bert))
    shutil.copytree(toy.bert, tmp_path, dirs_exist_ok=True)
    bert.save_pretrained(tmp_path)
    model = configured(toy, bert=str(tmp_path))
    for ours, theirs in zip(model.Qformer.bert.encoder.layer, bert.bert.encoder.layer, strict=True):
        for part in ("attention.self.query", "intermediate.dense", "output.dense", "output.LayerNorm"):
            assert torch.equal(ours.get_submodule(part).weight, theirs.get_submodule(part).weight), part
        assert torch.equal(ours.intermediate_query.dense.weight, theirs.intermediate.dense.weight), "as in BLIP-2"
        assert torch.equal(ours.output_query.dense.weight, theirs.output.dense.weight)


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
        cfg.pretrained = None
        wide = cls.from_config(cfg.copy() | {"fusion": "none", "qformer_layers": 6})
        assert trained(wide) == pytest.approx(trained(cls.from_config(cfg)), rel=0.1)


def test_mistakes_are_named(configured: Any, toy: Any) -> None:
    with pytest.raises(UserError, match=r"model\.mae_source: 'clipp'; did you mean 'clip'"):
        configured(toy, mae_source="clipp")
    with pytest.raises(UserError, match="'clip' with fusion 'concat' would read C twice"):
        configured(toy, mae_source="clip", fusion="concat")
    for nothing in (None, False):
        with pytest.raises(UserError, match=rf"model\.fusion: '{nothing}'; .*dual"):
            configured(toy, fusion=nothing)
    with pytest.raises(UserError, match=r"model\.token_positions: 'clip' is not a list; write \[clip\]"):
        configured(toy, token_positions="clip")
    with pytest.raises(UserError, match=r"model\.train_only: 'fusion' is not a list; write \[fusion\]"):
        train_only(configured(toy), "fusion")  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"model\.vit_weights are those of vit_model: eva_clip_g, not of "):
        configured(toy, vit_weights="eva_vit_g.pth")
    with pytest.raises(UserError, match=r"model\.clip_layer: 3, but this image encoder has blocks 1 to 2"):
        configured(toy, mae_source="clip", clip_layer=3)
    with pytest.raises(UserError, match=r"model\.clip_layer: 1 needs model\.mae_source: clip, not mae"):
        configured(toy, clip_layer=1)
    with pytest.raises(UserError, match=r"model\.clip_layer: 1, but .* is a MAE, .* set clip_layer to null"):
        configured(toy, vit_model=toy.mae_model, mae_source="clip", clip_layer=1)
    with pytest.raises(UserError, match=r"model\.fusion_init: 'identiti'; did you mean 'identity'"):
        configured(toy, fusion_init="identiti")
    for key, count in (("fusion_depth", 0), ("fusion_depth", 1.5), ("num_query_token", 0)):
        with pytest.raises(UserError, match=rf"model\.{key} is {count}; it must be a whole number, 1 or more"):
            configured(toy, **{key: count})


def test_a_language_model_answers_without_an_image(make_stage2: Any, batch: dict[str, Any]) -> None:
    model = make_stage2("opt").eval()
    questions = ["how many circles?", "where is it?"]
    alone = model.predict_answers({"text_input": questions}, num_beams=2, max_len=3)
    assert len(alone) == 2
    model.projection.weight.data.normal_()
    assert model.predict_answers({"text_input": questions}, num_beams=2, max_len=3) == alone
    assert model.predict_answers({"text_input": questions[0]}, num_beams=2, max_len=3) == alone[:1]
    with pytest.raises(UserError, match=r"samples\['text_input'\] is missing"):
        model.predict_answers({})


@pytest.mark.parametrize("kind", ["opt", "t5"])
def test_answers_are_ranked_without_an_image(kind: str, make_stage2: Any) -> None:
    model = make_stage2(kind, vqa_prompt="{}").eval()
    answers = ["two", "three star", "red", "left"]
    losses = []
    for answer in answers:
        logits, labels = model.language.predict(torch.zeros(1, 0, 32), [[("how many ?", f" {answer}")]])
        losses.append(token_losses(logits, labels).sum())
    (ranked,) = model.predict_answers({"text_input": "how many ?"}, inference_method="rank", answer_list=answers)
    assert ranked == answers[int(torch.stack(losses).argmin())]


def test_without_an_image_opt_predicts_as_after_an_empty_one(make_stage2: Any) -> None:
    language = make_stage2("opt").language
    logits, labels = language.predict(torch.zeros(1, 0, 32), [[("how many ?", " two")]])
    ids = language.encode([[("how many ?", " two")]])[0]
    assert logits.shape[:2] == labels.shape == (1, ids.shape[1] - 1)
    expected = language.model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[:, :-1]
    assert torch.allclose(logits, expected, atol=1e-5)
    assert language.tokenizer.decode(labels[labels != NO_TARGET]) == " two\n"


def test_eva_clip_is_built_as_lavis_builds_it() -> None:
    class BuiltError(Exception):
        """Instead of a download."""

    with mock.patch.object(eva_vit, "VisionTransformer", side_effect=BuiltError) as theirs, pytest.raises(BuiltError):
        eva_vit.create_eva_vit_g(img_size=224, drop_path_rate=0.1)
    with mock.patch.object(towers, "VisionTransformer") as ours:
        towers.eva_vit(img_size=224, drop_path_rate=0.1, **towers.EVA_CLIP_G)
    mine, expected = ours.call_args.kwargs, theirs.call_args.kwargs
    norms = [sizes.pop("norm_layer")(4) for sizes in (mine, expected)]
    assert norms[0].eps == norms[1].eps
    assert mine == expected


def test_the_released_eva_clip_goes_on_behind_what_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"patch_size": 8, "embed_dim": 20, "depth": 2, "num_heads": 2, "mlp_ratio": 2, "qkv_bias": True}
    monkeypatch.setattr(towers, "EVA_CLIP_G", sizes)
    whole = towers.eva_vit(img_size=32, **{**sizes, "depth": 3}).half().state_dict()
    whole["head.weight"] = torch.ones(2, 20)
    torch.save(whole, tmp_path / "eva_vit_g.pth")
    file = str(tmp_path / "eva_vit_g.pth")
    clip = towers.build_clip("eva_clip_g", image_size=48, weights=file)
    assert clip.pos_embed.shape == (1, 37, 20)
    assert torch.equal(clip.blocks[1].mlp.fc1.weight, whole["blocks.1.mlp.fc1.weight"].float())
    del whole["cls_token"]
    torch.save(whole, file)
    with pytest.raises(UserError, match="missing: cls_token"):
        towers.build_clip("eva_clip_g", image_size=32, weights=file)
