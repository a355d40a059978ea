"""Comparisons: which runs they consist of, what is kept, and figures worked by hand."""

from __future__ import annotations

import ast
import json
import os
import re
import signal
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from matplotlib.figure import Figure

from lavis_xformer.compare import figures, inputs, run, tables
from lavis_xformer.compare.plan import Cell, Plan, as_text, read_plan
from lavis_xformer.compare.results import (
    accuracies,
    by_count,
    collect,
    differences,
    mean_and_spread,
    tasks,
)
from lavis_xformer.compare.tables import markdown, provenance
from lavis_xformer.errors import UserError

SHIPPED = "projects/xformer/compare/quick.yaml"


def content(folder: Path) -> dict[str, Any]:
    stage1, stage2 = folder / "stage1.yaml", folder / "stage2.yaml"
    stage1.write_text("run: {max_epoch: 1}\n")
    stage2.write_text("model: {arch: xformer, model_type: mini}\n")
    return {
        "output": str(folder / "out"),
        "seeds": [1, 2],
        "baseline": "a",
        "claim": "b",
        "common": {
            "first": {"config": str(stage1), "options": {"run.max_epoch": 3, "x": 1}},
            "second": {"config": str(stage2)},
            "asked": {"config": str(stage2), "evaluate": True},
        },
        "variants": {
            "a": {"every": {"x": 2}},
            "b": {"second": {"y": [1, 2]}},
            "blind": {"skip": ["first", "second"], "seeds": [7]},
        },
    }


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    return make(tmp_path, content(tmp_path))


def make(folder: Path, given: dict[str, Any], name: str = "toy") -> Plan:
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(given, sort_keys=False))
    return read_plan(str(path))


def finish(cell: Cell, **note: Any) -> None:
    cell.folder.mkdir(parents=True, exist_ok=True)
    (cell.folder / "inputs.json").write_text(json.dumps(cell.inputs()))
    (cell.folder / "cell.json").write_text(
        json.dumps({"seconds": 2.0, "peak_memory_mb": 100.0, "machine": "toy", **note})
    )


def test_cells_are_variants_by_seeds_by_stages(plan: Plan) -> None:
    cells = plan.cells()
    assert [(c.variant, c.seed, c.stage.name) for c in cells][:4] == [
        ("a", 1, "first"), ("a", 1, "second"), ("a", 1, "asked"), ("a", 2, "first"),
    ]  # fmt: skip
    assert [(c.seed, c.stage.name) for c in cells if c.variant == "blind"] == [(7, "asked")]
    first, second, asked = cells[:3]
    assert first.options == {
        "run.max_epoch": 3, "x": 2, "run.seed": 1, "run.output_dir": str(first.folder.parent),
        "run.job_id": first.folder.name, "run.resume": "auto",
    }  # fmt: skip
    assert second.options["model.pretrained"] == str(first.folder / "checkpoint_best.pth")
    assert asked.options["model.pretrained"] == str(second.folder / "checkpoint_best.pth")
    assert "run.resume" not in asked.options
    assert asked.arguments()[:2] == ["-m", "lavis.evaluate"]
    assert "y=[1, 2]" in plan.cells(["b"])[1].arguments()
    assert [as_text(value) for value in ("none", None, True, 0.5)] == ["none", "null", "true", "0.5"]


@pytest.mark.parametrize(
    "text", ["none", "no", "null", "", "007", "a #b", "[a]", "{}", "Question: {} Answer:", "a 'b' \"c\"", "a\nb", "où"]
)
def test_a_run_is_given_the_text_that_the_yaml_has(text: str) -> None:
    from lavis_xformer.config.load import parse_options

    assert parse_options([f"run.prompt={as_text(text)}"]).run.prompt == text
    assert parse_options([f"run.init_lr={as_text('1e-3')}"]).run.init_lr == 0.001, "which PyYAML takes for text"


def test_a_stage_s_own_options_come_before_those_of_every_stage_and_the_seed_is_the_plan_s(tmp_path: Path) -> None:
    given = content(tmp_path)
    given["common"]["first"]["options"]["run.seed"] = 9
    given["variants"]["a"] = {"every": {"x": 2}, "second": {"x": 5}}
    first, second, _ = make(tmp_path, given).cells(["a"], [2])
    assert (first.options["x"], second.options["x"]) == (2, 5)
    assert first.options["run.seed"] == 2


def test_runs_of_several_processes_are_launched_together_and_apart_from_those_of_one(tmp_path: Path) -> None:
    alone, together = (make(tmp_path, {**content(tmp_path), "processes": n}).cells(["a"], [1])[0] for n in (1, 2))
    one, two = (" ".join(cell.arguments()) for cell in (alone, together))
    assert one.startswith("-m lavis.train ")
    assert two.startswith("-m torch.distributed.run --standalone --nproc_per_node=2 -m lavis.train ")
    assert alone.folder != together.folder, "the batch over all processes differs"


def test_only_and_seeds_choose(plan: Plan) -> None:
    assert {(c.variant, c.seed) for c in plan.cells(["b"], [2])} == {("b", 2)}
    with pytest.raises(UserError, match=r"--only bb: toy has no such variant; did you mean 'b'"):
        plan.cells(["bb"])
    with pytest.raises(UserError, match=r"--seeds 9: toy has no such seed; there is: 1, 2, 7"):
        plan.cells(seeds=[1, 9])
    with pytest.raises(UserError, match=r"--seeds 2: blind has no such seed; there is: 7"):
        plan.cells(["blind"], [2])
    assert {c.variant for c in plan.cells(["b", "blind"], [2])} == {"b"}


def test_a_cell_is_kept_until_what_decides_it_changes(tmp_path: Path, plan: Plan) -> None:
    for cell in plan.cells():
        finish(cell)
    assert all(cell.finished for cell in make(tmp_path, content(tmp_path)).cells())
    changed = content(tmp_path)
    changed["variants"]["b"] = {"second": {"y": 3}}
    state = {(c.variant, c.stage.name): c.finished for c in make(tmp_path, changed).cells()}
    assert state[("b", "first")]
    assert not state[("b", "second")]
    assert not state[("b", "asked")], "it asks other weights"
    assert state[("a", "asked")]
    (tmp_path / "stage1.yaml").write_text("run: {max_epoch: 1}  # a comment\n")
    assert plan.cells(["a"])[0].finished
    (tmp_path / "stage1.yaml").write_text("run: {max_epoch: 1, seed: 7, batch_size_train: 4}\n")
    assert plan.cells(["a"])[0].stale() == ["run.batch_size_train: nothing -> 4"], "the others are options of its own"


