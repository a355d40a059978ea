"""Stage 2 at the paper's sizes: parameter counts on the meta device, and one real step and one caption (slow)."""

from __future__ import annotations

import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from test_full_size import MAE_HUGE, Vocabulary, count
from transformers import (
    AutoTokenizer,
    BertConfig,
    OPTConfig,
    T5Config,
    T5ForConditionalGeneration,
    T5TokenizerFast,
    ViTMAEConfig,
    ViTMAEForPreTraining,
)

from lavis_xformer.models import towers
from lavis_xformer.models.fusion import FUSIONS
from lavis_xformer.models.language import CachedOPT, LanguageModel, OptLanguage, T5Language
from lavis_xformer.models.mae import MaskedAutoencoder
from lavis_xformer.models.stage1 import XFormer
from lavis_xformer.models.stage2 import XFormerOPT, XFormerT5

OPT = {"vocab_size": 50272, "num_hidden_layers": 32, "num_attention_heads": 32, "pad_token_id": 1, "bos_token_id": 2}
SIZES = {
    "opt2.7b": {**OPT, "hidden_size": 2560, "word_embed_proj_dim": 2560, "ffn_dim": 10240},
    "opt6.7b": {**OPT, "hidden_size": 4096, "word_embed_proj_dim": 4096, "ffn_dim": 16384},
    "flant5xl": {"d_model": 2048, "d_ff": 5120, "num_layers": 24, "num_heads": 32, "vocab_size": 32128}
    | {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False, "decoder_start_token_id": 0},
}
GIB = 2**30


@contextmanager
def meta_device() -> Iterator[None]:
    """Modules without memory; three places read values, which the meta device doesn't have."""
    hub = "transformers.models.vit_mae.modeling_vit_mae"
    with (
        torch.device("meta"),
        mock.patch(f"{hub}.ViTMAEEmbeddings.initialize_weights"),
        mock.patch(f"{hub}.ViTMAEDecoder.initialize_weights"),
        mock.patch("torch.linspace", lambda start, end, steps: torch.zeros(steps, device="cpu")),
    ):
        yield


def parts(fusion: str) -> dict[str, Any]:
    """What both stages are built of."""
    config = towers.qformer_config(BertConfig(), num_queries=32, vision_width=1408, cross_attention_freq=2)
    return {
        "visual_encoder": towers.eva_vit(img_size=224, **towers.EVA_CLIP_G),
        "mae": MaskedAutoencoder(model=ViTMAEForPreTraining(ViTMAEConfig(**MAE_HUGE))) if fusion != "none" else None,
        "qformer": towers.BertLMHeadModel(config),
        "fusion": FUSIONS[fusion](query_width=768, clip_width=1408, mae_width=1280, heads=12),
        "image_size": 224,
    }


@pytest.fixture
def language(opt_folder: Path, t5_folder: Path) -> Any:
    """A factory of language models of full size with random weights and a toy tokenizer."""

    def make(name: str) -> LanguageModel:
        if name == "flant5xl":
            tokenizer = T5TokenizerFast.from_pretrained(t5_folder)
            return T5Language(model=T5ForConditionalGeneration(T5Config(**SIZES[name])), tokenizer=tokenizer)
        tokenizer = AutoTokenizer.from_pretrained(opt_folder, use_fast=False)
        return OptLanguage(model=CachedOPT(OPTConfig(**SIZES[name])), tokenizer=tokenizer)

    return make


@pytest.mark.parametrize(
    ("name", "fusion", "trained", "frozen"),
    [
        ("opt2.7b", "none", 107_133_696, 2_651_596_800),
        ("opt2.7b", "dual", 128_795_904, 2_651_596_800),
        ("opt6.7b", "none", 108_314_880, 6_658_473_984),
        ("opt6.7b", "dual", 129_977_088, 6_658_473_984),
        ("flant5xl", "dual", 128_402_176, 2_849_757_184),
    ],
)
def test_trained_and_frozen_parameters(name: str, fusion: str, trained: int, frozen: int, language: Any) -> None:
    with meta_device():
        cls = XFormerT5 if name == "flant5xl" else XFormerOPT
        model = cls(language=language(name), tokenizer=Vocabulary(), **parts(fusion))
    assert (count(model, trainable=True), count(model.language.model)) == (trained, frozen)
    assert count(model.Qformer) == 105_137_664
    if fusion == "dual":
        assert 125e6 < trained < 131e6


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["stage 1", "stage 2 with OPT-2.7B"])
def test_one_step_at_full_size_on_a_cpu(
    stage: str, language: Any, vocab_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    start = time.perf_counter()
    shared = parts("dual") | {"tokenizer": towers.build_tokenizer(str(vocab_folder))}
    model: Any = XFormer(**shared) if stage == "stage 1" else XFormerOPT(language=language("opt2.7b"), **shared)
    built = time.perf_counter()
    samples = {"image": torch.randn(2, 3, 224, 224), "text_input": ["a red circle", "two blue square"]}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    loss = model(samples)["loss"]
    loss.backward()
    optimizer.step()
    stepped = time.perf_counter()
    texts = model.eval().generate({"image": samples["image"][:1]}, num_beams=2, max_length=12)
    said = time.perf_counter()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB
    with capsys.disabled():
        print(
            f"\n{stage}: built {built - start:.0f} s, step of 2 {stepped - built:.0f} s, "
            f"caption {said - stepped:.0f} s, peak {peak:.1f} GiB"
        )
    assert torch.isfinite(loss)
    assert len(texts) == 1
    assert peak < 24
