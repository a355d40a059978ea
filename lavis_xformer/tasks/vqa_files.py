"""Files of questions and annotations in VQA's format, checked for what LAVIS's VQA tools read of them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from lavis_xformer.errors import UserError, first_line
from lavis_xformer.files import read_json

#: keys that VQA's scoring reads in a file of questions or annotations, the last one that of its rows, and in every row
QUESTIONS = (("info", "task_type", "data_type", "data_subtype", "license", "questions"), ("question_id", "question"))
ANNOTATIONS = (("annotations",), ("question_id", "image_id", "question_type", "answer_type", "answers"))


def check_vqa(dataset: Any) -> None:
    """Check that a dataset has files in VQA's format; those of a split without true answers may be None.

    Raises:
        UserError: it has none, or they lack a key that the scoring needs.
    """
    if not hasattr(dataset, "coco_fmt_qust_file"):
        raise UserError(
            "run.task: xformer_vqa needs question and annotation files in VQA's format; else use xformer_gqa"
        )
    if dataset.coco_fmt_qust_file is not None:
        check_vqa_file(dataset.coco_fmt_qust_file, *QUESTIONS)
        check_vqa_file(dataset.coco_fmt_anno_file, *ANNOTATIONS)


@cache
def check_vqa_file(file: str, keys: Sequence[str], row_keys: Sequence[str]) -> None:
    """Check that a file has ``keys``, the last of which holds rows with ``row_keys``.

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
