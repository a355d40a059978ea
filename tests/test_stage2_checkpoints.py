"""Stage 2 starts from stage 1, from BLIP-2's files and from its own; what doesn't fit is named."""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from test_checkpoints import Malicious, config, perturb, trainable_state
from test_stage1 import blip2_like
from test_stage2 import blip2_opt_like, blip2_t5_like

from lavis_xformer.errors import UserError
from lavis_xformer.models.checkpoints import load_pretrained
from lavis_xformer.models.stage2 import XFormerOPT
from lavis_xformer.state_dicts import trainable_state as runner_state


def lavis_saves(model: torch.nn.Module) -> dict[str, Any]:
    """What LAVIS's runner writes: frozen parameters are left out, but a tied one leaks under its second name."""
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    state = {name: tensor for name, tensor in model.state_dict().items() if name not in frozen}
    return {"model": state, "optimizer": {}, "config": {}, "scaler": None, "epoch": 1}


@pytest.fixture
def stage1(make_xformer: Any) -> Any:
    """A trained stage-1 model."""
    return perturb(make_xformer("dual", init="normal")).eval()


def test_stage1_starts_stage2(stage1: Any, make_stage2: Any, batch: dict[str, Any], tmp_path: Path) -> None:
    torch.save({"model": trainable_state(stage1)}, tmp_path / "stage1.pth")
    model = make_stage2("opt").eval()
    report = load_pretrained(model, config(pretrained=str(tmp_path / "stage1.pth")))
    assert report is not None
    assert set(report.missing_new) == {"opt_proj.weight", "opt_proj.bias"}
    assert {name.split(".")[0] for name in report.missing_built} <= {"visual_encoder", "mae", "opt_model", "Qformer"}
    assert {name for name in report.unused if not name.startswith("Qformer")} == {
        "temp", "vision_proj.weight", "vision_proj.bias", "text_proj.weight", "text_proj.bias", "itm_head.weight",
        "itm_head.bias",
    }  # fmt: skip
    expected = stage1.extract_features(batch, "image").image_embeds
    assert torch.equal(model.extract_features(batch).image_embeds, expected)


def test_round_trip_without_frozen_weights(make_stage2: Any, batch: dict[str, Any], tmp_path: Path) -> None:
    trained, fresh = perturb(make_stage2("opt", init="normal")), make_stage2("opt")
    state = runner_state(trained)
    assert not [name for name in state if name.startswith(("opt_model", "visual_encoder", "mae"))]
    assert sum(tensor.numel() for tensor in state.values()) == pytest.approx(
        sum(p.numel() for p in trained.parameters() if p.requires_grad), abs=32
    )  # 32 positions are a buffer
    torch.save({"model": state}, tmp_path / "stage2.pth")
    load_pretrained(fresh, config(pretrained=str(tmp_path / "stage2.pth")))
    assert torch.equal(fresh.eval()(batch)["loss"], trained.eval()(batch)["loss"])


@pytest.mark.parametrize("kind", ["opt", "t5"])
def test_blip2_stage2_files_start_x_former_exactly(
    kind: str, make_stage2: Any, batch: dict[str, Any], tmp_path: Path, opt_folder: Path, t5_folder: Path
) -> None:
    like, folder = {"opt": (blip2_opt_like, opt_folder), "t5": (blip2_t5_like, t5_folder)}[kind]
    blip2 = perturb(like(make_stage2(kind, "none"), folder)).eval()
    saved = lavis_saves(blip2)
    if kind == "opt":
        assert "opt_model.lm_head.weight" in saved["model"], "LAVIS's files hold the tied head"
        saved["model"]["opt_model.lm_head.weight"] = torch.zeros(3, 3)
    torch.save(saved, tmp_path / "blip2_pretrained_llm.pth")
    xformer = make_stage2(kind, "dual").eval()
    report = load_pretrained(xformer, config(blip2_pretrained=str(tmp_path / "blip2_pretrained_llm.pth")))
    assert report is not None
    assert {name.split(".")[0] for name in report.missing_new} == {"fusion"}
    assert {name.split(".")[0] for name in report.unused} <= {f"{kind}_model"}
    texts = {**batch, "text_output": batch["text_input"]} if kind == "t5" else batch
    assert torch.allclose(xformer(texts)["loss"], blip2(texts)["loss"], atol=1e-6)
    said = [model.generate({**batch, "prompt": "a"}, num_beams=3, max_length=8) for model in (xformer, blip2)]
    assert said[0] == said[1]