def test_what_makes_a_run_anew_is_said(
    tmp_path: Path, plan: Plan, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = plan.cells(["a"], [1])[:2]
    finish(first)
    (first.folder / "checkpoint_best.pth").write_bytes(b"old weights")
    finish(second)
    (first.folder / "checkpoint_best.pth").write_bytes(b"other weights")
    (changed,) = second.stale()
    assert changed.startswith("model.pretrained (sha256): ")
    before = inputs.code()
    monkeypatch.setattr(inputs, "code", lambda: "new")
    assert [line.split(":")[0] for line in first.stale()] == ["code"]
    assert replace(plan, lenient=True).cells(["a"])[0].finished
    assert f"to be rerun: code: {before} -> new" in run.listing([first])
    with pytest.raises(UserError, match="the code of lavis_xformer has changed during this comparison"):
        run.run_cell(first)
    ran: list[Cell] = []
    monkeypatch.setattr(run, "run_cell", ran.append)
    monkeypatch.setattr(run, "check_configurations", lambda cells: None)
    assert run.main([str(tmp_path / "toy.yaml"), "--only", "a", "--seeds", "1"]) == 0
    assert ran[0] == first
    assert "rerun, since code: " in capsys.readouterr().out
    assert (tmp_path / "out" / "cells" / f"{first.folder.name}.stale1" / "cell.json").is_file()
    assert not first.folder.exists()


def test_a_result_outlives_the_weights_that_it_was_computed_with(plan: Plan) -> None:
    _, second, asked = plan.cells(["a"], [1])
    weights = second.folder / "checkpoint_best.pth"
    weights.parent.mkdir(parents=True)
    weights.write_bytes(b"weights")
    finish(asked)
    assert asked.finished
    weights.unlink()
    assert asked.finished, "nothing could be asked again"
    weights.write_bytes(b"others")
    assert not asked.finished


def test_files_of_lavis_datasets_in_the_cache_are_inputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAVIS_XFORMER_CACHE", str(tmp_path))
    truths = tmp_path / "coco" / "annotations" / "v2_mscoco_val2014_annotations.json"
    truths.parent.mkdir(parents=True)
    truths.write_text("{}")
    gqa = "projects/xformer/eval/gqa_opt2.7b.yaml"
    assert inputs.inputs_of(gqa, {})["datasets.gqa.build_info.annotations.val.storage.0"].endswith(
        'testdev_balanced_questions.json"'
    ), "of its own type, not of the default one"
    key = "datasets.coco_vqa.build_info.annotations.val.storage.3 (sha256)"
    before = inputs.inputs_of("projects/xformer/eval/vqav2_opt2.7b.yaml", {})
    truths.write_text('{"annotations": []}')
    after = inputs.inputs_of("projects/xformer/eval/vqav2_opt2.7b.yaml", {})
    (changed,) = inputs.changes(before, after)
    assert changed.startswith(f"{key}: {before[key]} -> ")


def test_inputs_are_the_whole_configuration_assets_code_and_versions(tmp_path: Path) -> None:
    questions = tmp_path / "questions.json"
    questions.write_text("[]")
    config = "projects/xformer/pretrain.yaml"
    options = {"model.fusion": "none", "datasets.xformer_scenes.splits.val.annotations": [str(questions)]}
    found = inputs.inputs_of(config, options)
    assert found["model.fusion"] == '"none"'
    assert found["model.num_query_token"] == "32", "of the model's default YAML"
    assert any(key.startswith("datasets.xformer_scenes.build_info") or ".preset" in key for key in found)
    assert {"code", "python", "torch", "salesforce-lavis"} <= found.keys()
    assert {"model.vit_model (sha256)", "model.mae_model (sha256)", "model.bert (sha256)"} <= found.keys()
    (named,) = [key for key in found if key.endswith("annotations.0 (sha256)")]
    questions.write_text("[1]")
    assert inputs.changes(found, inputs.inputs_of(config, options)) == [
        f"{named}: {found[named]} -> {inputs.content(str(questions))}"
    ]


def test_what_a_yaml_leaves_to_defaults_is_among_the_inputs(tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    config.write_text("model: {arch: xformer}\ndatasets:\n  xformer_scenes:\n")
    found = inputs.inputs_of(str(config), {})
    assert found["model.num_query_token"], "of a model without a type"
    assert found["datasets.xformer_scenes.data_type"] == '"images"', "of a dataset without keys"


def test_what_names_no_file_has_no_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mini").mkdir()
    assert [inputs.content(value, folders=True) for value in ("", "mini", "none", "facebook/vit-mae-huge")] == [
        None
    ] * 4
    assert inputs.content(str(tmp_path / "mini"), folders=True) is not None


def test_a_stage_may_name_its_own_weights(tmp_path: Path) -> None:
    given = content(tmp_path)
    given["variants"]["b"] = {"second": {"model.pretrained": None}}
    first, second, asked = make(tmp_path, given).cells(["b"], [1])
    assert second.options["model.pretrained"] is None, "from scratch"
    assert asked.options["model.pretrained"] == str(second.folder / "checkpoint_best.pth")
    assert "model.pretrained" not in first.options
    given["variants"]["b"] = {"every": {"model.pretrained": "w.pth"}}
    first, second, _ = make(tmp_path, given).cells(["b"], [1])
    assert first.options["model.pretrained"] == "w.pth"
    assert second.options["model.pretrained"] == str(first.folder / "checkpoint_best.pth"), "it goes on from the first"


def test_a_stage_tests_one_split(tmp_path: Path) -> None:
    given = content(tmp_path)
    given["common"]["asked"]["options"] = {"run.test_splits": ["test"], "run.valid_splits": ["val"]}
    first, _, asked = make(tmp_path, given).cells(["a"], [1])
    run.check_splits(first)
    with pytest.raises(UserError, match="asked tests the splits test, val; give each a stage of its own"):
        run.check_splits(asked)


def test_what_an_option_leaves_out_stays_among_the_inputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "q.json"
    file.write_text("[]")
    (tmp_path / "run.yaml").write_text("model:\ndatasets: {d: {test: {scenes: 5, captions: fine}}}\n")
    found = inputs.inputs_of(str(tmp_path / "run.yaml"), {"datasets.d.test": {"scenes": 4}})
    assert (found["datasets.d.test.scenes"], found["datasets.d.test.captions"]) == ("4", '"fine"')
    monkeypatch.setenv("HOME", str(tmp_path))
    assert inputs.content("~/q.json") == inputs.content("$HOME/q.json") == inputs.content(str(file)) is not None
    assert inputs.content("x" * 5000) is None
    assert inputs.content("assets://nope/clip") is not None, "the run says what is wrong"
    (tmp_path / "run.yaml").write_text("{")
    with pytest.raises(UserError, match=r"run\.yaml is not valid YAML"):
        inputs.inputs_of(str(tmp_path / "run.yaml"), {})


def test_a_variant_without_stages_can_be_listed(tmp_path: Path) -> None:
    given = content(tmp_path)
    given["variants"]["nothing"] = {"skip": ["first", "second", "asked"]}
    assert run.listing(make(tmp_path, given).cells(["nothing"])) == ""


def test_code_is_what_runs_execute_without_its_words() -> None:
    def written(source: str) -> object:
        return ast.dump(inputs.without_comments(ast.parse(source)))

    assert written('"""A."""\ndef f():\n    """B."""\n    return 1') == written("def f(): return 1  # one")
    assert written("def f(): return 1") != written("def f(): return 2")
    assert len(inputs.code_now()) == 12


def test_a_change_in_any_part_that_runs_execute_is_another_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inputs, "PACKAGE", tmp_path)
    before = inputs.code_now()
    for part in ("config", "data/scenes", "engine", "models", "runners", "tasks"):
        (tmp_path / part).mkdir(parents=True)
        (tmp_path / part / "x.py").write_text("x = 1\n")
        before, last = inputs.code_now(), before
        assert before != last, part
    for file in ("losses.py", "images.py", "launch.py", "distributed.py", "train.py"):
        (tmp_path / file).write_text("x = 1\n")
        before, last = inputs.code_now(), before
        assert before != last, file
    (tmp_path / "compare").mkdir()
    (tmp_path / "compare" / "tables.py").write_text("x = 1\n")
    assert inputs.code_now() == before, "tables are made of what runs have left"
    (tmp_path / "my_things.py").write_text("x = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("LAVIS_XFORMER_IMPORT", "my_things")
    assert inputs.code_now() != before, "a module of the user's own that runs import"


def test_a_yaml_may_state_its_difference_alone(tmp_path: Path) -> None:
    make(tmp_path, content(tmp_path), "base")
    variants = {"a": None, "c": {"every": {"x": 9}}}
    given = {"extends": "base.yaml", "common": {"first": {"run.x": 5}}, "variants": variants}
    child = make(tmp_path, given, "child")
    assert list(child.variants) == ["a", "c"]
    assert (child.name, child.baseline, child.seeds) == ("child", "a", (1, 2))
    assert child.stages[0].options == {"run.max_epoch": 3, "x": 1, "run.x": 5}
    assert child.claim == "", "b is none of its variants"
    with pytest.raises(UserError, match=r"variants\.z: base\.yaml has no such variant"):
        make(tmp_path, {"extends": "base.yaml", "variants": {"z": None}}, "other")
    with pytest.raises(UserError, match=r"common\.frist: base\.yaml has no such stage; did you mean 'first'"):
        make(tmp_path, {"extends": "base.yaml", "common": {"frist": {"run.x": 5}}}, "other")


def test_a_child_may_give_a_stage_another_config(tmp_path: Path) -> None:
    make(tmp_path, content(tmp_path), "base")
    given = {"extends": "base.yaml", "common": {"first": {"config": "other.yaml", "evaluate": True, "run.seed": 5}}}
    (stage, *_), (before, *_) = (make(tmp_path, of, "child").stages for of in (given, {"extends": "base.yaml"}))
    assert (stage.config, stage.evaluate) == ("other.yaml", True)
    assert stage.options == {**before.options, "run.seed": 5}
    for more in ({"options": {"run.seed": 5}}, {"run.seed": 5}):
        (stage, *_) = make(tmp_path, {"extends": "base.yaml", "common": {"first": more}}, "child").stages
        assert (stage.config, stage.options) == (before.config, {**before.options, "run.seed": 5})
    with pytest.raises(UserError, match=r"common\.first\.confg: did you mean 'config'"):
        make(tmp_path, {"extends": "base.yaml", "common": {"first": {"confg": "other.yaml"}}}, "child")


@pytest.mark.parametrize("named", ["quick.yaml", SHIPPED])
def test_a_shipped_yaml_is_extended_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, named: str) -> None:
    monkeypatch.chdir(tmp_path)
    own = make(tmp_path, {"extends": named, "seeds": [4]}, "quick")  # never itself, though it has the name
    assert list(own.variants) == list(read_plan(SHIPPED).variants)
    assert own.seeds == (4,)
    make(tmp_path, content(tmp_path), "mini")
    assert list(make(tmp_path, {"extends": "mini.yaml"}, "near").variants) == ["a", "b", "blind"], "a neighbour first"
    with pytest.raises(UserError, match=r"extends: there is no quik\.yaml .*; did you mean 'quick\.yaml'"):
        make(tmp_path, {"extends": "quik.yaml"}, "far")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": [1]}, "'seed' is no key of a comparison; did you mean 'seeds'"),
        ({"baseline": "aa"}, "baseline: no variant 'aa'; did you mean 'a'"),
        ({"claim": "bb"}, "claim: no variant 'bb'; did you mean 'b'"),
        ({"variants": {"a": {"frist": {}}}}, r"variants\.a\.frist: did you mean 'first'"),
        ({"common": {"first": {}}}, r"common\.first\.config is missing"),
        ({"output": None}, "'output' is missing"),
        ({"seeds": 1}, r"seeds: 1 is not a list of integers from 0 on, such as \[1, 2, 3\]"),
        ({"seeds": [-1]}, r"seeds: \[-1\] is not a list of integers from 0 on"),
        ({"seeds": [1, 1]}, r"seeds: \[1, 1\] names a seed twice"),
        ({"variants": {"a": {"seeds": ["x"]}}}, r"variants\.a\.seeds: \['x'\] is not a list of integers"),
        ({"variants": ["a"]}, r"variants: \['a'\] is not a mapping of keys to values"),
        ({"variants": {"a": 3}}, r"variants\.a: 3 is not a mapping of keys to values"),
        ({"variants": {"a": {"first": ["run.seed"]}}}, r"variants\.a\.first: \['run.seed'\] is not a mapping"),
        ({"variants": {"a": {"skip": "first"}}}, r"variants\.a\.skip: first is not a list of stages, such as"),
        ({"common": {"first": "x.yaml"}}, r"common\.first: x\.yaml is not a mapping"),
        ({"common": {"first": None}}, r"common\.first\.config is missing"),
        ({"common": {"first": {"config": "x.yaml", "options": ["a=1"]}}}, r"common\.first\.options: \['a=1'\] is no"),
        ({"common": {"first": {"config": 5}}}, r"common\.first\.config is 5; it must name a project's YAML"),
        ({"common": {"first": {"config": "x.yaml", "evaluate": "no"}}}, r"first\.evaluate is 'no'; it must be true or"),
        ({"common": {"a.b": {"config": "x.yaml"}}}, r"common\.a\.b: a stage's name can't have a dot"),
        ({"variants": {0.5: {}}}, r"variants: YAML doesn't read the name 0\.5 as text; put it in quotes"),
        ({"common": {True: {"config": "x.yaml"}}}, r"common: YAML doesn't read the name True as text"),
        ({"baseline": ["a"]}, r"baseline: no variant '\['a'\]'"),
        ({"processes": "x"}, r"processes is 'x'; it must be a whole number, 1 or more"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make(tmp_path, content(tmp_path) | change)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"seeds: [1\nbaseline: a\n", r"plan\.yaml is not valid YAML, line 2: "),
        (b"variants:\n  a: {skip: [q]}\n  b:\n  a:\n", r"plan\.yaml is not valid YAML, line 4: 'a' is given twice"),
        (b"\xff\xfe", r"plan\.yaml is not UTF-8 text"),
        (b"model: {arch: xformer}", r"plan\.yaml: 'model' is no key of a comparison; there is: baseline"),
    ],
)
def test_a_file_that_is_no_comparison_is_named(tmp_path: Path, text: bytes, message: str) -> None:
    (tmp_path / "plan.yaml").write_bytes(text)
    with pytest.raises(UserError, match=message):
        read_plan(str(tmp_path / "plan.yaml"))


