"""``lavis-xformer attend``: where a model looks, drawn on the image; with a text, which regions support the text.

    lavis-xformer attend photo.jpg --type FOLDER --question "how many cups are there?"
    lavis-xformer attend photo.jpg --type FOLDER --model xformer --text "a cup beside a plate"

FOLDER was written by ``lavis-xformer export``. Without an image, scenes of the test split are used.
"""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lavis_xformer.arguments import at_least, command_parser
from lavis_xformer.errors import UserError, first_line

ENLARGED = 256  # side of a drawn image in pixels
CHARACTERS = 52  # per line of a title


class Row(NamedTuple):
    """An image and the maps drawn over it."""

    title: str
    picture: Any  #: a PIL image
    maps: Mapping[str, Any]  #: source to tensor (side, side)


def main(argv: Sequence[str]) -> int:
    """Run the command; return its exit status."""
    args = _arguments(argv)
    import lavis_xformer
    from lavis_xformer.models.attention_maps import attention_maps

    _check(args)
    model: Any
    model, vis, _ = lavis_xformer.load_model_and_preprocess(args.model, args.type, is_eval=True, device=args.device)
    rows: list[Row] = []
    for name, picture in _pictures(args.images, args.scenes):
        samples = {"image": vis["eval"](picture).unsqueeze(0).to(model.device), **_texts(args)}
        if args.question and not args.answer:
            samples["answer"] = model.predict_answers(samples)
        maps = {source: found[0] for source, found in attention_maps(model, samples, layer=args.layer).items()}
        title = " ".join([f"{name}:", *samples.get("text_input", ["all queries"]), *samples.get("answer", [])])
        print(title)
        rows.append(Row(title, picture, {source: found.mean(dim=0) for source, found in maps.items()}))
        for query in args.queries:
            rows.append(Row(f"{name}: query {query}", picture, _of_query(maps, query)))
    draw(rows, args.out)
    print(f"drawn     {args.out}")
    return 0


def draw(rows: Sequence[Row], path: Path) -> None:
    """Draw each image beside its maps, each map from 0 to its own maximum.

    Raises:
        UserError: the file can't be written.
    """
    from matplotlib.figure import Figure
    from PIL.Image import Resampling

    columns = 1 + len(rows[0].maps)
    figure = Figure(figsize=(3 * columns, 3.3 * len(rows)), layout="constrained")
    for number, (title, picture, maps) in enumerate(rows):
        shown = picture.convert("RGB").resize((ENLARGED, ENLARGED), Resampling.BICUBIC)
        for column, source in enumerate([None, *maps]):
            axes = figure.add_subplot(len(rows), columns, number * columns + column + 1)
            axes.axis("off")
            axes.imshow(shown if source is None else shown.convert("L"), cmap="gray")
            if source is None:
                lines = textwrap.fill(title, CHARACTERS)
                axes.set_title(lines.replace("$", r"\$"), fontsize=9, loc="left")  # no formulas
                continue
            axes.set_title(source, fontsize=9)
            extent = (0, ENLARGED, ENLARGED, 0)
            axes.imshow(maps[source].cpu(), cmap="inferno", alpha=0.65, vmin=0, extent=extent, interpolation="bilinear")
    try:
        figure.savefig(path, dpi=110, format=path.suffix[1:] or "png")
    except (OSError, ValueError) as error:
        raise UserError(f"--out {path}: {error}") from error


def _arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = command_parser("attend", __doc__)
    parser.add_argument("images", nargs="*", type=Path, help="photos (default: scenes)")
    parser.add_argument("--model", default="xformer_opt", help="xformer, xformer_opt, ... (default: %(default)s)")
    parser.add_argument("--type", help="one of the model's types, or an exported folder (default: mini)")
    parser.add_argument("--text", help="a caption: show which regions support it")
    parser.add_argument("--question", help="stage 2: show which regions support the answer to it")
    parser.add_argument("--answer", help="answer to the question (default: the model's own)")
    parser.add_argument("--queries", type=int, nargs="+", default=[], help="also draw each of these, from 0")
    parser.add_argument("--layer", type=int, default=-1, help="Q-Former layer attending to C, by index (default: last)")
    parser.add_argument("--scenes", type=at_least(1), default=3, help="scenes drawn if no image is given (default: 3)")
    parser.add_argument("--device", default="cpu", help="where to run (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("attention.png"), help="output file (default: %(default)s)")
    args = parser.parse_args(argv)
    if "" in (args.text, args.question, args.answer):
        parser.error("--text, --question and --answer can't be empty; leave them out")
    if args.text and args.question:
        parser.error("--text or --question, not both")
    if args.answer and not args.question:
        parser.error("--answer needs a --question")
    return args


def _check(args: argparse.Namespace) -> None:
    """Reject a model without such maps, or one that can't answer, before any weights are loaded."""
    import torch

    from lavis_xformer import register
    from lavis_xformer.config.load import find
    from lavis_xformer.models.base import XFormerBase
    from lavis_xformer.models.generation import GenerativeModel

    try:
        torch.empty(0, device=args.device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {args.device}: {first_line(error)}") from error
    if not (folder := args.out.absolute().parent).is_dir():
        raise UserError(f"--out {args.out}: there is no folder {folder}")
    register()
    cls = find("model", args.model, "--model")
    if not issubclass(cls, XFormerBase):
        raise UserError(f"--model {args.model} is not of this package; ours with fusion: none load BLIP-2's weights")
    if args.question and not issubclass(cls, GenerativeModel):
        raise UserError(f"--question: {args.model} can't answer questions; give a --text, or use a stage-2 model")


def _pictures(files: Sequence[Path], scenes: int) -> list[tuple[str, Any]]:
    """Names and PIL images: of the files, or of ``scenes`` scenes if there are none."""
    from lavis_xformer.data.photos import open_photo

    if files:
        return [(path.name, open_photo(path)) for path in files]
    from PIL import Image

    from lavis_xformer.data.scenes import make_scene, render

    return [(f"scene {index}", Image.fromarray(render(make_scene(0, "test", index)))) for index in range(scenes)]


def _texts(args: argparse.Namespace) -> dict[str, list[str]]:
    given = {"text_input": args.text or args.question, "answer": args.answer}
    return {name: [text] for name, text in given.items() if text}


def _of_query(maps: Mapping[str, Any], query: int) -> dict[str, Any]:
    """One query's maps, from maps (Q, side, side)."""
    count = min(len(found) for found in maps.values())
    if not 0 <= query < count:
        raise UserError(f"--queries {query}: the model has queries 0 to {count - 1}")
    return {source: found[query] for source, found in maps.items()}
