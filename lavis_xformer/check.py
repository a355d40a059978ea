"""``python -m lavis_xformer.check``: check many runs' configurations at once, as each run checks its own.

Standard input is a JSON list of runs: a name, the YAML's path, the options, and whether it is evaluated rather than
trained. The first fault is printed with its run's name.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

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
            if evaluates:
                to_evaluate(run.run_cfg)
            check_run(run)
            check_weights(run.model_cfg, made)
            device_of(str(run.run_cfg.get("device", "auto")))
        except UserError as error:
            return f"{name}: {error}"
        made.add(Path(run.run_cfg.output_dir) / str(run.run_cfg.get("job_id")))
    return ""


if __name__ == "__main__":
    logging.disable()  # what is on standard error is the fault
    if fault := check(json.load(sys.stdin)):
        sys.exit(fault)