def test_blip2_captioning_files_bring_their_own_image_encoder(
    make_stage2: Any, batch: dict[str, Any], tmp_path: Path, opt_folder: Path
) -> None:
    source = make_stage2("opt", "none", prompt="a photo of")
    blip2 = blip2_opt_like(source, opt_folder)
    blip2.visual_encoder.requires_grad_(True)
    perturb(blip2).eval()
    torch.save(lavis_saves(blip2), tmp_path / "blip2_caption_opt.pth")
    xformer = make_stage2("opt", "dual", prompt="a photo of").eval()
    load_pretrained(xformer, config(blip2_pretrained=str(tmp_path / "blip2_caption_opt.pth")))
    assert torch.equal(xformer.visual_encoder.pos_embed, blip2.visual_encoder.pos_embed)
    assert xformer.generate(batch, num_beams=3) == blip2.generate(batch, num_beams=3)


def test_a_training_on_the_frozen_image_encoder_of_a_blip2_file_comes_back_with_it_alone(
    make_stage2: Any, batch: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("blip2", "other"):
        source = make_stage2("opt", "none", freeze_vit=False)
        torch.save({"model": trainable_state(perturb(perturb(source) if name == "other" else source))}, tmp_path / name)
    trained = make_stage2("opt", "dual").eval()
    load_pretrained(trained, config(blip2_pretrained=str(tmp_path / "blip2")))
    torch.save({"model": runner_state(perturb(trained))}, tmp_path / "run.pth")
    own = {"pretrained": str(tmp_path / "run.pth")}

    again = make_stage2("opt", "dual").eval()
    load_pretrained(again, config(**own, blip2_pretrained=str(tmp_path / "blip2")))
    assert torch.equal(again(batch)["loss"], trained(batch)["loss"])
    assert "record the image encoder" not in caplog.text
    for keys in (own, {**own, "blip2_pretrained": str(tmp_path / "other")}):
        for freeze in (True, False):
            with pytest.raises(
                UserError, match=r"frozen image encoder from another file.* set model\.blip2_pretrained"
            ):
                load_pretrained(make_stage2("opt", "dual", freeze_vit=freeze), config(**keys))

    torch.save({"model": trainable_state(trained)}, tmp_path / "unmarked.pth")
    load_pretrained(again, config(**{**own, "pretrained": str(tmp_path / "unmarked.pth")}))
    assert "unmarked.pth doesn't record the image encoder that is loaded" in caplog.text

    tuned = make_stage2("opt", "dual", freeze_vit=False)
    load_pretrained(tuned, config(**own, blip2_pretrained=str(tmp_path / "blip2")))
    torch.save({"model": runner_state(perturb(tuned))}, tmp_path / "tuned.pth")
    alone = make_stage2("opt", "dual")
    load_pretrained(alone, config(pretrained=str(tmp_path / "tuned.pth")))  # it holds an image encoder of its own
    assert torch.equal(alone.visual_encoder.cls_token, tuned.visual_encoder.cls_token)


def test_an_image_encoder_is_known_again_at_another_size_and_through_half_precision(
    make_stage2: Any, tmp_path: Path
) -> None:
    source = trainable_state(perturb(make_stage2("opt", "none", freeze_vit=False)))
    grid = torch.nn.functional.pad(torch.ones(1, 36, 20), (0, 0, 1, 0))  # 6 x 6 places
    marks = []
    for change in ({}, {"visual_encoder.pos_embed": grid}, {"visual_encoder.cls_token": torch.ones(1, 1, 20)}):
        torch.save({"model": source | change}, tmp_path / "blip2.pth")
        model = make_stage2("opt", "none")
        model.visual_encoder.blocks.half()  # as on a GPU
        load_pretrained(model, config(pretrained=str(tmp_path / "blip2.pth")))
        marks.append(model.state_dict()["brought_clip"])
    assert torch.equal(marks[0], marks[1])
    assert not torch.equal(marks[0], marks[2])


def test_a_file_with_every_weight_is_no_file_with_another_image_encoder(
    make_stage2: Any, batch: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = perturb(make_stage2("opt")).eval()
    torch.save(whole.state_dict(), tmp_path / "whole.pth")
    torch.save({f"module.{name}": weight for name, weight in whole.state_dict().items()}, tmp_path / "ddp.pth")
    for name in ("whole.pth", "ddp.pth"):
        again = make_stage2("opt").eval()
        report = again.load_checkpoint(tmp_path / name)
        assert torch.equal(again(batch)["loss"], whole(batch)["loss"])
        assert again.state_dict().keys() == whole.state_dict().keys()
        frozen = ("visual_encoder.", "mae.", "opt_model.")
        assert not any(loaded.startswith(frozen) for loaded in report.loaded), "else an export has them too"
    assert not [record for record in caplog.records if record.levelname == "WARNING"]


def test_a_blip2_file_with_the_models_own_image_encoder_marks_what_is_trained_on_it(
    make_stage2: Any, tmp_path: Path
) -> None:
    torch.save(make_stage2("opt", "none").state_dict(), tmp_path / "blip2.pth")
    trained = make_stage2("opt")
    load_pretrained(trained, config(blip2_pretrained=str(tmp_path / "blip2.pth")))
    torch.save({"model": runner_state(perturb(trained)) | {"brought_clip": trained.brought_clip}}, tmp_path / "run.pth")
    again = make_stage2("opt")
    keys = {"blip2_pretrained": str(tmp_path / "blip2.pth"), "pretrained": str(tmp_path / "run.pth")}
    load_pretrained(again, config(**keys))
    assert torch.equal(again.opt_proj.weight, trained.opt_proj.weight)


def test_a_language_model_trained_by_the_user_is_loaded_where_it_is_trainable_and_told_elsewhere(
    make_stage2: Any, batch: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tuned = make_stage2("opt").eval()
    tuned.opt_model.requires_grad_(True)
    torch.save({"model": perturb(tuned).state_dict()}, tmp_path / "tuned.pth")
    again = make_stage2("opt").eval()
    again.load_checkpoint(tmp_path / "tuned.pth")
    assert "tuned.pth holds another language model, which is not loaded (opt_model.model.decoder" in caplog.text
    assert not torch.equal(again(batch)["loss"], tuned(batch)["loss"])
    again.opt_model.requires_grad_(True)
    again.load_checkpoint(tmp_path / "tuned.pth")
    assert torch.equal(again(batch)["loss"], tuned(batch)["loss"])


def load_whole(model: Any, folder: Path) -> Any:
    """The model, once it has loaded a file with all of its weights."""
    torch.save(model.state_dict(), folder / "whole.pth")
    model.load_checkpoint(folder / "whole.pth")
    return model


def test_a_model_that_is_given_a_file_of_stage_1_keeps_its_projection_and_says_so(
    stage1: Any, make_stage2: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    torch.save({"model": trainable_state(stage1)}, tmp_path / "stage1.pth")
    model = make_stage2("opt")
    kept = model.opt_proj.weight.clone()
    model.load_checkpoint(tmp_path / "stage1.pth")
    assert "stage1.pth has no opt_proj.bias, opt_proj.weight, which stay as they are" in caplog.text
    assert torch.equal(model.opt_proj.weight, kept)
    assert model.untrained == "opt_proj.bias, opt_proj.weight"
    assert make_stage2("opt").untrained == "all"
    assert not load_whole(make_stage2("opt"), tmp_path).untrained


def test_blip2_stage1_files_start_both_stages(
    make_xformer: Any, make_stage2: Any, batch: dict[str, Any], tmp_path: Path
) -> None:
    blip2 = perturb(blip2_like(make_xformer("none"))).eval()
    torch.save(lavis_saves(blip2), tmp_path / "blip2_pretrained.pth")
    stage1, stage2 = make_xformer("dual").eval(), make_stage2("opt", "dual").eval()
    for model in (stage1, stage2):
        load_pretrained(model, config(blip2_pretrained=str(tmp_path / "blip2_pretrained.pth")))
    expected = blip2.extract_features(batch, "image")
    assert torch.equal(stage1.extract_features(batch, "image").image_embeds_proj, expected.image_embeds_proj)
    assert torch.equal(stage2.extract_features(batch).image_embeds, expected.image_embeds)


def test_wrong_files_are_one_line_each(make_xformer: Any, make_stage2: Any, stage1: Any, tmp_path: Path) -> None:
    def save(name: str, model: Any, without: str = "", **changes: torch.Tensor) -> str:
        state = {key: value for key, value in trainable_state(model).items() if key != without}
        torch.save({"model": {**state, **changes}}, tmp_path / name)
        return str(tmp_path / name)

    def refused(words: str, model: Any, **keys: str) -> None:
        before = deepcopy(model.state_dict())
        with pytest.raises(UserError, match=words) as caught:
            load_pretrained(model, config(**keys))
        assert "\n" not in str(caught.value)
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())

    opt, t5, blip2 = make_stage2("opt"), make_stage2("t5"), make_stage2("opt", "none")
    refused(r"missing: opt_proj.*unknown: t5_proj", opt, pretrained=save("t5.pth", t5))
    refused(r"opt\.pth' is a checkpoint of stage 2; stage 1 can't", stage1, pretrained=save("opt.pth", opt))
    refused(r"checkpoint of BLIP-2.*model\.blip2_pretrained", opt, pretrained=save("blip2.pth", blip2))
    refused(r"checkpoint of X-Former; set model\.pretrained", opt, blip2_pretrained=save("own.pth", opt))
    refused(r"unknown: fusion", blip2, pretrained=str(tmp_path / "own.pth"))
    wide = save("wide.pth", opt, **{"opt_proj.weight": torch.zeros(64, 32)})
    refused(r"opt_proj\.weight \(64, 32\) instead of \(32, 32\)", opt, pretrained=wide)
    refused(r"missing: opt_proj\.weight", opt, pretrained=save("torn.pth", opt, without="opt_proj.weight"))
    lost = save("lost.pth", stage1, without="ln_vision.weight")
    refused(r"missing: ln_vision\.weight", opt, pretrained=lost)


def test_language_models_that_are_not_there_or_of_another_kind(
    opt_folder: Path, t5_folder: Path, tmp_path: Path
) -> None:
    build = XFormerOPT.LANGUAGE.from_source
    with pytest.raises(UserError, match=r"model\.opt_model: 'facebook/none' is not a local path.*set model\.opt_model"):
        build("facebook/none")
    with pytest.raises(UserError, match=r"model\.opt_model: '.*' is a model of type 't5', not 'opt'"):
        build(str(t5_folder))
    for name in ("config.json", "vocab.json", "merges.txt", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((opt_folder / name).read_bytes())
    torch.save({"lm_head.weight": Malicious(tmp_path / "owned")}, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"model\.opt_model: '.*' can't be read"):
        build(str(tmp_path))
    assert not (tmp_path / "owned").exists()
    weights = torch.load(opt_folder / "pytorch_model.bin", weights_only=True)
    torch.save({name: weights[name] for name in weights if "layers.1.fc1" not in name}, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"lacks weights, .*layers\.1\.fc1"):
        build(str(tmp_path))
    vocabulary = json.loads((opt_folder / "vocab.json").read_text())
    said = json.loads((opt_folder / "tokenizer_config.json").read_text())
    torch.save(weights, tmp_path / "pytorch_model.bin")
    (tmp_path / "vocab.json").write_text(json.dumps({**vocabulary, "more": len(vocabulary)}))
    with pytest.raises(UserError, match=rf"has {len(vocabulary) + 1} tokens, its model only {len(vocabulary)}"):
        build(str(tmp_path))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({k: v for k, v in said.items() if k != "pad_token"}))
    with pytest.raises(UserError, match=r"tokenizer of '.*' has no pad_token; add it to its tokenizer_config\.json"):
        build(str(tmp_path))
    with pytest.raises(UserError, match=r"model\.llm_precision: 'fp8'"):
        build(str(opt_folder), precision="fp8")  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"model\.opt_model is None; it must be text"):
        build(None)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"no 'pretrain_opt2.8b'; did you mean 'pretrain_opt2.7b'"):
        XFormerOPT.default_config_path("pretrain_opt2.8b")


def test_a_whole_configuration_builds(stage2_config: Any, batch: dict[str, Any]) -> None:
    said = {"prompt": "a photo of", "vqa_prompt": "Q: {} A:", "vqa_length_penalty": -2.0, "apply_lemmatizer": True}
    said |= {"mask_ratio": 0.75, "prefix_lm": True, "shuffle_mae": True, "vit_precision": "bf16"}
    of_language = {"max_txt_len": 16, "llm_precision": "bf16"}
    stage2_config.model |= {**said, **of_language, "loss_weights": {"rec": 1}}
    model = XFormerOPT.from_config(stage2_config.model).eval()
    assert {name: getattr(model, name) for name in said} == said
    assert (model.language.max_txt_len, model.language.precision) == (16, "bf16")
    assert len(model.generate(batch, num_beams=2, max_length=5)) == 4
    assert "loss_rec" in model(batch)


def test_what_a_configuration_leaves_out_is_as_in_the_paper(stage2_config: Any) -> None:
    model = XFormerOPT.from_config(stage2_config.model)
    assert (model.mask_ratio, model.prefix_lm, model.loss_weights) == (0.5, False, {"lm": 1, "rec": 0})
    assert (model.prompt, model.vqa_prompt) == ("", "Question: {} Short answer:")


def test_the_fusion_alone_on_top_of_blip2(make_stage2: Any, batch: dict[str, Any], tmp_path: Path) -> None:
    torch.save({"model": trainable_state(perturb(make_stage2("opt", "none")))}, tmp_path / "blip2.pth")
    keys = {"blip2_pretrained": str(tmp_path / "blip2.pth"), "train_only": ["fusion"]}
    model = make_stage2("opt", "dual")
    load_pretrained(model, config(**keys))
    assert {n.split(".")[0] for n, p in model.named_parameters() if p.requires_grad} == {"fusion"}
    model.train()
    assert not model.Qformer.bert.encoder.layer[0].training
    model(batch)["loss"].backward()
    assert model.fusion.enrich_blocks[0].cross_attention.out.weight.grad.abs().sum() > 0
    perturb(model)

    state = runner_state(model)
    assert {name.split(".")[0] for name in state} == {"fusion"}
    torch.save({"model": state}, tmp_path / "fusion.pth")
    again = make_stage2("opt", "dual")
    load_pretrained(again, config(**keys, pretrained=str(tmp_path / "fusion.pth")))
    assert torch.equal(again(batch)["loss"], model(batch)["loss"])
    as_documented = make_stage2("opt", "dual", init="normal")  # docs/stage2.md: "beside the same blip2_pretrained"
    both = {"blip2_pretrained": keys["blip2_pretrained"], "pretrained": str(tmp_path / "fusion.pth")}
    report = load_pretrained(as_documented, config(**both))
    assert torch.equal(as_documented(batch)["loss"], model(batch)["loss"])
    assert report.missing_new == ()
    assert as_documented.query_tokens.requires_grad
    torn = {name: tensor for name, tensor in state.items() if not name.endswith("out.weight")}
    torch.save({"model": torn}, tmp_path / "torn.pth")
    with pytest.raises(UserError, match=r"missing: fusion\.\S+out\.weight"):
        load_pretrained(as_documented, config(**{**both, "pretrained": str(tmp_path / "torn.pth")}))
    with pytest.raises(UserError, match="missing: Qformer"):
        load_pretrained(make_stage2("opt", "dual"), config(pretrained=str(tmp_path / "fusion.pth")))
    torch.save({"model": state, "config": {"model": {"arch": "xformer_opt", **keys}}}, tmp_path / "told.pth")
    with pytest.raises(UserError, match=r"missing: Qformer.*\. It holds only \['fusion'\]: set .* on, .*/blip2\.pth$"):
        load_pretrained(make_stage2("opt", "dual"), config(pretrained=str(tmp_path / "told.pth")))
    whole = {"model": trainable_state(make_stage2("opt")), "config": {"model": {"arch": "xformer_opt"}}}
    torch.save(whole, tmp_path / "whole.pth")
    with pytest.raises(UserError, match=r"missing: t5_proj.* unknown: opt_proj.*\. It is of model\.arch xformer_opt$"):
        load_pretrained(make_stage2("t5"), config(arch="xformer_t5", pretrained=str(tmp_path / "whole.pth")))
    for own in (None, str(tmp_path / "fusion.pth")):  # what it would train could be loaded by no key
        with pytest.raises(UserError, match=r"model\.train_only keeps everything else .* set model\.blip2_pretrained"):
            load_pretrained(make_stage2("opt", "dual"), config(train_only=["fusion"], pretrained=own))
    with pytest.raises(UserError, match=r"train_only: 'mae' can't be trained; .*fusion"):
        load_pretrained(make_stage2("opt", "dual"), config(**{**keys, "train_only": ["mae"]}))


@pytest.mark.parametrize("parts", [["Qformer"], ["opt_proj"], ["Qformer", "opt_proj"]])
def test_parts_other_than_the_fusion_come_back_too(
    parts: list[str], make_stage2: Any, batch: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    torch.save({"model": trainable_state(perturb(make_stage2("opt", "none")))}, tmp_path / "blip2.pth")
    keys = {"blip2_pretrained": str(tmp_path / "blip2.pth"), "train_only": parts}
    trained, again = make_stage2("opt", "dual"), make_stage2("opt", "dual")
    load_pretrained(trained, config(**keys))
    torch.save({"model": runner_state(perturb(trained))}, tmp_path / "run.pth")
    report = load_pretrained(again, config(**keys, pretrained=str(tmp_path / "run.pth")))
    assert torch.equal(again(batch)["loss"], trained(batch)["loss"])
    assert {name.split(".")[0] for name in report.missing_new} == {"fusion"}, "of neither file"
    assert not [name for name in report.missing_built if name.startswith("fusion")]
    assert "model.train_only freezes weights that are in no file and no checkpoint: fusion." in caplog.text


def test_a_fusion_of_stage_1_alone_starts_stage_2(make_xformer: Any, make_stage2: Any, tmp_path: Path) -> None:
    torch.save({"model": trainable_state(perturb(make_xformer("none")))}, tmp_path / "blip2.pth")
    keys = {"blip2_pretrained": str(tmp_path / "blip2.pth")}
    stage1, stage2 = make_xformer("dual"), make_stage2("opt", "dual")
    load_pretrained(stage1, config(**keys, train_only=["fusion"]))
    fusion = runner_state(perturb(stage1))
    torch.save({"model": fusion}, tmp_path / "fusion.pth")
    own = {"train_only": ["fusion", "opt_proj"], "pretrained": str(tmp_path / "fusion.pth")}
    report = load_pretrained(stage2, config(**keys, **own))
    assert set(report.missing_new) == {"opt_proj.weight", "opt_proj.bias"}
    assert stage2.opt_proj.weight.requires_grad
    for name, tensor in fusion.items():
        assert torch.equal(stage2.state_dict()[name], tensor), name
    with pytest.raises(UserError, match=r"checkpoint of BLIP-2.*model\.blip2_pretrained"):
        load_pretrained(make_stage2("opt", "dual"), config(**keys, **{**own, "pretrained": keys["blip2_pretrained"]}))


def test_an_image_encoder_to_be_tuned_comes_from_its_own_file(make_stage2: Any, tmp_path: Path) -> None:
    torch.save({"model": trainable_state(make_stage2("opt"))}, tmp_path / "stage2.pth")
    model = make_stage2("opt", freeze_vit=False)
    report = load_pretrained(model, config(pretrained=str(tmp_path / "stage2.pth")))
    assert not report.missing_new, "it is not new"
    assert "visual_encoder.pos_embed" in report.missing_built
    state = trainable_state(model)
    del state["visual_encoder.pos_embed"]
    torch.save({"model": state}, tmp_path / "torn.pth")
    with pytest.raises(UserError, match=r"missing: visual_encoder\.pos_embed"):
        load_pretrained(model, config(pretrained=str(tmp_path / "torn.pth")))


def test_an_image_encoder_tuned_at_another_size_comes_with_its_positions(make_stage2: Any, tmp_path: Path) -> None:
    larger = make_stage2("opt", freeze_vit=False)
    state = trainable_state(perturb(larger))
    grid = torch.nn.functional.pad(torch.ones(1, 36, 20), (0, 0, 1, 0))  # 6 x 6 places of 48 px, CLS first
    torch.save({"model": {**state, "visual_encoder.pos_embed": grid.half()}}, tmp_path / "larger.pth")
    model = make_stage2("opt")
    load_pretrained(model, config(pretrained=str(tmp_path / "larger.pth")))
    assert torch.allclose(model.visual_encoder.pos_embed, grid[:, :17], atol=1e-3)
    assert torch.equal(model.visual_encoder.cls_token, larger.visual_encoder.cls_token)


def test_a_pad_token_that_the_model_has_no_embedding_for_is_refused(opt_folder: Path, tmp_path: Path) -> None:
    for file in opt_folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    said = json.loads((opt_folder / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**said, "pad_token": "<filler>"}))
    known = len(json.loads((opt_folder / "vocab.json").read_text()))
    with pytest.raises(UserError, match=rf"has {known + 1} tokens, its model only {known}"):
        XFormerOPT.LANGUAGE.from_source(str(tmp_path))
