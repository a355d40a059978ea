"""Muon and AdamW as one optimiser."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lavis_xformer.engine import optimizers
from lavis_xformer.engine.optimizers import MuonAdamW

RATES = {"lr": 1e-3, "weight_decay": 0.1, "betas": (0.9, 0.98)}


class Words(nn.Module):
    """One parameter of every sort: a table, matrices (one tied to the table, one frozen), a vector, queries."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(5, 4)
        self.hidden = nn.Linear(4, 4)
        self.frozen = nn.Linear(4, 4).requires_grad_(False)
        self.queries = nn.Parameter(torch.randn(1, 2, 4))
        self.head = nn.Linear(4, 5, bias=False)
        self.head.weight = self.table.weight

    def loss(self) -> torch.Tensor:
        read = self.table(torch.arange(5)) + self.queries.mean(1)
        return self.head(self.frozen(self.hidden(read))).square().mean()


def train(model, optimizer, steps, lr=1e-3):
    for _ in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.zero_grad()
        model.loss().backward()
        optimizer.step()
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def test_muon_takes_the_trained_matrices_that_are_no_embeddings():
    model = Words()
    optimizer = MuonAdamW(model, **RATES, pace=2.0)
    assert [p for group in optimizer.muon.param_groups for p in group["params"]] == [model.hidden.weight]
    decays = [(group["weight_decay"], [id(p) for p in group["params"]]) for group in optimizer.adamw.param_groups]
    assert decays == [(0.1, [id(model.queries), id(model.table.weight)]), (0.0, [id(model.hidden.bias)])]


@pytest.mark.parametrize("pace", [1.0, 3.0])
def test_each_part_moves_as_alone_muon_at_its_pace(pace, monkeypatch):
    monkeypatch.setattr(optimizers, "computes_bf16", lambda device: True)  # as torch's Muon does on any hardware
    model, twin = Words(), Words()
    muon = torch.optim.Muon([twin.hidden.weight], lr=pace * 1e-3, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    twin.loss().backward()
    muon.step()
    optimizer = MuonAdamW(model, **RATES, pace=pace)
    moved = train(model, optimizer, 1)
    torch.testing.assert_close(moved["hidden.weight"], twin.hidden.weight.detach(), rtol=0, atol=0)
    assert not torch.equal(moved["queries"], twin.queries.detach())
    assert torch.equal(moved["frozen.weight"], twin.frozen.weight)
    assert {group["lr"] for group in optimizer.param_groups} == {1e-3}, "the pace is no other rate"


@pytest.mark.parametrize("shape", [(12, 12), (12, 40), (40, 12)])
def test_muon_is_torchs_where_the_hardware_has_bfloat16_and_in_fp32_elsewhere(shape, monkeypatch):
    torch.manual_seed(0)
    start, gradients = torch.randn(shape), torch.randn(3, *shape)

    def moved(muon_of):
        matrix = nn.Parameter(start.clone())
        muon = muon_of([matrix])
        for gradient in gradients:
            matrix.grad = gradient.clone()
            muon.step()
        return matrix.detach()

    rates = {"lr": 0.1, "weight_decay": 0.1}
    torchs = moved(lambda matrices: torch.optim.Muon(matrices, **rates, adjust_lr_fn="match_rms_adamw"))
    for native in (True, False):
        monkeypatch.setattr(optimizers, "computes_bf16", lambda device, native=native: native)
        ours = moved(lambda matrices: optimizers.Muon(matrices, **rates))
        assert torch.equal(ours, torchs) is native
        torch.testing.assert_close(ours, torchs, rtol=0, atol=0.02)


def test_orthogonalised_singular_values_are_near_one_and_exact_in_fp32(monkeypatch):
    monkeypatch.setattr(optimizers, "computes_bf16", lambda device: False)
    torch.manual_seed(0)
    left, _, right = torch.linalg.svd(torch.randn(8, 20), full_matrices=False)
    values = torch.linspace(0.2, 1, 8)
    found = optimizers.orthogonalised(left @ values.diag() @ right, steps=5, coefficients=(3.4445, -4.775, 2.0315))
    wanted = values / values.norm()
    for _ in range(5):  # each step is a polynomial of the singular values
        wanted = 3.4445 * wanted - 4.775 * wanted**3 + 2.0315 * wanted**5
    torch.testing.assert_close(left.T @ found @ right.T, wanted.diag(), rtol=0, atol=1e-4)
    assert 0.6 < wanted.min() < wanted.max() < 1.4


def test_a_rate_of_zero_moves_nothing():
    model = Words()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    after = train(model, MuonAdamW(model, **RATES, pace=3.0), 2, lr=0.0)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_restored_state_goes_on_as_if_unbroken(tmp_path):
    model = Words()
    optimizer = MuonAdamW(model, **RATES, pace=3.0)
    train(model, optimizer, 2)
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "state.pth")
    unbroken = train(model, optimizer, 2)
    saved = torch.load(tmp_path / "state.pth", weights_only=True)
    second = Words()
    second.load_state_dict(saved["model"])
    restored = MuonAdamW(second, **RATES, pace=3.0)
    restored.load_state_dict(saved["optimizer"])
    resumed = train(second, restored, 2)
    assert all(torch.equal(unbroken[name], resumed[name]) for name in unbroken)


def test_a_state_of_another_optimiser_is_refused():
    model = Words()
    adamw = torch.optim.AdamW(model.parameters())
    with pytest.raises(ValueError, match=r"Muon and AdamW.*'param_groups'"):
        MuonAdamW(model, **RATES, pace=3.0).load_state_dict(adamw.state_dict())
