"""``xformer_stage2``: training with a language model, evaluated by captions and answers on held-out images.

Captions and questions may be trained on together: list both datasets. B: samples of a batch, A: answers of a batch.
"""

from __future__ import annotations

import logging
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from statistics import fmean
from typing import Any, NamedTuple

from lavis.common.registry import registry
from lavis.datasets.datasets.vqa_datasets import VQADataset
from torch.utils.data import ConcatDataset, IterableDataset

from lavis_xformer.engine.batches import image_ids
from lavis_xformer.engine.sampling import members
from lavis_xformer.errors import UserError
from lavis_xformer.tasks.base import NO_CAPTIONS, NamedLossTask, Samples
from lavis_xformer.tasks.rows import answer_row

logger = logging.getLogger(__name__)

CAPTION = "caption"
SHOWN = 4  # how many of the first and of the last texts of an evaluation are logged


class Said(NamedTuple):
    """One generated text."""

    kind: str  #: "caption", or the kind of the question
    text: str
    references: list[str]
    question: str = ""
    number: int | None = None  #: the question's own, if the dataset has one
    image: Any = None  #: the image's id, if the dataset has one


@registry.register_task("xformer_stage2")
class Stage2Task(NamedLossTask):
    """Language modelling on captions, on answers, or on both; evaluated by the generated texts.

    Captions are scored by word overlap with their references (F1), against the baseline of another image's caption;
    answers by exact match, against the most frequent answer of their kind. ``agg_metrics`` is the mean of both.
    """

    CONFIG_KEYS = frozenset({"num_beams", "max_len", "max_answer_len"})

    def __init__(self, *, num_beams: int = 1, max_len: int = 30, max_answer_len: int = 10) -> None:
        """Set the number of beams (1 is greedy) and the maximum tokens of a caption and of an answer."""
        super().__init__()
        self.num_beams = num_beams
        self.max_len = max_len
        self.max_answer_len = max_answer_len
        self._said: list[Said] = []

    @classmethod
    def setup_task(cls, cfg: Any) -> Stage2Task:
        """Read ``run.num_beams``, ``run.max_len`` and ``run.max_answer_len``."""
        return cls(**{key: cfg.run_cfg[key] for key in cls.CONFIG_KEYS if cfg.run_cfg.get(key) is not None})

    def build_datasets(self, cfg: Any) -> dict[str, Any]:
        """Build the datasets; if some have questions and some don't, join them per split.

        Raises:
            UserError: a dataset is empty, or one that would have to be joined is a stream of shards.
        """
        datasets = super().build_datasets(cfg)
        splits: dict[str, list[Any]] = defaultdict(list)
        for dataset in datasets.values():
            for split, part in dataset.items():
                splits[split].append(part)
        if all(len({asks(part) for part in parts}) == 1 for parts in splits.values()):
            return datasets
        if any(isinstance(part, IterableDataset) for parts in splits.values() for part in parts):
            raise UserError(f"{' and '.join(datasets)}: shards can't be joined with questions; train on one of them")
        return {"captions_and_questions": {split: CaptionsAndQuestions(parts) for split, parts in splits.items()}}

    def check_split(self, name: str, dataset: Any) -> None:
        """Check the first sample of a split, and all answers of own files, before training.

        Raises:
            UserError: it has neither caption nor question, or a question without an answer.
        """
        super().check_split(name, dataset)
        sample = dataset[0] if len(dataset) else {}
        if "question_id" in sample and not (sample.get("answer") or sample.get("answers")):
            raise UserError(f"the split '{name}' has questions without answers, which can't be scored; leave it out")
        for part in members(dataset):
            if lacking := getattr(part, "unanswered", []):
                raise UserError(
                    f"the split '{name}' has {len(lacking)} questions without answers, the first at position "
                    f"{lacking[0]}, which can't be scored; leave them out"
                )

    def before_evaluation(self, model: Any, dataset: Any, **kwargs: Any) -> None:
        """Clear the texts of an earlier split."""
        super().before_evaluation(model, dataset, **kwargs)
        self._said = []

    def observe(self, model: Any, samples: Samples, fresh: Sequence[bool]) -> None:
        """Generate captions, continuations of prompts (where there is ``text_output``) and answers."""
        questions, references = samples["text_input"], references_of(samples)
        continued = "text_output" in samples
        asked = [i for i, new in enumerate(fresh) if new and "answer" in samples and questions[i] and not continued]
        shown = [i for i, new in enumerate(fresh) if new and i not in asked]
        texts: dict[int, str] = {}
        if shown:
            prompts = {"prompt": [questions[i] for i in shown]} if continued else {}
            captions = model.generate(
                {"image": samples["image"][shown], **prompts}, num_beams=self.num_beams, max_length=self.max_len
            )
            texts |= zip(shown, captions, strict=True)
        if asked:
            answers = model.predict_answers(
                {"image": samples["image"][asked], "text_input": [questions[i] for i in asked]},
                num_beams=self.num_beams,
                max_len=self.max_answer_len,
            )
            texts |= zip(asked, answers, strict=True)
        kinds, ids = samples.get("kind", ["answer"] * len(questions)), samples.get("question_id")
        images = image_ids(samples) or [None] * len(questions)
        for i, text in sorted(texts.items()):  # in the split's order, which figures() restores over all ranks
            question, number = (questions[i], None if ids is None else int(ids[i])) if i in asked else ("", None)
            kind = kinds[i] if i in asked else CAPTION
            self._said.append(Said(kind, text, references[i], question, number, images[i]))

    def figures(self) -> dict[str, float]:
        """Return the scores of the generated texts, over all ranks."""
        turns = zip_longest(*self.collect(self._said))  # rank r's i-th text is number i * ranks + r
        said = [entry for turn in turns for entry in turn if entry is not None]
        self._said = []
        for entry in said[:SHOWN] + said[SHOWN:][-SHOWN:]:
            logger.info("%s: said '%s', reference '%s'", entry.kind, entry.text, entry.references[0])
        captions = score_captions([entry for entry in said if entry.kind == CAPTION])
        answers = score_answers([entry for entry in said if entry.kind != CAPTION])
        self.scores = captions + answers
        figures = answer_figures(answers)
        if captions:
            figures["caption_f1"] = 100 * fmean(row["correct"] for row in captions)
            figures["chance_caption_f1"] = 100 * fmean(row["guess"] for row in captions)
        return figures

    def goal(self, figures: Mapping[str, float]) -> float:
        """Return the mean of the captions' F1 and the answers' accuracy, in percent."""
        return fmean(figures[name] for name in ("caption_f1", "answers") if name in figures)

    def table(self, figures: Mapping[str, float]) -> list[tuple[str, str, str]]:
        """Return the loss, and each score beside its baseline."""
        rows = super().table(figures)
        if "caption_f1" in figures:
            rows.append(("caption words F1 %", f"{figures['caption_f1']:.1f}", f"{figures['chance_caption_f1']:.1f}"))
        for name in figures:
            if name.startswith("answers"):
                title = name.replace("_", " ") + " %"
                rows.append((title, f"{figures[name]:.1f}", f"{figures[f'majority_{name}']:.1f}"))
        return rows


