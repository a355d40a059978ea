"""``xformer_benchmark``: score a model's answers to a benchmark's questions, and record how they were obtained.

Every metric is written together with how the model was asked (the protocol), how its answers were read (the scorer),
which questions were used (sha256) and the accuracy of always giving the most frequent answer (the majority).
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, NamedTuple

from lavis.common.registry import registry
from lavis.tasks.base_task import BaseTask
from torch.utils.data import DataLoader

from lavis_xformer import distributed
from lavis_xformer.distributed import is_main
from lavis_xformer.errors import UserError, one_of
from lavis_xformer.tasks import scoring
from lavis_xformer.tasks.base import own_batches
from lavis_xformer.tasks.protocols import (
    PROTOCOL_KEYS,
    Protocol,
    Row,
    protocol_of,
    tell_unanswered,
    write_result,
)
from lavis_xformer.tasks.rows import truth_of

logger = logging.getLogger(__name__)

#: the kinds of question that each scorer reads; None: every kind
SCORERS = {"strict": None, "gvt_official": {"count", "count_group", "presence"}, "pope_official": {"presence"}}
SHOWN = ("mae", "rmse", "f1", "yes_ratio", "pair_accuracy")  # metrics that some scores have besides accuracy


class Item(NamedTuple):
    """One question and the model's answer."""

    question_id: int
    image: str
    kind: str  #: selects the metric: count, count_group, presence or pairs; any other is scored by exact match
    group: str  #: what is scored separately: the benchmark's subset if there is one, otherwise the kind
    question: str
    truth: str  #: the annotators' most frequent answer; "" if they gave none
    answer: str | None  #: None: not asked, as its image could not be read
    row: Mapping[str, Any]  #: the annotation


SAVED = Item._fields[:-1]


@registry.register_task("xformer_benchmark")
class BenchmarkTask(BaseTask):
    """Asks the questions of one dataset: GVT-bench, POPE, MMVP, or scenes (``xformer_scenes_vqa``)."""

    CONFIG_KEYS = frozenset({"protocol", "scorer", "blind", *PROTOCOL_KEYS})

    def __init__(self, *, protocol: Protocol, config: Row, scorer: str = "strict", blind: bool = False) -> None:
        """Set how questions are asked, how counts and yes or no are read, and whether the image is withheld."""
        super().__init__()
        self.protocol, self.scorer, self.blind, self.config = protocol, scorer, blind, config
        self._dataset: Any = None

    @classmethod
    def setup_task(cls, cfg: Any) -> BenchmarkTask:
        """Read ``run.protocol``, ``run.scorer``, ``run.blind``, and the run's overrides of the protocol.

        Raises:
            UserError: there is no such protocol or scorer, or there are several datasets.
        """
        run = cfg.run_cfg
        scorer = one_of("run.scorer", run.get("scorer", "strict"), SCORERS)
        if len(names := list(cfg.datasets_cfg)) != 1:
            raise UserError(f"xformer_benchmark asks the questions of one dataset, not of {', '.join(names)}")
        return cls(protocol=protocol_of(run), scorer=scorer, blind=bool(run.get("blind", False)), config=cfg.to_dict())

    def check_split(self, name: str, dataset: Any) -> None:
        """Check the questions of a split before training.

        Raises:
            UserError: the scorer doesn't support this kind of question.
        """
        reads, kinds = SCORERS[self.scorer], {kind_of(dataset, row) for row in dataset.annotation}
        if reads is not None and not kinds <= reads:
            unread = ", ".join(sorted(kinds - reads))
            raise UserError(f"run.scorer: '{self.scorer}' can't score answers of kind {unread}; use strict")

    def before_evaluation(self, model: Any, dataset: Any, **kwargs: Any) -> None:
        """Keep the dataset, which holds the true answers."""
        super().before_evaluation(model, dataset, **kwargs)
        self._dataset = dataset

    def evaluation(self, model: Any, data_loader: DataLoader[Any], cuda_enabled: bool = True) -> dict[int, str]:
        """Return the answer to every question by its id, over all ranks."""
        ask = {key: value for key, value in asdict(self.protocol).items() if key != "name" and value is not None}
        answers: dict[int, str] = {}
        for samples, _ in own_batches(data_loader, next(model.parameters()).device):
            shown = {"text_input": samples["text_input"]} | ({} if self.blind else {"image": samples["image"]})
            said = model.predict_answers(shown, **ask)
            answers |= zip((int(number) for number in samples["question_id"].tolist()), said, strict=True)
        return {number: answer for part in distributed.collect(answers) for number, answer in part.items()}

    def after_evaluation(
        self, val_result: Mapping[int, str], split_name: str, epoch: int | str, **unused: object
    ) -> dict[str, float] | None:
        """Score the answers, write ``result/<split>_<dataset>.json`` and return the figures in percent.

        A question that was not asked, because its image could not be read, counts as wrong and unread. Questions
        without a true answer are not scored; None if none has one. The answers are written before they are scored, so
        that they are kept even if scoring fails.
        """
        found = items(self._dataset, val_result)
        self.write(split_name, found, {})
        known = [item for item in found if item.truth]
        if found and not known:
            return None
        scores = score(known, self.scorer)
        self.write(split_name, found, scores)
        return figures(scores)

    def write(self, split: str, found: Sequence[Item], scores: Mapping[str, scoring.Score]) -> None:
        """Write the result file on the main rank; without scores, log where the answers are."""
        if not is_main():
            return
        known = [item for item in found if item.truth]
        groups = grouped(known)
        right = {
            item.question_id: {"correct": correct}
            for group, entry in scores.items()
            for item, correct in zip(groups[group], entry.correct, strict=True)
        }
        path = write_result(
            self.config,
            split,
            asdict(self.protocol),
            figures(scores) if scores else {},
            scorer=self.scorer,
            blind=self.blind,
            question_sha256=getattr(self._dataset, "question_sha256", {"rendered": fingerprint(found)}),
            template=getattr(self._dataset, "template", "raw"),
            scores={group: entry.summary() for group, entry in scores.items()},
            answers=[{key: getattr(item, key) for key in SAVED} | right.get(item.question_id, {}) for item in found],
        )
        if not scores:
            logger.info("result  %s", path)
            tell_unanswered(len(found) - len(known), len(found), path)

    def table(self, values: Mapping[str, float]) -> list[tuple[str, str, str]]:
        """Return rows of accuracies, each beside the majority baseline, and of the other metrics."""
        rows = [(f"protocol {self.protocol.name}, scorer {self.scorer}", "", "majority")]
        for name, value in values.items():
            if name.startswith("accuracy"):
                rows.append((f"{name.replace('_', ' ', 1)} %", f"{value:.1f}", f"{values['majority' + name[8:]]:.1f}"))
            elif name == "unread" and value:
                rows.append(("answers not understood %", f"{value:.1f}", ""))
            elif name.startswith(SHOWN):
                rows.append((name, f"{value:.3f}", ""))
        return rows


