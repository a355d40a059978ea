"""The recipes' batches at the paper's sizes on one GPU, with random weights: time and memory beside BLIP-2's."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from lavis.models.blip2_models.modeling_opt import OPTForCausalLM
from omegaconf import OmegaConf
from test_full_size_stage2 import GIB, SIZES, opt, parts, whole_tokenizer

from lavis_xformer.engine.step import Stepper
from lavis_xformer.models import towers
from lavis_xformer.models.opt import OptLanguage
from lavis_xformer.models.stage1 import XFormer
from lavis_xformer.models.stage2 import XFormerOPT
from lavis_xformer.paths import project_path

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU"),
]
RECIPES = {
    "stage 1": "train/pretrain_stage1.yaml",
    "opt2.7b": "train/pretrain_stage2_opt2.7b.yaml",
    "opt6.7b": "train/pretrain_stage2_opt6.7b.yaml",
}
CAPTION = "a red star on the left of two blue circle above three green square"
WARM_UP, TIMED = 3, 10


class Cost(NamedTuple):
    """Of one step of one batch."""

    seconds: float
    memory: float  #: most GiB that tensors held

    def __str__(self) -> str:
        return f"{1000 * self.seconds:.0f} ms, {self.memory:.1f} GiB"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory, vocab_folder: Path) -> Any:
    """The toy words among as many as BERT has: predicting them costs what it costs with BERT's own."""
    folder = tmp_path_factory.mktemp("whole_bert")
    words = (vocab_folder / "vocab.txt").read_text().split()
    (folder / "vocab.txt").write_text("\n".join([*words, *(f"[unused{i}]" for i in range(30522 - len(words)))]))
    (folder / "config.json").write_text((vocab_folder / "config.json").read_text())
    return towers.build_tokenizer(str(folder))


def build(size: str, fusion: str, tokenizer: Any, opt_folder: Path) -> Any:
    """A model of full size on the GPU."""
    with torch.device("cuda"):
        shared = parts(fusion) | {"tokenizer": tokenizer}
        if size == "stage 1":
            return XFormer(**shared).cuda()
        language = OptLanguage(model=opt(SIZES[size], torch.float16), tokenizer=whole_tokenizer(opt_folder))
        return XFormerOPT(language=language, **shared).cuda()


def cost_of_a_step(model: Any, batch: int, amp: str) -> Cost:
    """Train on random images; the loss has to stay finite."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5)
    stepper = Stepper(model=model.train(), optimizer=optimizer, forward=lambda m, samples: m(samples), amp=amp)
    samples = {"image": torch.randn(batch, 3, 224, 224, device="cuda"), "text_input": [CAPTION] * batch}
    samples["image_id"] = torch.arange(batch, device="cuda")
    for step in range(WARM_UP + TIMED):
        if step == WARM_UP:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            start = time.perf_counter()
        terms = stepper.gradients([samples])
        stepper.apply()
    torch.cuda.synchronize()
    assert all(torch.isfinite(value) for value in terms.values())
    return Cost((time.perf_counter() - start) / TIMED, torch.cuda.max_memory_allocated() / GIB)


@pytest.mark.parametrize("size", RECIPES)
def test_a_batch_of_the_recipe(size: str, tokenizer: Any, opt_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = OmegaConf.load(project_path(f"projects/xformer/{RECIPES[size]}")).run
    costs = {}
    for fusion in ("none", "dual"):
        costs[fusion] = cost_of_a_step(build(size, fusion, tokenizer, opt_folder), run.batch_size_train, run.amp)
        torch.cuda.empty_cache()
    blip2, xformer = costs["none"], costs["dual"]
    with capsys.disabled():
        print(
            f"\n{size}, {run.batch_size_train} pairs in {run.amp} on {torch.cuda.get_device_name()}: "
            f"BLIP-2 {blip2}; X-Former {xformer}; "
            f"{xformer.seconds / blip2.seconds:.2f} times as long, {xformer.memory / blip2.memory:.2f} of the memory"
        )
    assert xformer.memory < torch.cuda.get_device_properties(0).total_memory / GIB


@pytest.mark.parametrize("beams", [1, 5])
def test_captions_of_a_batch(beams: int, opt_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """OPT-2.7B in half precision: 30 new tokens for 8 images, with its cache and by LAVIS's class, which has none.

    Of greedy decoding the times are only told: one token of eight images at a time waits for the host either way.
    """
    with torch.device("cuda"):
        cached = opt(SIZES["opt2.7b"], torch.float16).eval()
        visual = torch.randn(8, 32, cached.config.hidden_size)
    seconds, said = [], []
    for cls in (type(cached), OPTForCausalLM):
        cached.__class__ = cls
        language = OptLanguage(model=cached, tokenizer=whole_tokenizer(opt_folder))
        options = {"do_sample": False, "num_beams": beams, "num_return_sequences": 1}
        for tokens in (2, 30):
            torch.cuda.synchronize()
            start = time.perf_counter()
            texts = language.generate(visual, [""] * 8, max_new_tokens=tokens, min_new_tokens=tokens, **options)
        seconds.append(time.perf_counter() - start)
        said.append(texts)
    with capsys.disabled():
        print(f"\n8 images, {beams} beams: {seconds[0]:.2f} s with the cache, {seconds[1]:.2f} s without")
    assert len(said[0]) == len(said[1]) == 8
    assert beams == 1 or seconds[0] < seconds[1]
