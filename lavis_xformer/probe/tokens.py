"""Frozen tokens of rendered scenes: the outputs of C, M and their controls.

N: scenes, P: patches + 1, D: width of a token, S: side of an image in pixels.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from lavis.models.eva_vit import VisionTransformer
from torch import Tensor
from torchvision.transforms.functional import normalize

from lavis_xformer.images import CLIP_MEAN, CLIP_STD, IMAGENET_MEAN, IMAGENET_STD
from lavis_xformer.mini.augment import unit
from lavis_xformer.mini.clip import ClipConfig
from lavis_xformer.mini.training import autocast
from lavis_xformer.models.mae import MaskedAutoencoder
from lavis_xformer.models.towers import build_clip, build_mae

#: images (B, 3, S, S) in 0..1 to tokens (B, P, D), CLS first, patches in reading order
Encoder = Callable[[Tensor], Tensor]


def clip_tokens(tower: VisionTransformer, images: Tensor, *, layers: tuple[int, ...] = (-1,)) -> Tensor:
    """C: outputs of some blocks, concatenated, (B, P, D x layers)."""
    outputs = tower.get_intermediate_layers(normalize(images, CLIP_MEAN, CLIP_STD))
    return torch.cat([outputs[layer] for layer in layers], -1)


def mae_tokens(mae: MaskedAutoencoder, images: Tensor) -> Tensor:
    """M: encoder output for the whole image, (B, P, D)."""
    return mae.encode(normalize(images, IMAGENET_MEAN, IMAGENET_STD)).tokens


def pixel_tokens(images: Tensor) -> Tensor:
    """Raw pixels of each patch, with the patches' mean as CLS, (B, P, 3 x 8 x 8)."""
    x = F.unfold(images, 8, stride=8).transpose(1, 2)
    return torch.cat([x.mean(1, keepdim=True), x], 1)


def encoders(folder: Path) -> dict[str, Encoder]:
    """Encoders of a set of mini models: C, M, C+M and the controls.

    Args:
        folder: the set, with ``clip`` and ``mae``.

    Returns:
        ``C``, ``M``, ``C+M``, ``C two layers`` (as wide as C+M), ``pixels``, ``random`` (the untrained tower).
    """
    config = ClipConfig(**json.loads((folder / "clip" / "config.json").read_text()))
    clip = build_clip(str(folder / "clip"), image_size=config.img_size).eval()
    mae = build_mae(str(folder / "mae"), image_size=config.img_size)
    torch.manual_seed(0)
    untrained = config.tower(config.depth).eval()
    middle = len(clip.blocks) // 2
    return {
        "C": partial(clip_tokens, clip),
        "M": partial(mae_tokens, mae),
        "C+M": lambda x: torch.cat([clip_tokens(clip, x), mae_tokens(mae, x)], -1),
        "C two layers": partial(clip_tokens, clip, layers=(middle, -1)),
        "pixels": pixel_tokens,
        "random": partial(clip_tokens, untrained),
    }


@torch.no_grad()
def extract(encoder: Encoder, images: Tensor) -> Tensor:
    """Tokens of uint8 images (N, 3, S, S), float16 (N, P, D)."""
    with autocast(images.device):
        parts = [encoder(unit(part)) for part in images.split(250)]
    return torch.cat([part.half() for part in parts])


class Standardise:
    """Scale every token channel to mean 0 and standard deviation 1, as measured on training scenes."""

    def __init__(self, tokens: Tensor) -> None:
        """Measure on tokens (N, P, D); at most the first 1000 scenes are used."""
        sample = tokens[:1000].float().flatten(0, 1)
        self.mean, self.std = sample.mean(0), sample.std(0).clamp(min=1e-4)

    def __call__(self, tokens: Tensor) -> Tensor:
        """Tokens (B, P, D) in any precision to standardised float32."""
        return (tokens.float() - self.mean) / self.std
