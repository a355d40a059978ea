"""Command lines of the subcommands: help taken from a module's docstring, and checks of numbers."""

from __future__ import annotations

import argparse
import inspect
import re
import shutil
import textwrap
from collections.abc import Callable

_LEGEND = re.compile(r"[A-Z]: ")  # a paragraph that explains the letters of shapes
_ITEM = re.compile(r"\d\. ")  # begins an item of a numbered list
_MARKUP = re.compile(r"``|:\w+:`(\w+)`|:(?=:\Z)")


def command_parser(command: str, doc: str | None) -> argparse.ArgumentParser:
    """Return the parser of a subcommand; its help shows the module's docstring, without the legend of shapes."""
    paragraphs = [part for part in inspect.cleandoc(doc or "").split("\n\n") if not _LEGEND.match(part)]
    return argparse.ArgumentParser(
        prog=f"lavis-xformer {command}",
        description="\n\n".join(_plain(part) for part in paragraphs),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def at_least(least: int) -> Callable[[str], int]:
    """Return an argument's ``type``: a whole number, not less than ``least``."""

    def number(text: str) -> int:
        """Convert the text of an argument."""
        if (value := int(text)) < least:
            raise argparse.ArgumentTypeError(f"{value} is less than {least}")
        return value

    number.__name__ = "int"  # what argparse calls it if the text is no number
    return number


def _plain(paragraph: str) -> str:
    """Remove a paragraph's markup and fit it to the terminal, item by item; examples, indented, keep their lines."""
    text = _MARKUP.sub(lambda found: found[1] or "", paragraph)
    if text.startswith(" "):
        return text
    width, indent = max(11, shutil.get_terminal_size().columns - 2), "   " if _ITEM.match(text) else ""
    items = re.split(rf"\n(?={_ITEM.pattern})", text)
    return "\n".join(textwrap.fill(" ".join(item.split()), width, subsequent_indent=indent) for item in items)
