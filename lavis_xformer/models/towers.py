"""Build the pre-trained parts from names, folders or files: CLIP, MAE, the Q-Former and its tokenizer.

Every name may be a hub id, a local folder or file, or a shipped one (``assets://mini/clip``); nothing is fetched at
import. Whatever can't be found or doesn't fit raises a one-line error that names the key to set.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lavis.models.blip2_models.Qformer import BertLMHeadModel
from lavis.models.clip_vit import create_clip_vit_L
from lavis.models.eva_vit import VisionTransformer, interpolate_pos_embed
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import BertConfig, BertTokenizer, ViTMAEConfig, ViTMAEForPreTraining

from lavis_xformer.assets import resolve
from lavis_xformer.errors import UserError, nearest
from lavis_xformer.models.cached import Cached
from lavis_xformer.models.mae import MaeTower, MaskedAutoencoder
from lavis_xformer.models.meta_mae import from_meta
from lavis_xformer.models.weight_files import (
    REPORTING,
    download,
    load_json,
    load_safetensors,
    load_torch_file,
    offline_error,
)
from lavis_xformer.state_dicts import listing, load_exactly

# EVA-CLIP ViT-g/14 as BLIP-2 reads it: 39 of its 40 blocks (LAVIS `create_eva_vit_g`)
EVA_CLIP_G: dict[str, Any] = {
    "patch_size": 14,
    "embed_dim": 1408,
    "depth": 39,
    "num_heads": 16,
    "mlp_ratio": 4.3637,
    "qkv_bias": True,
}
EVA_CLIP_G_URL = "https://storage.googleapis.com/sfr-vision-language-research/LAVIS/models/BLIP2/eva_vit_g.pth"
EVA_KEYS = ("img_size", "patch_size", "embed_dim", "depth", "num_heads", "mlp_ratio", "qkv_bias")
WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")
VIT_MODELS = ("eva_clip_g", "clip_L")


def eva_vit(*, drop_path_rate: float = 0.0, use_grad_checkpoint: bool = False, **sizes: Any) -> Any:
    """LAVIS's EVA ViT of the given sizes (``img_size``, ``patch_size``, ...), with random weights."""
    return VisionTransformer(
        use_mean_pooling=False,
        drop_path_rate=drop_path_rate,
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
        use_checkpoint=use_grad_checkpoint,
        **sizes,
    )


def build_clip(
    name: str,
    *,
    image_size: int,
    weights: str | None = None,
    drop_path_rate: float = 0.0,
    use_grad_checkpoint: bool = False,
) -> Any:
    """The CLIP image encoder, whose tokens C the Q-Former reads.

    Args:
        name: ``eva_clip_g``, ``clip_L``, or a folder with ``config.json`` and ``model.safetensors`` of an EVA ViT; or a
            MAE as :func:`build_mae` takes it, for the ablation in which the Q-Former reads M alone.
        image_size: side of the input in pixels; position embeddings are interpolated where it differs.
        weights: a local file for ``eva_clip_g`` instead of the one that LAVIS downloads (key ``vit_weights``).
        drop_path_rate: stochastic depth of an EVA ViT, only useful if the encoder is trained.
        use_grad_checkpoint: save memory if the encoder is trained.

    Raises:
        UserError: there is no such model, folder or file, or it can't be fetched.
    """
    path = resolve(name)
    options: dict[str, Any] = {"drop_path_rate": drop_path_rate, "use_grad_checkpoint": use_grad_checkpoint}
    if weights is not None and name != "eva_clip_g":
        raise UserError(f"model.vit_weights are those of vit_model: eva_clip_g, not of '{name}'; set it to null")
    if _is_mae(path):
        return MaeTower(mae=build_mae(name, image_size=image_size, key="vit_model"))
    if name == "eva_clip_g":
        model = eva_vit(img_size=image_size, **EVA_CLIP_G, **options)
        whole = load_torch_file(weights or download(EVA_CLIP_G_URL, key="vit_weights"), key="vit_weights")
        state = {key: whole[key] for key in model.state_dict().keys() & whole.keys()}  # the last block is not used
    elif name == "clip_L":
        try:
            return create_clip_vit_L(image_size, use_grad_checkpoint, "fp32")
        except OSError as error:
            raise offline_error(name, "vit_model", error) from error
    elif (folder := Path(path)).is_dir():
        model = eva_vit(**{**_eva_sizes(folder), "img_size": image_size}, **options)
        state = load_safetensors(folder / "model.safetensors", key="vit_model")
    elif folder.is_file():
        raise UserError(
            f"model.vit_model: '{name}' is a file; for CLIP's weights set vit_model: eva_clip_g and vit_weights: {name}"
        )
    else:
        raise UserError(f"model.vit_model: no model or folder '{name}'; {nearest(name, VIT_MODELS)}")
    _check_side(image_size, model.patch_embed.patch_size[0], name)
    interpolate_pos_embed(model, state)
    load_exactly(model, state, source=f"vit_model '{name}'")
    return model


