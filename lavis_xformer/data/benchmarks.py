"""Benchmarks of fine-grained vision that LAVIS lacks, in its form of VQA evaluation.

GVT-bench (github.com/TencentARC/GVT, arXiv 2305.12223): ``gvt_coco_oc``, ``gvt_coco_mci``, ``gvt_vcr_oc``,
``gvt_vcr_mci``; POPE (arXiv 2305.10355): ``pope``; MMVP (arXiv 2401.06209): ``mmvp``. Question files and images
are the user's: paths stand in the YAML, nothing is downloaded. Two files of GVT-bench are called coco_oc.json,
with different questions, so every dataset tells the sha256 of its files. Scores: :mod:`lavis_xformer.scoring`.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from lavis.common.registry import registry
from omegaconf import DictConfig

from lavis_xformer.data.image_text_datasets import LocalFilesBuilder, QuestionEvalDataset
from lavis_xformer.data.records import Row, file_exists, forget_listings, read_rows, report, sha256
from lavis_xformer.errors import UserError, nearest
from lavis_xformer.paths import config_path

Sample = dict[str, Any]

# sha256 of GVTBench/*.json as published by the authors, 10,000 questions each.
GVT_SHA256 = {
    "10f2144b1d2d79d6620af0758f6d3591cb5798eba09ba6d5c0f405c0dd3fb21b": "gvt_coco_oc",
    "eedc0e47f92cb9059116bb35aff784f522bf80d7a0f9becfa3d846252596b745": "gvt_coco_mci",
    "b5d5231c20633095c879c4f31f4bc9ea621a76e2e26540f8e815004d8d23f03f": "gvt_vcr_oc",
    "0445315cc4f3c69a3005727ee44437a7652cf56196b9b96d805e7bf232c1d8de": "gvt_vcr_mci",
}
TEMPLATES = ("raw", "repaired")


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
        parse: makes our annotation of a row; knows the builder's configuration.
    """

    kind: str
    needs: tuple[str, ...]
    parse: Callable[[Row, DictConfig], Sample]


def parse_gvt(row: Row, config: DictConfig) -> Sample:
    """Read ``{image_id, text_in, text_out, n_obj_exist}``.

    In vcr_mci.json the questions tell their answer: "Does X exist in the image?" where it is yes, "Does X exis
    in the image?" where it is no. ``template: repaired`` writes "exist" in both.
    """
    question = row["text_in"]
    if config.get("template") == "repaired":
        question = question.replace(" exis in ", " exist in ")
    return {
        "image": config.image_name.format(image_id=row["image_id"]),
        "question": question,
        "answers": [row["text_out"].strip().rstrip(".").lower()],
        "image_id": str(row["image_id"]),
        "n_objects": int(row["n_obj_exist"]),
    }


def parse_pope(row: Row, config: DictConfig) -> Sample:
    """Read ``{question_id, image, text, label}``; POPE has one file for each of its three subsets."""
    return {
        "image": row["image"],
        "question": row["text"],
        "answers": [row["label"].strip().lower()],
        "image_id": row["image"],
    }


def parse_mmvp(row: Row, config: DictConfig) -> Sample:
    """Read ``Index, Question, Options, Correct Answer``; rows 1 and 2 are a pair, 3 and 4, and so on."""
    number = int(row["Index"])
    return {
        "image": config.image_name.format(image_id=number),
        "question": f"{row['Question']} {row['Options']}",
        "answers": [row["Correct Answer"].strip()],
        "image_id": str(number),
        "options": row["Options"],
        "pair": (number - 1) // 2,
    }


_GVT_KEYS = ("image_id", "text_in", "text_out", "n_obj_exist")
GVT_COUNT = Format("count", _GVT_KEYS, parse_gvt)
GVT_PRESENCE = Format("presence", _GVT_KEYS, parse_gvt)
POPE = Format("presence", ("image", "text", "label"), parse_pope)
MMVP = Format("pairs", ("Index", "Question", "Options", "Correct Answer"), parse_mmvp)


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
        annotation = [sample for file in files for sample in self.read(file, self.image_root(split))]
        for number, sample in enumerate(annotation):
            sample["question_id"] = number
        return BenchmarkDataset(
            kind=self.format.kind,
            question_files=files,
            question_sha256=[self.fingerprint(file) for file in files],
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
        logging.info("%s: %s, sha256 %s (%s)", self.name, file, digest, "published" if published else "not pinned")
        return digest

    def read(self, file: str, image_root: Path) -> list[Sample]:
        """Read one question file.

        Raises:
            UserError: it is missing, or a row lacks a key or its image.
        """
        rows = read_rows(file, rows_key=self.config.get("rows_key"))
        absent = [(number, key, row) for number, row in rows for key in self.format.needs if key not in row]
        report(file, [(number, f"no '{key}' (the row has {', '.join(row)})") for number, key, row in absent], len(rows))
        samples = [(number, self.format.parse(row, self.config)) for number, row in rows]
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
