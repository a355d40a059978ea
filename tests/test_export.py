"""Export: what a checkpoint brings comes back bit for bit from a folder that may have moved."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lavis.common.registry import registry
from omegaconf import OmegaConf
from PIL import Image
from test_checkpoints import Malicious, perturb, trainable_state

import lavis_xformer
from lavis_xformer import cli
from lavis_xformer.errors import UserError
from lavis_xformer.export import _take_normalisation, export
from lavis_xformer.files import sha256
from lavis_xformer.images import CLIP_MEAN
from lavis_xformer.models.stage1 import XFormer
from lavis_xformer.models.stage2 import XFormerOPT
from lavis_xformer.state_dicts import trainable_state as runner_state


@pytest.fixture
def trained(stage2_config: Any) -> XFormerOPT:
    torch.manual_seed(0)
    return perturb(XFormerOPT.from_config(stage2_config.model)).eval()


@pytest.fixture
def checkpoint(trained: XFormerOPT, stage2_config: Any, tmp_path: Path) -> Path:
    """A checkpoint as the runner writes it, after two epochs of two steps, and the log beside it."""
    scenes = {"preset": "easy", "splits": {"train": {"n": 8}}}
    stage2_config.preprocess.vis_processor.eval.mae_image_size = 16  # as image_size, not the model's
    said = {"run": {"task": "xformer_stage2"}, "datasets": {"scenes": scenes}}
    content = {
        "model": runner_state(trained),
        "config": {**OmegaConf.to_container(stage2_config), **said},
        "position": {"steps": 4},
        "best": {"answers": 50.5},
        "rng": [{}, {}],  # of two processes
    }
    torch.save(content, tmp_path / "run.pth")
    records = [{"kind": "step", "step": 2}]
    records += [{"kind": "eval", "split": "val", "step": n, "answers": r} for n, r in ((2, 50.5), (4, 61.5), (6, 70.5))]
    records[1]["captions"] = 33.5  # in the first evaluation only
    (tmp_path / "log.jsonl").write_text("\n".join(map(json.dumps, records)))
    return tmp_path / "run.pth"


def elsewhere(folder: Path) -> list[str]:
    """The frozen parts that an exported folder's card says are not in it."""
    (line,) = [row for row in (folder / "README.md").read_text().splitlines() if "frozen parts, not here" in row]
    return [part.split(":")[0] for part in line.split("|")[2].strip().split(", ")]


def assert_equal(model: Any, other: Any) -> None:
    assert model.state_dict().keys() == other.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name


def test_a_folder_gives_the_model_back_bit_for_bit(
    trained: XFormerOPT, checkpoint: Path, batch: dict[str, Any], tmp_path: Path, capsys: Any
) -> None:
    assert cli.main(["export", str(checkpoint), str(tmp_path / "first")]) == 0
    assert "from_folder" in capsys.readouterr().out
    checkpoint.unlink()
    folder = (tmp_path / "first").rename(tmp_path / "moved")
    assert {path.name for path in folder.iterdir()} == {"model.safetensors", "config.yaml", "README.md"}
    assert (folder / "model.safetensors").stat().st_mode & 0o777 == 0o644, "others may read it"
    card = (folder / "README.md").read_text()
    assert f"| model.safetensors | `{sha256(folder / 'model.safetensors')}` |" in card
    assert "61.5" in card, "what was measured with these weights"
    assert not [figure for figure in ("33.5", "50.5", "70.5") if figure in card], "before and after"
    assert "task xformer_stage2, processes 2" in card
    assert 'scenes {"preset": "easy", "n": 8}' in card

    model, vis, text = lavis_xformer.from_folder(folder)
    assert_equal(model, trained)
    assert not model.training
    assert lavis_xformer.from_folder(folder, is_eval=False)[0].training
    assert model.generate(batch, num_beams=2) == trained.generate(batch, num_beams=2)
    views = vis["eval"](Image.new("RGB", (50, 40)))
    assert views.shape == (6, 32, 32), "the processors fit the model"
    assert views[:, -1, -1].all(), "both of its encoders"
    assert text["eval"]("A star.") == "a star"

    from lavis.models import load_model_and_preprocess

    again, *_ = load_model_and_preprocess("xformer_opt", str(folder), is_eval=True)
    assert_equal(again, trained)


