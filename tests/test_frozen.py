"""Frozen parts outlive what users do with a whole model: pickling it, asking it before it is trained."""

from __future__ import annotations

import gc
import io
import weakref
from typing import Any

import pytest
import torch


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
