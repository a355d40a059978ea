"""LAVIS builders of rendered scenes: ``xformer_scenes`` (captions) and ``xformer_scenes_vqa`` (questions).

Samples have the keys of LAVIS's COCO caption, retrieval and VQA datasets. Nothing is stored: a sample is made
when it is asked for, in well under two milliseconds, and is the same every time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

import numpy as np
import torch
from lavis.common.registry import registry
from lavis.datasets.builders.base_dataset_builder import BaseDatasetBuilder
from lavis.datasets.datasets.base_dataset import BaseDataset
from numpy.typing import NDArray
from PIL import Image
from torch.utils.data.dataloader import default_collate

from lavis_xformer.data.scenes import (
    ANSWERS,
    QUESTION_KINDS,
    Question,
    Scene,
    ask,
    captions,
    make_scene,
    questions,
    render,
    scene_rng,
)
from lavis_xformer.data.scenes.qa import details_asked, find_kind
from lavis_xformer.data.scenes.text import find_level, shuffled
from lavis_xformer.data.scenes.world import find_preset
from lavis_xformer.errors import UserError, nearest
from lavis_xformer.paths import config_path

Processor = Callable[[Any], Any]
Sample = dict[str, Any]

SPLITS = ("train", "val", "test")
DIALOGUE = "dialogue"  # the kind of a sample with several questions
_scene = lru_cache(maxsize=64)(make_scene)  # a sample asks for its scene twice
_MANY_SCENES = 1000  # how many scenes may not allow a kind of question before one gives up


@dataclass(frozen=True)
class SceneSource:
    """The scenes of one split.

    Attributes:
        seed: of the world.
        split: whose scenes.
        preset: difficulty, see :data:`lavis_xformer.data.scenes.PRESETS`.
        scenes: how many.
        image_size: side of a picture in pixels.
    """

    seed: int
    split: str
    preset: str
    scenes: int
    image_size: int

    def scene(self, index: int) -> Scene:
        """Draw a scene."""
        return _scene(self.seed, self.split, index, self.preset)

    def paint(self, index: int) -> NDArray[np.uint8]:
        """Paint a scene: (image_size, image_size, 3)."""
        return render(self.scene(index), self.image_size)


class LazyRows(Sequence[Sample]):
    """A list of annotations that are made when they are read."""

    def __init__(self, length: int, make: Callable[[int], Sample]) -> None:
        """Hold ``length`` rows, row ``i`` being ``make(i)``."""
        self.length, self.make = length, make

    def __len__(self) -> int:
        """Return the number of rows."""
        return self.length

    def __getitem__(self, index: Any) -> Any:
        """Make one row, or a list of them for a slice."""
        rows = range(self.length)[index]
        return self.make(rows) if isinstance(rows, int) else [self.make(row) for row in rows]


class SceneDataset(BaseDataset):
    """What all datasets of scenes share: pictures by scene number, annotations as LAVIS has them."""

    def __init__(
        self,
        *,
        source: SceneSource,
        vis_processor: Processor,
        text_processor: Processor,
        cached: bool = False,
    ) -> None:
        """Prepare the pictures.

        Args:
            source: the scenes.
            vis_processor: takes a PIL image.
            text_processor: takes a caption or question.
            cached: paint all scenes now and keep them.
        """
        super().__init__(vis_processor, text_processor)
        self.source = source
        self.pictures = [source.paint(index) for index in range(source.scenes)] if cached else []

    def row(self, number: int, scene: int, **rest: Any) -> Sample:
        """An annotation: which picture, its own number, and the rest."""
        name = f"{self.source.split}/{scene}"
        return {"image": name, "image_id": scene, "instance_id": str(number), **rest}

    def sample(self, row: Sample, text: str) -> Sample:
        """What every sample has: the processed picture and text, and the numbers of both."""
        index = row["image_id"]
        kept = index < len(self.pictures)
        pixels = self.pictures[index] if kept else self.source.paint(index)
        return {
            "image": self.vis_processor(Image.fromarray(pixels)),
            "text_input": self.text_processor(text),
            "image_id": index,
            "instance_id": row["instance_id"],
        }


class ScenePairDataset(SceneDataset):
    """One sample per caption, for training; a scene has several captions in a row, as COCO's images have."""

    def __init__(self, *, level: str, captions_per_image: int, **shared: Any) -> None:
        """Prepare the captions.

        Args:
            level: ``coarse``, ``medium`` or ``fine``.
            captions_per_image: captions of every scene.
            shared: the arguments of :class:`SceneDataset`.
        """
        super().__init__(**shared)
        self.level, self.captions_per_image = level, captions_per_image
        self.annotation = LazyRows(self.source.scenes * captions_per_image, self._annotate)

    def _annotate(self, number: int) -> Sample:
        index, which = divmod(number, self.captions_per_image)
        text = captions(self.source.scene(index), self.level, which + 1)[which]
        return self.row(number, index, caption=text)

    def __getitem__(self, number: int) -> Sample:
        """Return image, text_input, image_id and instance_id."""
        row = self.annotation[number]
        return self.sample(row, row["caption"])


