"""Muon and AdamW as one optimiser."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer


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
        self.muon = torch.optim.Muon(hidden, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
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
