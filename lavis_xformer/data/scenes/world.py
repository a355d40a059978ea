"""What a scene is, how it is drawn from a seed, and what is true of it.

Lengths and positions are fractions of the picture's side; x grows to the right, y downwards.
"""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from lavis_xformer.data.scenes.sprites import AREAS, Sprite, sprite
from lavis_xformer.data.scenes.words import (
    COLOURS,
    COLUMNS,
    DIRECTED,
    FACINGS,
    GROUNDS,
    MARKS,
    ROWS,
    SHAPES,
    SIZES,
)
from lavis_xformer.errors import one_of

RGB = tuple[int, int, int]

#: where the picture is cut into left, middle and right (and top, middle, bottom) cells
CELL_BORDERS = (0.385, 0.615)
#: how far apart two centres must be along an axis for one to be left of, or above, the other
CLEARLY = 0.12
DIAMETERS = {"small": (0.165, 0.2), "medium": (0.245, 0.29), "large": (0.34, 0.44)}
FEW, MANY = np.array([0.1, 0.25, 0.65]), np.array([0.76, 0.2, 0.04])  # shares of the sizes with few and many objects
_REFERENCE = 64  # side of the grid on which visibility is measured


@dataclass(frozen=True)
class Preset:
    """Difficulty of a world, in numbers."""

    objects: tuple[int, int] = (1, 9)  # fewest and most objects; every number is equally likely
    kinds: int = 4  # maximum number of distinct (colour, shape) pairs in one scene
    overlap: float = 0.25  # share of the sum of two radii by which two objects may overlap
    visible: float = 0.7  # minimum share of every object that no later object covers
    marked: float = 0.8  # share of objects that carry a mark
    contrast: float = 0.75  # how far the ink of a mark is from its object's colour, 0 to 1
    jitter: float = 14.0  # maximum deviation of an object's colour from its name's, in grey levels
    noise: float = 5.0  # standard deviation of the pixel noise, in grey levels
    clutter: int = 12  # maximum number of grey strokes scattered on the ground
    grounds: tuple[str, ...] = GROUNDS


PRESETS = {
    "easy": Preset(
        objects=(1, 5), kinds=3, overlap=-0.05, visible=1.0, contrast=0.9, jitter=6.0, noise=2.0,
        clutter=0, grounds=("plain", "shaded", "striped"),
    ),
    "standard": Preset(),
    "fine": Preset(kinds=5, overlap=0.3, visible=0.65, contrast=0.5, jitter=18.0, noise=7.0, clutter=20),
}  # fmt: skip


@dataclass(frozen=True)
class SceneObject:
    """One object; ``x`` and ``y`` are its centre."""

    shape: str
    colour: str
    size: str
    mark: str
    facing: str
    x: float
    y: float
    diameter: float
    tilt: int  # small turn away from its facing, in degrees
    rgb: RGB
    ink: RGB

    @property
    def name(self) -> str:
        """Colour and shape, as in ``red circle``."""
        return f"{self.colour} {self.shape}"

    @property
    def cell(self) -> str:
        """Where it is: ``top left``, ``top``, ..., ``middle``, ..., ``bottom right``."""
        row, column = (int(np.searchsorted(CELL_BORDERS, v)) for v in (self.y, self.x))
        return f"{ROWS[row]} {COLUMNS[column]}".strip() or "middle"

    @property
    def directed(self) -> bool:
        """Whether it shows which way it faces."""
        return self.shape in DIRECTED

    @property
    def area(self) -> float:
        """The share of the picture that it would cover alone and without a notch."""
        return AREAS[self.shape] * self.diameter**2

    def box(self, size: int) -> tuple[int, int, int]:
        """Top, left and side of its square in a picture of ``size`` pixels."""
        side = max(2, round(self.diameter * size))
        top, left = (min(max(round(v * size - side / 2), 0), size - side) for v in (self.y, self.x))
        return top, left, side

    def sprite(self, size: int) -> Sprite:
        """Its layers in a picture of ``size`` pixels."""
        turn = 90 * FACINGS.index(self.facing) + self.tilt
        return sprite(self.shape, self.mark, self.box(size)[2], turn)


