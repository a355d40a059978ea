"""The stage-2 task: captions and questions together, and scores that only the image can earn."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lavis.common.registry import registry
from omegaconf import OmegaConf
from PIL import Image
from torch.utils.data import ChainDataset, DataLoader, Dataset, DistributedSampler

from lavis_xformer.data.guard import guard, guards_in
from lavis_xformer.data.image_text import Pair
from lavis_xformer.data.image_text_datasets import PairEvalDataset, QuestionEvalDataset
from lavis_xformer.engine.sampling import Mixture
from lavis_xformer.errors import UserError
from lavis_xformer.files import read_json
from lavis_xformer.tasks.base import NamedLossTask
from lavis_xformer.tasks.stage2 import (
    CAPTION,
    SHOWN,
    CaptionsAndQuestions,
    Said,
    Stage2Task,
    answer_figures,
    asks,
    references_of,
    score_answers,
    score_captions,
    word_f1,
)


class Rows(Dataset[Any]):
    """A dataset of given samples."""

    def __init__(self, *rows: dict[str, Any]) -> None:
        self.rows = self.annotation = list(rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"image": torch.randn(3, 32, 32, generator=torch.Generator().manual_seed(index)), **self.rows[index]}


CAPTIONS = Rows({"text_input": "a red star", "image_id": 1}, {"text_input": "two blue square", "image_id": 2})
QUESTIONS = Rows(
    {"text_input": "how many?", "answers": ["two", "2"], "weights": [0.75, 0.25], "kind": "count"},
    {"text_input": "where?", "answers": ["left"], "weights": [1.0], "kind": "position"},
)


def loader(dataset: Any, size: int) -> DataLoader[Any]:
    return DataLoader(dataset, batch_size=size, collate_fn=dataset.collater)


def test_captions_and_questions_share_a_batch() -> None:
    (batch,) = loader(CaptionsAndQuestions([CAPTIONS, QUESTIONS]), 4)
    assert batch["image"].shape == (4, 3, 32, 32)
    assert batch["text_input"] == ["", "", "how many?", "where?"]
    assert batch["answer"] == ["a red star", "two blue square", "two", "2", "left"]
    assert batch["n_answers"].tolist() == [1, 1, 2, 1]
    assert batch["weight"].tolist() == [1, 1, 0.75, 0.25, 1]
    assert references_of(batch) == [["a red star"], ["two blue square"], ["two", "2"], ["left"]]
    assert (asks(CAPTIONS), asks(QUESTIONS)) == (False, True)
    with pytest.raises(UserError, match="has no samples"):
        asks(Rows())
    with pytest.raises(UserError, match="questions without answers"):
        CaptionsAndQuestions([CAPTIONS, Rows({"text_input": "where?", "question_id": 7})])[2]
    with pytest.raises(UserError, match="one of the joined datasets has no captions"):
        CaptionsAndQuestions([QUESTIONS, Rows({"image_id": 7})])[2]


def test_a_split_of_questions_without_answers_is_refused_before_training(tmp_path: Path) -> None:
    task = Stage2Task()
    with pytest.raises(UserError, match="the split 'val' has questions without answers"):
        task.check_split("val", Rows({"text_input": "where?", "question_id": 7, "answer": None}))
    for split in (CAPTIONS, QUESTIONS, Rows()):
        task.check_split("val", split)
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    rows = [
        {"image": "a.png", "image_id": 0, "question": "where?", "question_id": n, "instance_id": str(n)}
        for n in range(2)
    ]
    shared = {"vis_root": tmp_path, "vis_processor": lambda image: torch.zeros(3, 8, 8), "text_processor": str}
    late = QuestionEvalDataset(annotation=[{**rows[0], "answers": ["left"]}, {**rows[1], "answers": []}], **shared)
    for split in (late, guard(CaptionsAndQuestions([CAPTIONS, late]))):
        with pytest.raises(UserError, match="'val' has 1 questions without answers, the first at position 1"):
            task.check_split("val", split)


@pytest.mark.parametrize("divided", [True, False])
def test_ranks_that_each_evaluate_the_whole_split_count_once(divided: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lavis_xformer.distributed.collect", lambda value: [value, value])
    task = Stage2Task()
    task._divided = divided
    task._said = [Said(CAPTION, word, [word]) for word in ("red", "blue", "pink")]
    figures = task.figures()
    assert len(task.scores) == (6 if divided else 3)
    assert figures["chance_caption_f1"] == (50 if divided else 0)


def test_joined_datasets_are_guarded_named_and_shared_one_by_one() -> None:
    torn = Rows({"text_input": "a", "image": "a.png"}, {"text_input": "b", "image": "b.png"})
    torn.__class__ = type("Torn", (Rows,), {"__getitem__": lambda self, index: self.rows[index]["missing"]})
    joined = guard(CaptionsAndQuestions([QUESTIONS, torn]), on_corrupt="raise")
    assert len(guards_in(joined)) == 2
    with pytest.raises(UserError, match=r"^b\.png \(sample 1\): "):
        joined[3]
    assert Mixture.of(joined, [3, 1], samples=8).counts() == [6, 2]


def test_a_stream_gives_captions_and_is_not_joined_with_questions(monkeypatch: pytest.MonkeyPatch) -> None:
    built = {"stream": {"train": ChainDataset([])}, "captions": {"train": CAPTIONS}}
    monkeypatch.setattr(NamedLossTask, "build_datasets", lambda self, cfg: built)
    assert Stage2Task().build_datasets(None) is built
    built["captions"] = {"train": QUESTIONS}
    with pytest.raises(UserError, match="stream and captions: shards can't be joined with questions"):
        Stage2Task().build_datasets(None)


def test_a_caption_is_the_answer_to_no_question(make_stage2: Any) -> None:
    model = make_stage2("opt", prompt="a photo of").eval()
    (mixed,) = loader(CaptionsAndQuestions([CAPTIONS]), 2)
    plain = {"image": mixed["image"], "text_input": ["a red star", "a photo of two blue square"]}
    assert torch.allclose(model(mixed)["loss"], model(plain)["loss"], atol=1e-6)


def test_evaluation_generates_both_and_scores_them(
    make_stage2: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "get_path", lambda name: {"result_dir": str(tmp_path)}[name])
    task, model = Stage2Task(max_len=6, max_answer_len=3), make_stage2("opt").eval()
    data = CaptionsAndQuestions([CAPTIONS, QUESTIONS])
    task.before_evaluation(model, data)
    figures = task.evaluation(model, loader(data, 3))
    assert {"loss", "loss_lm", "caption_f1", "chance_caption_f1", "answers", "answers_count"} <= set(figures)
    assert figures["majority_answers"] == 100
    task.after_evaluation(figures, "val", 0)
    assert not list(tmp_path.iterdir()), "a validation while training needs no disk"
    outcome = task.after_evaluation(figures, "test", "best")
    assert outcome["agg_metrics"] == pytest.approx((figures["caption_f1"] + figures["answers"]) / 2)
    written = read_json(tmp_path / "test_scores.json")
    assert written["figures"] == outcome
    groups = {row["group"]: row for row in written["answers"]}
    assert list(groups) == ["caption_f1", "answers_count", "answers_position"]
    captions = [row for row in written["answers"] if row["kind"] == CAPTION]
    assert len(captions) == len(CAPTIONS) == len(written["answers"]) - len(QUESTIONS)
    assert 100 * fmean(row["correct"] for row in captions) == pytest.approx(figures["caption_f1"])
    assert 100 * fmean(row["guess"] for row in captions) == pytest.approx(figures["chance_caption_f1"])
    counted = groups["answers_count"]
    assert (counted["question"], counted["truth"], counted["references"]) == ("how many?", "two", ["two", "2"])
    assert (100 * counted["correct"], counted["guess"]) == (figures["answers_count"], 1)
    assert [row[0] for row in task.table(figures)] == [
        "loss", "loss_lm", "caption words F1 %", "answers %", "answers count %", "answers position %",
    ]  # fmt: skip


class Teller:
    """Says the same of every image, and keeps what it was asked with."""

    def __init__(self) -> None:
        self.asked: list[tuple[Any, ...]] = []

    def generate(self, samples: dict[str, Any], **options: Any) -> list[str]:
        self.asked.append((len(samples["image"]), options))
        return ["a red star"] * len(samples["image"])

    def predict_answers(self, samples: dict[str, Any], **options: Any) -> list[str]:
        self.asked.append((samples["text_input"], options))
        return ["left"] * len(samples["image"])


def test_samples_that_only_pad_a_rank_are_not_asked_about_and_the_others_as_the_run_says() -> None:
    run = OmegaConf.create({"num_beams": 3, "max_len": 7, "max_answer_len": 2})
    task, model = Stage2Task.setup_task(SimpleNamespace(run_cfg=run)), Teller()
    data = CaptionsAndQuestions([CAPTIONS, QUESTIONS])
    task.observe(model, data.collater([data[number] for number in (0, 1, 3, 2)]), [True, False, True, False])
    assert model.asked == [(1, {"num_beams": 3, "max_length": 7}), (["where?"], {"num_beams": 3, "max_len": 2})]
    figures = task.figures()
    assert (len(task.scores), figures["caption_f1"], figures["answers"]) == (2, 100, 100)
    assert figures["majority_answers"] == 100


@pytest.mark.parametrize("many", [1, SHOWN + 1, 2 * SHOWN, 3 * SHOWN])
def test_a_text_is_shown_once(many: int, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    task = Stage2Task()
    task._said = [Said(CAPTION, f"text {number}", ["a star"]) for number in range(many)]
    task.figures()
    shown = [record.getMessage() for record in caplog.records if "said 'text" in record.getMessage()]
    assert len(shown) == len(set(shown)) == min(many, 2 * SHOWN)


def test_the_answers_to_own_questions_are_written_with_the_questions_ids(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(registry.mapping["paths"], "result_dir", str(tmp_path))
    task, ids = Stage2Task(), torch.tensor([7, 9])
    asked = {"text_input": ["where?", "what?"], "answer": ["Left", "star"], "question_id": ids}
    task.observe(Teller(), {"image": torch.zeros(2, 3, 4, 4), **asked}, [True, True])
    figures = task.figures()
    assert figures == {"answers": 50, "majority_answers": 50}
    task.after_evaluation(figures, "test", "best")
    rows = read_json(tmp_path / "test_scores.json")["answers"]
    names = ("question_id", "question", "kind", "group", "truth", "answer", "correct", "guess")
    assert [tuple(row[name] for name in names) for row in rows] == [
        (7, "where?", "answer", "answers", "Left", "left", 1, 1),
        (9, "what?", "answer", "answers", "star", "left", 0, 0),
    ]


class Brightness(torch.nn.Module):
    """Its loss is the mean of its images."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def forward(self, samples: dict[str, Any]) -> dict[str, torch.Tensor]:
        return {"loss": samples["image"].mean()}


