"""VQAv2 and GQA by LAVIS's scoring, with the protocol and GQA's types in the result."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lavis.common.registry import registry
from lavis.datasets.datasets.coco_vqa_datasets import COCOVQADataset
from lavis.datasets.datasets.gqa_datasets import GQAEvalDataset
from lavis.tasks.vqa import GQATask, VQATask
from omegaconf import OmegaConf
from PIL import Image
from torch.utils.data import ConcatDataset, DataLoader
from torchvision.transforms.functional import to_tensor

from lavis_xformer import check
from lavis_xformer.compare.results import tasks
from lavis_xformer.data.guard import GuardedDataset
from lavis_xformer.data.scene_question_datasets import SceneQuestionDataset
from lavis_xformer.errors import UserError
from lavis_xformer.files import read_json
from lavis_xformer.tasks.gqa import XFormerGQATask, gqa_figures
from lavis_xformer.tasks.protocols import write_result
from lavis_xformer.tasks.vqa import XFormerVQATask, vqa_guesses, vqa_majority
from lavis_xformer.tasks.vqa_files import check_vqa


class Model:
    """Takes what a task gives it before it asks."""

    vqa_length_penalty = 0.0

    def before_evaluation(self, **unused: Any) -> None:
        """LAVIS's hook."""


@pytest.fixture(autouse=True)
def folders(tmp_path: Path) -> None:
    """Where LAVIS's tasks write."""
    registry.mapping["paths"].update(result_dir=str(tmp_path / "result"), output_dir=str(tmp_path))
    (tmp_path / "result").mkdir()


def setup(cls: Any, folder: Path, **run: Any) -> Any:
    questions = folder / "questions.json"
    questions.write_text("[]")
    dataset = {"build_info": {"annotations": {"val": {"storage": [str(questions)]}}}}
    config = OmegaConf.create({"run": {"inference_method": "generate", **run}, "datasets": {"gqa": dataset}})
    return cls.setup_task(SimpleNamespace(run_cfg=config.run, to_dict=lambda: OmegaConf.to_container(config)))


GQA = [
    {"question_id": 1, "image": "a.jpg", "question": "what?", "answer": "cat",
     "types": {"structural": "query", "semantic": "obj", "detailed": "x"}},
    {"question_id": 2, "image": "a.jpg", "question": "is it?", "answer": "yes",
     "types": {"structural": "verify", "semantic": "obj", "detailed": "x"}},
    {"question_id": 3, "image": "b.jpg", "question": "is there?", "answer": "yes",
     "types": {"structural": "verify", "semantic": "rel", "detailed": "x"}},
]  # fmt: skip
SAID = [
    {"question_id": row["question_id"], "pred_ans": said, "gt_ans": row["answer"]}
    for row, said in zip(GQA, ("a cat", "no", "yes."), strict=True)
]


def test_gqa_by_type_by_hand_and_overall_as_lavis(tmp_path: Path) -> None:
    task, model = setup(XFormerGQATask, tmp_path, protocol="paper"), Model()
    task.before_evaluation(model, SimpleNamespace(annotation=GQA))
    figures = task.after_evaluation(SAID, "val")
    assert figures["accuracy_structural_verify"] == figures["accuracy_semantic_obj"] == 50
    assert figures["accuracy_structural_query"] == figures["accuracy_semantic_rel"] == 100
    assert (figures["n_structural_verify"], figures["majority_structural_verify"]) == (2, 100)
    assert (figures["majority_semantic_obj"], figures["majority"]) == (50, 100)
    lavis = GQATask(5, 10, 1, True, 128, "generate")
    assert figures["agg_metrics"] == pytest.approx(lavis.after_evaluation(SAID, "val")["agg_metrics"])
    assert figures["agg_metrics"] == pytest.approx(200 / 3)
    result = json.loads((tmp_path / "result" / "val_gqa.json").read_text())
    assert result["protocol"] == {
        "name": "paper", "prompt": "Question: {} Answer:", "num_beams": 5, "length_penalty": -1, "max_len": 10,
        "min_len": 1,
    }  # fmt: skip
    assert task.prompt == "Question: {} Answer:"
    assert [(answer["image"], answer["correct"]) for answer in result["answers"]] == [
        ("a.jpg", True), ("a.jpg", False), ("b.jpg", True),
    ]  # fmt: skip
    assert list(result["question_sha256"]) == [str(tmp_path / "questions.json")]


