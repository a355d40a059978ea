"""A user's own images and texts: every row of an annotation file is checked before anything is trained on it."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lavis_xformer.data.records import (
    NO_OBJECT,
    Row,
    absent_images,
    odd_entry,
    read_entries,
    refuse_wrong_rows,
    strings,
)


@dataclass(frozen=True)
class Pair:
    """One row: an image and its captions."""

    image: str  # path below the image root
    captions: tuple[str, ...]  # one or more
    image_id: str  # the row's own id, or the path; rows that share it show the same image
    row: int  # its number in the file


@dataclass(frozen=True)
class Question:
    """One row: an image, a question, and all answers that people gave."""

    image: str  # path below the image root
    question: str
    answers: tuple[str, ...]  # none where the row is for evaluation without ground truth
    question_id: str  # the row's own id, or its number in the file
    row: int  # its number in the file


@dataclass(frozen=True, kw_only=True)
class PairKeys:
    """The keys under which a row keeps its image, its captions and its id."""

    image: str = "image"
    caption: str = "caption"
    image_id: str | None = None

    def parse(self, number: int, row: Row) -> Pair | str:
        """Return the pair, or what is wrong with the row."""
        image = _image(row, self.image)
        captions = strings(row.get(self.caption))
        image_id = _text(row, self.image_id) if self.image_id else image
        needed = [("image", self.image, image), ("caption", self.caption, captions), ("id", self.image_id, image_id)]
        return _lack(row, needed) or Pair(image, captions, image_id, number)


@dataclass(frozen=True, kw_only=True)
class QuestionKeys:
    """The keys under which a row keeps its image, question, answers and id."""

    image: str = "image"
    question: str = "question"
    answer: str = "answer"
    question_id: str | None = None
    answers_needed: bool = True

    def parse(self, number: int, row: Row) -> Question | str:
        """Return the question, or what is wrong with the row."""
        image = _image(row, self.image)
        question = _text(row, self.question)
        answers = strings(row.get(self.answer))
        optional = not self.answers_needed and not odd_entry(row.get(self.answer))
        own_id = _text(row, self.question_id) if self.question_id else str(number)
        needed: list[tuple[str, str | None, object]] = [
            ("image", self.image, image),
            ("question", self.question, question),
            ("answer", self.answer, answers or optional),
            ("id", self.question_id, own_id),
        ]
        return _lack(row, needed) or Question(image, question, answers, own_id, number)


Keys = PairKeys | QuestionKeys
Record = Pair | Question


def _image(row: Row, key: str) -> str:
    """The path as every row should write it, since images are told apart by it: without ``./``."""
    value = row.get(key)
    return os.path.normpath(value) if isinstance(value, str) and value.strip() else ""


def _text(row: Row, key: str) -> str:
    return next(iter(strings(row.get(key))), "")


def _lack(row: Row, needed: Sequence[tuple[str, str | None, object]]) -> str:
    """Say which needed entry a row lacks, if any, the first only; ``needed`` has the name, key and value of each."""
    for what, key, value in needed:
        if not value and key in row:
            odd = odd_entry(row[key])
            return f"'{key}' holds {odd}, which is neither text nor number" if odd else f"'{key}' holds no {what}"
        if not value:
            return f"no {what} under '{key}' (the row has {', '.join(map(str, row)) or 'nothing'})"
    return ""


def load(
    path: str | Path,
    keys: Keys,
    *,
    image_root: str | Path = "",
    rows_key: str | None = None,
    check_files: bool = True,
) -> list[Record]:
    """Read one annotation file and check every row before anything is trained on it.

    Args:
        path: the annotation file, see :func:`lavis_xformer.data.records.read_entries`.
        keys: what the rows hold, and where.
        image_root: the folder that the rows' paths are relative to.
        rows_key: which key of a JSON object holds the list.
        check_files: also check that every image file exists (one listing per folder).

    Raises:
        UserError: the file, the image folder or some rows are wrong; the message names the first.
    """
    rows = read_entries(path, rows_key=rows_key)
    records, problems = check(rows, keys, image_root=image_root, check_files=check_files)
    refuse_wrong_rows(path, problems, len(rows))
    return records


def check(
    rows: Sequence[tuple[int, Any]],
    keys: Keys,
    *,
    image_root: str | Path = "",
    check_files: bool = True,
) -> tuple[list[Record], list[tuple[int, str]]]:
    """Parse rows; return the good ones, and for the others the row number and what is wrong.

    Raises:
        UserError: the image folder does not exist.
    """
    parsed = {number: keys.parse(number, row) if isinstance(row, dict) else NO_OBJECT for number, row in rows}
    problems = {number: what for number, what in parsed.items() if isinstance(what, str)}
    records = [record for record in parsed.values() if not isinstance(record, str)]
    if check_files:
        problems |= absent_images(image_root, [(record.row, record.image) for record in records])
    return [record for record in records if record.row not in problems], sorted(problems.items())


def wrong_ids(questions: Sequence[Question], key: str) -> list[tuple[int, str]]:
    """Return the row number of each question whose own id, under ``key``, is not a unique whole number, and say so."""
    counts = Counter(question.question_id for question in questions)
    return [
        (question.row, f"'{key}': '{question.question_id}' is not a unique whole number")
        for question in questions
        if counts[question.question_id] > 1 or not question.question_id.isdecimal()
    ]
