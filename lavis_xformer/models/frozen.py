"""Freeze parts of a model, and set the precision they compute in."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any, Literal, TypeVar

import torch
from torch import nn

from lavis_xformer.errors import UserError, nearest

M = TypeVar("M", bound=nn.Module)
Precision = Literal["fp32", "fp16", "bf16"]
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def freeze(module: M) -> M:
    """Freeze the module's parameters and return it; gradients still flow through it to its input.

    ``XFormerBase.train`` keeps it in eval mode.
    """
    return module.requires_grad_(False).eval()


def is_frozen(module: nn.Module) -> bool:
    """Whether no parameter of the module is trained."""
    return not any(parameter.requires_grad for parameter in module.parameters())


def train_only(model: nn.Module, parts: Sequence[str] | None) -> None:
    """Freeze all but some parts, such as ``["fusion"]`` on top of a trained BLIP-2.

    Args:
        model: changed in place.
        parts: names of its children; None or an empty list changes nothing.

    Raises:
        UserError: there is no such part, or nothing in it could be trained.
    """
    if not parts:
        return
    if isinstance(parts, str) or not isinstance(parts, Sequence):
        raise UserError(f"model.train_only: '{parts}' is not a list; write [{parts}]")
    children = dict(model.named_children())
    for name in parts:
        if name not in children or is_frozen(children[name]):
            known = [part for part, child in children.items() if not is_frozen(child)]
            raise UserError(f"model.train_only: '{name}' can't be trained; {nearest(name, known)}")
    for name, child in children.items():
        if name not in parts:
            freeze(child)
    for parameter in model.parameters(recurse=False):
        parameter.requires_grad_(False)


def compute_dtype(device: torch.device, precision: Precision) -> torch.dtype:
    """Dtype of a frozen part's weights: that of its precision on a GPU, fp32 on any other device."""
    return DTYPES[precision] if device.type == "cuda" else torch.float32


def computing(
    module: nn.Module,
    device: torch.device,
    precision: Precision,
    *,
    layers: tuple[type[nn.Module], ...] = (nn.Linear, nn.Conv2d),
) -> contextlib.AbstractContextManager[Any]:
    """Cast a part's frozen weights to its precision on this device, for good; return the autocast context to run it in.

    On a GPU, it computes in its own precision whatever the outer autocast; on a CPU, the outer one holds.

    Args:
        module: the part; weights of it that a user trains stay as they are.
        device: where it is.
        precision: of its weights on a GPU.
        layers: whose weights are cast; an encoder's others, such as layer norms, stay in fp32.
    """
    dtype = compute_dtype(device, precision)
    with torch.inference_mode(False):  # the weights could not be trained later if they were cast within
        for part in module.modules():
            for weight in part.parameters(recurse=False) if isinstance(part, layers) else ():
                if weight.dtype != dtype and weight.is_floating_point() and not weight.requires_grad:
                    weight.data = weight.data.to(dtype)
    if dtype == torch.float32 and device.type == "cpu":
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)


def compact(tokens: torch.Tensor) -> torch.Tensor:
    """Under autocast, cast tokens to its dtype once; otherwise every layer would keep a copy of its own."""
    device = tokens.device.type
    return tokens.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else tokens


def unscaled_half(device: torch.device, precision: Precision) -> bool:
    """Whether a frozen part's gradients need scaling: those of fp16, unless the run is in fp16 too and has a scaler."""
    scaled = torch.is_autocast_enabled(device.type) and torch.get_autocast_dtype(device.type) == torch.float16
    return compute_dtype(device, precision) == torch.float16 and not scaled


def enlarge_gradients(start: torch.Tensor, end: torch.Tensor, factor: torch.Tensor) -> None:
    """Multiply gradients by ``factor`` between two fp32 tensors, and only there.

    Args:
        start: the input of an fp16 part.
        end: its output.
        factor: a scalar.
    """
    if end.requires_grad:
        end.register_hook(lambda gradient: gradient * factor)
        start.register_hook(lambda gradient: gradient / factor)
