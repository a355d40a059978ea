"""The benchmark task: what is asked, what is written, and figures worked by hand."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lavis.common.registry import registry
from lavis.models.base_model import BaseModel
from omegaconf import OmegaConf
from torch import nn
from torch.utils.data import DataLoader, Subset

from lavis_xformer.data.image_text_datasets import QuestionEvalDataset
from lavis_xformer.errors import UserError
from lavis_xformer.tasks import benchmark
from lavis_xformer.tasks.benchmark import BenchmarkTask, fingerprint, items
from lavis_xformer.tasks.protocols import PROTOCOLS


class Questions:
    """Scenes' questions: image, kind, question, truth."""

    def __init__(self, *rows: tuple[str, str, str, str]) -> None:
        names = ("image", "kind", "question", "answer")
        self.annotation = [
            {**dict(zip(names, row, strict=True)), "answer": [row[3]], "question_id": n} for n, row in enumerate(rows)
        ]

    def __len__(self) -> int:
        return len(self.annotation)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self.annotation[index]
        return {"image": torch.zeros(3, 4, 4), "text_input": row["question"], "question_id": row["question_id"]}


class Parrot(BaseModel):
    """Answers from a list, in turn, and remembers what it was asked."""

    def __init__(self, *answers: str) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.answers, self.asked = list(answers), []

    def predict_answers(self, samples: dict[str, Any], **options: Any) -> list[str]:
        self.asked.append((samples, options))
        return [self.answers.pop(0) for _ in samples["text_input"]]


CONFIG = {"datasets": {"xformer_scenes_vqa": {}}}

SCENES = Questions(
    ("a", "count", "how many?", "2"),
    ("a", "presence", "is there a star?", "yes"),
    ("b", "count", "how many?", "3"),
    ("b", "attribute", "what colour?", "red"),
)


def evaluate(task: BenchmarkTask, model: Parrot, folder: Path, dataset: Any = SCENES) -> dict[str, float]:
    registry.mapping["paths"]["result_dir"] = str(folder)
    task.before_evaluation(model, dataset)
    answers = task.evaluation(model, DataLoader(dataset, batch_size=3), cuda_enabled=False)
    return task.after_evaluation(answers, "test", 0)


def test_figures_and_result_file_by_hand(tmp_path: Path) -> None:
    task, model = BenchmarkTask(protocol=PROTOCOLS["paper"], config=CONFIG), Parrot("two", "no", "5", "Red.")
    figures = evaluate(task, model, tmp_path)
    assert figures["agg_metrics"] == figures["accuracy"] == 50
    assert figures["majority"] == 75  # 1 of 2 counts, and all of the others
    assert (figures["accuracy_count"], figures["majority_count"], figures["mae_count"]) == (50, 50, 1)
    assert (figures["accuracy_presence"], figures["accuracy_attribute"]) == (0, 100)
    result = json.loads((tmp_path / "test_xformer_scenes_vqa.json").read_text())
    assert result["protocol"]["length_penalty"] == model.asked[0][1]["length_penalty"] == -1
    assert (result["scorer"], result["blind"], result["config"]) == ("strict", False, CONFIG)
    assert [answer["correct"] for answer in result["answers"]] == [True, False, False, True]
    assert result["answers"][2] == {
        "question_id": 2, "image": "b", "kind": "count", "group": "count", "question": "how many?", "truth": "3",
        "answer": "5", "correct": False,
    }  # fmt: skip
    assert "torch" in result["versions"]
    assert ("accuracy count %", "50.0", "50.0") in task.table(figures)
    assert not [row for row in task.table(figures) if "understood" in row[0]]
    figures = evaluate(task, Parrot("2", "perhaps", "3", "red"), tmp_path)
    assert ("answers not understood %", "25.0", "") in task.table(figures), "its f1 says nothing of them"


@pytest.mark.parametrize("blind", [False, True])
def test_the_protocol_is_what_the_model_is_asked_with(tmp_path: Path, blind: bool) -> None:
    model = Parrot(*"abcd")
    evaluate(BenchmarkTask(protocol=PROTOCOLS["lavis"], config=CONFIG, blind=blind), model, tmp_path)
    samples, options = model.asked[0]
    assert options == {"prompt": "Question: {} Short answer:", "num_beams": 5, "max_len": 10, "min_len": 1}
    assert ("image" in samples) is not blind


def test_answers_of_every_rank_are_scored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lavis_xformer.distributed.collect", lambda own: [own, {1: "yes", 3: "red"}])
    task = BenchmarkTask(protocol=PROTOCOLS["paper"], config=CONFIG)
    answers = task.evaluation(Parrot("2", "3"), DataLoader(Subset(SCENES, [0, 2])))
    assert answers == {0: "2", 1: "yes", 2: "3", 3: "red"}


def test_answers_are_read_by_the_scorer_that_is_named() -> None:
    asked = Questions(("a", "count", "how many?", "1"), ("a", "presence", "is there a star?", "no"))
    found = items(asked, {0: "someone", 1: "I do not know"})
    for scorer, accuracy in (("gvt_official", 1), ("strict", 0)):
        scores = benchmark.score(found, scorer)
        assert {kind: (score.scorer, score.accuracy) for kind, score in scores.items()} == {
            "count": (scorer, accuracy), "presence": (scorer, accuracy),
        }  # fmt: skip


def test_the_result_names_the_question_files_and_their_template(tmp_path: Path) -> None:
    dataset = Questions(("a", "presence", "is there a star?", "yes"))
    task = BenchmarkTask(protocol=PROTOCOLS["paper"], config=CONFIG)
    for own, expected in (
        ({}, ({"rendered": fingerprint(items(dataset, {}))}, "raw")),
        ({"question_sha256": {"q.json": "ab"}, "template": "repaired"}, ({"q.json": "ab"}, "repaired")),
    ):
        vars(dataset).update(own)
        evaluate(task, Parrot("yes"), tmp_path, dataset)
        result = json.loads((tmp_path / "test_xformer_scenes_vqa.json").read_text())
        assert (result["question_sha256"], result["template"]) == expected


