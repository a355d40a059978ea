"""The training loop of one epoch: windows of batches in, logged steps and saved positions out."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from lavis_xformer import distributed
from lavis_xformer.distributed import is_main, rank, world_size
from lavis_xformer.engine import rng
from lavis_xformer.engine.batches import count_samples, image_ids, to_device
from lavis_xformer.engine.interruption import Interruption, leave_lost_workers_to_next
from lavis_xformer.engine.log import Averages, Progress, peak_memory_mb
from lavis_xformer.engine.options import RunOptions
from lavis_xformer.engine.step import Stepper
from lavis_xformer.errors import UserError, first_line, lost_worker, worker_is_gone
from lavis_xformer.state_dicts import trainable_state

logger = logging.getLogger(__name__)


@dataclass
class Position:
    """How far a run has got.

    Attributes:
        epoch: the epoch being trained, from 0.
        batches: batches that each process has done in this epoch.
        steps: optimiser steps done in the whole run, skipped ones included.
        skipped: steps skipped because a loss was not finite.
    """

    epoch: int = 0
    batches: int = 0
    steps: int = 0
    skipped: int = 0


@dataclass(frozen=True)
class Verdict:
    """What all ranks agree on once a step's gradients are computed, and this rank's own terms."""

    terms: dict[str, float]
    own: dict[str, float]
    finite: bool
    signum: int
    save: bool


class EpochLoop:
    """Trains the rest of an epoch from ``position``, which is advanced in place.

    ``accumulate`` batches make a step. ``options`` say when to save, and what to do about non-finite losses. ``save``
    writes a checkpoint of the current position and is called on all ranks together; ``log`` takes ``"step"`` and a
    step's values; without a terminal, a line is written every ``log_every`` steps. What is needed to debug a
    non-finite loss goes to ``folder``.
    """

    def __init__(
        self,
        *,
        stepper: Stepper,
        schedule: Any,
        position: Position,
        averages: Averages,
        options: RunOptions,
        accumulate: int,
        log_every: int,
        interruption: Interruption,
        save: Callable[[], None],
        log: Callable[[str, dict[str, Any]], None],
        folder: Path,
    ) -> None:
        self.stepper, self.schedule, self.position, self.averages = stepper, schedule, position, averages
        self.options, self.accumulate, self.log_every = options, accumulate, log_every
        self.interruption, self.save, self.log, self.folder = interruption, save, log, folder
        self._last_save = time.monotonic()

    def run(self, loader: DataLoader[Any], *, batches: int) -> dict[str, float]:
        """Train until ``batches`` batches of the epoch are done; return the epoch's mean terms.

        Raises:
            UserError: a loss or gradient was not finite, or a rank's data can't be read or its loader lost a
                worker; progress up to then is saved.
            SystemExit: after a signal, once the step is done and saved.
        """
        progress = self._progress(batches)
        started = time.monotonic()
        for window, waited in self._windows(loader, batches):
            before = rng.capture()
            self.schedule.step(self.position.epoch, self.position.batches // self.accumulate)
            terms = self.stepper.gradients(window)
            verdict = self._agree(terms)
            self._update(verdict, window, before)
            started = self._record(verdict, window, waited, started, progress)
            self._save_or_leave(verdict, batches)
        progress.close()
        return self.averages.means()

    def _windows(self, loader: DataLoader[Any], batches: int) -> Iterator[tuple[list[Any], float]]:
        """Yield lists of up to ``accumulate`` batches on the device, and the seconds waited for them."""
        left = batches - self.position.batches
        iterator: Iterator[Any] = iter(loader) if left else iter(())
        while left > 0:
            begin = time.monotonic()
            window = self._fetch(iterator, min(left, self.accumulate))
            waited = time.monotonic() - begin
            left -= len(window)
            yield [to_device(samples, self.stepper.device) for samples in window], waited

    def _fetch(self, iterator: Iterator[Any], count: int) -> list[Any]:
        """Return the next batches; if any rank fails to get its own, all save and stop together."""
        window, fault = [], ""
        try:
            window = [next(iterator) for _ in range(count)]
            leave_lost_workers_to_next()
        except UserError as error:
            fault = str(error)
        except (ConnectionError, EOFError) as error:  # from the pipe of a dying worker
            fault = worker_is_gone(error)
        except RuntimeError as error:
            fault = lost_worker(error) or ""
            if not fault:
                raise
        if distributed.total(torch.tensor(bool(fault), dtype=torch.float64)) == 0:
            return window
        faults = dict.fromkeys(text for text in distributed.collect(fault) if text)
        self._save_what_is_done()
        raise UserError("; ".join(faults))

    def _save_what_is_done(self) -> None:
        """Save before stopping; at the start of an epoch everything is saved already."""
        if self.position.batches:
            self.save()
            logger.info("step %d saved", self.position.steps)

    def _agree(self, terms: dict[str, torch.Tensor]) -> Verdict:
        """Average the terms over ranks; any rank's request to stop or save applies to all.

        Costs one transfer from the device and one all-reduce of a small vector per step, besides that of
        :meth:`_fetch`. A signal that arrives while this waits for the other ranks, which don't know of it, is left to
        the next step.
        """
        names = list(terms)
        values = torch.stack([terms[name] for name in names]).cpu().double()
        checked = [i for i, n in enumerate(names) if n != "grad_norm" or not self.stepper.scaler]
        bad = not bool(torch.isfinite(values[checked]).all())
        signum = self.interruption.signum
        flags = torch.tensor([bad, signum, self._save_is_due()]).double()
        summed = distributed.total(torch.cat([flags, values]))
        means = (summed[3:] / world_size()).tolist()
        return Verdict(
            terms=dict(zip(names, means, strict=True)),
            own=dict(zip(names, values.tolist(), strict=True)),
            finite=not summed[0],
            signum=signum or (15 if summed[1] else 0),
            save=bool(summed[2]),
        )

    def _update(self, verdict: Verdict, window: list[Any], before: dict[str, Any]) -> None:
        if verdict.finite:
            self.stepper.apply()
        else:
            self._skip_or_stop(verdict.own, window, before)
            self.stepper.discard()
        self.position.batches += len(window)
        self.position.steps += 1

    def _record(self, verdict: Verdict, window: list[Any], waited: float, started: float, progress: Progress) -> float:
        """Log the step; return the time at which it ended."""
        now = time.monotonic()
        images = sum(count_samples(samples) for samples in window) * world_size()
        speed = {
            "lr": self.stepper.optimizer.param_groups[0]["lr"],
            "images_per_s": images / max(now - started, 1e-9),
            "data_wait": waited / max(now - started, 1e-9),
            "peak_memory_mb": peak_memory_mb(self.stepper.device),
        }
        values = {**verdict.terms, **speed}
        if verdict.finite:  # the gradient norm may still not be, while fp16's scaler seeks its scale
            self.averages.add({name: value for name, value in values.items() if math.isfinite(value)})
        self.log("step", {name: value if math.isfinite(value) else str(value) for name, value in values.items()})
        progress.step(values)
        return now

    def _save_is_due(self) -> bool:
        """Whether enough minutes or steps have passed; only the main process's clock counts."""
        minutes, steps = self.options.save_every_minutes, self.options.save_every_steps
        by_clock = minutes > 0 and time.monotonic() - self._last_save >= 60 * minutes and is_main()
        return by_clock or (steps > 0 and (self.position.steps + 1) % steps == 0)

    def _save_or_leave(self, verdict: Verdict, batches: int) -> None:
        at_end = self.position.batches >= batches  # the runner saves there
        if verdict.signum or (verdict.save and not at_end):
            self.save()
            self._last_save = time.monotonic()
        if verdict.signum:
            step = self.position.steps
            logger.info("signal %d: step %d done and saved; run.resume=auto resumes from it", verdict.signum, step)
            raise SystemExit(128 + verdict.signum)

    def _skip_or_stop(self, terms: dict[str, float], window: list[Any], before: dict[str, Any]) -> None:
        """Count a non-finite step as skipped, or save its batch and the state before it, and stop the run."""
        bad = [name for name, value in terms.items() if not math.isfinite(value)]
        ids = [image_ids(samples) for samples in window]
        found = f"rank {rank()}: {', '.join(bad)} for image ids {ids}" if bad else ""
        about = "; ".join(text for text in distributed.collect(found) if text)
        about = f"not finite in step {self.position.steps + 1} of epoch {self.position.epoch}: {about}"
        if self.position.skipped < self.options.skip_nonfinite:
            self.position.skipped += 1
            logger.warning("%s; skipped (%d)", about, self.position.skipped)
            return
        saved = distributed.collect(self._save_bundle(bad, terms, window, before) if bad else "")
        where = ", ".join(path for path in saved if path) or "no file (see the warning above)"
        self.stepper.discard()
        rng.restore(before)
        self._save_what_is_done()
        raise UserError(
            f"{about}; the batch, weights and random state are in {where}; "
            "run.skip_nonfinite sets how many such steps to skip"
        )

    def _save_bundle(self, bad: list[str], terms: dict[str, float], window: list[Any], before: dict[str, Any]) -> str:
        """Save what reproduces a non-finite step; return the file's path, or nothing if it can't be written."""
        path = self.folder / f"nonfinite_step{self.position.steps + 1}_rank{rank()}.pt"
        model = getattr(self.stepper.model, "module", self.stepper.model)
        content = {
            "bad": bad,
            "terms": terms,
            "position": asdict(self.position),
            "window": window,
            "rng": before,
            "model": trainable_state(model),
        }
        try:
            torch.save(content, path)
        except (OSError, RuntimeError) as error:  # RuntimeError: how torch's zip writer reports a full disk
            logger.warning("%s could not be written: %s", path, first_line(error))
            return ""
        return str(path)

    def _progress(self, batches: int) -> Progress:
        return Progress(
            total=math.ceil(batches / self.accumulate),
            done=math.ceil(self.position.batches / self.accumulate),
            title=f"epoch {self.position.epoch}",
            every=self.log_every,
            shown=is_main(),
        )
