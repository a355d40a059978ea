"""Learning rates at exact steps."""

from __future__ import annotations

import math

import pytest
import torch

from lavis_xformer.runners.schedules import WarmupCosineLR


def make(**arguments):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=9.0)
    values = {"max_epoch": 5, "min_lr": 0.1, "init_lr": 1.0, "warmup_steps": 6, "warmup_start_lr": 0.4}
    return WarmupCosineLR(optimizer, **{**values, **arguments}, steps_per_epoch=4, decay_rate=None), optimizer


@pytest.mark.parametrize(
    ("epoch", "step", "expected"),
    [
        (0, 0, 0.4),
        (0, 3, 0.7),
        (1, 1, 0.9),  # still warming up in the second epoch
        (1, 2, 1.0),  # step 6: the peak
        (3, 1, 0.1 + 0.9 * 0.5),  # step 13: half of the cosine
        (4, 3, 0.1 + 0.45 * (1 + math.cos(math.pi * 13 / 14))),
        (5, 0, 0.1),
        (6, 0, 0.1),  # and stays there
    ],
)
def test_the_rate_of_a_step(epoch, step, expected):
    schedule, optimizer = make()
    schedule.step(cur_epoch=epoch, cur_step=step)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(expected)


def test_a_start_that_is_not_given_is_zero():
    schedule, optimizer = make(warmup_start_lr=-1)
    schedule.step(cur_epoch=0, cur_step=3)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.5)


def test_the_whole_run_rises_once_and_falls_once():
    schedule, optimizer = make()
    rates = []
    for step in range(20):
        schedule.step(step // 4, step % 4)
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates[:7] == sorted(rates[:7])
    assert rates[6:] == sorted(rates[6:], reverse=True)


def test_without_warming_up_a_run_begins_at_its_peak():
    schedule, optimizer = make(warmup_steps=0)
    schedule.step(cur_epoch=0, cur_step=0)
    assert optimizer.param_groups[0]["lr"] == 1.0