def answer(number: int, correct: bool, *, truth: str = "1", kind: str = "count") -> dict[str, Any]:
    return {
        "question_id": number, "image": f"i{number}", "question": "?", "kind": kind, "group": kind,
        "truth": truth, "answer": "", "correct": correct,
    }  # fmt: skip


def seeded(answers: list[dict[str, Any]], seed: int) -> list[dict[str, Any]]:
    return [{**row, "seed": seed, "stage": "asked"} for row in answers]


def test_differences_by_hand() -> None:
    ours = seeded([answer(n, True) for n in range(4)], 1) + seeded([answer(n, n < 2) for n in range(4)], 2)
    theirs = seeded([answer(n, False) for n in range(4)], 1)
    gap = differences(ours, theirs)["asked.count"]  # one seed in common: that one alone, the other has no partner
    assert gap == {"difference": 100, "seeds": 1, "n": 4, "low": 100, "high": 100}
    gap = differences(ours, seeded([answer(n, False) for n in range(4)], 3))["asked.count"]  # none: means over seeds
    assert (gap["difference"], gap["seeds"], gap["n"]) == (75, 1, 4)
    assert 50 <= gap["low"] <= 75 <= gap["high"] <= 100
    assert differences(ours, []) == {}
    same = {"n": 4, "seeds": 2, "difference": 0, "low": 0, "high": 0}
    assert differences(ours, ours)["asked.count"] == same
    paired = differences(ours, theirs + seeded([answer(n, False) for n in range(4)], 2))["asked.count"]
    assert (paired["difference"], paired["seeds"]) == (75, 2)
    assert paired["high"] - paired["low"] > gap["high"] - gap["low"], "seeds differ, and the interval knows"
    more = seeded([answer(n, False) for n in range(4)], 0) + ours
    common = differences(more, theirs + seeded([answer(n, False) for n in range(4)], 2))["asked.count"]
    assert common == paired, "seeds that the other lacks are left out"
    fewer = differences(ours, seeded([answer(n, False) for n in range(1, 4)], 1))["asked.count"]
    assert (fewer["n"], fewer["difference"]) == (3, 100), "only what both were asked"
    assert mean_and_spread([1, 3]) == {"mean": 2, "spread": pytest.approx(2**0.5)}
    assert mean_and_spread([1])["spread"] is None


