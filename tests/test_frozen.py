"""Frozen parts outlive what users do with a whole model: pickling it, asking it before it is trained."""

from __future__ import annotations

import gc
import io
import weakref
from copy import deepcopy
from typing import Any

import pytest
import torch

from lavis_xformer.models import frozen


@pytest.mark.parametrize("kind", ["opt", "t5"])
def test_a_whole_model_is_saved_and_read(kind: str, make_stage2: Any, batch: dict[str, Any]) -> None:
    model, file = make_stage2(kind, init="normal"), io.BytesIO()
    for tower in (model.visual_encoder, model.mae.model, model.language.model):
        assert not any(module.training for module in tower.modules()), "from the first moment on"
    torch.save(model, file)
    file.seek(0)
    again = torch.load(file, weights_only=False)
    assert torch.equal(again.eval()(batch)["loss"], model.eval()(batch)["loss"])
    again.train()
    assert again.fusion.training
    for tower in (again.visual_encoder, again.mae.model, again.language.model):
        assert not any(module.training for module in tower.modules())
    assert again.language.model is getattr(again, f"{kind}_model")


def test_a_model_that_is_let_go_leaves_the_memory_at_once(make_stage2: Any, batch: dict[str, Any]) -> None:
    model = make_stage2("opt")
    model(batch)["loss"].backward()
    weights = [weakref.ref(parameter) for parameter in model.parameters()]
    gc.disable()  # which doesn't know how full a GPU is
    try:
        del model
        assert not [weight for weight in weights if weight() is not None]
    finally:
        gc.enable()


@pytest.mark.parametrize("kind", ["opt", "t5"])
def test_asking_under_inference_mode_leaves_a_model_that_trains(
    kind: str, make_stage2: Any, batch: dict[str, Any]
) -> None:
    model = make_stage2(kind)
    model.language.model.half()  # as in the file of a large one
    model.visual_encoder.blocks[0].mlp.half()
    with torch.inference_mode():
        model.generate(batch, num_beams=1, max_length=2)
    assert not any(parameter.is_inference() for parameter in model.parameters())
    model.train()(batch)["loss"].backward()
    assert model.query_tokens.grad.abs().sum() > 0


@pytest.mark.parametrize("kind", ["opt", "t5"])
def test_what_is_assigned_counts_as_in_lavis(kind: str, make_stage2: Any, batch: dict[str, Any]) -> None:
    model = make_stage2(kind).eval()
    texts = {**batch, "text_output": batch["text_input"]}
    before = model(texts)["loss"]
    model.max_txt_len = 3
    cut = model(texts)["loss"]
    assert not torch.equal(cut, before)
    other = deepcopy(getattr(model, f"{kind}_model"))
    for parameter in other.parameters():
        parameter.data.zero_()
    setattr(model, f"{kind}_model", other)
    assert not torch.equal(model(texts)["loss"], cut)


def test_weights_that_a_user_trains_are_not_cast(make_stage2: Any, batch: dict[str, Any], monkeypatch: Any) -> None:
    model = make_stage2("opt")
    trained, other = model.opt_model.model.decoder.layers[0].fc1.requires_grad_(True), model.opt_model.lm_head
    monkeypatch.setattr(frozen, "compute_dtype", lambda device, precision: torch.bfloat16)  # as on a GPU
    model(batch)["loss"].backward()
    assert (trained.weight.dtype, other.weight.dtype) == (torch.float32, torch.bfloat16)
    assert trained.weight.grad.abs().sum() > 0


def test_an_image_encoder_unfrozen_after_a_first_pass_is_trained_in_fp32(
    make_stage2: Any, batch: dict[str, Any], monkeypatch: Any
) -> None:
    model = make_stage2("opt")
    monkeypatch.setattr(frozen, "compute_dtype", lambda device, precision: torch.bfloat16)  # as on a GPU
    model(batch)
    assert model.visual_encoder.blocks[0].mlp.fc1.weight.dtype == torch.bfloat16
    model.visual_encoder.requires_grad_(True)
    model(batch)["loss"].backward()
    assert model.visual_encoder.blocks[0].mlp.fc1.weight.grad.dtype == torch.float32
