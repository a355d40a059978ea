"""Freeze a module for good: no gradients, always in eval mode."""

from __future__ import annotations

from types import MethodType
from typing import TypeVar

from torch import nn

M = TypeVar("M", bound=nn.Module)


def _stay_in_eval_mode(module: nn.Module, mode: bool = True) -> nn.Module:
    return module


def freeze(module: M) -> M:
    """Stop all gradients to the module's parameters and keep it in eval mode whatever ``train()`` says.

    The module keeps its class and the names of its weights, so that checkpoints of other models fit; gradients
    still pass *through* it to its input.

    Args:
        module: changed in place.

    Returns:
        The same module.
    """
    module.requires_grad_(False).eval()
    for child in module.modules():
        child.train = MethodType(_stay_in_eval_mode, child)  # type: ignore[method-assign]
    return module


def is_frozen(module: nn.Module) -> bool:
    """Whether no parameter of the module is trained."""
    return not any(parameter.requires_grad for parameter in module.parameters())
