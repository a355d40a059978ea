"""Retrieval metrics of a similarity matrix. I: images, T: captions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import comb
from typing import Any

import torch
from torch import Tensor

from lavis_xformer.tasks.rows import answer_row

KS = (1, 5, 10)


def ranks(similarity: Tensor, owners: Tensor) -> dict[str, Tensor]:
    """Return how many wrong candidates precede the best correct one, both ways; an image may have several captions.

    A wrong candidate with an equal or a NaN score counts as better, so that a collapsed model scores zero instead of
    chance.

    Args:
        similarity: (I, T).
        owners: (T,) row of the image that each caption belongs to.

    Returns:
        ``i2t`` (I,): number of other images' captions; ``t2i`` (T,): number of images that are not the caption's.
    """
    own = owners[None, :] == torch.arange(len(similarity))[:, None]  # (I, T)
    return {"i2t": _ranks(similarity, own), "t2i": _ranks(similarity.T, own.T)}


def recalls(found: Mapping[str, Tensor]) -> dict[str, float]:
    """Return R@1/5/10 both ways, in percent, from :func:`ranks`: how often a correct candidate is in the top k."""
    return {f"{way}_r{k}": 100.0 * (of < k).double().mean().item() for way, of in found.items() for k in KS}


def hits(better: Mapping[str, Tensor], owners: Tensor, names: Sequence[str]) -> list[dict[str, Any]]:
    """Return a row per image and per caption: whether a correct candidate ranks first, and the chance level.

    Args:
        better: how many wrong candidates rank above, or whether any does: ``i2t`` (I,) and ``t2i`` (T,).
        owners: (T,) row of the image that each caption belongs to.
        names: (I,) the images' names.
    """
    captions = torch.bincount(owners, minlength=len(names)) / len(owners)  # (I,)
    asked = {"i2t": (range(len(names)), captions.tolist()), "t2i": (owners.tolist(), len(owners) * [1 / len(names)])}
    return [
        answer_row(
            number,
            image=names[image],
            question=way,
            kind="retrieval",
            group=f"{way}_r1",
            correct=int(rank == 0),
            guess=guess,
        )
        for way, (images, guesses) in asked.items()
        for number, (image, guess, rank) in enumerate(zip(images, guesses, better[way].tolist(), strict=True))
    ]


def chance_recalls(owners: Tensor) -> dict[str, float]:
    """Return the expected value of ``recalls`` for random similarities, in percent."""
    captions = torch.bincount(owners).tolist()  # per image
    images, texts = len(captions), len(owners)
    figures = {}
    for k in KS:
        k_text = min(k, texts)
        misses = [comb(texts - own, k_text) / comb(texts, k_text) for own in captions]
        figures[f"i2t_r{k}"] = 100.0 * (1.0 - sum(misses) / images)
        figures[f"t2i_r{k}"] = 100.0 * min(1.0, k / images)
    return figures


def _ranks(similarity: Tensor, own: Tensor) -> Tensor:
    """Return (rows,) the number of wrong columns that do not score below the row's best correct one."""
    best = similarity.masked_fill(~own, float("-inf")).amax(dim=1, keepdim=True)
    return (~(similarity < best) & ~own).sum(dim=1)
