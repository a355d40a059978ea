"""``python -m lavis_xformer.config.check``: check many runs' configurations at once, as each run checks its own.

Standard input is a JSON list of runs: a name, the YAML's path and the options. The first fault is printed with its
run's name.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from lavis.common.registry import registry

from lavis_xformer.config.load import load_config
from lavis_xformer.data.image_text_datasets import LocalFilesBuilder
from lavis_xformer.errors import UserError
from lavis_xformer.paths import checkpoints_of


def check(runs: Sequence[tuple[str, str, Sequence[str]]]) -> str:
    """Load the configurations of runs (name, YAML, options); return what is wrong with the first that has a fault.

    Files of weights and of own data must be there, unless an earlier run of the list is to write them.
    """
    made: set[Path] = set()
    for name, path, options in runs:
        try:
            config = load_config(path, options).config
            for dataset, given in config.datasets.items():
                if issubclass(builder := registry.get_builder_class(dataset), LocalFilesBuilder):
                    builder(given).given_splits()
            for key, named in checkpoints_of(config.model).items():
                if "://" not in named and not Path(named).exists() and Path(named).parent not in made:
                    raise UserError(f"model.{key}: there is no {named}")
        except UserError as error:
            return f"{name}: {error}"
        made.add(Path(config.run.output_dir) / str(config.run.get("job_id")))
    return ""


if __name__ == "__main__":
    logging.disable()  # what is on standard error is the fault
    if fault := check(json.load(sys.stdin)):
        sys.exit(fault)
