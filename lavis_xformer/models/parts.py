"""Build the parts of both stages' models from the ``model`` section of a configuration."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, get_args

from omegaconf import DictConfig, OmegaConf

from lavis_xformer.errors import UserError, number, one_of, whole
from lavis_xformer.models import towers
from lavis_xformer.models.frozen import DTYPES
from lavis_xformer.models.fusion import FUSIONS, Init, build_fusion
from lavis_xformer.models.mae import MaskedAutoencoder

ENCODERS = ("clip", "mae")
#: whole numbers, and the smallest sensible value of each: a text has at least its start, a token and its end
COUNTS = {
    **dict.fromkeys(("num_query_token", "cross_attention_freq", "qformer_layers", "embed_dim"), 1),
    **dict.fromkeys(("fusion_depth", "fusion_heads", "image_size", "mae_image_size"), 1),
    "max_txt_len": 3,
}
#: True or False
SWITCHES = (
    "freeze_vit mask_vl shuffle_mae fusion_self_attention use_grad_checkpoint mae_norm_pix_loss load_pretrained "
    "load_finetuned prefix_lm apply_lemmatizer"
).split()
#: finite numbers
NUMBERS = ("mask_ratio", "drop_path_rate", "vqa_length_penalty")
#: mae_source: M is MAE's tokens, those of an untrained MAE, or CLIP's
CHOICES = {"fusion_init": get_args(Init), "vit_precision": tuple(DTYPES), "mae_source": ("mae", "random", "clip")}
#: keys whose values the fusions take, and ``XFormerBase`` takes, under these names
FUSION_OPTIONS = ("fusion_depth", "fusion_self_attention", "fusion_init")
OPTIONS = ("freeze_vit", "vit_precision", "max_txt_len", "token_positions", "clip_layer", "shuffle_mae")
#: all keys that are read here
KEYS = frozenset(
    {
        *"vit_model vit_weights image_size drop_path_rate use_grad_checkpoint bert num_query_token".split(),
        *"cross_attention_freq qformer_layers mae_model mae_norm_pix_loss mae_image_size mae_source".split(),
        *("fusion", "fusion_heads", *FUSION_OPTIONS, *OPTIONS),
    }
)


def given(cfg: DictConfig, *keys: str) -> dict[str, Any]:
    """Return those of the keys that are set, as plain values; for the others the constructor's defaults hold."""
    values: Any = OmegaConf.to_container(cfg, resolve=True)
    return {key: values[key] for key in keys if values.get(key) is not None}


def build_parts(cfg: DictConfig) -> dict[str, Any]:
    """Build the arguments of ``XFormerBase`` from a ``model`` configuration.

    Raises:
        UserError: a name, folder or file in the configuration is wrong.
    """
    check_names(cfg)
    name = cfg.get("fusion", "dual")
    visual_encoder = towers.build_clip(
        cfg.vit_model,
        image_size=cfg.image_size,
        weights=cfg.get("vit_weights"),
        **given(cfg, "drop_path_rate", "use_grad_checkpoint"),
    )
    mae = _build_mae(cfg, visual_encoder, fusion=name)
    qformer = towers.build_qformer(
        cfg.bert,
        num_queries=cfg.num_query_token,
        vision_width=visual_encoder.num_features,
        layers=cfg.get("qformer_layers"),
        **given(cfg, "cross_attention_freq"),
    )
    fusion = build_fusion(
        name,
        query_width=qformer.config.hidden_size,
        clip_width=visual_encoder.num_features,
        mae_width=visual_encoder.num_features if mae is None else mae.width,
        heads=cfg.get("fusion_heads") or _heads(name, visual_encoder, qformer),
        std=qformer.config.initializer_range,
        **{key.removeprefix("fusion_"): value for key, value in given(cfg, *FUSION_OPTIONS).items()},
    )
    return {
        "visual_encoder": visual_encoder,
        "mae": mae,
        "qformer": qformer,
        "tokenizer": towers.build_tokenizer(cfg.bert),
        "fusion": fusion,
        "image_size": cfg.image_size,
        **given(cfg, *OPTIONS),
    }


def weights_of(weights: Mapping[str, Any] | None, defaults: Mapping[str, float]) -> dict[str, float]:
    """Return the weight of every loss: the defaults, overridden by ``model.loss_weights``.

    Raises:
        UserError: there is no such loss, or its weight is not a finite number, 0 or more.
    """
    for name, weight in (weights or {}).items():
        one_of("model.loss_weights", name, defaults)
        if number(f"model.loss_weights.{name}", weight) < 0:
            raise UserError(f"model.loss_weights.{name} is {weight!r}; it must be 0 or more")
    return {**defaults, **(weights or {})}


def _heads(fusion: str, visual_encoder: Any, qformer: Any) -> int:
    """Number of heads of the attending module: CLIP in early cross-attention, otherwise the Q-Former."""
    return towers.heads_of(visual_encoder) if fusion == "early" else qformer.config.num_attention_heads


def check_names(cfg: DictConfig) -> None:
    """Check the names and counts in a ``model`` configuration before anything is built.

    Raises:
        UserError: there is no such fusion, initialisation, precision, source of M or encoder; a count is too small; a
            switch is neither True nor False; or ``token_positions`` is not a list.
    """
    one_of("model.fusion", cfg.get("fusion", "dual"), FUSIONS)
    for key, value in given(cfg, *CHOICES).items():
        one_of(f"model.{key}", value, CHOICES[key])
    for key, count in given(cfg, *COUNTS).items():
        whole(f"model.{key}", count, least=COUNTS[key])
    for key, value in given(cfg, *SWITCHES).items():
        if value not in (True, False):
            raise UserError(f"model.{key} is {value!r}; it must be True or False")
    for key, value in given(cfg, *NUMBERS).items():
        number(f"model.{key}", value)
    if isinstance(placed := cfg.get("token_positions") or [], str):
        raise UserError(f"model.token_positions: '{placed}' is not a list; write [{placed}]")
    for encoder in placed:
        one_of("model.token_positions", encoder, ENCODERS)


def _build_mae(cfg: DictConfig, visual_encoder: Any, *, fusion: str) -> MaskedAutoencoder | None:
    """The model that computes M; None if the fusion needs no M, or gets CLIP's tokens instead."""
    source = cfg.get("mae_source") or "mae"
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
