"""The paper's sizes, without their memory: parameter counts by module on the meta device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import BertConfig, ViTMAEConfig, ViTMAEForPreTraining

from lavis_xformer.models import towers
from lavis_xformer.models.fusion import FUSIONS, build_fusion
from lavis_xformer.models.mae import MaskedAutoencoder
from lavis_xformer.models.stage1 import XFormer

MAE_HUGE = {
    "hidden_size": 1280,
    "num_hidden_layers": 32,
    "num_attention_heads": 16,
    "intermediate_size": 5120,
    "patch_size": 14,
    "image_size": 224,
    "decoder_hidden_size": 512,
    "decoder_num_hidden_layers": 8,
    "decoder_num_attention_heads": 16,
    "decoder_intermediate_size": 2048,
}


def count(module: nn.Module | None, *, trainable: bool = False) -> int:
    """Parameters of a module, shared ones once."""
    return 0 if module is None else sum(p.numel() for p in module.parameters() if p.requires_grad or not trainable)


class Vocabulary:
    """bert-base-uncased's tokenizer as far as a count needs it: 30522 words and [DEC]."""

    bos_token_id = 30522

    def __len__(self) -> int:
        return 30523


@pytest.fixture(scope="module")
def build() -> Any:
    """A factory of full-size stage-1 models on the meta device."""
    from unittest import mock

    def make(fusion: str, **options: Any) -> XFormer:
        # three places read values, which the meta device doesn't have: sin-cos embeddings and drop-path rates
        hub = "transformers.models.vit_mae.modeling_vit_mae"
        with (
            torch.device("meta"),
            mock.patch(f"{hub}.ViTMAEEmbeddings.initialize_weights"),
            mock.patch(f"{hub}.ViTMAEDecoder.initialize_weights"),
            mock.patch("torch.linspace", lambda start, end, steps: torch.zeros(steps, device="cpu")),
        ):
            config = towers.qformer_config(BertConfig(), num_queries=32, vision_width=1408, cross_attention_freq=2)
            clip = towers.eva_vit(img_size=224, **towers.EVA_CLIP_G)
            heads = towers.heads_of(clip) if fusion == "early" else config.num_attention_heads
            return XFormer(
                visual_encoder=clip,
                mae=MaskedAutoencoder(model=ViTMAEForPreTraining(ViTMAEConfig(**MAE_HUGE))),
                qformer=towers.QFormer(config),
                tokenizer=Vocabulary(),
                fusion=build_fusion(fusion, query_width=768, clip_width=1408, mae_width=1280, heads=heads, **options),
                image_size=224,
            )

    return make


def test_counts_by_module(build: Any) -> None:
    model = build("dual")
    assert {name: count(child) for name, child in model.named_children()} == {
        "visual_encoder": 985_894_528,
        "ln_vision": 2_816,
        "mae": 657_074_508,
        "Qformer": 186_282_811,
        "fusion": 21_662_208,
        "vision_proj": 196_864,
        "text_proj": 196_864,
        "itm_head": 1_538,
    }
    assert count(model.mae.model.vit) == 630_764_800
    assert count(model, trainable=True) == count(build("none"), trainable=True) + 21_662_208


@pytest.mark.parametrize(
    ("fusion", "options", "added"),
    [("none", {}, 0), ("concat", {}, 1_806_208), ("early", {"depth": 3, "self_attention": False}, 70_349_952)],
)
def test_other_fusions_add(fusion: str, options: dict[str, Any], added: int, build: Any) -> None:
    assert count(build(fusion, **options).fusion) == added


@pytest.mark.parametrize("fusion", sorted(FUSIONS))
def test_tokens_pass_through_every_fusion(fusion: str, build: Any) -> None:
    model = build(fusion)
    with torch.device("meta"):
        seen = model.fusion.visual_tokens(torch.empty(2, 257, 1408), torch.empty(2, 257, 1280))
        z, _ = model.fusion.refine(torch.empty(2, 32, 768), torch.empty(2, 257, 1280))
    assert seen.shape == (2, 514 if fusion == "concat" else 257, 1408)
    assert z.shape == (2, 32, 768)


def test_pretrain_yaml_describes_this_model() -> None:
    from omegaconf import OmegaConf

    cfg = OmegaConf.load(Path(XFormer.default_config_path("pretrain"))).model
    assert (cfg.vit_model, cfg.mae_model, cfg.bert) == ("eva_clip_g", "facebook/vit-mae-huge", "bert-base-uncased")
    assert (cfg.num_query_token, cfg.image_size, cfg.mask_ratio, cfg.fusion) == (32, 224, 0.5, "dual")
