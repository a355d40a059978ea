"""How much C and M change when an image loses its high or its low frequencies.

The paper says that CLIP keeps low and MAE high frequencies. A source that relies on low frequencies hardly changes
under a low-pass filter and changes a lot under a high-pass filter.

B: batch, P: patches + 1, D: width of a token, S: side of an image in pixels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lavis_xformer.mini.augment import unit
from lavis_xformer.probe.tokens import Encoder, Standardise, extract

#: cycles per image side; 64 pixels can represent up to 32, and 8 is one cycle per patch
CUTOFFS = (2, 4, 6, 8, 12, 16, 24)


def filtered(images: Tensor, cutoff: float, *, keep: str) -> Tensor:
    """Ideal filter: keep frequencies up to the cutoff, or those above it plus the mean.

    Args:
        images: uint8 (B, 3, S, S).
        cutoff: radius in cycles per side.
        keep: ``low`` or ``high``.

    Returns:
        uint8 (B, 3, S, S).
    """
    x = unit(images)
    side = x.shape[-1]
    axis = torch.fft.fftfreq(side) * side
    radius = (axis[:, None] ** 2 + axis[None] ** 2).sqrt()  # (S, S)
    mask = radius <= cutoff if keep == "low" else (radius > cutoff) | (radius == 0)
    x = torch.fft.ifft2(torch.fft.fft2(x) * mask).real
    return (255 * x.clamp(0, 1)).round().to(torch.uint8)


def similarity_curves(sources: dict[str, Encoder], images: Tensor) -> dict[str, dict[str, list[float]]]:
    """Cosine between patch tokens of images and of their filtered versions, minus each patch's mean over images.

    Otherwise the position, which every token carries and no filter removes, would count as preserved content.

    Args:
        sources: name to encoder.
        images: uint8 (B, 3, S, S).

    Returns:
        ``{"cutoffs": {"cycles": [...]}, "C": {"low": [...], "high": [...]}, ...}``; 1 means nothing was lost.
    """
    curves: dict[str, dict[str, list[float]]] = {"cutoffs": {"cycles": list(map(float, CUTOFFS))}}
    for name, encoder in sources.items():
        tokens = extract(encoder, images)
        scale = Standardise(tokens)
        usual = scale(tokens).mean(0)
        whole = (scale(tokens) - usual)[:, 1:]
        curves[name] = {"low": [], "high": []}
        for keep, values in curves[name].items():
            for cutoff in CUTOFFS:
                left = (scale(extract(encoder, filtered(images, cutoff, keep=keep))) - usual)[:, 1:]
                values.append(float(torch.cosine_similarity(whole, left, dim=-1).mean()))
    return curves
