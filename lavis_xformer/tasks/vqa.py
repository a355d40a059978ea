"""``xformer_vqa``: LAVIS's task for VQAv2 and OK-VQA, with a named protocol.

Questions, answer normalisation and accuracies are LAVIS's (``run.scorer: official`` uses VQA's own), and so are its
result files; ``result/<split>_<dataset>.json`` adds the protocol, the sha256 of the question file and the accuracy of
the majority answer.
"""

from __future__ import annotations

import logging
from collections import Counter, defaultdict
from collections.abc import Sequence
from statistics import fmean
from typing import Any

import torch
from lavis.common.registry import registry
from lavis.common.vqa_tools.vqa import VQA
from lavis.common.vqa_tools.vqa_eval import VQAEval
from lavis.tasks.vqa import VQATask

from lavis_xformer.distributed import is_main
from lavis_xformer.errors import UserError, one_of
from lavis_xformer.tasks.protocols import Row, WithProtocol
from lavis_xformer.tasks.rows import answer_row
from lavis_xformer.tasks.vqa_files import answer_all, check_storage, check_vqa

logger = logging.getLogger(__name__)

METHODS = ("generate", "rank")  # of answering


class AsksByProtocol(WithProtocol):
    """Asks questions by protocol; ``run.blind`` asks the language model alone, without the image."""

    CONFIG_KEYS = WithProtocol.CONFIG_KEYS | {"blind", "inference_method", "num_ans_candidates"}
    dataset: Any
    blind: bool
    inference_method: str
    answer_list: Sequence[str] | None

    @classmethod
    def setup_task(cls, cfg: Any) -> Any:
        """Read LAVIS's settings, ``run.protocol`` and ``run.blind``.

        Raises:
            UserError: there is no such protocol, or ``run.inference_method``.
        """
        task = super().setup_task(cfg)
        one_of("run.inference_method", task.inference_method, METHODS)
        task.blind = bool(cfg.run_cfg.get("blind", False))
        return task

    def check_split(self, name: str, dataset: Any) -> None:
        """Check a split before training.

        Raises:
            UserError: it has no candidates to rank.
        """
        if self.inference_method == "rank" and not self.answer_list:  # LAVIS's build_datasets reads it
            raise UserError(
                "run.inference_method: 'rank', LAVIS's default, chooses from a dataset's answer_list, and there is "
                "none; set it to generate"
            )

    def valid_step(self, model: Any, samples: Row) -> list[Row]:
        """Ask as LAVIS does, without the image if ``run.blind`` is set; ids may be texts, as GQA's own are."""
        shown = {key: value for key, value in samples.items() if not (self.blind and key == "image")}
        ids = samples["question_id"]
        if isinstance(ids, torch.Tensor):
            return super().valid_step(model, shown)  # type: ignore[misc]
        rows = super().valid_step(model, {**shown, "question_id": torch.arange(len(ids))})  # type: ignore[misc]
        return [{**row, "question_id": ids[row["question_id"]]} for row in rows]

    def before_evaluation(self, model: Any, dataset: Any, **kwargs: Any) -> None:
        """Keep the dataset."""
        super().before_evaluation(model, dataset, **kwargs)  # type: ignore[misc]
        self.dataset = dataset

    def evaluation(self, model: Any, data_loader: Any, **options: Any) -> list[Row]:
        """Ask all questions with the protocol's length penalty set on the model: LAVIS's tasks never pass one."""
        own = getattr(model, "vqa_length_penalty", None)  # LAVIS's models have none
        asked = self.protocol.length_penalty
        model.vqa_length_penalty = own if asked is None else asked
        try:
            return super().evaluation(model, data_loader, **options)  # type: ignore[misc]
        finally:
            model.vqa_length_penalty = own


class OfficialVQAEval(VQAEval):
    """Accuracies as in VQA's own evaluation (github.com/GT-Vision-Lab/VQA).

    The answer and the ten truths are normalised alike, but only if the ten differ. If they are all equal, the answer
    must match exactly, including case. LAVIS's older version always normalises the answer in full, but only the
    punctuation of truths that differ.
    """

    def evaluate(self) -> None:
        """Set ``accuracy`` and ``evalQA``; the truths keep their normalised form, as in LAVIS."""
        types: dict[str, dict[str, list[float]]] = {
            "question_type": defaultdict(list),
            "answer_type": defaultdict(list),
        }
        every = []
        for number in self.params["question_id"]:
            annotation = self.vqa.qa[number]
            said, *given = map(_plain, (self.vqaRes.qa[number]["answer"], *_given(annotation)))
            if len(set(given)) > 1:
                said, *given = (self.processDigitArticle(self.processPunctuation(text)) for text in (said, *given))
            for answer, text in zip(annotation["answers"], given, strict=True):
                answer["answer"] = text
            accuracy = agreement(said, given)
            self.setEvalQA(number, accuracy)
            every.append(accuracy)
            for name, members in types.items():
                members[annotation[name]].append(accuracy)
        self.setAccuracy(every, *types.values())


