"""The closed vocabulary of the scenes: names of what there is, and the few words needed to talk about it."""

from __future__ import annotations

from collections.abc import Sequence

SHAPES = ("circle", "square", "triangle", "star", "heart", "moon", "arrow", "cross")
#: shapes that visibly face one way; only their facing is ever named or asked
DIRECTED = ("triangle", "heart", "moon", "arrow")
COLOURS = {
    "red": (214, 40, 40),
    "orange": (245, 135, 30),
    "yellow": (245, 218, 50),
    "green": (45, 160, 65),
    "cyan": (70, 205, 215),
    "blue": (40, 80, 205),
    "purple": (125, 50, 165),
    "pink": (245, 135, 190),
}
SIZES = ("small", "medium", "large")
MARKS = ("plain", "dotted", "striped", "notched", "rimmed", "split")
FACINGS = ("up", "right", "down", "left")
GROUNDS = ("plain", "shaded", "striped", "checked", "wavy", "speckled", "grainy")
COLUMNS = ("left", "", "right")
ROWS = ("top", "", "bottom")
NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")

_GLUE = """
a among an and are at below above bottom colour colours does exist face facing ground groups has how image
in is largest left many mark middle number object objects of on or over picture right shape shapes size
the them there to top what where which way with yes no
""".split()


def plural(noun: str) -> str:
    """Return the plural of a shape's name or of ``object``."""
    return noun + ("es" if noun.endswith("s") else "s")


def with_article(phrase: str) -> str:
    """Put ``a`` or ``an`` before a phrase."""
    return f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}"


def counted(count: int, noun: str) -> str:
    """Say how many, in words: ``a red circle`` for one, ``three red circles`` for more."""
    return with_article(noun) if count == 1 else f"{NUMBERS[count]} {plural(noun)}"


def listed(phrases: Sequence[str]) -> str:
    """Join phrases as English does: ``a, b and c``."""
    head, last = ", ".join(phrases[:-1]), phrases[-1]
    return f"{head} and {last}" if head else last


def vocabulary() -> list[str]:
    """Return every word and number that a caption, a question, an answer or a description can contain.

    Punctuation (comma, full stop, question mark) is not listed.
    """
    names = {*SHAPES, *map(plural, SHAPES), *COLOURS, *SIZES, *MARKS, *FACINGS, *GROUNDS, *NUMBERS[2:]}
    return sorted(names | set(_GLUE) | {str(number) for number in range(1, 10)})
