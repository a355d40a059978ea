"""The frozen masked autoencoder: features M, masking, and the decoder that must still work on M'.

Wraps transformers' ``ViTMAEForPreTraining`` (MAE, arXiv 2111.06377). The hub's model shuffles its tokens even if
nothing is masked and draws masks in eval mode too; here the mask is an argument, and without one the tokens keep
the order of the image.

B: batch, N: patches, Nv: visible patches, Nm = 1 + Nv: tokens with CLS, Dm: width, P = 3 * patch size ** 2.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import ViTMAEForPreTraining
from transformers.models.vit_mae.modeling_vit_mae import ViTMAESelfAttention, get_2d_sincos_pos_embed

from lavis_xformer.images import clip_to_mae
from lavis_xformer.models.frozen import freeze


class MaeFeatures(NamedTuple):
    """The encoder's output, and what was masked."""

    tokens: Tensor  #: M (B, Nm, Dm), CLS first
    mask: Tensor  #: (B, N), 0 is keep, 1 is remove
    ids_restore: Tensor  #: (B, N), from the shuffled order back to the image's

    def positions(self) -> Tensor:
        """MAE's sine-cosine embeddings of the tokens' positions in a square image, (B, Nm, Dm); 0 for CLS."""
        batch, count, width = self.tokens.shape
        kept = self.ids_restore.argsort(dim=1)[:, : count - 1]  # (B, Nv)
        rows = torch.cat([kept.new_zeros(batch, 1), kept + 1], dim=1)  # (B, Nm)
        return sincos(width, self.ids_restore.shape[1]).to(self.tokens)[rows]


class MaskedAutoencoder(nn.Module):
    """Encoder and decoder, both frozen; gradients pass through the decoder to M'."""

    def __init__(self, *, model: ViTMAEForPreTraining, norm_pix_loss: bool | None = None) -> None:
        """Freeze the model.

        Args:
            model: with its decoder.
            norm_pix_loss: whether the decoder predicts pixels normalised per patch; None takes the model's own
                configuration.
        """
        super().__init__()
        self.model = freeze(model)
        for module in model.modules():
            if isinstance(module, ViTMAESelfAttention):
                module.__class__ = MaeKernelAttention
        if norm_pix_loss is not None:
            self.model.config.norm_pix_loss = norm_pix_loss

    @property
    def width(self) -> int:
        """Dm."""
        return int(self.model.config.hidden_size)

    @property
    def image_size(self) -> int:
        """Side of the input in pixels."""
        return int(self.model.config.image_size)

    @property
    def num_patches(self) -> int:
        """N."""
        return int(self.model.vit.embeddings.num_patches)

    def encode(self, pixels: Tensor, *, mask_ratio: float = 0.0, noise: Tensor | None = None) -> MaeFeatures:
        """Compute M.

        Args:
            pixels: (B, 3, S, S), normalised as ImageNet.
            mask_ratio: share of the patches that are hidden from the encoder; 0 keeps all, in order.
            noise: (B, N) random numbers; the patches with the smallest are kept. Drawn if None.

        Returns:
            The tokens, the mask and the permutation back to the image's order.
        """
        vit = self.model.vit
        patches = vit.embeddings.patch_embeddings(pixels) + vit.embeddings.position_embeddings[:, 1:]
        visible, mask, ids_restore = random_mask(patches, mask_ratio=mask_ratio, noise=noise)
        cls = vit.embeddings.cls_token + vit.embeddings.position_embeddings[:, :1]  # (1, 1, Dm)
        tokens = torch.cat([cls.expand(len(pixels), -1, -1), visible], dim=1)  # (B, Nm, Dm)
        tokens = vit.layernorm(vit.encoder(tokens).last_hidden_state)
        return MaeFeatures(tokens=tokens, mask=mask, ids_restore=ids_restore)

    def decode(self, tokens: Tensor, ids_restore: Tensor) -> Tensor:
        """Predict all patches (B, N, P) from M or M' (B, Nm, Dm); activations are recomputed in the backward pass."""
        return checkpoint(self.model.decoder, tokens, ids_restore, use_reentrant=False).logits

    def target(self, pixels: Tensor) -> Tensor:
        """What the decoder should predict for ``pixels`` (B, 3, S, S): (B, N, P)."""
        patches = self.model.patchify(pixels)  # (B, N, P)
        if not self.model.config.norm_pix_loss:
            return patches
        mean = patches.mean(-1, keepdim=True)
        variance = patches.var(-1, keepdim=True)
        return (patches - mean) / (variance + 1e-6).sqrt()


class MaeKernelAttention(ViTMAESelfAttention):
    """Attends with torch's kernel instead of transformers' own code, which stores every attention map."""

    def forward(self, hidden: Tensor, *unused: object) -> tuple[Tensor]:
        """(B, N, D) -> the same."""
        query, key, value = (
            self.transpose_for_scores(project(hidden)) for project in (self.query, self.key, self.value)
        )  # (B, heads, N, D / heads)
        return (F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2),)


class MaeTower(nn.Module):
    """MAE's encoder in place of CLIP's: the Q-Former reads M alone (the ablation "MAE only")."""

    def __init__(self, *, mae: MaskedAutoencoder) -> None:
        """Take the encoder; its decoder is not used."""
        super().__init__()
        self.mae = mae
        self.num_features = mae.width

    def forward(self, pixels: Tensor) -> Tensor:
        """Pixels (B, 3, S, S), normalised for CLIP, -> M (B, 1 + N, Dm) of the whole image."""
        return self.mae.encode(clip_to_mae(pixels)).tokens


@lru_cache(maxsize=4)
def sincos(width: int, patches: int) -> Tensor:
    """Sine-cosine position embeddings of a square of patches, (1 + N, ``width``), 0 for CLS (MAE, appendix A.1)."""
    return torch.from_numpy(get_2d_sincos_pos_embed(width, int(patches**0.5), add_cls_token=True)).float()


def random_mask(patches: Tensor, *, mask_ratio: float, noise: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Keep a random subset of each sample's patches (MAE, section 3, "Masking").

    Args:
        patches: (B, N, Dm).
        mask_ratio: share that is removed, in [0, 1).
        noise: (B, N); the patches with the smallest are kept. Drawn if None.

    Returns:
        The visible patches (B, Nv, Dm), the mask (B, N) with 0 keep and 1 remove, and ids_restore (B, N).
    """
    batch, count, width = patches.shape
    keep = int(count * (1 - mask_ratio))
    if keep == count:
        order = torch.arange(count, device=patches.device).expand(batch, -1)
        return patches, torch.zeros(batch, count, device=patches.device), order
    if noise is None:
        noise = torch.rand(batch, count, device=patches.device)
    ids_shuffle = noise.argsort(dim=1)
    ids_restore = ids_shuffle.argsort(dim=1)
    visible = patches.gather(1, ids_shuffle[:, :keep, None].expand(-1, -1, width))
    mask = torch.ones(batch, count, device=patches.device)
    mask[:, :keep] = 0
    return visible, mask.gather(1, ids_restore), ids_restore


def unmasked(tokens: Tensor) -> MaeFeatures:
    """Tokens (B, 1 + N, D), CLS first, in place of M, unmasked and detached."""
    _, mask, ids_restore = random_mask(tokens[:, 1:], mask_ratio=0)
    return MaeFeatures(tokens.detach(), mask, ids_restore)
