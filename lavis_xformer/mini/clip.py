"""CLIP stand-in: LAVIS's EVA ViT, trained contrastively on coarse captions (Radford et al. 2021, section 2.3).

The captions say what is in a scene, seldom how many or where, and never the fine marks; that is what makes the
features semantic rather than detailed. As in BLIP-2, features are read without the last block, which is therefore
not shipped; nor is the text tower, which only training needs.

B: batch, N: patches + 1, D: width, T: text tokens, E: width of the shared space.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from lavis.models.eva_vit import VisionTransformer
from torch import Tensor, nn
from torchvision.transforms.functional import normalize

from lavis_xformer.images import CLIP_MEAN, CLIP_STD
from lavis_xformer.mini.augment import colour_jitter, random_crop, unit
from lavis_xformer.mini.training import StepLoss, autocast
from lavis_xformer.models.towers import eva_vit

TEXT_TOKENS = 48  # of the longest text
SHARED_WIDTH = 128  # E, and the width of the text tower


@dataclass(frozen=True, kw_only=True)
class ClipConfig:
    """Sizes of the image tower, named as in LAVIS's VisionTransformer, and the number of blocks it was trained with."""

    img_size: int = 64
    patch_size: int = 8
    embed_dim: int = 128
    depth: int = 7
    num_heads: int = 4
    mlp_ratio: float = 4.0
    qkv_bias: bool = True
    trained_depth: int = 8

    def tower(self, depth: int) -> VisionTransformer:
        """An untrained image tower with ``depth`` blocks."""
        sizes = asdict(self) | {"depth": depth}
        sizes.pop("trained_depth")
        return eva_vit(**sizes)


class TextTower(nn.Module):
    """A bidirectional transformer of two layers over word pieces, mean-pooled."""

    def __init__(self, *, vocabulary: int) -> None:
        """Build it, untrained."""
        super().__init__()
        width = SHARED_WIDTH
        self.words = nn.Embedding(vocabulary, width, padding_idx=0)
        self.places = nn.Parameter(0.02 * torch.randn(TEXT_TOKENS, width))
        layer = nn.TransformerEncoderLayer(
            width, 4, 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(width)

    def forward(self, tokens: Tensor) -> Tensor:
        """Token ids (B, T), 0 where padded, to features (B, D)."""
        padded = tokens == 0  # (B, T)
        x = self.words(tokens) + self.places[: tokens.shape[1]]
        x = self.norm(self.layers(x, src_key_padding_mask=padded))  # (B, T, D)
        keep = (~padded).unsqueeze(-1).to(x)
        return (x * keep).sum(1) / keep.sum(1)


class MiniClip(nn.Module):
    """Two towers and a temperature."""

    def __init__(self, *, config: ClipConfig, vocabulary: int) -> None:
        """Build both towers, untrained."""
        super().__init__()
        self.visual = config.tower(config.trained_depth)
        self.visual_norm = nn.LayerNorm(config.embed_dim)
        self.visual_proj = nn.Linear(config.embed_dim, SHARED_WIDTH, bias=False)
        self.text = TextTower(vocabulary=vocabulary)
        self.text_proj = nn.Linear(SHARED_WIDTH, SHARED_WIDTH, bias=False)
        self.scale = nn.Parameter(torch.tensor(2.66))  # log(1 / 0.07), CLIP's initial value

    def image_features(self, images: Tensor) -> Tensor:
        """CLIP-normalised images (B, 3, S, S) to unit vectors (B, E), read at the CLS token."""
        cls = self.visual_norm(self.visual(images)[:, 0])  # (B, D)
        return F.normalize(self.visual_proj(cls).float(), dim=-1)

    def text_features(self, tokens: Tensor) -> Tensor:
        """Token ids (B, T) to unit vectors (B, E)."""
        return F.normalize(self.text_proj(self.text(tokens)).float(), dim=-1)

    def forward(self, images: Tensor, tokens: Tensor) -> Tensor:
        """Symmetric InfoNCE of matching rows, a 0-dim loss (CLIP's figure 3)."""
        logits = self.image_features(images) @ self.text_features(tokens).T  # (B, B)
        logits = logits * self.scale.clamp(max=4.6).exp()
        target = torch.arange(len(images), device=images.device)
        return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def clip_loss(model: MiniClip, images: Tensor, captions: Tensor, *, batch: int) -> StepLoss:
    """One contrastive step on random scenes, each with one of its captions.

    Args:
        model: both towers.
        images: uint8 (N, 3, S, S).
        captions: token ids (N, K, T), K wordings per scene, 0 where padded.
        batch: scenes per step.
    """
    device = next(model.parameters()).device

    def step(rng: torch.Generator, _progress: float) -> Tensor:
        """Loss of random scenes, cropped and recoloured."""
        rows = torch.randint(len(images), (batch,), generator=rng)
        wording = torch.randint(captions.shape[1], (batch,), generator=rng)
        view = unit(images[rows].to(device))
        view = random_crop(view, rng, smallest=0.7, share=0.5, flip=False)
        view = normalize(colour_jitter(view, rng, strength=0.15), CLIP_MEAN, CLIP_STD)
        words = captions[rows, wording].long()
        longest = int((words > 0).sum(1).max())
        return model(view, words[:, :longest].to(device))

    return step


@torch.no_grad()
def retrieval(model: MiniClip, images: Tensor, captions: Tensor) -> dict[str, float]:
    """Recall at 1, in percent, in both directions, among all given held-out pairs.

    Args:
        model: both towers, in eval mode.
        images: uint8 (N, 3, S, S).
        captions: token ids (N, T).

    Returns:
        ``i2t_r1`` and ``t2i_r1``; any scene with an identical caption counts as a hit.
    """
    device = next(model.parameters()).device
    seen, read = [], []
    with autocast(device):
        for rows in torch.arange(len(images)).split(250):
            view = normalize(unit(images[rows].to(device)), CLIP_MEAN, CLIP_STD)
            seen.append(model.image_features(view))
            read.append(model.text_features(captions[rows].long().to(device)))
    scores = (torch.cat(seen) @ torch.cat(read).T).cpu()  # (N, N)
    same = (captions[:, None] == captions[None]).all(-1)  # (N, N)
    hit = {"i2t_r1": same[torch.arange(len(same)), scores.argmax(1)]}
    hit["t2i_r1"] = same[torch.arange(len(same)), scores.argmax(0)]
    return {name: 100 * hits.float().mean().item() for name, hits in hit.items()}


def shipped_state(model: MiniClip, config: ClipConfig) -> dict[str, Tensor]:
    """Weights of the image tower that BLIP-2 reads: all blocks but the last."""
    dropped = tuple(f"blocks.{i}." for i in range(config.depth, config.trained_depth))
    return {k: v for k, v in model.visual.state_dict().items() if not k.startswith(dropped)}
