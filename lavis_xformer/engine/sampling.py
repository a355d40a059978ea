"""Replayable batches: order and augmentation depend only on (seed, visit, index).

A run resumed in the middle of an epoch, with any number of loader workers, therefore sees exactly the
batches of an uninterrupted run.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, pairwise
from multiprocessing.synchronize import Event
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler, Sampler, get_worker_info

from lavis_xformer.distributed import rank, world_size
from lavis_xformer.engine import rng
from lavis_xformer.errors import UserError

Key = tuple[int, int]  # (visit, index in the dataset); visit: the epoch, or a mixture's pass number over the dataset


@dataclass(frozen=True, kw_only=True)
class Mixture:
    """Concatenated datasets that each make up a fixed share of every epoch (``run.train_dataset_ratios``).

    Each dataset continues where the previous epoch left off, one permutation after another: every sample is used
    once before a dataset starts over.

    Attributes:
        lengths: number of samples in each dataset.
        ratios: their shares of an epoch; need not sum to 1.
        samples: samples per epoch.
    """

    lengths: Sequence[int]
    ratios: Sequence[float]
    samples: int

    @classmethod
    def of(cls, dataset: Any, ratios: Sequence[Any] | None, *, samples: int) -> Mixture:
        """Make the mixture of a ``ConcatDataset``, or of a wrapper that exposes its ``datasets``.

        Without ``ratios`` the concatenated datasets count as one.

        Raises:
            UserError: ``ratios`` is not one positive number for each dataset, or a dataset would never be used.
        """
        lengths = [len(part) for part in ([dataset] if ratios is None else members(dataset))]
        ratios = [1.0] if ratios is None else ratios
        check_ratios(ratios, [f"{length} samples" for length in lengths])
        mixture = cls(lengths=lengths, ratios=list(ratios), samples=samples)
        if not all(counts := mixture.counts()):
            raise UserError(
                f"run.train_dataset_ratios is {list(ratios)}: of the {sum(counts)} samples of an epoch, the datasets "
                f"would get {', '.join(map(str, counts))}; raise the ratio of the one without any, or "
                "run.iters_per_epoch"
            )
        return mixture

    def counts(self) -> list[int]:
        """Return how many samples an epoch takes from each dataset."""
        return split_by(self.ratios, self.samples)

    def keys(self, *, seed: int, epoch: int) -> Tensor:
        """Return (samples per epoch, 2): visits and indices into the concatenated datasets, in order."""
        parts, offset = [], 0
        for number, (length, count) in enumerate(zip(self.lengths, self.counts(), strict=True)):
            first, last = epoch * count, (epoch + 1) * count  # positions in the dataset's endless passes
            for visit in range(first // length, -(-last // length)):
                indices = offset + permutation(length, seed, number, visit)
                chosen = indices[max(0, first - visit * length) : last - visit * length]
                parts.append(torch.stack([torch.full_like(chosen, visit), chosen], dim=1))
            offset += length
        keys = torch.cat(parts)
        return keys[permutation(len(keys), seed, epoch)]


def members(dataset: Any) -> list[Any]:
    """Return the datasets of a concatenation, or of the one concatenation that it holds (captions and questions)."""
    parts = list(getattr(dataset, "datasets", [dataset]))
    return members(parts[0]) if len(parts) == 1 and hasattr(parts[0], "datasets") else parts


def check_ratios(ratios: Sequence[Any], parts: Sequence[str]) -> None:
    """Raise a UserError unless ``ratios`` is one positive number for each of ``parts``."""
    good = all(isinstance(ratio, (int, float)) and ratio > 0 for ratio in ratios)
    if not good or len(ratios) != len(parts):
        raise UserError(
            f"run.train_dataset_ratios is {list(ratios)}; it must be one positive number for each of the "
            f"{len(parts)} training dataset(s), which have {', '.join(parts)}"
        )


def split_by(ratios: Sequence[float], total: int) -> list[int]:
    """Return integers in proportion to ``ratios`` that add up to ``total``."""
    share = total / sum(ratios)
    edges = [round(edge * share) for edge in accumulate(ratios, initial=0.0)]
    return [end - start for start, end in pairwise(edges)]


def permutation(length: int, *keys: int) -> Tensor:
    """Return the permutation (length,) seeded by ``keys``."""
    return torch.randperm(length, generator=torch.Generator().manual_seed(rng.seed_of(*keys)))


class EpochBatchSampler(Sampler[list[Key]]):
    """One rank's batches: a permutation seeded by (seed, epoch), cut into joined (global) batches.

    Joined batch ``b`` is ``order[b * W * B : (b + 1) * W * B]`` for ``W`` ranks with ``B`` samples
    each; rank ``r`` takes the ``r``-th part of it. Together, ``W`` processes thus see what one process
    with a batch of ``W * B`` sees. The last ``length % (W * B)`` samples of an epoch's order are dropped
    (as by LAVIS's ``drop_last``); the order, and so what is dropped, changes from epoch to epoch.
    """

    def __init__(
        self,
        *,
        length: int,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        mixture: Mixture | None = None,
    ) -> None:
        """Start at epoch 0, batch 0, over ``length`` samples, or over those that ``mixture`` draws if it is given."""
        self.length, self.mixture = length if mixture is None else sum(mixture.counts()), mixture
        self.batch_size, self.seed = batch_size, seed
        self.rank, self.world_size = rank, world_size
        self.start(epoch=0)

    def start(self, *, epoch: int, skip_batches: int = 0) -> None:
        """Make the next iteration yield the batches of ``epoch`` after the first ``skip_batches``."""
        self.epoch = epoch
        self.skip_batches = skip_batches

    def __len__(self) -> int:
        """Return the number of batches in a whole epoch."""
        return self.length // (self.batch_size * self.world_size)

    def __iter__(self) -> Iterator[list[Key]]:
        """Yield lists of (visit, index), the keys of a ``ReplayDataset``."""
        epoch, skip = self.epoch, self.skip_batches
        if self.mixture is not None:
            keys = self.mixture.keys(seed=self.seed, epoch=epoch)
        else:
            order = permutation(self.length, self.seed, epoch)
            keys = torch.stack([torch.full_like(order, epoch), order], dim=1)
        for batch in range(skip, len(self)):
            first = (batch * self.world_size + self.rank) * self.batch_size
            yield [(visit, index) for visit, index in keys[first : first + self.batch_size].tolist()]


class ReplayDataset(Dataset[Any]):
    """A map-style dataset indexed by (visit, index), with randomness seeded per sample."""

    def __init__(self, dataset: Dataset[Any], *, seed: int) -> None:
        self.dataset = dataset
        self.seed = seed

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self.dataset)  # type: ignore[arg-type]

    def __getitem__(self, key: Key) -> Any:
        """Return sample ``index`` as drawn on a given visit."""
        return self.__getitems__([key])[0]

    def __getitems__(self, keys: Sequence[Key]) -> list[Any]:
        """Return the samples of a batch; in the main process the random state is left untouched.

        A worker keeps the state left by the last sample, so that a collater that draws random numbers
        is replayed as well.
        """
        in_worker = get_worker_info() is not None
        before = None if in_worker else rng.capture()
        try:
            return [self._sample(*key) for key in keys]
        finally:
            if before is not None:
                rng.restore(before)

    def _sample(self, visit: int, index: int) -> Any:
        rng.seed_cpu(rng.seed_of(self.seed, visit, index))
        return self.dataset[index]


class ReplayLoader(DataLoader[Any]):
    """A loader of replayable batches that can start at any batch of any epoch."""

    def start(self, *, epoch: int, skip_batches: int = 0) -> None:
        """Make the next iteration yield the batches of ``epoch`` after the first ``skip_batches``."""
        assert isinstance(self.batch_sampler, EpochBatchSampler)
        self.batch_sampler.start(epoch=epoch, skip_batches=skip_batches)


def train_loader(
    dataset: Dataset[Any],
    *,
    batch_size: int,
    seed: int,
    ratios: Sequence[Any] | None = None,
    batches: int = 0,
    **options: Any,
) -> ReplayLoader:
    """Return this rank's loader of a map-style training set.

    Args:
        dataset: a concatenation of several datasets if ``ratios`` are given.
        batch_size: samples per process.
        seed: the run's seed.
        ratios: shares of the concatenated datasets, see ``Mixture``; None counts them as one dataset.
        batches: batches per epoch; 0: as many as the data fill.
        options: further arguments of ``DataLoader``.

    Raises:
        UserError: one batch on every process takes more samples than the data has.
    """
    length = len(dataset)  # type: ignore[arg-type]
    joined = batch_size * world_size()  # samples of a step's batches
    if length < joined:
        raise UserError(
            f"run.batch_size_train is {batch_size} for each of {world_size()} process(es), but the "
            f"training data has only {length} samples; use a smaller batch"
        )
    samples = (batches or length // joined) * joined
    sampler = EpochBatchSampler(
        length=length,
        batch_size=batch_size,
        seed=seed,
        rank=rank(),
        world_size=world_size(),
        mixture=Mixture.of(dataset, ratios, samples=samples) if batches or ratios is not None else None,
    )
    return ReplayLoader(
        ReplayDataset(dataset, seed=seed),
        batch_sampler=sampler,
        generator=torch.Generator(),  # for the workers' base seed; leaves the training's generator alone
        persistent_workers=options["num_workers"] > 0,
        worker_init_fn=shielded(),
        **options,
    )


def eval_loader(dataset: Dataset[Any], *, share: bool, **options: Any) -> DataLoader[Any]:
    """Return a loader over a whole split in order or, with ``share``, over this rank's part of it."""
    sampler: Sampler[Any] | None = DistributedSampler(dataset, shuffle=False) if share else None
    return DataLoader(dataset, sampler=sampler, worker_init_fn=shielded(), **options)


def shielded() -> Callable[[int], None]:
    """Return a ``worker_init_fn`` that leaves signal handling to the training process.

    Ctrl-C, a batch system's SIGTERM and a closed terminal's SIGHUP reach workers too; if they died, the step could not
    be finished. They exit with the training process, which may terminate them once it is exiting itself.
    """
    closing = multiprocessing.Event()
    atexit.register(closing.set)
    return partial(_start_worker, closing)


def _start_worker(closing: Event, worker_id: int) -> None:
    def _leave_if_closing(signum: int, frame: FrameType | None) -> None:
        if closing.is_set():
            os._exit(0)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for signum in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(signum, _leave_if_closing)