def test_tasks_and_accuracies_by_hand() -> None:
    first = [answer(0, True, truth="2"), answer(1, True, truth="2"), answer(2, False, truth="5"),
             answer(3, True, truth="red", kind="attribute")]  # fmt: skip
    rows = seeded(first, 1) + seeded([{**row, "correct": False} for row in first], 2)
    asked = tasks(rows)
    assert list(asked) == ["asked.all", "asked.attribute", "asked.count"]
    assert (asked["asked.count"]["n"], asked["asked.count"]["majority_answer"]) == (3, "2")
    assert asked["asked.count"]["majority"] == pytest.approx(200 / 3)
    assert asked["asked.all"]["majority"] == 75, "of every group its own"
    found = accuracies(rows)["asked.all"]
    assert (found["mean"], found["seeds"]) == (37.5, {1: 75, 2: 0})
    assert found["low"] == 0
    assert found["high"] > 75


def test_questions_about_one_image_are_drawn_together() -> None:
    rows = seeded([{**answer(n, n < 10), "image": f"i{n // 10}"} for n in range(20)], 1)
    found = accuracies(rows)["asked.count"]
    assert (found["mean"], found["low"], found["high"]) == (50, 0, 100)


def test_questions_are_told_apart_by_their_image_and_their_words() -> None:
    first = answer(0, True)
    rows = [first, {**first, "image": "other", "correct": False}, {**first, "question": "!", "correct": False}]
    found = accuracies(seeded(rows, 1))["asked.count"]
    assert (found["n"], found["mean"]) == (3, pytest.approx(100 / 3))
    assert tasks(seeded(rows, 1))["asked.count"]["n"] == 3


def test_accuracy_by_true_count_by_hand() -> None:
    rows = [answer(0, True, truth="2"), answer(1, False, truth="2"), answer(2, True, truth="5", kind="count_group"),
            answer(3, True, truth="red", kind="attribute")]  # fmt: skip
    elsewhere = [{**row, "stage": "photos"} for row in seeded([answer(0, False, truth="2")], 1)]
    found = {
        stage: {count: (value["n"], value["mean"]) for count, value in counts.items()}
        for stage, counts in by_count([*seeded(rows, 1), *elsewhere]).items()
    }
    assert found == {"asked": {"2": (2, 50), "5": (1, 100)}, "photos": {"2": (1, 0)}}


