"""Batched augmentation of rendered images.

B: batch, S: side of an image in pixels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def unit(images: Tensor) -> Tensor:
    """uint8 (B, 3, S, S) to float in 0..1."""
    return images.float() / 255


def random_crop(images: Tensor, rng: torch.Generator, *, smallest: float, share: float, flip: bool) -> Tensor:
    """Random resized crop of a share of the batch and random flip of half of it.

    Args:
        images: (B, 3, S, S).
        rng: the only source of randomness (on CPU).
        smallest: smallest side of a crop, as a share of S.
        share: share of the images that are cropped; the rest keep every pixel.
        flip: whether to mirror images left to right at random.

    Returns:
        (B, 3, S, S).
    """
    count = len(images)
    size = smallest + (1 - smallest) * torch.rand(count, generator=rng)
    size = torch.where(torch.rand(count, generator=rng) < share, size, torch.ones(count))  # (B,)
    shift = (1 - size)[:, None] * (2 * torch.rand(count, 2, generator=rng) - 1)  # (B, 2)
    sign = torch.where(torch.rand(count, generator=rng) < 0.5 * flip, -1.0, 1.0)
    theta = torch.zeros(count, 2, 3)
    theta[:, 0, 0], theta[:, 1, 1], theta[:, :, 2] = sign * size, size, shift
    grid = F.affine_grid(theta, list(images.shape), align_corners=False).to(images)
    return F.grid_sample(images, grid, padding_mode="reflection", align_corners=False)


def colour_jitter(images: Tensor, rng: torch.Generator, *, strength: float) -> Tensor:
    """Random brightness, contrast and saturation, each by up to +-``strength``; (B, 3, S, S) in 0..1."""
    change = 1 + strength * (2 * torch.rand(3, len(images), 1, 1, 1, generator=rng) - 1)
    bright, contrast, saturation = change.to(images)
    images = images * bright
    images = torch.lerp(images.mean((1, 2, 3), keepdim=True), images, contrast)
    return torch.lerp(images.mean(1, keepdim=True), images, saturation).clamp(0, 1)
