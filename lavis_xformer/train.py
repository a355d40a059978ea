"""``python -m lavis.train --cfg-path YAML [--options key=value ...]``: train as the YAML says."""

from __future__ import annotations

import argparse
import contextlib
import os
import shlex
import shutil
import sys
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from lavis.common.registry import registry
from lavis.tasks import CaptionTask, MultimodalClassificationTask, RetrievalTask, VQATask, setup_task
from omegaconf.errors import ConfigAttributeError

from lavis_xformer import distributed, launch, register
from lavis_xformer.analysis.report import write_report
from lavis_xformer.config.keys import is_ours
from lavis_xformer.config.load import DEFAULT_RUNNER, load_config
from lavis_xformer.data.image_text_datasets import LocalFilesBuilder
from lavis_xformer.distributed import is_main, rank
from lavis_xformer.engine import checkpoint, jobs, rng
from lavis_xformer.engine.log import setup_logging
from lavis_xformer.engine.options import RunOptions, check_lavis_keys, check_splits
from lavis_xformer.errors import UserError
from lavis_xformer.files import make_folder
from lavis_xformer.models.parts import reads_mae
from lavis_xformer.paths import PARTS, checkpoints_of
from lavis_xformer.run_folder import BEST, LOG, SUMMARY
from lavis_xformer.tasks.benchmark import BenchmarkTask

#: what tasks call to evaluate a model: LAVIS's, with ours derived from them, and our own
METHODS = {
    VQATask: "predict_answers",
    CaptionTask: "generate",
    RetrievalTask: "compute_sim_matrix",
    MultimodalClassificationTask: "predict",
    BenchmarkTask: "predict_answers",
}


def arguments(argv: Sequence[str], doc: str | None) -> argparse.Namespace:
    """Parse LAVIS's arguments."""
    parser = argparse.ArgumentParser(prog="python -m lavis." + Path(sys.argv[0]).stem, description=doc)
    parser.add_argument("--cfg-path", required=True, help="the run's YAML")
    parser.add_argument(
        "--options", nargs="+", action="extend", default=[], help="change values of the YAML: run.max_epoch=3 ..."
    )
    parser.add_argument("--traceback", action="store_true", help="show where an error comes from")
    return parser.parse_args(argv)


def command(argv: Sequence[str]) -> int:
    """Train; return the exit status."""
    return execute(read_config(argv, __doc__))


def read_config(argv: Sequence[str], doc: str | None) -> Any:
    """Read and check the configuration that a command line names."""
    args = arguments(argv, doc)
    register()
    return load_config(args.cfg_path, args.options)


def execute(config: Any) -> int:
    """Train, or evaluate if ``run.evaluate`` says so, and print the results; return the exit status."""
    with launch.process_group(launch.device_of(str(config.run_cfg.get("device", "auto")))):
        _run(config)
    return 0


def _run(config: Any) -> None:
    """Train or evaluate, and print the results; the runner does not outlive this call."""
    runner = build_runner(config)
    summary = runner.train()
    if is_main():
        conclude(runner, summary)


def build_runner(config: Any) -> Any:
    """Build datasets, model and runner of a configuration, in the same way on every rank.

    Raises:
        UserError: a key or a file is missing or wrong.
    """
    setup_logging(shown=is_main())
    runner_class, options, task = check_run(config)  # completes the configuration, by which a run to resume is found
    check_weights(config.model_cfg)
    job_id = jobs.choose(config.to_dict(), job_id=options.job_id, resume=options.resume)
    folder = make_folder(Path(config.run_cfg.output_dir) / job_id, "run.output_dir:")
    if options.resume != "auto" and not config.run_cfg.evaluate:
        jobs.check_unused(folder)  # the runner does so too, but after all models have been loaded
    rng.seed_everything(options.seed)
    try:
        datasets = task.build_datasets(config)
        check_splits(config.run_cfg, datasets)
        model = task.build_model(config)
    except UserError:
        with contextlib.suppress(OSError):  # it holds an earlier run, or another rank has removed it
            folder.rmdir()
        raise
    rng.seed_everything(rng.seed_of(options.seed, rank()))
    distributed.barrier()
    return runner_class(cfg=config, task=task, model=model, datasets=datasets, job_id=job_id)


def check_run(config: Any) -> tuple[Any, RunOptions, Any]:
    """Check the ``run:`` section and the user's own data; return the runner's class and options and the task.

    The task may complete the section.

    Raises:
        UserError: a key or a file is missing, or a value is wrong.
    """
    check_lavis_keys(config.run_cfg)
    runner_class = runner_of(config.run_cfg)
    if runner_class is None:
        raise UserError(f"run.runner: LAVIS's own runners can't be started from here; set it to {DEFAULT_RUNNER}")
    checked = runner_class, RunOptions.from_config(config.run_cfg), task_of(config)
    for dataset, given in config.datasets_cfg.items():
        if issubclass(builder := registry.get_builder_class(dataset), LocalFilesBuilder):
            builder(given).given_splits()
    return checked


def check_weights(model_cfg: Mapping[str, Any], made: Collection[Path] = ()) -> None:
    """Check that the local files and folders from which a model is built exist, or are still to be made.

    Args:
        model_cfg: the section ``model``.
        made: folders in which earlier runs will have written checkpoints.

    Raises:
        UserError: one does not exist.
    """
    if not is_ours(registry.get_model_class(model_cfg["arch"])):
        return  # LAVIS's own names need not be files
    names = {key: str(model_cfg.get(key) or "") for key in PARTS if key != "mae_model" or reads_mae(model_cfg)}
    local = {key: named for key, named in names.items() if named.count("/") > 1 or named.startswith((".", "/"))}
    for key, named in {**checkpoints_of(model_cfg), **local}.items():
        if "://" not in named and not Path(named).exists() and Path(named).parent not in made:
            raise UserError(f"model.{key}: there is no {named}")


def task_of(config: Any) -> Any:
    """Set up the configuration's task.

    Raises:
        UserError: a key that it needs is missing, or it is to evaluate a model that lacks the method it calls.
    """
    run = config.run_cfg
    try:
        task = setup_task(config)
    except ConfigAttributeError as error:
        raise UserError(f"{error.full_key}: missing; run.task {run.task} needs it") from error
    arch, evaluates = config.model_cfg.arch, run.get("valid_splits") or run.get("test_splits")
    for kind, method in METHODS.items():
        if evaluates and isinstance(task, kind) and not hasattr(registry.get_model_class(arch), method):
            raise UserError(f"run.task: {run.task} needs a model with {method}(), which model.arch {arch} lacks")
    return task


def runner_of(run_cfg: Mapping[str, Any]) -> Any:
    """Return the class of ``run.runner``; None for LAVIS's own, which can't be started from here."""
    found = registry.get_runner_class(run_cfg.get("runner", DEFAULT_RUNNER))
    return None if found.__module__.startswith("lavis.") else found


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


if __name__ == "__main__":
    from lavis_xformer.cli import run

    raise SystemExit(run(command, sys.argv[1:]))