def pretend(plan: Plan) -> None:
    """Finish every run, but don't ask seed 2 of b: a is right on half of the questions, b on all."""
    for cell in plan.cells():
        if (cell.variant, cell.seed) == ("b", 2) and cell.stage.evaluate:
            continue
        finish(cell, trainable=None if cell.stage.evaluate else 2_500_000)
        if cell.stage.evaluate:
            rows = [answer(n, cell.variant == "b" or n % 2 == 0, truth=str(1 + n % 3)) for n in range(6)]
            result = {
                "figures": {"accuracy": 0, "f1": 0.5}, "answers": rows, "blind": cell.variant == "blind",
                "benchmark": "toys", "split": "test", "scorer": "strict", "template": "raw",
                "protocol": {"name": "paper", "num_beams": 5}, "question_sha256": {"q.json": "0123456789abcdef"},
            }  # fmt: skip
            (cell.folder / "result").mkdir()
            (cell.folder / "result" / "test.json").write_text(json.dumps(result))
            (cell.folder / "result" / "vqa_result.json").write_text("[]")  # LAVIS's own
        else:
            best = {"split": "val", "epoch": 0, "agg_metrics": 30.0 + cell.seed, "loss": 1.5, "loss_itc": 1.0}
            summary = {"test": {"test": {"i2t_r1": 10.0 * cell.seed, "chance_i2t_r1": 1.0}}, "best": best}
            (cell.folder / "summary.json").write_text(json.dumps(summary))
            log = [{"kind": "eval", "step": 5, "loss_itc": 2.0}, {"kind": "step", "step": 5, "loss_itc": 9.0}]
            (cell.folder / "log.jsonl").write_text("\n".join(map(json.dumps, log)))


def test_tables_figures_and_json(plan: Plan) -> None:
    pretend(plan)
    shown = run.write(plan)
    found = json.loads((plan.output / "toy" / "results.json").read_text())
    assert (found["finished"], found["planned"]) == (12, 13)
    measured = {name: value["mean"] for name, value in found["variants"]["a"]["figures"].items()}
    assert {name: value for name, value in measured.items() if name.startswith("first.")} == {
        "first.i2t_r1": 15, "first.chance_i2t_r1": 1, "first.val_loss": 1.5, "first.val_score": 31.5,
    }  # fmt: skip
    assert found["differences"]["b"]["asked.count"]["difference"] == 50
    assert found["claimed"]["a"]["asked.count"]["difference"] == 50
    assert markdown(collect(plan)) in shown
    for part in (
        "15.000 ± 7.071", "| most frequent answer, or chance |  | 33.3 |", "| questions (images) |  | 6 (6) |",
        "| blind (no image) | 1 | 50.0 |", "| b | 1 | 100.0 |", "+50.0 [", "2.50 M; 2; 100", "b minus the others",
        "] ¹ |",
        "| questions | 2 | 2 | 2 |", "machine: toy", "| 0.500 ± 0.000 |",
        "toys test: protocol paper (num_beams 5), scorer strict, template raw, questions 0123456789ab.",
    ):  # fmt: skip
        assert part in shown, part
    assert "code has changed since" in shown
    runs = [{"folder": name, "code": name} for name in "xy"]
    assert "different code" in provenance({"a": {"runs": runs}}, "x")
    assert "**" not in provenance({"a": {"runs": runs[:1]}}, "x")
    for name in ("bars", "counts", "curves"):
        assert (plan.output / "toy" / f"{name}.png").stat().st_size > 1000
    assert figures.losses(plan.cells()[0].folder) == {"loss_itc": (([5], [9.0]), ([5], [2.0]))}


@pytest.mark.parametrize(
    ("names", "columns"),
    [(["a", "b", "c"], 4), ([f"a variant with a name of {n} and many more words" for n in range(9)], 2)],
)
def test_a_legend_fits_its_figure(names: list[str], columns: int, tmp_path: Path, monkeypatch: Any) -> None:
    drawn: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: drawn.append(figure))
    value = {"mean": 50.0, "low": 40.0, "high": 60.0, "n": 3}
    tasks = {"asked.count": {"n": 3, "majority": 20.0}}
    figures.draw_bars({name: {"accuracy": {"asked.count": value}} for name in names}, tasks, tmp_path / "bars.png")
    (legend,) = drawn[0].legends
    drawn[0].draw_without_rendering()
    assert legend.get_window_extent().width <= drawn[0].bbox.width
    assert len({round(text.get_window_extent().x0) for text in legend.get_texts()}) == columns


def test_what_is_to_be_done_anew_counts_no_more(tmp_path: Path, plan: Plan) -> None:
    pretend(plan)
    assert collect(plan)["variants"]["b"]["accuracy"]
    (tmp_path / "stage2.yaml").write_text("model: {arch: xformer, model_type: mini, fusion: none}\n")
    found = collect(plan)
    assert found["variants"]["b"]["accuracy"] == {}
    assert found["finished"] == 4, "the first stage alone"


def scored(group: str, *rows: tuple[float, float]) -> list[dict[str, Any]]:
    """Rows of what has no truth: how right each is, and what chance gives."""
    shared = {"question": "", "kind": "k", "group": group}
    return [
        {"question_id": n, "image": f"i{n}", **shared, "correct": right, "guess": guess}
        for n, (right, guess) in enumerate(rows)
    ]


def test_captions_and_retrieval_of_a_training_are_paired(plan: Plan) -> None:
    for cell in plan.cells(["a", "b"], [1]):
        finish(cell)
        better = 0.5 * (cell.variant == "b")
        figures = {"i2t_r1": 99.0, "chance_i2t_r1": 99.0, "itm_accuracy": 0.9}
        (cell.folder / "summary.json").write_text(json.dumps({"test": {"test": figures}}))
        (cell.folder / "result").mkdir(exist_ok=True)
        rows = scored("i2t_r1", (better, 0.25), (0.5, 0.25)) if cell.stage.name == "first" else []
        if not cell.stage.evaluate:  # as stage 2 writes what it answers
            rows += [{**row, "kind": "count", "truth": "two"} for row in scored("answers_count", (1, 1))]
        for split in ("val", "test"):
            content = {"figures": figures, "answers": rows if split == "test" else scored("i2t_r1", (1, 1))}
            (cell.folder / "result" / f"{split}_scores.json").write_text(json.dumps(content))
    found = collect(plan)
    assert list(found["tasks"]) == ["first.i2t_r1", "asked.i2t_r1"], "questions are compared in an evaluation"
    assert found["variants"]["a"]["by_count"] == {}
    assert found["variants"]["a"]["accuracy"]["first.i2t_r1"]["mean"] == 25
    assert found["differences"]["b"]["first.i2t_r1"]["difference"] == 25
    assert (found["tasks"]["first.i2t_r1"]["n"], found["tasks"]["first.i2t_r1"]["majority"]) == (2, 25)
    assert set(found["variants"]["a"]["figures"]) >= {"first.itm_accuracy", "second.i2t_r1"}
    assert "first.i2t_r1" not in found["variants"]["a"]["figures"], "it stands among what is paired"
    assert "None" not in markdown(found)


