"""A user's own images and texts as LAVIS datasets, configured from YAML alone.

``image_text_json`` gives pairs for stages 1 and 2, captioning and retrieval;
``image_question_json`` gives questions for VQA, in LAVIS's forms. Every path and every key name
is set in the YAML, see configs/datasets/image_text_json.yaml and image_question_json.yaml.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from lavis.common.registry import registry
from lavis.datasets.builders.base_dataset_builder import BaseDatasetBuilder
from lavis.datasets.datasets.base_dataset import BaseDataset
from lavis.datasets.datasets.vqa_datasets import VQADataset
from omegaconf import ListConfig

from lavis_xformer.data.image_text import Pair, PairKeys, Question, QuestionKeys, Record, load, wrong_ids
from lavis_xformer.data.photos import open_photo
from lavis_xformer.data.records import expand, read_strings
from lavis_xformer.errors import UserError, one_of
from lavis_xformer.paths import config_path

Processor = Callable[[Any], Any]
Sample = dict[str, Any]

SPLITS = ("train", "val", "test")


class PhotoDataset(BaseDataset):
    """Base of the datasets below: annotations in memory, photos from files."""

    def __init__(
        self, *, annotation: list[Sample], vis_root: str | Path, vis_processor: Processor, text_processor: Processor
    ) -> None:
        """Number the annotations; nothing is opened yet.

        Args:
            annotation: one dict per sample, with ``image``, the path below ``vis_root``.
            vis_root: the folder of the images.
            vis_processor: takes a PIL image.
            text_processor: takes a caption or question.
        """
        super().__init__(vis_processor, text_processor, str(vis_root))
        self.annotation = annotation
        self._add_instance_ids()

    def picture(self, index: int) -> Any:
        """Open and process the image of one annotation."""
        path = os.path.join(self.vis_root, self.annotation[index]["image"])
        return self.vis_processor(open_photo(path))


class PairDataset(PhotoDataset):
    """One sample per caption, for training, like LAVIS's COCO captions; equal image_id means the same image."""

    def __init__(self, *, pairs: Sequence[Pair], **shared: Any) -> None:
        """Expand the rows to one annotation per caption; other arguments as for :class:`PhotoDataset`."""
        numbers: dict[str, int] = {}
        annotation = [
            {"image": pair.image, "caption": caption, "image_id": numbers.setdefault(pair.image_id, len(numbers))}
            for pair in pairs
            for caption in pair.captions
        ]
        super().__init__(annotation=annotation, **shared)

    def __getitem__(self, index: int) -> Sample:
        """Return image, text_input, image_id and instance_id."""
        row = self.annotation[index]
        return {
            "image": self.picture(index),
            "text_input": self.text_processor(row["caption"]),
            "image_id": row["image_id"],
            "instance_id": row["instance_id"],
        }


class PairEvalDataset(PhotoDataset):
    """One sample per image with its captions, and the tables that LAVIS's retrieval reads.

    Attributes:
        has_ids: whether ``image_id`` is the file's own, a unique whole number, and not an image's position.
        text: every caption, processed.
        image: path of every image.
        img2txt: maps an image's position to the positions of its captions in ``text``.
        txt2img: maps a caption's position to its image's.
    """

    def __init__(self, *, pairs: Sequence[Pair], **shared: Any) -> None:
        """Gather the captions of each image; other arguments as for :class:`PhotoDataset`."""
        by_id: dict[str, dict[str, Any]] = {}
        for pair in pairs:
            row: Sample = {"image": pair.image, "caption": [], "image_id": len(by_id)}
            by_id.setdefault(pair.image_id, row)["caption"].extend(pair.captions)
        numbers = {int(name) for name in by_id if name.isdecimal()}
        self.has_ids = len(numbers) == len(by_id) and max(numbers, default=0) < 1 << 63
        for name, row in by_id.items() if self.has_ids else ():
            row["image_id"] = int(name)
        super().__init__(annotation=list(by_id.values()), **shared)
        self.image = [row["image"] for row in self.annotation]
        self.text: list[str] = []
        self.img2txt: dict[int, list[int]] = {}
        for number, row in enumerate(self.annotation):
            self.img2txt[number] = list(range(len(self.text), len(self.text) + len(row["caption"])))
            self.text += [self.text_processor(caption) for caption in row["caption"]]
        self.txt2img = {text: image for image, texts in self.img2txt.items() for text in texts}

    def __getitem__(self, index: int) -> Sample:
        """Return image, text_input (the first caption), captions, image_path, image_id, instance_id and index."""
        row = self.annotation[index]
        captions = [self.text[number] for number in self.img2txt[index]]
        return {
            "image": self.picture(index),
            "text_input": captions[0],
            "captions": captions,
            "image_path": row["image"],
            "image_id": row["image_id"],
            "instance_id": row["instance_id"],
            "index": index,
        }

    def collater(self, samples: Sequence[Sample]) -> Sample:
        """Join samples as LAVIS does, but for the captions: a list for each image."""
        captions = [sample["captions"] for sample in samples]
        rest = [{key: value for key, value in sample.items() if key != "captions"} for sample in samples]
        return {**super().collater(rest), "captions": captions}

    def references(self) -> dict[int, list[str]]:
        """The captions as they are in the file, by image_id."""
        return {row["image_id"]: row["caption"] for row in self.annotation}


