"""``lavis_blip2``, ``lavis_blip2_opt``: LAVIS's own BLIP-2 classes, to compare with ``fusion: none``.

Every computation is LAVIS's. Only what keeps these classes from being trained here is replaced: LAVIS 1.0.2 downloads
encoder and BERT by fixed names, loads released weights even if none are wanted, and needs a process group even for a
single process. Checkpoints use the weight names of ``fusion: none``, which reads and evaluates them
(stage 1 with ``embed_dim: 256``, LAVIS's own).

With a process group, LAVIS's ITC passes no gradient to the features that it gathers, unlike ours: losses are equal,
gradients not exactly.
"""

from __future__ import annotations

import logging
from functools import partial
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from lavis.common.registry import registry
from lavis.models.blip2_models.blip2 import LayerNorm
from lavis.models.blip2_models.blip2_opt import Blip2OPT
from lavis.models.blip2_models.blip2_qformer import Blip2Qformer
from lavis.models.eva_vit import convert_weights_to_fp16
from omegaconf import DictConfig
from torch import Tensor, nn

from lavis_xformer.assets import resolve
from lavis_xformer.errors import UserError
from lavis_xformer.images import unpack
from lavis_xformer.models import towers
from lavis_xformer.models.checkpoints import CheckpointLoading, load_pretrained
from lavis_xformer.models.fusion import NoFusion
from lavis_xformer.models.stage2 import XFormerStage2
from lavis_xformer.paths import type_path

logger = logging.getLogger(__name__)

Samples = dict[str, Any]


class OwnParts(CheckpointLoading):
    """Mixin before a LAVIS class: takes parts by any name that our models take, and images from our processors."""

    CONFIG_KEYS: ClassVar[frozenset[str]] = frozenset(
        "vit_model vit_weights image_size drop_path_rate use_grad_checkpoint vit_precision freeze_vit bert "
        "num_query_token cross_attention_freq max_txt_len blip2_pretrained fusion".split()
    )
    config: ClassVar[DictConfig]  #: of the model that is being built

    @classmethod
    def default_config_path(cls, model_type: str) -> str:
        """The YAML of a model type.

        Raises:
            UserError: there is no such type; exported folders are not supported here.
        """
        return type_path(cls, model_type)

    @classmethod
    def from_config(cls, cfg: DictConfig) -> Any:
        """Build LAVIS's model and load what ``pretrained`` or ``blip2_pretrained`` names, if anything.

        Raises:
            UserError: a name, folder or file in the configuration is wrong.
        """
        if (fusion := cfg.get("fusion", "none")) != "none":
            raise UserError(f"model.fusion is {fusion}, but LAVIS's own BLIP-2 has none; set it to none")
        if not dist.is_initialized():  # LAVIS reads the rank unconditionally
            backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        cls.config = cfg  # for LAVIS's class methods, which get no configuration
        model = super().from_config(cfg)  # type: ignore[misc]
        model.visual_encoder.register_forward_pre_hook(partial(_clip_view, size=cfg.image_size))
        model.fusion = NoFusion()
        model.load_report = load_pretrained(model, cfg)
        return model

    @classmethod
    def from_pretrained(cls, model_type: str) -> Any:
        """Build a model of one of its types, with the weights that its YAML names."""
        model = super().from_pretrained(model_type)  # type: ignore[misc]
        if not model.load_report.loaded:
            logger.warning("%s: no weights are known for this type; load a checkpoint, or train it", model_type)
        return model

    def load_checkpoint_from_config(self, cfg: DictConfig, **unused: Any) -> None:
        """Do nothing; :meth:`from_config` loads. LAVIS would load a file even if none is named."""

    @classmethod
    def init_tokenizer(cls) -> Any:
        """BERT's tokenizer of ``model.bert``."""
        return towers.build_tokenizer(cls.config.bert)

    @classmethod
    def init_Qformer(cls, num_query_token: int, vision_width: int, cross_attention_freq: int = 2) -> Any:
        """LAVIS's Q-Former from ``model.bert``, and its queries (1, Q, D).

        ``cross_attention_freq`` is read from the configuration, because ``Blip2OPT`` doesn't pass it on.
        """
        qformer = towers.build_qformer(
            cls.config.bert,
            num_queries=num_query_token,
            vision_width=vision_width,
            cross_attention_freq=cls.config.get("cross_attention_freq", cross_attention_freq),
        )
        width, std = qformer.config.hidden_size, qformer.config.initializer_range
        return qformer, nn.Parameter(torch.randn(1, num_query_token, width) * std)

    @classmethod
    def init_vision_encoder(
        cls, name: str, img_size: int, drop_path_rate: float, use_grad_checkpoint: bool, precision: str
    ) -> Any:
        """CLIP by any name that our models take, and the layer norm of its output."""
        encoder = towers.build_clip(
            name,
            image_size=img_size,
            weights=cls.config.get("vit_weights"),
            drop_path_rate=drop_path_rate,
            use_grad_checkpoint=use_grad_checkpoint,
        )
        if precision == "fp16" and torch.cuda.is_available():
            convert_weights_to_fp16(encoder)
        return encoder, LayerNorm(encoder.num_features)


