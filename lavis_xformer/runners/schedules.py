"""Learning rate schedules by optimiser step, with LAVIS's names for their keys."""

from __future__ import annotations

import math
from functools import partial

import torch
from lavis.common.registry import registry


def warmup_cosine(
    step: int, *, total_steps: int, warmup_steps: int, start_lr: float, peak_lr: float, min_lr: float
) -> float:
    """Return the learning rate of optimiser step ``step`` (the first is 0).

    Rises linearly from ``start_lr`` to ``peak_lr``, reached at step ``warmup_steps``, then falls along
    half a cosine (Loshchilov and Hutter, arXiv 1608.03983) to ``min_lr`` at ``total_steps``.
    """
    if step < warmup_steps:
        return start_lr + (peak_lr - start_lr) * step / warmup_steps
    progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    return min_lr + (peak_lr - min_lr) * 0.5 * (1.0 + math.cos(math.pi * progress))


@registry.register_lr_scheduler("xformer_warmup_cosine_lr")
class WarmupCosineLR:
    """Linear warm-up that may span several epochs, then a cosine; updated at every step."""

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        max_epoch: int,
        min_lr: float,
        init_lr: float,
        warmup_steps: int = 0,
        warmup_start_lr: float = -1,
        *,
        steps_per_epoch: int,
        **unused: object,
    ) -> None:
        """Take LAVIS's arguments and the optimiser steps per epoch; a negative ``warmup_start_lr`` counts as 0."""
        self.optimizer, self.steps_per_epoch = optimizer, steps_per_epoch
        self.rate = partial(
            warmup_cosine,
            total_steps=max_epoch * steps_per_epoch,
            warmup_steps=warmup_steps,
            start_lr=max(0.0, warmup_start_lr),
            peak_lr=init_lr,
            min_lr=min_lr,
        )

    def step(self, cur_epoch: int, cur_step: int) -> None:
        """Set the learning rate of optimiser step ``cur_step`` of epoch ``cur_epoch``."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate(cur_epoch * self.steps_per_epoch + cur_step)