def test_a_scorer_that_cannot_read_the_answers_is_refused_before_anything_is_asked() -> None:
    task = BenchmarkTask(protocol=PROTOCOLS["paper"], config=CONFIG, scorer="pope_official")
    with pytest.raises(UserError, match=r"run\.scorer: 'pope_official' can't score answers of kind attribute, count; "):
        task.check_split("test", SCENES)


def test_a_subset_is_a_group_and_its_bins_are_of_objects() -> None:
    rows = [
        {"image": "a", "question_id": n, "question": "a cat?", "answer": ["yes"], "subset": subset, "n_objects": many}
        for n, (subset, many) in enumerate([("random", 4), ("random", 15), ("popular", 4)])
    ]
    found = items(SimpleNamespace(annotation=rows, kind="presence"), {0: "yes", 1: "no", 2: "yes"})
    scores = benchmark.score(found, "strict")
    assert list(scores) == ["popular", "random"]
    assert [(group.low, group.accuracy) for group in scores["random"].bins] == [(0, 1), (10, 0)]


def test_an_unanswered_question_is_wrong() -> None:
    assert [item.answer for item in items(SCENES, {1: "yes"})] == [None, "yes", None, None]
    with pytest.raises(UserError, match="no questions"):
        benchmark.score([], "strict")


def test_answers_are_kept_where_they_cannot_be_scored(tmp_path: Path) -> None:
    dataset = Questions(("a", "presence", "is there a star?", "maybe"), ("b", "presence", "is there a cross?", "no"))
    with pytest.raises(UserError, match="truth 'maybe': expected yes or no"):
        evaluate(BenchmarkTask(protocol=PROTOCOLS["paper"], config=CONFIG), Parrot("yes", "no"), tmp_path, dataset)
    (file,) = tmp_path.iterdir()
    result = json.loads(file.read_text())
    assert [answer["answer"] for answer in result["answers"]] == ["yes", "no"]
    assert (result["figures"], result["scorer"], "torch" in result["versions"]) == ({}, "strict", True)
    assert "correct" not in result["answers"][0]


def own_questions(*answers: list[str]) -> Any:
    """A user's own questions, as image_question_json annotates them: without a kind."""
    data = object.__new__(QuestionEvalDataset)
    rows = [{"image": "a.png", "question": "how many?", "answers": given} for given in answers]
    data.annotation = [{**row, "question_id": number} for number, row in enumerate(rows)]
    return data


def after(dataset: Any, said: dict[int, str], folder: Path) -> dict[str, float] | None:
    registry.mapping["paths"]["result_dir"] = str(folder)
    task = BenchmarkTask(protocol=PROTOCOLS["paper"], config=CONFIG)
    task.before_evaluation(Parrot(), dataset)
    return task.after_evaluation(said, "test", 0)


def test_own_questions_are_scored_by_their_most_frequent_answer_and_kept_without_one(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = own_questions(["one", "2", "2"], [], ["3"])
    figures = after(data, {0: "2", 1: "5", 2: "4"}, tmp_path)
    assert figures is not None
    assert (figures["accuracy"], figures["majority"]) == (50, 50)
    (file,) = tmp_path.iterdir()
    answers = json.loads(file.read_text())["answers"]
    assert [(row["kind"], row["truth"], row["answer"], row.get("correct")) for row in answers] == [
        ("exact", "2", "2", True), ("exact", "", "5", None), ("exact", "3", "4", False),
    ]  # fmt: skip
    assert f"1 of 3 questions have no true answer; the model's answers are in {file}" in caplog.text
    assert items(SimpleNamespace(annotation=[{**data.annotation[0], "answers": "cat"}]), {})[0].truth == "cat"


def test_questions_that_nobody_has_answered_have_answers_and_no_score(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert after(own_questions([], []), {0: "2", 1: "3"}, tmp_path) is None
    (file,) = tmp_path.iterdir()
    result = json.loads(file.read_text())
    assert [row["answer"] for row in result["answers"]] == ["2", "3"]
    assert result["figures"] == {}
    assert "2 of 2 questions have no true answer" in caplog.text


def test_the_fingerprint_is_of_questions_not_of_answers() -> None:
    before = fingerprint(items(SCENES, {}))
    assert fingerprint(items(SCENES, {0: "2"})) == before
    other = Questions(*[(r["image"], r["kind"], r["question"], "9") for r in SCENES.annotation])
    assert fingerprint(items(other, {})) != before


def test_settings_are_read_and_checked() -> None:
    def setup(*datasets: str, **run: Any) -> BenchmarkTask:
        config = OmegaConf.create({"datasets": {name: {} for name in datasets or ("pope",)}, "run": run})
        return BenchmarkTask.setup_task(
            SimpleNamespace(run_cfg=config.run, datasets_cfg=config.datasets, to_dict=lambda: {})
        )

    task = setup(protocol="lavis", scorer="pope_official", num_beams=1)
    assert (task.protocol.prompt, task.protocol.num_beams) == ("Question: {} Short answer:", 1)
    assert task.scorer == "pope_official"
    assert [setup(**run).blind for run in ({}, {"blind": False}, {"blind": True})] == [False, False, True]
    with pytest.raises(UserError, match="did you mean 'paper'"):
        setup(protocol="papers")
    with pytest.raises(UserError, match=r"run\.scorer"):
        setup(scorer="strictly")
    with pytest.raises(UserError, match="of one dataset, not of pope, mmvp"):
        setup("pope", "mmvp")
