"""Questions about a scene with their answers, and how many of them a blind guesser would get right.

Every answer is one that the picture shows clearly: directions and places near a border, sizes that hardly
differ, and objects that a name does not single out are never asked about.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

from numpy.random import Generator

from lavis_xformer.data.scenes.text import details, drawn_relation, inventory, pick, shuffled, square
from lavis_xformer.data.scenes.words import (
    COLOURS,
    COLUMNS,
    FACINGS,
    MARKS,
    ROWS,
    SHAPES,
    SIZES,
    plural,
    with_article,
)
from lavis_xformer.data.scenes.world import CELL_BORDERS, Scene, SceneObject, visible_shares
from lavis_xformer.errors import one_of

#: how far from the border of a cell an object must be for its place to be asked about
CELL_MARGIN = 0.03

#: share of an object that must be visible for its mark or facing to be asked about
DETAIL_VISIBLE = 0.93

_NAMES = {"a", "an", *COLOURS, *SHAPES, *map(plural, SHAPES)}


@dataclass(frozen=True)
class Question:
    """A question, its answer (one to three words or a digit) and its kind."""

    kind: str
    text: str
    answer: str


def _count(scene: Scene, rng: Generator) -> Question | None:
    texts = ("how many objects are there?", "how many objects are in the image?", "what is the number of objects?")
    return Question("count", pick(rng, texts), str(len(scene.objects)))


def _group_names(scene: Scene) -> dict[str, int]:
    """Number of objects under every name of a group: shape, colour and shape, or colour."""
    numbers: Counter[str] = Counter()
    for item in scene.objects:
        numbers.update((item.shape, item.name, f"{item.colour} object"))
    return dict(sorted(numbers.items()))


def _count_group(scene: Scene, rng: Generator) -> Question | None:
    """Ask for a number that is drawn first, larger ones more often, so that 1 does not dominate."""
    if len(scene.objects) == 1:
        return None
    numbers = _group_names(scene)
    wanted = pick(rng, [number for number in sorted(set(numbers.values())) for _ in range(number)])
    name = pick(rng, [name for name, number in numbers.items() if number == wanted])
    texts = (f"how many {plural(name)} are there?", f"how many {plural(name)} are in the image?")
    return Question("count_group", pick(rng, texts), str(wanted))


def _absent(scene: Scene, rng: Generator) -> str:
    """Name something that is not there: a shape, a colour, or both as a near miss of what is there."""
    shapes = {item.shape for item in scene.objects}
    colours = {item.colour for item in scene.objects}
    form = rng.integers(3)
    if form == 0:
        return pick(rng, [shape for shape in SHAPES if shape not in shapes])
    if form == 1:
        return pick(rng, [f"{colour} object" for colour in COLOURS if colour not in colours])
    near = [
        f"{colour} {shape}"
        for colour in COLOURS
        for shape in SHAPES
        if (colour, shape) not in scene.groups() and (colour in colours or shape in shapes)
    ]
    return pick(rng, near)


def _presence(scene: Scene, rng: Generator) -> Question | None:
    """GVT-bench's form of multi-class identification."""
    if rng.random() < 0.5:
        return Question("presence", f"does {with_article(_absent(scene, rng))} exist in the image?", "no")
    item = pick(rng, scene.objects)
    name = (item.shape, f"{item.colour} object", item.name)[int(rng.integers(3))]
    return Question("presence", f"does {with_article(name)} exist in the image?", "yes")


def _attribute(scene: Scene, rng: Generator) -> Question | None:
    """Colour or shape of the largest object, size of a named one, colour of the only one of its shape."""
    options = []
    largest = scene.largest()
    if largest is not None and len(scene.objects) > 1:
        options.append(("what colour is the largest object?", largest.colour))
        options.append(("what shape is the largest object?", largest.shape))
    for item in scene.singles():
        options.append((f"what size is the {item.name}?", item.size))
        if scene.count(shape=item.shape) == 1:
            options.append((f"what colour is the {item.shape}?", item.colour))
        if scene.count(colour=item.colour) == 1:
            options.append((f"what shape is the {item.colour} object?", item.shape))
    return Question("attribute", *pick(rng, options)) if options else None


def _uncovered(scene: Scene) -> list[SceneObject]:
    """The objects that are almost fully visible, so that no detail hides behind another object."""
    shares = visible_shares(scene.objects)
    return [o for o, share in zip(scene.objects, shares, strict=True) if share >= DETAIL_VISIBLE]


def _of_one(
    scene: Scene, rng: Generator, among: Sequence[SceneObject], put: Callable[[SceneObject, str], Question]
) -> Question | None:
    """Ask about one of the objects with an unambiguous name; ``put`` makes the question from it and its name."""
    asked = [put(item, item.name) for item in scene.singles() if item in among]
    largest = scene.largest()
    if largest in among and largest is not None and len(scene.objects) > 1:
        asked += [put(largest, "largest object")] * max(1, len(asked))
    return pick(rng, asked) if asked else None


def _mark(scene: Scene, rng: Generator) -> Question | None:
    """The fine mark of the largest or of a named object."""
    return _of_one(
        scene, rng, _uncovered(scene), lambda o, name: Question("mark", f"what mark has the {name}?", o.mark)
    )


