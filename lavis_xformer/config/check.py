"""``python -m lavis_xformer.config.check``: check many runs' configurations at once, as each run checks its own.

Standard input is a JSON list of runs: a name, the YAML's path and the options. The first fault is printed with its
run's name.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Sequence

from lavis_xformer.config.load import load_config
from lavis_xformer.errors import UserError


def check(runs: Sequence[tuple[str, str, Sequence[str]]]) -> str:
    """Load the configurations of runs (name, YAML, options); return what is wrong with the first that has a fault."""
    for name, path, options in runs:
        try:
            load_config(path, options)
        except UserError as error:
            return f"{name}: {error}"
    return ""


if __name__ == "__main__":
    logging.disable()  # what is on standard error is the fault
    if fault := check(json.load(sys.stdin)):
        sys.exit(fault)