class QuestionDataset(PhotoDataset):
    """Questions for training, in the form of LAVIS's VQA datasets; equal image_id means the same image."""

    def __getitem__(self, index: int) -> Sample:
        """Return image, text_input, image_id, answers and weights: the share of people who gave each."""
        row = self.annotation[index]
        counts: Counter[str] = Counter(row["answers"])
        return {
            "image": self.picture(index),
            "text_input": self.text_processor(row["question"]),
            "image_id": row["image_id"],
            "answers": list(counts),
            "weights": [count / len(row["answers"]) for count in counts.values()],
        }

    def collater(self, samples: Sequence[Sample]) -> Sample:
        """Join samples into LAVIS's VQA batch, with image_id (B,)."""
        return {
            **VQADataset.collater(self, samples),
            "image_id": torch.tensor([sample["image_id"] for sample in samples]),  # (B,)
        }


class QuestionEvalDataset(PhotoDataset):
    """Questions for evaluation, for LAVIS's ``vqa`` and ``gqa`` tasks and our benchmarks.

    Attributes:
        answer_list: the candidates that ``inference_method: rank`` chooses from, or None.
    """

    def __init__(self, *, answer_list: list[str] | None = None, **shared: Any) -> None:
        """Keep the candidates; other arguments as for :class:`PhotoDataset`."""
        super().__init__(**shared)
        self.answer_list = answer_list

    @property
    def unanswered(self) -> list[int]:
        """Positions of the questions without an answer."""
        return [position for position, row in enumerate(self.annotation) if not row["answers"]]

    def __getitem__(self, index: int) -> Sample:
        """Return image, text_input, image_path, image_id, question_id, instance_id and answer (or None)."""
        row = self.annotation[index]
        votes: Counter[str] = Counter(row["answers"])
        common = votes.most_common(1)
        return {
            "image": self.picture(index),
            "text_input": self.text_processor(row["question"]),
            "image_path": row["image"],
            "image_id": row["image_id"],
            "question_id": row["question_id"],
            "instance_id": row["instance_id"],
            "answer": common[0][0] if common else None,
        }

    def collater(self, samples: Sequence[Sample]) -> Sample:
        """Join samples: images (B, C, S, S), question ids (B,), lists of everything else."""
        batch: Sample = {key: [sample[key] for sample in samples] for key in samples[0]}
        batch["image"] = torch.stack(batch["image"])  # (B, C, S, S)
        batch["question_id"] = torch.tensor(batch["question_id"])  # (B,)
        return batch


