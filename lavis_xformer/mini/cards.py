"""Model cards of the mini models: what a reader needs to repeat them or to distrust them."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from pathlib import Path

from lavis_xformer.assets import sha256

INTENT = {
    "clip": "Frozen image encoder: LAVIS's EVA ViT, trained contrastively on captions that mostly say what is there, "
    "seldom how many or where, never the fine marks. The last block is dropped, as BLIP-2 reads it.",
    "mae": "Frozen image encoder and decoder: transformers' ViTMAE, trained by masked reconstruction on images alone.",
    "opt": "Frozen language model: transformers' OPT, trained on text alone; it has never seen an image.",
    "t5": "Frozen language model: transformers' T5, trained on text alone; it has never seen an image.",
    "bert": "Vocabulary and sizes of the Q-Former; it has no weights.",
}


@dataclass(frozen=True, kw_only=True)
class Card:
    """What the build knows about one part when it is done."""

    part: str
    command: str
    seed: int
    data: str
    steps: str
    seconds: float
    figures: dict[str, float]


def write_card(folder: Path, card: Card) -> None:
    """Write README.md beside the files of a part, with the checksum of each."""
    facts = {
        "command": f"`{card.command}`",
        "seed": card.seed,
        "data": card.data,
        "training": card.steps,
        "time": f"{card.seconds / 60:.1f} min",
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, shared",
    }
    lines = [f"# Mini {card.part}", "", INTENT[card.part], "", "| | |", "|---|---|"]
    lines += [f"| {name} | {value} |" for name, value in facts.items()]
    if card.figures:
        lines += ["", "| figure on held-out scenes | |", "|---|---|"]
        lines += [f"| {name} | {value:.4g} |" for name, value in card.figures.items()]
    lines += ["", "| file | sha256 |", "|---|---|"]
    files = sorted(path for path in folder.iterdir() if path.is_file() and path.suffix != ".md")
    lines += [f"| {path.name} | `{sha256(path)}` |" for path in files]
    (folder / "README.md").write_text("\n".join(lines) + "\n")
