"""LAVIS builder ``xformer_scenes_vqa``: questions about rendered scenes, one by one or as dialogues.

Samples have the keys of LAVIS's VQA datasets.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, TypeVar

from lavis.common.registry import registry
from lavis.datasets.datasets.vqa_datasets import VQADataset
from numpy.random import Generator
from torch.utils.data.dataloader import default_collate

from lavis_xformer.data.packed import LazyRows
from lavis_xformer.data.scene_datasets import Sample, SceneBuilder, SceneDataset
from lavis_xformer.data.scenes import ANSWERS, QUESTION_KINDS, Question, ask, questions, scene_rng
from lavis_xformer.data.scenes.qa import KINDS, details_asked, inventory_asked
from lavis_xformer.data.scenes.text import shuffled
from lavis_xformer.errors import UserError, one_of, whole
from lavis_xformer.paths import config_path

Asked = TypeVar("Asked")  # a question, or several
DIALOGUE = "dialogue"  # the kind of a sample with several questions
_MANY_SCENES = 1000  # scenes tried for one that allows a kind of question before giving up


class SceneQuestionDataset(SceneDataset):
    """One sample per question; the kinds take turns within each preset, so that each preset has equally many of each.

    If a scene does not allow the kind whose turn it is, the next scene of its preset beyond the split's last that does
    stands in for it: questions stay balanced and no other split is touched.
    """

    answer_list = ANSWERS

    def __init__(self, *, kinds: Sequence[str], questions_per_image: int, **shared: Any) -> None:
        """Prepare the questions.

        Args:
            kinds: kinds of questions, see :data:`lavis_xformer.data.scenes.QUESTION_KINDS`.
            questions_per_image: number of questions about every scene.
            shared: the arguments of :class:`SceneDataset`.
        """
        super().__init__(**shared)
        self.kinds, self.questions_per_image = tuple(kinds), questions_per_image
        self.annotation = LazyRows(self.source.scenes * questions_per_image, self._annotate)

    def _rng(self, index: int, *purpose: int) -> Generator:
        return scene_rng(self.source.seed, self.source.split, index, *purpose)

    def _first(self, index: int, make: Callable[[int], Asked | None], kinds: Sequence[str]) -> tuple[int, Asked]:
        """Ask about a scene, or about a stand-in if it allows no question; also return the index of the scene used."""
        step = self.source.scenes * len(self.source.presets)
        for stand_in in range(index, index + _MANY_SCENES * step, step):
            if asked := make(stand_in):
                return stand_in, asked
        presets = " or ".join(self.source.presets)
        raise UserError(f"kinds: no scene of preset {presets} allows a question of {list(kinds)}")

    def _annotate(self, number: int) -> Sample:
        scene, question = divmod(number, self.questions_per_image)
        turn = scene // len(self.source.presets) * self.questions_per_image + question
        kind = self.kinds[turn % len(self.kinds)]
        index, asked = self._first(
            scene,
            lambda index: ask(self.source.scene(index), self._rng(index, 2, number), kind),
            [kind],
        )
        return self.row(number, index, question_id=number, question=asked.text, answer=[asked.answer], kind=kind)

    def __getitem__(self, number: int) -> Sample:
        """Return image, text_input (a question, or all of them), answers, weights, kind, question_id and other ids."""
        row = self.annotation[number]
        extra = {key: row[key] for key in ("question_id", "kind")}
        return {**self.sample(row, row["question"]), "answers": row["answer"], "weights": [1.0], **extra}

    def collater(self, samples: Sequence[Sample]) -> Sample:
        """Join samples into LAVIS's VQA batch, with the answers of all questions in one list.

        Returns:
            ``image`` (B, C, S, S), ``text_input``, ``answer`` (all answers), ``weight`` and ``n_answers`` as
            in LAVIS's VQADataset; also ``answers`` (a list per question), ``kind`` and the ids.
        """
        joined = ("image", "text_input", "answers", "weights")
        return {
            **default_collate([{k: v for k, v in s.items() if k not in joined} for s in samples]),
            **VQADataset.collater(self, samples),
            "answers": [sample["answers"] for sample in samples],
        }


class SceneDialogueDataset(SceneQuestionDataset):
    """One sample per scene, for training: all its questions together, so that the image is encoded once.

    A sample's ``text_input`` is a list of questions; its ``answers`` holds one entry, the list of their answers.
    """

    def __init__(self, *, details_per_image: int = 0, inventory: bool = False, **questions: Any) -> None:
        """Prepare the dialogues.

        Args:
            details_per_image: number of objects whose full details are asked for, in addition.
            inventory: whether to ask at the end for the details of all objects.
            questions: the arguments of :class:`SceneQuestionDataset`.
        """
        super().__init__(**questions)
        self.details_per_image, self.inventory = details_per_image, inventory
        self.annotation = LazyRows(self.source.scenes, self._annotate)

    def _questions(self, index: int) -> list[Question]:
        scene, rng = self.source.scene(index), self._rng(index, 3)
        asked = questions(scene, rng, self.kinds, n=self.questions_per_image)
        if not asked:
            return []
        last = [inventory_asked(scene)] if self.inventory else []
        return shuffled(rng, asked + details_asked(scene, rng, self.details_per_image)) + last

    def _annotate(self, number: int) -> Sample:
        index, asked = self._first(number, self._questions, self.kinds)
        texts = [question.text for question in asked]
        answers = [[question.answer for question in asked]]
        return self.row(number, index, question_id=number, question=texts, answer=answers, kind=DIALOGUE)


@registry.register_builder("xformer_scenes_vqa")
class SceneQuestionBuilder(SceneBuilder):
    """Scenes with questions and answers."""

    DATASET_CONFIG_DICT: ClassVar[dict[str, str]] = {"default": config_path("datasets/scenes_vqa.yaml")}
    split_keys = ("questions_per_image", "dialogue", "details_per_image", "inventory")

    def _dataset(self, name: str, part: Mapping[str, Any], shared: Sample) -> SceneDataset:
        kinds = tuple(self.config.get("kinds") or QUESTION_KINDS)
        for kind in kinds:
            one_of("kinds", kind, KINDS)
        each = whole(f"splits.{name}.questions_per_image", part.get("questions_per_image", 1), least=1)
        asked = {"kinds": kinds, "questions_per_image": each, **shared}
        if not part.get("dialogue", False):
            return SceneQuestionDataset(**asked)
        if name != "train":
            raise UserError(f"splits.{name}.dialogue: only 'train' may ask several questions at once")
        more = whole(f"splits.{name}.details_per_image", part.get("details_per_image", 0), least=0)
        return SceneDialogueDataset(details_per_image=more, inventory=bool(part.get("inventory", False)), **asked)