class CaptionsAndQuestions(ConcatDataset[Samples]):
    """Caption and question datasets joined as questions: a caption is the answer to an empty question."""

    def __getitem__(self, index: int) -> Samples:
        """Return image, image_id (or path, or None), text_input (the question or ""), answers, weights and kind.

        Raises:
            UserError: a question without an answer, or neither question nor caption.
        """
        sample = super().__getitem__(index)
        if "text_input" not in sample:
            raise UserError(NO_CAPTIONS.format("one of the joined datasets"))
        shown = {"image": sample["image"], "image_id": sample.get("image_path", sample.get("image_id"))}
        answer = sample.get("answer")  # evaluation datasets give one, training datasets ``answers``
        if answers := sample.get("answers", [answer] if answer else None):
            asked = {"answers": answers, "weights": sample.get("weights", [1.0]), "kind": sample.get("kind", "answer")}
            return {**shown, "text_input": sample["text_input"], **asked}
        if "question_id" in sample:
            raise UserError("a dataset has questions without answers, which can't be scored; leave its split out")
        captions = sample.get("captions", [sample["text_input"]])
        weights = [1 / len(captions)] * len(captions)
        return {**shown, "text_input": "", "answers": captions, "weights": weights, "kind": CAPTION}

    def collater(self, samples: Sequence[Samples]) -> Samples:
        """Join samples into LAVIS's VQA batch: ``answer``, ``weight`` (A,), ``n_answers`` (B,); kinds and image ids."""
        lists = {key: [sample[key] for sample in samples] for key in ("kind", "image_id")}
        return {**VQADataset.collater(self, samples), **lists}


