"""Small anti-aliased pictures of single objects, drawn once per form and cached.

A shape is an outline (V, 2) of points in the unit disc, x to the right, y upwards, facing up. A mark is a
region of the shape that is inked (or, for the notch, cut off). Both are drawn FINE times too large and averaged.

D: side of the sprite in pixels.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

Floats = NDArray[np.float32]
Mask = NDArray[np.bool_]

FINE = 4  # supersampling factor per side


class Sprite(NamedTuple):
    """Layers of one object, each (D, D) in [0, 1]."""

    alpha: Floats  # how much of the pixel the object covers
    ink: Floats  # how much of the covered part carries the mark
    edge: Floats  # how much of the covered part is outline


def _arc(start: float, stop: float, radius: float, centre: float = 0.0) -> NDArray[np.float64]:
    """Points of a circle around (0, centre) between two angles, in degrees."""
    angles = np.radians(np.linspace(start, stop, 48))
    return np.stack([radius * np.cos(angles), centre + radius * np.sin(angles)], axis=1)


def _star() -> NDArray[np.float64]:
    angles = np.radians(90 + 36 * np.arange(10))
    radii = np.where(np.arange(10) % 2 == 0, 1.0, 0.5)
    return np.stack([radii * np.cos(angles), radii * np.sin(angles)], axis=1)


def _heart() -> NDArray[np.float64]:
    t = np.linspace(0, 2 * np.pi, 64)
    x = 16 * np.sin(t) ** 3
    y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
    return np.stack([x / 17, (y + 2.5) / 17], axis=1)


def _moon() -> NDArray[np.float64]:
    """A crescent open upwards: a disc minus another disc above it."""
    outer, inner, lift = 0.97, 0.72, 0.62
    crossing = (outer**2 - inner**2 + lift**2) / (2 * lift)
    tip = float(np.degrees(np.arcsin(crossing / outer)))
    inner_tip = float(np.degrees(np.arcsin((crossing - lift) / inner)))
    return np.concatenate([_arc(180 - tip, 360 + tip, outer), _arc(inner_tip, -180 - inner_tip, inner, lift)])


_CROSS = [(1, 3), (1, 1), (3, 1), (3, -1), (1, -1), (1, -3)]
OUTLINES: dict[str, NDArray[np.float64]] = {
    "circle": _arc(0, 360, 0.9),
    "square": np.array([(-0.74, -0.74), (-0.74, 0.74), (0.74, 0.74), (0.74, -0.74)]),
    "triangle": np.array([(0, 0.98), (0.9, -0.62), (-0.9, -0.62)]),
    "star": _star(),
    "heart": _heart(),
    "moon": _moon(),
    "arrow": np.array(
        [(0, 1), (0.85, 0.05), (0.36, 0.05), (0.36, -0.95), (-0.36, -0.95), (-0.36, 0.05), (-0.85, 0.05)]
    ),
    "cross": np.array(_CROSS + [(-x, -y) for x, y in _CROSS]) * 0.31,
}


def _area(outline: NDArray[np.float64]) -> float:
    """Area of a polygon as a share of the square around the unit disc (shoelace formula)."""
    x, y = outline.T
    return float(abs(x @ np.roll(y, 1) - y @ np.roll(x, 1))) / 8


AREAS = {shape: _area(outline) for shape, outline in OUTLINES.items()}


def _rotate(points: NDArray[np.float64], degrees: float) -> NDArray[np.float64]:
    """Turn points (..., 2) clockwise about the origin."""
    angle = np.radians(degrees)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    return points @ turn


def _fill(outline: NDArray[np.float64], side: int) -> Mask:
    """Rasterise an outline into a (side, side) mask."""
    picture = Image.new("L", (side, side))
    pixels = (outline * [1, -1] + 1) * side / 2
    ImageDraw.Draw(picture).polygon([(float(x), float(y)) for x, y in pixels], fill=255)
    return np.asarray(picture) > 0


def _erode(mask: Mask, width: int) -> Mask:
    """Take ``width`` pixels off the border of a mask."""
    picture = Image.fromarray(np.pad(mask, width).astype(np.uint8) * 255)
    eroded = np.asarray(picture.filter(ImageFilter.BoxBlur(width))) > 253
    return eroded[width:-width, width:-width]


def _local(side: int, degrees: float) -> NDArray[np.float64]:
    """Coordinates (side, side, 2) of each fine pixel in the frame of an object turned by ``degrees``."""
    axis = (np.arange(side) + 0.5) / side * 2 - 1
    return _rotate(np.stack(np.meshgrid(axis, -axis), axis=-1), -degrees)


def _bite(body: Mask, frame: NDArray[np.float64]) -> Mask:
    """A disc around the point of the border that is nearest to the lower right flank, in the object's own frame."""
    border = body & ~_erode(body, 1)
    away = np.where(border, ((frame - (0.5, -0.35)) ** 2).sum(-1), np.inf)
    centre = frame.reshape(-1, 2)[int(away.argmin())]
    return ((frame - centre) ** 2).sum(-1) < 0.38**2


def _inked(mark: str, body: Mask, frame: NDArray[np.float64]) -> Mask:
    """The part of the body that carries ink."""
    x, y = frame[..., 0], frame[..., 1]
    if mark == "dotted":
        pitch = 0.62
        row = np.floor(y / pitch + 0.5)
        column = np.abs((x / pitch + 0.5 * (row % 2)) % 1 - 0.5)
        return ((column - 0.5) ** 2 + (y / pitch - row) ** 2) < 0.3**2
    if mark == "striped":
        return (x + y) / 0.72 % 1 < 0.45
    if mark == "rimmed":
        return ~_erode(body, max(1, round(0.085 * len(body))))
    if mark == "split":
        return x < np.median(x[body])
    return np.zeros_like(body)


def _average(fine: Mask, side: int) -> Floats:
    """Average blocks of FINE x FINE samples into a (side, side) layer."""
    return fine.reshape(side, FINE, side, FINE).mean(axis=(1, 3)).astype(np.float32)


@lru_cache(maxsize=8192)  # all forms at 64 pixels; at 224 pixels all would take 1.6 GB
def sprite(shape: str, mark: str, side: int, degrees: int) -> Sprite:
    """Draw one object.

    Args:
        shape: a name of :data:`OUTLINES`.
        mark: ``plain``, ``dotted``, ``striped``, ``notched``, ``rimmed`` or ``split``.
        side: D, in pixels.
        degrees: how far it is turned clockwise from facing up.

    Returns:
        Its layers, shared by all callers: read only.
    """
    fine = side * FINE
    body = _fill(_rotate(OUTLINES[shape], degrees), fine)
    frame = _local(fine, degrees)
    if mark == "notched":
        body = body & ~_bite(body, frame)
    edge = body & ~_erode(body, FINE // 2)
    layers = [_average(layer, side) for layer in (body, body & _inked(mark, body, frame), edge)]
    cover = np.maximum(layers[0], 1e-6)
    drawn = Sprite(layers[0], layers[1] / cover, layers[2] / cover)
    for layer in drawn:
        layer.flags.writeable = False
    return drawn
