"""Streams of webdataset shards whose order depends only on (seed, epoch, lane), and loaders that take turns.

A *lane* is one worker of one process. In each pass over the data every shard goes to one lane, which reads it once. A
lane that has read its shards starts on those of its next pass: with shards of equal size, equally many on each lane,
no sample repeats before all have been read.
"""

from __future__ import annotations

import itertools
import logging
import random
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from webdataset import shuffle, split_by_node, split_by_worker, tarfile_to_samples
from webdataset.filters import FilterFunction
from webdataset.shardlists import expand_urls

from lavis_xformer.distributed import rank, world_size
from lavis_xformer.engine import rng
from lavis_xformer.engine.sampling import ReplayLoader, permutation, shielded
from lavis_xformer.errors import UserError
from lavis_xformer.state_dicts import listing

logger = logging.getLogger(__name__)


class ShardStream(IterableDataset[Any]):
    """A webdataset pipeline read endlessly, pass after pass, in a replayable order.

    Its shard source, ``split_by_*`` stages, shuffling seeds and error handlers are replaced; its other stages stay.
    """

    def __init__(self, pipeline: Any, *, seed: int, guard: Any, lanes: int = 1) -> None:
        """Take a ``webdataset.DataPipeline`` apart; ``lanes`` counts the lanes of all processes.

        Raises:
            UserError: the pipeline does not begin with a list of shards, or has fewer shards than lanes.
        """
        source, *stages = getattr(pipeline, "pipeline", [None])
        self.urls = [shard for urls in getattr(source, "urls", ()) for shard in expand_urls(urls)]
        if missing := [url for url in self.urls if not re.match(r"\w+:", url) and not Path(url).exists()]:
            logger.warning("%d of %d shards are missing: %s", len(missing), len(self.urls), listing(missing))
        if not self.urls:
            raise UserError(f"a stream of type {type(pipeline).__name__} does not begin with a list of shards")
        if len(self.urls) < lanes:
            raise UserError(
                f"there are {len(self.urls)} shards ({self.urls[0]} ...) for {lanes} lanes (processes times "
                "run.num_workers), and each needs its own; use fewer workers, or split the data into more shards"
            )
        self.stages = [stage for stage in stages if stage not in (split_by_node, split_by_worker)]
        self.seed, self.guard, self.epoch = seed, guard, 0

    def __iter__(self) -> Iterator[Any]:
        """Yield samples endlessly; in the main process the random state is left untouched."""
        worker = get_worker_info()
        number, count = (worker.id, worker.num_workers) if worker is not None else (0, 1)
        lane, lanes = rank() * count + number, world_size() * count
        samples = self._passes(lane, lanes)
        for index in itertools.count():
            before = rng.capture() if worker is None else None
            rng.seed_cpu(rng.seed_of(self.seed, self.epoch, lane, index))
            try:
                sample = next(samples)
            finally:
                if before is not None:
                    rng.restore(before)
            yield sample

    def _passes(self, lane: int, lanes: int) -> Iterator[Any]:
        for visit in itertools.count():
            order = permutation(len(self.urls), self.seed, self.epoch, visit)[lane::lanes]
            shards = [self.urls[i] for i in order.tolist()]
            shuffler = random.Random(rng.seed_of(self.seed, self.epoch, visit, lane))
            yield from self.guard.watch(self._read(shards, shuffler), source=f"{len(shards)} shards ({shards[0]} ...)")

    def _read(self, shards: Sequence[str], shuffler: random.Random) -> Iterator[Any]:
        samples: Iterator[Any] = iter([{"url": url} for url in shards])
        for stage in self.stages:
            samples = self.guard.remember(iter(self._own(stage, shuffler)(samples)))
        return samples

    def _own(self, stage: Any, shuffler: random.Random) -> Any:
        """Return a stage with our random generator and error handler in place of its own, if it has any."""
        if not isinstance(stage, FilterFunction):
            return getattr(stage, "run", stage)
        own: dict[str, Any] = {}
        if stage.f is tarfile_to_samples.f:
            own["handler"] = self.guard.shard_fault
        elif "handler" in stage.kw:
            own["handler"] = self.guard.sample_fault
        if stage.f is shuffle.f:
            own["rng"] = shuffler
        return FilterFunction(stage.f, *stage.args, **{**stage.kw, **own})


class StreamLoader(DataLoader[Any]):
    """A loader of a stream with ``batches`` batches per epoch; ``options`` are further arguments of ``DataLoader``."""

    def __init__(self, stream: ShardStream, *, batches: int, **options: Any) -> None:
        super().__init__(stream, generator=torch.Generator(), worker_init_fn=shielded(), **options)
        self.batches = batches
        self.start(epoch=0)

    def __len__(self) -> int:
        """Return how many batches an epoch has."""
        return self.batches

    def start(self, *, epoch: int, skip_batches: int = 0) -> None:
        """Make the next iteration yield the batches of ``epoch`` after the first ``skip_batches``."""
        assert isinstance(self.dataset, ShardStream)
        self.dataset.epoch = epoch  # workers are restarted for each iteration and receive it then
        self.skip_batches = skip_batches

    def __iter__(self) -> Any:
        """Yield batches endlessly; those to skip are read and discarded."""
        iterator = super().__iter__()
        for _ in range(self.skip_batches):
            next(iterator)
        return iterator


class JoinedLoader:
    """Loaders that take turns, batch by batch, in an order seeded by (seed, epoch), the same on all ranks."""

    def __init__(self, loaders: Sequence[Any], *, seed: int) -> None:
        self.loaders, self.seed = loaders, seed
        self.start(epoch=0)

    def __len__(self) -> int:
        """Return how many batches an epoch has."""
        return sum(len(loader) for loader in self.loaders)

    def start(self, *, epoch: int, skip_batches: int = 0) -> None:
        """Make the next iteration yield the batches of ``epoch`` after the first ``skip_batches``."""
        lengths = torch.tensor([len(loader) for loader in self.loaders])
        turns = torch.arange(len(lengths)).repeat_interleave(lengths)[permutation(len(self), self.seed, epoch)]
        done = turns[:skip_batches].bincount(minlength=len(lengths))
        for loader, count in zip(self.loaders, done.tolist(), strict=True):
            loader.start(epoch=epoch, skip_batches=count)
        self._turns = turns[skip_batches:].tolist()

    def __iter__(self) -> Iterator[Any]:
        """Yield each turn's batch."""
        iterators = [iter(loader) for loader in self.loaders]
        for turn in self._turns:
            yield next(iterators[turn])


#: a training loader
EpochLoader = ReplayLoader | StreamLoader | JoinedLoader
