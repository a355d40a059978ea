"""Annotation files of every usual form are read; what is wrong is named by its row."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lavis_xformer.data import records
from lavis_xformer.data.records import absent_images, odd_entry, read_rows, strings
from lavis_xformer.errors import UserError

ROWS = [{"image": "a.jpg"}, {"image": "ü.jpg"}, {"image": "c.jpg"}]


def lines(rows: list[dict[str, str]]) -> str:
    return "\n\n".join(json.dumps(row) for row in rows)


@pytest.mark.parametrize(
    ("name", "text", "numbers"),
    [
        ("list.json", json.dumps(ROWS), [1, 2, 3]),
        ("pretty.json", json.dumps(ROWS, indent=2), [1, 2, 3]),
        ("bom.json", "\ufeff" + json.dumps(ROWS), [1, 2, 3]),
        ("object.json", json.dumps({"info": {}, "data": ROWS}), [1, 2, 3]),
        ("lines.jsonl", lines(ROWS), [1, 3, 5]),
        ("lines.json", lines(ROWS), [1, 3, 5]),
        ("table.csv", "image\na.jpg\nü.jpg\nc.jpg\n", [1, 2, 3]),
    ],
)
def test_every_form_gives_the_same_rows(tmp_path: Path, name: str, text: str, numbers: list[int]) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8")
    assert read_rows(tmp_path / name) == list(zip(numbers, ROWS, strict=True))


def test_line_breaks_inside_texts_do_not_break_rows(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"caption": "one\u2028two"}\r\n{"caption": "x"}\r\n', encoding="utf-8")
    assert [row["caption"] for _, row in read_rows(tmp_path / "a.jsonl")] == ["one\u2028two", "x"]
    (tmp_path / "a.csv").write_text('image, caption\na.jpg, "one\ntwo"\n')
    assert read_rows(tmp_path / "a.csv") == [(1, {"image": "a.jpg", "caption": "one\ntwo"})]


def test_rows_key_chooses_among_several_lists(tmp_path: Path) -> None:
    path = tmp_path / "coco.json"
    path.write_text(json.dumps({"images": [{"id": 1}], "annotations": ROWS}))
    assert len(read_rows(path, rows_key="annotations")) == 3
    with pytest.raises(UserError, match="images, annotations; rows_key is None"):
        read_rows(path)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.json", "[1, {", "not JSON: line 1, column 6"),
        ("a.json", "[]", "holds no rows"),
        ("a.json", "3", "holds int"),
        ("gqa.json", '{"201307251": {"question": "Is it?"}}', "an object that holds no list of rows"),
        ("a.tsv", "image\tcaption\n", "not JSON: .*; a table needs a header, commas and the extension .csv"),
        ("a.json", '[{"image": "a"}, 7]', "1 of 2 rows are wrong: row 2: not an object"),
        ("a.jsonl", '{"image": "a"}\n{"image', "1 of 2 rows are wrong: row 2: not JSON"),
        ("a.jsonl", "x\n" * 5, "row 3: .*; and 2 more"),
        (
            "a.csv",
            "image,caption\na.jpg,one\nb.jpg,a kite, over a beach\n",
            "1 of 2 rows are wrong: row 2: more fields than the header; quote texts that contain commas",
        ),
        ("a.csv", "image;caption\na.jpg;one\n", "its columns are separated by semicolons; CSV needs commas"),
        ("a.csv", "image\tcaption\na.jpg\tone, two\n", "its columns are separated by tabs; CSV needs commas"),
        ("a.csv", 'image,caption\n"a.jpg","one"\nb.jpg\n', "row 2: fewer fields than the header: no 'caption'"),
        ("a.csv", 'image,caption\na.jpg,"' + "x" * 200_000, "not CSV: field larger than field limit"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=message) as error:
        read_rows(tmp_path / name)
    assert str(tmp_path / name) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_row_with_two_faults_is_one_wrong_row() -> None:
    with pytest.raises(UserError, match=r"1 of 3 rows are wrong: row 2: no image; row 2: no text"):
        records.refuse_wrong_rows("a.json", [(2, "no image"), (2, "no text")], 3)


def test_missing_and_binary_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere\.json: no such annotation file"):
        read_rows(tmp_path / "nowhere.json")
    with pytest.raises(UserError, match=rf"{Path.cwd()}/nowhere\.json: no such annotation file"):
        read_rows("nowhere.json")
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="is not UTF-8 text"):
        read_rows(tmp_path / "binary.json")


def test_paths_expand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.json").write_text(json.dumps(ROWS))
    monkeypatch.setenv("ANNOTATIONS", str(tmp_path))
    assert len(read_rows("$ANNOTATIONS/a.json")) == 3


def test_strings_and_numbers_are_texts_and_nothing_else_is() -> None:
    assert strings("a") == strings(["a", " "]) == ("a",)
    assert strings([2, "b"]) == ("2", "b")
    assert strings(float("nan")) == strings(None) == strings({}) == strings([None]) == strings("") == ()


@pytest.mark.parametrize(
    ("value", "odd"),
    [
        (["a", "", None], "null"),
        ([{"answer": "yes"}], '{"answer": "yes"}'),
        ({"answer": "y" * 99}, '{"answer": "' + "y" * 28 + "..."),
        ([float("nan")], "NaN"),
        *((value, "") for value in ("a", 2, ["", 1.5], [], None, float("nan"))),
    ],
)
def test_what_is_neither_text_nor_number_is_shown(value: object, odd: str) -> None:
    assert odd_entry(value) == odd


def test_a_url_is_no_image_file(tmp_path: Path) -> None:
    absent = absent_images(tmp_path, [(1, "http://a.org/b.png"), (2, "s3://a/b.png"), (3, "b.png")])
    assert absent[1] == "http://a.org/b.png is a URL, and images aren't fetched: download it and give the file's path"
    assert absent[2].startswith("s3://a/b.png is a URL")
    assert absent[3] == f"no image file {tmp_path}/b.png"


def test_only_files_are_images(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    absent = absent_images(tmp_path, enumerate(["file", "folder", "x/y", str(tmp_path / "file")]))
    assert absent == {1: f"no image file {tmp_path}/folder", 2: f"no image file {tmp_path}/x/y"}
    (tmp_path / "folder" / "new").touch()
    assert absent_images(tmp_path, [(0, "folder/new")]) == {}


def test_each_folder_is_listed_once_in_whatever_order_the_rows_are(tmp_path: Path, monkeypatch) -> None:
    listed: list[str] = []
    monkeypatch.setattr(records.os, "scandir", lambda folder: listed.append(folder) or iter(()))
    assert len(absent_images(tmp_path, [(number, f"{number % 300}/file") for number in range(600)])) == 600
    assert len(listed) == 300


def test_a_rows_key_that_is_not_there_is_named_though_one_list_is(tmp_path: Path) -> None:
    path = tmp_path / "object.json"
    path.write_text(json.dumps({"info": {}, "data": ROWS}))
    with pytest.raises(UserError, match="whose lists are under data; rows_key is annotations"):
        read_rows(path, rows_key="annotations")
