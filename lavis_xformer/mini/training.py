"""The training loop of all mini models: AdamW or Muon, warm-up, cosine decay, bit-exact resume.

Every random choice of step k comes from a generator seeded by (seed, k). No random state has to be saved: a run that
was stopped and resumed sees the same batches, crops and masks as one that never stopped.
"""

from __future__ import annotations

import contextlib
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from tqdm import tqdm

from lavis_xformer.engine.optimizers import MuonAdamW
from lavis_xformer.engine.step import computes_bf16
from lavis_xformer.errors import UserError, first_line
from lavis_xformer.files import replacing

#: loss of one step, given its random generator and the share of the steps already done
StepLoss = Callable[[torch.Generator, float], Tensor]


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """How long and how fast one model learns.

    Attributes:
        steps: optimiser steps.
        batch: samples per step.
        lr: peak learning rate, reached after ``warmup``, then cosine decay to 1 % of it.
        warmup: share of the steps, or of ``horizon`` if that is longer.
        weight_decay: decoupled, on matrices only.
        horizon: steps over which warm-up and cosine run, if longer than ``steps``.
        cooldown: share of the steps, at the end, over which the rate also decays linearly to 0, so that a training
            planned to be longer can be finished early.
        muon: pace of Muon, see :class:`MuonAdamW`; 0: AdamW for all weights.
    """

    steps: int
    batch: int
    lr: float
    warmup: float = 0.05
    weight_decay: float = 0.05
    horizon: int = 0
    cooldown: float = 0.0
    muon: float = 0.0

    def rate(self, step: int) -> float:
        """Learning rate of one step (0-based)."""
        horizon = max(self.horizon, self.steps)
        warm = max(1, round(self.warmup * horizon))
        if step < warm:
            return self.lr * (step + 1) / warm
        progress = (step - warm) / max(1, horizon - warm)
        cooling = min(1.0, (self.steps - step) / max(1, round(self.cooldown * self.steps)))
        return self.lr * cooling * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress)))


def generator(seed: int, step: int) -> torch.Generator:
    """The source of all randomness of one step."""
    return torch.Generator().manual_seed(seed * 1_000_003 + step)


def autocast(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """bfloat16 where the hardware supports it natively (several times faster), otherwise disabled."""
    return torch.autocast(device.type, torch.bfloat16, enabled=computes_bf16(device))


def fit(
    module: nn.Module,
    loss: StepLoss,
    *,
    schedule: Schedule,
    seed: int,
    state: Path,
    resume: bool = False,
    title: str = "train",
    stop_at: int | None = None,
) -> float:
    """Train all parameters of a module that require gradients.

    Args:
        module: the module to train, on its device.
        loss: computes the loss of one step; draws only from the generator it is given.
        schedule: length, batch and rates.
        seed: seeds every step's generator, together with the step.
        state: file of weights, optimiser, step and seconds; replaced atomically about once a minute, kept at the end.
        resume: continue from ``state`` if it exists; it is a :class:`UserError` if it is damaged.
        title: name shown in the progress bar.
        stop_at: stop after this many steps, as if interrupted.

    Returns:
        Seconds of training, over all sessions.
    """
    optimizer = make_optimizer(module, schedule)
    first, spent = _load(state, module, optimizer) if resume and state.is_file() else (0, 0.0)
    device = next(module.parameters()).device
    last = min(schedule.steps, stop_at or schedule.steps)
    begin = saved = time.monotonic()
    module.train()
    pause = 2 if sys.stderr.isatty() else 60  # seconds between updates: a file keeps them all
    with tqdm(total=schedule.steps, initial=first, desc=title, mininterval=pause, maxinterval=60) as bar:
        for step in range(first, last):
            for group in optimizer.param_groups:
                group["lr"] = schedule.rate(step)
            with autocast(device):
                value = loss(generator(seed, step), step / schedule.steps)
            _descend(value, module, optimizer)
            bar.update()
            if step % 50 == 0:
                bar.set_postfix(loss=f"{value.detach():.3f}", refresh=False)
            if time.monotonic() - saved > 60:
                saved = time.monotonic()
                _save(state, module, optimizer, step + 1, spent + saved - begin)
    seconds = spent + time.monotonic() - begin
    _save(state, module, optimizer, last, seconds)
    module.eval()
    return seconds


def _descend(loss: Tensor, module: nn.Module, optimizer: Optimizer) -> None:
    """One optimiser step, with the gradient norm clipped to 1."""
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_(module.parameters(), 1.0)
    optimizer.step()


def make_optimizer(module: nn.Module, schedule: Schedule) -> Optimizer:
    """AdamW with weight decay on matrices and none on biases, norms and tokens; with ``muon``, :class:`MuonAdamW`."""
    lr, decay, betas = schedule.lr, schedule.weight_decay, (0.9, 0.98)
    if schedule.muon:
        return MuonAdamW(module, lr=lr, weight_decay=decay, betas=betas, pace=schedule.muon)
    wanted = [p for p in module.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in wanted if p.ndim == 2], "weight_decay": decay},
        {"params": [p for p in wanted if p.ndim != 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=lr, betas=betas)


def _save(state: Path, module: nn.Module, optimizer: Optimizer, step: int, seconds: float) -> None:
    state.parent.mkdir(parents=True, exist_ok=True)
    values = {"module": module.state_dict(), "optimizer": optimizer.state_dict(), "step": step, "seconds": seconds}
    with replacing(state) as file:
        torch.save(values, file)


def _load(state: Path, module: nn.Module, optimizer: Optimizer) -> tuple[int, float]:
    try:
        values = torch.load(state, map_location="cpu", weights_only=True)
    except Exception as error:
        raise UserError(f"{state} is damaged ({first_line(error)}); remove it to train this part anew") from error
    module.load_state_dict(values["module"])
    optimizer.load_state_dict(values["optimizer"])
    return values["step"], values["seconds"]
