"""Rank, world size and what processes tell each other, safe where there is no process group.

B: samples of this process, W: processes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")

_alone = False  # see :func:`alone`


def is_distributed() -> bool:
    """Whether a process group exists."""
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    """This process's number, 0 without a process group."""
    return dist.get_rank() if is_distributed() else 0


def world_size() -> int:
    """How many processes train together, 1 without a process group."""
    return dist.get_world_size() if is_distributed() else 1


def is_main() -> bool:
    """Whether this is the process that writes logs and checkpoints."""
    return rank() == 0


def gather(tensor: Tensor) -> Tensor:
    """Join a tensor over all processes, (B, ...) -> (W * B, ...), in the order of the ranks; not where :func:`alone`.

    Gradients flow back to every process: the backward pass *sums* what the processes' losses say about each
    sample. Each process then holds W times its share of the gradient of the mean over processes, and
    DistributedDataParallel's averaging makes it exactly the gradient of the loss on the joined batch.

    Args:
        tensor: (B, ...), of the same shape on every process.
    """
    if world_size() == 1 or _alone:
        return tensor
    return _Gather.apply(tensor)


def token_mean(loss: Tensor, tokens: Tensor) -> Tensor:
    """Rescale a mean over this process's tokens, so that the mean over processes is the mean over all tokens.

    Args:
        loss: a scalar.
        tokens: how many this process has, a scalar; texts differ in length.
    """
    return loss * (tokens / gather(tokens[None].float()).mean())


class _Gather(torch.autograd.Function):
    """``all_gather`` whose backward pass sums over processes.

    torch's own (``torch.distributed.nn``) passes gradients on in their memory layout, and gloo then mixes up the
    entries of transposed ones, such as einsum's (torch 2.11).
    """

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        """Join (B, ...) to (W * B, ...)."""
        tensor = tensor.contiguous()
        joined = tensor.new_empty(world_size() * len(tensor), *tensor.shape[1:])
        dist.all_gather_into_tensor(joined, tensor)
        return joined

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        """Return this process's rows (B, ...) of the sum over processes."""
        gradient = gradient.clone(memory_format=torch.contiguous_format)  # (W * B, ...)
        dist.all_reduce(gradient)
        return gradient.chunk(world_size())[rank()]


def own_rows(batch_size: int, device: torch.device) -> Tensor:
    """Return this process's rows of a gathered batch: (B,) indices."""
    return torch.arange(batch_size, device=device) + (0 if _alone else rank() * batch_size)


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Gather nothing in this context, in which every process has the same samples."""
    global _alone
    before, _alone = _alone, True
    try:
        yield
    finally:
        _alone = before


def share(value: T) -> T:
    """Return rank 0's ``value`` on every rank."""
    if not is_distributed():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def collect(value: T) -> list[T]:
    """Return every rank's ``value``, in the order of the ranks, on every rank."""
    if not is_distributed():
        return [value]
    values: list[T] = [value] * world_size()
    dist.all_gather_object(values, value)
    return values


def total(values: Tensor) -> Tensor:
    """Return the sum over ranks of a CPU tensor; the tensor itself is unchanged."""
    values = values.clone()
    if is_distributed():
        dist.all_reduce(values)
    return values


def barrier() -> None:
    """Wait for all ranks."""
    if is_distributed():
        dist.barrier()
