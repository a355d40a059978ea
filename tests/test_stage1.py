"""Stage 1: parity with LAVIS's BLIP-2, the identity start, gradients, batch size 1."""

from __future__ import annotations

import statistics
from functools import partial
from typing import Any

import pytest
import torch
from lavis.models.blip2_models.blip2_qformer import Blip2Qformer
from lavis.models.blip2_models.Qformer import BertLMHeadModel
from omegaconf import OmegaConf

from lavis_xformer import losses
from lavis_xformer.errors import UserError
from lavis_xformer.images import clip_to_mae
from lavis_xformer.models import features
from lavis_xformer.models.frozen import DTYPES
from lavis_xformer.models.fusion import FUSIONS
from lavis_xformer.models.stage1 import XFormer


@pytest.fixture
def same_negatives(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both models take the likeliest negative, and LAVIS's runs without a process group."""

    def likeliest(weights: torch.Tensor, count: int, generator: Any = None) -> torch.Tensor:
        return weights.argmax(-1, keepdim=True)

    monkeypatch.setattr(torch, "multinomial", likeliest)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 0)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 1)


def blip2_like(ours: Any) -> Blip2Qformer:
    """LAVIS's own class around copies of the same parts."""
    from copy import deepcopy

    theirs = Blip2Qformer.__new__(Blip2Qformer)
    torch.nn.Module.__init__(theirs)
    for part in "visual_encoder ln_vision Qformer query_tokens vision_proj text_proj itm_head temp".split():
        setattr(theirs, part, deepcopy(getattr(ours, part)))
    theirs.Qformer.__class__ = BertLMHeadModel  # which captions without a cache
    theirs.tokenizer, theirs.max_txt_len = ours.tokenizer, ours.max_txt_len
    return theirs


def test_without_fusion_it_is_lavis_blip2_in_losses_and_gradients(
    make_xformer: Any, batch: dict[str, Any], same_negatives: None
) -> None:
    ours = make_xformer("none")
    theirs = blip2_like(ours)
    images = [batch["image"].clone().requires_grad_() for _ in range(2)]
    mine, reference = ours({**batch, "image": images[0]}), theirs({**batch, "image": images[1]})
    for name in ("loss", "loss_itc", "loss_itm", "loss_itg"):
        its_name = name.replace("itg", "lm")
        assert mine[name].item() == pytest.approx(reference[its_name].item(), abs=1e-5)
    mine["loss"].backward()
    reference["loss"].backward()
    most = float(images[1].grad.abs().max())
    assert most > 0
    torch.testing.assert_close(images[0].grad, images[1].grad, rtol=0, atol=1e-4 * most)
    expected = {n: p.grad for n, p in theirs.named_parameters() if p.requires_grad}
    for name, parameter in ours.named_parameters():
        if parameter.requires_grad:
            assert torch.allclose(parameter.grad, expected.pop(name), atol=1e-5), name
    assert not expected, "every trainable weight of BLIP-2 is there under its own name"


def test_without_fusion_features_and_matching_are_lavis_blip2s(make_xformer: Any, batch: dict[str, Any]) -> None:
    ours = make_xformer("none").eval()
    theirs = blip2_like(ours).eval()
    fields = {"image": "image_embeds_proj", "text": "text_embeds_proj", "multimodal": "multimodal_embeds"}
    for mode, field in fields.items():
        mine = getattr(ours.extract_features(batch, mode), field)
        assert torch.allclose(mine, getattr(theirs.extract_features(batch, mode), field), atol=1e-5)
    _, image = ours.forward_image(batch["image"])
    text = ours.tokenize(batch["text_input"])
    arguments = (image, text.input_ids, text.attention_mask)
    assert torch.allclose(ours.compute_itm(*arguments), theirs.compute_itm(*arguments), atol=1e-5)
    assert ours.generate(batch, num_beams=2) == theirs.generate(batch, num_beams=2)


WAYS = {
    "beams": {"num_beams": 2, "max_length": 14, "min_length": 12},
    "short": {"num_beams": 3, "max_length": 4, "min_length": 4},
    "nucleus": {"use_nucleus_sampling": True, "num_beams": 2, "max_length": 20},
    "narrow nucleus": {"use_nucleus_sampling": True, "top_p": 0.2},
}


