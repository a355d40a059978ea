"""A user's files become LAVIS datasets by YAML alone; broken images are skipped or fatal."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lavis.common.registry import registry
from omegaconf import OmegaConf
from PIL import Image
from torch.utils.data import DataLoader

from lavis_xformer.data import image_text_datasets  # noqa: F401  (registers the builders)
from lavis_xformer.data.guard import DataFault, guard
from lavis_xformer.engine.batches import image_ids
from lavis_xformer.errors import UserError


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    (tmp_path / "photos").mkdir()
    for i in range(10):
        Image.new("RGB", (9, 8), (20 * i, 0, 0)).save(tmp_path / "photos" / f"{i}.png")
    return tmp_path / "photos"


@pytest.fixture
def captions(photos: Path) -> Path:
    """Ten images, two captions each, as JSON lines."""
    path = photos.parent / "captions.jsonl"
    rows = [{"image": f"{i}.png", "caption": [f"Red {i}!", "a square"]} for i in range(10)]
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


@pytest.fixture
def questions(photos: Path) -> Path:
    path = photos.parent / "questions.json"
    rows: list[dict[str, Any]] = [
        {"image": f"{i}.png", "question": "How red?", "answer": ["very", "very", i], "id": 100 + i} for i in range(10)
    ]
    path.write_text(json.dumps({"info": "mine", "questions": rows}))
    return path


def build(name: str, **settings: Any) -> dict[str, Any]:
    """Build as a run does: the user's section over the default YAML."""
    cls = registry.get_builder_class(name)
    defaults = OmegaConf.load(cls.default_config_path()).datasets[name]
    small = {"vis_processor": {m: {"image_size": 16} for m in ("train", "eval")}}
    return cls(OmegaConf.merge(defaults, small, settings)).build_datasets()


def test_pairs_for_training(photos: Path, captions: Path) -> None:
    datasets = build("image_text_json", image_root=str(photos), splits={"train": {"annotations": str(captions)}})
    assert list(datasets) == ["train"]
    loader = DataLoader(datasets["train"], 4, collate_fn=datasets["train"].collater)
    batch = next(iter(loader))
    assert len(datasets["train"]) == 20
    assert batch["image"].shape == (4, 6, 16, 16)
    assert batch["text_input"] == ["red 0", "a square", "red 1", "a square"]
    assert batch["image_id"].tolist() == [0, 0, 1, 1]
    assert batch["instance_id"] == ["0", "1", "2", "3"]


def test_pairs_for_evaluation_have_lavis_retrieval_tables(photos: Path, captions: Path) -> None:
    splits = {"val": {"annotations": str(captions), "image_root": str(photos)}}
    dataset = build("image_text_json", splits=splits)["val"]
    batch = next(iter(DataLoader(dataset, 10, collate_fn=dataset.collater)))
    assert batch["index"].tolist() == batch["image_id"].tolist() == list(range(10))
    assert batch["text_input"][3] == "red 3"
    assert dataset.img2txt[3] == [6, 7]
    assert dataset.txt2img[7] == 3
    assert dataset.text[6] == "red 3"
    assert dataset.image[3] == "3.png"


def test_rows_of_one_image_are_one_image(photos: Path) -> None:
    path = photos.parent / "rows.json"
    rows = [{"image": f"{i % 2}.png", "caption": f"c{i}"} for i in range(6)]
    path.write_text(json.dumps(rows))
    splits = {name: {"annotations": str(path)} for name in ("train", "val")}
    datasets = build("image_text_json", image_root=str(photos), splits=splits)
    assert [datasets["train"][i]["image_id"] for i in range(6)] == [0, 1, 0, 1, 0, 1]
    assert datasets["val"].img2txt == {0: [0, 1, 2], 1: [3, 4, 5]}
    assert datasets["val"].text[3:] == ["c1", "c3", "c5"]


@pytest.mark.parametrize(
    ("ids", "numbers"), [([30, 10], [30, 10]), (["30", "010"], [30, 10]), (["1", "01"], None), (["a", "b"], None)]
)
def test_images_keep_the_ids_of_their_file_where_these_are_numbers(
    ids: list[Any], numbers: list[int] | None, photos: Path
) -> None:
    path = photos.parent / "rows.json"
    path.write_text(json.dumps([{"image": f"{i}.png", "caption": "c", "id": own} for i, own in enumerate(ids)]))
    dataset = build("image_text_json", image_root=str(photos), id_key="id", splits={"val": {"annotations": str(path)}})
    samples = [dataset["val"][i] for i in range(2)]
    assert dataset["val"].has_ids == (numbers is not None)
    assert [sample["image_id"] for sample in samples] == (numbers or [0, 1])
    assert dataset["val"].collater(samples)["image_path"] == ["0.png", "1.png"]


