"""``python -m lavis.train --cfg-path YAML [--options key=value ...]``: train as the YAML says."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lavis_xformer import distributed, launch, register
from lavis_xformer.check import check_answers, check_run, check_sizes, check_weights
from lavis_xformer.conclude import conclude
from lavis_xformer.config.load import load_config
from lavis_xformer.distributed import is_main, rank
from lavis_xformer.engine import jobs, rng
from lavis_xformer.engine.log import setup_logging
from lavis_xformer.engine.options import check_splits
from lavis_xformer.errors import UserError
from lavis_xformer.files import make_folder


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
        check_sizes(config, datasets)
        if not config.run_cfg.evaluate:
            check_answers(datasets)
        model = task.build_model(config)
    except UserError:
        with contextlib.suppress(OSError):  # it holds an earlier run, or another rank has removed it
            folder.rmdir()
        raise
    rng.seed_everything(rng.seed_of(options.seed, rank()))
    distributed.barrier()
    return runner_class(cfg=config, task=task, model=model, datasets=datasets, job_id=job_id)


if __name__ == "__main__":
    from lavis_xformer.cli import run

    raise SystemExit(run(command, sys.argv[1:]))