@pytest.mark.parametrize("way", WAYS)
def test_without_fusion_captions_are_lavis_blip2s(way: str, make_xformer: Any, batch: dict[str, Any]) -> None:
    ours = make_xformer("none").eval()
    ours.Qformer.cls.predictions.bias.data[ours.tokenizer.sep_token_id] = 1.0  # so that some captions end early
    said = []
    for model in (ours, blip2_like(ours).eval()):
        torch.manual_seed(7)
        said.append(model.generate(batch, **WAYS[way]))
    assert said[0] == said[1]
    assert any(said[0])


@pytest.mark.parametrize("itg_source", ["qformer", "xformer"])
@pytest.mark.parametrize("beams", [1, 3])
def test_captioning_reads_the_image_once_and_says_what_it_said_without_a_cache(
    itg_source: str, beams: int, make_xformer: Any, batch: dict[str, Any]
) -> None:
    model = make_xformer("dual", init="normal", itg_source=itg_source, fusion_init="normal").eval()
    asked = {"num_beams": beams, "max_length": 8, "min_length": 8}
    lengths = []
    hook = model.Qformer.bert.encoder.register_forward_pre_hook(lambda part, given: lengths.append(given[0].shape[1]))
    cached = model.generate(batch, **asked)
    hook.remove()
    queries = model.query_tokens.shape[1]
    assert lengths.count(queries + 1) == 1, "with the start token; Z' needs the queries alone once"
    assert max(lengths[2:]) == 1, "then word by word"
    model.Qformer.__class__ = BertLMHeadModel
    assert model.generate(batch, **asked) == cached


def test_a_penalty_on_repetition_changes_captions(make_xformer: Any, batch: dict[str, Any]) -> None:
    model = make_xformer("none").eval()  # LAVIS's own takes the penalty and ignores it
    model.Qformer.cls.predictions.bias.data[model.tokenizer.convert_tokens_to_ids("red")] = 1.0
    plain, penalised = (
        model.generate(batch, num_beams=1, max_length=4, min_length=4, repetition_penalty=penalty)[0]
        for penalty in (1.0, 9.0)
    )
    assert plain == "red red red"
    assert penalised.split().count("red") == 1


@pytest.mark.parametrize("mode", ["text", "multimodal"])
def test_long_texts_are_cut_where_the_positions_end(mode: str, make_xformer: Any, batch: dict[str, Any]) -> None:
    model = make_xformer("dual").eval()
    words = "red blue green " * 30  # of 32 positions, two are [CLS] and [SEP]
    long, cut = (
        model.extract_features({**batch, "text_input": [text] * 4}, mode) for text in (words, words[: 15 * 10])
    )
    field = f"{mode}_embeds"
    assert torch.allclose(getattr(long, field), getattr(cut, field), atol=1e-6)


@pytest.mark.parametrize("mask_vl", [True, False])
def test_dual_starts_as_blip2_with_maes_own_reconstruction(
    mask_vl: bool, make_xformer: Any, batch: dict[str, Any], same_negatives: None, tiny_mae_model: Any
) -> None:
    weights = {"itc": 2.0, "itm": 0.5, "itg": 0.0, "rec": 3.0}
    dual, blip2 = make_xformer("dual", mask_vl=mask_vl, loss_weights=weights), make_xformer("none")
    blip2.load_state_dict({k: v for k, v in dual.state_dict().items() if not k.startswith(("fusion", "mae"))})
    noise = torch.rand(4, 16)
    mine, reference = dual(batch, noise=noise), blip2(batch)
    for name in ("loss_itc", "loss_itm", "loss_itg"):
        assert torch.equal(mine[name], reference[name])
    own = tiny_mae_model(clip_to_mae(batch["image"]), noise=noise).loss
    assert mine["loss_rec"].item() == pytest.approx(own.item(), abs=1e-6)
    total = sum(weight * mine[f"loss_{name}"].item() for name, weight in weights.items())
    assert mine["loss"].item() == pytest.approx(total, rel=1e-6)


