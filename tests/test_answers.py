"""What each reader makes of an answer; the official ones against what their authors' code does."""

from __future__ import annotations

import pytest

from lavis_xformer.errors import UserError
from lavis_xformer.tasks.answers import read_choice, read_count, read_gvt_presence, read_presence


@pytest.mark.parametrize(
    ("answer", "official", "strict"),
    [
        ("3", 3, 3),
        ("three", 3, 3),
        ("There are two dogs.", 2, 2),
        ("Two", 0, 2),  # case matters to the official one
        ("nine", 0, 9),  # the authors spell it "nive"
        ("nive", 9, None),
        ("none", 0, 0),
        ("someone is there", 1, None),  # substrings
        ("12 people", 12, 12),
        ("2 or 3", 2, None),
        ("2, two dogs", 2, 2),
        ("", 0, None),
        ("a lot", 0, None),
        ("twenty", 0, 20),
        ("2.5", 2, None),
        ("seventeen", 7, 17),
    ],
)
def test_read_count(answer: str, official: int, strict: int | None) -> None:
    assert read_count(answer, "gvt_official") == official
    assert read_count(answer, "strict") == strict


@pytest.mark.parametrize(
    ("answer", "pope", "strict"),
    [
        ("yes", True, True),
        ("No.", False, False),
        ("no, there is not", False, False),
        ("There is not a cat", False, None),
        ("Yes. There is no dog", True, None),
        ("I see a cat", True, None),
        ("I cannot tell", True, None),
        ("NO", True, False),  # POPE's reader knows No, no and not only
        ("", True, None),
    ],
)
def test_read_presence(answer: str, pope: bool, strict: bool | None) -> None:
    assert read_presence(answer, "pope_official") is pope
    assert read_presence(answer, "strict") is strict


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("(b)", "b"),
        ("b", "b"),
        ("A.", "a"),
        ("(a) Open", "a"),
        ("closed", "b"),
        ("The door is open", "a"),
        ("open or closed", None),
        ("(a) or (b)", None),
        ("a) or b)", None),
        ("(a) Open (b) Closed", None),
        ("b) Closed", "b"),
        ("the answer is (b)", "b"),
        ("Option b", "b"),
        ("b: closed", "b"),
        ("a door, a window", None),
        ("a door", None),
        ("opened", None),
        ("(c)", None),
        ("", None),
    ],
)
def test_read_choice(answer: str, letter: str | None) -> None:
    assert read_choice(answer, "(a) Open (b) Closed") == letter


def test_read_choice_prefers_the_option_that_holds_the_other() -> None:
    assert read_choice("not visible", "(a) visible (b) not visible") == "b"


def test_gvt_presence_looks_for_the_truth_first() -> None:
    assert read_gvt_presence("Yes and no", True) is True
    assert read_gvt_presence("Yes and no", False) is False
    assert read_gvt_presence("I do not know", True) is False
    assert read_gvt_presence("maybe", True) is None


def test_an_unknown_scorer_is_named() -> None:
    with pytest.raises(UserError, match="did you mean 'strict'"):
        read_count("1", "strickt")
    with pytest.raises(UserError, match="pope_official, strict"):
        read_presence("no", "gvt_official")


def test_what_only_the_comma_or_the_point_decides() -> None:
    assert read_presence("No, I see a cat", "pope_official") is False
    assert read_count("2.2", "strict") is None