class LocalFilesBuilder(BaseDatasetBuilder, ABC):
    """Builds the splits whose ``annotations`` the YAML names; downloads nothing.

    A subclass defines in :meth:`build_split` what the files hold.
    """

    def build_datasets(self) -> dict[str, Any]:
        """Read, check and wrap every split that is given.

        Returns:
            Datasets by split.

        Raises:
            UserError: no split is given, or a path, a key or a row is wrong.
        """
        self.build_processors()
        return {split: self.build_split(split) for split in self.given_splits()}

    def given_splits(self) -> list[str]:
        """The splits whose annotations the YAML names.

        Raises:
            UserError: there is none, or one of their files or folders is missing.
        """
        splits = self.config.get("splits") or {}
        for split in splits:
            one_of(f"datasets.{self.name}.splits", split, SPLITS)
        given = [name for name in SPLITS if (splits.get(name) or {}).get("annotations")]
        if not given:
            split = next(iter(splits), "train")
            raise UserError(f"{self.name}: no annotation file: set datasets.{self.name}.splits.{split}.annotations")
        for split in given:
            where = f"datasets.{self.name}.splits.{split}"
            for file in map(expand, self.files(split)):
                if not file.exists():
                    raise UserError(f"{where}.annotations: {file.absolute()}: no such annotation file")
            if not (root := self.image_root(split)).is_dir():
                raise UserError(f"{where}.image_root: {root.absolute()}: no such image folder")
        return given

    @abstractmethod
    def build_split(self, split: str) -> BaseDataset:
        """Build one split."""

    @property
    def name(self) -> str:
        """The registered name of this builder, which is its section of the YAML."""
        names = registry.mapping["builder_name_mapping"]
        return next(name for name, cls in names.items() if cls is type(self))

    def files(self, split: str) -> list[str]:
        """The annotation files of a split."""
        files = self.config.splits[split].annotations
        return [str(file) for file in files] if isinstance(files, ListConfig) else [str(files)]

    def image_root(self, split: str) -> Path:
        """The image folder of a split: its own, else the dataset's, else the current folder."""
        return expand(self.config.splits[split].get("image_root") or self.config.get("image_root") or "")

    def shared(self, split: str) -> dict[str, Any]:
        """The arguments that every :class:`PhotoDataset` takes, except the annotation."""
        mode = "train" if split == "train" else "eval"
        return {
            "vis_root": self.image_root(split),
            "vis_processor": self.vis_processors[mode],
            "text_processor": self.text_processors[mode],
        }

    def load(self, split: str, keys: PairKeys | QuestionKeys) -> list[Record]:
        """Read and check all rows of a split's files."""
        options = {"rows_key": self.config.get("rows_key"), "check_files": self.config.get("check_files", True)}
        read = [load(file, keys, image_root=self.image_root(split), **options) for file in self.files(split)]
        return [record for records in read for record in records]


@registry.register_builder("image_text_json")
class ImageTextBuilder(LocalFilesBuilder):
    """Pairs of image and caption from JSON, JSONL or CSV."""

    DATASET_CONFIG_DICT: ClassVar[dict[str, str]] = {"default": config_path("datasets/image_text_json.yaml")}
    #: whether its splits for evaluation have ``references``, against which captions are scored
    HAS_REFERENCES = True

    def build_split(self, split: str) -> BaseDataset:
        """Build pairs for training, images with all their captions for evaluation."""
        config = self.config
        keys = PairKeys(image=config.image_key, caption=config.caption_key, image_id=config.get("id_key"))
        pairs = [record for record in self.load(split, keys) if isinstance(record, Pair)]
        cls = PairDataset if split == "train" else PairEvalDataset
        return cls(pairs=pairs, **self.shared(split))


@registry.register_builder("image_question_json")
class ImageQuestionBuilder(LocalFilesBuilder):
    """Questions and answers about images from JSON, JSONL or CSV."""

    DATASET_CONFIG_DICT: ClassVar[dict[str, str]] = {"default": config_path("datasets/image_question_json.yaml")}

    def build_split(self, split: str) -> BaseDataset:
        """Build questions; only those for training must have answers.

        Raises:
            UserError: an ``answer_key`` of the user's own is in no row of the only split.
        """
        config = self.config
        keys = QuestionKeys(
            image=config.image_key,
            question=config.question_key,
            answer=config.answer_key,
            question_id=config.get("id_key"),
            answers_needed=split == "train",
        )
        questions = [record for record in self.load(split, keys) if isinstance(record, Question)]
        alone = self.given_splits() == [split]  # else its answers may be withheld
        if alone and keys.answer != QuestionKeys.answer and not any(question.answers for question in questions):
            raise UserError(f"datasets.{self.name}.answer_key: no row of {split} has an answer under '{keys.answer}'")
        shared = {"annotation": self.annotate(questions), **self.shared(split)}
        if split == "train":
            return QuestionDataset(**shared)
        path = config.get("answer_list")
        return QuestionEvalDataset(answer_list=read_strings(path) if path else None, **shared)

    def annotate(self, questions: Sequence[Question]) -> list[Sample]:
        """Number the questions, by their own ids if ``id_key`` is set, and their images.

        Raises:
            UserError: an id is not a whole number (LAVIS requires one) or not unique.
        """
        own = self.config.get("id_key")
        if own and (wrong := wrong_ids(questions, own)):
            raise UserError(f"{self.name}: id_key {wrong[0][1]}; leave id_key out to have the questions numbered")
        images: dict[str, int] = {}
        return [
            {
                "image": question.image,
                "image_id": images.setdefault(question.image, len(images)),
                "question": question.question,
                "answers": list(question.answers),
                "question_id": int(question.question_id) if own else number,
            }
            for number, question in enumerate(questions)
        ]
