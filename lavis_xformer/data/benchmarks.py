"""Benchmarks of fine-grained vision that LAVIS lacks, in its form of VQA evaluation.

GVT-bench (github.com/TencentARC/GVT, arXiv 2305.12223): ``gvt_coco_oc``, ``gvt_coco_mci``, ``gvt_vcr_oc``,
``gvt_vcr_mci``; POPE (arXiv 2305.10355): ``pope``; MMVP (arXiv 2401.06209): ``mmvp``. Question files and images
are the user's: paths stand in the YAML, nothing is downloaded. Two files of GVT-bench are called coco_oc.json,
with different questions, so every dataset tells the sha256 of its files. Scores: :mod:`lavis_xformer.scoring`.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from lavis.common.registry import registry
from omegaconf import DictConfig

from lavis_xformer.data.image_text_datasets import LocalFilesBuilder, QuestionEvalDataset
from lavis_xformer.data.records import Row, file_exists, forget_listings, read_rows, report, sha256, strings
from lavis_xformer.errors import UserError, nearest
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
# What the truths of each kind look like, and how to say so: answers can't be scored against any other.
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
        kind: which score fits: ``count``, ``presence`` or ``pairs``.
        question_files: paths of the question files.
        question_sha256: their sha256, in the same order.
        template: of the questions, where the builder offers a choice; else ``raw``.
    """

    def __init__(
        self,
        *,
        kind: str,
        question_files: Sequence[str],
        question_sha256: Sequence[str],
        template: str = "raw",
        **shared: Any,
    ) -> None:
        super().__init__(**shared)
        self.kind = kind
        self.question_files = list(question_files)
        self.question_sha256 = list(question_sha256)
        self.template = template

    def column(self, key: str) -> list[Any]:
        """Return one value of every question, by question_id: ``column("n_objects")``."""
        return [row[key] for row in self.annotation]

    @property
    def truths(self) -> list[str]:
        """The true answer of every question, by question_id."""
        return [row["answers"][0] for row in self.annotation]


@dataclass(frozen=True)
class Format:
    """How one benchmark writes its questions.

    Attributes:
        kind: ``count``, ``presence`` or ``pairs``.
        needs: keys that every row must have.
        parse: makes our annotation of a row; knows the builder's configuration. Raises ValueError where a value
            is not what it should be.
        renamed: keys as a published file writes them, to those of ``needs``.
    """

    kind: str
    needs: tuple[str, ...]
    parse: Callable[[Row, DictConfig], Sample]
    renamed: Mapping[str, str] = field(default_factory=dict)

    def read(self, row: Row, config: DictConfig) -> Sample | str:
        """Return our annotation of a row, or what is wrong with it."""
        row = {self.renamed.get(key, key): value for key, value in row.items()}
        for key in self.needs:
            if key not in row:
                return f"no '{key}' (the row has {', '.join(row)})"
        try:
            sample = self.parse(row, config)
        except ValueError as error:
            return str(error)
        (truth,), (pattern, expected) = sample["answers"], TRUTHS[self.kind]
        return sample if re.fullmatch(pattern, truth) else f"the answer '{truth}' is not {expected}"


def _text(row: Row, key: str) -> str:
    texts = strings(row[key])
    if len(texts) != 1:
        raise ValueError(f"'{key}' holds no text")
    return texts[0]


def _whole(row: Row, key: str) -> int:
    text = _text(row, key).strip()
    if not text.isdecimal():
        raise ValueError(f"'{key}': '{text}' is no whole number")
    return int(text)


def _word(row: Row, key: str) -> str:
    return _text(row, key).strip().rstrip(".").lower()


def parse_gvt(row: Row, config: DictConfig) -> Sample:
    """Read ``{image_id, text_in, text_out, n_obj_exist}``.

    In vcr_mci.json the questions tell their answer: "Does X exist in the image?" where it is yes, "Does X exis
    in the image?" where it is no. ``template: repaired`` writes "exist" in both.
    """
    question = _text(row, "text_in")
    if config.get("template") == "repaired":
        question = question.replace(" exis in ", " exist in ")
    numbered = "{image_id:" in config.image_name  # with zeros before it
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
    number, options = _whole(row, "Index"), _text(row, "Options")
    return {
        "image": config.image_name.format(image_id=number),
        "question": f"{_text(row, 'Question')} {options}",
        "answers": [_text(row, "Correct Answer").strip()],
        "image_id": str(number),
        "options": options,
        "pair": (number - 1) // 2,
    }