def test_each_split_has_its_processor_and_its_own_folder_of_images(photos: Path, captions: Path) -> None:
    own = {"annotations": str(captions), "image_root": str(photos)}
    sizes = {"train": {"image_size": 16}, "eval": {"image_size": 24}}
    splits = {"train": own, "val": own, "test": own}
    built = build("image_text_json", image_root="/nowhere", splits=splits, vis_processor=sizes)
    assert {split: data[0]["image"].shape[-1] for split, data in built.items()} == {"train": 16, "val": 24, "test": 24}


def test_the_true_answer_is_the_most_frequent_one(photos: Path) -> None:
    rows = [{"image": "0.png", "question": "q", "answer": given} for given in (["a", "b", "b"], [])]
    path = photos.parent / "rows.json"
    path.write_text(json.dumps(rows))
    splits = {"test": {"annotations": str(path)}}
    dataset = build("image_question_json", image_root=str(photos), splits=splits)["test"]
    assert [dataset[number]["answer"] for number in (0, 1)] == ["b", None]


def test_questions_to_train_on_need_answers(photos: Path) -> None:
    path = photos.parent / "rows.json"
    path.write_text(json.dumps([{"image": "0.png", "question": "q"}]))
    for split in ("val", "test"):
        assert build("image_question_json", image_root=str(photos), splits={split: {"annotations": str(path)}})
    with pytest.raises(UserError, match="row 1: no answer under 'answer'"):
        build("image_question_json", image_root=str(photos), splits={"train": {"annotations": str(path)}})


def test_a_misspelt_key_of_the_answers_is_refused(photos: Path) -> None:
    path = photos.parent / "rows.json"
    path.write_text(json.dumps([{"image": "0.png", "question": "q", "reply": "a"}]))
    options = {"image_root": str(photos), "splits": {"test": {"annotations": str(path)}}}
    assert build("image_question_json", answer_key="reply", **options)["test"][0]["answer"] == "a"
    with pytest.raises(UserError, match=r"answer_key: no row of '?test'? has an answer under 'replay'"):
        build("image_question_json", answer_key="replay", **options)


def test_several_files_are_joined(photos: Path, captions: Path) -> None:
    splits = {"train": {"annotations": [str(captions), str(captions)]}}
    assert len(build("image_text_json", image_root=str(photos), splits=splits)["train"]) == 40


@pytest.mark.parametrize("damage", [b"", b"not an image", "cut"])
def test_a_corrupt_image_is_skipped_or_fatal(photos: Path, captions: Path, damage: bytes | str) -> None:
    bad = photos / "4.png"
    bad.write_bytes(bad.read_bytes()[:50] if damage == "cut" else damage)  # type: ignore[arg-type]
    settings = {"image_root": str(photos), "splits": {"train": {"annotations": str(captions)}}}
    dataset = guard(build("image_text_json", **settings)["train"], on_corrupt="skip")
    assert dataset[8]["image_id"] == 5
    assert dataset.corrupt() == [f"{bad} (sample 8)", f"{bad} (sample 9)"]
    dataset = guard(build("image_text_json", **settings)["train"], on_corrupt="raise")
    with pytest.raises(DataFault) as error:
        dataset[8]
    assert str(error.value).count(str(bad)) == 1


def test_questions_for_training_are_in_lavis_form(photos: Path, questions: Path) -> None:
    splits = {"train": {"annotations": str(questions)}}
    dataset = build("image_question_json", image_root=str(photos), splits=splits)["train"]
    batch = next(iter(DataLoader(dataset, 2, collate_fn=dataset.collater)))
    assert batch["text_input"] == ["how red?", "how red?"]
    assert batch["answer"] == ["very", "0", "very", "1"]
    torch.testing.assert_close(batch["weight"], torch.tensor([2 / 3, 1 / 3] * 2))
    assert batch["n_answers"].tolist() == [2, 2]
    assert image_ids(batch) == batch["image_id"].tolist() == [0, 1], "which a step that is not finite names"