def test_a_training_may_test_any_split_and_chance_is_the_mean_of_the_models(plan: Plan) -> None:
    for cell in plan.cells(["a", "b"], [1]):
        finish(cell)
        (cell.folder / "summary.json").write_text('{"test": {"val": {"caption_f1": 99.0}}}')
        (cell.folder / "result").mkdir(exist_ok=True)
        better = float(cell.variant == "b")
        rows = scored("caption_f1", (better, 0.25 + better / 2)) if cell.stage.name == "first" else []
        (cell.folder / "result" / "val_scores.json").write_text(json.dumps({"figures": {}, "answers": rows}))
    found = collect(plan)
    assert found["differences"]["b"]["first.caption_f1"]["difference"] == 100
    assert found["tasks"]["first.caption_f1"]["majority"] == 50, "25 and 75 %: it depends on what is said"


def test_what_is_not_scored_one_by_one_has_figures_alone(plan: Plan) -> None:
    said = [{"image_id": 1, "caption": "a dog"}]
    written = {
        "caption.json": {"figures": {"agg_metrics": 1.2, "CIDEr": 0.9}, "answers": said, "scorer": "pycocoevalcap"},
        "retrieval.json": {"figures": {"txt_r1": 41.0}, "protocol": {"name": "lavis", "k_test": 128}},
        "gqa.json": {"figures": {"accuracy": 50, "accuracy_semantic_rel": 40.0, "n": 3}, "answers": [answer(0, True)]},
        "val_vqa_result.json": [{"question_id": 1}],
    }
    for cell in plan.cells(["a"], [1]):
        finish(cell)
        (cell.folder / "summary.json").write_text('{"test": {}}')
        (cell.folder / "result").mkdir()
        for name, content in written.items():
            (cell.folder / "result" / name).write_text(json.dumps(content))
    found = collect(plan)
    figures = {name: value["mean"] for name, value in found["variants"]["a"]["figures"].items()}
    assert figures == {"asked.CIDEr": 0.9, "asked.txt_r1": 41, "asked.accuracy_semantic_rel": 40}
    assert list(found["tasks"]) == ["asked.count"]
    assert "protocol lavis (k_test 128)" in markdown(found)


def test_a_training_s_curve_is_thinned_to_means(tmp_path: Path) -> None:
    rows = [{"kind": "step", "step": step, "loss_lm": float(step % 2)} for step in range(1, 161)]
    (tmp_path / "log.jsonl").write_text("\n".join(map(json.dumps, rows)))
    curve = figures.losses(tmp_path)["loss_lm"]
    steps, values = curve.training
    assert len(steps) == len(values) == figures.STRETCHES
    assert (steps[0], values[0]) == (2.5, 0.5)
    assert (steps[-1], values[-1]) == (158.5, 0.5)
    assert curve.validation == ([], [])


def test_nothing_finished_is_a_table_too(plan: Plan) -> None:
    assert "0 of 13 runs" in run.write(plan)


@pytest.mark.parametrize(("device", "memory"), [("cuda", 542.3), ("cpu", None)])
def test_a_training_on_a_gpu_counts_the_gpus_memory(device: str, memory: float | None, tmp_path: Path) -> None:
    assert run.gpu_memory(tmp_path) is None, "an evaluation writes no summary"
    (tmp_path / "summary.json").write_text(json.dumps({"device": device, "peak_memory_mb": 542.3}))
    assert run.gpu_memory(tmp_path) == memory


def test_a_run_that_was_stopped_took_as_long_as_all_its_starts(tmp_path: Path) -> None:
    assert run.with_earlier(tmp_path, 10.04, 500.0) == {"seconds": 10.0, "peak_memory_mb": 500.0}
    assert run.with_earlier(tmp_path, 5.0, 400.0) == {"seconds": 15.0, "peak_memory_mb": 500.0}


def test_weights_that_are_tied_count_once(tmp_path: Path) -> None:
    table = torch.zeros(3, 4)
    state = {"table": table, "head": table.detach(), "bias": torch.zeros(5), "steps": torch.zeros(7, dtype=torch.long)}
    torch.save({"model": state}, tmp_path / "checkpoint_best.pth")
    assert run.trained_weights(tmp_path / "checkpoint_best.pth") == 3 * 4 + 5
    assert run.trained_weights(tmp_path / "none.pth") is None


def test_a_failed_run_says_why(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Cell, "arguments", lambda cell: ["-c", "print('begun'); raise SystemExit('error: no data')"])
    with pytest.raises(UserError, match=r"a, seed 1, first failed: error: no data \(see .*console\.txt\)"):
        run.run_cell(plan.cells()[0])
    assert not plan.cells()[0].finished


def test_runs_side_by_side_and_what_they_share_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = content(tmp_path)
    given["variants"]["c"] = {"asked": {"z": 1}}  # the trainings of "b" but for y
    cells = make(tmp_path, given).cells(["a", "b", "c"], [1])
    together, ran = threading.Barrier(2, timeout=10), []

    def fake(cell: Cell) -> None:
        if cell.variant != "c" and cell.stage.name == "first":
            together.wait()  # passed by two at once only
        finish(cell)
        ran.append(cell)

    monkeypatch.setattr(run, "run_cell", fake)
    run.run_all(cells, jobs=2)
    assert sorted(cell.folder for cell in ran) == sorted({cell.folder for cell in cells})
    for name in "abc":
        stages = [cell.stage.name for cell in ran if cell.variant == name]
        assert stages == [stage for stage in ("first", "second", "asked") if stage in stages], "in order"
    run.run_all(cells, jobs=2)
    assert len(ran) == 8, "nothing is run again"


def test_sigterm_stops_the_runs_in_progress(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    code = "print('begun', flush=True); import time; time.sleep(60)"
    monkeypatch.setattr(Cell, "arguments", lambda cell: ["-c", code])
    cells = plan.cells(["a", "b"], [1])
    said = [cells[0].folder / run.SAID, cells[3].folder / run.SAID]

    def stop() -> None:
        while not all(path.is_file() and "begun" in path.read_text() for path in said):
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop, daemon=True).start()
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        run.run_all(cells, jobs=2)
    assert time.monotonic() - start < 30, "they were not waited for to their ends"
    assert not run.IN_PROGRESS
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_run_begun_just_as_sigterm_comes_stops_too(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Cell, "arguments", lambda cell: ["-c", "import time; time.sleep(60)"])
    monkeypatch.setattr(run, "TERMINATED", threading.Event())
    run.TERMINATED.set()
    start = time.monotonic()
    with pytest.raises(UserError, match="a, seed 1, first failed"):
        run.run_cell(plan.cells()[0])
    assert time.monotonic() - start < 30


