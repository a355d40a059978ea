"""Loading: every weight is accounted for, and what doesn't fit is named."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from shutil import copytree, ignore_patterns
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import save_file
from transformers import BertConfig, BertForMaskedLM

from lavis_xformer.errors import UserError
from lavis_xformer.models import towers
from lavis_xformer.models.checkpoints import LoadReport, load_pretrained, load_state, read_checkpoint
from lavis_xformer.models.opt import OptLanguage
from lavis_xformer.models.stage1 import XFormer
from lavis_xformer.models.t5 import T5Language
from lavis_xformer.models.weight_files import load_torch_file


def trainable_state(model: Any) -> dict[str, torch.Tensor]:
    """What a runner saves: trainable weights only."""
    names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    return {name: tensor.clone() for name, tensor in model.state_dict().items() if name in names}


def perturb(model: Any) -> Any:
    """The same model with other trainable weights."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.01)
    return model


def config(**keys: Any) -> Any:
    """A model configuration with only the keys that loading reads."""
    return OmegaConf.create({"load_finetuned": False, **keys})


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_round_trip_in_both_formats(suffix: str, make_xformer: Any, tmp_path: Path) -> None:
    trained, fresh = perturb(make_xformer("dual")), make_xformer("dual")
    path = str(tmp_path / f"checkpoint{suffix}")
    state = {k: v.contiguous().clone() for k, v in trainable_state(trained).items()}
    torch.save({"model": state, "epoch": 3}, path) if suffix == ".pth" else save_file(state, path)
    report = load_pretrained(fresh, config(pretrained=path))
    assert report is not None
    assert report.missing_new == ()
    assert all(name.startswith(("visual_encoder", "mae", "Qformer.bert.embeddings.position_ids", "Qformer.cls"))
               for name in report.missing_built)  # fmt: skip
    for name, tensor in trained.state_dict().items():
        assert torch.equal(fresh.state_dict()[name], tensor), name


def test_blip2_starts_everything_but_the_fusion(make_xformer: Any, batch: dict[str, Any], tmp_path: Path) -> None:
    blip2, xformer = perturb(make_xformer("none")).eval(), make_xformer("dual").eval()
    torch.save({"model": trainable_state(blip2)}, tmp_path / "blip2_pretrained.pth")
    report = load_pretrained(xformer, config(blip2_pretrained=str(tmp_path / "blip2_pretrained.pth")))
    assert report is not None
    assert {name.split(".")[0] for name in report.missing_new} == {"fusion"}
    features = (model.extract_features(batch, "image").image_embeds_proj for model in (blip2, xformer))
    assert torch.equal(*features)


def test_files_of_the_other_kind_are_refused_with_the_key_to_set(make_xformer: Any, tmp_path: Path) -> None:
    for name in ("dual", "none"):
        torch.save({"model": trainable_state(make_xformer(name))}, tmp_path / f"{name}.pth")
    model = make_xformer("dual")
    with pytest.raises(UserError, match=r"checkpoint of BLIP-2.*set model\.blip2_pretrained"):
        load_pretrained(model, config(pretrained=str(tmp_path / "none.pth")))
    with pytest.raises(UserError, match=r"checkpoint of X-Former; set model\.pretrained"):
        load_pretrained(model, config(blip2_pretrained=str(tmp_path / "dual.pth")))


def test_a_long_list_of_what_does_not_fit_is_in_the_log_in_full(make_xformer: Any, caplog: Any) -> None:
    model = make_xformer("dual")
    state = {name: value for name, value in trainable_state(model).items() if not name.startswith("Qformer")}
    lost = sorted(name for name in trainable_state(model) if name not in state)
    with pytest.raises(UserError, match=rf"and {len(lost) - 5} more$"):
        load_state(model, state, source="mine.pth")
    assert caplog.messages == [f"'mine.pth' doesn't fit XFormer; missing, all {len(lost)}: {', '.join(lost)}"]


