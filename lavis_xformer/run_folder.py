"""The files of a run's folder that are read without the code that wrote them, and its log.

A record of ``log.jsonl`` has its kind, the step it was written at, and values by name (engine.log writes it).
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lavis_xformer.errors import UserError

LOG, CONFIG, SUMMARY, BEST = "log.jsonl", "config.json", "summary.json", "checkpoint_best.pth"

Record = dict[str, Any]


def read_log(folder: Path) -> list[Record]:
    """Read the records of a run's log; lines truncated by a kill, or otherwise no records, are skipped.

    Raises:
        UserError: the folder holds no log.
    """
    path = folder / LOG
    if not path.is_file():
        raise UserError(f"{folder} is not a run folder: it has no {LOG}")
    records = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        with contextlib.suppress(ValueError):
            record = json.loads(line)
            if isinstance(record, dict) and {"kind", "step"} <= record.keys():
                records.append(record)
    return records


def series(records: Iterable[Record], name: str) -> tuple[list[int], list[float]]:
    """Return steps and values of the records in which ``name`` is a number."""
    pairs = [(r["step"], r[name]) for r in records if isinstance(r.get(name), (int, float))]
    return [step for step, _ in pairs], [value for _, value in pairs]
