"""Scores of answers: counting, yes or no, pairs, exact match.

Pure functions of predictions (the model's answers; None where it was not asked, which is wrong and unread whatever the
scorer makes of silence) and truths; lists that are empty or differ in length raise a
:class:`UserError`. Report every number with its scorer's name; :mod:`lavis_xformer.tasks.answers` explains the names.
Accuracies, ratios and shares are between 0 and 1.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np

from lavis_xformer.errors import UserError
from lavis_xformer.tasks.answers import read_choice, read_count, read_gvt_presence, read_presence

_COUNT_EDGES = (3, 6, 9)  # GVT-bench's bins of the true count: 0-2, 3-5, 6-8, 9 and more
_PRESENCE_EDGES = (10, 20)  # and of the number of objects in the image: 0-9, 10-19, 20 and more


@dataclass(frozen=True)
class Bin:
    """Scores of the n items whose value lies in [low, high); the last bin has no high; only counts have errors."""

    low: int
    high: int | None
    n: int
    accuracy: float
    mae: float | None = None
    rmse: float | None = None


@dataclass(frozen=True, kw_only=True)
class Score:
    """Fields of every score.

    Attributes:
        scorer: name of the scorer that read the answers.
        n: number of items.
        accuracy: share of right answers.
        majority: accuracy of always giving the most frequent truth.
        majority_answer: that truth.
        unread: share of answers that the scorer could not read; they count as wrong.
        correct: right or wrong, item by item, for :func:`.bootstrap.paired_bootstrap`.
        bins: accuracy by the number of objects.
    """

    scorer: str
    n: int
    accuracy: float
    majority: float
    majority_answer: str
    unread: float
    correct: tuple[bool, ...]
    bins: tuple[Bin, ...] = ()

    def summary(self) -> dict[str, Any]:
        """Return everything except the per-item results, ready for JSON."""
        return {key: value for key, value in asdict(self).items() if key != "correct"}


@dataclass(frozen=True, kw_only=True)
class CountScore(Score):
    """Score of counting.

    Attributes:
        mae: mean absolute error; an answer that could not be read counts as 0, as in GVT-bench.
        rmse: root mean squared error, likewise.
    """

    mae: float
    rmse: float


@dataclass(frozen=True, kw_only=True)
class PresenceScore(Score):
    """Score of yes or no; "yes" is the positive class, as in POPE (arXiv 2305.10355).

    Attributes:
        precision: share of the answers "yes" that are right; 0 if there are none.
        recall: share of the true "yes" that were found; 0 if there are none.
        f1: harmonic mean of the two.
        yes_ratio: share of answers "yes" among all.
    """

    precision: float
    recall: float
    f1: float
    yes_ratio: float


@dataclass(frozen=True, kw_only=True)
class PairScore(Score):
    """Score of pairs, in which both answers must be right, as in MMVP (arXiv 2401.06209).

    Attributes:
        pairs: number of pairs.
        pair_accuracy: share of pairs with two right answers; guessing gives 0.25.
    """

    pairs: int
    pair_accuracy: float


def score_counts(
    predictions: Sequence[str | None], truths: Sequence[str | int], *, scorer: str = "strict"
) -> CountScore:
    """Score answers to "how many" by ``gvt_official`` or ``strict``, binned by the true number."""
    _check(predictions, truths)
    true = np.array([int(truth) for truth in truths])
    read = _read(partial(read_count, scorer=scorer), predictions)
    correct = np.array([number == truth for number, truth in zip(read, true, strict=True)])
    error = np.abs(np.array([float(number or 0) for number in read]) - true)  # a float: an answer may be any number
    return CountScore(
        **_common(scorer, correct, [str(truth) for truth in true], read),
        mae=float(error.mean()),
        rmse=math.sqrt((error**2).mean()),
        bins=_bins(correct, true, _COUNT_EDGES, error),
    )


def score_presence(
    predictions: Sequence[str | None],
    truths: Sequence[str],
    *,
    scorer: str = "strict",
    sizes: Sequence[int] | None = None,
) -> PresenceScore:
    """Score answers to yes-or-no questions.

    Args:
        predictions: what the model said.
        truths: "yes" or "no", in any case, with or without a full stop.
        scorer: ``gvt_official``, ``pope_official`` or ``strict``. The first accepts an answer that says both;
            its precision, recall and yes-ratio count such an answer as the true one.
        sizes: number of objects in each item's image, to bin by; None: no bins.
    """
    _check(predictions, truths, sizes)
    true = [_truth(truth) for truth in truths]
    if scorer == "gvt_official":
        read = _read(read_gvt_presence, predictions, true)
    else:
        read = _read(partial(read_presence, scorer=scorer), predictions)
    correct = np.array([answer is truth for answer, truth in zip(read, true, strict=True)])
    hits = sum(answer is truth is True for answer, truth in zip(read, true, strict=True))
    precision, recall = hits / max(1, read.count(True)), hits / max(1, true.count(True))
    return PresenceScore(
        **_common(scorer, correct, ["yes" if truth else "no" for truth in true], read),
        precision=precision,
        recall=recall,
        f1=2 * precision * recall / (precision + recall) if hits else 0.0,
        yes_ratio=read.count(True) / len(read),
        bins=() if sizes is None else _bins(correct, np.array(sizes), _PRESENCE_EDGES),
    )


def score_pairs(
    predictions: Sequence[str | None], truths: Sequence[str], *, options: Sequence[str], pairs: Sequence[Hashable]
) -> PairScore:
    """Score choices in pairs, both of which must be right.

    Args:
        predictions: what the model said.
        truths: the right letters, such as "(a)" or "a".
        options: the options of every item, such as "(a) Open (b) Closed".
        pairs: which pair every item belongs to.
    """
    _check(predictions, truths, options, pairs)
    read = _read(read_choice, predictions, options)
    true = [truth.strip(" ().").lower() for truth in truths]
    correct = np.array([letter == truth for letter, truth in zip(read, true, strict=True)])
    whole: dict[Hashable, bool] = {}
    for pair, right in zip(pairs, correct, strict=True):
        whole[pair] = whole.get(pair, True) and bool(right)
    return PairScore(
        **_common("strict", correct, true, read),
        pairs=len(whole),
        pair_accuracy=sum(whole.values()) / len(whole),
    )


def score_exact(predictions: Sequence[str | None], truths: Sequence[str]) -> Score:
    """Score answers of a word or two by exact match, ignoring case and full stops at the end."""
    _check(predictions, truths)
    said = _read(_plain, predictions)
    true = [_plain(text) for text in truths]
    correct = np.array([answer == truth for answer, truth in zip(said, true, strict=True)])
    return Score(**_common("exact", correct, true, said))


def _read(read: Callable[..., Any], predictions: Sequence[str | None], *more: Sequence[Any]) -> list[Any]:
    """What ``read`` makes of every answer; None where there is none."""
    return [None if said is None else read(said, *others) for said, *others in zip(predictions, *more, strict=True)]


def _plain(text: str) -> str:
    return text.strip().rstrip(".").lower()


def _truth(truth: str) -> bool:
    word = _plain(truth)
    if word not in ("yes", "no"):
        raise UserError(f"truth '{truth}': expected yes or no")
    return word == "yes"


def _check(first: Sequence[Any], *others: Sequence[Any] | None) -> None:
    lengths = [len(first), *(len(other) for other in others if other is not None)]
    if len(set(lengths)) > 1 or not lengths[0]:
        raise UserError(f"scores need non-empty lists of equal length; these have {lengths}")


def _common(scorer: str, correct: np.ndarray, truths: Sequence[str], read: Sequence[Any]) -> dict[str, Any]:
    answer, count = Counter(truths).most_common(1)[0]
    return {
        "scorer": scorer,
        "n": len(truths),
        "accuracy": float(correct.mean()),
        "majority": count / len(truths),
        "majority_answer": answer,
        "unread": sum(value is None for value in read) / len(truths),
        "correct": tuple(bool(right) for right in correct),
    }


def _bins(
    correct: np.ndarray, values: np.ndarray, edges: Sequence[int], error: np.ndarray | None = None
) -> tuple[Bin, ...]:
    """Group items by value; bins without items are left out."""
    bins = []
    for low, high in zip((0, *edges), (*edges, None), strict=True):
        inside = (values >= low) & (values < (math.inf if high is None else high))
        if inside.any():
            own = None if error is None else error[inside]
            mae = None if own is None else float(own.mean())
            rmse = None if own is None else math.sqrt((own**2).mean())
            bins.append(Bin(low, high, int(inside.sum()), float(correct[inside].mean()), mae, rmse))
    return tuple(bins)
