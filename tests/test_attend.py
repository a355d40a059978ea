"""Attention maps: those that the model uses; a text's, which are its score's gradient; and the command."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from lavis_xformer import cli
from lavis_xformer.analysis import attend
from lavis_xformer.data.scenes import make_scene, render
from lavis_xformer.errors import UserError
from lavis_xformer.models.attention_maps import attention_maps, recording
from lavis_xformer.models.checkpoints import train_only
from lavis_xformer.models.fusion import Attention


@pytest.mark.parametrize("fusion", ["dual", "none", "concat", "early"])
def test_recording_changes_nothing_and_leaves_nothing(make_xformer: Any, batch: dict[str, Any], fusion: str) -> None:
    model = make_xformer(fusion, init="normal").eval()
    with torch.no_grad():
        before = model.forward_image(batch["image"])[0]
        with recording(model) as found:
            during = model.forward_image(batch["image"])[0]
        after = model.forward_image(batch["image"])[0]
    assert torch.allclose(during, before, atol=1e-5)
    assert torch.equal(after, before)
    assert not model.Qformer.bert.config.output_attentions
    assert len([name for name in found if name.startswith("Qformer.")]) == 2, "layers 0 and 2 of 4 look at the image"
    for weights in found.values():
        assert torch.allclose(weights.sum(-1), torch.ones(()), atol=1e-5)


@pytest.mark.parametrize(
    ("fusion", "sources"), [("dual", ["C", "M'"]), ("none", ["C"]), ("concat", ["C", "M"]), ("early", ["C"])]
)
def test_maps_are_the_means_over_heads_without_cls(
    make_xformer: Any, batch: dict[str, Any], fusion: str, sources: list[str]
) -> None:
    model = make_xformer(fusion, init="normal").eval()
    if "M'" in sources:  # a deeper fusion, whose last layer is shown
        model.fusion.enrich_blocks.append(deepcopy(model.fusion.enrich_blocks[0]))
    maps = attention_maps(model, {"image": batch["image"]})
    assert {name: found.shape for name, found in maps.items()} == dict.fromkeys(sources, (4, 4, 4, 4))
    with torch.no_grad(), recording(model) as found:
        model.forward_image(batch["image"])
    weights = found["Qformer.bert.encoder.layer.2.crossattention.self"].mean(dim=1)  # (B, Q, K)
    assert torch.allclose(maps["C"].flatten(2), weights[..., 1:17])
    if "M" in maps:
        assert torch.allclose(maps["M"].flatten(2), weights[..., 18:])
    if "M'" in maps:
        weights = found["fusion.enrich_blocks.1.cross_attention"].mean(dim=1)
        assert torch.allclose(maps["M'"].flatten(2), weights[..., 1:])


def test_one_text_may_be_of_all_images(make_xformer: Any, batch: dict[str, Any]) -> None:
    model, image = make_xformer("dual", init="normal").eval(), batch["image"][:2]
    one, each = (attention_maps(model, {"image": image, "text_input": text}) for text in ("a star", 2 * ["a star"]))
    assert all(torch.equal(one[name], each[name]) for name in ("C", "M'"))
    with pytest.raises(UserError, match=r"samples\['text_input'\] has 3 strings for 2 images"):
        attention_maps(model, {"image": image, "text_input": 3 * ["a star"]})


def log_odds(model: Any, samples: dict[str, Any]) -> torch.Tensor:
    """Of a match, by stage 1."""
    tokens, text = model.encode_image(samples["image"]), model.tokenize(samples["text_input"])
    logits = model.match(tokens.clip, tokens.mae_tokens, text.input_ids, text.attention_mask).double()
    return logits[0, 1] - logits[0, 0]


def log_likelihood(model: Any, samples: dict[str, Any]) -> torch.Tensor:
    """Of a caption, by stage 2."""
    return -model(samples)["loss_lm"]


@pytest.mark.parametrize(("stage", "score"), [("make_xformer", log_odds), ("make_stage2", log_likelihood)])
def test_a_texts_map_is_what_more_attention_would_do_to_its_score(
    stage: str,
    score: Callable[..., torch.Tensor],
    request: pytest.FixtureRequest,
    batch: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = request.getfixturevalue(stage)(init="normal").eval()
    samples = {"image": batch["image"][:1], "text_input": ["a red circle"]}
    if score is log_odds:  # a score that hardly depends on M' would be lost in rounding
        for parameter in model.fusion.enrich_blocks.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    with recording(model) as found:
        score(model, samples)
    plain = found["fusion.enrich_blocks.0.cross_attention"].detach()  # (1, heads, Q, S)
    explained = attention_maps(model, samples)["M'"].flatten(2)  # (1, Q, N)

    def shifted_score(change: torch.Tensor) -> float:
        def shifted(self: Attention, x: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
            _, weights = self.with_map(x, context)
            *_, value = self._heads(x, context)
            return self._join((weights + (change if weights.shape == change.shape else 0)) @ value)

        monkeypatch.setattr(Attention, "forward", shifted)
        with torch.no_grad():
            return float(score(model, samples))

    query, patch, step, expected = 1, 5, 0.02, 0.0
    for head in range(plain.shape[1]):
        change = torch.zeros_like(plain)
        change[0, head, query, 1 + patch] = step
        slope = (shifted_score(change) - shifted_score(-change)) / (2 * step)
        expected += max(0.0, slope * float(plain[0, head, query, 1 + patch])) / plain.shape[1]
    assert expected > 0
    assert float(explained[0, query, patch]) == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("kind", ["opt", "t5"])
@pytest.mark.parametrize("rec", [0, 1])
def test_answers_have_maps_of_their_own(make_stage2: Any, batch: dict[str, Any], kind: str, rec: int) -> None:
    model = make_stage2(kind, init="normal", loss_weights={"rec": rec}).eval()  # 1: a second pass, of a masked M
    asked = {"image": batch["image"], "text_input": ["how many"] * 4}
    one, two = (attention_maps(model, {**asked, "answer": [answer] * 4})["M'"] for answer in ("one", "two"))
    assert one.amax() > 0
    assert not torch.allclose(one, two)


def test_a_caption_in_stage_1_and_a_layer_that_is_not_there(make_xformer: Any, batch: dict[str, Any]) -> None:
    model = make_xformer("dual", init="normal").eval()
    maps = attention_maps(model, batch)
    single = attention_maps(model, {"image": batch["image"][1:2], "text_input": batch["text_input"][1:2]})
    assert torch.allclose(maps["C"][1:2], single["C"], atol=1e-6), "images don't see each other"
    other = attention_maps(model, {**batch, "text_input": ["three green star"] * 4})["C"]
    assert torch.allclose(other[2], maps["C"][2], rtol=1e-2, atol=1e-8)
    assert not torch.equal(other[1], maps["C"][1]), "each text has a map of its own"
    assert not torch.allclose(maps["C"], attention_maps(model, batch, layer=0)["C"])
    with pytest.raises(UserError, match="layer 2: the Q-Former has 2 cross-attention layers"):
        attention_maps(model, batch, layer=2)


@pytest.mark.parametrize("stage", ["make_xformer", "make_stage2"])
def test_frozen_parts_are_explained_as_trained_ones(
    stage: str, request: pytest.FixtureRequest, batch: dict[str, Any]
) -> None:
    make = request.getfixturevalue(stage)
    model, frozen = make(init="normal").eval(), make(init="normal").eval()
    train_only(frozen, ["fusion"])
    for source, expected in attention_maps(model, batch).items():
        assert torch.allclose(attention_maps(frozen, batch)[source], expected, atol=1e-6), source
    assert not frozen.query_tokens.requires_grad, "as before"
    assert model.query_tokens.requires_grad
    with torch.inference_mode():
        attention_maps(frozen, {"image": batch["image"]})
        inferred = attention_maps(frozen, {**batch, "image": batch["image"].clone()})
    for source, maps in attention_maps(frozen, batch).items():
        assert torch.equal(inferred[source], maps), "gradients also there"


def test_the_command_draws_the_shipped_models(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    photo, out = tmp_path / "photo.png", tmp_path / "out.png"
    Image.new("RGB", (90, 60), "red").save(photo)
    given = ["attend", str(photo), "--question", "how many objects are there?", "--queries", "3", "--out", str(out)]
    assert cli.main(given) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("photo.png: how many objects are there? ")
    assert said[0].split()[-1].isdigit(), "the model's own answer"
    assert said[-1] == f"drawn     {out}"
    with Image.open(out) as picture:
        assert picture.size == (990, 726), "image, C and M'; all queries and query 3"
    assert cli.main(["attend", "--model", "xformer", "--text", "a red star", "--scenes", "1", "--out", str(out)]) == 0
    assert capsys.readouterr().out.startswith("scene 0: a red star\n")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--queries", "32"], "--queries 32: the model has queries 0 to 31"),
        (["--layer", "9"], "layer 9"),
        (["--device", "nowhere"], "--device nowhere: "),
        (["--out", "nowhere/at/all.png"], "--out nowhere/at/all.png"),
        (["nowhere.jpg"], "nowhere.jpg"),
        (["--model", "blip2"], "not of this package"),
        (["--model", "xformer", "--question", "how many?"], "--question"),
    ],
)
def test_what_is_wrong_is_said(given: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["attend", "--scenes", "1", *given]) == 2
    assert said in capsys.readouterr().err


def test_a_title_is_no_formula(tmp_path: Path) -> None:
    row = attend.Row(r"a $\foo star$ for $5", Image.new("RGB", (8, 8)), {"C": torch.rand(2, 2)})
    attend.draw([row], tmp_path / "map.png")
    assert (tmp_path / "map.png").stat().st_size > 1000


def test_a_long_title_is_wrapped_above_its_image(tmp_path: Path) -> None:
    row = attend.Row("a long caption " * 8, Image.new("RGB", (8, 8)), {"C": torch.ones(2, 2)})
    attend.draw([row], tmp_path / "map.png")
    with Image.open(tmp_path / "map.png") as drawn:
        middle = drawn.convert("L").crop((0, drawn.height // 2, drawn.width // 2, drawn.height // 2 + 1))
    assert sum(middle.point(lambda value: 255 * (value < 10)).histogram()[1:]) > 0.9 * middle.width, "black: the image"


def test_a_picture_is_written_where_the_message_says(tmp_path: Path) -> None:
    row = attend.Row("a star", Image.new("RGB", (8, 8)), {"C": torch.rand(2, 2)})
    attend.draw([row], tmp_path / "map")
    assert (tmp_path / "map").is_file()
    with pytest.raises(UserError, match="Is a directory"):
        attend.draw([row], tmp_path)


@pytest.mark.parametrize("given", [["--text", "a", "--question", "b"], ["--answer", "two"]])
def test_arguments_that_do_not_go_together(given: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        attend.main(given)
    assert given[0] in capsys.readouterr().err


def test_rows_are_all_queries_and_those_asked_for_on_scenes_of_the_test_split(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    maps, rows = torch.arange(12.0).reshape(1, 3, 2, 2), []
    monkeypatch.setattr("lavis_xformer.models.attention_maps.attention_maps", lambda *args, **options: {"C": maps})
    monkeypatch.setattr(attend, "draw", lambda drawn, path: rows.extend(drawn))
    assert attend.main(["--scenes", "1", "--queries", "1", "--out", str(tmp_path / "map.png")]) == 0
    whole, second = rows
    assert torch.equal(whole.maps["C"], maps[0].mean(dim=0))
    assert torch.equal(second.maps["C"], maps[0][1])
    assert list(whole.picture.getdata()) == list(Image.fromarray(render(make_scene(0, "test", 0))).getdata())


def test_a_map_lies_upright_on_its_image_and_begins_at_zero(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[dict[str, Any]] = []
    monkeypatch.setattr("matplotlib.axes.Axes.imshow", lambda axes, data, **options: shown.append(options))
    attend.draw([attend.Row("a star", Image.new("RGB", (8, 8)), {"C": torch.rand(2, 2)})], tmp_path / "map.png")
    assert shown[-1]["vmin"] == 0
    assert shown[-1]["extent"] == (0, attend.ENLARGED, attend.ENLARGED, 0)  # left, right, bottom, top: as the image


def test_an_answer_that_is_given_is_the_one_explained(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["--question", "how many cups are there?", "--answer", "ninety"]
    assert attend.main(["--scenes", "1", *asked, "--out", str(tmp_path / "map.png")]) == 0
    assert "scene 0: how many cups are there? ninety" in capsys.readouterr().out