def items(dataset: Any, answers: Mapping[int, str]) -> list[Item]:
    """Join a dataset's questions with the model's answers."""
    found = []
    for row in dataset.annotation:
        kind, number = kind_of(dataset, row), int(row["question_id"])
        group, said = row.get("subset") or kind, answers.get(number)
        found.append(Item(number, str(row["image"]), kind, group, row["question"], truth_of(row), said, row))
    return found


def kind_of(dataset: Any, row: Row) -> str:
    """Return the kind of a question: its own, the dataset's, or ``exact``."""
    return str(row.get("kind") or getattr(dataset, "kind", "exact"))


def grouped(found: Sequence[Item]) -> dict[str, list[Item]]:
    """Return the items by group, sorted by the groups' names."""
    groups: dict[str, list[Item]] = defaultdict(list)
    for item in found:
        groups[item.group].append(item)
    return dict(sorted(groups.items()))


def score(found: Sequence[Item], scorer: str) -> dict[str, scoring.Score]:
    """Score every group of questions by its kind.

    Raises:
        UserError: there are no questions, or the scorer reads no answers of this kind.
    """
    if not found:
        raise UserError("the benchmark has no questions")
    return {group: score_kind(members[0].kind, members, scorer) for group, members in grouped(found).items()}


def score_kind(kind: str, found: Sequence[Item], scorer: str) -> scoring.Score:
    """Score questions of one kind; yes or no is binned by the number of objects in the image, as in GVT-bench."""
    said, truths = [item.answer for item in found], [item.truth for item in found]
    if kind in ("count", "count_group"):
        return scoring.score_counts(said, truths, scorer=scorer)
    if kind == "presence":
        sizes = [item.row["n_objects"] for item in found] if "n_objects" in found[0].row else None
        return scoring.score_presence(said, truths, scorer=scorer, sizes=sizes)
    if kind == "pairs":
        options, pairs = ([item.row[key] for item in found] for key in ("options", "pair"))
        return scoring.score_pairs(said, truths, options=options, pairs=pairs)
    return scoring.score_exact(said, truths)


def figures(scores: Mapping[str, scoring.Score]) -> dict[str, float]:
    """Return flat metrics: accuracy and majority in percent, overall and per group; unread; and :data:`SHOWN`."""
    total = sum(entry.n for entry in scores.values())
    values = {
        name: 100 * sum(getattr(entry, name) * entry.n for entry in scores.values()) / total
        for name in ("accuracy", "majority", "unread")
    }
    for group, entry in scores.items():
        end = f"_{group}" if len(scores) > 1 else ""
        values |= {f"accuracy{end}": 100 * entry.accuracy, f"majority{end}": 100 * entry.majority}
        values |= {f"{name}{end}": getattr(entry, name) for name in SHOWN if hasattr(entry, name)}
    return {"agg_metrics": values["accuracy"], **values}


def fingerprint(found: Sequence[Item]) -> str:
    """Return the sha256 of questions that are in no file: a JSON line of image, question and truth for each."""
    lines = [json.dumps([item.image, item.question, item.truth]) for item in found]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
