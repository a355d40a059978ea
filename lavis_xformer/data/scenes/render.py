"""Paint a scene: ground, clutter, objects one over the other, pixel noise.

S: side of the picture in pixels.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from lavis_xformer.data.scenes.sprites import Floats
from lavis_xformer.data.scenes.world import Ground, Scene, SceneObject

#: how much darker the outline of an object is
OUTLINE = 0.5


def render(scene: Scene, size: int = 64) -> NDArray[np.uint8]:
    """Paint a scene.

    Args:
        scene: what to paint.
        size: S.

    Returns:
        RGB picture (S, S, 3); the same scene and size give the same picture.
    """
    rng = np.random.default_rng(scene.ground.grain)
    canvas = _paint_ground(scene.ground, size, rng)  # (S, S, 3)
    _paint_clutter(canvas, scene.ground, rng)
    for item in scene.objects:
        _paint_object(canvas, item)
    canvas += rng.standard_normal((size, size, 1), dtype=np.float32) * scene.ground.noise
    return np.clip(canvas, 0, 255, out=canvas).astype(np.uint8)


@lru_cache(maxsize=8)
def _axes(size: int) -> tuple[Floats, Floats]:
    """Columns (1, S) and rows (S, 1) as fractions of the side."""
    axis = ((np.arange(size) + 0.5) / size).astype(np.float32)
    return axis[None], axis[:, None]


def _wave(along: Floats, sharpness: float = 4.0) -> Floats:
    """A smooth-edged square wave in [0, 1] of period 1."""
    return np.clip(0.5 + sharpness * 0.5 * np.sin(2 * np.pi * along), 0, 1)


def _pattern(ground: Ground, size: int, rng: Generator) -> Floats:
    """Share of the light tint in each pixel, (S, S) or broadcastable to it."""
    x, y = _axes(size)
    u = np.cos(ground.angle) * x + np.sin(ground.angle) * y
    v = np.cos(ground.angle) * y - np.sin(ground.angle) * x
    along, across = u / ground.period + ground.phase, v / ground.period + ground.phase
    match ground.name:
        case "shaded":
            return (u - u.min()) / (u.max() - u.min())
        case "striped":
            return _wave(along)
        case "checked":
            return np.abs(_wave(along / 2) - _wave(across / 2))
        case "wavy":
            return _wave(along + 0.35 * np.sin(2 * np.pi * across / 2))
        case "speckled":
            return np.clip(4 * np.sin(2 * np.pi * along) * np.sin(2 * np.pi * across) - 1.6, 0, 1)
        case "grainy":
            coarse = rng.random((size // 4 + 1, size // 4 + 1), dtype=np.float32)
            return coarse.repeat(4, axis=0).repeat(4, axis=1)[:size, :size]
        case _:
            return np.full((1, 1), ground.phase, np.float32)


def _paint_ground(ground: Ground, size: int, rng: Generator) -> Floats:
    """Mix the two tints by the pattern into a new canvas (S, S, 3)."""
    light, dark = np.array(ground.light, np.float32), np.array(ground.dark, np.float32)
    share = np.broadcast_to(_pattern(ground, size, rng), (size, size))
    return dark + share[..., None] * (light - dark)


@lru_cache(maxsize=64)
def _stroke(side: int, direction: int) -> Floats:
    """A soft thin stroke through the middle of a (side, side) square, in one of eight directions."""
    axis = np.arange(side) - (side - 1) / 2
    angle = np.pi * direction / 8
    offset = axis[:, None] * np.cos(angle) - axis[None] * np.sin(angle)
    reach = axis[:, None] ** 2 + axis[None] ** 2 <= (side / 2) ** 2
    return (np.clip(side / 10 + 0.5 - np.abs(offset), 0, 1) * reach).astype(np.float32)


def _paint_clutter(canvas: Floats, ground: Ground, rng: Generator) -> None:
    """Scatter short grey strokes, lighter and darker than the ground."""
    size = len(canvas)
    places = rng.random((ground.clutter, 4))
    for x, y, turn, shade in places:
        side = max(2, round(size * (0.05 + 0.05 * shade)))
        top, left = int(y * (size - side)), int(x * (size - side))
        stroke = _stroke(side, int(8 * turn)) * (-45.0 if turn < 0.5 else 45.0)
        canvas[top : top + side, left : left + side] += stroke[..., None]


def _paint_object(canvas: Floats, item: SceneObject) -> None:
    """Lay an object over the canvas."""
    size = len(canvas)
    top, left, side = item.box(size)
    layers = item.sprite(size)
    body, ink = np.array(item.rgb, np.float32), np.array(item.ink, np.float32)
    paint = body + layers.ink[..., None] * (ink - body)  # (D, D, 3)
    paint *= (1 - OUTLINE * layers.edge)[..., None]
    patch = canvas[top : top + side, left : left + side]
    patch += layers.alpha[..., None] * (paint - patch)
