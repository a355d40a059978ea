"""Stage 2 at the paper's sizes: parameter counts on the meta device, and one real step and one caption (slow)."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from lavis.models.blip2_models.modeling_opt import OPTForCausalLM
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

from lavis_xformer.models import frozen, towers
from lavis_xformer.models.frozen import Precision
from lavis_xformer.models.fusion import build_fusion
from lavis_xformer.models.language import LanguageModel
from lavis_xformer.models.mae import MaskedAutoencoder
from lavis_xformer.models.opt import CachedOPT, OptLanguage
from lavis_xformer.models.stage1 import XFormer
from lavis_xformer.models.stage2 import XFormerOPT, XFormerT5
from lavis_xformer.models.t5 import T5Language

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
        "qformer": towers.QFormer(config),
        "fusion": build_fusion(fusion, query_width=768, clip_width=1408, mae_width=1280, heads=12),
        "image_size": 224,
    }


def whole_tokenizer(folder: Path) -> Any:
    """The toy tokenizer, able to decode all ids of OPT's vocabulary: random weights say anything."""
    tokenizer = AutoTokenizer.from_pretrained(folder, use_fast=False)
    tokenizer.decoder |= {i: "?" for i in range(len(tokenizer), OPT["vocab_size"])}
    return tokenizer


@torch.no_grad()
def opt(sizes: dict[str, int], dtype: torch.dtype) -> CachedOPT:
    """OPT with random weights, drawn once in their precision; transformers draws them twice."""
    with torch.device("meta"):
        model = CachedOPT(OPTConfig(**sizes))
    model.to(dtype).to_empty(device=torch.get_default_device()).tie_weights()
    for parameter in model.parameters():
        parameter.uniform_(-0.03, 0.03)
    return model


@pytest.fixture
def language(opt_folder: Path, t5_folder: Path) -> Any:
    """A factory of language models of full size with random weights and a toy tokenizer."""

    def make(name: str, dtype: torch.dtype = torch.float32) -> LanguageModel:
        if name == "flant5xl":
            tokenizer = T5TokenizerFast.from_pretrained(t5_folder)
            return T5Language(model=T5ForConditionalGeneration(T5Config(**SIZES[name])), tokenizer=tokenizer)
        return OptLanguage(model=opt(SIZES[name], dtype), tokenizer=whole_tokenizer(opt_folder))

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
@pytest.mark.parametrize("beams", [1, 5])
def test_the_cache_saves_time(beams: int, opt_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Seconds of one core for 30 new tokens after 32 queries, with OPT-125M's sizes and random weights."""
    sizes = {"hidden_size": 768, "word_embed_proj_dim": 768, "ffn_dim": 3072, "num_hidden_layers": 12}
    config = OPTConfig(**{**OPT, **sizes, "num_attention_heads": 12})
    torch.manual_seed(0)
    cached = CachedOPT(config).eval()
    uncached = OPTForCausalLM(config).eval()  # LAVIS's
    uncached.load_state_dict(cached.state_dict())
    visual = torch.randn(1, 32, 768)
    options = {"do_sample": False, "num_beams": beams, "num_return_sequences": 1}
    seconds, said = [], []
    for model in (cached, uncached):
        language = OptLanguage(model=model, tokenizer=whole_tokenizer(opt_folder))
        start = time.process_time()
        said.append(language.generate(visual, [""], max_new_tokens=30, min_new_tokens=30, **options))
        seconds.append(time.process_time() - start)
    with capsys.disabled():
        print(f"\n{beams} beams: {seconds[0]:.1f} s with the cache, {seconds[1]:.1f} s without")
    assert said[0] == said[1]
    assert seconds[1] > 2 * seconds[0]


def to_precision(tower: torch.nn.Module, dtype: torch.dtype) -> None:
    """What the model does at its first image, done before the language model needs the memory."""
    for module in tower.modules():
        if isinstance(module, torch.nn.Linear | torch.nn.Conv2d):
            module.to(dtype)


def free_memory() -> float:
    """GiB that can be taken without swapping."""
    return int(Path("/proc/meminfo").read_text().split("MemAvailable:")[1].split()[0]) * 1024 / GIB


def peak_memory() -> float:
    """Most GiB that this process has held since the last reset."""
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024 / GIB


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "precision", "needs"),
    [
        ("stage 1", "fp32", 11),
        ("stage 2 with OPT-2.7B", "bf16", 12),  # frozen parts as on a GPU
        ("stage 2 with OPT-2.7B", "fp32", 20),  # as on a CPU
    ],
)
def test_one_step_at_full_size_on_a_cpu(
    stage: str,
    precision: Precision,
    needs: int,
    language: Any,
    vocab_folder: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if free_memory() < needs + 2:
        pytest.skip(f"{stage} in {precision} takes {needs} GiB, and only {free_memory():.1f} are free")
    dtype = frozen.DTYPES[precision]
    monkeypatch.setattr(frozen, "compute_dtype", lambda device, name: dtype)
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    start = time.perf_counter()
    shared = parts("dual") | {"tokenizer": towers.build_tokenizer(str(vocab_folder))}
    for tower in (shared["visual_encoder"], shared["mae"]):
        to_precision(tower, dtype)
    model: Any = XFormer(**shared) if stage == "stage 1" else XFormerOPT(language=language("opt2.7b", dtype), **shared)
    built = time.perf_counter()
    samples = {"image": torch.randn(2, 3, 224, 224), "text_input": ["a red circle", "two blue square"]}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    loss = model(samples)["loss"]
    loss.backward()
    optimizer.step()
    stepped = time.perf_counter()
    texts = model.eval().generate({"image": samples["image"][:1]}, num_beams=2, max_length=12)
    said = time.perf_counter()
    with capsys.disabled():
        print(
            f"\n{stage}, frozen parts in {precision}: built {built - start:.0f} s, step of 2 {stepped - built:.0f} s, "
            f"caption {said - stepped:.0f} s, peak {peak_memory():.1f} GiB"
        )
    assert torch.isfinite(loss)
    assert len(texts) == 1
    assert peak_memory() < 24
