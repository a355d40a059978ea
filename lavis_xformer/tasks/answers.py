"""Read a number, yes or no, or a choice from a model's answer.

How answers are read affects the score, so every reader has a name:

- ``gvt_official`` reads answers as GVT-bench's authors do (github.com/TencentARC/GVT, ``evaluations/count.py``
  and ``multiclass.py``), which is loose: lower-case number words are replaced wherever they occur, the
  first run of digits wins, an answer without digits counts as 0, and yes or no is right if the true one
  occurs anywhere in the answer ("I do not know" is right where the truth is "No.").
- ``pope_official`` reads yes or no as POPE's authors do: the words no, No or not in the first sentence mean
  no, anything else means yes.
- ``strict`` accepts only an unambiguous answer: one number, or either yes or no, as whole words.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from lavis_xformer.errors import one_of

# "nive" is the authors' spelling: their scorer does not know "nine".
_GVT_WORDS = ("none", "one", "two", "three", "four", "five", "six", "seven", "eight", "nive")
# letter of a choice: "(b)" or "b)" anywhere, "option b", or "b", "b." and "b:" at the beginning
_LETTER = re.compile(r"(?:^|[\s(])([a-z])\)|\boption ([a-z])\b|^([a-z])(?:[.:]|$)")
_NUMBER_WORDS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen "
    "sixteen seventeen eighteen nineteen twenty"
).split()


def read_count(answer: str, scorer: str = "strict") -> int | None:
    """Read a number by ``gvt_official`` or ``strict``; the latter returns None for none or several different ones."""
    return _COUNT_READERS[one_of("scorer", scorer, _COUNT_READERS)](answer)


def read_presence(answer: str, scorer: str = "strict") -> bool | None:
    """Read yes (True) or no (False) by ``pope_official`` or ``strict``; the latter returns None for neither or both."""
    return _PRESENCE_READERS[one_of("scorer", scorer, _PRESENCE_READERS)](answer)


def read_gvt_presence(answer: str, truth: bool) -> bool | None:
    """Read yes or no as GVT-bench's authors do: an answer that says both is right; None if it says neither."""
    said = answer.lower()
    if ("yes" if truth else "no") in said:
        return truth
    return (not truth) if ("no" if truth else "yes") in said else None


def read_choice(answer: str, options: str) -> str | None:
    """Read which option of "(a) Open (b) Closed" an answer chooses: by its letter or by its text.

    Args:
        answer: a model's answer, such as "(b)", "b.", "closed", "(b) Closed" or "the answer is (b)".
        options: the options as the benchmark writes them.

    Returns:
        The letter; None if the answer names none of the options, or several.
    """
    said = answer.strip().lower()
    choices = dict(re.findall(r"\(([a-z])\)\s*(.*?)\s*(?=\([a-z]\)|$)", options.lower()))
    letters = {found[found.lastindex or 0] for found in _LETTER.finditer(said)} & choices.keys()
    if letters:
        return letters.pop() if len(letters) == 1 else None
    told = {key for key, text in choices.items() if text and _has_words(said, text)}
    # Where the options "yes" and "yes, two" both occur, the longer one is meant.
    told -= {key for key in told for other in told - {key} if _has_words(choices[other], choices[key])}
    return told.pop() if len(told) == 1 else None


def _gvt_count(answer: str) -> int:
    for number, word in enumerate(_GVT_WORDS):
        answer = answer.replace(word, str(number))
    digits = re.search(r"\d+", answer)
    return int(digits[0]) if digits else 0


def _strict_count(answer: str) -> int | None:
    words = re.findall(r"\d+(?:\.\d+)?|[a-z]+", answer.lower())
    found = {word if word not in _NUMBER_WORDS else str(_NUMBER_WORDS.index(word)) for word in words}
    found = {"0" if word == "none" else word for word in found}
    numbers = {word for word in found if word[0].isdigit()}
    only = numbers.pop() if len(numbers) == 1 else ""
    return int(only) if only.isdigit() else None


def _pope_presence(answer: str) -> bool:
    words = answer.split(".")[0].replace(",", "").split(" ")
    return not {"No", "not", "no"} & set(words)


def _strict_presence(answer: str) -> bool | None:
    said = set(re.findall(r"[a-z]+", answer.lower())) & {"yes", "no"}
    return "yes" in said if len(said) == 1 else None


_COUNT_READERS: dict[str, Callable[[str], int | None]] = {"gvt_official": _gvt_count, "strict": _strict_count}
_PRESENCE_READERS: dict[str, Callable[[str], bool | None]] = {
    "pope_official": _pope_presence,
    "strict": _strict_presence,
}


def _has_words(text: str, part: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(part)}(?!\w)", text) is not None
