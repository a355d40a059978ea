"""``lavis-xformer scenes``: a contact sheet of enlarged scenes, each with a caption and two questions with answers."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from lavis_xformer.arguments import at_least, command_parser
from lavis_xformer.data.scenes.qa import QUESTION_KINDS, majority_share, questions
from lavis_xformer.data.scenes.render import render
from lavis_xformer.data.scenes.text import LEVELS, captions
from lavis_xformer.data.scenes.world import PRESETS, Scene, make_scene, scene_rng
from lavis_xformer.errors import UserError

INK, SOFT, ANSWER, PAPER, CARD = "#20242c", "#727987", "#0a7050", "#e9ebef", "#ffffff"
SIDE = 64  # pixels of a scene, as the encoders of the mini world see it
ZOOM = 4  # pixels of the sheet per pixel of a scene
GAP = 16
COLUMNS, ROWS = 5, 3
LINE = 17
TEXT_LINES = 14  # room for the longest texts; what no card needs is cropped
HEADER = 64


@lru_cache
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """PIL's own font, so that a sheet looks the same on every machine."""
    return ImageFont.load_default(size)


def _wrap(text: str, width: int) -> list[str]:
    """Break a text into lines of at most ``width`` pixels."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if _font(14).getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines


def _write(draw: ImageDraw.ImageDraw, top: int, text: str, answer: str = "") -> int:
    """Write a text and its answer from ``top`` downwards; return where the next one starts."""
    left, width = GAP // 2, SIDE * ZOOM
    lines = _wrap(text, width)
    for number, line in enumerate(lines):
        draw.text((left, top + number * LINE), line, INK, _font(14))
    top += len(lines) * LINE
    if answer:
        end = _font(14).getlength(lines[-1] + "  ")
        fits = end + _font(14).getlength(answer) <= width
        at = (left + end, top - LINE) if fits else (left, top)
        draw.text(at, answer, ANSWER, _font(14), stroke_width=0.4, stroke_fill=ANSWER)
        top += 0 if fits else LINE
    return top + GAP // 2


def _card(scene: Scene, level: str) -> tuple[Image.Image, int]:
    """One scene, enlarged without smoothing, with its caption and questions; and where the text ends."""
    side = SIDE * ZOOM
    card = Image.new("RGB", (side + GAP, side + GAP + TEXT_LINES * LINE), CARD)
    picture = Image.fromarray(render(scene, SIDE)).resize((side, side), Image.Resampling.NEAREST)
    card.paste(picture, (GAP // 2, GAP // 2))
    draw = ImageDraw.Draw(card)
    draw.text((GAP // 2, side + GAP), f"{level} caption", SOFT, _font(12))
    top = _write(draw, side + GAP + LINE - 2, captions(scene, level, 1)[0])
    rng = scene_rng(scene.seed, scene.split, scene.index, 3)
    for asked in questions(scene, rng, n=2):
        top = _write(draw, top, asked.text, asked.answer)
    return card, top


def contact_sheet(preset: str, seed: int, path: str | Path, split: str = "train") -> None:
    """Draw the first scenes of a split, captions going from coarse to fine in turn.

    Args:
        preset: a name of :data:`lavis_xformer.data.scenes.PRESETS`.
        seed: of the world.
        path: where the picture goes; its extension decides the format.
        split: whose scenes.

    Raises:
        UserError: there is no such preset, or ``path`` can't be written.
    """
    levels = list(LEVELS)
    cards = [
        _card(make_scene(seed, split, index, preset), levels[index % len(levels)]) for index in range(COLUMNS * ROWS)
    ]
    side, tall = cards[0][0].width, max(bottom for _, bottom in cards)
    width, height = side + GAP, tall + GAP
    sheet = Image.new("RGB", (COLUMNS * width + GAP, ROWS * height + GAP + HEADER), PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((GAP, 10), f"Scenes, preset '{preset}'", INK, _font(26))
    note = f"{split} split, seed {seed}; painted at {SIDE} x {SIDE} pixels, shown {ZOOM} times as large"
    draw.text((GAP, 44), note, SOFT, _font(14))
    for number, (card, _) in enumerate(cards):
        row, column = divmod(number, COLUMNS)
        sheet.paste(card.crop((0, 0, side, tall)), (GAP + column * width, HEADER + GAP + row * height))
    try:
        sheet.save(path)
    except (OSError, ValueError) as error:
        raise UserError(f"--out {path}: {error}") from error


def answer_table(preset: str, seed: int, split: str, scenes: int) -> str:
    """Return a line for each kind of question: its most frequent answer, that answer's share, and the share by wording.

    Args:
        preset: a name of :data:`lavis_xformer.data.scenes.PRESETS`.
        seed: of the world.
        split: whose scenes.
        scenes: number of scenes; every kind is asked once about each scene that allows it.
    """
    drawn = (make_scene(seed, split, index, preset) for index in range(scenes))
    asked = (one for scene in drawn for one in questions(scene, scene_rng(seed, split, scene.index, 3)))
    found = sorted(majority_share(asked).items(), key=lambda pair: QUESTION_KINDS.index(pair[0]))
    lines = [f"{kind:<12}{100 * of.share:6.1f} %{100 * of.worded:10.1f} %     {of.answer}" for kind, of in found]
    return "\n".join([f"{'':<14}share    by wording  most frequent answer", *lines])


def main(argv: Sequence[str]) -> int:
    """Run ``lavis-xformer scenes``; returns the exit status."""
    parser = command_parser("scenes", __doc__)
    parser.add_argument("--out", default="scenes.png", help="picture to write (default: %(default)s)")
    parser.add_argument("--preset", choices=list(PRESETS), default="standard", help="default: standard")
    parser.add_argument("--seed", type=at_least(0), default=0, help="seed of the world (default: 0)")
    parser.add_argument("--split", choices=("train", "val", "test"), default="train", help="default: train")
    parser.add_argument("--answers", type=at_least(1), metavar="N", help="count the answers about N scenes too")
    given = parser.parse_args(argv)
    contact_sheet(given.preset, given.seed, given.out, given.split)
    print(f"{given.out}: {COLUMNS * ROWS} scenes of preset '{given.preset}'")
    if given.answers:
        print(answer_table(given.preset, given.seed, given.split, given.answers))
    return 0
