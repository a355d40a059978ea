"""Build the parts of both stages' models from the ``model`` section of a configuration."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, get_args

from omegaconf import DictConfig

from lavis_xformer.errors import UserError, nearest
from lavis_xformer.models import towers
from lavis_xformer.models.frozen import DTYPES
from lavis_xformer.models.fusion import FUSIONS, Init
from lavis_xformer.models.mae import MaskedAutoencoder

ENCODERS = ("clip", "mae")
MAE_SOURCES = ("mae", "random", "clip")  # source of M: MAE's tokens, those of an untrained MAE, or CLIP's


def build_parts(cfg: DictConfig) -> dict[str, Any]:
    """Build the arguments of ``XFormerBase`` from a ``model`` configuration.

    Raises:
        UserError: a name, folder or file in the configuration is wrong.
    """
    _check_names(cfg)
    name = cfg.get("fusion", "dual")
    visual_encoder = towers.build_clip(
        cfg.vit_model,
        image_size=cfg.image_size,
        weights=cfg.get("vit_weights"),
        drop_path_rate=cfg.get("drop_path_rate", 0.0),
        use_grad_checkpoint=cfg.get("use_grad_checkpoint", False),
    )
    mae = _build_mae(cfg, visual_encoder, fusion=name)
    qformer = towers.build_qformer(
        cfg.bert,
        num_queries=cfg.num_query_token,
        vision_width=visual_encoder.num_features,
        cross_attention_freq=cfg.get("cross_attention_freq", 2),
        layers=cfg.get("qformer_layers"),
    )
    fusion = FUSIONS[name](
        query_width=qformer.config.hidden_size,
        clip_width=visual_encoder.num_features,
        mae_width=visual_encoder.num_features if mae is None else mae.width,
        heads=cfg.get("fusion_heads") or _heads(name, visual_encoder, qformer),
        depth=cfg.get("fusion_depth", 1),
        self_attention=cfg.get("fusion_self_attention", True),
        init=cfg.get("fusion_init", "identity"),
        std=qformer.config.initializer_range,
    )
    return {
        "visual_encoder": visual_encoder,
        "mae": mae,
        "qformer": qformer,
        "tokenizer": towers.build_tokenizer(cfg.bert),
        "fusion": fusion,
        "image_size": cfg.image_size,
        "freeze_vit": cfg.get("freeze_vit", True),
        "vit_precision": cfg.get("vit_precision", "fp16"),
        "max_txt_len": cfg.get("max_txt_len", 32),
        "token_positions": cfg.get("token_positions") or [],
        "clip_layer": cfg.get("clip_layer"),
        "shuffle_mae": cfg.get("shuffle_mae", False),
    }


def weights_of(given: Mapping[str, Any] | None, defaults: Mapping[str, float]) -> dict[str, float]:
    """Return the weight of every loss: the defaults, overridden by ``model.loss_weights``.

    Raises:
        UserError: there is no such loss, or its weight is not a number.
    """
    for name, weight in (given or {}).items():
        if name not in defaults:
            raise UserError(f"model.loss_weights: no loss '{name}'; {nearest(name, defaults)}")
        if not isinstance(weight, int | float):
            raise UserError(f"model.loss_weights.{name} is {weight!r}; it must be a number")
    return {**defaults, **(given or {})}


def _heads(fusion: str, visual_encoder: Any, qformer: Any) -> int:
    """Number of heads of the attending module: CLIP in early cross-attention, otherwise the Q-Former."""
    return towers.heads_of(visual_encoder) if fusion == "early" else qformer.config.num_attention_heads


def _check_names(cfg: DictConfig) -> None:
    """Check the names in a ``model`` configuration before anything is built.

    Raises:
        UserError: there is no such fusion, initialisation, depth, precision or encoder.
    """
    if (name := cfg.get("fusion", "dual")) not in FUSIONS:
        raise UserError(f"model.fusion: no fusion '{name}'; {nearest(name, FUSIONS)}")
    if (init := cfg.get("fusion_init", "identity")) not in get_args(Init):
        raise UserError(f"model.fusion_init: '{init}'; {nearest(init, get_args(Init))}")
    if not isinstance(depth := cfg.get("fusion_depth", 1), int) or depth < 1:
        raise UserError(f"model.fusion_depth is {depth}; it must be a whole number above 0")
    if (precision := cfg.get("vit_precision", "fp16")) not in DTYPES:
        raise UserError(f"model.vit_precision: '{precision}'; {nearest(precision, DTYPES)}")
    if isinstance(placed := cfg.get("token_positions") or [], str):
        raise UserError(f"model.token_positions: '{placed}' is not a list; write [{placed}]")
    for encoder in placed:
        if encoder not in ENCODERS:
            raise UserError(f"model.token_positions: no encoder '{encoder}'; {nearest(encoder, ENCODERS)}")


def _build_mae(cfg: DictConfig, visual_encoder: Any, *, fusion: str) -> MaskedAutoencoder | None:
    """The model that computes M; None if the fusion needs no M, or gets CLIP's tokens instead."""
    if (source := cfg.get("mae_source", "mae")) not in MAE_SOURCES:
        raise UserError(f"model.mae_source: no source '{source}'; {nearest(source, MAE_SOURCES)}")
    if (source, fusion) == ("clip", "concat"):
        raise UserError("model.mae_source: 'clip' with fusion 'concat' would read C twice; choose 'mae' or 'random'")
    if (layer := cfg.get("clip_layer")) is not None:
        if source != "clip":
            raise UserError(f"model.clip_layer: {layer} needs model.mae_source: clip, not {source}")
        towers.block_of(visual_encoder, layer)
    if source == "clip" or not FUSIONS[fusion].needs_mae:
        return None
    return towers.build_mae(
        cfg.mae_model,
        norm_pix_loss=cfg.get("mae_norm_pix_loss"),
        image_size=cfg.get("mae_image_size"),
        trained=source == "mae",
    )