def test_what_does_not_fit_is_listed_and_nothing_changes(make_xformer: Any) -> None:
    model = make_xformer("dual")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = trainable_state(perturb(make_xformer("dual")))
    del state["temp"]
    state["opt_proj.weight"] = torch.zeros(2)
    state["query_tokens"] = torch.zeros(1, 9, 32)
    with pytest.raises(UserError) as caught:
        load_state(model, state, source="mine.pth")
    message = str(caught.value)
    assert "missing: temp" in message
    assert "unknown: opt_proj.weight" in message
    assert "query_tokens (1, 9, 32) instead of (1, 4, 32)" in message
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize("method", ["load_checkpoint", "load_from_pretrained"])
def test_lavis_own_loading_methods_account_for_every_weight(method: str, make_xformer: Any, tmp_path: Path) -> None:
    trained, model = perturb(make_xformer("dual")), make_xformer("dual")
    state = trainable_state(trained)
    torch.save({"model": state}, tmp_path / "whole.pth")
    report = getattr(model, method)(url_or_filename=str(tmp_path / "whole.pth"))
    assert set(state) <= set(report.loaded)
    assert model.load_report.loaded == report.loaded
    assert torch.equal(model.temp, trained.temp)
    torch.save({"model": {name: state[name] for name in state if name != "temp"}}, tmp_path / "torn.pth")
    torch.save({"model": {"nonsense": torch.zeros(1)}}, tmp_path / "junk.pth")
    for file, words in (("torn.pth", "missing: temp"), ("junk.pth", "unknown: nons"), ("none.pth", "there is no file")):
        with pytest.raises(UserError, match=words):
            getattr(model, method)(str(tmp_path / file))


def test_a_finetuned_checkpoint_that_is_not_named_is_refused(make_xformer: Any) -> None:
    with pytest.raises(UserError, match=r"load_finetuned is True, but model\.finetuned names no checkpoint"):
        load_pretrained(make_xformer("dual"), config(load_finetuned=True, finetuned=None, pretrained="unused.pth"))


@pytest.mark.parametrize("stage", ["xformer", "stage2"])
def test_a_model_that_loads_nothing_says_so(
    stage: str, request: pytest.FixtureRequest, caplog: pytest.LogCaptureFixture
) -> None:
    model = request.getfixturevalue(f"make_{stage}")()
    with caplog.at_level("INFO"):
        for keys in ({"pretrained": None}, {"pretrained": "unread.pth", "load_pretrained": False}):
            assert load_pretrained(model, config(**keys)) == LoadReport()
    assert "model.pretrained names no checkpoint; all trainable weights are untrained" in caplog.messages[0]
    assert "model.load_pretrained is False" in caplog.messages[1]


