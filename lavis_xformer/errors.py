"""Errors that a user can fix: one clear line, never a traceback."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable
from numbers import Integral, Real
from pathlib import Path
from typing import Any

_SHOWN = 8  # names shown if there are more than 1.5 times as many

# How torch's loader says that a worker died or timed out.
_LOST_WORKER = re.compile(r"DataLoader (worker \(pid|timed out)")


class UserError(ValueError):
    """A mistake in the configuration, the data or the environment; the message says how to fix it."""


def nearest(name: object, options: Iterable[str]) -> str:
    """Describe what exists when ``name`` does not, the most similar names first.

    Returns:
        ``"did you mean 'a'? There is: a, b, c"``; ``"there is: a, b, c"`` where nothing is similar. Of many names
        only the most similar are shown, and the number of the others.
    """
    known, name = sorted(options), str(name)
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    ordered = close + [option for option in known if option not in close]
    there_is = f"did you mean '{close[0]}'? There is" if close else "there is"
    if len(known) <= 1.5 * _SHOWN:
        return f"{there_is}: {', '.join(ordered) or 'nothing'}"
    ordered = difflib.get_close_matches(name, known, n=_SHOWN, cutoff=0.0)
    return f"{there_is}: {', '.join(ordered)} and {len(known) - len(ordered)} others"


def one_of(key: str, name: Any, options: Iterable[str]) -> str:
    """Return a key's value (a name, or what YAML took it for) if it is one of the options.

    Raises:
        UserError: it isn't.
    """
    known = list(options)
    if name not in known:
        raise UserError(f"{key}: '{name}'; {nearest(name, known)}")
    return name


def whole(key: str, value: Any, *, least: int) -> int:
    """Return a key's value if it is a whole number, ``least`` or more.

    Raises:
        UserError: it isn't.
    """
    if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
        raise UserError(f"{key} is {value!r}; it must be a whole number, {least} or more")
    return int(value)


def number(key: str, value: Any) -> float:
    """Return a key's value if it is a finite number.

    Raises:
        UserError: it isn't.
    """
    if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
        raise UserError(f"{key} is {value!r}; it must be a finite number")
    return float(value)


def switch(key: str, value: Any) -> bool:
    """Return a key's value if it is True or False (or 1 or 0).

    Raises:
        UserError: it isn't.
    """
    if value not in (True, False):
        raise UserError(f"{key} is {value!r}; it must be True or False")
    return value


def text(key: str, value: Any) -> str:
    """Return a key's value if it is text, or a path.

    Raises:
        UserError: it isn't.
    """
    if not isinstance(value, str | Path):
        raise UserError(f"{key} is {value!r}; it must be text: quote it")
    return str(value)


def template(key: str, value: Any) -> str:
    """Return a key's value if it is text in which ``{}`` stands for the question, or the empty text.

    Raises:
        UserError: it isn't.
    """
    if text(key, value) and "{}" not in value:
        raise UserError(f"{key}: '{value}' has no {{}}, where the question goes; '' asks the bare question")
    return str(value)


def fault_in_yaml(error: Exception) -> tuple[str, str]:
    """Return where PyYAML's error lies, as ``", line 3"`` or ``""``, and what is wrong there."""
    mark = getattr(error, "problem_mark", None)
    return f", line {mark.line + 1}" if mark else "", getattr(error, "problem", None) or str(error)


def lost_worker(error: BaseException) -> str | None:
    """Say what a user can do if ``error`` is torch's for a loader worker that died or timed out; else None."""
    if not isinstance(error, RuntimeError) or not _LOST_WORKER.match(str(error)):
        return None
    return worker_is_gone(error)


def worker_is_gone(error: BaseException) -> str:
    """Say what a user can do about the data worker that ``error`` reports as lost."""
    return (
        f"a data worker died or timed out, perhaps for lack of memory or shared memory ({first_line(error)}). "
        "A lower run.num_workers needs less; run.resume=auto resumes from the last checkpoint"
    )


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its type if it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