_GVT_KEYS = ("image_id", "text_in", "text_out", "n_obj_exist")
GVT_COUNT = Format("count", _GVT_KEYS, parse_gvt)
GVT_PRESENCE = Format("presence", _GVT_KEYS, parse_gvt)
POPE = Format("presence", ("image", "text", "label"), parse_pope)
# The published header has a small L for the I of Index.
MMVP = Format("pairs", ("Index", "Question", "Options", "Correct Answer"), parse_mmvp, {"lndex": "Index"})


class BenchmarkBuilder(LocalFilesBuilder):
    """Builds one benchmark from the user's copies of its question files and images."""

    format: ClassVar[Format]

    def build_split(self, split: str) -> BenchmarkDataset:
        """Read, check and fingerprint the question files.

        Raises:
            UserError: a file is missing or is another benchmark's, a row is wrong, an image is missing, or
                the split is ``train``.
        """
        if split == "train":
            raise UserError(f"{self.name} is a benchmark: name its files under splits.test or splits.val")
        template = self.config.get("template", "raw")
        if template not in TEMPLATES:
            raise UserError(f"datasets.{self.name}.template: '{template}': {nearest(template, TEMPLATES)}")
        files = self.files(split)
        tables = [read_rows(file, rows_key=self.config.get("rows_key")) for file in files]
        digests = [self.fingerprint(file) for file in files]  # another benchmark's rows are not wrong one by one
        root = self.image_root(split)
        annotation = [s for file, rows in zip(files, tables, strict=True) for s in self.samples(file, rows, root)]
        for number, sample in enumerate(annotation):
            sample["question_id"] = number
        return BenchmarkDataset(
            kind=self.format.kind,
            question_files=files,
            question_sha256=digests,
            template=template,
            annotation=annotation,
            **self.shared(split),
        )

    def fingerprint(self, file: str) -> str:
        """Return a question file's sha256 and log it; refuse another benchmark's published file."""
        digest = sha256(file)
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
        read = [(number, self.format.read(row, self.config)) for number, row in rows]
        report(file, [(number, what) for number, what in read if isinstance(what, str)], len(rows))
        samples = [(number, sample) for number, sample in read if not isinstance(sample, str)]
        if self.config.get("check_files", True):
            if not image_root.is_dir():
                raise UserError(f"{image_root}: no such image folder (datasets.{self.name}.image_root)")
            forget_listings()
            paths = [(number, os.path.join(image_root, sample["image"])) for number, sample in samples]
            report(file, [(n, f"no image file {path}") for n, path in paths if not file_exists(path)], len(rows))
        return [{**sample, "subset": Path(file).stem} for _, sample in samples]


@registry.register_builder("gvt_coco_oc")
class GVTCocoCountBuilder(BenchmarkBuilder):
    """GVT-bench, counting objects in COCO's val2017."""

    format = GVT_COUNT
    DATASET_CONFIG_DICT: ClassVar[dict[str, str]] = {"default": config_path("datasets/gvt_coco_oc.yaml")}


@registry.register_builder("gvt_coco_mci")
class GVTCocoPresenceBuilder(BenchmarkBuilder):
    """GVT-bench, "Does X exist in the image?" in COCO's val2017."""

    format = GVT_PRESENCE
    DATASET_CONFIG_DICT: ClassVar[dict[str, str]] = {"default": config_path("datasets/gvt_coco_mci.yaml")}


@registry.register_builder("gvt_vcr_oc")
class GVTVcrCountBuilder(BenchmarkBuilder):
    """GVT-bench, counting objects in VCR."""

    format = GVT_COUNT
    DATASET_CONFIG_DICT: ClassVar[dict[str, str]] = {"default": config_path("datasets/gvt_vcr_oc.yaml")}


@registry.register_builder("gvt_vcr_mci")
class GVTVcrPresenceBuilder(BenchmarkBuilder):
    """GVT-bench, "Does X exist in the image?" in VCR; raw or with its leak repaired."""

    format = GVT_PRESENCE
    DATASET_CONFIG_DICT: ClassVar[dict[str, str]] = {"default": config_path("datasets/gvt_vcr_mci.yaml")}


@registry.register_builder("pope")
class PopeBuilder(BenchmarkBuilder):
    """POPE: is an object said to be there that is not (random, popular, adversarial)?"""

    format = POPE
    DATASET_CONFIG_DICT: ClassVar[dict[str, str]] = {"default": config_path("datasets/pope.yaml")}


@registry.register_builder("mmvp")
class MmvpBuilder(BenchmarkBuilder):
    """MMVP: pairs of images that CLIP takes for one."""

    format = MMVP
    DATASET_CONFIG_DICT: ClassVar[dict[str, str]] = {"default": config_path("datasets/mmvp.yaml")}