class ScenePairEvalDataset(SceneDataset):
    """One sample per scene with its first caption, and the tables that LAVIS's retrieval reads.

    Attributes:
        text: every caption, processed.
        image: name of every scene's picture.
        img2txt: scene's position to positions of its captions in ``text``.
        txt2img: position of a caption to its scene's.
    """

    def __init__(self, *, level: str, captions_per_image: int, **shared: Any) -> None:
        """Write all captions; arguments as of :class:`ScenePairDataset`."""
        super().__init__(**shared)
        k = captions_per_image
        scenes = range(self.source.scenes)
        self.annotation = [self.row(i, i, caption=captions(self.source.scene(i), level, k)) for i in scenes]
        self.text = [self.text_processor(text) for row in self.annotation for text in row["caption"]]
        self.image = [row["image"] for row in self.annotation]
        self.img2txt = {i: list(range(i * k, (i + 1) * k)) for i in scenes}
        self.txt2img = {text: i for i, texts in self.img2txt.items() for text in texts}

    def __getitem__(self, index: int) -> Sample:
        """Return image, text_input, image_id, instance_id and index."""
        row = self.annotation[index]
        return {**self.sample(row, row["caption"][0]), "index": index}


class SceneQuestionDataset(SceneDataset):
    """One sample per question; the kinds take turns, so each is asked equally often.

    Where a scene does not allow the kind whose turn it is, the next scene beyond the split's last that does is
    asked about instead: questions stay balanced and no other split is touched.
    """

    answer_list = ANSWERS
    coco_fmt_qust_file = coco_fmt_anno_file = None  # what LAVIS's VQA task looks for

    def __init__(self, *, kinds: Sequence[str], questions_per_image: int, **shared: Any) -> None:
        """Prepare the questions.

        Args:
            kinds: kinds of questions, see :data:`lavis_xformer.data.scenes.QUESTION_KINDS`.
            questions_per_image: questions about every scene.
            shared: the arguments of :class:`SceneDataset`.
        """
        super().__init__(**shared)
        self.kinds, self.questions_per_image = tuple(kinds), questions_per_image
        self.annotation = LazyRows(self.source.scenes * questions_per_image, self._annotate)

    def _ask(self, number: int) -> tuple[int, Question]:
        """Return a scene's index and a question about it."""
        kind = self.kinds[number % len(self.kinds)]
        first = number // self.questions_per_image
        for index in range(first, first + _MANY_SCENES * self.source.scenes, self.source.scenes):
            rng = scene_rng(self.source.seed, self.source.split, index, 2, number)
            question = ask(self.source.scene(index), rng, kind)
            if question is not None:
                return index, question
        raise UserError(f"kinds: no scene of preset '{self.source.preset}' allows a question of kind '{kind}'")

    def _annotate(self, number: int) -> Sample:
        index, asked = self._ask(number)
        return self.row(
            number,
            index,
            question_id=number,
            question=asked.text,
            answer=[asked.answer],
            kind=asked.kind,
        )

    def __getitem__(self, number: int) -> Sample:
        """Return image, text_input (the question), answers, weights, kind, question_id and the numbers."""
        row = self.annotation[number]
        extra = {key: row[key] for key in ("question_id", "kind")}
        return {**self.sample(row, row["question"]), "answers": row["answer"], "weights": [1.0], **extra}

    def collater(self, samples: Sequence[Sample]) -> Sample:
        """Join samples into LAVIS's VQA batch: every question's answers one after the other.

        Returns:
            ``image`` (B, C, S, S), ``text_input``, ``answer`` (all answers), ``weight`` and ``n_answers`` as
            in LAVIS's VQADataset; ``answers`` (a list per question), ``kind`` and the numbers besides.
        """
        lists = ("text_input", "answers", "weights")
        batch = default_collate([{k: v for k, v in s.items() if k not in lists} for s in samples])
        return {
            **batch,
            "text_input": [sample["text_input"] for sample in samples],
            "answers": [sample["answers"] for sample in samples],
            "answer": [answer for sample in samples for answer in sample["answers"]],
            "weight": torch.tensor([weight for sample in samples for weight in sample["weights"]]),
            "n_answers": torch.tensor([len(sample["answers"]) for sample in samples]),
        }


