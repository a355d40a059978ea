"""Accumulation, clipping, sampling and signals of the engine, without LAVIS."""

from __future__ import annotations

import os
import signal
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from lavis_xformer import distributed
from lavis_xformer.engine import interruption
from lavis_xformer.engine.interruption import Interruption
from lavis_xformer.engine.log import Averages
from lavis_xformer.engine.loop import EpochLoop, Position
from lavis_xformer.engine.options import RunOptions
from lavis_xformer.engine.sampling import EpochBatchSampler, ReplayDataset, train_loader
from lavis_xformer.engine.step import Stepper
from lavis_xformer.errors import UserError


def make_stepper(**options):
    torch.manual_seed(0)
    model = nn.Linear(5, 1, dtype=torch.float64)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def forward(model, batch):
        loss = model(batch).square().mean()
        return {"loss": loss, "twice": 2 * loss, "output": model(batch)}

    return Stepper(model=model, optimizer=optimizer, forward=forward, **options)


def make_loop(folder, *, scaler=None):
    return EpochLoop(
        stepper=SimpleNamespace(scaler=scaler), schedule=None, position=Position(), averages=Averages(),
        options=RunOptions.from_config({}), accumulate=1, log_every=1, interruption=SimpleNamespace(signum=0),
        save=None, log=None, folder=folder,
    )  # fmt: skip


@pytest.mark.parametrize("parts", [2, 3, 6])
def test_small_batches_add_up_to_the_large_one(parts):
    data = torch.randn(12, 5, dtype=torch.float64)
    whole, split = make_stepper(), make_stepper()
    expected, terms = whole.gradients([data]), split.gradients(data.chunk(parts))
    for left, right in zip(whole.parameters, split.parameters, strict=True):
        torch.testing.assert_close(left.grad, right.grad, rtol=0, atol=1e-14)
    assert terms.keys() == {"loss", "twice", "grad_norm"}
    for name in terms:
        torch.testing.assert_close(terms[name].double(), expected[name].double())


def test_clipping_bounds_the_step_but_reports_the_norm():
    data = 100 * torch.randn(4, 5, dtype=torch.float64)
    stepper = make_stepper(max_grad_norm=1.0)
    assert stepper.gradients([data])["grad_norm"] > 10
    norm = torch.stack([p.grad.square().sum() for p in stepper.parameters]).sum().sqrt()
    torch.testing.assert_close(norm, torch.ones_like(norm), rtol=1e-4, atol=0)
    unclipped = make_stepper(max_grad_norm=0.0)
    reported = unclipped.gradients([data])["grad_norm"]
    norm = torch.stack([p.grad.square().sum() for p in unclipped.parameters]).sum().sqrt()
    torch.testing.assert_close(norm, reported)


def test_a_scaled_loss_is_clipped_as_one_that_is_not():
    data = 100 * torch.randn(4, 5, dtype=torch.float64)
    plain, scaled = (make_stepper(max_grad_norm=1.0, scaler=scaler) for scaler in (None, torch.amp.GradScaler("cpu")))
    torch.testing.assert_close(scaled.gradients([data]), plain.gradients([data]))
    for stepper in (plain, scaled):
        stepper.apply()
    for left, right in zip(plain.parameters, scaled.parameters, strict=True):
        torch.testing.assert_close(left, right)


def test_skipping_batches_goes_on_where_the_epoch_was():
    sampler = EpochBatchSampler(length=20, batch_size=4, seed=1)
    whole = list(sampler)
    sampler.start(epoch=0, skip_batches=2)
    assert list(sampler) == whole[2:]
    sampler.start(epoch=1)
    assert list(sampler) != whole


class Noisy(torch.utils.data.Dataset):
    def __len__(self):
        return 10

    def __getitem__(self, index):
        return torch.rand(2) + index


def test_a_sample_depends_on_seed_epoch_and_index_alone():
    data = ReplayDataset(Noisy(), seed=1)
    torch.manual_seed(9)
    before = torch.get_rng_state()
    assert torch.equal(data[0, 3], data.__getitems__([(0, 5), (0, 3)])[1])
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(data[0, 3], data[1, 3])
    assert not torch.equal(data[0, 3], ReplayDataset(Noisy(), seed=2)[0, 3])


