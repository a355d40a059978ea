"""``python -m lavis.evaluate --cfg-path YAML [--options key=value ...]``: evaluate the test splits.

The weights are those of ``model.pretrained`` or ``model.finetuned``, or of the training checkpoint that
``run.resume_ckpt_path`` names.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from lavis_xformer.check import to_evaluate
from lavis_xformer.train import execute, read_config


def command(argv: Sequence[str]) -> int:
    """Evaluate; return the exit status."""
    config = read_config(argv, __doc__)
    to_evaluate(config.run_cfg)
    return execute(config)


if __name__ == "__main__":
    from lavis_xformer.cli import run

    raise SystemExit(run(command, sys.argv[1:]))