@pytest.mark.parametrize(
    ("groups", "majority"),
    [
        (["query"] * 4 + ["verify"] * 4, 100 * (2 + 3) / 8),
        (["all"] * 8, 100 * 3 / 8),  # the questions have no types
    ],
)
def test_gqas_majority_by_hand_is_that_of_each_structural_type_as_in_a_comparison(
    groups: list[str], majority: float
) -> None:
    truths = ["cat", "dog", "dog", "no", "yes", "yes", "yes", "no"]
    answers = [
        {"question_id": n, "image": "a.jpg", "question": "?", "group": group, "truth": truth, "correct": False,
         "types": {"semantic": "obj"}, "stage": "gqa"}
        for n, (group, truth) in enumerate(zip(groups, truths, strict=True))
    ]  # fmt: skip
    figures = gqa_figures(answers)
    assert (figures["majority"], figures["majority_semantic_obj"]) == (majority, 100 * 3 / 8)
    assert tasks(answers)["gqa.all"]["majority"] == majority  # with one group, it is called all


def test_questions_without_a_true_answer_are_kept_but_not_scored(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "result" / "val_gqa.json"
    for missing, scored in ((1, {"accuracy": 50, "n": 2}), (3, None)):
        caplog.clear()
        task = setup(XFormerGQATask, tmp_path)
        task.before_evaluation(Model(), SimpleNamespace(annotation=GQA))
        said = [{**row, **({"gt_ans": None} if n < missing else {})} for n, row in enumerate(SAID)]
        figures = task.after_evaluation(said, "val")
        assert (figures and {name: figures[name] for name in ("accuracy", "n")}) == scored
        answers = json.loads(file.read_text())["answers"]
        assert [row["answer"] for row in answers] == ["a cat", "no", "yes."]
        assert ["correct" in row for row in answers] == [n >= missing for n in range(3)]
        assert f"{missing} of 3 questions have no true answer; the model's answers are in {file}" in caplog.text


def test_a_split_of_vqa_without_true_answers_has_no_figures(tmp_path: Path) -> None:
    assert setup(XFormerVQATask, tmp_path).after_evaluation([{"question_id": 1, "answer": "2"}], "test") is None


def test_gqas_questions_that_were_not_asked_count_as_wrong(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    task = setup(XFormerGQATask, tmp_path)
    untold = {"question_id": 5, "image": "c.jpg", "question": "which?"}
    several = {"question_id": 4, "image": "c.jpg", "question": "who?", "answers": ["a dog", "dog", "dog"]}
    task.before_evaluation(Model(), SimpleNamespace(annotation=[*GQA, several, untold]))
    figures = task.after_evaluation(SAID[:2], "val")
    assert (figures["agg_metrics"], figures["n"]) == (25, 4), "one of four; the fifth has no true answer"
    assert figures["n_structural_verify"] == 2
    rows = read_json(tmp_path / "result" / "val_gqa.json")["answers"]
    assert [(row["truth"], row["answer"], row.get("correct")) for row in rows[2:]] == [
        ("yes", "", False), ("dog", "", False), (None, "", None),
    ]  # fmt: skip
    assert "3 questions were not asked, as their images can't be read" in caplog.text


def test_gqas_types_may_come_from_its_own_file(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    types = {str(row["question_id"]): {"types": row["types"]} for row in GQA}
    plain = [{key: value for key, value in row.items() if key != "types"} for row in GQA]
    (tmp_path / "types.json").write_text(json.dumps(types))
    task = setup(XFormerGQATask, tmp_path, question_types=str(tmp_path / "types.json"))
    task.before_evaluation(Model(), SimpleNamespace(annotation=plain))
    assert task.after_evaluation(SAID, "val")["accuracy_structural_query"] == 100
    del types["3"]
    (tmp_path / "types.json").write_text(json.dumps(types))
    with pytest.raises(UserError, match="has types for only 2 of 3 questions"):
        task.after_evaluation(SAID, "val")
    assert "run.question_types" not in caplog.text
    untyped = setup(XFormerGQATask, tmp_path)
    untyped.before_evaluation(Model(), SimpleNamespace(annotation=plain))
    assert not [name for name in untyped.after_evaluation(SAID, "val") if "structural" in name]
    assert "set run.question_types to GQA's own file of this split (testdev_balanced_questions.json" in caplog.text


def ask_vqa(folder: Path, truths: dict[int, list[str]], kinds: dict[int, str], task: Any, said: dict[int, str]) -> Any:
    """Score answers to questions of given types by their ten true answers."""
    questions = {"questions": [{"question_id": n, "image_id": 9, "question": "how many?"} for n in truths]}
    annotations = {"annotations": [
        {"question_id": n, "image_id": 9, "question_type": "how", "answer_type": kinds[n],
         "multiple_choice_answer": given[-1],
         "answers": [{"answer": text, "answer_id": i} for i, text in enumerate(given)]}
        for n, given in truths.items()
    ]}  # fmt: skip
    for name, content in (("q", questions), ("a", annotations)):
        base = {"info": {}, "license": {}, "data_subtype": "", "data_type": "", "task_type": ""}
        (folder / f"{name}.json").write_text(json.dumps({**base, **content}))
    task.ques_files, task.anno_files = {"val": str(folder / "q.json")}, {"val": str(folder / "a.json")}
    return task.after_evaluation([{"question_id": n, "answer": text} for n, text in said.items()], "val")


def test_vqa_scores_as_lavis(tmp_path: Path) -> None:
    truths, kinds = {1: ["2"] * 10, 2: ["red"] * 2 + ["blue"] * 8}, {1: "number", 2: "other"}
    ours, lavis = (
        ask_vqa(tmp_path, truths, kinds, task, {1: "two", 2: "red"})
        for task in (setup(XFormerVQATask, tmp_path, protocol="lavis"), VQATask(5, 10, 1, True, 128, "generate"))
    )
    assert ours["agg_metrics"] == lavis["agg_metrics"] == 80
    assert ours["accuracy_number"] == lavis["number"] == 100
    assert ours["accuracy_other"] == lavis["other"] == 60
    assert (ours["majority_number"], ours["majority_other"], ours["majority"]) == (100, 100, 100)
    result = json.loads((tmp_path / "result" / "val_gqa.json").read_text())
    assert result["protocol"]["prompt"] == "Question: {} Short answer:"
    assert result["blind"] is False
    assert result["scorer"] == "lavis"
    assert [answer["correct"] for answer in result["answers"]] == [1, 0.6]
    assert [(answer["image"], answer["truth"]) for answer in result["answers"]] == [("9", "2"), ("9", "blue")]


@pytest.mark.parametrize(
    ("given", "said", "lavis", "official"),
    [
        (["none"] * 10, "none", 0, 100),  # LAVIS makes 0 of what was said alone
        (["none"] * 9 + ["no"], "0", 0, 100),
        (["the left"] * 10, "the left", 0, 100),
        (["the left"] * 10, "left", 0, 0),  # where all are alike, the letter counts
        (["yes"] * 10, "Yes", 100, 0),
        (["on the table"] * 6 + ["table"] * 4, "on the table", 0, 100),
        (["on the table"] * 6 + ["table"] * 4, "On table.", 0, 100),
        (["on the table"] * 6 + ["table"] * 4, "the table", 100, 100),
        (["two"] * 2 + ["2"] + ["3"] * 7, "two", 30, 90),
    ],
)
def test_vqa_by_hand_as_lavis_and_as_vqas_own_evaluation(
    tmp_path: Path, given: list[str], said: str, lavis: float, official: float
) -> None:
    for scorer, accuracy in (("lavis", lavis), ("official", official)):
        task = setup(XFormerVQATask, tmp_path, scorer=scorer)
        figures = ask_vqa(tmp_path, {1: given}, {1: "other"}, task, {1: f"{said}\n"})
        assert figures["accuracy"] == figures["accuracy_other"] == pytest.approx(accuracy)
        result = json.loads((tmp_path / "result" / "val_gqa.json").read_text())
        assert result["scorer"] == scorer
        assert result["answers"][0]["correct"] == pytest.approx(accuracy / 100)


def test_an_unknown_scorer_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"run\.scorer: 'offical'; did you mean 'official'"):
        setup(XFormerVQATask, tmp_path, scorer="offical")


def test_every_answer_stands_beside_the_most_frequent_ones(tmp_path: Path) -> None:
    truths = {1: ["yes"] * 10, 2: ["yes"] * 10, 3: ["no"] * 8 + ["yes"] * 2, 4: ["2"] * 10}
    kinds = {1: "yes/no", 2: "yes/no", 3: "yes/no", 4: "number"}
    task = setup(XFormerVQATask, tmp_path)
    figures = ask_vqa(tmp_path, truths, kinds, task, dict.fromkeys(truths, "no"))
    rows = json.loads((tmp_path / "result" / "val_gqa.json").read_text())["answers"]
    assert [row["guess"] for row in rows] == pytest.approx([1, 1, 0.6, 1])
    assert figures["majority"] == pytest.approx(100 * sum(row["guess"] for row in rows) / 4)


def test_vqas_majority_by_hand() -> None:
    def annotation(kind: str, *given: str) -> dict[str, Any]:
        return {"answer_type": kind, "answers": [{"answer": text} for text in given]}

    annotations = [
        annotation("yes/no", *["yes"] * 10),
        annotation("yes/no", *["yes"] * 6, *["no"] * 4),
        annotation("yes/no", *["no"] * 9, "yes"),  # one agrees: a third, but not where it is the one left out
        annotation("number", *["2"] * 2, *["3"] * 8),
    ]
    found = vqa_majority(annotations, vqa_guesses(annotations))
    assert found["majority_yes/no"] == pytest.approx((100 + 100 + 30) / 3)
    assert found["majority_number"] == 100
    assert found["majority"] == pytest.approx((100 + 100 + 30 + 100) / 4)


@pytest.mark.parametrize("blind", [False, True])
def test_the_language_model_may_be_asked_without_images(tmp_path: Path, blind: bool) -> None:
    class Answering(Model):
        shown: Any = None

        def predict_answers(self, samples: dict[str, Any], **unused: Any) -> list[str]:
            self.shown = samples
            return ["yes"]

    task, model = setup(XFormerGQATask, tmp_path, blind=blind), Answering()
    samples = {"image": "pixels", "text_input": ["is it?"], "question_id": torch.tensor([4]), "answer": ["no"]}
    task.answer_list = None
    assert task.valid_step(model, samples) == [{"question_id": 4, "pred_ans": "yes", "gt_ans": "no"}]
    assert ("image" in model.shown) is not blind
    assert model.shown["text_input"] == ["is it?"]


def test_gqas_ids_may_be_texts(tmp_path: Path) -> None:
    class Answering(Model):
        def predict_answers(self, samples: dict[str, Any], **unused: Any) -> list[str]:
            return ["yes"] * len(samples["text_input"])

    rows = [{**row, "question_id": f"0{row['question_id']}"} for row in GQA]  # GQA's own may begin with 0
    (tmp_path / "gqa.json").write_text(json.dumps(rows))
    Image.new("RGB", (2, 2)).save(tmp_path / "a.jpg")
    Image.new("RGB", (2, 2)).save(tmp_path / "b.jpg")
    dataset = GQAEvalDataset(to_tensor, str, str(tmp_path), [str(tmp_path / "gqa.json")])
    task, model = setup(XFormerGQATask, tmp_path), Answering()
    task.before_evaluation(model, dataset)
    loader = DataLoader(dataset, batch_size=2, collate_fn=dataset.collater)
    figures = task.after_evaluation(task.evaluation(model, loader, cuda_enabled=False), "val")
    assert figures["accuracy"] == pytest.approx(200 / 3)
    assert figures["accuracy_structural_verify"] == 100
    answers = read_json(tmp_path / "result" / "val_gqa.json")["answers"]
    assert [(row["question_id"], row["correct"]) for row in answers] == [("01", False), ("02", True), ("03", True)]


def test_the_model_keeps_its_own_length_penalty(tmp_path: Path) -> None:
    class Answering(Model):
        asked: tuple[float, ...] = ()

        def predict_answers(self, samples: dict[str, Any], **unused: Any) -> list[str]:
            self.asked += (self.vqa_length_penalty,)
            if samples["text_input"] == ["fail"]:
                raise KeyboardInterrupt
            return ["yes"]

    samples = {"image": torch.zeros(1), "text_input": ["is it?"], "question_id": torch.tensor([4]), "answer": ["no"]}
    model = Answering()
    for protocol in ("paper", "lavis"):
        task = setup(XFormerGQATask, tmp_path, protocol=protocol)
        task.before_evaluation(model, SimpleNamespace())
        task.evaluation(model, [samples], cuda_enabled=False)
    assert model.asked == (-1, 0), "the paper's, then the model's"
    task, failing = setup(XFormerGQATask, tmp_path, protocol="paper"), {**samples, "text_input": ["fail"]}
    with pytest.raises(KeyboardInterrupt):
        task.evaluation(model, [failing], cuda_enabled=False)
    assert model.vqa_length_penalty == 0


def test_an_unknown_protocol_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"run\.protocol: 'papers'; did you mean 'paper'"):
        setup(XFormerGQATask, tmp_path, protocol="papers")


def test_a_result_belongs_to_the_dataset_that_has_the_split(tmp_path: Path) -> None:
    files = {name: tmp_path / f"{name}.json" for name in ("train", "val", "own")}
    for file in files.values():
        file.write_text("[]")
    datasets = {
        "vg_vqa": {"build_info": {"annotations": {"train": {"storage": [str(files["train"])]}}}},
        "coco_vqa": {"build_info": {"annotations": {"val": {"storage": str(files["val"])}}}},
        "image_question_json": {"splits": {"test": {"annotations": str(files["own"])}}},
    }
    path = write_result({"datasets": datasets}, "val", {"name": "paper"}, {})
    assert path.name == "val_coco_vqa.json"
    assert list(read_json(path)["question_sha256"]) == [str(files["val"])]
    assert write_result({"datasets": datasets}, "test", {}, {}).name == "test_image_question_json.json"


def test_vqa_needs_files_in_vqas_format(tmp_path: Path) -> None:
    task = setup(XFormerVQATask, tmp_path)
    with pytest.raises(UserError, match=r"xformer_vqa needs .* in VQA's format; else use xformer_gqa"):
        task.check_split("val", SimpleNamespace(annotation=GQA))


@pytest.mark.parametrize(
    ("file", "key", "message"),
    [
        ("q", "data_type", "no data_type; VQA's format has info, task_type, data_type, .*questions"),
        ("q", "questions", "no questions; VQA's format has "),
        ("a", "annotations", "no annotations; VQA's format has annotations"),
        ("a", "answer_type", "annotations: row 1 has no answer_type, which VQA's scoring needs"),
        ("a", "", "can't be read: Expecting value"),
        ("a", "answers=[]", r"row 1: its answers are \[\]; VQA's format has"),
        ("a", 'answers=["2", "2"]', r"row 1: its answers are \['2', '2'\]; VQA's format has"),
        ("a", 'answers=[{"answer": 2}]', r"row 1: its answers are \[\{'answer': 2\}\]; VQA's format has"),
    ],
)
def test_files_that_vqas_scoring_cannot_read_are_refused_before_training(
    tmp_path: Path, file: str, key: str, message: str
) -> None:
    task, folder = setup(XFormerVQATask, tmp_path), tmp_path
    ask_vqa(folder, {1: ["2"] * 10}, {1: "number"}, task, {1: "2"})
    files = {name: str(folder / f"{name}.json") for name in "qa"}
    rows = [{"question_id": 1}]
    data = SimpleNamespace(coco_fmt_qust_file=files["q"], coco_fmt_anno_file=files["a"], annotation=rows)
    task.check_split("val", data)
    content = read_json(Path(files[file]))
    name, changed, value = key.partition("=")
    for holder in (content, *content.get("annotations", [])):
        if name in holder:
            holder.pop(name)
            holder |= {name: json.loads(value)} if changed else {}
    (tmp_path / "damaged.json").write_text(json.dumps(content) if key else "?")
    vars(data)["coco_fmt_qust_file" if file == "q" else "coco_fmt_anno_file"] = str(tmp_path / "damaged.json")
    with pytest.raises(UserError, match=rf"damaged\.json: {message}"):
        task.check_split("val", data)
    task.check_split("test", SimpleNamespace(coco_fmt_qust_file=None, coco_fmt_anno_file=None))


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([1], r"q\.json: its questions are not those of the split: 1 are in one only, such as 2"),
        ([1, 2, 7], r"1 are in one only, such as 7"),
        ([1, 2, 2], r"two questions of the split have the question_id 2"),
    ],
)
def test_other_questions_than_those_of_the_files_are_refused_before_training(
    tmp_path: Path, ids: list[int], message: str
) -> None:
    task, kinds = setup(XFormerVQATask, tmp_path), {1: "number", 2: "number"}
    ask_vqa(tmp_path, {1: ["2"] * 10, 2: ["3"] * 10}, kinds, task, {1: "2", 2: "3"})
    data = SimpleNamespace(
        coco_fmt_qust_file=str(tmp_path / "q.json"),
        coco_fmt_anno_file=str(tmp_path / "a.json"),
        annotation=[{"question_id": number} for number in (1, 2)],
    )
    task.check_split("val", data)
    data.annotation = [{"question_id": number} for number in ids]
    with pytest.raises(UserError, match=message):
        task.check_split("val", data)