def test_a_type_without_weights_is_loaded_with_a_warning(
    make_xformer: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """LAVIS's types bring weights; the paper's authors have published none."""
    monkeypatch.setattr(XFormer, "from_config", lambda cfg: make_xformer("dual"))
    XFormer.from_pretrained("pretrain")
    assert caplog.messages == ["pretrain: no weights are known for this type; load a checkpoint, or train it"]
    assert caplog.records[0].levelname == "WARNING"


class Malicious:
    """Runs a command when unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


def test_pickled_code_torn_and_missing_files_are_refused(tmp_path: Path) -> None:
    torch.save({"model": Malicious(tmp_path / "owned")}, tmp_path / "bad.pth")
    with pytest.raises(UserError, match=r"pickled code are refused\): Unsupported global"):
        read_checkpoint(str(tmp_path / "bad.pth"), key="pretrained")
    assert not (tmp_path / "owned").exists()
    torch.save({"model": {"w": torch.zeros(1000)}}, tmp_path / "torn.pth")
    (tmp_path / "torn.pth").write_bytes((tmp_path / "torn.pth").read_bytes()[:500])
    with pytest.raises(UserError, match=r"model\.pretrained: '.*torn\.pth' is not an intact tensor file"):
        read_checkpoint(str(tmp_path / "torn.pth"), key="pretrained")
    (tmp_path / "torn.safetensors").write_bytes(b"torn")
    with pytest.raises(UserError, match="is not an intact tensor file"):
        read_checkpoint(str(tmp_path / "torn.safetensors"), key="pretrained")
    with pytest.raises(UserError, match="there is no file"):
        read_checkpoint(str(tmp_path / "none.pth"), key="pretrained")


def test_files_without_names_of_weights_are_refused(tmp_path: Path) -> None:
    for content, words in (([torch.zeros(1)], "holds a list"), ({"model": torch.zeros(1)}, "no weights under its key")):
        torch.save(content, tmp_path / "list.pth")
        with pytest.raises(UserError, match=words):
            read_checkpoint(str(tmp_path / "list.pth"), key="pretrained")


@pytest.mark.parametrize("door", ["vit_weights", "mae_model .pth", "mae_model", "bert", "t5_model"])
def test_no_door_runs_pickled_code(
    door: str, vocab_folder: Path, tiny_mae_model: Any, t5_folder: Path, tmp_path: Path
) -> None:
    configuration = {"mae_model": tiny_mae_model.config, "bert": vocab_folder, "t5_model": t5_folder}.get(door)
    if isinstance(configuration, Path):
        copytree(configuration, tmp_path, dirs_exist_ok=True, ignore=ignore_patterns("*.bin", "*.safetensors"))
    elif configuration is not None:
        configuration.save_pretrained(tmp_path)
    file = tmp_path / ("pytorch_model.bin" if configuration else "mae_pretrain_vit_toy_full.pth")
    torch.save({"model": Malicious(tmp_path / "owned")}, file)
    doors: dict[str, Callable[[], Any]] = {
        "vit_weights": lambda: load_torch_file(file, key=door),
        "mae_model .pth": lambda: towers.build_mae(str(file)),
        "mae_model": lambda: towers.build_mae(str(tmp_path)),
        "bert": lambda: towers.build_qformer(str(tmp_path), num_queries=4, vision_width=20, cross_attention_freq=2),
        "t5_model": lambda: T5Language.from_source(str(tmp_path)),
    }
    with pytest.raises(UserError, match=r"pickled code|can't be read"):
        doors[door]()
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize(
    ("door", "size"),
    [("mae_model", "intermediate_size"), ("bert", "intermediate_size"), ("opt_model", "ffn_dim"), ("t5_model", "d_ff")],
)
def test_weights_of_other_shapes_than_their_configuration_are_one_line(
    door: str, size: str, request: pytest.FixtureRequest, vocab_folder: Path, tiny_mae_model: Any, tmp_path: Path
) -> None:
    if door in ("mae_model", "bert"):
        model = BertForMaskedLM(BertConfig.from_pretrained(vocab_folder)) if door == "bert" else tiny_mae_model
        model.save_pretrained(tmp_path)
    else:
        copytree(request.getfixturevalue(door.replace("model", "folder")), tmp_path, dirs_exist_ok=True)
    said = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(said | {size: said[size] + 8}))
    doors: dict[str, Callable[[str], Any]] = {
        "mae_model": towers.build_mae,
        "bert": partial(towers.build_qformer, num_queries=4, vision_width=20, cross_attention_freq=2),
        "opt_model": OptLanguage.from_source,
        "t5_model": T5Language.from_source,
    }
    with pytest.raises(UserError, match=rf"model\.{door}: '.*' .*(another shape|doesn't fit).* torch\.Size") as caught:
        doors[door](str(tmp_path))
    assert "\n" not in str(caught.value)


def warned(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What was logged as a warning or worse."""
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.mark.parametrize("suffix", ["folder", ".pth"])
def test_settings_that_no_weight_shows_are_compared(
    suffix: str, make_xformer: Any, make_stage2: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = make_xformer("dual")
    said = {"vit_model": "here/clip", "mae_model": "mae", "token_positions": ["mae"], "fusion_heads": 4}
    state, path = trainable_state(model), tmp_path / "run"
    if suffix == "folder":
        path.mkdir()
        save_file({k: v.contiguous() for k, v in state.items()}, path / "model.safetensors")
        OmegaConf.save({"model": said}, path / "config.yaml")
    else:
        torch.save({"model": state, "config": {"model": said}}, path)

    def told(into: Any, **changes: Any) -> list[str]:
        caplog.clear()
        load_pretrained(into, config(**{**said, **changes, "pretrained": str(path)}))
        return warned(caplog)

    assert told(model) == []
    assert told(model, vit_model="elsewhere/clip", mae_source="mae", clip_layer=None) == []
    changes = {"token_positions": [], "fusion_heads": 2, "mae_source": "random", "vit_model": "other", "clip_layer": 1}
    (line,) = told(model, **changes)
    assert line == (
        f"{path} was trained with other settings, which its weights don't show: vit_model clip, here other; "
        "token_positions ['mae'], here []; mae_source mae, here random; clip_layer None, here 1; "
        "fusion_heads 4, here 2"
    )
    stage2 = make_stage2("opt")
    assert told(stage2, opt_model="any/opt") == [], "the file is of stage 1"
    assert "token_positions ['mae'], here ['clip']" in told(stage2, token_positions=["clip"])[0]
    assert told(stage2, token_positions=["mae", "clip"]) == [], "what stage 2 adds is its own affair"
    assert len(told(model, token_positions=["mae", "clip"])) == 1
    assert model.built_from.token_positions == ["mae", "clip"]
    caplog.clear()
    model.load_checkpoint(path)
    assert "token_positions ['mae'], here ['clip', 'mae']" in warned(caplog)[0], (
        "LAVIS's load_model(checkpoint=...) too"
    )


def test_settings_of_a_run_without_fusion_are_compared_as_blip2_s(
    make_xformer: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    said = {"vit_model": "clip", "token_positions": []}
    torch.save({"model": trainable_state(make_xformer("none")), "config": {"model": said}}, tmp_path / "blip2.pth")
    model, start = make_xformer("dual"), {"blip2_pretrained": str(tmp_path / "blip2.pth")}
    load_pretrained(model, config(**{**said, "token_positions": ["clip"]}, **start))
    assert warned(caplog) == []
    load_pretrained(model, config(vit_model="other", **start))
    assert "vit_model clip, here other" in warned(caplog)[0]


def test_a_bert_that_lacks_weights_is_no_start(tmp_path: Path) -> None:
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 50}
    bert = BertForMaskedLM(BertConfig(num_hidden_layers=2, **sizes))
    bert.save_pretrained(tmp_path)
    build = partial(towers.build_qformer, str(tmp_path), num_queries=4, vision_width=20)
    query = "bert.encoder.layer.1.attention.self.query.weight"
    assert torch.equal(build(layers=3).state_dict()[query], bert.state_dict()[query])
    file, weights = tmp_path / "pytorch_model.bin", bert.state_dict()
    alone = {name.removeprefix("bert."): weight for name, weight in weights.items() if name.startswith("bert.")}
    torch.save(alone, file)  # as BertModel saves them
    assert torch.equal(build(layers=4).state_dict()[query], bert.state_dict()[query])
    for wrong in ({}, {n: w for n, w in weights.items() if n != query}, {f"bert.x.{n}": w for n, w in weights.items()}):
        torch.save(wrong, file)
        with pytest.raises(UserError, match=r"model\.bert: '.*' lacks \d+ weights of BERT: "):
            build()
    torch.save({f"distilbert.{name}": weight for name, weight in weights.items()}, file)
    with pytest.raises(UserError, match=r"model\.bert: '"):
        build()
    (tmp_path / "config.json").write_text('{"model_type": "distilbert"}')
    with pytest.raises(UserError, match=r"is a model of type 'distilbert', not 'bert'"):
        build()


def test_without_m_its_settings_are_not_compared(
    make_xformer: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = make_xformer("none")
    said = {"model": {"vit_model": "clip", "mae_model": "mae", "fusion_heads": 4}}
    torch.save({"model": trainable_state(model), "config": said}, tmp_path / "run.pth")
    load_pretrained(model, config(vit_model="clip", mae_model="other", pretrained=str(tmp_path / "run.pth")))
    assert warned(caplog) == []
