"""Mixed precision and gradient checkpointing, as far as a CPU shows them: it has both scaler and autocast."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import toy_training
from torch import nn

from lavis_xformer.engine.step import Stepper
from lavis_xformer.models import towers


def make_stepper(model, amp, **options):
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    return Stepper(model=model, optimizer=optimizer, forward=lambda m, samples: m(samples), amp=amp, **options)


class Toy(nn.Module):
    """Means of squares, small enough for fp16 to lose them without a scaler."""

    def __init__(self, factor=1.0):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(5, 16), nn.GELU(), nn.Linear(16, 3))
        self.factor = factor

    def forward(self, samples):
        return {"loss": self.factor * self.layers(samples).square().mean()}


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_weights_and_gradients_stay_fp32_and_close(amp):
    data = torch.randn(12, 5)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0) if amp == "fp16" else None
    mixed, full = make_stepper(Toy(), amp, scaler=scaler), make_stepper(Toy(), "no")
    terms, expected = mixed.gradients(data.chunk(2)), full.gradients([data])
    assert mixed.model.layers(data).dtype == torch.float32
    for left, right in zip(mixed.parameters, full.parameters, strict=True):
        assert left.grad.dtype == torch.float32
        torch.testing.assert_close(left.grad, right.grad, rtol=0.05, atol=5e-3)
    for name, value in terms.items():
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, expected[name], rtol=0.05, atol=5e-3)


def test_the_scaler_keeps_small_gradients_and_the_norm_is_of_the_true_ones():
    data = torch.randn(8, 5)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    scaled = make_stepper(Toy(1e-6), "fp16", scaler=scaler, max_grad_norm=1.0)
    plain, full = make_stepper(Toy(1e-6), "fp16"), make_stepper(Toy(1e-6), "no")
    norms = [stepper.gradients([data])["grad_norm"] for stepper in (scaled, plain, full)]
    torch.testing.assert_close(norms[0], norms[2], rtol=0.05, atol=0)
    assert (norms[1] - norms[2]).abs() > 0.05 * norms[2]


def test_an_overflow_skips_the_step_and_lowers_the_scale():
    scaler = torch.amp.GradScaler("cpu")
    stepper = make_stepper(Toy(), "fp16", scaler=scaler)
    before = [p.detach().clone() for p in stepper.parameters]
    stepper.gradients([torch.randn(4, 5)])
    stepper.parameters[0].grad.fill_(float("inf"))
    scaler._per_optimizer_states[id(stepper.optimizer)]["found_inf_per_device"] = {torch.device("cpu"): torch.ones(())}
    stepper.apply()
    assert all(torch.equal(left, right) for left, right in zip(before, stepper.parameters, strict=True))
    assert scaler.get_scale() == 2.0**15


def test_a_discarded_step_leaves_the_scaler_ready_for_the_next():
    scaler = torch.amp.GradScaler("cpu")
    stepper = make_stepper(Toy(), "fp16", scaler=scaler)
    assert not torch.isfinite(stepper.gradients([torch.full((4, 5), float("nan"))])["loss"])
    stepper.discard()
    assert scaler.get_scale() == 2.0**16
    assert torch.isfinite(stepper.gradients([torch.randn(4, 5)])["loss"])
    stepper.apply()
    assert all(torch.isfinite(p).all() for p in stepper.parameters)


@pytest.mark.parametrize("fusion", ["dual", "none"])
def test_the_model_trains_under_bf16(make_xformer, batch, fusion):
    def terms(amp):
        stepper = make_stepper(make_xformer(fusion), amp)
        torch.manual_seed(5)
        return stepper, stepper.gradients([batch])

    (full, expected), (mixed, found) = terms("no"), terms("bf16")
    assert found.keys() == expected.keys()
    for name in found:
        if name not in ("itm_accuracy", "grad_norm"):
            torch.testing.assert_close(found[name], expected[name], rtol=0.1, atol=0.05)
    mixed.apply()
    assert all(p.dtype == torch.float32 and torch.isfinite(p).all() for p in mixed.parameters)
    assert len(mixed.parameters) == len(full.parameters)


def test_gradient_checkpointing_changes_no_number():
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 20, "depth": 3, "num_heads": 2, "mlp_ratio": 2}
    found = []
    for saving in (False, True):
        torch.manual_seed(0)
        model = towers.eva_vit(use_grad_checkpoint=saving, qkv_bias=True, **sizes).train()
        images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
        output = model(images)
        output.square().mean().backward()
        found.append((output, [p.grad for p in model.parameters()]))
    (plain, gradients), (saved, again) = found
    assert torch.equal(plain, saved)
    for left, right in zip(gradients, again, strict=True):
        assert (left is None) == (right is None)
        assert left is None or torch.equal(left, right)


@pytest.mark.parametrize(("asked", "used"), [("bf16", "bf16"), ("fp16", "no"), (True, "no"), (False, "no")])
def test_a_cpu_has_bf16_only(asked, used, tmp_path):
    runner = toy_training.make_runner(tmp_path, amp=asked, max_epoch=1)
    assert runner.amp == used
    assert runner.scaler is None
    runner.train()


@pytest.mark.parametrize("able", [True, False])
def test_auto_takes_what_the_hardware_computes(able, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": able})
    assert toy_training.make_runner(tmp_path, amp="auto").amp == ("bf16" if able else "no")


def test_on_a_cpu_frozen_parts_compute_as_the_run_and_stay_fp32(make_xformer, batch):
    model = make_xformer("dual").eval()
    full = model.encode_image(batch["image"])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = model.encode_image(batch["image"])
    assert not torch.equal(full.mae.tokens, mixed.mae.tokens)
    torch.testing.assert_close(full.mae.tokens, mixed.mae.tokens.float(), rtol=0.1, atol=0.1)
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_no_layer_keeps_a_copy_of_its_own_of_the_image(make_xformer, batch):
    model, kept = make_xformer("dual").train(), {}

    def keep(tensor):
        kept[tensor.data_ptr()] = tuple(tensor.shape), tensor.dtype
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x), torch.autocast("cpu", dtype=torch.bfloat16):
        terms = model(batch)
    assert terms["loss_rec"].requires_grad
    for pairs in (4, 12):  # of ITC and ITG, and of ITM: C as the Q-Former's layers read it
        assert list(kept.values()).count(((pairs * 17, 20), torch.bfloat16)) <= 1
    assert not [shape for shape, _ in kept.values() if shape[-1:] == (32,) and 17 in shape[:-1]], "MAE's decoder"


@pytest.mark.parametrize(("device", "dtype"), [("cuda", torch.bfloat16), ("cpu", None)])
def test_evaluation_on_a_gpu_is_in_the_trainings_precision(
    device: str, dtype: torch.dtype | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = toy_training.make_runner(tmp_path, amp="bf16")
    monkeypatch.setattr(runner, "_device", torch.device(device))
    assert runner.eval_dtype == dtype
