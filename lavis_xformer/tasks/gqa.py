"""``xformer_gqa``: LAVIS's task for GQA, with a named protocol.

Questions, normalisation and accuracy are LAVIS's; ``result/<split>_<dataset>.json`` adds the protocol, the sha256 of
the question file, the accuracy of the majority answer and that of every structural and semantic type (arXiv
1902.09506, section 3.2).
"""

from __future__ import annotations

import logging
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lavis.common.registry import registry
from lavis.common.vqa_tools.vqa_eval import VQAEval
from lavis.tasks.vqa import GQATask

from lavis_xformer.config.files import check_file
from lavis_xformer.distributed import is_main
from lavis_xformer.errors import UserError
from lavis_xformer.files import read_json
from lavis_xformer.tasks.protocols import Row, tell_unanswered
from lavis_xformer.tasks.rows import answer_row, truth_of
from lavis_xformer.tasks.vqa import AsksByProtocol
from lavis_xformer.tasks.vqa_files import check_unique, tell_skipped

logger = logging.getLogger(__name__)

TYPES = ("structural", "semantic")


@registry.register_task("xformer_gqa")
class XFormerGQATask(AsksByProtocol, GQATask):
    """GQA: overall, by structural type (query, verify, choose, logical, compare) and by semantic type.

    The types are in GQA's own question files; if the file that LAVIS reads lacks them, ``run.question_types``
    names one that has them (``testdev_balanced_questions.json``: ``{question id: {"types": {...}}}``).
    """

    CONFIG_KEYS = AsksByProtocol.CONFIG_KEYS | {"question_types"}

    def check_split(self, name: str, dataset: Any) -> None:
        """Check, before training, the first sample of a split, its ids and the file of the questions' types.

        Raises:
            UserError: it has no true answer, not even None; two questions have the same id; the file lacks questions;
                or there is nothing to rank.
        """
        super().check_split(name, dataset)
        if isinstance(rows := getattr(dataset, "annotation", None), list):  # not scenes, which number theirs
            check_unique(row["question_id"] for row in rows)
            _check_answers(name, dataset, rows)
        if len(dataset) and {"answer", "answers"}.isdisjoint(dataset[0]):
            raise UserError(
                "run.task: xformer_gqa needs samples with the true answer, which this dataset's have not; "
                "for questions in VQA's format, such as coco_vqa, use xformer_vqa"
            )
        if self.config["run"].get("question_types"):
            self._types({str(row["question_id"]): row for row in dataset.annotation})

    def _report_metrics(self, result_file: str, split: str) -> dict[str, float] | None:
        """Score as LAVIS does, and by type; questions without a true answer are kept, and None if there are no others.

        LAVIS's own fails for want of a true answer: its class for GQA lacks ``_save_result_leaderboard``.
        """
        if not is_main():
            return {}
        results = read_json(Path(result_file))
        answers = self._answers([*results, *self._skipped(results)])
        known = [answer for answer in answers if "correct" in answer]
        figures = gqa_figures(known) if known else {}
        path = self.write(split, figures, scorer="lavis", said=answers, blind=self.blind)
        tell_unanswered(len(answers) - len(known), len(answers), path)
        return figures or None

    def _skipped(self, results: Sequence[Row]) -> list[Row]:
        """Return what LAVIS's task would have of the questions that were not asked, answered by ""."""
        asked = {str(result["question_id"]) for result in results}
        rows = [row for row in self.dataset.annotation if str(row["question_id"]) not in asked]
        tell_skipped(len(rows))
        return [{"question_id": row["question_id"], "pred_ans": "", "gt_ans": truth_of(row) or None} for row in rows]

    def _answers(self, results: Iterable[Row]) -> list[Row]:
        """Return a row per answer; ``correct`` is left out where there is no true answer, as in a test split."""
        rows = {str(row["question_id"]): row for row in self.dataset.annotation}
        kinds, tools = self._types(rows), VQAEval()
        answers = []
        for result in results:
            number, said, truth = str(result["question_id"]), result["pred_ans"], result["gt_ans"]
            if self.inference_method == "generate":
                said = tools.processDigitArticle(tools.processPunctuation(said))
            row, types = rows[number], kinds.get(number, {})
            answers.append(
                answer_row(
                    result["question_id"],
                    image=str(row["image"]),
                    kind="gqa",
                    group=types.get("structural", "all"),
                    question=row["question"],
                    truth=truth,
                    answer=result["pred_ans"],
                    correct=None if truth is None else said == truth,
                    types={name: types[name] for name in TYPES if types.get(name)},
                )
            )
        return answers

    def _types(self, rows: Mapping[str, Row]) -> dict[str, Row]:
        file = self.config["run"].get("question_types")
        if file is None:
            if not any(row.get("types") for row in rows.values()):
                logger.warning(
                    "no accuracy by type: the questions that LAVIS reads have no types; set run.question_types to "
                    'GQA\'s own file of this split (testdev_balanced_questions.json: {question id: {"types": {...}}})'
                )
            return {number: row.get("types") or {} for number, row in rows.items()}
        check_file("run.question_types", file)
        known = read_json(Path(file))
        found = {number: known[number]["types"] for number in rows if number in known}
        if len(found) < len(rows):
            raise UserError(f"run.question_types: {file} has types for only {len(found)} of {len(rows)} questions")
        return found


def gqa_figures(answers: Iterable[Row]) -> dict[str, float]:
    """Return accuracy and majority in percent and the number of questions: overall and by type.

    The majority of a type is the accuracy of its most frequent answer; overall, that of the most frequent answer of
    each question's structural type, as for :func:`vqa_majority`.
    """
    groups: dict[str, list[Row]] = defaultdict(list)
    truths: dict[str, Counter[str]] = defaultdict(Counter)
    for answer in answers:
        groups[""].append(answer)
        truths[answer["group"]][answer["truth"]] += 1
        for name, kind in answer["types"].items():
            groups[f"_{name}_{kind}"].append(answer)
    figures: dict[str, float] = {}
    for end, members in sorted(groups.items()):
        most = Counter(answer["truth"] for answer in members).most_common(1)[0][1]
        figures[f"accuracy{end}"] = 100 * sum(answer["correct"] for answer in members) / len(members)
        figures |= {f"majority{end}": 100 * most / len(members), f"n{end}": len(members)}
    figures["majority"] = 100 * sum(max(counter.values()) for counter in truths.values()) / figures["n"]
    return {"agg_metrics": figures["accuracy"], **figures}


def _check_answers(split: str, dataset: Any, rows: Sequence[Row]) -> None:
    """Check that true answers are text, which they are compared as, and that LAVIS's own dataset has one everywhere."""
    of_lavis = type(getattr(dataset, "dataset", dataset)).__module__.startswith("lavis.")  # guarded
    for number, row in enumerate(rows, start=1):
        answer = row.get("answer", row.get("answers"))
        if answer is None and of_lavis:
            raise UserError(
                f"the split '{split}': row {number} has no answer, which LAVIS's dataset can't batch; use "
                "image_question_json, whose questions may have none"
            )
        if not isinstance(answer, (str, list, tuple, type(None))):
            raise UserError(f"the split '{split}': row {number}: its answer is {answer!r}; it must be text")
