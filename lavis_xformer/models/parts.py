"""Build the parts of both stages' models from the ``model`` section of a configuration."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, get_args

from omegaconf import DictConfig, OmegaConf

from lavis_xformer.errors import UserError, number, one_of, switch, text, whole
from lavis_xformer.models import towers
from lavis_xformer.models.frozen import DTYPES
from lavis_xformer.models.fusion import FUSIONS, Init, build_fusion, parameters_of
from lavis_xformer.models.mae import MaskedAutoencoder
from lavis_xformer.paths import PARTS

ENCODERS = ("clip", "mae")
SOURCES = ("mae", "random", "clip")  # of M: MAE, an untrained MAE, or CLIP
ITG_SOURCES = ("qformer", "xformer")  # of stage 1's captions, see `features`
#: keys whose values the shipped fusions take; one of your own may take other ``fusion_...``
FUSION_OPTIONS = ("fusion_depth", "fusion_self_attention", "fusion_init")
#: what every fusion is offered, see :func:`build_parts`
OFFERED = frozenset({"query_width", "clip_width", "mae_width", "heads", "std"})
#: what a model's constructor takes that is built here or, for stage 2, there
BUILT = frozenset({"visual_encoder", "mae", "qformer", "tokenizer", "fusion", "image_size", "language"})
#: all keys that are read here
KEYS = frozenset(
    {
        *"vit_model vit_weights image_size drop_path_rate use_grad_checkpoint bert num_query_token".split(),
        *"cross_attention_freq qformer_layers mae_model mae_norm_pix_loss mae_image_size mae_source".split(),
        *("fusion", "fusion_heads", *FUSION_OPTIONS, "fusion_*"),
    }
)


def _check_list(key: str, value: Any) -> None:
    """Check that a value is a list."""
    if not isinstance(value, list):
        raise UserError(f"{key}: {value!r} is not a list; write [{value}]")


def _check_positions(key: str, value: Any) -> None:
    """Check that a value is a list of encoders."""
    _check_list(key, value)
    for encoder in value:
        one_of(key, encoder, ENCODERS)


def check_mask_ratio(key: str, value: Any) -> None:
    """Check that a value is a share of the patches that leaves some."""
    if not 0 <= number(key, value) < 1:
        raise UserError(f"{key} is {value}; it must lie in [0, 1)")


#: what the values of keys must be, of either stage's model
CHECKS: dict[str, Callable[[str, Any], Any]] = {
    **dict.fromkeys((*PARTS, "prompt", "vqa_prompt"), text),
    **dict.fromkeys("pretrained finetuned blip2_pretrained".split(), text),
    **dict.fromkeys("num_query_token cross_attention_freq qformer_layers embed_dim".split(), partial(whole, least=1)),
    **dict.fromkeys("fusion_depth fusion_heads image_size mae_image_size clip_layer".split(), partial(whole, least=1)),
    "max_txt_len": partial(whole, least=3),  # a text's start, one token and its end
    **dict.fromkeys("freeze_vit mask_vl shuffle_mae fusion_self_attention use_grad_checkpoint".split(), switch),
    **dict.fromkeys("mae_norm_pix_loss load_pretrained load_finetuned prefix_lm apply_lemmatizer".split(), switch),
    **dict.fromkeys("drop_path_rate vqa_length_penalty".split(), number),
    "mask_ratio": check_mask_ratio,
    "itg_source": partial(one_of, options=ITG_SOURCES),
    "fusion": partial(one_of, options=FUSIONS),
    "fusion_init": partial(one_of, options=get_args(Init)),
    **dict.fromkeys("vit_precision llm_precision".split(), partial(one_of, options=DTYPES)),
    "mae_source": partial(one_of, options=SOURCES),
    "token_positions": _check_positions,
    "train_only": _check_list,
}
#: those without which no model can be built
REQUIRED = ("vit_model", "bert", "image_size", "num_query_token", "fusion")


def check_values(cfg: DictConfig) -> None:
    """Check the values in a ``model`` configuration before anything is built.

    Raises:
        UserError: one is not of its kind, such as a count that is too small or a fusion that doesn't exist.
    """
    values: Any = OmegaConf.to_container(cfg, resolve=True)
    values.setdefault("fusion", "dual")
    for key, check in CHECKS.items():
        if values.get(key) is not None or key in REQUIRED:
            check(f"model.{key}", values.get(key))
    for key in _fusion_options(values):
        if key not in FUSION_OPTIONS:
            own = parameters_of(FUSIONS[values["fusion"]]) - OFFERED
            one_of("model", key, {*FUSION_OPTIONS, *(f"fusion_{name}" for name in own)})
    if reads_mae(values):
        text("model.mae_model", values.get("mae_model", ""))  # LAVIS's own classes have no such key
    if (values.get("mae_source"), values["fusion"]) == ("clip", "concat"):
        raise UserError("model.mae_source: 'clip' with fusion 'concat' would read C twice; choose 'mae' or 'random'")


def reads_mae(model: Mapping[str, Any]) -> bool:
    """Whether a ``model`` configuration builds an MAE, to which ``mae_model`` refers."""
    return FUSIONS[model.get("fusion") or "dual"].needs_mae and model.get("mae_source") != "clip"


def options_of(model: type) -> set[str]:
    """Keys of a configuration whose values a model's constructor takes, under the same names."""
    return parameters_of(model) - BUILT


