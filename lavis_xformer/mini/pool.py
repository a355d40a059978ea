"""Rendered scenes and their texts, made once by worker processes and kept in memory, so that no training step waits.

The scenes come from separate splits, which no train, val or test set of the project uses.

N: scenes, K: wordings per scene, S: side of an image in pixels.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lavis_xformer.data.scenes import (
    LEVELS,
    QUESTION_KINDS,
    Scene,
    ask,
    coarse_caption,
    description,
    make_scene,
    questions,
    render,
)
from lavis_xformer.data.scenes.qa import Question, details_asked, inventory_asked, squares_asked
from lavis_xformer.data.scenes.text import notes, pick, shuffled
from lavis_xformer.mini.language import Document

PRESET = "standard"
TRAIN, HELD_OUT = "pretrain", "pretrain-heldout"
CHUNK = 500
#: kinds of questions asked of a scene; kinds with many forms, or with two objects to look up, occur several times
ASKED = (*QUESTION_KINDS, "attribute", *3 * ("count_group",), *4 * ("position",), *6 * ("relation",))

#: notes per document, as many as an image's prefix has places; the unused ones say "nothing"
PLACES = 32

T = TypeVar("T")


def scene(split: str, seed: int, index: int, preset: str = PRESET) -> tuple[Scene, np.random.Generator]:
    """One scene of a split, and a generator for its wording."""
    wording = np.random.default_rng([seed, len(split), index])  # not the scenes' own generator, which has the name
    return make_scene(seed, split, index, preset), wording


def in_parallel(work: Callable[[int, int], T], count: int) -> list[T]:
    """Call ``work(start, stop)`` on chunks of ``range(count)``, in worker processes if there are several chunks."""
    bounds = [(start, min(start + CHUNK, count)) for start in range(0, count, CHUNK)]
    if len(bounds) == 1:
        return [work(*bounds[0])]
    with ProcessPoolExecutor(os.cpu_count()) as workers:
        return list(workers.map(work, *zip(*bounds, strict=True)))


def images(split: str, *, seed: int, count: int) -> Tensor:
    """Render ``count`` scenes of a split, uint8 (N, 3, S, S)."""
    chunks = in_parallel(partial(_pixels, split, seed), count)
    return torch.from_numpy(np.concatenate(chunks)).permute(0, 3, 1, 2).contiguous()


def coarse_captions(split: str, *, seed: int, count: int, wordings: int) -> list[str]:
    """Coarse captions of ``count`` scenes of a split, ``wordings`` consecutive ones for each."""
    chunks = in_parallel(partial(_coarse, split, seed, wordings), count)
    return [text for chunk in chunks for text in chunk]


def _pixels(split: str, seed: int, start: int, stop: int) -> NDArray[np.uint8]:
    return np.stack([render(scene(split, seed, index)[0]) for index in range(start, stop)])


def _coarse(split: str, seed: int, wordings: int, start: int, stop: int) -> list[str]:
    texts = []
    for index in range(start, stop):
        shown, rng = scene(split, seed, index)
        texts += [coarse_caption(shown, rng) for _ in range(wordings)]
    return texts


def documents(split: str, *, seed: int, count: int, noted: bool = False) -> list[Document]:
    """Training documents of the language model.

    Of every eight documents, one is a caption, one a pair of questions without a description, and six are questions
    about a scene that is described by a text or, if ``noted``, in half of them by notes. Captions then mostly follow
    notes. Half of the scenes are easy ones: short texts are learned faster.
    """
    chunks = in_parallel(partial(_documents, split, seed, noted), count)
    return [document for chunk in chunks for document in chunk]


def examination(split: str, *, seed: int, count: int, as_notes: bool = False) -> list[Document]:
    """Descriptions of ``count`` scenes, one question each; kinds alternate, and scenes without theirs are skipped."""
    chunks = in_parallel(partial(_examination, split, seed, as_notes), count)
    return [document for chunk in chunks for document in chunk]


def _documents(split: str, seed: int, noted: bool, start: int, stop: int) -> list[Document]:
    found = []
    for index in range(start, stop):
        shown, rng = scene(split, seed, index, PRESET if index // 8 % 2 else "easy")
        turn = index % 8
        told = _notes(shown, rng, numbers=rng.random() < 0.5) if noted else ()
        if turn == 0:
            level = pick(rng, list(LEVELS.values()))
            found.append(Document(level(shown, rng), notes=told if rng.random() < 0.75 else ()))
        elif turn == 1:
            found.append(Document("", tuple(questions(shown, rng, n=2))))
        elif told and turn % 2:
            last = [inventory_asked(shown)] if rng.random() < 0.5 else []
            found.append(Document("", tuple(_asked(shown, rng) + last), told))
        else:
            found.append(Document(description(shown), tuple(_asked(shown, rng))))
    return found


def _asked(shown: Scene, rng: np.random.Generator) -> list[Question]:
    """Questions of the kinds in :data:`ASKED`, for all details of some objects, and for squares, shuffled.

    The last two teach the model to look objects up: details make longer answers, and two squares imply a relation. Of
    questions with the same words, one is kept: "is A left or right of B" would give away its reverse.
    """
    drawn = [question for kind in ASKED if (question := ask(shown, rng, kind))]
    distinct = list({frozenset(question.text.rstrip("?").split()): question for question in drawn}.values())
    return shuffled(rng, distinct + details_asked(shown, rng, 2) + squares_asked(shown, rng))


def _notes(shown: Scene, rng: np.random.Generator, *, numbers: bool) -> tuple[str, ...]:
    """Shuffled notes, padded with "nothing"; without the ``numbers`` of the groups, the model has to count."""
    things, tally = notes(shown)
    told = (things + (tally if numbers else []))[:PLACES]
    return tuple(shuffled(rng, told + ["nothing"] * (PLACES - len(told))))


def _examination(split: str, seed: int, as_notes: bool, start: int, stop: int) -> list[Document]:
    found = []
    for index in range(start, stop):
        shown, rng = scene(split, seed, index)
        q = ask(shown, rng, QUESTION_KINDS[index % len(QUESTION_KINDS)])
        if q is not None:
            told = _notes(shown, rng, numbers=False) if as_notes else ()
            found.append(Document("" if as_notes else description(shown), (q,), told))
    return found
