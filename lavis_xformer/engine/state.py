"""What a checkpoint holds: captured from a training run, and restored into one."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import nn

from lavis_xformer.distributed import rank, world_size
from lavis_xformer.engine import jobs, rng
from lavis_xformer.engine.log import Averages
from lavis_xformer.engine.loop import Position
from lavis_xformer.errors import UserError
from lavis_xformer.state_dicts import load_trainable, trainable_state

logger = logging.getLogger(__name__)


class Corrupt:
    """The samples that a run could not read, also before restarts: their number, and the names of the first ones.

    A sample met again after a restart counts once, as long as its name was kept.
    """

    MOST = 1000

    def __init__(self, names: Sequence[str] = (), count: int = 0) -> None:
        self.names, self.count = list(names), max(count, len(names))
        self._before, self._count_before = frozenset(names), self.count

    def update(self, found: Iterable[str]) -> None:
        """Take all names found since the last (re)start of the run."""
        new = sorted(set(found) - self._before)
        self.names = sorted([*self._before, *new[: self.MOST - len(self._before)]])
        self.count = self._count_before + len(new)


class TrainingState:
    """Weights, optimiser, scaler, position, averages, best metrics and skipped samples of a run.

    The learning rate needs no entry: it is a function of the position.
    """

    def __init__(
        self,
        *,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        scaler: torch.amp.GradScaler | None,
        config: dict[str, Any],
        batches_per_epoch: int,
        steps_per_epoch: int,
        seed: int,
        has_streams: bool,
    ) -> None:
        """Begin at the start of a run; ``model`` has no wrapper, ``config`` holds plain values."""
        self.model, self.optimizer, self.scaler, self.config = model, optimizer, scaler, config
        self.batches_per_epoch, self.steps_per_epoch = batches_per_epoch, steps_per_epoch
        self.seed, self.has_streams = seed, has_streams
        self.joined_batch = int(config["run"].get("batch_size_train", 0)) * world_size()
        self.position = Position()
        self.averages = Averages()
        self.best: dict[str, Any] = {}
        self.corrupt = Corrupt()

    @property
    def epoch_done(self) -> bool:
        """Whether all batches of the position's epoch have been trained."""
        return self.position.batches >= self.batches_per_epoch

    def next_epoch(self) -> None:
        """Move to the beginning of the next epoch."""
        self.position.epoch += 1
        self.position.batches = 0
        self.averages = Averages()

    def as_dict(self, rng_of_ranks: list[dict[str, Any]]) -> dict[str, Any]:
        """Return the content of a checkpoint, given every rank's random state.

        ``model``, ``optimizer``, ``scaler``, ``epoch`` and ``config`` are as in LAVIS's checkpoints.
        """
        return {
            "model": trainable_state(self.model),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict() if self.scaler else None,
            "epoch": self.position.epoch,
            "epoch_done": self.epoch_done,
            "position": asdict(self.position),
            "averages": asdict(self.averages),
            "rng": rng_of_ranks,
            "best": self.best,
            "corrupt": self.corrupt.names,
            "corrupt_count": self.corrupt.count,
            "joined_batch": self.joined_batch,
            "batches_per_epoch": self.batches_per_epoch,
            "config": self.config,
            "versions": jobs.versions(),
        }

    def restore(self, content: dict[str, Any], *, source: str) -> None:
        """Restore what ``as_dict`` returned, or a checkpoint of LAVIS's own runner.

        Raises:
            UserError: it is of another model, or its position falls inside a batch of this run.
        """
        config = content.get("config", self.config)
        changes = jobs.differences(config, self.config)
        if changes:
            logger.warning("%s: the configuration was different: %s", source, "; ".join(changes))
        try:
            load_trainable(self.model, content["model"], source=source)
        except UserError as error:
            before, now = (given.get("model", {}).get("arch") for given in (config, self.config))
            if before == now:
                raise
            told = f"it is of a run of {before}, this one trains {now}; is it meant as model.pretrained?"
            raise UserError(f"{error}; {told}") from error
        self._restore_optimizer(content, source)
        self.position = self._restored_position(content, source)
        self.best = content.get("best", {})
        self.corrupt = Corrupt(content.get("corrupt", []), content.get("corrupt_count", 0))
        self.averages = Averages(**content.get("averages", {}))
        self._restore_rng(content.get("rng", []), source)
        if self.has_streams and self.position.batches and not self.epoch_done:
            self._warn_of_other_lanes(content)

    def _restore_optimizer(self, content: dict[str, Any], source: str) -> None:
        own = [{k: v for k, v in g.items() if k in ("weight_decay", "betas")} for g in self.optimizer.param_groups]
        try:
            self.optimizer.load_state_dict(content["optimizer"])
        except (KeyError, ValueError) as error:
            reason = f"its optimiser state is for another model or another setting of run.muon: {error}"
            raise UserError(f"{source}: {reason}") from error
        for group, settings in zip(self.optimizer.param_groups, own, strict=True):
            group.update(settings)  # this run's, not the checkpoint's
        if self.scaler is not None and content.get("scaler"):
            self.scaler.load_state_dict(content["scaler"])

    def _restored_position(self, content: dict[str, Any], source: str) -> Position:
        if "position" not in content:  # LAVIS saves after epochs only
            epoch = content["epoch"] + 1
            return Position(epoch=epoch, steps=epoch * self.steps_per_epoch)
        position = Position(**content["position"])
        before, now = content["joined_batch"], self.joined_batch
        samples = position.batches * before
        if content["epoch_done"]:
            position.batches = self.batches_per_epoch
        elif samples % now:
            raise UserError(
                f"{source} was saved mid-epoch, after {samples} samples in batches of {before} over all "
                f"processes; batches of {now} can't resume there: use a batch that divides {samples}, or a "
                "checkpoint from the end of an epoch"
            )
        else:
            position.batches = samples // now
        if before != now:
            logger.warning("%s: the batch over all processes was %d samples, now it is %d", source, before, now)
        if not content["epoch_done"]:
            self._compare_epochs(content, position, source)
        return position

    def _compare_epochs(self, content: dict[str, Any], position: Position, source: str) -> None:
        """Warn if the rest of an epoch is drawn from another order, as the data or the size of a mixture changed.

        Raises:
            UserError: the epoch has become so short that nothing of it would be left.
        """
        sizes = content["joined_batch"], self.joined_batch
        before = sizes[0] * content.get("batches_per_epoch", self.batches_per_epoch)
        now = sizes[1] * self.batches_per_epoch
        mixed = any(self.config["run"].get(key) for key in ("train_dataset_ratios", "iters_per_epoch", "max_iters"))
        kept = mixed or sizes[0] == sizes[1]  # else the same data fill more or fewer batches
        if abs(before - now) >= (1 if kept else max(sizes)):
            if position.batches >= self.batches_per_epoch:
                raise UserError(
                    f"{source} was saved after {position.batches * sizes[1]} of its epoch's {before} samples, but here "
                    f"an epoch has {now}: nothing of it is left to train; with run.iters_per_epoch, set it to "
                    f"{-(-before // sizes[1])}, else give the run the data it had"
                )
            logger.warning(
                "%s: its epochs had %d samples, now they have %d: are the training data, and run.iters_per_epoch times "
                "the batch, the same? The rest of this epoch repeats some samples and omits others",
                source,
                before,
                now,
            )

    def _warn_of_other_lanes(self, content: dict[str, Any]) -> None:
        """Warn if an epoch of a stream can't continue in the order in which it began."""
        before = int(content["config"]["run"]["num_workers"]), len(content["rng"])
        now = int(self.config["run"]["num_workers"]), world_size()
        if before != now:
            logger.warning(
                "(workers, processes) were %s, now %s: this epoch's streams continue in another order, which repeats "
                "some samples and omits others; the next epoch is complete",
                before,
                now,
            )

    def _restore_rng(self, states: list[dict[str, Any]], source: str) -> None:
        if rank() < len(states):
            rng.restore(states[rank()])
            return
        rng.seed_everything(rng.seed_of(self.seed, rank(), self.position.steps))
        logger.warning("%s has no random state of process %d: reseeded", source, rank())
