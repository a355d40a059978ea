"""What can be said about a scene: captions from coarse to fine, and a complete description."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from itertools import combinations
from typing import TypeVar

from numpy.random import Generator

from lavis_xformer.data.scenes.words import COLOURS, SHAPES, counted, listed, plural, with_article
from lavis_xformer.data.scenes.world import Scene, SceneObject, relations, scene_rng
from lavis_xformer.errors import one_of

Item = TypeVar("Item")

#: columns and rows of the board on which descriptions place objects; objects clearly apart never share one
BOARD = 9
OPENINGS = ("", "", "a picture of ", "an image with ")


def pick(rng: Generator, options: Sequence[Item]) -> Item:
    """Choose one of several, all equally likely."""
    return options[int(rng.integers(len(options)))]


def shuffled(rng: Generator, items: Sequence[Item]) -> list[Item]:
    """Return the items in random order."""
    return [items[int(i)] for i in rng.permutation(len(items))]


def place(item: SceneObject) -> str:
    """Say where an object is: ``in the middle``, ``at the top left``."""
    return "in the middle" if item.cell == "middle" else f"at the {item.cell}"


def _on_ground(scene: Scene, rng: Generator, share: float) -> str:
    """Name the ground in the given share of cases."""
    if rng.random() >= share:
        return ""
    return f" {pick(rng, ('on', 'on', 'over'))} {with_article(scene.ground.name)} ground"


def coarse_caption(scene: Scene, rng: Generator) -> str:
    """Say what there is; rarely how many or where, never a mark.

    At most three groups are named, by shape or by colour and shape.
    """
    by_colour = rng.random() < 0.6
    names = Counter(item.name if by_colour else item.shape for item in scene.objects)
    exact = rng.random() < 0.12
    phrases = []
    for name in shuffled(rng, sorted(names))[:3]:
        vague = plural(name) if names[name] > 1 else with_article(name)
        phrases.append(counted(names[name], name) if exact else vague)
    where = ""
    if len(scene.objects) == 1 and rng.random() < 0.12:
        where = f" {place(scene.objects[0])}"
    return f"{pick(rng, OPENINGS)}{listed(phrases)}{where}{_on_ground(scene, rng, 0.4)}"


def drawn_relation(scene: Scene, rng: Generator) -> tuple[SceneObject, str, SceneObject] | None:
    """Draw two unambiguously named objects and a clear relation of the first to the second; None if there is none."""
    pairs = [pair for pair in combinations(scene.singles(), 2) if relations(*pair)]
    if not pairs:
        return None
    first, second = shuffled(rng, pick(rng, pairs))
    return first, pick(rng, relations(first, second)), second


def caption(scene: Scene, rng: Generator) -> str:
    """Name every group with its colour and number, and one relation, place or size."""
    groups = shuffled(rng, sorted(scene.groups().items()))
    phrases = [counted(count, f"{colour} {shape}") for (colour, shape), count in groups]
    text = pick(rng, OPENINGS) + listed(phrases) + _on_ground(scene, rng, 0.7 if len(groups) < 4 else 0.2)
    if drawn := drawn_relation(scene, rng):
        first, side, second = drawn
        return f"{text}, the {first.name} is {side} the {second.name}"
    if scene.singles():
        item = pick(rng, scene.singles())
        return f"{text}, the {item.name} is {item.size} and {place(item)}"
    return text


def full_name(item: SceneObject, rng: Generator) -> str:
    """Name an object with all that is visible of it except its place; its facing only sometimes."""
    facing = item.directed and rng.random() < 0.4
    return f"{item.size} {item.mark} {item.name}" + (f" facing {item.facing}" if facing else "")


def fine_caption(scene: Scene, rng: Generator) -> str:
    """Say how many objects there are, and the size, mark, facing and place of two; or describe all of up to three."""
    total = len(scene.objects)
    ground = _on_ground(scene, rng, 0.6)
    told = shuffled(rng, scene.objects)[: 3 if total == 3 and not ground else 2]
    phrases = [f"{with_article(full_name(item, rng))} {place(item)}" for item in told]
    if len(told) == total:
        return listed(phrases) + ground
    lead = counted(total, "object") + ground
    return f"{lead}, {pick(rng, ('among them', 'with'))} {' and '.join(phrases)}"


LEVELS: dict[str, Callable[[Scene, Generator], str]] = {
    "coarse": coarse_caption,
    "medium": caption,
    "fine": fine_caption,
}


def captions(scene: Scene, level: str, n: int) -> list[str]:
    """Write ``n`` captions of a level; the same scene gives the same captions, and a larger ``n`` only adds to them.

    Raises:
        UserError: there is no such level.
    """
    write = LEVELS[one_of("caption level", level, LEVELS)]
    rng = scene_rng(scene.seed, scene.split, scene.index, 1)
    return [write(scene, rng) for _ in range(n)]


def _tally(scene: Scene) -> dict[str, int]:
    """Number of objects under every plural that names some: all, by shape, by colour, by both."""
    objects = scene.objects
    tally = {"objects": len(objects)}
    tally |= {plural(shape): scene.count(shape=shape) for shape in SHAPES}
    tally |= {f"{colour} objects": scene.count(colour=colour) for colour in COLOURS}
    tally |= {f"{colour} {plural(shape)}": n for (colour, shape), n in sorted(scene.groups().items())}
    return {name: count for name, count in tally.items() if count}


def square(item: SceneObject) -> str:
    """Say in which column and row of a nine by nine board an object's centre lies: ``1/9`` at the bottom left."""
    column, row = (min(int(BOARD * v), BOARD - 1) + 1 for v in (item.x, item.y))
    return f"{column}/{row}"


def details(item: SceneObject) -> str:
    """Square, place, size, mark and facing of an object: ``2/3, top left, small dotted facing up``.

    What questions compare, or what takes two words, comes first, at a fixed distance from the name before it.
    """
    facing = f" facing {item.facing}" if item.directed else ""
    return f"{square(item)}, {item.cell}, {item.size} {item.mark}{facing}"


def inventory(scene: Scene) -> list[str]:
    """All there is to say about every object, from left to right: ``red star: 1/5, left, small dotted facing up``."""
    return [f"{item.name}: {details(item)}" for item in sorted(scene.objects, key=lambda item: item.x)]


def notes(scene: Scene) -> tuple[list[str], list[str]]:
    """Write all there is to say about a scene as notes.

    Every question can be answered by looking up one of them by name, or by comparing the squares of two.

    Returns:
        The ground, then the inventory, then the largest object if one is clearly larger; and, separately, the number
        of objects in each group.
    """
    things = [f"{with_article(scene.ground.name)} ground", *inventory(scene)]
    largest = scene.largest()
    if largest and len(scene.objects) > 1:
        things.append(f"largest object: {details(largest)}, {largest.name}")
    return things, [f"{name} {count}" for name, count in _tally(scene).items()]


def _single_names(scene: Scene) -> list[str]:
    """Name objects with a unique shape or colour by that alone: ``star: red``, ``red object: star``."""
    told = []
    for item in scene.objects:
        if scene.count(shape=item.shape) == 1:
            told.append(f"{item.shape}: {item.colour}")
        if scene.count(colour=item.colour) == 1:
            told.append(f"{item.colour} object: {item.shape}")
    return told


def description(scene: Scene) -> str:
    """Describe a scene so completely that every question about it can be answered from the text alone."""
    (ground, *things), numbers = notes(scene)
    return ". ".join([ground, ", ".join(numbers), *things, *_single_names(scene)]) + "."