def test_a_run_whose_type_is_a_folder_loads_its_weights(trained: XFormerOPT, checkpoint: Path, tmp_path: Path) -> None:
    from lavis_xformer.config.load import load_config

    lavis_xformer.register()
    (tmp_path / "out").mkdir()  # which may be there, empty
    folder = export(checkpoint, tmp_path / "out")
    run = {
        "model": {"arch": "xformer_opt", "model_type": str(folder)},
        "datasets": {"xformer_scenes_vqa": {}},
        "run": {"task": "xformer_stage2", "output_dir": str(tmp_path)},
    }
    OmegaConf.save(run, tmp_path / "run.yaml")
    by_options = tmp_path / "options.yaml"
    OmegaConf.save(run | {"model": {"arch": "xformer_opt", "model_type": "mini", "pretrained": None}}, by_options)
    for config in (
        load_config(str(tmp_path / "run.yaml")),
        load_config(str(by_options), [f"model.model_type={folder}"]),  # as of the shipped projects
        load_config(str(by_options), [f"model.model_type={folder}", "model.pretrained=null"]),
    ):
        assert_equal(XFormerOPT.from_config(config.model_cfg), trained)
    own = load_config(str(by_options), [f"model.model_type={folder}", "model.pretrained=mine.pth"])
    assert own.model_cfg.pretrained == "mine.pth"


