"""One optimiser step over a window of batches: autocast, exact accumulation, clipping."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

Terms = dict[str, Tensor]
AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}  # by ``run.amp``


def computes_bf16(device: torch.device) -> bool:
    """Whether the hardware computes bfloat16 natively, several times faster than fp32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    return device.type == "cpu" and bool(torch.cpu.get_capabilities().get("avx512_bf16", False))


class Stepper:
    """Computes gradients of a window of batches and applies them.

    The mean over the window's batches is optimised: ``k`` batches of equal size give the gradient of
    one batch ``k`` times as large, for losses that are means over samples. ITC and ITM contrast the
    samples of one batch, so for them ``k`` small batches are not equivalent to one large batch.

    ``forward(model, samples)`` returns a dict with ``loss``; every entry that is a 0-dim tensor is a term. A model
    trained by several processes comes wrapped in DistributedDataParallel. ``max_grad_norm=0`` disables clipping.
    """

    def __init__(
        self,
        *,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        forward: Callable[[nn.Module, Any], Mapping[str, Any]],
        amp: str = "no",
        scaler: torch.amp.GradScaler | None = None,
        max_grad_norm: float = 0.0,
    ) -> None:
        self.model, self.optimizer, self.forward, self.scaler = model, optimizer, forward, scaler
        self.max_grad_norm = max_grad_norm or float("inf")
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.device = self.parameters[0].device
        self.dtype = AUTOCAST.get(amp)

    def gradients(self, window: Sequence[Any]) -> Terms:
        """Accumulate the gradients of the mean loss of ``window``; return its mean terms.

        The terms are detached and include ``grad_norm``, the norm before clipping.
        """
        totals: Terms = {}
        for number, samples in enumerate(window, start=1):
            with self._synchronised(number == len(window)):
                terms = self._backward(samples, len(window))
            for name, value in terms.items():
                totals[name] = totals[name] + value if name in totals else value
        means = {name: value / len(window) for name, value in totals.items()}
        return means | {"grad_norm": self._clip()}

    def apply(self) -> None:
        """Update the weights, then clear the gradients."""
        if self.scaler is not None:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        else:
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def discard(self) -> None:
        """Clear the gradients without using them; the scaler's step ends too, with its scale unchanged."""
        if self.scaler is not None:
            self.scaler.update(self.scaler.get_scale())
        self.optimizer.zero_grad(set_to_none=True)

    def _backward(self, samples: Any, share: int) -> Terms:
        with torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype is not None):
            output = self.forward(self.model, samples)
        loss = output["loss"] / share
        (self.scaler.scale(loss) if self.scaler is not None else loss).backward()
        return {
            name: value.detach().float()
            for name, value in output.items()
            if isinstance(value, Tensor) and value.dim() == 0
        }

    def _clip(self) -> Tensor:
        if self.scaler is not None:
            self.scaler.unscale_(self.optimizer)
        return nn.utils.clip_grad_norm_(self.parameters, self.max_grad_norm)

    def _synchronised(self, last: bool) -> contextlib.AbstractContextManager[None]:
        if isinstance(self.model, DistributedDataParallel) and not last:
            return self.model.no_sync()
        return contextlib.nullcontext()