def given(cfg: DictConfig, *keys: str) -> dict[str, Any]:
    """Return those of the keys that are set, as plain values; for the others the constructor's defaults hold."""
    values: Any = OmegaConf.to_container(cfg, resolve=True)
    return {key: values[key] for key in keys if values.get(key) is not None}


def build_parts(cfg: DictConfig) -> dict[str, Any]:
    """Build the parts that ``XFormerBase`` takes, from a ``model`` configuration.

    Raises:
        UserError: a name, folder or file in the configuration is wrong.
    """
    check_values(cfg)
    name = cfg.get("fusion", "dual")
    visual_encoder = towers.build_clip(
        cfg.vit_model,
        image_size=cfg.image_size,
        weights=cfg.get("vit_weights"),
        **given(cfg, "drop_path_rate", "use_grad_checkpoint"),
    )
    mae = _build_mae(cfg, visual_encoder)
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
        **{key.removeprefix("fusion_"): value for key, value in given(cfg, *_fusion_options(cfg)).items()},
    )
    return {
        "visual_encoder": visual_encoder,
        "mae": mae,
        "qformer": qformer,
        "tokenizer": towers.build_tokenizer(cfg.bert),
        "fusion": fusion,
        "image_size": cfg.image_size,
    }


def weights_of(weights: Mapping[str, Any] | None, defaults: Mapping[str, float]) -> dict[str, float]:
    """Return the weight of every loss: the defaults, overridden by ``model.loss_weights``.

    Raises:
        UserError: there is no such loss, or its weight is not a finite number, 0 or more.
    """
    if not isinstance(weights or {}, Mapping):
        raise UserError(
            f"model.loss_weights: {weights!r} is no weight by loss; write {{{next(iter(defaults))}: {weights}}}"
        )
    for name, weight in (weights or {}).items():
        one_of("model.loss_weights", name, defaults)
        if number(f"model.loss_weights.{name}", weight) < 0:
            raise UserError(f"model.loss_weights.{name} is {weight!r}; it must be 0 or more")
    return {**defaults, **(weights or {})}


def _fusion_options(cfg: Mapping[Any, Any]) -> list[str]:
    """The keys of a ``model`` configuration that a fusion takes under these names, without the prefix."""
    return [str(key) for key in cfg if str(key).startswith("fusion_") and key != "fusion_heads"]


def _heads(fusion: str, visual_encoder: Any, qformer: Any) -> int:
    """Number of heads of the attending module: CLIP in early cross-attention, otherwise the Q-Former."""
    clip = FUSIONS[fusion].clip_heads
    return towers.heads_of(visual_encoder) if clip else qformer.config.num_attention_heads


def _build_mae(cfg: DictConfig, visual_encoder: Any) -> MaskedAutoencoder | None:
    """The model that computes M; None if the fusion needs no M, or gets CLIP's tokens instead."""
    source = cfg.get("mae_source") or "mae"
    if (layer := cfg.get("clip_layer")) is not None:
        if source != "clip":
            raise UserError(f"model.clip_layer: {layer} needs model.mae_source: clip, not {source}")
        towers.block_of(visual_encoder, layer)
    if not reads_mae(cfg):
        return None
    return towers.build_mae(
        cfg.mae_model,
        norm_pix_loss=cfg.get("mae_norm_pix_loss"),
        image_size=cfg.get("mae_image_size"),
        trained=source == "mae",
    )
