"""What the probe asks of frozen tokens: one label per scene and task.

N: scenes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from lavis_xformer.data.scenes import Scene, SceneObject, relations
from lavis_xformer.data.scenes.words import COLOURS, COLUMNS, FACINGS, MARKS, ROWS, SHAPES
from lavis_xformer.mini import pool

#: label of a scene that does not allow the question; cross-entropy ignores it
NONE = -100

#: the relation task asks only about objects this close to the vertical centre line, as a share of the side
MIDDLE = 0.15

CELLS = tuple(f"{row} {column}".strip() or "middle" for row in ROWS for column in COLUMNS)


@dataclass(frozen=True)
class Task:
    """A question about a scene, answered with a class index."""

    classes: int  # number of possible answers
    label: Callable[[Scene, SceneObject], int]  # for the object that is pointed at; NONE where there is no answer
    pointed: bool  # whether the probe is told where the object is


def _side(scene: Scene, item: SceneObject) -> int:
    """Whether the object lies left or right of the largest one; asked near the middle, where position tells little."""
    largest = scene.largest()
    if largest is None or item is largest or abs(item.x - 0.5) > MIDDLE:
        return NONE
    sides = [side for side in relations(item, largest) if side in ("left of", "right of")]
    return int(sides[0] == "right of") if sides else NONE


def _position(scene: Scene, item: SceneObject) -> int:
    largest = scene.largest()
    return CELLS.index(largest.cell) if largest else NONE


def _facing(scene: Scene, item: SceneObject) -> int:
    return FACINGS.index(item.facing) if item.directed else NONE


TASKS = {
    "category": Task(len(SHAPES) * len(COLOURS), lambda s, o: _kind(o), True),
    "count": Task(10, lambda s, o: len(s.objects), False),
    "position": Task(9, _position, False),
    "mark": Task(len(MARKS), lambda s, o: MARKS.index(o.mark), True),
    "facing": Task(4, _facing, True),
    "relation": Task(2, _side, True),
}


def _kind(item: SceneObject) -> int:
    return list(COLOURS).index(item.colour) * len(SHAPES) + SHAPES.index(item.shape)


@dataclass(frozen=True)
class Exam:
    """Scenes of one split with their answers."""

    images: Tensor  # uint8 (N, 3, S, S)
    points: Tensor  # (N, 2), x and y of the object that is pointed at, as shares of the side
    labels: dict[str, Tensor]  # task to (N,) long


def make_exam(split: str, *, seed: int, count: int) -> Exam:
    """Scenes of a split; in each a random object is pointed at."""
    chunks = pool.in_parallel(partial(_answers, split, seed), count)
    points, answers = (np.concatenate(values) for values in zip(*chunks, strict=True))
    columns = torch.from_numpy(answers).unbind(1)
    labels = dict(zip(TASKS, columns, strict=True))
    return Exam(pool.images(split, seed=seed, count=count), torch.from_numpy(points).float(), labels)


def _answers(split: str, seed: int, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
    points, answers = [], []
    for index in range(start, stop):
        scene, rng = pool.scene(split, seed, index)
        item = scene.objects[int(rng.integers(len(scene.objects)))]
        points.append((item.x, item.y))
        answers.append([task.label(scene, item) for task in TASKS.values()])
    return np.array(points), np.array(answers)