#: evaluations of VQA's answers, by ``run.scorer``
SCORERS = {"lavis": VQAEval, "official": OfficialVQAEval}


@registry.register_task("xformer_vqa")
class XFormerVQATask(AsksByProtocol, VQATask):
    """VQAv2 and OK-VQA: accuracy overall and by answer type (such as ``number``), by ``run.scorer``."""

    CONFIG_KEYS = AsksByProtocol.CONFIG_KEYS | {"scorer"}
    scorer: str

    @classmethod
    def setup_task(cls, cfg: Any) -> XFormerVQATask:
        """Read LAVIS's settings, the protocol and ``run.scorer``.

        Raises:
            UserError: there is no such protocol or scorer, or a dataset of LAVIS's lacks one of its files.
        """
        scorer = one_of("run.scorer", cfg.run_cfg.get("scorer", "lavis"), SCORERS)
        task: XFormerVQATask = super().setup_task(cfg)
        task.scorer = scorer
        check_storage(task.config.get("datasets", {}))
        return task

    def check_split(self, name: str, dataset: Any) -> None:
        """Check, before training, the files that the evaluation of a split reads.

        Raises:
            UserError: it has no files in VQA's format, which the scorers read, or they lack a key; or it has nothing
                to rank.
        """
        super().check_split(name, dataset)
        check_vqa(dataset)

    def _report_metrics(self, result_file: str, split: str) -> dict[str, float] | None:
        """Score with LAVIS's VQA tools, and keep every question's accuracy; None for a split without true answers."""
        if not is_main():
            return {}
        if split not in self.ques_files:
            logger.info("%s has no true answers; what was answered is in %s", split, result_file)
            return None
        answer_all(result_file, self.ques_files[split])
        questions = VQA(self.anno_files[split], self.ques_files[split])
        said = questions.loadRes(resFile=result_file, quesFile=self.ques_files[split])
        scorer = SCORERS[self.scorer](questions, said, n=2)
        scorer.evaluate()
        accuracy = scorer.accuracy
        figures = {"agg_metrics": accuracy["overall"], "accuracy": accuracy["overall"]}
        figures |= {f"accuracy_{kind}": value for kind, value in accuracy["perAnswerType"].items()}
        annotations = list(questions.qa.values())
        each = vqa_guesses(annotations)
        figures |= vqa_majority(annotations, each)
        guesses = dict(zip(questions.qa, each, strict=True))
        answers = [
            answer_row(
                number,
                image=str(questions.qa[number]["image_id"]),
                kind=questions.qa[number]["answer_type"],
                question=questions.qqa[number]["question"],
                truth=Counter(_given(questions.qa[number])).most_common(1)[0][0],
                answer=said.qa[number]["answer"],
                correct=scorer.evalQA[number] / 100,  # 0 to 1, see :func:`agreement`
                guess=guesses[number],
            )
            for number in scorer.evalQA
        ]
        self.write(split, figures, scorer=self.scorer, said=answers, blind=self.blind)
        return figures


def vqa_majority(annotations: Sequence[Row], guesses: Sequence[float]) -> dict[str, float]:
    """Return the accuracy of the most frequent answer of each answer type, in percent: overall and by type.

    Args:
        annotations: of VQAv2.
        guesses: from :func:`vqa_guesses`.
    """
    scores: dict[str, list[float]] = defaultdict(list)
    for annotation, guess in zip(annotations, guesses, strict=True):
        scores[f"majority_{annotation['answer_type']}"].append(100 * guess)
    every = [score for members in scores.values() for score in members]
    return {"majority": fmean(every), **{name: fmean(members) for name, members in scores.items()}}


def vqa_guesses(annotations: Sequence[Row]) -> list[float]:
    """Return, for every question, the accuracy (0 to 1) of the most frequent answer of its answer type.

    Args:
        annotations: of VQAv2, ten answers each, normalised by the scorer.
    """
    answers: dict[str, Counter[str]] = defaultdict(Counter)
    for annotation in annotations:
        answers[annotation["answer_type"]][Counter(_given(annotation)).most_common(1)[0][0]] += 1
    most = {kind: counter.most_common(1)[0][0] for kind, counter in answers.items()}
    return [agreement(most[annotation["answer_type"]], _given(annotation)) for annotation in annotations]


def agreement(said: str, given: Sequence[str]) -> float:
    """Return an answer's VQA accuracy: the mean over all sets of nine of the ten given answers.

    Each of the nine that is equal counts a third, up to 1 in total (arXiv 1505.00468, section 3).
    """
    return fmean(min(1, (given.count(said) - (left_out == said)) / 3) for left_out in given)


def _given(annotation: Row) -> list[str]:
    return [answer["answer"] for answer in annotation["answers"]]


def _plain(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()
