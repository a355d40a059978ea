"""Muon and AdamW as one optimiser."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer


class MuonAdamW(Optimizer):
    """Muon (Jordan et al. 2024) for the trained matrices that are no embeddings, AdamW for all else.

    Muon's updates have the size of AdamW's at the same rate (Liu et al., arXiv 2502.16982), whatever the matrix, so one
    schedule drives both: it sets ``lr`` of every group, and Muon moves at ``pace`` times that.
    """

    def __init__(
        self, module: nn.Module, *, lr: float, weight_decay: float, betas: tuple[float, float], pace: float
    ) -> None:
        """Take the parameters of ``module`` that want gradients; vectors and scalars don't decay."""
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
        """Move the weights along their gradients."""
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
        """Put back what :meth:`state_dict` returned.

        Raises:
            ValueError: it is of other parameters or of another optimiser.
        """
        if state_dict.keys() != {"muon", "adamw"}:
            raise ValueError(f"a state of Muon and AdamW is wanted, this one has {sorted(state_dict)}")
        self.muon.load_state_dict(state_dict["muon"])
        self.adamw.load_state_dict(state_dict["adamw"])
        self.param_groups[:] = [*self.muon.param_groups, *self.adamw.param_groups]
