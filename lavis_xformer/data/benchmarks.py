"""Benchmarks of fine-grained vision that LAVIS lacks, in the form of its VQA evaluation.

GVT-bench (github.com/TencentARC/GVT, arXiv 2305.12223): ``gvt_coco_oc``, ``gvt_coco_mci``, ``gvt_vcr_oc``,
``gvt_vcr_mci``; POPE (arXiv 2305.10355): ``pope``; MMVP (arXiv 2401.06209): ``mmvp``. Question files and images
are the user's: the YAML gives their paths, nothing is downloaded. GVT-bench has two files named coco_oc.json, with
different questions, so every dataset reports the sha256 of its files. Scores: :mod:`lavis_xformer.tasks.scoring`.
"""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lavis.common.registry import registry
from omegaconf import DictConfig

from lavis_xformer.data.image_text_datasets import LocalFilesBuilder, QuestionEvalDataset
from lavis_xformer.data.records import Row, absent_images, expand, read_rows, refuse_wrong_rows, strings
from lavis_xformer.errors import UserError, one_of
from lavis_xformer.files import sha256
from lavis_xformer.paths import config_path

logger = logging.getLogger(__name__)

Sample = dict[str, Any]

# sha256 of GVTBench/*.json as published by the authors, 10,000 questions each.
GVT_SHA256 = {
    "10f2144b1d2d79d6620af0758f6d3591cb5798eba09ba6d5c0f405c0dd3fb21b": "gvt_coco_oc",
    "eedc0e47f92cb9059116bb35aff784f522bf80d7a0f9becfa3d846252596b745": "gvt_coco_mci",
    "b5d5231c20633095c879c4f31f4bc9ea621a76e2e26540f8e815004d8d23f03f": "gvt_vcr_oc",
    "0445315cc4f3c69a3005727ee44437a7652cf56196b9b96d805e7bf232c1d8de": "gvt_vcr_mci",
}
TEMPLATES = ("raw", "repaired")
# The form of the true answers of each kind, as a pattern and in words: no others can be scored.
TRUTHS = {
    "count": (r"\d+", "a whole number"),
    "presence": ("yes|no", "yes or no"),
    "pairs": (r"\(?[A-Za-z]\)?\.?", "a letter, as (a)"),
}


class BenchmarkDataset(QuestionEvalDataset):
    """Questions of a benchmark; samples as of :class:`QuestionEvalDataset`, question_id = position.

    Attributes:
        annotation: one dict per question: image, question, answers (one: the truth), question_id, and what
            the benchmark adds for its scores: n_objects, image_id, subset, options, pair.
        kind: which score applies: ``count``, ``presence`` or ``pairs``.
        question_sha256: the sha256 of each question file, by its path.
        template: of the questions, where the builder offers a choice; else ``raw``.
    """

    def __init__(self, *, kind: str, question_sha256: dict[str, str], template: str, **shared: Any) -> None:
        super().__init__(**shared)
        self.kind, self.template = kind, template
        self.question_sha256 = question_sha256


def _text(row: Row, key: str) -> str:
    if key not in row:
        raise ValueError(f"no '{key}' (the row has {', '.join(row)})")
    texts = strings(row[key])
    if len(texts) != 1:
        raise ValueError(f"'{key}' holds no text")
    return texts[0]


def _whole(row: Row, key: str) -> int:
    text = _text(row, key).strip()
    if not text.isdecimal():
        raise ValueError(f"'{key}': '{text}' is not a whole number")
    return int(text)


def _word(row: Row, key: str) -> str:
    return _text(row, key).strip().rstrip(".").lower()


def parse_gvt(row: Row, config: DictConfig) -> Sample:
    """Read ``{image_id, text_in, text_out, n_obj_exist}``.

    In vcr_mci.json the questions give away their answer: "Does X exist in the image?" if it is yes, "Does X exis
    in the image?" if it is no. ``template: repaired`` writes "exist" in both.
    """
    question = _text(row, "text_in")
    if config.get("template") == "repaired":
        question = question.replace(" exis in ", " exist in ")
    numbered = "{image_id:" in config.image_name  # zero-padded
    return {
        "image": config.image_name.format(image_id=(_whole if numbered else _text)(row, "image_id")),
        "question": question,
        "answers": [_word(row, "text_out")],
        "image_id": str(row["image_id"]),
        "n_objects": _whole(row, "n_obj_exist"),
    }


def parse_pope(row: Row, config: DictConfig) -> Sample:
    """Read ``{question_id, image, text, label}``; POPE has one file for each of its three subsets."""
    image = _text(row, "image")
    return {"image": image, "question": _text(row, "text"), "answers": [_word(row, "label")], "image_id": image}