def test_after_a_failed_run_no_other_begins(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    begun = []

    def fail(cell: Cell) -> None:
        begun.append(cell)
        raise UserError("out of memory")

    monkeypatch.setattr(run, "run_cell", fail)
    with pytest.raises(UserError, match="out of memory"):
        run.run_all(plan.cells())
    assert len(begun) == 1


def test_after_a_failed_run_the_other_variants_begin_if_told_to(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    begun = []

    def fail_a(cell: Cell) -> None:
        begun.append((cell.variant, cell.seed, cell.stage.name))
        if cell.variant == "a":
            raise UserError(f"{cell.variant}, seed {cell.seed}, {cell.stage.name} failed: out of memory")
        finish(cell)

    monkeypatch.setattr(run, "run_cell", fail_a)
    with pytest.raises(
        UserError, match=r"^a, seed 1, first failed: out of memory; a, seed 2, first failed: out of memory$"
    ):
        run.run_all(plan.cells(["a", "b"], [1, 2]), keep_going=True)
    stages = ("first", "second", "asked")
    assert begun == [("a", 1, "first"), ("a", 2, "first"), *(("b", seed, stage) for seed in (1, 2) for stage in stages)]


def test_stages_are_found_beside_the_yaml_that_names_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = content(tmp_path)
    for stage in given["common"].values():
        stage["config"] = Path(stage["config"]).name
    make(tmp_path, given, "here")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert [Path(stage.config) for stage in read_plan("../here.yaml").stages] == [
        tmp_path / "elsewhere" / ".." / name for name in ("stage1.yaml", "stage2.yaml", "stage2.yaml")
    ]


def test_a_wrong_key_of_any_run_stops_before_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[Cell] = []
    monkeypatch.setattr(run, "run_cell", begun.append)
    base = Path(__file__).parents[1] / SHIPPED
    variants = {"blip2": None, "typo": {"stage2": {"model.fusoin": "dual"}}}
    make(tmp_path, {"extends": str(base), "output": str(tmp_path / "out"), "variants": variants}, "wrong")
    with pytest.raises(UserError, match=r"^typo, stage2: --options model\.fusoin: .* did you mean 'model\.fusion'\?"):
        run.main([str(tmp_path / "wrong.yaml")])
    assert begun == []
    assert run.main([str(tmp_path / "wrong.yaml"), "--only", "blip2", "--seeds", "1"]) == 0
    assert [cell.stage.name for cell in begun] == ["stage1", "stage2", "questions"], "right ones are started"


@pytest.mark.parametrize(
    ("config", "options", "fault"),
    [
        ("pretrain_stage2", {"model.pretrained": "gone.pth"}, r"model\.pretrained: there is no gone\.pth"),
        ("eval/gvt_coco_oc", {}, r"gvt_coco_oc: no annotation file: set datasets\.gvt_coco_oc"),
        (
            "eval/gvt_coco_oc",
            {"datasets.gvt_coco_oc.splits.test.annotations": "gone.json"},
            r"datasets\.gvt_coco_oc\.splits.*gone\.json: no such annotation",
        ),
        ("eval/gvt_coco_oc", {"run.prompt": "How many?"}, r"run\.prompt: 'How many\?' has no \{\}"),
    ],
)
def test_every_run_is_checked_for_what_it_will_read(config: str, options: dict[str, str], fault: str) -> None:
    from lavis_xformer.check import check

    given = ["run.device=cpu", *(f"{key}={value}" for key, value in options.items())]
    found = check(
        [
            ["right", "projects/xformer/pretrain.yaml", [], False],
            ["a, asked", f"projects/xformer/{config}.yaml", given, config.startswith("eval")],
        ]
    )
    assert re.match(f"a, asked: {fault}", found), found


def test_what_a_run_has_downloaded_does_not_make_it_stale(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cell = replace(plan.cells()[0], options=plan.cells()[0].options | {"x": str(tmp_path / "later.json")})
    brings = f"open({str(tmp_path / 'later.json')!r}, 'a').write('x')"
    monkeypatch.setattr(Cell, "arguments", lambda cell: ["-c", brings])
    run.run_cell(cell)
    assert cell.finished
    (tmp_path / "later.json").write_text("other")
    assert not cell.finished


@pytest.mark.parametrize(
    ("weights", "fault"),
    [
        *((there, "") for there in ("https://host/x.pth", "assets://mini/stage1", "{folder}", "null")),
        ("{folder}/cells/a/x.pth", ""),
        ("gone.pth model.load_pretrained=False", ""),
        ("null model.vit_model=output/encoders1/clip", r"second: model\.vit_model: there is no output/encoders1/clip"),
        ("null model.opt_model=facebook/opt-2.7b", ""),
        ("null model.fusion=none model.mae_model=/gone/mae", ""),
        ("null model.load_finetuned=True model.finetuned=gone.pth", r"second: model\.finetuned: there is no gone\.pth"),
        ("{folder}/cells/b/x.pth", r"second: model\.pretrained: there is no .*/cells/b/x\.pth"),
    ],
)
def test_weights_that_a_run_needs_are_there_or_to_be_made_by_an_earlier_run(
    weights: str, fault: str, tmp_path: Path
) -> None:
    from lavis_xformer.check import check

    first = ["run.job_id=a", f"run.output_dir={tmp_path}/cells"]
    second = [*f"model.pretrained={weights.format(folder=tmp_path)}".split(), "run.job_id=c"]
    runs = [
        ("first", "projects/xformer/pretrain.yaml", first, False),
        ("second", "projects/xformer/pretrain_stage2.yaml", second, False),
    ]
    assert re.fullmatch(fault, check(runs))


@pytest.mark.parametrize(
    ("evaluates", "option", "fault"),
    [
        (False, "run.lr_sched=null", r"run\.lr_sched: missing, and there is no default"),
        (False, "run.resume=always", r"run\.resume is 'always'; it must be one of"),
        (False, "run.seed=4294967296", r"run\.seed is 4294967296; it must be less than"),
        (True, "run.lr_sched=null", ""),
        (True, "run.valid_splits=[]", r"run\.test_splits names no split to evaluate"),
        (True, "run.device=gpu", r"run\.device.*'gpu'.*"),
    ],
)
def test_the_run_section_of_every_run_is_checked_as_the_run_does(evaluates: bool, option: str, fault: str) -> None:
    from lavis_xformer.check import check

    config = "projects/xformer/pretrain_stage2.yaml"
    found = check([("later", config, [option], evaluates)])
    assert re.match(f"later: {fault}" if fault else "^$", found), found


def test_what_was_finished_before_a_failure_is_reported(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(cells: Sequence[Cell], jobs: int, **options: bool) -> None:
        pretend(plan)
        raise UserError("b, seed 2, first failed: out of memory")

    monkeypatch.setattr(run, "run_all", fail)
    monkeypatch.setattr(run, "check_configurations", lambda cells: None)
    with pytest.raises(UserError, match="out of memory"):
        run.main([str(tmp_path / "toy.yaml")])
    assert "## asked: accuracy\n" in capsys.readouterr().out


def test_an_output_that_is_no_folder_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = content(tmp_path)
    given["output"] = str(tmp_path / "file")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"^output: .*file.* can't be created: Not a directory; name another folder"):
        run.folder_of(make(tmp_path, given))


def test_a_stage_whose_yaml_is_missing_is_told_before_the_list(tmp_path: Path) -> None:
    given = content(tmp_path)
    given["common"]["asked"]["config"] = "projects/xformer/eval/scene_vqa.yaml"
    make(tmp_path, given, "missing")
    with pytest.raises(UserError, match=r"scene_vqa\.yaml': there is no such file here .*scenes_vqa\.yaml"):
        run.main([str(tmp_path / "missing.yaml"), "--list"])


def test_the_list_runs_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main([SHIPPED, "--list", "--only", "blip2"]) == 0
    said = capsys.readouterr().out
    assert said.count("to do") + said.count("finished") == 3


TINY = {
    "stage1": {
        "run.max_epoch": 1, "run.batch_size_train": 8,
        "datasets.xformer_scenes.splits.train.scenes": 16, "datasets.xformer_scenes.splits.val.scenes": 8,
        "datasets.xformer_scenes.splits.test": {"scenes": 8, "captions": "medium", "captions_per_image": 1},
    },
    "stage2": {
        "run.batch_size_train": 8,
        "datasets.xformer_scenes.splits.train.scenes": 16, "datasets.xformer_scenes.splits.val.scenes": 4,
        "datasets.xformer_scenes.splits.test": {"scenes": 4, "captions": "medium", "captions_per_image": 1},
        "datasets.xformer_scenes_vqa.splits.train.scenes": 16, "datasets.xformer_scenes_vqa.splits.val.scenes": 4,
        "datasets.xformer_scenes_vqa.splits.test": {"scenes": 4, "questions_per_image": 1},
    },
    "questions": {"datasets.xformer_scenes_vqa.splits.test": {"scenes": 4, "questions_per_image": 8}},
}  # fmt: skip


@pytest.mark.slow
def test_a_small_comparison_runs_and_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    base = Path(__file__).parents[1] / SHIPPED
    variants = dict.fromkeys(("blip2", "xformer"))
    given = {"extends": str(base), "output": str(tmp_path / "out"), "common": TINY, "variants": variants}
    make(tmp_path, given, "tiny")
    assert run.main([str(tmp_path / "tiny.yaml")]) == 0
    found = json.loads((tmp_path / "out" / "tiny" / "results.json").read_text())
    assert found["finished"] == found["planned"] == 6
    assert found["differences"]["xformer"]["questions.all"]["n"] == 32
    trained = [found["variants"][name]["costs"]["stage1"]["trainable"] for name in ("blip2", "xformer")]
    assert trained[0] < trained[1]
    monkeypatch.setattr(run, "run_cell", lambda cell: pytest.fail("finished cells are kept"))
    assert run.main([str(tmp_path / "tiny.yaml")]) == 0


def test_a_variant_is_blind_if_any_of_its_results_is(plan: Plan) -> None:
    pretend(plan)
    cell = next(cell for cell in plan.cells() if cell.variant == "blind")
    (cell.folder / "result" / "z.json").write_text(json.dumps({"figures": {"accuracy": 0}}))
    assert collect(plan)["variants"]["blind"]["blind"] is True


def test_every_shipped_part_has_a_content_of_its_own() -> None:
    assert len({inputs.content(f"assets://mini/{part}") for part in ("clip", "mae", "opt")}) == 3


def test_the_images_of_a_folder_are_not_read(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "run.yaml").write_text(f"datasets: {{image_text_json: {{image_root: {tmp_path / 'photos'}}}}}\n")
    assert "datasets.image_text_json.image_root" in (found := inputs.inputs_of(str(tmp_path / "run.yaml"), {}))
    assert "datasets.image_text_json.image_root (sha256)" not in found


def test_results_that_were_moved_are_still_finished(tmp_path: Path, plan: Plan) -> None:
    for cell in plan.cells():
        finish(cell)
        (cell.folder / "checkpoint_best.pth").write_bytes(cell.folder.name.encode())
    for cell in plan.cells():
        finish(cell)  # now that there are weights to start from
    (tmp_path / "out").rename(tmp_path / "möved")
    moved = make(tmp_path, {**content(tmp_path), "output": str(tmp_path / "möved")}).cells()
    assert [cell.folder.name for cell in moved] == [cell.folder.name for cell in plan.cells()]
    assert [(cell.folder.name, cell.stale()) for cell in moved if not cell.finished] == []


def test_a_file_that_changes_during_a_run_makes_it_stale(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = tmp_path / "read.json"
    read.write_text("before")
    cell = replace(plan.cells()[0], options=plan.cells()[0].options | {"x": str(read)})
    monkeypatch.setattr(Cell, "arguments", lambda cell: ["-c", f"open({str(read)!r}, 'w').write('after')"])
    run.run_cell(cell)
    assert not cell.finished


def test_a_variant_that_was_not_asked_the_first_questions_has_its_row_too() -> None:
    names = ["asked.colour", "asked.count"]
    found = {"tasks": {name: {"n": 4, "images": 2, "majority": 25.0} for name in names}}
    given = {"a": {"accuracy": {names[1]: {"mean": 50.0, "spread": 1.0, "seeds": {1: 49.0, 2: 51.0}}}, "blind": False}}
    assert "| a | 2 |  | 50.0 ± 1.0 |" in tables.accuracy(found, given, names)


def test_figures_other_than_accuracies_have_three_digits() -> None:
    given = {"a": {"figures": {"first.loss_rec": {"mean": 0.12345, "spread": 0.0012}}}}
    assert "0.123 ± 0.001" in tables.figures(given, "first")
