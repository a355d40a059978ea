"""Rendered scenes as LAVIS datasets, and the builder ``xformer_scenes`` for their captions.

Samples have the keys of LAVIS's COCO caption and retrieval datasets. Nothing is stored: a sample is generated
on access, in two to four milliseconds of one core, and is the same every time.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

import numpy as np
from lavis.common.registry import registry
from lavis.datasets.builders.base_dataset_builder import BaseDatasetBuilder
from lavis.datasets.datasets.base_dataset import BaseDataset
from numpy.typing import NDArray
from omegaconf import ListConfig
from PIL import Image

from lavis_xformer.data.packed import LazyRows
from lavis_xformer.data.scenes import LEVELS, PRESETS, Scene, captions, make_scene, render
from lavis_xformer.errors import UserError, one_of, whole
from lavis_xformer.paths import config_path

Processor = Callable[[Any], Any]
Sample = dict[str, Any]

SPLITS = ("train", "val", "test")
_scene = lru_cache(maxsize=64)(make_scene)  # a sample asks for its scene twice


@dataclass(frozen=True)
class SceneSource:
    """The scenes of one split."""

    seed: int  # of the world
    split: str
    presets: tuple[str, ...]  # names of ``scenes.PRESETS``; several take turns, scene by scene
    scenes: int  # number of scenes
    image_size: int  # side of a picture in pixels

    def scene(self, index: int) -> Scene:
        """Draw a scene."""
        return _scene(self.seed, self.split, index, self.presets[index % len(self.presets)])

    def paint(self, index: int) -> NDArray[np.uint8]:
        """Paint a scene: (image_size, image_size, 3)."""
        return render(self.scene(index), self.image_size)


class SceneDataset(BaseDataset):
    """Base of all scene datasets: pictures by scene number, annotations in LAVIS's form."""

    def __init__(
        self, *, source: SceneSource, vis_processor: Processor, text_processor: Processor, cached: bool = False
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

    def sample(self, row: Sample, text: str | list[str]) -> Sample:
        """The keys of every sample: the processed picture, the processed text or texts, and the ids of both."""
        index = row["image_id"]
        kept = index < len(self.pictures)
        pixels = self.pictures[index] if kept else self.source.paint(index)
        return {
            "image": self.vis_processor(Image.fromarray(pixels)),
            "text_input": self.text_processor(text) if isinstance(text, str) else [*map(self.text_processor, text)],
            "image_id": index,
            "instance_id": row["instance_id"],
        }


class ScenePairDataset(SceneDataset):
    """One sample per caption, for training; a scene's captions are consecutive, as are those of COCO's images."""

    def __init__(self, *, level: str, captions_per_image: int, **shared: Any) -> None:
        """Prepare captions of a level, ``coarse``, ``medium`` or ``fine``; ``shared`` is for :class:`SceneDataset`."""
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
        img2txt: maps a scene's position to the positions of its captions in ``text``.
        txt2img: maps a caption's position to its scene's.
    """

    def __init__(self, *, level: str, captions_per_image: int, **shared: Any) -> None:
        """Write all captions; arguments as for :class:`ScenePairDataset`."""
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


class SceneBuilder(BaseDatasetBuilder, ABC):
    """Reads and checks the configuration; a subclass turns a split's part of it into a dataset."""

    split_keys: tuple[str, ...]

    def build_datasets(self) -> dict[str, SceneDataset]:
        """Build the dataset of every split that has scenes; nothing is downloaded.

        Raises:
            UserError: a key of the configuration is unknown, missing or wrong.
        """
        self.build_processors()
        parts = {name: part for name, part in (self.config.splits or {}).items() if part is not None}
        for name, part in parts.items():
            one_of("splits", name, SPLITS)
            if not isinstance(part, Mapping):
                raise UserError(f"splits.{name} is {part!r}; it must hold keys such as scenes")
        return {
            name: self._split(name, part)
            for name, part in parts.items()
            if whole(f"splits.{name}.scenes", part.get("scenes"), least=0)
        }

    def _split(self, name: str, part: Mapping[str, Any]) -> SceneDataset:
        known = ("scenes", *self.split_keys)
        for key in part:
            one_of(f"splits.{name}", key, known)
        given = self.config.get("preset")
        presets = (list(given) or [""]) if isinstance(given, ListConfig) else [given]
        for preset in presets:
            one_of("preset", preset, PRESETS)
        mode = "train" if name == "train" else "eval"
        shared = {
            "source": SceneSource(
                seed=whole("seed", self.config.get("seed"), least=0),
                split=name,
                presets=tuple(presets),
                scenes=part["scenes"],
                image_size=whole("image_size", self.config.get("image_size"), least=8),
            ),
            "cached": bool(self.config.get("cached", False)),
        }
        for key, processors in (("vis", self.vis_processors), ("text", self.text_processors)):
            if processors[mode] is None:
                raise UserError(f"{key}_processor has no '{mode}', which split '{name}' needs")
            shared[f"{key}_processor"] = processors[mode]
        return self._dataset(name, part, shared)

    @abstractmethod
    def _dataset(self, name: str, part: Mapping[str, Any], shared: Sample) -> SceneDataset:
        """Build one split from its keys and the arguments that all datasets of scenes take."""


@registry.register_builder("xformer_scenes")
class ScenePairBuilder(SceneBuilder):
    """Scenes with captions: training pairs, and evaluation by losses and by retrieval."""

    DATASET_CONFIG_DICT: ClassVar[dict[str, str]] = {"default": config_path("datasets/scenes.yaml")}
    split_keys = ("captions", "captions_per_image")

    def _dataset(self, name: str, part: Mapping[str, Any], shared: Sample) -> SceneDataset:
        level = one_of(f"splits.{name}.captions", part.get("captions", "medium"), LEVELS)
        each = whole(f"splits.{name}.captions_per_image", part.get("captions_per_image", 1), least=1)
        cls = ScenePairDataset if name == "train" else ScenePairEvalDataset
        return cls(level=level, captions_per_image=each, **shared)
