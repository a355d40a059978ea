"""Muon and AdamW as one optimiser."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lavis_xformer.engine.step import computes_bf16


class Muon(torch.optim.Muon):
    """torch's Muon, scaled as AdamW, which multiplies matrices in bfloat16 only where the hardware does.

    torch's own (2.11) always does, and emulated bfloat16 is about twenty times slower than fp32.
    """

    def __init__(self, matrices: list[nn.Parameter], *, lr: float, weight_decay: float) -> None:
        super().__init__(matrices, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # no closures
        """Update the weights."""
        for group in self.param_groups:
            for matrix in group["params"]:
                if matrix.grad is not None:
                    self._move(matrix, matrix.grad, group)

    def _move(self, matrix: nn.Parameter, gradient: Tensor, group: dict[str, Any]) -> None:
        """Update a matrix (M, N) by its orthogonalised Nesterov momentum."""
        if "momentum_buffer" not in self.state[matrix]:
            self.state[matrix]["momentum_buffer"] = torch.zeros_like(gradient)
        average = self.state[matrix]["momentum_buffer"].lerp_(gradient, 1 - group["momentum"])
        momentum = gradient.lerp(average, group["momentum"])
        update = orthogonalised(momentum, steps=group["ns_steps"], coefficients=group["ns_coefficients"])
        scale = 0.2 * math.sqrt(max(matrix.shape))  # the RMS of AdamW's updates
        matrix.mul_(1 - group["lr"] * group["weight_decay"])
        matrix.add_(update, alpha=-group["lr"] * scale)


def orthogonalised(matrix: Tensor, *, steps: int, coefficients: tuple[float, float, float]) -> Tensor:
    """Move a matrix's singular values towards 1 by Newton-Schulz iterations, (M, N) -> (M, N); some stay 0.3 off."""
    a, b, c = coefficients
    x = matrix.to(torch.bfloat16 if computes_bf16(matrix.device) else torch.float32)
    tall = len(x) > x.shape[1]
    x = x.T if tall else x
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x


class MuonAdamW(Optimizer):
    """Muon (Jordan et al. 2024) for trained matrices other than embeddings, AdamW for everything else.

    Muon's updates are scaled to the RMS of AdamW's at the same learning rate (Liu et al., arXiv 2502.16982), whatever
    the matrix's shape, so one schedule drives both: it sets ``lr`` of every group, and Muon uses ``pace`` times that.
    """

    def __init__(
        self, module: nn.Module, *, lr: float, weight_decay: float, betas: tuple[float, float], pace: float
    ) -> None:
        """Take the trainable parameters of ``module``; vectors and scalars get no weight decay."""
        tables = {id(p) for part in module.modules() if isinstance(part, nn.Embedding) for p in part.parameters()}
        wanted = [p for p in module.parameters() if p.requires_grad]
        hidden = [p for p in wanted if p.ndim == 2 and id(p) not in tables]
        rest = [p for p in wanted if p.ndim != 2 or id(p) in tables]
        groups: list[dict[str, Any]] = [
            {"params": [p for p in rest if p.ndim > 1]},
            {"params": [p for p in rest if p.ndim < 2], "weight_decay": 0.0},
        ]
        self.pace = pace
        self.muon = Muon(hidden, lr=lr, weight_decay=weight_decay)
        self.adamw = torch.optim.AdamW(groups, lr=lr, weight_decay=weight_decay, betas=betas)
        super().__init__([*self.muon.param_groups, *self.adamw.param_groups], {})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # no closures
        """Update the weights."""
        (group,) = self.muon.param_groups
        rate = group["lr"]
        group["lr"] = self.pace * rate
        self.muon.step()
        group["lr"] = rate
        self.adamw.step()

    def state_dict(self) -> dict[str, Any]:
        """Return both optimisers' state."""
        return {"muon": self.muon.state_dict(), "adamw": self.adamw.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned.

        Raises:
            ValueError: it is for other parameters or for another optimiser.
        """
        if state_dict.keys() != {"muon", "adamw"}:
            raise ValueError(f"expected a state of Muon and AdamW, this one has {sorted(state_dict)}")
        self.muon.load_state_dict(state_dict["muon"])
        self.adamw.load_state_dict(state_dict["adamw"])
        self.param_groups[:] = [*self.muon.param_groups, *self.adamw.param_groups]
