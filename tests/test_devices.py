"""What a device may ask: Apple's has no 64-bit floats, a GPU refuses tensors that were left on the CPU."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lavis_xformer.models import frozen
from lavis_xformer.models.frozen import DTYPES, Precision, compute_dtype
from lavis_xformer.models.stage2 import XFormerOPT

DEVICES = [
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU")),
    pytest.param("mps", marks=pytest.mark.skipif(not torch.backends.mps.is_available(), reason="no Apple GPU")),
]


class NoDoubles(TorchDispatchMode):
    """Raises where an operation gives a tensor of 64-bit floats."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func(*args, **(kwargs or {}))
        assert not any(
            isinstance(part, torch.Tensor) and part.dtype == torch.float64 for part in tree_leaves(results)
        ), func
        return results


def everything(model: Any, batch: dict[str, Any]) -> Iterable[Any]:
    """Train a step and ask a model of any stage all that it answers."""
    output = model.train()(batch)
    output["loss"].backward()
    yield output["loss"]
    model.eval()
    for options in ({"num_beams": 1}, {"num_beams": 2}, {"use_nucleus_sampling": True}):
        yield model.generate(batch, max_length=12, **options)
    yield model.extract_features(batch, mode="image").image_embeds
    if hasattr(model, "predict_answers"):
        yield model.predict_answers(batch, max_len=4)
        yield model.predict_answers(batch, inference_method="rank", answer_list=["two", "red"])
        return
    tokens = model.tokenize(batch["text_input"])
    with torch.no_grad():
        _, image_tokens = model.forward_image(batch["image"])
        yield model.compute_itm(image_tokens, tokens.input_ids, tokens.attention_mask)


@pytest.fixture(params=["stage 1", "opt", "t5"])
def model(request: pytest.FixtureRequest, make_xformer: Any, make_stage2: Any) -> Any:
    """One of the models, with all its losses."""
    if request.param == "stage 1":
        return make_xformer("dual", init="normal")
    return make_stage2(request.param, "dual", init="normal", loss_weights={"rec": 1})


def test_nothing_needs_64_bit_floats(model: Any, batch: dict[str, Any]) -> None:
    with NoDoubles():
        assert len(list(everything(model, batch))) >= 5
    with NoDoubles(), pytest.raises(AssertionError, match="_to_copy"):
        batch["image"].double()


@pytest.mark.parametrize("amp", [False, True])
def test_frozen_parts_in_half_precision(
    amp: bool, model: Any, batch: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, with or without mixed precision around them; evaluation has none."""
    monkeypatch.setattr(frozen, "compute_dtype", lambda device, precision: torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=amp):
        loss, *_ = everything(model, batch)
    assert torch.isfinite(loss)
    assert model.visual_encoder.patch_embed.proj.weight.dtype == torch.bfloat16
    assert {p.dtype for p in model.mae.model.decoder.parameters()} == {torch.float32}, "gradients pass through it"


@pytest.mark.parametrize("kind", ["opt", "t5"])
def test_gradients_of_a_large_batch_survive_a_language_model_in_fp16(
    kind: str, make_stage2: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of a mean over many tokens are below what fp16 holds; a run in fp16 has a scaler for them."""
    monkeypatch.setattr(frozen, "compute_dtype", lambda device, precision: DTYPES[precision])
    speaker = make_stage2(kind).language
    speaker.precision = "fp16"
    visual = torch.randn(1, 4, speaker.width)

    def gradient(copies: int, amp: torch.dtype | None = None) -> torch.Tensor:
        """Of the sum over the copies, which is as large as that of one."""
        leaf = visual.clone().requires_grad_()
        with torch.autocast("cpu", dtype=amp or torch.bfloat16, enabled=amp is not None):
            loss = speaker.loss(leaf.expand(copies, -1, -1), [[("", "a red star")]] * copies)
        (0.01 * loss).backward()
        assert leaf.grad is not None
        return leaf.grad

    one = gradient(1)
    for amp in (None, torch.bfloat16):
        torch.testing.assert_close(gradient(2000, amp), one, rtol=0.02, atol=0.02 * float(one.abs().max()))
    lost = gradient(2000, torch.float16) - one
    assert lost.norm() > 0.1 * one.norm()


@pytest.mark.gpu
@pytest.mark.parametrize("device", DEVICES)
def test_all_of_it_runs_on_a_gpu(device: str, model: Any, batch: dict[str, Any]) -> None:
    on_cpu = model.eval().extract_features(batch, mode="image").image_embeds
    model.to(device)
    batch["image"] = batch["image"].to(device)
    for result in everything(model, batch):
        assert result is not None
    assert torch.allclose(model.extract_features(batch, mode="image").image_embeds.cpu(), on_cpu, atol=2e-2)


@pytest.mark.parametrize("precision", sorted(DTYPES))
def test_precision_is_a_gpus_affair(
    precision: Precision, stage2_config: Any, batch: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    stage2_config.model |= {"llm_precision": precision, "vit_precision": precision}
    model = XFormerOPT.from_config(stage2_config.model)
    assert (model.language.precision, model.vit_precision) == (precision, precision)
    monkeypatch.setattr(frozen, "compute_dtype", lambda device, precision: DTYPES[precision])  # as on a GPU
    model.generate(batch, num_beams=1, max_length=2)
    for part in (model.visual_encoder.blocks[0].mlp.fc1, model.mae.model.vit.encoder.layer[0].output.dense):
        assert part.weight.dtype == DTYPES[precision]
    assert model.language.model.dtype == DTYPES[precision]
    assert compute_dtype(torch.device("cuda"), precision) == DTYPES[precision]
    assert compute_dtype(torch.device("cpu"), precision) == torch.float32
    assert compute_dtype(torch.device("mps"), precision) == torch.float32