def parse_mmvp(row: Row, config: DictConfig) -> Sample:
    """Read ``Index, Question, Options, Correct Answer``; rows 1 and 2 are a pair, 3 and 4, and so on."""
    index = "lndex" if "lndex" in row else "Index"  # the published header has a small L for the I
    number, options = _whole(row, index), _text(row, "Options")
    return {
        "image": config.image_name.format(image_id=number),
        "question": f"{_text(row, 'Question')} {options}",
        "answers": [_text(row, "Correct Answer").strip()],
        "image_id": str(number),
        "options": options,
        "pair": (number - 1) // 2,
    }


# By builder name: which score applies (see TRUTHS), and the function that reads a row by the builder's configuration.
BENCHMARKS: dict[str, tuple[str, Callable[[Row, DictConfig], Sample]]] = {
    "gvt_coco_oc": ("count", parse_gvt),
    "gvt_coco_mci": ("presence", parse_gvt),
    "gvt_vcr_oc": ("count", parse_gvt),
    "gvt_vcr_mci": ("presence", parse_gvt),
    "pope": ("presence", parse_pope),
    "mmvp": ("pairs", parse_mmvp),
}


class BenchmarkBuilder(LocalFilesBuilder):
    """Builds one of :data:`BENCHMARKS` from the user's copies of its question files and images."""

    def build_split(self, split: str) -> BenchmarkDataset:
        """Read, check and fingerprint the question files.

        Raises:
            UserError: a file is missing or is another benchmark's, a row is wrong, an image is missing, or
                the split is ``train``.
        """
        if split == "train":
            raise UserError(f"{self.name} is a benchmark: name its files under splits.test or splits.val")
        template = one_of(f"datasets.{self.name}.template", self.config.get("template", "raw"), TEMPLATES)
        files = self.files(split)
        if again := next((f for f, n in Counter(Path(file).stem for file in files).items() if n > 1), None):
            raise UserError(
                f"datasets.{self.name}: two files are called {again}, which names their results; rename one"
            )
        tables = [read_rows(file, rows_key=self.config.get("rows_key")) for file in files]
        digests = {file: self.fingerprint(file) for file in files}  # first: another benchmark's file is rejected whole
        root = self.image_root(split)
        annotation = [s for file, rows in zip(files, tables, strict=True) for s in self.samples(file, rows, root)]
        for number, sample in enumerate(annotation):
            sample["question_id"] = number
        pairs = Counter((sample["subset"], sample["pair"]) for sample in annotation if "pair" in sample)
        if odd := next((pair for pair, count in pairs.items() if count != 2), None):
            first = 2 * odd[1] + 1
            raise UserError(
                f"datasets.{self.name}: {odd[0]}: rows {first} and {first + 1}, a pair, are not there once each"
            )
        return BenchmarkDataset(
            kind=BENCHMARKS[self.name][0],
            question_sha256=digests,
            template=template,
            annotation=annotation,
            **self.shared(split),
        )

    def fingerprint(self, file: str) -> str:
        """Return a question file's sha256 and log it; reject another benchmark's published file."""
        digest = sha256(expand(file))
        published = GVT_SHA256.get(digest)
        if published not in (None, self.name):
            raise UserError(f"datasets.{self.name}: {file} is the question file of {published}")
        logger.info("%s: %s, sha256 %s (%s)", self.name, file, digest, "published" if published else "not pinned")
        return digest

    def samples(self, file: str, rows: Sequence[tuple[int, Row]], image_root: Path) -> list[Sample]:
        """Check and annotate the rows of one question file.

        Raises:
            UserError: a row lacks a key or its image, or could not be scored.
        """
        read = [(number, self.read(row)) for number, row in rows]
        refuse_wrong_rows(file, [(number, what) for number, what in read if isinstance(what, str)], len(rows))
        samples = [(number, sample) for number, sample in read if not isinstance(sample, str)]
        if self.config.get("check_files", True):
            absent = absent_images(image_root, [(number, sample["image"]) for number, sample in samples])
            refuse_wrong_rows(file, list(absent.items()), len(rows))
        return [{**sample, "subset": Path(file).stem} for _, sample in samples]

    def read(self, row: Row) -> Sample | str:
        """Return our annotation of a row, or what is wrong with it.

        Raises:
            UserError: ``image_name`` has a placeholder other than that of the image's id.
        """
        kind, parse = BENCHMARKS[self.name]
        try:
            sample = parse(row, self.config)
        except ValueError as error:
            return str(error)
        except LookupError as error:
            key = f"datasets.{self.name}.image_name"
            raise UserError(f"{key}: '{self.config.image_name}' must have no placeholder but {{image_id}}") from error
        (truth,), (pattern, expected) = sample["answers"], TRUTHS[kind]
        return sample if re.fullmatch(pattern, truth) else f"the answer '{truth}' is not {expected}"


for _name in BENCHMARKS:
    _configs = {"DATASET_CONFIG_DICT": {"default": config_path(f"datasets/{_name}.yaml")}}
    registry.register_builder(_name)(type(_name, (BenchmarkBuilder,), _configs))
