"""Read annotation files of any of the usual forms, and say which row is wrong.

Knows no LAVIS and no torch, so that checking a file starts at once.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from lavis_xformer.errors import UserError

Row = dict[str, Any]
_SHOWN = 3  # problems that an error message spells out


def expand(path: str | Path) -> Path:
    """Expand ``~`` and environment variables; a relative path is relative to the current folder."""
    return Path(os.path.expandvars(path)).expanduser()


def read_rows(path: str | Path, *, rows_key: str | None = None) -> list[tuple[int, Row]]:
    """Read the rows of a JSON, JSONL or CSV file.

    Args:
        path: a JSON list, a JSON object that holds a list, JSON lines (whatever the file's ending),
            or a ``.csv`` file with a header.
        rows_key: which key of a JSON object holds the list; may be left out where only one does.

    Returns:
        Row numbers, from 1 (lines of a JSONL file), and the rows.

    Raises:
        UserError: the file is missing, is none of these forms, holds no row, a row that is no object, or
            one of CSV with more or fewer fields than the header.
    """
    path = expand(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such annotation file") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not UTF-8 text: {error}; save it as UTF-8") from error
    except OSError as error:
        raise UserError(f"{path}: can't be read: {error}") from error
    rows = _parse_csv(text, path) if path.suffix.lower() == ".csv" else _parse_json(text, path, rows_key)
    if not rows:
        raise UserError(f"{path}: holds no rows")
    report(path, [(n, "not an object") for n, row in rows if not isinstance(row, dict)], len(rows))
    return rows


def read_strings(path: str | Path) -> list[str]:
    """Read a JSON list of strings, as LAVIS's lists of answer candidates are.

    Raises:
        UserError: the file is missing or holds something else.
    """
    path = expand(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not a JSON list of strings: {error}") from error
    if not isinstance(content, list) or not all(isinstance(one, str) for one in content):
        raise UserError(f"{path}: not a JSON list of strings")
    return content


def _parse_csv(text: str, path: Path) -> list[tuple[int, Any]]:
    try:
        table = csv.DictReader(io.StringIO(text, newline=""), skipinitialspace=True)
        rows = list(enumerate(table, start=1))
    except csv.Error as error:
        raise UserError(f"{path}: not CSV: {error}") from error
    if len(names := list(table.fieldnames or ())) == 1 and ";" in names[0]:
        raise UserError(f"{path}: its columns are separated by semicolons; CSV needs commas")
    report(path, [(number, what) for number, row in rows if (what := _misfit(row))], len(rows))
    return rows


def _misfit(row: dict[str | None, Any]) -> str:
    """Say how a row differs from the header: DictReader keeps what is left over under None, and fills up with None."""
    if None in row:
        return "more fields than the header; quote texts that hold commas"
    absent = next((key for key, value in row.items() if value is None), None)
    return "" if absent is None else f"fewer fields than the header: no '{absent}'"


def _parse_json(text: str, path: Path, rows_key: str | None) -> list[tuple[int, Any]]:
    lines = [(n, line) for n, line in enumerate(text.split("\n"), start=1) if line.strip()]
    if path.suffix.lower() in (".jsonl", ".ndjson") or _is_json_object(lines, 2):
        return _parse_lines(lines, path)
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: not JSON: line {error.lineno}, column {error.colno}: {error.msg}") from error
    return list(enumerate(_pick_list(content, path, rows_key), start=1))


def _is_json_object(lines: Sequence[tuple[int, str]], at_least: int) -> bool:
    """Tell JSON lines in a file of another ending: its first lines are objects by themselves."""
    try:
        first = [json.loads(line) for _, line in lines[:at_least]]
    except json.JSONDecodeError:
        return False
    return len(first) == at_least and all(isinstance(row, dict) for row in first)


def _parse_lines(lines: Iterable[tuple[int, str]], path: Path) -> list[tuple[int, Any]]:
    rows, problems = [], []
    for number, line in lines:
        try:
            rows.append((number, json.loads(line)))
        except json.JSONDecodeError as error:
            problems.append((number, f"not JSON ({error.msg}, column {error.colno})"))
    report(path, problems, len(rows) + len(problems))
    return rows


def _pick_list(content: object, path: Path, rows_key: str | None) -> list[Any]:
    if isinstance(content, list):
        return content
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds {type(content).__name__}, not a list of rows")
    lists = [key for key, value in content.items() if isinstance(value, list)]
    if rows_key is None and len(lists) == 1:
        return content[lists[0]]
    if rows_key not in lists:
        raise UserError(
            f"{path}: an object whose lists are under {', '.join(lists) or 'no key'}; "
            f"rows_key is {rows_key}: set it to the one that holds the rows"
        )
    return content[rows_key]


def report(path: str | Path, problems: Sequence[tuple[int, str]], total: int) -> None:
    """Raise one line that names the first few wrong rows and counts all, if there are any.

    Raises:
        UserError: there are problems.
    """
    if problems:
        shown = "; ".join(f"row {number}: {what}" for number, what in problems[:_SHOWN])
        more = f"; and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        wrong = len({number for number, _ in problems})
        raise UserError(f"{path}: {wrong} of {total} rows are wrong: {shown}{more}")


def strings(value: object) -> tuple[str, ...]:
    """Return the non-blank texts of a string, number or list of them; empty for anything else."""
    many = value if isinstance(value, list) else [value]
    if not all(isinstance(one, str | int | float) for one in many):
        return ()
    return tuple(str(one) for one in many if str(one).strip())


def file_exists(path: str) -> bool:
    """Tell whether a file is there, by one listing per folder: fast for millions of rows."""
    folder, name = os.path.split(path)
    return name in _listing(folder or ".")


@cache
def _listing(folder: str) -> frozenset[str]:
    try:
        return frozenset(entry.name for entry in os.scandir(folder) if entry.is_file())
    except OSError:
        return frozenset()


def forget_listings() -> None:
    """Look at the folders anew the next time :func:`file_exists` is asked."""
    _listing.cache_clear()


def sha256(path: str | Path) -> str:
    """Return a file's sha256 as 64 hexadecimal digits."""
    return hashlib.sha256(expand(path).read_bytes()).hexdigest()