def _clip_view(encoder: nn.Module, inputs: tuple[Tensor, ...], *, size: int) -> Tensor:
    """Encoder pre-hook: image (B, 3 or 6, S, S) as packed by our processors -> CLIP's view (B, 3, S, S)."""
    return unpack(inputs[0], clip_size=size, mae_size=size)[0]


@registry.register_model("lavis_blip2")
class LavisBlip2(OwnParts, Blip2Qformer):
    """LAVIS's ``Blip2Qformer``, stage 1."""

    PRETRAINED_MODEL_CONFIG_DICT: ClassVar[dict[str, str]] = {
        "mini": "models/lavis_blip2_mini.yaml",
        "pretrain": "models/lavis_blip2_pretrain.yaml",
    }

    def forward(self, samples: Samples) -> dict[str, Any]:
        """LAVIS's losses under our names: ``loss``, ``loss_itc``, ``loss_itm``, ``loss_itg``."""
        output = super().forward(samples)
        return {
            "loss": output.loss,
            "loss_itc": output.loss_itc,
            "loss_itm": output.loss_itm,
            "loss_itg": output.loss_lm,
        }


@registry.register_model("lavis_blip2_opt")
class LavisBlip2OPT(OwnParts, Blip2OPT):
    """LAVIS's ``Blip2OPT``, stage 2 on captions; to ask questions, load its checkpoints into ``fusion: none``."""

    CONFIG_KEYS = OwnParts.CONFIG_KEYS | {"opt_model", "prompt"}
    STAGE1_WEIGHTS = XFormerStage2.STAGE1_WEIGHTS
    NEW_WEIGHTS = XFormerStage2.NEW_WEIGHTS
    PRETRAINED_MODEL_CONFIG_DICT: ClassVar[dict[str, str]] = {
        "mini": "models/lavis_blip2_opt_mini.yaml",
        "pretrain_opt2.7b": "models/lavis_blip2_opt_pretrain_opt2.7b.yaml",
        "pretrain_opt6.7b": "models/lavis_blip2_opt_pretrain_opt6.7b.yaml",
    }

    @classmethod
    def from_config(cls, cfg: DictConfig) -> Any:
        """As :meth:`OwnParts.from_config`; ``opt_model`` may be a shipped one."""
        cfg = cfg.copy()
        cfg.opt_model = str(resolve(cfg.opt_model))
        return super().from_config(cfg)

    def forward(self, samples: Samples) -> dict[str, Any]:
        """LAVIS's language-modelling loss on captions: ``loss`` and, under our name, ``loss_lm``.

        Raises:
            UserError: the samples are questions, which LAVIS's class doesn't train on.
        """
        if "answer" in samples:
            raise UserError("lavis_blip2_opt: LAVIS's Blip2OPT trains on captions only; leave the questions out")
        loss = super().forward(samples)["loss"]
        return {"loss": loss, "loss_lm": loss}