def test_frozen_parts_named_by_a_relative_path_are_found_from_anywhere(
    stage2_config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = Path(stage2_config.model.opt_model)
    monkeypatch.chdir(own.parent)
    stage2_config.model.opt_model = own.name
    trained = perturb(XFormerOPT.from_config(stage2_config.model))
    torch.save({"model": runner_state(trained), "config": OmegaConf.to_container(stage2_config)}, tmp_path / "run.pth")
    folder = export(tmp_path / "run.pth", tmp_path / "out")
    monkeypatch.chdir(tmp_path)
    assert_equal(lavis_xformer.from_folder(folder)[0], trained)


def test_a_file_saved_by_hand_keeps_the_settings_that_it_records(
    stage2_config: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cfg = OmegaConf.merge(stage2_config.model, {"token_positions": ["clip"]})
    model = perturb(XFormerOPT.from_config(cfg))
    told = {
        "model": OmegaConf.to_container(model.built_from),
        "preprocess": OmegaConf.to_container(stage2_config.preprocess),
    }
    torch.save({"model": model.state_dict(), "config": told}, tmp_path / "own.pth")
    folder = export(tmp_path / "own.pth", tmp_path / "own")
    again = lavis_xformer.from_folder(folder)[0]
    assert_equal(again, model)
    assert again.token_positions == {"clip"}
    assert "vit_model" in elsewhere(folder), "the frozen encoder stays where it is"
    assert "record its settings" not in caplog.text
    torch.save(model.state_dict(), tmp_path / "bare.pth")
    with pytest.raises(UserError, match="doesn't fit XFormerOPT"):  # of toy size
        export(tmp_path / "bare.pth", tmp_path / "bare", arch="xformer_opt", model_type="mini")
    assert "bare.pth doesn't record its settings: those of " in caplog.text


def test_the_folder_normalises_images_as_the_run_did(checkpoint: Path, tmp_path: Path) -> None:
    content = torch.load(checkpoint)
    given = {"name": "xformer_image_eval", "image_size": 16, "mae_mean": [0.5] * 3, "mae_std": [0.25] * 3, "mean": None}
    content["config"]["datasets"]["scenes"]["vis_processor"] = {"eval": given}
    torch.save(content, checkpoint)
    _, vis, _ = lavis_xformer.from_folder(export(checkpoint, tmp_path / "out"))
    assert [vis[mode].mae_normalize.mean for mode in ("train", "eval")] == [[0.5] * 3] * 2
    assert vis["eval"].clip_normalize.mean == CLIP_MEAN
    assert vis["eval"](Image.new("RGB", (50, 40)))[3:].unique() == -2  # (0 - 0.5) / 0.25


def test_a_model_of_ones_own_is_exported_under_its_name(
    trained: XFormerOPT, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lavis_xformer.register()
    monkeypatch.setitem(registry.mapping["model_name_mapping"], "mine", type("Mine", (XFormerOPT,), {}))
    content = torch.load(checkpoint)
    content["config"]["model"]["arch"] = "mine"
    torch.save(content, checkpoint)
    again = lavis_xformer.from_folder(export(checkpoint, tmp_path / "out"))[0]
    assert type(again).__name__ == "Mine"
    assert_equal(again, trained)


def test_half_of_the_size_rounds_the_weights(trained: XFormerOPT, checkpoint: Path, tmp_path: Path) -> None:
    sizes = []
    for options in ([], ["--half"]):
        folder = tmp_path / f"out{len(options)}"
        assert cli.main(["export", str(checkpoint), str(folder), *options]) == 0
        sizes.append((folder / "model.safetensors").stat().st_size)
    assert sizes[1] < 0.6 * sizes[0]
    model, *_ = lavis_xformer.from_folder(folder)
    for name, weight in model.named_parameters():
        if weight.requires_grad:
            assert torch.equal(weight, trained.get_parameter(name).half().float()), name


def test_stage_1_with_its_tied_weights_comes_back(stage2_config: Any, tmp_path: Path) -> None:
    cfg = OmegaConf.create(OmegaConf.to_container(stage2_config))
    cfg.model.arch, cfg.model.embed_dim = "xformer", 16
    del cfg.model.opt_model
    trained = perturb(XFormer.from_config(cfg.model))
    words = trained.Qformer.bert.embeddings.word_embeddings.weight
    assert trained.Qformer.cls.predictions.decoder.weight is words
    torch.save({"model": runner_state(trained), "config": OmegaConf.to_container(cfg)}, tmp_path / "run.pth")
    model, *_ = lavis_xformer.from_folder(export(tmp_path / "run.pth", tmp_path / "out"))
    assert_equal(model, trained)
    assert torch.equal(model.Qformer.cls.predictions.decoder.weight, words)


def test_a_model_under_another_name_of_its_class_keeps_its_settings(stage2_config: Any, tmp_path: Path) -> None:
    said = {"arch": "xformer", "fusion_heads": 4, "token_positions": ["mae"]}
    cfg = OmegaConf.merge(stage2_config, {"model": said})
    model = XFormer.from_config(cfg.model)
    torch.save({"model": runner_state(model), "config": OmegaConf.to_container(cfg)}, tmp_path / "run.pth")
    folder = export(tmp_path / "run.pth", tmp_path / "out", arch="xformer_image_text_matching")
    written = OmegaConf.load(folder / "config.yaml").model
    assert (written.arch, written.fusion_heads, written.token_positions) == (
        "xformer_image_text_matching", 4, ["mae"]
    )  # fmt: skip


def test_the_card_says_what_nothing_has_trained(
    make_xformer: Any,
    stage2_config: Any,
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: Any,
) -> None:
    torch.save({"model": trainable_state(make_xformer("dual"))}, tmp_path / "stage1.pth")
    OmegaConf.save(stage2_config, tmp_path / "toy.yaml")
    monkeypatch.setitem(XFormerOPT.PRETRAINED_MODEL_CONFIG_DICT, "toy", str(tmp_path / "toy.yaml"))
    folder = export(tmp_path / "stage1.pth", tmp_path / "out", arch="xformer_opt", model_type="toy")
    assert "| newly initialised | opt_proj (not in the checkpoint) |" in (folder / "README.md").read_text()
    assert "stage1.pth has no opt_proj: exported as initialised before training" in caplog.text
    assert "newly initialised" not in (export(checkpoint, tmp_path / "whole") / "README.md").read_text()


@pytest.mark.parametrize(
    ("fusion", "parts"), [("dual", ["vit_model", "mae_model", "opt_model"]), ("none", ["vit_model", "opt_model"])]
)
def test_the_card_names_the_frozen_parts_that_the_model_has(
    fusion: str, parts: list[str], stage2_config: Any, tmp_path: Path
) -> None:
    stage2_config.model.fusion = fusion
    model = XFormerOPT.from_config(stage2_config.model)
    torch.save({"model": runner_state(model), "config": OmegaConf.to_container(stage2_config)}, tmp_path / "run.pth")
    assert elsewhere(export(tmp_path / "run.pth", tmp_path / "out")) == parts


def test_blip2_files_are_exported_whole(
    make_stage2: Any, stage2_config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = perturb(make_stage2("opt", "none", freeze_vit=False))
    torch.save({"model": trainable_state(source)}, tmp_path / "blip2_caption.pth")
    stage2_config.model.fusion_init = "identity"
    OmegaConf.save(stage2_config, tmp_path / "toy.yaml")
    monkeypatch.setitem(XFormerOPT.PRETRAINED_MODEL_CONFIG_DICT, "toy", str(tmp_path / "toy.yaml"))
    folder = export(tmp_path / "blip2_caption.pth", tmp_path / "out", arch="xformer_opt", model_type="toy")
    assert "| newly initialised | fusion (not in the checkpoint) |" in (folder / "README.md").read_text()
    model, *_ = lavis_xformer.from_folder(folder)
    for name, tensor in trainable_state(source).items():
        assert torch.equal(model.state_dict()[name], tensor), name
    assert any(name.startswith("visual_encoder") for name in trainable_state(source))


def test_the_fusion_alone_is_exported_with_what_it_stands_on(
    stage2_config: Any, make_stage2: Any, tmp_path: Path
) -> None:
    torch.save({"model": trainable_state(perturb(make_stage2("opt", "none")))}, tmp_path / "blip2.pth")
    stage2_config.model |= {"blip2_pretrained": str(tmp_path / "blip2.pth"), "train_only": ["fusion"]}
    trained = perturb(XFormerOPT.from_config(stage2_config.model))
    torch.save({"model": runner_state(trained), "config": OmegaConf.to_container(stage2_config)}, tmp_path / "run.pth")
    model, *_ = lavis_xformer.from_folder(export(tmp_path / "run.pth", tmp_path / "out"))
    assert_equal(model, trained)


def test_a_run_that_trained_no_step_can_be_exported(trained: XFormerOPT, checkpoint: Path, tmp_path: Path) -> None:
    record = {"kind": "eval", "split": "test", "step": 4, "answers": 61.5}  # of a checkpoint trained to its end before
    (tmp_path / "log.jsonl").write_text(json.dumps(record))
    folder = export(checkpoint, tmp_path / "out")
    assert_equal(lavis_xformer.from_folder(folder)[0], trained)
    assert "| answers | 61.5 |" in (folder / "README.md").read_text()


@pytest.mark.parametrize("base", ["blip2_pretrained", "pretrained", "finetuned"])
def test_a_frozen_image_encoder_that_a_file_had_brought_is_exported(
    base: str, stage2_config: Any, make_stage2: Any, batch: dict[str, Any], tmp_path: Path
) -> None:
    source = make_stage2("opt", "none" if base == "blip2_pretrained" else "dual", freeze_vit=False)
    torch.save({"model": trainable_state(perturb(source))}, tmp_path / "base.pth")
    stage2_config.model |= {base: str(tmp_path / "base.pth"), "load_finetuned": base == "finetuned"}
    trained = perturb(XFormerOPT.from_config(stage2_config.model)).eval()
    torch.save({"model": runner_state(trained), "config": OmegaConf.to_container(stage2_config)}, tmp_path / "run.pth")
    with pytest.raises(UserError, match=r"not loaded; .* or load what `lavis-xformer export` makes of this"):
        XFormerOPT.from_config(
            stage2_config.model | {base: None, "load_finetuned": False, "pretrained": str(tmp_path / "run.pth")}
        )
    folder = export(tmp_path / "run.pth", tmp_path / "out")
    (tmp_path / "base.pth").unlink()
    assert elsewhere(folder) == ["mae_model", "opt_model"]
    model, *_ = lavis_xformer.from_folder(folder)
    assert_equal(model, trained)
    assert torch.equal(model(batch)["loss"], trained(batch)["loss"])


@pytest.mark.parametrize("freeze_vit", [True, False])  # False: the file brings an image encoder, which is changed too
def test_a_run_that_changed_all_of_its_blip2_needs_it_no_more(
    freeze_vit: bool, stage2_config: Any, make_stage2: Any, tmp_path: Path
) -> None:
    source = perturb(make_stage2("opt", "none", freeze_vit=freeze_vit))
    torch.save({"model": trainable_state(source)}, tmp_path / "blip2.pth")
    stage2_config.model |= {"blip2_pretrained": str(tmp_path / "blip2.pth"), "freeze_vit": freeze_vit}
    trained = perturb(XFormerOPT.from_config(stage2_config.model))
    torch.save({"model": runner_state(trained), "config": OmegaConf.to_container(stage2_config)}, tmp_path / "run.pth")
    (tmp_path / "blip2.pth").unlink()
    model, *_ = lavis_xformer.from_folder(export(tmp_path / "run.pth", tmp_path / "out"))
    assert_equal(model, trained)


def test_another_part_alone_is_exported_with_a_fusion_that_does_nothing(
    stage2_config: Any, make_stage2: Any, batch: dict[str, Any], tmp_path: Path
) -> None:
    torch.save({"model": trainable_state(perturb(make_stage2("opt", "none")))}, tmp_path / "blip2.pth")
    stage2_config.model |= {"blip2_pretrained": str(tmp_path / "blip2.pth"), "train_only": ["Qformer"]}
    stage2_config.model.fusion_init = "identity"
    trained = perturb(XFormerOPT.from_config(stage2_config.model)).eval()
    torch.save({"model": runner_state(trained), "config": OmegaConf.to_container(stage2_config)}, tmp_path / "run.pth")
    folder = export(tmp_path / "run.pth", tmp_path / "out")
    model, *_ = lavis_xformer.from_folder(folder)
    assert torch.equal(model(batch)["loss"], trained(batch)["loss"])
    assert "| newly initialised | fusion (not in the checkpoint) |" in (folder / "README.md").read_text()


def test_an_export_that_fails_leaves_nothing(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full_disk(*args: Any, **kwargs: Any) -> None:
        raise OSError("no space left")

    with monkeypatch.context() as patched:
        patched.setattr("safetensors.torch.save_file", full_disk)
        with pytest.raises(OSError, match="no space left"):
            export(checkpoint, tmp_path / "some" / "out")
    assert list((tmp_path / "some").iterdir()) == []
    assert export(checkpoint, tmp_path / "some" / "out").is_dir(), "the next try is not in its way"


def test_what_cannot_be_exported_or_read_is_one_line(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(UserError, match="full is not empty"):
        export(checkpoint, tmp_path / "full")
    with pytest.raises(UserError, match="file is a file; name a new folder"):
        export(checkpoint, tmp_path / "full" / "file")
    with pytest.raises(UserError, match="below can't be created: "):
        export(checkpoint, tmp_path / "full" / "file" / "below")
    with pytest.raises(UserError, match=r"there is no checkpoint .*nothing\.pth"):
        export(tmp_path / "nothing.pth", tmp_path / "new")
    torch.save({"model": {"w": torch.zeros(1)}}, tmp_path / "bare.pth")
    with pytest.raises(UserError, match=r"doesn't name its model.*--model"):
        export(tmp_path / "bare.pth", tmp_path / "new")
    torch.save({"model": {}, "config": {"model": {"arch": "blip2_opt"}}}, tmp_path / "lavis.pth")
    for arch, said in (
        (None, r"is of LAVIS's blip2_opt.*--model"),
        ("lavis_blip2", "--model lavis_blip2 is no X-Former"),
    ):
        with pytest.raises(UserError, match=said):
            export(tmp_path / "lavis.pth", tmp_path / "new", arch=arch)
    with pytest.raises(UserError, match=r"--type pretrain: .* is of type toy; leave --type out"):
        export(checkpoint, tmp_path / "new", model_type="pretrain")
    with pytest.raises(UserError, match="full is a folder, exported already perhaps; name a checkpoint file"):
        export(tmp_path / "full", tmp_path / "new")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.yaml").write_text("run: {}")
    with pytest.raises(UserError, match=r"other is not an exported model: its config\.yaml names no model\.arch"):
        lavis_xformer.from_folder(tmp_path / "other")
    for wrong, said in (
        ("- a", r"config\.yaml can't"),
        ("model: [", r"config\.yaml can't be read"),
        ("model: {arch: blip2}", "names no model.arch of this"),
    ):
        (tmp_path / "other" / "config.yaml").write_text(wrong)
        with pytest.raises(UserError, match=said):
            lavis_xformer.from_folder(tmp_path / "other")
    for strange in (
        "text",
        {"model": None},
        {"model": {"arch": None}, "preprocess": {}},
        {"model": {"arch": "xformer_opt"}},
    ):
        torch.save({"model": {}, "config": strange}, tmp_path / "strange.pth")
        with pytest.raises(UserError, match=r"choose one of this package's with --model and --type"):
            export(tmp_path / "strange.pth", tmp_path / "new")
    torch.save({"model": Malicious(tmp_path / "owned")}, tmp_path / "bad.pth")
    with pytest.raises(UserError, match="pickled code"):
        export(tmp_path / "bad.pth", tmp_path / "new")
    assert not (tmp_path / "owned").exists()
    assert not (tmp_path / "new").exists()
    with pytest.raises(UserError, match=r"full is not an exported model: it has no config\.yaml"):
        lavis_xformer.from_folder(tmp_path / "full")


def test_a_folder_of_another_model_is_named_so(trained: XFormerOPT, checkpoint: Path, tmp_path: Path) -> None:
    folder = export(checkpoint, tmp_path / "opt")
    with pytest.raises(UserError, match=r"opt is an exported xformer_opt, not XFormer$"):
        lavis_xformer.load_model_and_preprocess("xformer", str(folder))


def test_a_folder_may_be_called_as_a_type_is(
    trained: XFormerOPT, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lavis_xformer.config.load import load_config

    monkeypatch.chdir(tmp_path)
    export(checkpoint, "mini")
    assert_equal(lavis_xformer.from_folder("mini")[0], trained)
    assert_equal(XFormerOPT.from_pretrained(tmp_path / "mini"), trained)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert_equal(lavis_xformer.from_folder("~/mini")[0], trained)
    for name in ("~/mini", "./mini", "mini/"):
        assert_equal(lavis_xformer.load_model_and_preprocess("xformer_opt", name)[0], trained)
    with pytest.raises(UserError, match="xformer_opt has no model type '~nobody_of_this_name'"):
        lavis_xformer.load_model_and_preprocess("xformer_opt", "~nobody_of_this_name")
    run = {
        "model": {"arch": "xformer_opt", "model_type": "mini", "pretrained": None},
        "datasets": {"xformer_scenes_vqa": {}},
        "run": {"task": "xformer_stage2", "output_dir": str(tmp_path)},
    }
    OmegaConf.save(run, tmp_path / "run.yaml")
    config = load_config(str(tmp_path / "run.yaml"), ["model.model_type=~/mini"])
    assert_equal(XFormerOPT.from_config(config.model_cfg), trained)


def test_a_model_of_lavis_is_not_exported(checkpoint: Path, tmp_path: Path) -> None:
    for name, said in (
        ("blip2", "--model blip2 is no X-Former"),
        ("xfomer", "no model 'xfomer': did you mean 'xformer'"),
    ):
        with pytest.raises(UserError, match=said):
            export(checkpoint, tmp_path / "out", arch=name)


def test_of_several_normalisations_the_folder_has_those_of_the_first_dataset(caplog: pytest.LogCaptureFixture) -> None:
    cfg = OmegaConf.create({"preprocess": {"vis_processor": {"eval": {"name": "xformer_image_eval"}}}})
    runs = {name: {"vis_processor": {"eval": {"mean": [share] * 3}}} for name, share in (("a", 0.1), ("b", 0.2))}
    _take_normalisation(cfg, runs)
    assert cfg.preprocess.vis_processor.eval["mean"] == [0.1] * 3
    assert "the folder has those of a" in caplog.text
