"""Files of questions and annotations for VQA and GQA, checked for what LAVIS's tools read of them."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from lavis_xformer.errors import UserError, first_line
from lavis_xformer.files import read_json, write_text

logger = logging.getLogger(__name__)

#: keys that VQA's scoring reads in a file of questions or annotations, the last one that of its rows, and in every row
QUESTIONS = (("info", "task_type", "data_type", "data_subtype", "license", "questions"), ("question_id", "question"))
ANNOTATIONS = (("annotations",), ("question_id", "image_id", "question_type", "answer_type", "answers"))


def check_storage(datasets: Mapping[str, Any]) -> None:
    """Check that no split lacks one of its four files: LAVIS would take it for one without true answers.

    Args:
        datasets: the section ``datasets``.

    Raises:
        UserError: one has three.
    """
    for name, dataset in datasets.items():
        annotations = ((dataset or {}).get("build_info") or {}).get("annotations") or {}
        for split, files in annotations.items():
            if split != "train" and len(files.get("storage") or ()) == 3:
                raise UserError(
                    f"datasets.{name}.build_info.annotations.{split}.storage has three files: it takes LAVIS's "
                    "questions, the list of answers (which may be empty), VQA's own questions and VQA's annotations"
                )


def check_vqa(dataset: Any) -> None:
    """Check that a dataset has files in VQA's format; those of a split without true answers may be None.

    Raises:
        UserError: it has none, they lack a key that the scoring needs, or they are about other questions.
    """
    if not hasattr(dataset, "coco_fmt_qust_file"):
        raise UserError(
            "run.task: xformer_vqa needs question and annotation files in VQA's format; else use xformer_gqa"
        )
    if dataset.coco_fmt_qust_file is not None:
        asked = [row["question_id"] for row in dataset.annotation]
        check_unique(asked)
        for file, keys in ((dataset.coco_fmt_qust_file, QUESTIONS), (dataset.coco_fmt_anno_file, ANNOTATIONS)):
            if differing := check_vqa_file(file, *keys) ^ set(asked):
                raise UserError(
                    f"{file}: its questions are not those of the split: {len(differing)} are in one only, such as "
                    f"{min(differing, key=str)}; VQA's scoring needs the same in both"
                )


def check_unique(ids: Iterable[object]) -> None:
    """Raise a UserError if two questions have the same id, of which the scoring would keep one."""
    again = next((number for number, count in Counter(ids).items() if count > 1), None)
    if again is not None:
        raise UserError(f"two questions of the split have the question_id {again}; give each its own")


def answer_all(result_file: str, question_file: str) -> None:
    """Add "" as the answer to questions that were not asked, as their images can't be read: VQA's tools want all."""
    said = read_json(Path(result_file))
    answered = {row["question_id"] for row in said}
    every = [row["question_id"] for row in read_json(Path(question_file))["questions"]]
    added = [{"question_id": number, "answer": ""} for number in every if number not in answered]
    tell_skipped(len(added))
    if added:
        write_text(Path(result_file), json.dumps([*said, *added]))


def tell_skipped(count: int) -> None:
    """Warn of questions that were not asked (``run.on_corrupt: skip``), if there are any."""
    if count:
        logger.warning("%d questions were not asked, as their images can't be read: they count as wrong", count)


@cache
def check_vqa_file(file: str, keys: Sequence[str], row_keys: Sequence[str]) -> frozenset[Any]:
    """Check that a file has ``keys``, the last of which holds rows with ``row_keys``; return the ids of its questions.

    Raises:
        UserError: it has not, or can't be read.
    """
    try:
        content = read_json(Path(file))
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: can't be read: {first_line(error)}") from error
    lacks = [key for key in keys if not isinstance(content, dict) or key not in content]
    if lacks:
        raise UserError(f"{file}: no {', '.join(lacks)}; VQA's format has {', '.join(keys)} (the scoring reads them)")
    for number, row in enumerate(content[keys[-1]], start=1):
        if lacks := [key for key in row_keys if key not in row]:
            raise UserError(f"{file}: {keys[-1]}: row {number} has no {', '.join(lacks)}, which VQA's scoring needs")
        if "answers" in row_keys and not _are_answers(given := row["answers"]):
            raise UserError(
                f'{file}: row {number}: its answers are {given!r}; VQA\'s format has [{{"answer": "text"}}, ...]'
            )
    return frozenset(row["question_id"] for row in content[keys[-1]])


def _are_answers(given: object) -> bool:
    """Whether a row's answers are a list of mappings whose ``answer`` is text, which the scoring compares."""
    return (
        isinstance(given, list)
        and bool(given)
        and all(isinstance(each, dict) and isinstance(each.get("answer"), str) for each in given)
    )
