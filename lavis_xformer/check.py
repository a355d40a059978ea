"""``python -m lavis_xformer.check``: check many runs' configurations at once, as each run checks its own.

Standard input is a JSON list of runs: a name, the YAML's path, the options, and whether it is evaluated rather than
trained. The first fault is printed with its run's name.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from lavis_xformer.config.load import load_config
from lavis_xformer.errors import UserError
from lavis_xformer.evaluate import to_evaluate
from lavis_xformer.launch import device_of
from lavis_xformer.train import check_run, check_weights


def check(runs: Sequence[tuple[str, str, Sequence[str], bool]]) -> str:
    """Load runs' configurations, given as on standard input; return what is wrong with the first that has a fault.

    Files of weights and of own data must be there, unless an earlier run of the list is to write them.
    """
    made: set[Path] = set()
    for name, path, options, evaluates in runs:
        try:
            run = load_config(path, options)
            run.run_cfg.evaluate |= evaluates
            check_configuration(run, made)
        except UserError as error:
            return f"{name}: {error}"
        made.add(Path(run.run_cfg.output_dir) / str(run.run_cfg.get("job_id")))
    return ""


def check_configuration(config: Any, made: Collection[Path] = ()) -> None:
    """Check everything about a run that can be known before its model and datasets are built.

    Args:
        config: a ``RunConfig``, which an evaluation completes.
        made: folders in which earlier runs will have written checkpoints.

    Raises:
        UserError: a key, name or file is missing or wrong.
    """
    if config.run_cfg.evaluate:
        to_evaluate(config.run_cfg)
    check_run(config)
    check_weights(config.model_cfg, made)
    device_of(str(config.run_cfg.get("device", "auto")))


if __name__ == "__main__":
    logging.disable()  # what is on standard error is the fault
    if fault := check(json.load(sys.stdin)):
        sys.exit(fault)