def test_questions_about_one_image_share_its_id(photos: Path) -> None:
    path = photos.parent / "rows.json"
    path.write_text(json.dumps([{"image": f"{i % 2}.png", "question": "q", "answer": "a"} for i in range(4)]))
    splits = {"train": {"annotations": str(path)}}
    dataset = build("image_question_json", image_root=str(photos), splits=splits)["train"]
    assert image_ids(dataset.collater([dataset[i] for i in range(4)])) == [0, 1, 0, 1]


def test_questions_for_evaluation_are_in_lavis_form(photos: Path, questions: Path) -> None:
    candidates = photos.parent / "answers.json"
    candidates.write_text('["very", "hardly"]')
    dataset = build(
        "image_question_json",
        image_root=str(photos),
        id_key="id",
        answer_list=str(candidates),
        splits={"test": {"annotations": str(questions)}},
    )["test"]
    batch = next(iter(DataLoader(dataset, 3, collate_fn=dataset.collater)))
    assert batch["question_id"].tolist() == [100, 101, 102]
    assert batch["answer"] == ["very"] * 3
    assert batch["instance_id"] == ["0", "1", "2"]
    assert dataset.answer_list == ["very", "hardly"]


def test_question_ids_must_be_unique_whole_numbers(photos: Path, questions: Path) -> None:
    splits = {"test": {"annotations": str(questions)}}
    with pytest.raises(UserError, match=r"id_key 'image': '0\.png' is not a unique whole number"):
        build("image_question_json", image_root=str(photos), id_key="image", splits=splits)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, r"set datasets\.image_text_json\.splits\.train\.annotations"),
        ({"splits": {"vall": {"annotations": "x"}}}, "splits: 'vall'; did you mean 'val'"),
        ({"splits": {"val": {"annotations": "gone.json"}}}, r"gone\.json: no such annotation file"),
        ({"image_root": "/nowhere"}, "/nowhere: no such image folder"),
        ({"caption_key": "text"}, r"10 of 10 rows are wrong: row 1: no caption under 'text'"),
    ],
)
def test_a_wrong_configuration_is_named(photos: Path, captions: Path, settings: dict[str, Any], message: str) -> None:
    if settings and "splits" not in settings:
        settings = {"image_root": str(photos), **settings}
        settings["splits"] = {"train": {"annotations": str(captions)}}
    with pytest.raises(UserError, match=message):
        build("image_text_json", **settings)


def test_question_ids_given_twice_are_named(photos: Path) -> None:
    path = photos.parent / "twice.json"
    path.write_text(json.dumps([{"image": "0.png", "question": "q", "answer": "a", "id": 7}] * 2))
    splits = {"test": {"annotations": str(path)}}
    with pytest.raises(UserError, match=r"id_key 'id': '7' is not a unique whole number"):
        build("image_question_json", image_root=str(photos), id_key="id", splits=splits)


def test_files_are_not_looked_for_if_the_configuration_says_so(photos: Path) -> None:
    path = photos.parent / "gone.json"
    path.write_text(json.dumps([{"image": "gone.png", "caption": "x"}]))
    settings = {"image_root": str(photos), "splits": {"train": {"annotations": str(path)}}}
    assert len(build("image_text_json", check_files=False, **settings)["train"]) == 1
    with pytest.raises(UserError, match=r"no image file .*gone\.png"):
        build("image_text_json", **settings)


def test_ids_too_large_for_a_tensor_are_none(photos: Path) -> None:
    path = photos.parent / "large.json"
    path.write_text(json.dumps([{"image": f"{i}.png", "caption": "x", "id": str(2**63 + i)} for i in range(2)]))
    splits = {"val": {"annotations": str(path)}}
    data = build("image_text_json", image_root=str(photos), id_key="id", splits=splits)["val"]
    assert not data.has_ids
    assert data.collater([data[i] for i in range(2)])["image_id"].tolist() == [0, 1]


def test_a_split_beside_another_may_withhold_its_answers(photos: Path) -> None:
    for name, more in (("train", {"said": "a"}), ("test", {})):
        (photos.parent / f"{name}.json").write_text(json.dumps([{"image": "0.png", "question": "q", **more}]))
    splits = {name: {"annotations": str(photos.parent / f"{name}.json")} for name in ("train", "test")}
    datasets = build("image_question_json", image_root=str(photos), answer_key="said", splits=splits)
    assert datasets["test"].unanswered == [0]