@dataclass(frozen=True)
class Ground:
    """The textured background and the clutter on it."""

    name: str
    light: RGB
    dark: RGB
    angle: float  # direction of the pattern, in radians
    period: float
    phase: float
    noise: float
    clutter: int
    grain: int  # seed of the grainy pattern, the clutter and the pixel noise


@dataclass(frozen=True)
class Scene:
    """A scene: its objects in the order in which they are drawn (later ones lie on top) and its ground."""

    objects: tuple[SceneObject, ...]
    ground: Ground
    seed: int
    split: str
    index: int
    preset: str

    def find(self, *, shape: str | None = None, colour: str | None = None) -> list[SceneObject]:
        """All objects with the given attributes."""
        return [o for o in self.objects if shape in (None, o.shape) and colour in (None, o.colour)]

    def count(self, *, shape: str | None = None, colour: str | None = None) -> int:
        """How many objects have the given attributes."""
        return len(self.find(shape=shape, colour=colour))

    def groups(self) -> Counter[tuple[str, str]]:
        """How many objects there are of each (colour, shape)."""
        return Counter((o.colour, o.shape) for o in self.objects)

    def singles(self) -> list[SceneObject]:
        """Objects that colour and shape identify uniquely."""
        groups = self.groups()
        return [o for o in self.objects if groups[o.colour, o.shape] == 1]

    def largest(self) -> SceneObject | None:
        """The object that is at least a third larger in area than any other and no narrower; None if there is none."""
        first, *rest = sorted(self.objects, key=lambda o: -o.area)
        clear = all(3 * first.area >= 4 * o.area and first.diameter >= o.diameter for o in rest)
        return first if clear else None


def relations(first: SceneObject, second: SceneObject) -> list[str]:
    """Where the first lies as seen from the second: any of ``left of``, ``right of``, ``above``, ``below``.

    Only clear relations (:data:`CLEARLY`) are returned, so the list may be empty.
    """
    dx, dy = first.x - second.x, first.y - second.y
    across = ["left of" if dx < 0 else "right of"] if abs(dx) >= CLEARLY else []
    along = ["above" if dy < 0 else "below"] if abs(dy) >= CLEARLY else []
    return across + along


def visible_shares(objects: Sequence[SceneObject], size: int = _REFERENCE) -> NDArray[np.float64]:
    """Share of each object's pixels that no later object covers (N,)."""
    owner = np.full((size, size), -1)
    areas = np.empty(len(objects))
    for number, item in enumerate(objects):
        top, left, side = item.box(size)
        mask = item.sprite(size).alpha > 0.5
        owner[top : top + side, left : left + side][mask] = number
        areas[number] = np.count_nonzero(mask)
    return np.bincount(owner[owner >= 0], minlength=len(objects)) / areas


def scene_rng(seed: int, split: str, index: int, *purpose: int) -> Generator:
    """A separate generator for each scene, and for each purpose other than drawing it."""
    return np.random.default_rng([seed, zlib.crc32(split.encode()), index, *purpose])


def make_scene(seed: int, split: str, index: int, preset: str = "standard") -> Scene:
    """Draw a scene.

    Args:
        seed: of the world, at least 0.
        split: any name; scenes of different splits come from different random streams.
        index: of the scene in its split, at least 0.
        preset: a name of :data:`PRESETS`.

    Returns:
        The scene; the same arguments give the same scene.

    Raises:
        UserError: there is no such preset.
    """
    rules = PRESETS[one_of("scene preset", preset, PRESETS)]
    rng = scene_rng(seed, split, index)
    number = int(rng.integers(rules.objects[0], rules.objects[1] + 1))
    looks = [_look(rng, kind, rules) for kind in _kinds(rng, number, rules)]
    objects = _arrange(rng, looks, rules)
    while objects is None or visible_shares(objects).min() < rules.visible:
        objects = _arrange(rng, looks, rules)
    return Scene(objects, _ground(rng, rules), seed, split, index, preset)


@dataclass(frozen=True)
class _Look:
    """Everything about an object except its size and place."""

    shape: str
    colour: str
    mark: str
    facing: str
    tilt: int
    rgb: RGB
    ink: RGB


def _rgb(values: NDArray[np.float64]) -> RGB:
    red, green, blue = (int(v) for v in np.clip(values, 0, 255))
    return red, green, blue


