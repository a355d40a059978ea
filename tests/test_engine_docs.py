"""Every key of a run stands in the table of docs/engine.md, and no other."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

from lavis.common.registry import registry

import lavis_xformer
from lavis_xformer.config.keys import LAVIS_KEYS, RUN_KEYS
from lavis_xformer.engine.options import RunOptions

PAGE = Path(__file__).parents[1] / "docs" / "engine.md"


def test_every_run_key_is_explained_and_no_other():
    lavis_xformer.register()
    table = PAGE.read_text().split("## Every key of `run:`")[1].split("## ")[0]
    rows = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    explained = [key for row in rows for key in re.findall(r"`(\w+)`", row)]
    assert len(explained) == len(set(explained))
    tasks = registry.mapping["task_name_mapping"].values()
    wanted = RUN_KEYS.union(*LAVIS_KEYS.values(), *(getattr(task, "CONFIG_KEYS", ()) for task in tasks))
    wanted |= {option.name for option in fields(RunOptions)}
    assert set(explained) == wanted
