"""The row of one answer in a result file: the same for every task, so that comparisons can pair answers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any


def answer_row(
    number: int | str,
    *,
    image: str,
    kind: str,
    correct: float | None,
    question: str = "",
    group: str = "",
    guess: float | None = None,
    **more: Any,
) -> dict[str, Any]:
    """Return the row.

    Args:
        number: the question's number.
        image: the image's name; a bootstrap resamples images.
        kind: of the question.
        correct: how right the answer is, usually 0 or 1; None: there is no true answer, the row has no ``correct``.
        question: its words; "" for a caption.
        group: what is scored separately; the kind by default.
        guess: ``correct`` of an answer that needs no image; None: to be taken from the group's most frequent truth.
        more: such as ``truth`` and ``answer``.
    """
    row = {"question_id": number, "image": image, "question": question, "kind": kind, "group": group or kind}
    scores = {"correct": correct, "guess": guess}
    return {**row, **more, **{name: score for name, score in scores.items() if score is not None}}


def truth_of(row: Mapping[str, Any]) -> str:
    """Return the most frequent of the answers that annotators gave to a question, the first of equals; "" if none."""
    given = row.get("answers") or row.get("answer") or []
    votes = Counter(map(str, given if isinstance(given, (list, tuple)) else [given]))
    return votes.most_common(1)[0][0] if votes else ""
