"""Batches that can be replayed: order and augmentation depend on (seed, epoch, index) alone.

A run that is resumed in the middle of an epoch, with any number of loader workers, therefore sees
exactly the batches that a run which never stopped would have seen.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from multiprocessing.synchronize import Event
from types import FrameType
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, DistributedSampler, Sampler, get_worker_info

from lavis_xformer.distributed import rank, world_size
from lavis_xformer.engine import rng
from lavis_xformer.errors import UserError

Key = tuple[int, int]  # (epoch, index in the dataset)


class EpochBatchSampler(Sampler[list[Key]]):
    """Batches of one rank: a permutation drawn from (seed, epoch), cut into joined batches.

    Joined batch ``b`` is ``order[b * W * B : (b + 1) * W * B]`` for ``W`` ranks with ``B`` samples
    each; rank ``r`` takes the ``r``-th part of it. So ``W`` processes see together what one process
    with a batch of ``W * B`` sees. The ``length % (W * B)`` samples left over are not used in that
    epoch (LAVIS's ``drop_last``); another epoch's order leaves out others.
    """

    def __init__(self, *, length: int, batch_size: int, seed: int, rank: int = 0, world_size: int = 1) -> None:
        """Make a sampler of ``length`` samples that starts at epoch 0, batch 0."""
        self.length = length
        self.batch_size = batch_size
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.start(epoch=0)

    def start(self, *, epoch: int, skip_batches: int = 0) -> None:
        """Make the next iteration yield the batches of ``epoch`` after the first ``skip_batches``."""
        self.epoch = epoch
        self.skip_batches = skip_batches

    def __len__(self) -> int:
        """Return how many batches a whole epoch has."""
        return self.length // (self.batch_size * self.world_size)

    def __iter__(self) -> Iterator[list[Key]]:
        """Yield lists of (epoch, index), the keys of a ``ReplayDataset``."""
        epoch, skip = self.epoch, self.skip_batches
        generator = torch.Generator().manual_seed(rng.seed_of(self.seed, epoch))
        order = torch.randperm(self.length, generator=generator)
        for batch in range(skip, len(self)):
            first = (batch * self.world_size + self.rank) * self.batch_size
            yield [(epoch, index) for index in order[first : first + self.batch_size].tolist()]


class ReplayDataset(Dataset[Any]):
    """A map-style dataset read by (epoch, index), its randomness seeded for each sample."""

    def __init__(self, dataset: Dataset[Any], *, seed: int) -> None:
        """Wrap ``dataset``; ``seed`` is the run's."""
        self.dataset = dataset
        self.seed = seed

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self.dataset)  # type: ignore[arg-type]

    def __getitem__(self, key: Key) -> Any:
        """Return sample ``index`` as it is in ``epoch``."""
        return self.__getitems__([key])[0]

    def __getitems__(self, keys: Sequence[Key]) -> list[Any]:
        """Return the samples of a batch; in the main process its own random state is untouched.

        A worker keeps the state that the last sample leaves, so that a collater that draws is
        replayed as well.
        """
        in_worker = get_worker_info() is not None
        before = None if in_worker else rng.capture()
        try:
            return [self._sample(*key) for key in keys]
        finally:
            if before is not None:
                rng.restore(before)

    def _sample(self, epoch: int, index: int) -> Any:
        rng.seed_cpu(rng.seed_of(self.seed, epoch, index))
        return self.dataset[index]


def train_loader(dataset: Dataset[Any], *, batch_size: int, seed: int, **options: Any) -> DataLoader[Any]:
    """Return this rank's loader of a training set; its ``batch_sampler`` chooses epoch and start.

    Args:
        dataset: map-style.
        batch_size: samples for each process.
        seed: the run's.
        options: more arguments of ``DataLoader``.

    Raises:
        UserError: the batches of all processes are together larger than the data.
    """
    length = len(dataset)  # type: ignore[arg-type]
    sampler = EpochBatchSampler(length=length, batch_size=batch_size, seed=seed, rank=rank(), world_size=world_size())
    if len(sampler) == 0:
        raise UserError(
            f"run.batch_size_train is {batch_size} for each of {world_size()} process(es), but the "
            f"training data has only {length} samples; take a smaller batch"
        )
    return DataLoader(
        ReplayDataset(dataset, seed=seed),
        batch_sampler=sampler,
        generator=torch.Generator(),  # the workers' base seed; the training's generator is not used
        persistent_workers=options["num_workers"] > 0,
        worker_init_fn=shielded(),
        **options,
    )


def eval_loader(dataset: Dataset[Any], *, share: bool, **options: Any) -> DataLoader[Any]:
    """Return a loader of a whole split in order, or of this rank's ``share`` of it."""
    sampler: Sampler[Any] | None = DistributedSampler(dataset, shuffle=False) if share else None
    return DataLoader(dataset, sampler=sampler, worker_init_fn=shielded(), **options)


def shielded() -> Callable[[int], None]:
    """Return a ``worker_init_fn`` that leaves it to the training process to answer to signals.

    Ctrl-C and a batch system's SIGTERM reach workers too; if these died, the step could not be
    finished. They end with the training process, which may terminate them when it exits itself.
    """
    closing = multiprocessing.Event()
    atexit.register(closing.set)
    return partial(_start_worker, closing)


def _start_worker(closing: Event, worker_id: int) -> None:
    def leave_if_closing(signum: int, frame: FrameType | None) -> None:
        if closing.is_set():
            os._exit(0)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, leave_if_closing)
