"""MAE stand-in: transformers' ViTMAE, trained by masked reconstruction on images alone (He et al. 2022).

B: batch, N: patches, S: side of an image in pixels.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torchvision.transforms.functional import normalize
from transformers import ViTMAEConfig, ViTMAEForPreTraining

from lavis_xformer.images import IMAGENET_MEAN, IMAGENET_STD
from lavis_xformer.mini.augment import random_crop, unit
from lavis_xformer.mini.training import StepLoss, autocast


def mae_config() -> ViTMAEConfig:
    """The mini MAE: 64 px in patches of 8, width 128, 8 layers; decoder 64 wide, 2 layers; normalised pixels."""
    return ViTMAEConfig(
        image_size=64,
        patch_size=8,
        hidden_size=128,
        num_hidden_layers=8,
        num_attention_heads=4,
        intermediate_size=512,
        decoder_hidden_size=64,
        decoder_num_hidden_layers=2,
        decoder_num_attention_heads=4,
        decoder_intermediate_size=256,
        mask_ratio=0.75,
        norm_pix_loss=True,
    )


def mae_loss(model: ViTMAEForPreTraining, images: Tensor, *, batch: int) -> StepLoss:
    """One step of masked reconstruction on random crops and flips of uint8 images (N, 3, S, S)."""
    device = next(model.parameters()).device
    patches = (model.config.image_size // model.config.patch_size) ** 2

    def step(rng: torch.Generator, _progress: float) -> Tensor:
        """Loss of random scenes, cropped, mirrored and masked."""
        rows = torch.randint(len(images), (batch,), generator=rng)
        view = random_crop(unit(images[rows].to(device)), rng, smallest=0.5, share=0.5, flip=True)
        view = normalize(view, IMAGENET_MEAN, IMAGENET_STD)
        noise = torch.rand(batch, patches, generator=rng).to(device)  # (B, N)
        return model(view, noise=noise).loss

    return step


@torch.no_grad()
def reconstruction(model: ViTMAEForPreTraining, images: Tensor, *, seed: int) -> dict[str, float]:
    """Mean squared error on masked patches of held-out uint8 images (N, 3, S, S).

    Returns:
        ``masked_mse`` in units of normalised patches: 1.0 is what predicting each patch's mean would give.
    """
    device = next(model.parameters()).device
    patches = (model.config.image_size // model.config.patch_size) ** 2
    noise = torch.rand(len(images), patches, generator=torch.Generator().manual_seed(seed))
    total = 0.0
    with autocast(device):
        for rows in torch.arange(len(images)).split(250):
            view = normalize(unit(images[rows].to(device)), IMAGENET_MEAN, IMAGENET_STD)
            total += model(view, noise=noise[rows].to(device)).loss.item() * len(rows)
    return {"masked_mse": total / len(images)}
