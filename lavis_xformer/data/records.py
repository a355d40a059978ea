"""Read annotation files in any of the usual formats, and say which row is wrong.

Imports neither LAVIS nor torch, so that checking a file starts at once.
"""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from lavis_xformer.errors import UserError

Row = dict[str, Any]
NO_OBJECT = "not an object"
_SHOWN = 3  # problems that an error message spells out
_LONGEST = 40  # characters of an entry that it shows


def expand(path: str | Path) -> Path:
    """Expand ``~`` and environment variables; a relative path is relative to the current folder."""
    return Path(os.path.expandvars(path)).expanduser()


def read_rows(path: str | Path, *, rows_key: str | None = None) -> list[tuple[int, Row]]:
    """Read the rows of a file as :func:`read_entries` does, and check that each is an object.

    Raises:
        UserError: the file can't be read, or a row is not an object.
    """
    rows = read_entries(path, rows_key=rows_key)
    refuse_wrong_rows(path, [(n, NO_OBJECT) for n, row in rows if not isinstance(row, dict)], len(rows))
    return rows


def read_entries(path: str | Path, *, rows_key: str | None = None) -> list[tuple[int, Any]]:
    """Read the entries of a JSON, JSONL or CSV file.

    Args:
        path: a JSON list, a JSON object that holds a list, JSON lines (whatever the file's extension),
            or a ``.csv`` file with a header.
        rows_key: which key of a JSON object holds the list; may be left out if only one does.

    Returns:
        Row numbers, from 1 (lines of a JSONL file), and what stands there: objects, if the file is right.

    Raises:
        UserError: the file is missing, has none of these formats, or holds no rows, or a CSV row with more or fewer
            fields than the header.
    """
    path = expand(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise UserError(f"{path.absolute()}: no such annotation file") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not UTF-8 text: {error}; save it as UTF-8") from error
    except OSError as error:
        raise UserError(f"{path}: can't be read: {error}") from error
    rows = _parse_csv(text, path) if path.suffix.lower() == ".csv" else _parse_json(text, path, rows_key)
    if not rows:
        raise UserError(f"{path}: holds no rows")
    return rows


def read_strings(path: str | Path) -> list[str]:
    """Read a JSON list of strings, such as LAVIS's lists of answer candidates.

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
    if len(names := list(table.fieldnames or ())) == 1:
        for other, what in ((";", "semicolons"), ("\t", "tabs")):
            if other in names[0]:
                raise UserError(f"{path}: its columns are separated by {what}; CSV needs commas")
    refuse_wrong_rows(path, [(number, what) for number, row in rows if (what := _misfit(row))], len(rows))
    return rows


def _misfit(row: dict[str | None, Any]) -> str:
    """Say how a row differs from the header: DictReader puts extra fields under None, and None in missing ones."""
    if None in row:
        return "more fields than the header; quote texts that contain commas"
    absent = next((key for key, value in row.items() if value is None), None)
    return "" if absent is None else f"fewer fields than the header: no '{absent}'"


def _parse_json(text: str, path: Path, rows_key: str | None) -> list[tuple[int, Any]]:
    lines = [(n, line) for n, line in enumerate(text.split("\n"), start=1) if line.strip()]
    if path.suffix.lower() in (".jsonl", ".ndjson") or _are_objects(lines[:2]):
        return _parse_lines(lines, path)
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        remedy = "" if path.suffix.lower() == ".json" else "; a table needs a header, commas and the extension .csv"
        raise UserError(f"{path}: not JSON: line {error.lineno}, column {error.colno}: {error.msg}{remedy}") from error
    return list(enumerate(_pick_list(content, path, rows_key), start=1))


def _are_objects(lines: Sequence[tuple[int, str]]) -> bool:
    """Recognise JSON lines whatever the extension: each of the first two lines is an object by itself."""
    try:
        return len(lines) == 2 and all(isinstance(json.loads(line), dict) for _, line in lines)
    except json.JSONDecodeError:
        return False


def _parse_lines(lines: Iterable[tuple[int, str]], path: Path) -> list[tuple[int, Any]]:
    rows, problems = [], []
    for number, line in lines:
        try:
            rows.append((number, json.loads(line)))
        except json.JSONDecodeError as error:
            problems.append((number, f"not JSON ({error.msg}, column {error.colno})"))
    refuse_wrong_rows(path, problems, len(rows) + len(problems))
    return rows


def _pick_list(content: object, path: Path, rows_key: str | None) -> list[Any]:
    if isinstance(content, list):
        return content
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds {type(content).__name__}, not a list of rows")
    lists = [key for key, value in content.items() if isinstance(value, list)]
    if not lists:
        raise UserError(f"{path}: an object that holds no list of rows")
    if rows_key is None and len(lists) == 1:
        return content[lists[0]]
    if rows_key not in lists:
        raise UserError(
            f"{path}: an object whose lists are under {', '.join(lists)}; "
            f"rows_key is {rows_key}: set it to the one that holds the rows"
        )
    return content[rows_key]


def refuse_wrong_rows(path: str | Path, problems: Sequence[tuple[int, str]], total: int) -> None:
    """Raise an error of one line that names the first few wrong rows and counts all, if there are any.

    Raises:
        UserError: there are problems.
    """
    if problems:
        shown = "; ".join(f"row {number}: {what}" for number, what in problems[:_SHOWN])
        more = f"; and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        wrong = len({number for number, _ in problems})
        raise UserError(f"{path}: {wrong} of {total} rows are wrong: {shown}{more}")


def strings(value: object) -> tuple[str, ...]:
    """Return the non-blank texts of a string, number or list of them; empty for anything else, such as NaN."""
    many = value if isinstance(value, list) else [value]
    return tuple(str(one) for one in many if str(one).strip()) if all(map(_is_text, many)) else ()


def odd_entry(value: object) -> str:
    """Show the first entry for which :func:`strings` returns nothing; "" if there is none, or no value at all."""
    many = value if isinstance(value, list) else [] if value is None or value != value else [value]
    odd = next((json.dumps(one) for one in many if not _is_text(one)), "")
    return odd if len(odd) <= _LONGEST else f"{odd[:_LONGEST]}..."


def _is_text(value: object) -> bool:
    return isinstance(value, str | int | float) and value == value  # NaN differs from itself


def absent_images(root: str | Path, images: Iterable[tuple[int, str]]) -> dict[int, str]:
    """Find missing image files with one listing per folder: fast for millions of rows.

    Args:
        root: the folder that the paths are relative to.
        images: row numbers and paths.

    Returns:
        What is wrong, by row number, for each missing image.

    Raises:
        UserError: there is no such folder.
    """
    root = expand(root)
    if not root.is_dir():
        raise UserError(f"{root.absolute()}: no such image folder (image_root)")
    listing = cache(_files_in)
    faults = {}
    for number, image in images:
        if "://" in image:
            faults[number] = f"{image} is a URL, and images aren't fetched: download it and give the file's path"
            continue
        path = os.path.join(root, image)
        folder, name = os.path.split(path)
        if name not in listing(folder):
            faults[number] = f"no image file {path}"
    return faults


def _files_in(folder: str) -> frozenset[str]:
    try:
        return frozenset(entry.name for entry in os.scandir(folder) if entry.is_file())
    except OSError:
        return frozenset()
