"""Read MAE checkpoints in Meta's own format (github facebookresearch/mae) into transformers' ViTMAE.

Meta publishes three kinds of file, which differ in what the decoder predicts:

=====================================  =========  ====================
file                                   decoder    predicts
=====================================  =========  ====================
``mae_pretrain_vit_*_full.pth``        yes        normalised pixels
``mae_visualize_vit_*.pth``            yes        raw pixels
``mae_pretrain_vit_*.pth``             no         -
=====================================  =========  ====================
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import ViTMAEConfig

from lavis_xformer.errors import UserError

VIT_H = 1280  # width of ViT-H, whose heads are 80 wide; those of ViT-B and ViT-L are 64, of every decoder 32

RENAMES = (
    (r"^cls_token$", "vit.embeddings.cls_token"),
    (r"^pos_embed$", "vit.embeddings.position_embeddings"),
    (r"^patch_embed\.proj\.", "vit.embeddings.patch_embeddings.projection."),
    (r"^norm\.", "vit.layernorm."),
    (r"^mask_token$", "decoder.mask_token"),
    (r"^decoder_pos_embed$", "decoder.decoder_pos_embed"),
    (r"^decoder_(embed|norm|pred)\.", r"decoder.decoder_\1."),
    (r"^decoder_blocks\.", "decoder.decoder_layers."),
    (r"^blocks\.", "vit.encoder.layer."),
    (r"\.norm1\.", ".layernorm_before."),
    (r"\.norm2\.", ".layernorm_after."),
    (r"\.attn\.proj\.", ".attention.output.dense."),
    (r"\.mlp\.fc1\.", ".intermediate.dense."),
    (r"\.mlp\.fc2\.", ".output.dense."),
)


def from_meta(
    content: dict[str, Any], path: Path, *, norm_pix_loss: bool | None, key: str
) -> tuple[ViTMAEConfig, dict[str, Tensor]]:
    """Configuration and weights for ViTMAE from one of Meta's files.

    Args:
        content: of the file.
        path: ``mae_pretrain_vit_*_full.pth``, ``mae_visualize_vit_*.pth``, or a checkpoint trained with Meta's code.
        norm_pix_loss: needed if the file's name doesn't show its kind.
        key: the configuration key that named it, for messages.

    Raises:
        UserError: the file holds no decoder, or doesn't show whether it predicts normalised pixels.
    """
    state = content.get("model", content)
    if "decoder_embed.weight" not in state:
        raise UserError(
            f"model.{key}: '{path}' holds MAE's encoder only, and X-Former reconstructs through its decoder; "
            f"download '{path.stem.removesuffix('_full')}_full.pth' or mae_visualize_vit_*.pth instead"
        )
    config = meta_config(state, norm_pix_loss=_predicts_normalised(path, norm_pix_loss, key=key))
    return config, convert_meta_keys(state)


def _predicts_normalised(path: Path, norm_pix_loss: bool | None, *, key: str) -> bool:
    if norm_pix_loss is not None:
        return norm_pix_loss
    if "visualize" in path.name:
        return False
    if path.stem.endswith("_full"):
        return True
    raise UserError(
        f"model.{key}: the name of '{path}' doesn't say whether its decoder predicts normalised pixels "
        "(mae_pretrain_*_full.pth) or raw ones (mae_visualize_*.pth); set model.mae_norm_pix_loss"
    )


def meta_config(state: dict[str, Tensor], *, norm_pix_loss: bool) -> ViTMAEConfig:
    """Read the sizes of a Meta checkpoint from its tensors."""
    width, channels, patch, _ = state["patch_embed.proj.weight"].shape
    decoder_width = state["decoder_embed.weight"].shape[0]
    grid = int((state["pos_embed"].shape[1] - 1) ** 0.5)

    def _depth(prefix: str) -> int:
        return 1 + max(int(k.split(".")[1]) for k in state if k.startswith(f"{prefix}."))

    head = 80 if width == VIT_H else 64
    if width % head or decoder_width % 32:
        raise UserError(
            f"model.mae_model: a MAE of width {width} and {decoder_width} is none of Meta's, with heads {head} and 32 "
            "wide; save it in the hub's format, which says how many heads it has"
        )
    return ViTMAEConfig(
        hidden_size=width,
        num_hidden_layers=_depth("blocks"),
        num_attention_heads=width // head,
        intermediate_size=state["blocks.0.mlp.fc1.weight"].shape[0],
        layer_norm_eps=1e-6,
        image_size=grid * patch,
        patch_size=patch,
        num_channels=channels,
        decoder_hidden_size=decoder_width,
        decoder_num_hidden_layers=_depth("decoder_blocks"),
        decoder_num_attention_heads=decoder_width // 32,
        decoder_intermediate_size=state["decoder_blocks.0.mlp.fc1.weight"].shape[0],
        norm_pix_loss=norm_pix_loss,
    )


def convert_meta_keys(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename Meta's weights to transformers' and split the joint query-key-value projections."""
    converted: dict[str, Tensor] = {}
    for name, tensor in state.items():
        for pattern, replacement in RENAMES:
            name = re.sub(pattern, replacement, name)
        if ".attn.qkv." in name:
            for part, third in zip(("query", "key", "value"), tensor.chunk(3), strict=True):
                converted[name.replace(".attn.qkv.", f".attention.attention.{part}.")] = third
        else:
            converted[name] = tensor
    return converted