def _check_side(side: int, patch: int, name: str) -> None:
    """Refuse an image whose border would fill no patch."""
    if side % patch:
        raise UserError(f"model.image_size is {side}; '{name}' would not see the border: take a multiple of {patch}")


def _eva_sizes(folder: Path) -> dict[str, Any]:
    config = load_json(folder / "config.json", "vit_model")
    if missing := [key for key in EVA_KEYS if key not in config]:
        raise UserError(f"model.vit_model: '{folder}' is not an EVA ViT: its config.json lacks {', '.join(missing)}")
    return {key: config[key] for key in EVA_KEYS}


def _is_mae(path: Path) -> bool:
    """Whether a folder, one of Meta's files or a hub id is a MAE, not a CLIP."""
    if (config := path / "config.json").is_file():
        return load_json(config, "vit_model").get("model_type") == "vit_mae"
    return (path.suffix == ".pth" and path.name.startswith("mae_")) or "vit-mae" in path.name


def block_of(encoder: Any, layer: int) -> Any:
    """The ``layer``-th transformer block of CLIP, counted from 1.

    Raises:
        UserError: there is no such block, or a MAE is in CLIP's place.
    """
    if isinstance(encoder, MaeTower):
        raise UserError(
            f"model.clip_layer: {layer}, but model.vit_model is a MAE, of which only the last block is read; "
            "set clip_layer to null"
        )
    blocks = encoder.blocks if hasattr(encoder, "blocks") else encoder.transformer.resblocks
    if not 1 <= layer <= len(blocks):
        raise UserError(f"model.clip_layer: {layer}, but this image encoder has blocks 1 to {len(blocks)}")
    return blocks[layer - 1]


def heads_of(encoder: Any) -> int:
    """Number of attention heads of CLIP, or of a MAE in its place."""
    if isinstance(encoder, MaeTower):
        return int(encoder.mae.model.config.num_attention_heads)
    return int(block_of(encoder, 1).attn.num_heads)


@contextlib.contextmanager
def tap(encoder: Any, layer: int | None) -> Iterator[list[Tensor]]:
    """Collect the outputs of CLIP's ``layer``-th block in this context: a list of (B, Nc, Dc), empty if None."""
    found: list[Tensor] = []
    if layer is None:
        yield found
        return
    tokens_first = not hasattr(encoder, "blocks")  # LAVIS's clip_L computes with (Nc, B, Dc)

    def _keep(block: nn.Module, inputs: Any, output: Tensor) -> None:
        found.append(output.transpose(0, 1) if tokens_first else output)

    handle = block_of(encoder, layer).register_forward_hook(_keep)
    try:
        yield found
    finally:
        handle.remove()


def build_mae(
    name: str,
    *,
    norm_pix_loss: bool | None = None,
    image_size: int | None = None,
    trained: bool = True,
    key: str = "mae_model",
) -> MaskedAutoencoder:
    """The frozen masked autoencoder with its decoder.

    Args:
        name: a hub id such as ``facebook/vit-mae-huge``, a local folder in the hub's format, or one of Meta's files
            ``mae_pretrain_vit_*_full.pth`` and ``mae_visualize_vit_*.pth``.
        norm_pix_loss: overrides the checkpoint's own setting.
        image_size: side that the configuration expects; only checked against the checkpoint's.
        trained: False reinitialises all weights, with a fixed seed: a control for what MAE has learned.
        key: the configuration key that named it, for messages.

    Raises:
        UserError: there is no such model, it can't be fetched, it has no decoder, or another image size.
    """
    path = resolve(name)
    if path.suffix == ".pth":
        config, state = from_meta(load_torch_file(path, key=key), path, norm_pix_loss=norm_pix_loss, key=key)
        model = ViTMAEForPreTraining(config)
        load_exactly(model, state, source=f"{key} '{name}'")
    else:
        model = _load_hub_mae(str(path), name, key=key)
    if image_size is not None and image_size != model.config.image_size:
        own = "image_size" if key == "vit_model" else "mae_image_size"
        raise UserError(f"model.{own} is {image_size}, but '{name}' was trained on {model.config.image_size} pixels")
    if not trained:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)  # frozen weights are in no checkpoint, so stage 2 must draw the same
            model = ViTMAEForPreTraining(model.config)
    return MaskedAutoencoder(model=model, norm_pix_loss=norm_pix_loss)


