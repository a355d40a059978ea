"""Model cards of the mini models: what a reader needs to reproduce or question them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from lavis_xformer.files import sha256
from lavis_xformer.markdown import table

INTENT = {
    "clip": "Frozen image encoder: LAVIS's EVA ViT, trained contrastively on captions that mostly say what is there, "
    "seldom how many or where, never the fine marks. The last block is dropped, as BLIP-2 reads it.",
    "mae": "Frozen image encoder and decoder: transformers' ViTMAE, trained by masked reconstruction on images alone.",
    "opt": "Frozen language model: transformers' OPT, trained on text alone; it has never seen an image.",
    "t5": "Frozen language model: transformers' T5, trained on text alone; it has never seen an image.",
    "bert": "Vocabulary and sizes of the Q-Former; it has no weights.",
}


def write_card(folder: Path, facts: Mapping[str, object], figures: Mapping[str, float]) -> None:
    """Write README.md beside the files of a part, with the facts of the build, its figures and each file's checksum."""
    files = sorted(path for path in folder.iterdir() if path.is_file() and path.suffix != ".md")
    parts = [f"# Mini {folder.name}", INTENT[folder.name], table(["", ""], facts.items())]
    if figures:
        measured = ((name, f"{value:.4g}") for name, value in figures.items())
        parts.append(table(["figure on held-out scenes", ""], measured))
    parts.append(table(["file", "sha256"], ((path.name, f"`{sha256(path)}`") for path in files)))
    (folder / "README.md").write_text("\n\n".join(parts) + "\n")
