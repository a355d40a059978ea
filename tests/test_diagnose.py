"""Diagnoses: figures that are known beforehand, and the command on the shipped model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from lavis_xformer.analysis import diagnose
from lavis_xformer.errors import UserError
from lavis_xformer.models.checkpoints import train_only

ENTROPY, TOP = "entropy (1: uniform)", "share of the strongest token"


def test_at_the_identity_start_nothing_is_enriched(make_xformer: Any, batch: dict[str, Any]) -> None:
    found = diagnose.enrichment(make_xformer("dual"), batch["image"])
    assert found["Z': relative change"] == found["M': relative change"] == 0
    error = diagnose.reconstruction(make_xformer("dual"), batch["image"])
    assert error["from M'"] == pytest.approx(error["from M"], abs=1e-6)


def test_an_enrichment_that_is_the_same_for_every_image_is_none_of_its_own(
    make_xformer: Any, batch: dict[str, Any]
) -> None:
    model = make_xformer("dual")
    torch.nn.init.ones_(model.fusion.enrich_blocks[-1].feed_forward[-1].bias)  # Z' = Zq + 1
    found = diagnose.enrichment(model, batch["image"])
    zq = model.query_image(model.encode_image(batch["image"]).clip).last_hidden_state
    assert found["Z': relative change"] == pytest.approx(zq.numel() ** 0.5 / float(zq.detach().norm()))
    assert found["Z': share differing between images"] == pytest.approx(0, abs=1e-6)
    changed = make_xformer("dual", init="normal")
    assert diagnose.enrichment(changed, batch["image"])["Z': share differing between images"] > 1e-3


def test_what_varies_between_images_is_their_own(make_xformer: Any, batch: dict[str, Any]) -> None:
    model = make_xformer("dual", init="normal")
    tokens = model.encode_image(batch["image"])
    zq = model.query_image(tokens.clip).last_hidden_state
    change = model.fusion.refine(zq, tokens.mae_tokens)[0] - zq  # (B, Q, D)
    own = (change - change.mean(dim=0)).square().sum() / change.square().sum()
    found = diagnose.enrichment(model, batch["image"])["Z': share differing between images"]
    assert found == pytest.approx(float(own.detach()), rel=1e-4)


def test_the_floor_of_the_reconstruction_is_the_frozen_maes_whatever_was_trained(
    make_xformer: Any, batch: dict[str, Any]
) -> None:
    found = []
    for init in ("identity", "normal"):
        model = make_xformer("dual", init=init)
        torch.manual_seed(0)
        found.append(diagnose.reconstruction(model, batch["image"]))
    assert found[0]["from M"] == pytest.approx(found[1]["from M"])
    assert found[0]["from M'"] != pytest.approx(found[1]["from M'"])


def test_the_figures_with_anothers_m_stand_beside_those_with_its_own() -> None:
    checks = {"enrichment": {}, "gradients": {}, "reconstruction": {}}
    rows = [[("loss", loss, ""), ("answers %", share, "50.0")] for loss, share in (("1.0", "70.0"), ("2.0", "40.0"))]
    said = [line.split() for line in diagnose.text(checks, rows).splitlines()]
    assert ["loss", "1.0", "2.0"] in said
    assert ["answers", "%", "70.0", "40.0", "50.0"] in said


def test_early_fusions_attention_is_described_too(make_xformer: Any, batch: dict[str, Any]) -> None:
    found = diagnose.enrichment(make_xformer("early"), batch["image"])
    assert list(found) == [f"C to M, layer 1: {figure}" for figure in (ENTROPY, TOP)]


def test_entropy_of_attention_by_hand() -> None:
    assert diagnose.spread(torch.full((1, 2, 3, 5), 0.2)) == {ENTROPY: pytest.approx(1), TOP: pytest.approx(0.2)}
    assert diagnose.spread(torch.eye(5)[None, None]) == {ENTROPY: pytest.approx(0), TOP: 1}


def test_gradient_norms_are_those_of_backward(make_stage2: Any, batch: dict[str, Any]) -> None:
    model = make_stage2("opt", init="normal", loss_weights={"rec": 1}).eval()
    torch.manual_seed(0)
    found = diagnose.gradients(model, batch)
    torch.manual_seed(0)
    model(batch)["loss_lm"].backward()
    assert found["lm > queries Z"] == pytest.approx(float(model.query_tokens.grad.norm()), rel=1e-4)
    total = torch.stack([p.grad.square().sum() for p in model.fusion.enrich_blocks.parameters()]).sum().sqrt()
    assert found["lm > CA2 (Zq attends to M')"] == pytest.approx(float(total), rel=1e-4)
    assert found["rec > CA2 (Zq attends to M')"] == 0, "M' is decoded before the second cross-attention"
    assert found["rec > CA1 (M attends to Zq)"] > 0


def test_blip2_has_gradients_alone(make_xformer: Any, batch: dict[str, Any]) -> None:
    found = diagnose.look(make_xformer("none").eval(), [batch])
    assert found["enrichment"] == found["reconstruction"] == {}
    assert found["gradients"]["itc > queries Z"] > 0
    said = diagnose.text(found, [[("loss", "1.0", "")]])
    assert "this fusion uses no M" in said
    assert ["loss", "1.0"] in [line.split() for line in said.splitlines()]
    assert [line[0] for line in said.splitlines() if line[0] != " "] == ["1", "3"], "no title without figures"


def test_losses_that_train_nothing_have_no_gradients(make_xformer: Any, batch: dict[str, Any]) -> None:
    model = make_xformer("dual", init="normal").eval()
    train_only(model, ["fusion"])
    found = diagnose.look(model, [batch])
    assert found["gradients"]["itc > CA2 (Zq attends to M')"] > 0
    assert {name.split(" > ")[0] for name in found["gradients"]} == {"itc", "itm", "rec"}, "captions bypass the fusion"
    model.fusion.requires_grad_(False)
    model.vision_proj.requires_grad_(True)
    assert diagnose.gradients(model, batch) == {}, "none of the parts that are told apart"


def test_a_fusion_without_ca1_has_no_such_part(make_xformer: Any, batch: dict[str, Any]) -> None:
    parts = {name.split(" > ")[1] for name in diagnose.gradients(make_xformer("concat").eval(), batch)}
    assert parts == {"queries Z", "Q-Former, attention to C", "Q-Former, the rest", "fusion"}


@pytest.mark.parametrize("images", [0, 1, 3])
def test_another_image_is_found_or_said_to_be_missing(images: int) -> None:
    same = [{"image": torch.zeros(3, 4, 4)}] * images
    with pytest.raises(UserError, match="--split val: all its images are the same"):
        diagnose.two_images("val", same)
    found = diagnose.two_images("val", [*same, {"image": torch.ones(3, 4, 4)}, {"image": torch.full((3, 4, 4), 2.0)}])
    assert found[:, 0, 0, 0].tolist() == [2, 1]


def test_a_split_that_does_not_exist_is_called_as_the_user_calls_it(tmp_path: Path) -> None:
    splits = [f"datasets.xformer_scenes.splits.{name}.scenes={scenes}" for name, scenes in (("train", 0), ("val", 2))]
    options = [*splits, f"run.output_dir={tmp_path}"]
    with pytest.raises(UserError, match=r"^run\.test_splits: 'vall'; did you mean 'val'"):
        diagnose.main(["--cfg-path", "projects/xformer/pretrain.yaml", "--split", "vall", "--options", *options])


def one_by_one(folder: Path, *, batches: int) -> list[str]:
    """A command line that looks at three scenes, each a batch."""
    options = [
        "datasets.xformer_scenes.splits.train.scenes=0", "datasets.xformer_scenes.splits.val.scenes=3",
        "run.batch_size_eval=1", f"run.output_dir={folder}", "run.job_id=d", "model.fusion_init=normal",
    ]  # fmt: skip
    return ["--cfg-path", "projects/xformer/pretrain.yaml", "--batches", str(batches), "--options", *options]


def test_the_command_takes_any_batch_size(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert diagnose.main(one_by_one(tmp_path, batches=1)) == 0
    found = json.loads((tmp_path / "d" / "diagnosis.json").read_text())
    assert found["with_own_m"]["loss_itm"] != found["with_anothers_m"]["loss_itm"]
    assert "share differing" not in capsys.readouterr().out, "one image differs from no other"


def test_the_command_on_the_shipped_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shuffled, look = [], diagnose.look
    monkeypatch.setattr(
        diagnose, "look", lambda model, batches: shuffled.append(model.shuffle_mae) or look(model, batches)
    )
    options = [
        "datasets.xformer_scenes.splits.train.scenes=0", "datasets.xformer_scenes.splits.val.scenes=12",
        "run.batch_size_eval=6", f"run.output_dir={tmp_path}", "run.job_id=d", "model.fusion_init=normal",
        "model.shuffle_mae=True",  # as of a comparison's control: own means own all the same
    ]  # fmt: skip
    given = ["--cfg-path", "projects/xformer/pretrain.yaml", "--batches", "1", "--options", *options]
    assert diagnose.main(given) == 0
    assert shuffled == [False], "what M changes is looked at with each image's own"
    found = json.loads((tmp_path / "d" / "diagnosis.json").read_text())
    assert found["with_own_m"]["loss_itc"] != found["with_anothers_m"]["loss_itc"]
    assert found["with_own_m"]["loss_rec"] == pytest.approx(found["with_anothers_m"]["loss_rec"], rel=0.2)
    kept = json.loads((tmp_path / "d" / "result" / "val_scores.json").read_text())
    assert kept["figures"]["loss_itc"] == found["with_own_m"]["loss_itc"], "the result file is that of the own M"
    said = capsys.readouterr().out
    wanted = (
        "own M",
        "ITM accuracy %",
        "Z': relative change",
        "CA2, layer 1: entropy",
        "CA1 (M attends to Zq)",
        "from M'",
    )
    assert not [part for part in wanted if part not in said]


def test_a_split_without_texts_to_learn_from_has_the_other_checks(
    make_xformer: Any, batch: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    found = diagnose.look(make_xformer("dual"), [{"image": batch["image"], "index": [0]}])
    assert found["gradients"] == {}
    assert found["enrichment"].keys()
    assert found["reconstruction"].keys()
    assert "check 3 is left out, the split has nothing to learn from: samples['text_input'] is missing" in caplog.text
    said = diagnose.text({**found, "with_own_m": {}, "with_anothers_m": {}}, [])
    assert "2. what M changes" in said
    assert "3. gradient" not in said


def test_looking_again_finds_the_same(make_xformer: Any, batch: dict[str, Any]) -> None:
    model = make_xformer("dual", init="normal")
    assert diagnose.look(model, [batch]) == diagnose.look(model, [batch])


def test_own_m_is_the_first_column_and_as_many_batches_are_looked_at_as_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, look = [], diagnose.look
    monkeypatch.setattr(diagnose, "look", lambda model, batches: look(model, seen.extend(batches) or seen))
    monkeypatch.setattr(diagnose, "rows_of", lambda task, figures: [("itm", f"{figures['loss_itm']:.8f}", "")])
    assert diagnose.main(one_by_one(tmp_path, batches=2)) == 0
    found = json.loads((tmp_path / "d" / "diagnosis.json").read_text())
    said = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["itm", *(f"{found[of]['loss_itm']:.8f}" for of in ("with_own_m", "with_anothers_m"))] in said
    assert len(seen) == 2