def _load_hub_mae(path: str, name: str, *, key: str) -> ViTMAEForPreTraining:
    try:
        config = ViTMAEConfig.from_pretrained(path)
        model, report = ViTMAEForPreTraining.from_pretrained(path, config=config, **REPORTING)
    except (OSError, SafetensorError) as error:
        raise offline_error(name, key, error) from error
    problems = [*report["missing_keys"], *report["unexpected_keys"], *report["mismatched_keys"]]
    if any(weight.startswith("decoder.") for weight in report["missing_keys"]):
        raise UserError(
            f"model.{key}: '{name}' holds MAE's encoder only, and X-Former reconstructs through its decoder; use "
            "facebook/vit-mae-{base,large,huge}, mae_pretrain_vit_*_full.pth or mae_visualize_vit_*.pth"
        )
    if problems:
        raise UserError(f"model.{key}: '{name}' doesn't fit ViTMAEForPreTraining: {problems[:5]}")
    return model


class QFormer(Cached, BertLMHeadModel):
    """LAVIS's, with its key/value cache in captioning."""


def build_qformer(
    name: str, *, num_queries: int, vision_width: int, cross_attention_freq: int = 2, layers: int | None = None
) -> Any:
    """LAVIS's Q-Former: BERT with learned queries and cross-attention to C in every n-th layer.

    Args:
        name: ``bert-base-uncased``, or a folder with a BERT ``config.json``; if the folder has no weights, they
            are random.
        num_queries: Q.
        vision_width: Dc.
        cross_attention_freq: cross-attention in every n-th layer.
        layers: depth, if not BERT's; layers that BERT lacks are initialised randomly.

    Raises:
        UserError: there is no such model or folder, it can't be fetched, or it is no whole BERT.
    """
    path = str(resolve(name))
    depth = {} if layers is None else {"num_hidden_layers": layers}
    try:
        own, _ = BertConfig.get_config_dict(path)
        if (kind := own.get("model_type", "bert")) != "bert":
            raise UserError(f"model.bert: '{name}' is a model of type '{kind}', not 'bert'")
        config = qformer_config(
            BertConfig.from_pretrained(path, **depth),
            num_queries=num_queries,
            vision_width=vision_width,
            cross_attention_freq=cross_attention_freq,
        )
        if Path(path).is_dir() and not any((Path(path) / file).is_file() for file in WEIGHT_FILES):
            return QFormer(config)
        model, report = QFormer.from_pretrained(path, config=config, **REPORTING)
    except (OSError, SafetensorError, ValueError, AttributeError) as error:  # transformers' for damaged weights
        raise offline_error(name, "bert", error) from error
    if wrong := report["mismatched_keys"]:
        raise UserError(f"model.bert: '{name}' has weights of another shape than its config.json says: {wrong[:5]}")
    if lacking := [key for key in report["missing_keys"] if not _is_new(key, own.get("num_hidden_layers", 12))]:
        raise UserError(f"model.bert: '{name}' lacks {len(lacking)} weights of BERT: {listing(lacking)}")
    return model


def _is_new(weight: str, layers: int) -> bool:
    """Whether a weight of the Q-Former is none of BERT's encoder with so many layers."""
    layer = re.match(r"(?:bert\.)?encoder\.layer\.(\d+)\.", weight)
    added = re.search(r"crossattention|_query\.|position_ids|^cls\.", weight)
    return bool(added) or (layer is not None and int(layer[1]) >= layers)


def qformer_config(config: BertConfig, *, num_queries: int, vision_width: int, cross_attention_freq: int) -> BertConfig:
    """Add to a BERT configuration what LAVIS's Q-Former reads from it; changed in place."""
    config.encoder_width = vision_width
    config.add_cross_attention = True
    config.cross_attention_freq = cross_attention_freq
    config.query_length = num_queries
    return config


def build_tokenizer(name: str) -> BertTokenizer:
    """BERT's tokenizer with the start token ``[DEC]`` of the decoder, as in BLIP-2.

    Raises:
        UserError: it can't be found.
    """
    try:
        tokenizer = BertTokenizer.from_pretrained(str(resolve(name)))
    except OSError as error:
        raise offline_error(name, "bert", error) from error
    tokenizer.add_special_tokens({"bos_token": "[DEC]"})
    return tokenizer