def asks(dataset: Any) -> bool:
    """Whether a dataset has questions with answers, judged by its first annotation, without opening an image.

    A stream of shards has no annotations and counts as captions.

    Raises:
        UserError: the dataset is empty.
    """
    if isinstance(dataset, IterableDataset):
        return False
    if not len(dataset):
        raise UserError(f"{type(dataset).__name__} has no samples")
    row = dataset.annotation[0]
    return "answer" in row or "answers" in row


def references_of(samples: Samples) -> list[list[str]]:
    """Reference captions, answers, or continuations (``text_output``) of a batch, a list for each image."""
    if "text_output" in samples or "answer" not in samples:
        single = [[text] for text in samples.get("text_output") or samples["text_input"]]
        return single if "text_output" in samples else samples.get("captions", single)
    counts = samples.get("n_answers")
    counts = [1] * len(samples["answer"]) if counts is None else counts.tolist()
    answers = iter(samples["answer"])
    return [[next(answers) for _ in range(count)] for count in counts]


def score_captions(said: Sequence[Said]) -> list[Samples]:
    """Return a row per caption: its word F1 with the best reference; as ``guess``, that of the next image's caption."""
    rows = []
    for number, (entry, other) in enumerate(zip(said, [*said[1:], *said[:1]], strict=True)):
        own, wrong = (max(word_f1(one.text, text) for text in entry.references) for one in (entry, other))
        rows.append(
            answer_row(
                number,
                image=str(number if entry.image is None else entry.image),
                kind=CAPTION,
                group="caption_f1",
                correct=own,
                guess=wrong,
                truth=entry.references[0],
                answer=entry.text,
            )
        )
    return rows


def score_answers(said: Sequence[Said]) -> list[Samples]:
    """Return a row per answer: whether it is one of its references; as ``guess``, whether its kind's commonest one is.

    The group is the name of the figure: ``answers_<kind>``, or ``answers`` if there is one kind only.
    """
    accepted = [list(dict.fromkeys(reference.strip().lower() for reference in entry.references)) for entry in said]
    kinds: dict[str, Counter[str]] = defaultdict(Counter)
    for entry, texts in zip(said, accepted, strict=True):
        kinds[entry.kind].update(texts)
    most = {kind: counter.most_common(1)[0][0] for kind, counter in kinds.items()}
    rows = []
    for position, (entry, texts) in enumerate(zip(said, accepted, strict=True)):
        rows.append(
            answer_row(
                position if entry.number is None else entry.number,
                image=str(position if entry.image is None else entry.image),
                kind=entry.kind,
                group=f"answers_{entry.kind}" if len(kinds) > 1 else "answers",
                question=entry.question,
                correct=float(entry.text.strip().lower() in texts),
                guess=float(most[entry.kind] in texts),
                truth=entry.references[0],
                references=entry.references,
                answer=entry.text,
            )
        )
    return rows


def answer_figures(rows: Sequence[Samples]) -> dict[str, float]:
    """Return ``answers``, ``answers_<kind>`` if there are several kinds, and ``majority_`` of each, in percent."""
    kinds = sorted({row["group"] for row in rows} - {"answers"})
    figures: dict[str, float] = {}
    for name in ["answers", *kinds] if rows else []:
        members = [row for row in rows if name in ("answers", row["group"])]
        figures[name] = 100 * fmean(row["correct"] for row in members)
        figures[f"majority_{name}"] = 100 * fmean(row["guess"] for row in members)
    return figures


def word_f1(text: str, reference: str) -> float:
    """Harmonic mean of word precision and recall, with repeated words counted, in [0, 1]."""
    words, wanted = (Counter(part.lower().replace(",", " ").split()) for part in (text, reference))
    common = (words & wanted).total()
    return 2 * common / max(1, words.total() + wanted.total())