def _facing(scene: Scene, rng: Generator) -> Question | None:
    """Which way the largest or a named object faces, if that is visible."""
    directed = [item for item in _uncovered(scene) if item.directed]
    return _of_one(
        scene, rng, directed, lambda o, name: Question("facing", f"which way does the {name} face?", o.facing)
    )


def _relation(scene: Scene, rng: Generator) -> Question | None:
    """On which side of a named object another one lies, given two sides to choose from.

    Never a yes/no question such as "is it left of": its answer is the parity of the side asked for and the true one,
    which a language model of a million weights did not learn in hours (docs/mini_world.md).
    """
    drawn = drawn_relation(scene, rng)
    if drawn is None:
        return None
    first, true, second = drawn
    sides = "left or right of" if true in ("left of", "right of") else "above or below"
    return Question("relation", f"is the {first.name} {sides} the {second.name}?", true.removesuffix(" of"))


def _clearly_placed(item: SceneObject) -> bool:
    return all(abs(v - border) >= CELL_MARGIN for v in (item.x, item.y) for border in CELL_BORDERS)


def _position(scene: Scene, rng: Generator) -> Question | None:
    """In which of the nine cells the largest or a named object lies."""
    placed = [item for item in scene.objects if _clearly_placed(item)]
    return _of_one(scene, rng, placed, lambda o, name: Question("position", f"where is the {name}?", o.cell))


KINDS: dict[str, Callable[[Scene, Generator], Question | None]] = {
    "count": _count,
    "count_group": _count_group,
    "presence": _presence,
    "attribute": _attribute,
    "mark": _mark,
    "facing": _facing,
    "relation": _relation,
    "position": _position,
}
QUESTION_KINDS = tuple(KINDS)


#: every possible answer to a question of these kinds
ANSWERS = sorted(
    {"yes", "no", "above", "below", "middle", *map(str, range(1, 10))}
    | {*COLOURS, *SHAPES, *SIZES, *MARKS, *FACINGS}
    | {f"{row} {column}".strip() for row in ROWS for column in COLUMNS if row or column}
)


def ask(scene: Scene, rng: Generator, kind: str) -> Question | None:
    """Ask one question of a kind; None where the scene allows none.

    Raises:
        UserError: there is no such kind.
    """
    return KINDS[one_of("question kind", kind, KINDS)](scene, rng)


def questions(
    scene: Scene, rng: Generator, kinds: Sequence[str] = QUESTION_KINDS, n: int | None = None
) -> list[Question]:
    """Ask about a scene.

    Args:
        scene: what is asked about.
        rng: decides what is asked and how.
        kinds: which kinds, in turn; those that the scene does not allow are skipped.
        n: how many questions; one of each kind if None.

    Returns:
        Up to ``n`` questions, all different (fewer where the scene does not allow more).

    Raises:
        UserError: there is no such kind.
    """
    wanted = len(kinds) if n is None else n
    found: dict[str, Question] = {}
    for turn in range(6):
        order = kinds if n is None and turn == 0 else shuffled(rng, kinds)
        for kind in order:
            question = ask(scene, rng, kind) if len(found) < wanted else None
            if question is not None:
                found.setdefault(question.text, question)
        if n is None or len(found) >= wanted:
            break
    return list(found.values())


def details_asked(scene: Scene, rng: Generator, n: int) -> list[Question]:
    """Ask for all details of up to ``n`` objects with an unambiguous name; for training only."""
    nameable = [(item.name, item) for item in scene.singles()]
    largest = scene.largest()
    if largest and len(scene.objects) > 1:
        nameable.append(("largest object", largest))
    return [Question("details", f"what is the {name}?", details(item)) for name, item in shuffled(rng, nameable)[:n]]


def squares_asked(scene: Scene, rng: Generator) -> list[Question]:
    """Ask on which squares up to three named objects lie, one by one and in pairs; for language models only."""
    items = shuffled(rng, scene.singles())[:3]
    found = [(f"on which square is the {item.name}?", square(item)) for item in items]
    for first, second in pairwise(items):
        text = f"on which squares are the {first.name} and the {second.name}?"
        found.append((text, f"{square(first)} {square(second)}"))
    return [Question("square", *asked) for asked in found]


def inventory_asked(scene: Scene) -> Question:
    """Ask for all details of all objects; for training only."""
    return Question("inventory", "what objects are there?", ". ".join(inventory(scene)))


class Guess(NamedTuple):
    """What a guesser without the picture gets right in a kind of question."""

    answer: str  #: the kind's most frequent (majority-class) answer
    share: float  #: accuracy of always giving that answer
    worded: float  #: accuracy of giving the most frequent answer to each wording, with names left out


def majority_share(asked: Iterable[Question]) -> dict[str, Guess]:
    """The best blind guess for each kind, and the share of questions that it answers."""
    kinds: defaultdict[str, list[Question]] = defaultdict(list)
    for question in asked:
        kinds[question.kind].append(question)
    return {kind: _guess(those) for kind, those in kinds.items()}


def _guess(asked: Sequence[Question]) -> Guess:
    wordings: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for question in asked:
        wordings[" ".join(word for word in question.text.split() if word.rstrip("?") not in _NAMES)][
            question.answer
        ] += 1
    answer, times = sum(wordings.values(), Counter[str]()).most_common(1)[0]
    worded = sum(max(answers.values()) for answers in wordings.values())
    return Guess(answer, times / len(asked), worded / len(asked))
