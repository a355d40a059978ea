"""Rows of one's own dataset are checked before training, and the validator says what it saw."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from lavis_xformer.data.image_text import Pair, PairKeys, QuestionKeys, load
from lavis_xformer.data.validate import main
from lavis_xformer.errors import UserError


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Ten images, 0.png to 9.png."""
    for i in range(10):
        Image.new("RGB", (8, 8), (i, 0, 0)).save(tmp_path / f"{i}.png")
    return tmp_path


def write(folder: Path, rows: list[Any]) -> Path:
    path = folder / "rows.json"
    path.write_text(json.dumps(rows))
    return path


def test_ten_images_are_read(photos: Path) -> None:
    rows = [{"image": f"{i}.png", "caption": [f"number {i}", "a square"]} for i in range(10)]
    records = load(write(photos, rows), PairKeys(), image_root=photos)
    assert records[3] == Pair("3.png", ("number 3", "a square"), "3.png", 4)


def test_one_image_has_one_id_however_its_path_is_written(photos: Path) -> None:
    rows = [{"image": name, "caption": "one"} for name in ("1.png", "./1.png", ".//1.png")]
    records = load(write(photos, rows), PairKeys(), image_root=photos)
    assert {record.image_id for record in records if isinstance(record, Pair)} == {"1.png"}


def test_other_keys_and_ids(photos: Path) -> None:
    rows = [{"file": "1.png", "text": "one", "n": 7}, {"file": "2.png", "text": "two", "n": 7}]
    keys = PairKeys(image="file", caption="text", image_id="n")
    records = load(write(photos, rows), keys, image_root=photos)
    assert {record.image_id for record in records if isinstance(record, Pair)} == {"7"}


@pytest.mark.parametrize("value", [{}, {"n": None}])
def test_a_row_without_the_id_that_a_key_names_is_wrong(photos: Path, value: dict[str, Any]) -> None:
    rows = [{"image": f"{i}.png", "caption": "x", "question": "y?", "answer": "z", **value} for i in range(2)]
    for keys in (PairKeys(image_id="n"), QuestionKeys(question_id="n")):
        with pytest.raises(UserError, match=r"2 of 2 rows are wrong: row 1: .*(no id under 'n'|'n' holds no id)"):
            load(write(photos, rows), keys, image_root=photos)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"caption": "x"}, r"row 2: no image under 'image' \(the row has caption\)"),
        ({"image": "1.png"}, r"row 2: no caption under 'caption' \(the row has image\)"),
        ({"image": "1.png", "caption": []}, "row 2: 'caption' holds no caption"),
        ({"image": "1.png", "caption": " "}, "row 2: 'caption' holds no caption"),
        ({"image": 3, "caption": "x"}, "row 2: 'image' holds no image"),
        ({"image": "gone.png", "caption": "x"}, r"row 2: no image file .*gone\.png"),
    ],
)
def test_a_wrong_row_is_named(photos: Path, row: dict[str, Any], message: str) -> None:
    path = write(photos, [{"image": "0.png", "caption": "x"}, row])
    with pytest.raises(UserError, match=f"1 of 2 rows are wrong: {message}"):
        load(path, PairKeys(), image_root=photos)


def test_missing_image_folder_is_named(photos: Path) -> None:
    path = write(photos, [{"image": "0.png", "caption": "x"}])
    with pytest.raises(UserError, match=r"nowhere: no such image folder"):
        load(path, PairKeys(), image_root=photos / "nowhere")


def test_questions_need_answers_only_for_training(photos: Path) -> None:
    path = write(photos, [{"image": "0.png", "question": "how many?", "id": 12}])
    with pytest.raises(UserError, match="row 1: no answer under 'answer'"):
        load(path, QuestionKeys(), image_root=photos)
    (record,) = load(path, QuestionKeys(question_id="id", answers_needed=False), image_root=photos)
    assert record.question_id == "12"  # type: ignore[union-attr]


def test_an_answer_that_is_neither_text_nor_number_is_wrong_in_every_split(photos: Path) -> None:
    for answer, said in (
        (["a", "", None], "null"),
        ([{"answer": "a", "answer_id": 1}], '{"answer": "a", "answer_id": 1}'),
    ):
        path = write(photos, [{"image": "0.png", "question": "how many?", "answer": answer}])
        for needed in (True, False):
            with pytest.raises(UserError, match=f"row 1: 'answer' holds {said}, which is neither text nor number"):
                load(path, QuestionKeys(answers_needed=needed), image_root=photos)


def test_validate_says_what_it_saw(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"image": f"{i}.png", "caption": ["one two", "one two three four"]} for i in range(10)]
    assert main([str(write(photos, rows)), "--image-root", str(photos)]) == 0
    said = capsys.readouterr().out
    assert "10 good rows, 10 images" in said
    assert "2.00 captions per image, 3.0 words on average" in said
    assert "no problem found" in said


def test_validate_exits_1_and_numbers_the_problems(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"image": f"{i}.png", "caption": "x"} for i in (*range(10), 5)]
    del rows[7]["caption"]
    (photos / "5.png").write_bytes(b"not an image")
    command = [str(write(photos, rows)), "--image-root", str(photos)]
    assert main(command) == 1
    counts, good, _, number, *problems = map(str.strip, capsys.readouterr().out.splitlines())
    assert (counts, good, number) == (f"{command[0]}: 11 rows", "8 good rows, 8 images", "3 problems")
    assert problems[1].startswith("row 8: no caption")
    for row, problem in zip((6, 11), problems[::2], strict=True):
        assert problem.startswith(f"row {row}: {photos / '5.png'}: not an image")
    assert main([*command, "--fast", "--show", "0"]) == 1
    assert "1 problems" in capsys.readouterr().out


def test_validate_lists_rows_that_are_no_objects_beside_others(
    photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = photos / "mixed.json"
    path.write_text(json.dumps([{"image": "0.png", "caption": "a"}, 7, {"image": "gone.png", "caption": "b"}]))
    assert main([str(path), "--image-root", str(photos)]) == 1
    said = capsys.readouterr().out
    assert "1 good rows, 1 images" in said
    assert "row 2: not an object" in said
    assert "row 3: no image file" in said


def test_validate_questions(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"image": "1.png", "q": "how many?", "a": a} for a in (["2", "2"], 3, "2")]
    command = [str(write(photos, rows)), "--image-root", str(photos)]
    assert main([*command, "--question-key", "q", "--answer-key", "a"]) == 0
    assert "most common answers: 2 (3), 3 (1)" in capsys.readouterr().out
    assert main([*command, "--question-key", "q"]) == 1
    assert main([*command, "--question-key", "q", "--answer-key", ""]) == 0
    assert main([*command, "--question-key", "q", "--answer-key", "a", "--id-key", "image"]) == 1
    assert "row 1: 'image': '1.png' is not a unique whole number" in capsys.readouterr().out


def test_a_missing_image_is_one_problem(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"image": name, "caption": "x"} for name in ("1.png", "gone.png")]
    assert main([str(write(photos, rows)), "--image-root", str(photos)]) == 1
    assert "  1 problems" in capsys.readouterr().out