class SceneDialogueDataset(SceneQuestionDataset):
    """One sample per scene, for training: all its questions in a row, so that the image is encoded once."""

    def __init__(self, *, details_per_image: int = 0, **questions: Any) -> None:
        """Prepare the dialogues.

        Args:
            details_per_image: how many objects to ask all about, besides.
            questions: the arguments of :class:`SceneQuestionDataset`.
        """
        super().__init__(**questions)
        self.details_per_image = details_per_image
        self.annotation = LazyRows(self.source.scenes, self._annotate)

    def _annotate(self, number: int) -> Sample:
        for index in range(number, number + _MANY_SCENES * self.source.scenes, self.source.scenes):
            rng = scene_rng(self.source.seed, self.source.split, index, 3)
            scene = self.source.scene(index)
            asked = questions(scene, rng, self.kinds, n=self.questions_per_image)
            if asked:
                asked = shuffled(rng, asked + details_asked(scene, rng, self.details_per_image))
                texts = [question.text for question in asked]
                answers = [[question.answer for question in asked]]
                return self.row(number, index, question_id=number, question=texts, answer=answers, kind=DIALOGUE)
        raise UserError(f"kinds: no scene of preset '{self.source.preset}' allows a question of {list(self.kinds)}")

    def __getitem__(self, number: int) -> Sample:
        """Return what :class:`SceneQuestionDataset` does, ``text_input`` and the one of ``answers`` being lists."""
        row = self.annotation[number]
        asked = [self.text_processor(question) for question in row["question"]]
        extra = {key: row[key] for key in ("question_id", "kind")}
        return {**self.sample(row, ""), "text_input": asked, "answers": row["answer"], "weights": [1.0], **extra}


class _SceneBuilder(BaseDatasetBuilder):
    """Read and check the configuration; a subclass turns a split's part of it into a dataset."""

    split_keys: tuple[str, ...]

    def _download_data(self) -> None:
        """Scenes need no file."""

    def build(self) -> dict[str, SceneDataset]:
        """Build the dataset of every split that has scenes.

        Raises:
            UserError: a key of the configuration is unknown, missing or wrong.
        """
        self.build_processors()
        parts = {name: part for name, part in self.config.splits.items() if part is not None}
        for name in parts:
            if name not in SPLITS:
                raise UserError(f"splits: no split named {name!r}: {nearest(name, SPLITS)}")
        return {
            name: self._split(name, part)
            for name, part in parts.items()
            if _whole("scenes", part.get("scenes"), least=0)
        }

    def _split(self, name: str, part: Mapping[str, Any]) -> SceneDataset:
        known = ("scenes", *self.split_keys)
        for key in part:
            if key not in known:
                raise UserError(f"splits.{name}: unknown key {key!r}: {nearest(key, known)}")
        find_preset(self.config.preset)
        mode = "train" if name == "train" else "eval"
        shared = {
            "source": SceneSource(
                seed=_whole("seed", self.config.get("seed"), least=0),
                split=name,
                preset=self.config.preset,
                scenes=part["scenes"],
                image_size=_whole("image_size", self.config.get("image_size"), least=8),
            ),
            "cached": bool(self.config.get("cached", False)),
        }
        for key, processors in (("vis", self.vis_processors), ("text", self.text_processors)):
            if processors[mode] is None:
                raise UserError(f"{key}_processor has no '{mode}', which split '{name}' needs")
            shared[f"{key}_processor"] = processors[mode]
        return self._dataset(name, part, shared)

    def _dataset(self, name: str, part: Mapping[str, Any], shared: Sample) -> SceneDataset:
        raise NotImplementedError


@registry.register_builder("xformer_scenes")
class ScenePairBuilder(_SceneBuilder):
    """Scenes with captions: training pairs, and evaluation by losses and by retrieval."""

    DATASET_CONFIG_DICT: ClassVar[dict[str, str]] = {"default": config_path("datasets/scenes.yaml")}
    train_dataset_cls, eval_dataset_cls = ScenePairDataset, ScenePairEvalDataset
    split_keys = ("captions", "captions_per_image")

    def _dataset(self, name: str, part: Mapping[str, Any], shared: Sample) -> SceneDataset:
        level = part.get("captions", "medium")
        find_level(level)
        each = _whole("captions_per_image", part.get("captions_per_image", 1), least=1)
        cls = self.train_dataset_cls if name == "train" else self.eval_dataset_cls
        return cls(level=level, captions_per_image=each, **shared)


@registry.register_builder("xformer_scenes_vqa")
class SceneQuestionBuilder(_SceneBuilder):
    """Scenes with questions and answers."""

    DATASET_CONFIG_DICT: ClassVar[dict[str, str]] = {"default": config_path("datasets/scenes_vqa.yaml")}
    train_dataset_cls = eval_dataset_cls = SceneQuestionDataset
    split_keys = ("questions_per_image", "dialogue", "details_per_image")

    def _dataset(self, name: str, part: Mapping[str, Any], shared: Sample) -> SceneDataset:
        kinds = tuple(self.config.get("kinds") or QUESTION_KINDS)
        for kind in kinds:
            find_kind(kind)
        each = _whole("questions_per_image", part.get("questions_per_image", 1), least=1)
        asked = {"kinds": kinds, "questions_per_image": each, **shared}
        if not part.get("dialogue", False):
            return SceneQuestionDataset(**asked)
        if name != "train":
            raise UserError(f"splits.{name}.dialogue: only 'train' may ask several questions at once")
        more = _whole("details_per_image", part.get("details_per_image", 0), least=0)
        return SceneDialogueDataset(details_per_image=more, **asked)


def _whole(key: str, value: Any, *, least: int) -> int:
    """Check a whole number of the configuration."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise UserError(f"{key} is {value!r}; it must be a whole number, at least {least}")
    return value