def _kinds(rng: Generator, number: int, rules: Preset) -> list[int]:
    """Draw the number of each object's (colour, shape): every kind drawn occurs once, and a few of them more often."""
    kinds = rng.integers(len(SHAPES) * len(COLOURS), size=min(rng.integers(1, rules.kinds + 1), number))
    weights = np.cumsum(rng.standard_exponential(len(kinds)) ** 2)
    more = np.searchsorted(weights, rng.random(number - len(kinds)) * weights[-1])
    chosen = np.concatenate([kinds, kinds[more]])
    rng.shuffle(chosen)
    return [int(kind) for kind in chosen]


def _look(rng: Generator, kind: int, rules: Preset) -> _Look:
    """Draw an object's attributes; ``kind`` numbers its (colour, shape)."""
    colour = list(COLOURS)[kind // len(SHAPES)]
    mark, facing, tilt = (int(v) for v in rng.integers((len(MARKS) - 1, len(FACINGS), 3)))
    pure = np.array(COLOURS[colour], float)
    body = np.clip(pure + rng.uniform(-rules.jitter, rules.jitter, 3), 0, 255)
    dark = pure @ (0.3, 0.59, 0.11) < 120
    ink = body + rules.contrast * ((255.0 if dark else 0.0) - body)
    return _Look(
        SHAPES[kind % len(SHAPES)],
        colour,
        MARKS[1 + mark] if rng.random() < rules.marked else MARKS[0],
        FACINGS[facing],
        10 * (tilt - 1),
        _rgb(body),
        _rgb(ink),
    )


def _arrange(rng: Generator, looks: Sequence[_Look], rules: Preset) -> tuple[SceneObject, ...] | None:
    """Give every object a size and a place; None if one does not fit.

    The more objects, the smaller they tend to be, so that the area they cover says little about their number.
    """
    share = min(max((len(looks) - 1) / 8 + rng.uniform(-0.4, 0.4), 0.0), 1.0)
    edges = np.cumsum((1 - share) * FEW + share * MANY)
    sizes = [SIZES[min(int(s), 2)] for s in np.searchsorted(edges, rng.random(len(looks)))]
    spans = np.array([DIAMETERS[size] for size in sizes])
    diameters = spans[:, 0] + rng.random(len(looks)) * (spans[:, 1] - spans[:, 0])
    centres = _places(rng, diameters, 1 - rules.overlap)
    if centres is None:
        return None
    return tuple(
        SceneObject(**vars(look), size=size, x=float(x), y=float(y), diameter=float(diameter))
        for look, size, diameter, (x, y) in zip(looks, sizes, diameters, centres, strict=True)
    )


def _places(
    rng: Generator, diameters: NDArray[np.float64], apart: float, tries: int = 24
) -> NDArray[np.float64] | None:
    """Centres (N, 2) at least ``apart`` times the sum of the radii from each other; None if not found."""
    centres = np.empty((len(diameters), 2))
    for number, diameter in enumerate(diameters):
        candidates = diameter / 2 + rng.random((tries, 2)) * (1 - diameter)  # (tries, 2)
        gaps = ((candidates[:, None] - centres[:number]) ** 2).sum(-1)  # (tries, number)
        least = (apart / 2 * (diameters[:number] + diameter)) ** 2
        free = np.flatnonzero((gaps >= least).all(axis=1))
        if not len(free):
            return None
        centres[number] = candidates[free[0]]
    return centres


def _ground(rng: Generator, rules: Preset) -> Ground:
    """Draw a ground of two muted tints."""
    level, step = rng.uniform(95, 205), rng.uniform(18, 40)
    tint = rng.uniform(-14, 14, 3)
    angle, period, phase = rng.random(3)
    return Ground(
        name=rules.grounds[int(rng.integers(len(rules.grounds)))],
        light=_rgb(level + step / 2 + tint),
        dark=_rgb(level - step / 2 + tint),
        angle=float(angle * np.pi),
        period=float(0.1 + 0.12 * period),
        phase=float(phase),
        noise=rules.noise,
        clutter=int(rng.integers(rules.clutter + 1)),
        grain=int(rng.integers(2**31)),
    )