def test_captions_from_z_start_as_blip2s_and_then_read_z(
    make_xformer: Any, batch: dict[str, Any], same_negatives: None
) -> None:
    model, plain = make_xformer("dual", itg_source="xformer"), make_xformer("dual")
    plain.load_state_dict({n: w for n, w in model.state_dict().items() if not n.startswith("itg_reader")})
    noise = torch.rand(4, 16)
    assert torch.allclose(model(batch, noise=noise)["loss_itg"], plain(batch, noise=noise)["loss_itg"], atol=1e-6)
    assert model.generate(batch) == plain.generate(batch)
    for parameter in model.itg_reader.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    model(batch, noise=noise)["loss_itg"].backward()
    silent = [n for n, p in model.fusion.named_parameters() if "enrich" in n and p.grad is None]
    assert silent == [], "captions teach the fusion"
    assert model.generate(batch) != plain.generate(batch)
    assert not model.Qformer.cls._forward_pre_hooks


def test_captions_from_z_see_no_later_word(make_xformer: Any, batch: dict[str, Any]) -> None:
    model = make_xformer("dual", init="normal", itg_source="xformer", fusion_init="normal").eval()
    tokens = model.encode_image(batch["image"])
    zq = model.query_image(tokens.clip, use_cache=True)
    z, _ = model.fusion.refine(zq.last_hidden_state, tokens.mae_tokens)
    ids = model.tokenize(batch["text_input"]).input_ids
    changed = ids.clone()
    changed[:, 3:] = 5

    def logits(words: torch.Tensor) -> torch.Tensor:
        mask = words.new_ones(len(words), 4 + words.shape[1])
        with model.writing_from(z):
            return model.Qformer(words, attention_mask=mask, past_key_values=zq.past_key_values).logits

    assert torch.allclose(logits(ids)[:, :3], logits(changed)[:, :3], atol=1e-6)


@pytest.mark.parametrize("fusion", sorted(FUSIONS))
def test_gradients_reach_every_trainable_parameter_and_no_frozen_one(
    fusion: str, make_xformer: Any, batch: dict[str, Any]
) -> None:
    model = make_xformer(fusion, init="normal")
    model.train()
    model(batch)["loss"].backward()
    silent = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert silent == []
    assert all(p.grad is None for n, p in model.named_parameters() if n.startswith(("visual_encoder", "mae.")))
    assert not model.visual_encoder.training
    assert model.Qformer.training


def test_every_loss_can_be_traced_to_the_image(make_xformer: Any, batch: dict[str, Any]) -> None:
    """For maps and attacks, and through both encoders, although these are frozen; in training nothing is kept."""
    image = batch["image"].clone().requires_grad_()
    model = make_xformer("dual", fusion_init="normal")
    tokens = model.encode_image(image)
    for part in (tokens.clip, tokens.mae_tokens):
        (gradient,) = torch.autograd.grad(part.square().sum(), image, retain_graph=True)
        assert gradient.abs().sum() > 0
    output = model({**batch, "image": image})
    for name in ("loss_itc", "loss_itm", "loss_itg", "loss_rec"):
        (gradient,) = torch.autograd.grad(output[name], image, retain_graph=True)
        assert gradient.abs().sum() > 0, name
    assert not model.mae.encode(batch["image"]).tokens.requires_grad
    assert not model._run_clip(batch["image"]).requires_grad


@pytest.mark.parametrize("fusion", sorted(FUSIONS))
def test_batch_of_one(fusion: str, make_xformer: Any, batch: dict[str, Any]) -> None:
    model = make_xformer(fusion)
    one = {"image": batch["image"][:1], "text_input": batch["text_input"][:1]}
    output = model(one)
    output["loss"].backward()
    assert all(torch.isfinite(value) for value in output.values())
    assert all(value.ndim == 0 for value in output.values())


