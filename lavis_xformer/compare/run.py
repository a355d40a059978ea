"""``lavis-xformer compare YAML``: train and evaluate all variants in the same way, then report how they differ.

The YAML names the runs (``common``: stages with their YAMLs and options), the ``variants`` (what each changes), the
``seeds`` and the ``baseline``. A finished run is kept until something that its result depends on changes
(configuration, weights, assets, code, versions); an outdated run is moved aside and rerun, and the reason is printed.
The command can be stopped and restarted at any time.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import platform
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import replace
from pathlib import Path

from lavis_xformer.arguments import at_least, command_parser
from lavis_xformer.compare import inputs
from lavis_xformer.compare.figures import draw
from lavis_xformer.compare.plan import CELL, INPUTS, Cell, Plan, read_plan
from lavis_xformer.compare.results import collect
from lavis_xformer.compare.tables import markdown
from lavis_xformer.errors import UserError
from lavis_xformer.files import make_folder, read_json, write_json, write_text
from lavis_xformer.paths import project_path
from lavis_xformer.run_folder import BEST, SUMMARY

SAID = "console.txt"
EARLIER = "spent.json"  # time and memory of a run so far, over all restarts
IN_PROGRESS: set[int] = set()  # ids of the processes that SIGTERM is forwarded to
TERMINATED = threading.Event()  # SIGTERM was received


def main(argv: Sequence[str]) -> int:
    """Run the command; return its exit status."""
    parser = command_parser("compare", __doc__)
    parser.add_argument("plan", help="the comparison's YAML, such as projects/xformer/compare/quick.yaml")
    parser.add_argument("--only", nargs="+", default=[], metavar="VARIANT", help="run these variants only")
    parser.add_argument("--seeds", nargs="+", type=int, default=[], help="run these seeds only")
    parser.add_argument("--lenient", action="store_true", help="also keep runs of other code or other versions")
    parser.add_argument(
        "--jobs", type=at_least(1), default=1, metavar="N", help="runs in parallel, even on one GPU (default: 1)"
    )
    parser.add_argument("--keep-going", action="store_true", help="if a run fails, go on with the other variants")
    parser.add_argument("--list", action="store_true", help="list the runs and which are finished; run nothing")
    args = parser.parse_args(argv)
    plan = replace(read_plan(args.plan), lenient=args.lenient)
    for stage in plan.stages:
        project_path(stage.config)  # raises if there is no such file
    cells = plan.cells(args.only, args.seeds)
    if args.list:
        print(listing(cells))
        return 0
    for cell in cells:
        check_splits(cell)
    check_configurations(cells)
    folder_of(plan)
    try:
        run_all(cells, args.jobs, keep_going=args.keep_going)
    except UserError:
        print(write(plan))  # what has been finished
        raise
    print(write(plan))
    return 0


def run_all(cells: Sequence[Cell], jobs: int = 1, *, keep_going: bool = False) -> None:
    """Run the unfinished cells: the stages of a variant's seed one after the other, ``jobs`` such chains in parallel.

    A run that several chains share is run by the first to reach it, while the others wait.

    Raises:
        UserError: a run has failed; those in progress were waited for, and no other was started, or with
            ``keep_going`` none that builds on it.
    """
    numbered = enumerate(cells, start=1)
    chains = [list(chain) for _, chain in itertools.groupby(numbered, key=lambda pair: (pair[1].variant, pair[1].seed))]
    locks = {cell.folder: threading.Lock() for cell in cells}
    halted = threading.Event()
    failed: dict[Path, str] = {}

    def run_chain(chain: Sequence[tuple[int, Cell]]) -> None:
        """Run the unfinished cells of a chain, up to one that fails, unless another chain has failed."""
        try:
            for number, cell in chain:
                with locks[cell.folder]:
                    if halted.is_set() or cell.folder in failed:
                        return
                    if cell.finished:
                        continue
                    announce(cell, f"[{number}/{len(cells)}]")
                    try:
                        run_cell(cell)
                    except UserError as error:
                        failed[cell.folder] = str(error)
                        if keep_going:
                            print(f"  {error}", flush=True)
                            return
                        halted.set()
        except BaseException:
            halted.set()
            raise

    with sigterm_for_all(), ThreadPoolExecutor(jobs) as pool:
        try:
            for chain in as_completed([pool.submit(run_chain, chain) for chain in chains]):
                chain.result()
        except BaseException:  # also Ctrl-C, which every run receives as well
            halted.set()
            raise
    if failed:
        raise UserError("; ".join(failed.values()))


@contextlib.contextmanager
def sigterm_for_all() -> Iterator[None]:
    """Within the block, forward SIGTERM to every run, which saves its step and ends, and stop as on Ctrl-C."""

    def hand_on(signum: int, frame: object) -> None:
        """Send SIGTERM to the runs in progress; one that is just being started gets it from ``run_cell``."""
        TERMINATED.set()
        for process_id in IN_PROGRESS.copy():
            with contextlib.suppress(ProcessLookupError):  # it has just ended
                os.kill(process_id, signal.SIGTERM)
        raise KeyboardInterrupt

    TERMINATED.clear()
    before = signal.signal(signal.SIGTERM, hand_on)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def announce(cell: Cell, number: str) -> None:
    """Print which run starts and where its output is, and move an outdated run aside."""
    print(f"{number} {cell.variant}, seed {cell.seed}, {cell.stage.name}  ({cell.folder / SAID})", flush=True)
    if reasons := cell.stale():
        print(f"  rerun, since {reason(reasons)}; the old run is now {set_aside(cell)}", flush=True)


def listing(cells: Sequence[Cell]) -> str:
    """Return a line for every cell."""
    rows = [(cell.variant, f"seed {cell.seed}", cell.stage.name, state(cell), str(cell.folder)) for cell in cells]
    widths = [max((len(row[column]) for row in rows), default=0) for column in range(4)]
    return "\n".join("  ".join(word.ljust(w) for word, w in zip(row, [*widths, 0], strict=True)) for row in rows)


def state(cell: Cell) -> str:
    """Say whether a cell is finished, to do, or to be rerun and why."""
    if reasons := cell.stale():
        return f"to be rerun: {reason(reasons)}"
    return "finished" if (cell.folder / CELL).is_file() else "to do"


def reason(changed: Sequence[str], most: int = 2) -> str:
    """Name the first changes, and count the rest."""
    more = f" and {len(changed) - most} more" if len(changed) > most else ""
    return f"{'; '.join(changed[:most])}{more}"


def check_splits(cell: Cell) -> None:
    """Check that a stage tests one split at most: results are kept by stage, not by split.

    Raises:
        UserError: it tests several.
    """
    keys = ("run.test_splits.", "run.valid_splits.") if cell.stage.evaluate else ("run.test_splits.",)
    splits = sorted({json.loads(value) for key, value in cell.inputs().items() if key.startswith(keys)})
    if len(splits) > 1:
        raise UserError(f"{cell.stage.name} tests the splits {', '.join(splits)}; give each a stage of its own")


def check_configurations(cells: Sequence[Cell]) -> None:
    """Check the configurations of all unfinished cells, since one that is wrong would else fail after hours.

    In a process of its own, as for a run, since it imports LAVIS.

    Raises:
        UserError: a key, name or file of one of them is wrong.
    """
    runs = {cell.folder: (f"{cell.variant}, {cell.stage.name}", cell) for cell in cells if not cell.finished}
    if not runs:
        return
    asked = [[name, cell.stage.config, cell.option_texts(), cell.stage.evaluate] for name, cell in runs.values()]
    command = [sys.executable, "-m", "lavis_xformer.check"]
    done = subprocess.run(command, input=json.dumps(asked), capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise UserError((done.stderr.strip() or "the check of the configurations failed").splitlines()[-1])


def set_aside(cell: Cell) -> Path:
    """Rename the folder of a stale cell, so that nothing continues from it; return its new name."""
    names = (cell.folder.with_name(f"{cell.folder.name}.stale{number}") for number in itertools.count(1))
    return cell.folder.rename(next(name for name in names if not name.exists()))


def run_cell(cell: Cell) -> None:
    """Run a cell in its own process and record its time, memory and provenance in ``cell.json``.

    Raises:
        UserError: it failed, or the code has changed since this command started.
    """
    code = inputs.code_now()
    if code != inputs.code() and not cell.lenient:
        raise UserError("the code of lavis_xformer has changed during this comparison; start the command again")
    cell.folder.mkdir(parents=True, exist_ok=True)
    write_json(cell.folder / INPUTS, {**cell.inputs(), "code": code})
    command, start = [sys.executable, *cell.arguments()], time.monotonic()
    in_order = {**os.environ, "PYTHONUNBUFFERED": "1"}  # an error is then the last line, whatever was printed before
    with open(cell.folder / SAID, "a", encoding="utf-8") as said:
        process = subprocess.Popen(command, stdout=said, stderr=subprocess.STDOUT, env=in_order)
        IN_PROGRESS.add(process.pid)
        if TERMINATED.is_set():  # while it was being started
            process.terminate()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        IN_PROGRESS.discard(process.pid)
    per_mb = 2**20 if sys.platform == "darwin" else 2**10  # macOS counts in bytes, Linux in KiB
    spent = with_earlier(cell.folder, time.monotonic() - start, usage.ru_maxrss / per_mb)
    if process.returncode != 0:
        lines = (cell.folder / SAID).read_text(encoding="utf-8").strip().splitlines()
        raise UserError(f"{cell.variant}, seed {cell.seed}, {cell.stage.name} failed: {lines[-1] if lines else ''} "
                        f"(see {cell.folder / SAID})")  # fmt: skip
    note = {
        "stage": cell.stage.name,
        "seed": cell.seed,
        "options": cell.options,
        "command": command,
        "seconds": spent["seconds"],
        "peak_memory_mb": gpu_memory(cell.folder) or spent["peak_memory_mb"],
        "trainable": trained_weights(cell.folder / BEST),
        "code": code,
        "commit": inputs.commit(),
        "machine": machine(),
    }
    # what it has downloaded counts from now on; what has changed meanwhile makes it stale
    write_json(cell.folder / INPUTS, {**cell.inputs(), **read_json(cell.folder / INPUTS)})
    write_json(cell.folder / CELL, note)


def with_earlier(folder: Path, seconds: float, memory: float) -> dict[str, float]:
    """Record what one start of a run took, and return the time and memory of all its starts."""
    note = folder / EARLIER
    before = read_json(note) if note.is_file() else {"seconds": 0.0, "peak_memory_mb": 0.0}
    spent = {
        "seconds": round(before["seconds"] + seconds, 1),
        "peak_memory_mb": max(before["peak_memory_mb"], round(memory, 1)),
    }
    write_json(note, spent)
    return spent


def gpu_memory(folder: Path) -> float | None:
    """Peak GPU memory of a training in MiB; None without a GPU, or if nothing was trained."""
    path = folder / SUMMARY
    summary = read_json(path) if path.is_file() else {}
    return summary["peak_memory_mb"] if summary.get("device") == "cuda" else None


def machine() -> str:
    """Return what a run was computed on: processor, its cores, and the GPU where torch sees one."""
    import torch

    about = Path("/proc/cpuinfo")
    lines = about.read_text(encoding="utf-8").splitlines() if about.is_file() else []
    models = [line for line in lines if line.startswith("model name")]
    name = models[0].partition(":")[2].strip() if models else platform.processor() or platform.machine()
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return f"{name}, {os.cpu_count()} cores{gpu}"


def trained_weights(path: Path) -> int | None:
    """Count the weights of a checkpoint, which holds only the trained ones; None if there is no checkpoint."""
    if not path.is_file():
        return None
    import torch

    state = torch.load(path, map_location="cpu", weights_only=True)["model"]
    weights = {tensor.data_ptr(): tensor for tensor in state.values() if tensor.is_floating_point()}  # tied ones once
    return sum(tensor.numel() for tensor in weights.values())


def folder_of(plan: Plan) -> Path:
    """Return the folder of the report, created if necessary."""
    return make_folder(plan.output / plan.name, "output:")


def write(plan: Plan) -> str:
    """Write tables, figures and all results as JSON; return the tables and the paths of the files."""
    folder, found = folder_of(plan), collect(plan)
    table = markdown(found)
    write_json(folder / "results.json", found)
    write_text(folder / "results.md", table)
    pictures = draw(plan, found, folder)
    return "\n".join([table, *(str(path) for path in (folder / "results.md", folder / "results.json", *pictures))])