def test_a_question_of_vqas_that_was_not_asked_counts_as_wrong(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    task, kinds = setup(XFormerVQATask, tmp_path), {1: "number", 2: "number"}
    figures = ask_vqa(tmp_path, {1: ["2"] * 10, 2: ["3"] * 10}, kinds, task, {1: "2"})
    assert figures["accuracy"] == 50
    assert "1 questions were not asked, as their images can't be read: they count as wrong" in caplog.text


def test_scenes_have_no_files_in_vqas_format() -> None:
    with pytest.raises(UserError, match=r"xformer_vqa needs question and annotation files .* use xformer_gqa"):
        check_vqa(object.__new__(SceneQuestionDataset))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        (
            "prompt",
            "Answer:",
            r"run\.prompt: 'Answer:' has no \{\}, where the question goes; '' asks the bare question",
        ),
        ("prompt", 3, r"run\.prompt is 3; it must be text"),
        ("min_len", 11, r"run\.min_len is 11; it can't be greater than run\.max_len, 10"),
        ("min_len", "a", r"run\.min_len is 'a'"),
        ("inference_method", "rnak", r"run\.inference_method: 'rnak'; did you mean 'rank'"),
    ],
)
def test_a_way_of_asking_that_makes_no_sense_is_told_before_anything_is_built(
    key: str, value: Any, message: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        setup(XFormerGQATask, tmp_path, **{key: value})
    assert setup(XFormerGQATask, tmp_path, prompt="").prompt == ""


def test_what_an_evaluation_lacks_is_told_before_training(tmp_path: Path) -> None:
    vqa, gqa = (setup(cls, tmp_path, inference_method="rank") for cls in (XFormerVQATask, XFormerGQATask))
    for task in (vqa, gqa):
        with pytest.raises(UserError, match=r"run\.inference_method: 'rank', LAVIS's default, chooses from"):
            task.check_split("val", [{"answer": "yes"}])
    gqa.answer_list = ["yes", "no"]
    gqa.check_split("val", [{"answer": "yes"}])
    (tmp_path / "types.json").write_text("{}")
    typed = setup(XFormerGQATask, tmp_path, question_types=str(tmp_path / "types.json"))

    class Asked(list[dict[str, Any]]):
        annotation = GQA

    with pytest.raises(UserError, match=r"types\.json has types for only 0 of 3 questions"):
        typed.check_split("val", Asked(GQA))


def test_gqa_needs_samples_with_a_true_answer(tmp_path: Path) -> None:
    task = setup(XFormerGQATask, tmp_path)
    asked = {"text_input": ["is it?"], "question_id": torch.tensor([4])}
    with pytest.raises(UserError, match=r"run\.task: xformer_gqa needs .*, such as coco_vqa, use xformer_vqa"):
        task.check_split("val", [asked])
    for sample in ({"answer": None}, {"answers": ["yes"]}):
        task.check_split("val", [{**asked, **sample}])


class Rows(list[dict[str, Any]]):
    """A dataset whose samples are its annotations."""

    @property
    def annotation(self) -> list[dict[str, Any]]:
        return list(self)


@pytest.mark.parametrize(("answer", "module", "fault"), [
    (5, "mine", "row 4: its answer is 5; it must be text"),
    (None, "lavis.datasets", "row 4 has no answer, which LAVIS's dataset can't batch; use image_question_json"),
    (None, "mine", ""),
])  # fmt: skip
def test_gqas_true_answers_are_text(tmp_path: Path, answer: Any, module: str, fault: str) -> None:
    task = setup(XFormerGQATask, tmp_path)
    rows = type("Rows", (Rows,), {"__module__": module})([*GQA, {**GQA[0], "question_id": 9, "answer": answer}])
    with pytest.raises(UserError, match=fault) if fault else nullcontext():
        task.check_split("val", GuardedDataset(rows))


def test_three_files_are_one_too_few_for_vqa(tmp_path: Path) -> None:
    files = {"build_info": {"annotations": {"train": {"storage": ["a"]}, "val": {"storage": ["e", "q", "a"]}}}}
    config = OmegaConf.create({"run": {"inference_method": "generate"}, "datasets": {"coco_vqa": files}})
    with pytest.raises(UserError, match=r"coco_vqa\.build_info\.annotations\.val\.storage has three files: it takes"):
        XFormerVQATask.setup_task(SimpleNamespace(run_cfg=config.run, to_dict=lambda: OmegaConf.to_container(config)))


def test_gqas_questions_have_ids_of_their_own(tmp_path: Path) -> None:
    task = setup(XFormerGQATask, tmp_path)
    with pytest.raises(UserError, match="two questions of the split have the question_id 2"):
        task.check_split("val", Rows([*GQA, GQA[1]]))
    task.check_split("val", Rows(GQA))


def lavis_config(task: str, arch: str = "xformer", **run: Any) -> Any:
    config = OmegaConf.create({"run": {"task": task, **run}, "model": {"arch": arch}})
    return SimpleNamespace(
        run_cfg=config.run,
        model_cfg=config.model,
        datasets_cfg={"questions": {}},
        to_dict=lambda: OmegaConf.to_container(config),
    )


@pytest.mark.parametrize(
    ("task", "method"),
    [
        ("vqa", "predict_answers"), ("gqa", "predict_answers"), ("aok_vqa", "predict_answers"),
        ("multimodal_classification", "predict"),
    ],
)  # fmt: skip
def test_a_model_that_a_task_of_lavis_cannot_evaluate_is_refused_before_training(task: str, method: str) -> None:
    with pytest.raises(UserError, match=rf"run\.task: {task} needs .* {method}\(\), which model\.arch xformer lacks"):
        check.task_of(lavis_config(task, valid_splits=["val"]))
    assert check.task_of(lavis_config(task, valid_splits=[])), "it can be trained"


def test_a_key_that_a_task_of_lavis_misses_is_named() -> None:
    with pytest.raises(UserError, match=r"run\.num_beams: missing; run\.task captioning needs it"):
        check.task_of(lavis_config("captioning"))
    given = {"num_beams": 1, "max_len": 9, "min_len": 1, "evaluate": False}
    assert check.task_of(lavis_config("captioning", valid_splits=["val"], **given)).max_len == 9


@pytest.mark.parametrize(
    ("task", "arch", "method"),
    [
        ("xformer_vqa", "xformer", "predict_answers"),
        ("xformer_gqa", "blip2_opt", "predict_answers"),
        ("xformer_benchmark", "xformer", "predict_answers"),
        ("xformer_retrieval", "xformer_opt", "compute_sim_matrix"),
    ],
)
def test_a_model_that_cannot_do_a_task_of_ours_is_refused_before_it_is_built(task: str, arch: str, method: str) -> None:
    with pytest.raises(UserError, match=rf"run\.task: {task} needs .* {method}\(\), which model\.arch {arch} lacks"):
        check.task_of(lavis_config(task, arch=arch, test_splits=["test"]))


def test_gqas_ranked_answers_are_compared_as_they_are(tmp_path: Path) -> None:
    row = GQA[0] | {"answer": "the cat."}
    task = setup(XFormerGQATask, tmp_path, inference_method="rank")
    task.before_evaluation(Model(), SimpleNamespace(annotation=[row]))
    figures = task.after_evaluation([{"question_id": 1, "pred_ans": "the cat.", "gt_ans": "the cat."}], "val")
    assert figures["accuracy"] == 100


def test_another_prompt_in_training_than_in_evaluation_is_told(caplog: pytest.LogCaptureFixture) -> None:
    def told(trained: str = "Q: {} A:", **run: Any) -> bool:
        caplog.clear()
        config = lavis_config("xformer_vqa", **{"valid_splits": ["val"], "evaluate": False, **run})
        config.to_dict = lambda: {"run": OmegaConf.to_container(config.run_cfg), "model": {"vqa_prompt": trained}}
        XFormerVQATask.setup_task(config)
        return f"trained with model.vqa_prompt '{trained}', evaluated with run.prompt '" in caplog.text

    assert told()
    assert told("Q: {} A:", prompt="{}?")
    assert not told(evaluate=True)
    assert not told(valid_splits=[])
    assert not told("Q: {} A:", prompt="Q: {} A:")
    assert not told("")


@pytest.mark.parametrize("said", ["red", [], [1], None])
def test_answers_that_laviss_datasets_would_take_apart_are_refused(said: Any) -> None:
    dataset = COCOVQADataset.__new__(COCOVQADataset)
    dataset.annotation = [{"answer": ["red", "red"]}]
    check.check_answers({"coco_vqa": {"train": dataset}, "coco_caption": {"train": SimpleNamespace(annotation=[{}])}})
    dataset.annotation.append({"answer": said})
    with pytest.raises(UserError, match=r"datasets\.coco_vqa: train: row 2: its answer is .*; it must list texts"):
        check.check_answers({"coco_vqa": {"train": dataset}})
    with pytest.raises(UserError, match=r"datasets\.captions_and_questions: train: row 2"):
        check.check_answers({"captions_and_questions": {"train": ConcatDataset([[0], dataset])}})
