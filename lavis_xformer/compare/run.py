"""``lavis-xformer compare YAML``: train and evaluate every variant alike, then say how they differ.

The YAML names the runs (``common``: stages with their YAMLs and options), the ``variants`` (what each changes), the
``seeds`` and the ``baseline``. A finished run is kept; the command may be stopped and started at will.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from lavis_xformer.compare.plan import BEST, Cell, Plan, read_plan
from lavis_xformer.errors import UserError

SAID = "console.txt"


def main(argv: Sequence[str]) -> int:
    """Run the command; return its exit status.

    Raises:
        UserError: something is wrong that the message names, or a run has failed.
    """
    parser = argparse.ArgumentParser(prog="lavis-xformer compare", description=__doc__)
    parser.add_argument("plan", help="the comparison's YAML, as projects/xformer/compare/quick.yaml")
    parser.add_argument("--only", nargs="+", default=[], metavar="VARIANT", help="run these variants only")
    parser.add_argument("--seeds", nargs="+", type=int, default=[], help="run these seeds only")
    parser.add_argument("--list", action="store_true", help="list the runs and which are finished; run nothing")
    args = parser.parse_args(argv)
    plan = read_plan(args.plan)
    cells = plan.cells(args.only, args.seeds)
    if args.list:
        print(listing(cells))
        return 0
    for number, cell in enumerate(cells, start=1):
        if not cell.finished:
            title = f"{cell.variant}, seed {cell.seed}, {cell.stage.name}"
            print(f"[{number}/{len(cells)}] {title}  ({cell.folder / SAID})", flush=True)
            run_cell(cell)
    print(write(plan))
    return 0


def listing(cells: Sequence[Cell]) -> str:
    """Return a line for every cell."""
    rows = [
        (cell.variant, f"seed {cell.seed}", cell.stage.name, "finished" if cell.finished else "to do", str(cell.folder))
        for cell in cells
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    return "\n".join("  ".join(word.ljust(w) for word, w in zip(row, [*widths, 0], strict=True)) for row in rows)


def run_cell(cell: Cell) -> None:
    """Run a cell in a process of its own and note what it took in ``cell.json``.

    Raises:
        UserError: it failed.
    """
    cell.folder.mkdir(parents=True, exist_ok=True)
    command, start = [sys.executable, *cell.arguments()], time.monotonic()
    with open(cell.folder / SAID, "a", encoding="utf-8") as said:
        process = subprocess.Popen(command, stdout=said, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        lines = (cell.folder / SAID).read_text(encoding="utf-8").strip().splitlines()
        raise UserError(f"{cell.variant}, seed {cell.seed}, {cell.stage.name} failed: {lines[-1] if lines else ''} "
                        f"(see {cell.folder / SAID})")  # fmt: skip
    note = {
        "stage": cell.stage.name,
        "seed": cell.seed,
        "options": cell.options,
        "command": command,
        "seconds": round(time.monotonic() - start, 1),
        "peak_memory_mb": round(usage.ru_maxrss / 1024, 1),  # of the process; Linux counts in KiB
        "trainable": trained_weights(cell.folder / BEST),
    }
    partial = cell.folder / "cell.json.part"
    partial.write_text(json.dumps(note, indent=2) + "\n", encoding="utf-8")
    partial.replace(cell.folder / "cell.json")


def trained_weights(path: Path) -> int | None:
    """Count the weights of a checkpoint, which holds the trained ones; None where there is none."""
    if not path.is_file():
        return None
    import torch

    state = torch.load(path, map_location="cpu", weights_only=True)["model"]
    weights = {tensor.data_ptr(): tensor for tensor in state.values() if tensor.is_floating_point()}  # tied ones once
    return sum(tensor.numel() for tensor in weights.values())


def write(plan: Plan) -> str:
    """Write tables, figures and everything as JSON; return the table and where all of it is."""
    from lavis_xformer.compare.figures import draw
    from lavis_xformer.compare.results import collect, markdown

    folder = plan.output / plan.name
    folder.mkdir(parents=True, exist_ok=True)
    found = collect(plan)
    table = markdown(found)
    (folder / "results.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    (folder / "results.md").write_text(table, encoding="utf-8")
    pictures = draw(plan, found, folder)
    return "\n".join([table, *(str(path) for path in (folder / "results.md", folder / "results.json", *pictures))])
