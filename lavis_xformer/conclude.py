"""What a run prints at its end: results, where everything is, and what to try next."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lavis_xformer.analysis.report import write_report
from lavis_xformer.engine import checkpoint
from lavis_xformer.errors import UserError
from lavis_xformer.run_folder import BEST, LOG, SUMMARY


def conclude(runner: Any, summary: Mapping[str, Any]) -> None:
    """Draw the curves and print the results, where everything is, and what to try next."""
    for split, figures in held_out(summary).items():
        print(f"\n{split}:\n{table(runner.task, figures)}")
    names = summary.get("corrupt", [])
    print_corrupt(names, summary.get("corrupt_count", len(names)))
    folder, drawn = runner.output_dir, ""
    if not summary["finished"]:
        print(f"\nlog         {show(folder / 'log.txt')}")
        if any((folder / "result").glob("*.json")):
            print(f"answers     {show(folder / 'result')}")
        return
    try:
        page, picture = write_report(folder)
        drawn = f"\ncurves      {show(picture)}\nreport      {show(page)}"
    except OSError as error:
        drawn = f"\nreport      can't be written: {error}"
    except UserError:
        pass  # nothing was left to train: the log here has no step
    best = folder / BEST
    newest = best if best.exists() else next(iter(checkpoint.listed(folder)), None)
    print(f"\ncheckpoint  {show(newest)}\nlog         {show(folder / LOG)}{drawn}")
    if runner.options.next_command:
        follows = runner.options.next_command.replace("{checkpoint}", shlex.quote(show(newest)))
        print(f"next        {as_called_here(follows)}")


def print_corrupt(names: Sequence[str], count: int, most: int = 5) -> None:
    """Say how many samples were skipped because they can't be read; ``names`` are the first of them."""
    if names:
        more = f" and {count - most} more (see {SUMMARY})" if count > most else ""
        print(f"\n{count} corrupt samples skipped: {', '.join(names[:most])}{more}")


def held_out(summary: Mapping[str, Any]) -> dict[str, Mapping[str, float]]:
    """Return the metrics of a summary by the name of the evaluated split."""
    best = summary.get("best") or {}
    splits = {f"{best['split']} (best, epoch {best['epoch']})": best} if best else {}
    return splits | {split: figures for split, figures in summary["test"].items() if figures}


def rows_of(task: Any, figures: Mapping[str, float]) -> list[tuple[str, str, str]]:
    """Return a task's metrics for display: name, value and reference value; a heading has no value."""
    if hasattr(task, "table"):
        return task.table(figures)
    return [(n, f"{v:.4f}", "") for n, v in figures.items() if isinstance(v, float)]


def table(task: Any, figures: Mapping[str, float]) -> str:
    """Lay out a task's metrics as text, beside their reference values."""
    rows = rows_of(task, figures)
    width = max([24, *(1 + len(name) for name, value, _ in rows if value)])
    lines = [f"  {'':<{width}}{'':>10}{'reference':>10}"] if any(row[2] for row in rows) else []
    return "\n".join([*lines, *(f"  {name:<{width}}{value:>10}{by:>10}".rstrip() for name, value, by in rows)])


def show(path: Path | None) -> str:
    """Return a path as seen from the current folder."""
    return os.path.relpath(path) if path is not None else "none"


def as_called_here(command: str) -> str:
    """Give the path of this environment's own program if the shell would find another or none (not activated)."""
    name, _, rest = command.partition(" ")
    own = {"python": Path(sys.executable), "lavis-xformer": Path(sys.executable).with_name("lavis-xformer")}.get(name)
    found = shutil.which(name)
    if own is None or (found and Path(found).absolute() == own.absolute()):
        return command
    return f"{shlex.quote(show(own))} {rest}"
