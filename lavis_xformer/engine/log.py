"""What a run reports: JSON lines, TensorBoard, W&B, and a progress bar or plain lines."""

from __future__ import annotations

import json
import logging
import resource
import sys
import time
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, TextIO

import torch
from tqdm import tqdm

from lavis_xformer.errors import UserError
from lavis_xformer.files import write_text
from lavis_xformer.run_folder import LOG

logger = logging.getLogger(__name__)


def plain(value: Any) -> Any:
    """Convert numpy and torch numbers to Python's, which a checkpoint may hold; return anything else unchanged."""
    return value.tolist() if hasattr(value, "tolist") else value


@dataclass
class Averages:
    """Means of named values over the steps of an epoch."""

    sums: dict[str, float] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)

    def add(self, values: dict[str, float]) -> None:
        """Add the values of a step; a name may be absent from some steps."""
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
            self.counts[name] = self.counts.get(name, 0) + 1

    def means(self) -> dict[str, float]:
        """Return the mean of each name over the steps that had it."""
        return {name: self.sums[name] / self.counts[name] for name in self.sums}


class MetricsLog:
    """Writes records to ``log.jsonl`` and their numbers to TensorBoard and W&B; for one process.

    A record is one line: ``{"kind": "step" | "epoch" | "eval" | ..., "epoch": .., "step": .., ...}``
    where ``step`` counts optimiser steps from the start of the run. A full disk costs a warning, not
    the run.
    """

    def __init__(self, folder: Path, *, from_step: int = 0, tensorboard: bool = True, wandb: bool = False) -> None:
        """Open a run folder's log, dropping the records that a run resumed at ``from_step`` will write again."""
        self._wandb = start_wandb(folder) if wandb else None
        self.path = folder / LOG
        _keep_until(self.path, from_step)
        self._file: TextIO = open(self.path, "a", encoding="utf-8")  # noqa: SIM115
        self._failing = False
        self._events: Any = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._events = SummaryWriter(str(folder / "tensorboard"), purge_step=from_step + 1)

    def write(self, kind: str, *, step: int, values: dict[str, Any], **about: Any) -> None:
        """Write one record; numbers among ``values`` go to TensorBoard and W&B as ``kind/name``."""
        group = str(about.get("split") or "train") if kind != "step" else "step"
        numbers = {f"{group}/{name}": value for name, value in values.items() if isinstance(value, (int, float))}
        try:
            self._file.write(json.dumps({"kind": kind, **about, "step": step, **values}) + "\n")
            self._file.flush()
            if self._events is not None:
                for name, value in numbers.items():
                    self._events.add_scalar(name, value, step)
            self._failing = False
        except OSError as error:
            if not self._failing:
                logger.warning("%s can't be written: %s; continuing", self.path, error)
            self._failing = True
        if self._wandb is not None:
            self._wandb.log(numbers, step=step)

    def close(self) -> None:
        """Close the files."""
        self._file.close()
        if self._events is not None:
            self._events.close()
        if self._wandb is not None:
            self._wandb.finish()


def start_wandb(folder: Path) -> Any:
    """Start or resume the W&B run of a run folder; ``WANDB_PROJECT`` and similar variables apply as usual.

    Raises:
        UserError: W&B is not installed.
    """
    try:
        wandb = import_module("wandb")
    except ImportError:
        raise UserError("run.wandb is True, but W&B is not installed: pip install wandb") from None
    return wandb.init(dir=str(folder), id=folder.name, name=folder.name, resume="allow")


class Progress:
    """A bar with losses, images per second and time left in a terminal; plain lines elsewhere."""

    def __init__(self, *, total: int, done: int, title: str, every: int, shown: bool) -> None:
        """Start at ``done`` of ``total`` steps; without a terminal, write a line every ``every`` steps."""
        self.title, self.every, self.total, self.done = title, max(1, every), total, done
        self.shown = shown
        self._first, self._start = self.done, time.monotonic()
        on_terminal = shown and sys.stderr.isatty()
        self._bar = (
            tqdm(total=total, initial=done, desc=title, dynamic_ncols=True, leave=False) if on_terminal else None
        )

    def step(self, values: dict[str, float]) -> None:
        """Show a step's values."""
        self.done += 1
        if self._bar is not None:
            self._bar.set_postfix_str(_short(values), refresh=False)
            self._bar.update()
        elif self.shown and (self.done % self.every == 0 or self.done == self.total):
            pace = (time.monotonic() - self._start) / max(1, self.done - self._first)
            left = tqdm.format_interval(pace * (self.total - self.done))
            logger.info("%s %d/%d  %s  left %s", self.title, self.done, self.total, _short(values), left)

    def close(self) -> None:
        """Remove the bar."""
        if self._bar is not None:
            self._bar.close()


def peak_memory_mb(device: torch.device) -> float:
    """Return the highest memory use so far in MiB: of the GPU, or of the process on CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kib / 2**10 if sys.platform != "darwin" else kib / 2**20


def setup_logging(*, shown: bool) -> None:
    """Send this package's messages to stdout as plain lines above any progress bar; only errors unless ``shown``."""
    package = logging.getLogger("lavis_xformer")
    package.setLevel(logging.INFO if shown else logging.ERROR)
    package.propagate = False
    package.handlers = [_BarHandler()]


class _BarHandler(logging.Handler):
    """Prints above a bar, if there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print a message, prefixed with its level from WARNING upwards."""
        prefix = "" if record.levelno < logging.WARNING else f"{record.levelname.lower()}: "
        tqdm.write(prefix + record.getMessage(), file=sys.stdout)
        sys.stdout.flush()


def _short(values: dict[str, float]) -> str:
    shown = {n: v for n, v in values.items() if n.startswith("loss") or n == "images_per_s"}
    return "  ".join(f"{name.removeprefix('loss_')} {value:.4g}" for name, value in shown.items())


def _keep_until(path: Path, step: int) -> None:
    """Drop steps after ``step``, other records that will be written again, and lines truncated by a kill."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
            if record["step"] < step + (record["kind"] == "step"):
                kept.append(line)
        except (ValueError, KeyError, TypeError):
            continue
    write_text(path, "".join(f"{line}\n" for line in kept))