def test_the_loss_of_a_split_is_the_mean_over_samples_and_what_pads_a_rank_is_none() -> None:
    data = Rows(*({"text_input": "a", "image": torch.full((3,), float(n))} for n in range(5)))
    task, model = NamedLossTask(), Brightness()
    assert task.evaluation(model, DataLoader(data, batch_size=2))["loss"] == 2
    padded = DistributedSampler(data, num_replicas=2, rank=1, shuffle=False)  # samples 1 and 3, then 0 again
    assert task.evaluation(model, DataLoader(data, batch_size=2, sampler=padded))["loss"] == 2


def test_questions_without_answers_are_no_captions(make_stage2: Any) -> None:
    samples = {"image": torch.zeros(2, 3, 32, 32), "text_input": ["how many?", "where?"], "question_id": [1, 2]}
    for answers in ({}, {"answer": ["two", None]}):
        with pytest.raises(UserError, match="questions without answers, which can't be scored"):
            make_stage2("opt").eval()({**samples, **answers})


def test_all_captions_of_an_image_are_references(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    pairs = [Pair("a.png", ("a red star", "one star"), "a.png", 1)]
    shared = {"vis_root": tmp_path, "vis_processor": lambda picture: torch.zeros(3, 32, 32), "text_processor": str}
    captions = PairEvalDataset(pairs=pairs, **shared)
    assert references_of(captions.collater([captions[0]])) == [["a red star", "one star"]]
    asked = {"image": "a.png", "image_id": 4, "question": "where?", "question_id": 7, "answers": ["left"]}
    joined = CaptionsAndQuestions([captions, QuestionEvalDataset(annotation=[asked], **shared)])
    batch = joined.collater([joined[0], joined[1]])
    assert references_of(batch) == [["a red star", "one star"], ["left"]]
    assert batch["weight"].tolist() == [0.5, 0.5, 1]
    assert batch["image_id"] == ["a.png", "a.png"], "one photo in both"


def test_own_questions_for_evaluation_are_scored_beside_captions(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    asked = {"image": "a.png", "image_id": 4, "question": "where?", "question_id": 7}
    rows = [{**asked, "answers": given} for given in (["left"], [])]
    questions = QuestionEvalDataset(
        annotation=rows,
        vis_root=tmp_path,
        vis_processor=lambda picture: torch.zeros(3, 32, 32),
        text_processor=str,
    )
    joined = CaptionsAndQuestions([CAPTIONS, questions])
    assert asks(questions)
    batch = joined.collater([joined[0], joined[2]])
    assert references_of(batch) == [["a red star"], ["left"]]
    assert batch["image_id"] == [1, "a.png"]
    with pytest.raises(UserError, match="questions without answers"):
        joined[3]


def test_what_follows_a_prompt_is_asked_for_by_the_prompt(make_stage2: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    task, model = Stage2Task(max_len=6), make_stage2("opt").eval()
    samples = {"image": torch.zeros(2, 3, 32, 32), "text_input": ["there is", "I see"], "text_output": ["a", "two"]}
    asked = []
    monkeypatch.setattr(model, "generate", lambda given, **rest: asked.extend(given["prompt"]) or ["a", "three"])
    task.observe(model, samples, [True, True])
    assert asked == ["there is", "I see"]
    assert references_of(samples) == [["a"], ["two"]]
    assert task.figures()["caption_f1"] == 50


def test_texts_are_scored_by_image_where_it_has_an_id(make_stage2: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    task, model = Stage2Task(), make_stage2("opt").eval()
    asked = {
        "text_input": ["where?", "what?", ""],
        "answer": ["left", "dog", "a dog"],
        "kind": ["where", "what", CAPTION],
    }
    monkeypatch.setattr(model, "predict_answers", lambda given, **rest: ["left", "cat"])
    monkeypatch.setattr(model, "generate", lambda given, **rest: ["a dog"])
    for ids in ({"image_id": torch.tensor([5, 5, 5])}, {"image_id": [None, "x.jpg", None]}, {}):
        task.observe(model, {"image": torch.zeros(3, 3, 32, 32), **asked, **ids}, [True] * 3)
    task.figures()
    images = [row["image"] for row in task.scores]
    assert images == ["5", "1", "2", *("5", "5"), *("2", "x.jpg"), *("4", "5")], "captions first; else the position"


def test_scores() -> None:
    assert word_f1("a red star", "A star, red") == 1
    assert word_f1("a a star", "a star") == pytest.approx(2 * 2 / 5)
    assert word_f1("", "a star") == 0
    captions = [Said(CAPTION, "a red star", ["two", "a red star"]), Said(CAPTION, "a red", ["two"])]
    rows = score_captions(captions)
    assert [(row["question_id"], row["correct"], row["guess"]) for row in rows] == [(0, 1, 0.8), (1, 0, 0)]
    assert {row["group"] for row in rows} == {"caption_f1"}
    said = [Said("count", "2", ["two", "2"]), Said("count", "3", ["two"]), Said("where", "Left", ["left"])]
    assert answer_figures(score_answers(said)) == {
        "answers": pytest.approx(200 / 3),
        "majority_answers": 100,
        "answers_count": 50,
        "majority_answers_count": 100,
        "answers_where": 100,
        "majority_answers_where": 100,
    }
    assert (score_captions([]), score_answers([]), answer_figures([])) == ([], [], {})
    several = [Said("colour", "red", given) for given in (["red", "crimson"], ["crimson", "red"], ["Red"], ["blue"])]
    figures = answer_figures(score_answers(several))
    assert figures == {"answers": 75, "majority_answers": 75}, "the majority is scored as answers are"


def test_texts_of_several_ranks_are_scored_in_the_order_of_the_split(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [Said(CAPTION, f"{word} star", [f"a {word} star"]) for word in ("red", "blue", "green", "pink", "cyan")]
    scores = []
    for parts in ([texts], [texts[::2], texts[1::2]], [texts[rank::3] for rank in range(3)]):
        task = Stage2Task()
        monkeypatch.setattr("lavis_xformer.distributed.collect", lambda said, parts=parts: parts)
        task.figures()
        scores.append(task.scores)
    assert scores[0] == scores[1] == scores[2]
    assert [row["answer"] for row in scores[0]] == [entry.text for entry in texts]


def test_a_word_said_twice_counts_twice() -> None:
    assert word_f1("red red star", "red red circle") == pytest.approx(2 * 2 / 6)


def test_the_majority_is_what_most_questions_accept_however_often_each_names_it() -> None:
    said = [Said("colour", "x", given) for given in (["red", "crimson"], ["blue", "crimson"], ["red"], ["crimson"])]
    assert [row["guess"] for row in score_answers(said)] == [1, 1, 0, 1], "crimson, though never first of two"
    twice = [Said("colour", "x", given) for given in (["Red", "red", "red "], ["blue"], ["blue"])]
    assert [row["guess"] for row in score_answers(twice)] == [0, 1, 1], "a question has one vote for an answer"
