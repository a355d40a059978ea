"""``python -m lavis.evaluate --cfg-path YAML [--options key=value ...]``: evaluate the test splits.

The weights are those of ``model.pretrained`` or ``model.finetuned``, or of the training checkpoint that
``run.resume_ckpt_path`` names.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from lavis_xformer.config.load import DEFAULT_RUNNER
from lavis_xformer.errors import UserError
from lavis_xformer.train import execute, read_config, runner_of


def command(argv: Sequence[str]) -> int:
    """Evaluate; return the exit status."""
    config = read_config(argv, __doc__)
    to_evaluate(config.run_cfg)
    return execute(config)


def to_evaluate(run: Any) -> None:
    """Make the ``run:`` section one of an evaluation.

    Raises:
        UserError: no split is named.
    """
    run.evaluate = True
    if runner_of(run) is None:  # LAVIS's YAMLs name one of LAVIS's
        run.runner = DEFAULT_RUNNER
    run.test_splits, run.valid_splits = run.get("test_splits") or run.get("valid_splits"), []
    if not run.test_splits:
        raise UserError("run.test_splits names no split to evaluate; set it to [val] or [test]")


if __name__ == "__main__":
    from lavis_xformer.cli import run

    raise SystemExit(run(command, sys.argv[1:]))