def test_a_batch_larger_than_the_data_is_refused_with_numbers():
    with pytest.raises(UserError, match=r"batch_size_train is 11 .*only 10 samples"):
        train_loader(Noisy(), batch_size=11, seed=0, num_workers=0)


@pytest.mark.parametrize(("signum", "status", "seconds"), [(signal.SIGTERM, 143, 5), (signal.SIGINT, 130, 1)])
def test_a_signal_waits_for_the_step_and_so_does_its_echo_but_no_later_one(signum, status, seconds, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(interruption.time, "monotonic", lambda: now[0])

    def send():
        os.kill(os.getpid(), signum)

    def send_again_and_again(caught):
        with caught.deferred():
            send()
            send()
            assert caught.signum == signum
            now[0] += seconds + 0.1
            with pytest.raises(SystemExit) as at_once:
                send()
            assert at_once.value.code == status

    with Interruption() as caught, pytest.raises(SystemExit) as left:
        send_again_and_again(caught)
    assert left.value.code == status
    with Interruption(), pytest.raises(SystemExit) as left:
        send()
    assert left.value.code == status


def test_a_signal_that_the_other_ranks_do_not_know_of_yet_is_left_to_the_next_step(tmp_path, monkeypatch):
    loop, asked = make_loop(tmp_path), []

    def waiting_for_others(values):
        asked.append(values[1].item())
        loop.interruption.signum = 15  # arrives meanwhile
        return values

    monkeypatch.setattr(distributed, "total", waiting_for_others)
    assert [loop._agree({"loss": torch.tensor(1.0)}).signum for _ in range(2)] == [0, 15]
    assert asked == [0, 15]


def test_a_norm_that_is_not_finite_is_a_scalers_affair_and_a_loss_is_not(tmp_path):
    def agreed(scaler, **terms):
        loop = make_loop(tmp_path, scaler=scaler)
        return loop._agree({name: torch.tensor(value) for name, value in terms.items()}).finite

    assert agreed("a scaler", loss=1.0, grad_norm=float("inf"))
    assert not agreed("a scaler", loss=float("nan"), grad_norm=1.0)
    assert not agreed(None, loss=1.0, grad_norm=float("inf"))


def test_options_are_typed_and_checked():
    options = RunOptions.from_config({"amp": True, "max_grad_norm": 1.5, "keep_last": None, "x": 1})
    assert (options.amp, options.max_grad_norm, options.keep_last) == ("fp16", 1.5, 3)
    for wrong, message in (
        ({"amp": "fp8"}, "run.amp is 'fp8'; it must be one of"),
        ({"keep_last": -1}, "run.keep_last is -1; it must be a whole number, 0 or more"),
        ({"save_every_steps": "often"}, "run.save_every_steps is 'often'; it must be a whole number"),
        ({"max_grad_norm": "1.5"}, "run.max_grad_norm is '1.5'; it must be a finite number"),
    ):
        with pytest.raises(UserError, match=message):
            RunOptions.from_config(wrong)


@pytest.mark.parametrize("place", [0, 1, 2])
def test_what_another_rank_asks_for_or_suffers_is_for_all(tmp_path, monkeypatch, place):
    others = torch.zeros(4, dtype=torch.float64)
    others[place] = 15 if place == 1 else 1  # a bad loss, a signal or a save that is due, there and not here
    monkeypatch.setattr(distributed, "total", lambda values: values + others)
    verdict = make_loop(tmp_path)._agree({"loss": torch.tensor(1.0)})
    assert (verdict.finite, verdict.signum, verdict.save) == (place != 0, 15 * (place == 1), place == 2)


def test_progress_goes_on_where_the_epoch_was(tmp_path):
    loop = make_loop(tmp_path)
    loop.accumulate, loop.position.batches = 2, 4
    progress = loop._progress(7)
    assert (progress.done, progress.total) == (2, 4)
