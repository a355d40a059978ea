"""Benchmarks in LAVIS's form of VQA evaluation, from files as their authors publish them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from lavis.common.registry import registry
from omegaconf import OmegaConf
from PIL import Image
from torch.utils.data import DataLoader

from lavis_xformer.data import benchmarks
from lavis_xformer.errors import UserError
from lavis_xformer.files import sha256

NAMES = ("gvt_coco_oc", "gvt_coco_mci", "gvt_vcr_oc", "gvt_vcr_mci", "pope", "mmvp")


def gvt(image_id: int | str, question: str, answer: str) -> dict[str, Any]:
    return {"image_id": image_id, "text_in": question, "text_out": answer, "n_obj_exist": 3}


def picture(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), "red").save(path)


def build(name: str, files: list[Path] | Path, root: Path, **settings: Any) -> Any:
    cls = registry.get_builder_class(name)
    defaults = OmegaConf.load(cls.default_config_path()).datasets[name]
    given = [str(file) for file in files] if isinstance(files, list) else str(files)
    mine = {
        "image_root": str(root),
        "splits": {"test": {"annotations": given}},
        "vis_processor": {"eval": {"image_size": 16}},
    }
    return cls(OmegaConf.merge(defaults, mine, settings)).build_datasets()["test"]


def batch(dataset: Any) -> dict[str, Any]:
    return next(iter(DataLoader(dataset, len(dataset), collate_fn=dataset.collater)))


def column(dataset: Any, key: str) -> list[Any]:
    return [row[key] for row in dataset.annotation]


def truths(dataset: Any) -> list[str]:
    return [row["answers"][0] for row in dataset.annotation]


def test_gvt_coco_counts(tmp_path: Path) -> None:
    picture(tmp_path / "000000000139.jpg")
    file = tmp_path / "coco_oc.json"
    file.write_text(json.dumps([gvt(139, "How many people are there in the image?", "2")]))
    dataset = build("gvt_coco_oc", file, tmp_path)
    samples = batch(dataset)
    assert samples["text_input"] == ["how many people are there in the image?"]
    assert (samples["answer"], samples["question_id"].tolist()) == (["2"], [0])
    assert samples["image"].shape == (1, 6, 16, 16)
    assert (dataset.kind, truths(dataset), column(dataset, "n_objects")) == ("count", ["2"], [3])
    assert dataset.question_sha256 == {str(file): sha256(file)}


@pytest.mark.parametrize(("template", "words"), [("raw", {"exist", "exis"}), ("repaired", {"exist"})])
def test_gvt_vcr_presence_repairs_its_leak(tmp_path: Path, template: str, words: set[str]) -> None:
    picture(tmp_path / "film" / "1@2.jpg")
    rows = [gvt("film/1@2.jpg", f"Does ties {word} in the image?", "No.") for word in ("exist", "exis")]
    (tmp_path / "vcr_mci.json").write_text(json.dumps(rows))
    dataset = build("gvt_vcr_mci", tmp_path / "vcr_mci.json", tmp_path, template=template)
    assert {question.split()[2] for question in column(dataset, "question")} == words
    assert (truths(dataset), dataset.template, dataset.kind) == (["no", "no"], template, "presence")


def test_pope_subsets(tmp_path: Path) -> None:
    picture(tmp_path / "COCO_val2014_000000000001.jpg")
    files = [tmp_path / "coco_pope_random.json", tmp_path / "coco_pope_popular.json"]
    row = {"image": "COCO_val2014_000000000001.jpg", "text": "Is there a cat in the image?", "label": "no"}
    for file in files:  # JSON lines, whatever the ending, as POPE has it; equal question ids
        file.write_text("\n".join(json.dumps({"question_id": n, **row}) for n in (1, 2)))
    dataset = build("pope", files, tmp_path)
    assert column(dataset, "subset") == ["coco_pope_random"] * 2 + ["coco_pope_popular"] * 2
    assert batch(dataset)["question_id"].tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("index", ["lndex", "Index"])  # as published, with a small L; and as it is meant
def test_mmvp_pairs(tmp_path: Path, index: str) -> None:
    for number in (1, 2):
        picture(tmp_path / f"{number}.jpg")
    options = "(a) Open (b) Closed"
    rows = "".join(f'{number},"Open, or not?",{options},({letter})\n' for number, letter in enumerate("ab", start=1))
    table = f"{index},Question,Options,Correct Answer\n{rows}"
    (tmp_path / "Questions.csv").write_text(table)
    dataset = build("mmvp", tmp_path / "Questions.csv", tmp_path)
    assert column(dataset, "pair") == [0, 0]
    assert column(dataset, "options") == [options] * 2
    assert truths(dataset) == ["(a)", "(b)"]
    assert column(dataset, "question")[0] == f"Open, or not? {options}"
    for odd in (rows.splitlines()[0], rows + rows.splitlines()[0]):
        (tmp_path / "Questions.csv").write_text(f"{index},Question,Options,Correct Answer\n{odd}\n")
        with pytest.raises(UserError, match=r"mmvp: Questions: rows 1 and 2, a pair, are not there once each"):
            build("mmvp", tmp_path / "Questions.csv", tmp_path)


def test_files_are_told_apart_by_their_names(tmp_path: Path) -> None:
    files = [tmp_path / folder / "random.json" for folder in "ab"]
    for file in files:
        file.parent.mkdir()
        file.write_text(json.dumps([YES_NO]))
    with pytest.raises(UserError, match=r"pope: two files are called random, which names their results; rename one"):
        build("pope", files, tmp_path)


def test_another_benchmarks_published_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    picture(tmp_path / "000000000139.jpg")
    file = tmp_path / "coco_oc.json"
    file.write_text(json.dumps([gvt(139, "How many?", "2")]))
    monkeypatch.setattr(benchmarks, "GVT_SHA256", {sha256(file): "gvt_coco_oc"})
    with pytest.raises(UserError, match="is the question file of gvt_coco_oc"):
        build("gvt_coco_mci", file, tmp_path)


def test_mistakes_are_named(tmp_path: Path) -> None:
    file = tmp_path / "vcr_mci.json"
    file.write_text(json.dumps([gvt("gone.jpg", "Does it exist?", "No.")]))
    with pytest.raises(UserError, match=r"row 1: no image file .*gone\.jpg"):
        build("gvt_vcr_mci", file, tmp_path)
    with pytest.raises(UserError, match=r"nowhere: no such image folder"):
        build("gvt_vcr_mci", file, tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"image_name: '\{id\}\.jpg' must have no placeholder but \{image_id\}"):
        build("gvt_vcr_mci", file, tmp_path, image_name="{id}.jpg")
    with pytest.raises(UserError, match="did you mean 'repaired'"):
        build("gvt_vcr_mci", file, tmp_path, template="repared")
    with pytest.raises(UserError, match=r"row 1: no 'image' \(the row has image_id"):
        build("pope", file, tmp_path)
    with pytest.raises(UserError, match="is a benchmark"):
        build("gvt_vcr_mci", file, tmp_path, splits={"train": {"annotations": str(file)}})


YES_NO = {"image": "a.jpg", "text": "Is there a cat?", "label": "yes"}
CHOICE = {"Index": 1, "Question": "Open?", "Options": "(a) Open (b) Closed", "Correct Answer": "(a)"}


@pytest.mark.parametrize(
    ("name", "row", "message"),
    [
        ("pope", YES_NO | {"label": "maybe"}, "the answer 'maybe' is not yes or no"),
        ("pope", YES_NO | {"label": None}, "'label' holds no text"),
        ("pope", YES_NO | {"image": {}}, "'image' holds no text"),
        ("gvt_coco_mci", gvt(139, "Does it exist?", "2"), "the answer '2' is not yes or no"),
        ("gvt_coco_oc", gvt(139, "How many?", "two."), "the answer 'two' is not a whole number"),
        ("gvt_coco_oc", gvt(139, "How many?", "2") | {"n_obj_exist": None}, "'n_obj_exist' holds no text"),
        (
            "gvt_coco_oc",
            gvt(139, "How many?", "2") | {"n_obj_exist": 2.5},
            "'n_obj_exist': '2.5' is not a whole number",
        ),
        ("gvt_coco_oc", gvt("a.jpg", "How many?", "2"), "'image_id': 'a.jpg' is not a whole number"),
        ("mmvp", CHOICE | {"Index": "one"}, "'Index': 'one' is not a whole number"),
        ("mmvp", CHOICE | {"Correct Answer": "Open"}, r"the answer 'Open' is not a letter, as \(a\)"),
    ],
)
def test_a_row_that_could_not_be_scored_is_named_at_loading(
    tmp_path: Path, name: str, row: dict[str, Any], message: str
) -> None:
    good = {"pope": YES_NO, "mmvp": CHOICE, "gvt_coco_mci": gvt(1, "Does it exist?", "No.")}
    file = tmp_path / "rows.json"
    file.write_text(json.dumps([good.get(name, gvt(1, "How many?", "2")), row]))
    with pytest.raises(UserError, match=rf"rows\.json: 1 of 2 rows are wrong: row 2: {message}"):
        build(name, file, tmp_path, check_files=False)


def test_numbers_may_be_texts_and_texts_numbers(tmp_path: Path) -> None:
    picture(tmp_path / "000000000139.jpg")
    row = {"image_id": "139", "text_in": "How many people?", "text_out": 2, "n_obj_exist": "3"}
    (tmp_path / "coco_oc.json").write_text(json.dumps([row]))
    dataset = build("gvt_coco_oc", tmp_path / "coco_oc.json", tmp_path)
    assert (column(dataset, "image"), truths(dataset)) == (["000000000139.jpg"], ["2"])
    assert column(dataset, "n_objects") == [3]


@pytest.mark.parametrize("name", NAMES)
def test_every_default_names_what_is_missing(name: str) -> None:
    cls = registry.get_builder_class(name)
    with pytest.raises(UserError, match=rf"{name}: no annotation file: set datasets\.{name}\.splits"):
        cls().build_datasets()


def test_pictures_are_not_looked_for_if_the_configuration_says_so(tmp_path: Path) -> None:
    file = tmp_path / "coco_oc.json"
    file.write_text(json.dumps([gvt(139, "How many people?", "2")]))
    assert len(build("gvt_coco_oc", file, tmp_path, check_files=False)) == 1