def test_features_are_normalised_in_full_precision_under_autocast(
    make_xformer: Any, batch: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    compared: list[torch.Tensor] = []
    similarity = losses.similarity
    monkeypatch.setattr(losses, "similarity", lambda *pair: compared.extend(pair) or similarity(*pair))
    with torch.autocast("cpu", torch.bfloat16):
        make_xformer("none")(batch)
    assert len(compared) == 4
    for compared_features in compared:
        assert torch.allclose(compared_features.float().norm(dim=-1), torch.ones(()), atol=1e-5)


def test_itm_accuracy_is_the_share_of_pairs_told_apart(make_xformer: Any, batch: dict[str, Any]) -> None:
    model = make_xformer("dual")
    for answer, right in ((0, 8 / 12), (1, 4 / 12)):  # always one answer to 4 true and 8 wrong pairs
        torch.nn.init.zeros_(model.itm_head.weight)
        model.itm_head.bias.data.copy_(torch.nn.functional.one_hot(torch.tensor(answer), 2))
        assert model(batch)["itm_accuracy"].item() == pytest.approx(right)


def test_a_long_caption_is_cut_at_max_txt_len(make_xformer: Any) -> None:
    model = make_xformer("none")
    assert model.tokenize(["red " * 30]).input_ids.shape == (1, model.max_txt_len) == (1, 12)


def test_an_image_encoder_that_is_not_frozen_is_trained(make_xformer: Any, batch: dict[str, Any]) -> None:
    model = make_xformer("none", freeze_vit=False).train()
    model(batch)["loss"].backward()
    assert model.visual_encoder.training
    assert [n for n, p in model.visual_encoder.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize("mode", ["image", "multimodal"])
def test_features_see_m(mode: str, make_xformer: Any, batch: dict[str, Any]) -> None:
    model = make_xformer("dual", init="normal").eval()
    before = model.extract_features(batch, mode)[f"{mode}_embeds"]
    assert not before.requires_grad
    model.fusion.mae_in.weight.data.zero_()
    assert not torch.allclose(before, model.extract_features(batch, mode)[f"{mode}_embeds"])


def test_a_caption_reads_the_z_of_its_own_image(make_xformer: Any, batch: dict[str, Any]) -> None:
    model = make_xformer("dual", init="normal", itg_source="xformer", fusion_init="normal").eval()
    for parameter in (*model.itg_reader.parameters(), *model.fusion.parameters()):
        torch.nn.init.normal_(parameter, std=0.5)
    options = {"num_beams": 2, "max_length": 6, "min_length": 6}
    alone = [model.generate({"image": image[None]}, **options)[0] for image in batch["image"]]
    assert model.generate(batch, **options) == alone
    assert len(set(alone)) > 1


def test_masks_can_be_replayed(make_xformer: Any, batch: dict[str, Any], same_negatives: None) -> None:
    model = make_xformer("dual", init="normal")
    noise, other = torch.rand(4, 16), torch.rand(4, 16)
    assert torch.equal(model(batch, noise=noise)["loss"], model(batch, noise=noise)["loss"])
    assert not torch.equal(model(batch, noise=noise)["loss"], model(batch, noise=other)["loss"])


def test_whole_m_for_the_language_losses(make_xformer: Any, batch: dict[str, Any], same_negatives: None) -> None:
    model = make_xformer("dual", init="normal", mask_vl=False)
    first, second = (model(batch, noise=torch.rand(4, 16)) for _ in range(2))
    assert torch.equal(first["loss_itc"], second["loss_itc"])
    assert not torch.equal(first["loss_rec"], second["loss_rec"])


@pytest.mark.parametrize(("mask_vl", "passes"), [(True, [5]), (False, [17, 5])])
def test_clip_runs_once_a_step_and_mae_as_often_as_needed(
    mask_vl: bool, passes: list[int], make_xformer: Any, batch: dict[str, Any]
) -> None:
    model = make_xformer("dual", mask_vl=mask_vl, mask_ratio=0.75)
    clip: list[int] = []  # the tokens of each pass
    mae: list[int] = []
    model.visual_encoder.register_forward_hook(lambda _, args, out: clip.append(out.shape[1]))
    model.mae.model.vit.encoder.register_forward_hook(lambda _, args, out: mae.append(args[0].shape[1]))
    model(batch)
    assert (clip, mae) == ([17], passes)


def test_m_masked_in_a_second_pass_is_m_masked_in_the_first(make_xformer: Any, batch: dict[str, Any]) -> None:
    model, noise = make_xformer("dual", init="normal", token_positions=["mae"]), torch.rand(4, 16)
    first = model.encode_image(batch["image"], mask_ratio=0.5, noise=noise)
    again = model.mask_again(model.encode_image(batch["image"]), mask_ratio=0.5, noise=noise)
    assert torch.equal(first.clip, again.clip)
    assert torch.equal(first.pixels, again.pixels)
    assert all(torch.equal(*parts) for parts in zip(first.mae, again.mae, strict=True))


@pytest.mark.slow
def test_torch_compile_goes_on_after_a_break_in_the_graph(make_xformer: Any, batch: dict[str, Any]) -> None:
    model = make_xformer().eval()

    @torch.compile(backend="eager")
    def encode(image: torch.Tensor) -> torch.Tensor:
        tokens = model.encode_image(image)
        torch._dynamo.graph_break()
        return model.refined(tokens)

    torch.testing.assert_close(encode(batch["image"]), model.encode_queries(batch["image"]))


@pytest.mark.parametrize(("fusion", "tokens"), [("dual", 9), ("concat", 17), ("early", 17)])
@pytest.mark.parametrize("weight", [0, 1])
def test_m_is_masked_in_training_where_it_is_aligned(
    fusion: str, tokens: int, weight: float, make_xformer: Any, batch: dict[str, Any]
) -> None:
    model, read = make_xformer(fusion, loss_weights={"rec": weight}).train(), []
    model.mae.model.vit.encoder.register_forward_hook(lambda _, args, out: read.append(args[0].shape[1]))
    seen, whole = model._encode_for_training(batch["image"], None)
    assert seen is whole
    assert read == [tokens]
    assert (seen.mae is None) == (fusion != "dual"), "what the Q-Former reads holds the rest"


def test_reconstruction_teaches_the_queries(make_xformer: Any, batch: dict[str, Any]) -> None:
    model = make_xformer("dual", init="normal", loss_weights={"itc": 0, "itm": 0, "itg": 0})
    model(batch)["loss"].backward()
    assert model.query_tokens.grad.abs().sum() > 0


@pytest.mark.parametrize(("fusion", "has_term"), [("dual", True), ("none", False), ("concat", False)])
def test_reconstruction_is_there_only_where_it_teaches(
    fusion: str, has_term: bool, make_xformer: Any, batch: dict[str, Any]
) -> None:
    assert ("loss_rec" in make_xformer(fusion)(batch)) is has_term
    for without in ({"loss_weights": {"rec": 0}}, {"mask_ratio": 0.0}, {"mask_ratio": 1e-17}):
        terms = make_xformer("dual", **without)(batch)
        assert "loss_rec" not in terms
        assert torch.isfinite(terms["loss"])


def test_evaluation_tells_the_frozen_maes_own_reconstruction(
    make_xformer: Any, batch: dict[str, Any], tiny_mae_model: Any
) -> None:
    model, noise = make_xformer("dual", init="normal"), torch.rand(4, 16)
    for parameter in model.fusion.parameters():
        torch.nn.init.normal_(parameter)  # M' far from M
    assert "rec_mae" not in model.train()(batch, noise=noise)
    output = model.eval()(batch, noise=noise)
    own = tiny_mae_model(clip_to_mae(batch["image"]), noise=noise).loss
    assert output["rec_mae"].item() == pytest.approx(own.item(), abs=1e-6)
    assert not output["rec_mae"].requires_grad
    assert output["loss_rec"].item() != pytest.approx(own.item(), abs=1e-6)
    assert "rec_mae" not in make_xformer("none").eval()(batch)


def test_packed_and_plain_images_give_the_same_losses(
    make_xformer: Any, batch: dict[str, Any], same_negatives: None
) -> None:
    model = make_xformer("dual", init="normal")
    packed = {**batch, "image": torch.cat([batch["image"], clip_to_mae(batch["image"])], dim=1)}
    noise = torch.rand(4, 16)
    assert torch.allclose(model(packed, noise=noise)["loss"], model(batch, noise=noise)["loss"], atol=1e-6)


@pytest.mark.parametrize("fusion", ["dual", "concat", "early"])
def test_matching_in_retrieval_sees_m(fusion: str, make_xformer: Any, batch: dict[str, Any]) -> None:
    model = make_xformer(fusion, init="normal").eval()
    text = model.tokenize(batch["text_input"])
    _, tokens = model.forward_image(batch["image"])
    scores = model.compute_itm(tokens, text.input_ids, text.attention_mask)
    assert scores.shape == (4,)
    seen = model.encode_image(batch["image"])
    direct = model.match(seen.clip, seen.mae_tokens, text.input_ids, text.attention_mask)[:, 1]
    assert torch.allclose(scores, direct, atol=1e-6)


def test_image_tokens_for_retrieval_are_as_small_as_the_encoders_on_a_gpu(
    make_xformer: Any, batch: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_xformer("dual").eval()
    text = model.tokenize(batch["text_input"])
    _, tokens = model.forward_image(batch["image"])
    assert tokens.dtype == torch.float32
    monkeypatch.setattr(features, "compute_dtype", lambda device, precision: DTYPES[precision])  # as on a GPU
    _, small = model.forward_image(batch["image"])
    assert small.dtype == torch.float16
    scores = [model.compute_itm(of, text.input_ids, text.attention_mask) for of in (tokens, small)]
    torch.testing.assert_close(scores[1], scores[0], rtol=0, atol=1e-2)


def test_hard_negatives_are_those_of_the_generator(make_xformer: Any, batch: dict[str, Any]) -> None:
    model = make_xformer("none")
    values = [model(batch, generator=torch.Generator().manual_seed(5))["loss_itm"].item() for _ in range(2)]
    assert values[0] == values[1]


def test_a_wrong_image_comes_with_its_own_m(make_xformer: Any, batch: dict[str, Any]) -> None:
    model, pairs = make_xformer("dual"), []
    match = model.match
    model.match = lambda *parts: pairs.append(parts) or match(*parts)
    model(batch)
    clip, mae, _, _ = pairs[0]
    drawn = [next(i for i in range(4) if torch.equal(clip[4 + row], clip[i])) for row in range(4)]
    assert all(i != row for row, i in enumerate(drawn))
    assert torch.equal(mae[4:8], mae[drawn])
    assert torch.equal(mae[8:], mae[:4])


def test_a_feature_that_is_not_finite_shows_in_its_losses(make_xformer: Any, batch: dict[str, Any]) -> None:
    batch["image"][0, 0, 0, 0] = float("nan")
    terms = make_xformer("none")(batch)
    assert not torch.isfinite(terms["loss_itc"])


def test_wrong_images_and_weights_are_named(make_xformer: Any, batch: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"model\.loss_weights: 3 is no weight by loss; write \{itc: 3\}"):
        make_xformer("dual", loss_weights=3)
    with pytest.raises(UserError, match=r"model\.loss_weights: 'reco'; did you mean 'rec'"):
        make_xformer("dual", loss_weights={"reco": 1})
    for weight in (None, True, -1, float("nan"), float("inf")):
        with pytest.raises(UserError, match=r"model\.loss_weights\.rec is \S+; it must be (a finite number|0 or more)"):
            make_xformer("dual", loss_weights={"rec": weight})
    with pytest.raises(UserError, match=r"model\.mask_ratio is 0\.99; of 16 patches MAE would see none"):
        make_xformer("dual", mask_ratio=0.99)
    only_rec = {"itc": 0, "itm": 0, "itg": 0}
    with pytest.raises(UserError, match=r"model\.loss_weights: .*'rec': 0}: nothing would be trained"):
        make_xformer("dual", loss_weights={**only_rec, "rec": 0})
    for fusion, options in (("none", {}), ("concat", {}), ("dual", {"mask_ratio": 0})):
        with pytest.raises(UserError, match=r"this model reconstructs nothing .* nothing would be trained"):
            make_xformer(fusion, loss_weights=only_rec, **options)
    with pytest.raises(UserError, match=r"itg_source: 'xform'; did you mean 'xformer'"):
        make_xformer("dual", itg_source="xform")
    with pytest.raises(UserError, match="mask_ratio is 1"):
        make_xformer("dual", mask_ratio=1.0)
    model = make_xformer("dual")
    for mode in (model, partial(model.extract_features, mode="multimodal")):
        with pytest.raises(UserError, match=r"samples\['text_input'\] has 1 strings for 4 images"):
            mode({**batch, "text_input": ["a star"]})
    for texts, said in ((3, "must be a string or a list of strings"), ([3], "must be a string"), ([], "is empty")):
        with pytest.raises(UserError, match=rf"samples\['text_input'\] {said}"):
            model.extract_features({"text_input": texts}, mode="text")
    for name, value in (("max_length", 500), ("max_length", 1), ("num_beams", 0), ("top_p", 0.0), ("min_length", -1)):
        with pytest.raises(UserError, match=f"{name} is {value}"):
            model.generate(batch, **{name: value})
    with pytest.raises(UserError, match="min_length is 10, max_length only 5"):
        model.generate(batch, max_length=5)
    with pytest.raises(UserError, match="32 x 32"):
        model({**batch, "image": torch.zeros(4, 3, 24, 24)})
    with pytest.raises(UserError, match="shape"):
        model({**batch, "image": torch.zeros(4, 1, 32, 32)})


def test_what_a_configuration_says_reaches_the_model(stage2_config: Any) -> None:
    cfg = {name: value for name, value in stage2_config.model.items() if name != "opt_model"}
    said = {"mask_ratio": 0.75, "mask_vl": False, "shuffle_mae": True, "max_txt_len": 7, "vit_precision": "bf16"}
    asked = {"loss_weights": {"rec": 2.0}, "embed_dim": 8, "itg_source": "xformer", "token_positions": ["mae"]}
    blocks = {"fusion_depth": 2, "fusion_self_attention": False, "cross_attention_freq": 1, "mae_norm_pix_loss": False}
    encoder = {"freeze_vit": False, "drop_path_rate": 0.1, "use_grad_checkpoint": True}
    model = XFormer.from_config(OmegaConf.create({**cfg, **said, **asked, **blocks, **encoder}))
    assert {name: getattr(model, name) for name in said} == said
    assert model.loss_weights == {"itc": 1, "itm": 1, "itg": 1, "rec": 2}
    assert (model.vision_proj.out_features, model.token_positions) == (8, {"mae"})
    assert model.itg_reader.cross_attention.heads == 4
    assert model.itg_reader.cross_attention.out.weight.any(), "fusion_init is normal"
    assert [block.self_attention for block in model.fusion.enrich_blocks] == [None, None]
    assert all(layer.has_cross_attention for layer in model.Qformer.bert.encoder.layer)
    assert model.mae.model.config.norm_pix_loss is False, "though the checkpoint says True"
    assert any(parameter.requires_grad for parameter in model.visual_encoder.parameters())
    assert model.visual_encoder.use_checkpoint
    assert model.visual_encoder.blocks[-1].drop_path.drop_prob == pytest.approx(0.1)
    with pytest.raises(UserError, match=r"model\.mae_image_size is 64, but .* 32 pixels"):
        XFormer.from_config(OmegaConf.create({**cfg, "mae_image_size": 64}))
    with pytest.raises(UserError, match=r"model\.max_txt_len is 500; the Q-Former reads at most \d+ tokens"):
        XFormer.from_config(OmegaConf.create({**cfg, "max_txt_len": 500}))


def test_options_of_a_class_of_ones_own_reach_its_constructor(stage2_config: Any) -> None:
    class Mine(XFormer):
        def __init__(self, *, aux_weight: float = 0.1, **parts: Any) -> None:
            super().__init__(**parts)
            self.aux_weight = aux_weight

    assert "aux_weight" in Mine.CONFIG_KEYS
    assert "aux_weight" not in XFormer.CONFIG_KEYS
    assert Mine.from_config(OmegaConf.merge(stage2_config.model, {"aux_weight": 0.7})).aux_weight == 0.7


def test_an_image_whose_border_clip_would_not_see_is_refused(stage2_config: Any) -> None:
    with pytest.raises(UserError, match=r"image_size is 36; .* not see the border: take a multiple of 8"):
        XFormer.from_config(OmegaConf.merge(stage2_config.model, {"image_size": 36}))


def test_what_a_configuration_leaves_out_is_as_in_the_paper(stage2_config: Any) -> None:
    model = XFormer.from_config(stage2_config.model)
    assert (model.mask_ratio, model.mask_vl, model.loss_weights) == (0.5, True, XFormer.LOSS_WEIGHTS)
    assert (model.itg_reader, model.max_txt_len, model.vision_proj.out_features) == (None, 32, 256)  # BLIP-2's
    assert model.temp.item() == pytest.approx(0.07)
    assert not any(parameter.requires_grad for parameter in model.visual_encoder.parameters())


def test_losses_fall_when_a_batch_is_learned_by_heart(make_xformer: Any, batch: dict[str, Any]) -> None:
    model = make_xformer("dual")
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=3e-3)
    torch.manual_seed(0)
    history = []
    for _ in range(40):
        output = model(batch)
        optimizer.zero_grad()
        output["loss"].backward()
        optimizer.step()
        history.append({name: value.item() for name, value in output.items()})

    def mean(name: str, steps: slice) -> float:
        return statistics.mean(entry[name] for entry in history[steps])

    for name in ("loss_itc", "loss_itm", "loss_itg"):  # the images are noise: nothing to reconstruct
        assert mean(name, slice(-5, None)) < mean(name, slice(5)), name
    assert mean("loss_itg", slice(-5, None)) < 0.7 * mean("loss_itg", slice(5))


def test_what_is_no_dict_of_samples_is_one_clear_line(make_xformer: Any, batch: dict[str, Any]) -> None:
    model = make_xformer().eval()
    for call in (model, model.generate, model.extract_features):
        with pytest.raises(UserError, match="samples is a Tensor; give a dict"):
            call(batch["image"])
    with pytest.raises(UserError, match=r"samples\['image'\] is missing; given: \['text_input'\]"):
        model({"text_input": batch["text_input"]})


def test_tokens_are_split_where_m_begins_though_c_has_another_number(make_xformer: Any) -> None:
    joined = torch.arange(5 + 17.0)[None, :, None]  # as of a CLIP with other patches than MAE's 16
    clip, mae = make_xformer("dual").split_tokens(joined, dim=1)
    assert (clip.shape[1], float(mae[0, 0, 0])) == (5, 5.0)


def test_a_ratio_that_leaves_no_patch_is_refused_and_one_that_leaves_some_reconstructs(make_xformer: Any) -> None:
    with pytest.raises(UserError, match=r"of 16 patches MAE would see none"):
        make_xformer("dual", mask_ratio=0.95)  # 0.8 of a patch, and MAE rounds down
    assert make_xformer("dual", mask_ratio=0.02).reconstructs  # 15.7 patches: one is hidden


def test_queries_start_as_small_as_berts_weights(make_xformer: Any) -> None:
    model = make_xformer("dual")
    assert float(model.query_tokens.detach().std()) == pytest.approx(model.Qformer.config.initializer_range, rel=0.3)


def test_features_of_a_text_are_those_of_all_of_it_and_not_of_the_training_length(make_xformer: Any) -> None:
    model = make_xformer("dual").eval()
    text = {"text_input": [" ".join(["red"] * 20)]}
    assert model.max_txt_len < 22
    assert model.extract_features(text, mode="text").text_embeds.shape[1] == 22  # with [CLS] and [SEP]


def test_the_captions_reader_starts_as_large_as_berts_weights(make_parts: Any) -> None:
    parts = make_parts("dual", "identity")
    parts["qformer"].config.initializer_range = 0.5
    model = XFormer(**parts, embed_dim=16, itg_source="xformer", fusion_init="normal")
    largest = max(float(p.detach().std()) for p in model.itg_reader.parameters() if p.dim() == 2)
    assert largest == pytest.approx(0.5, rel=0.2)
