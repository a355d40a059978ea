"""Scores against cases worked by hand."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from lavis_xformer.compare.bootstrap import paired_bootstrap
from lavis_xformer.errors import UserError
from lavis_xformer.tasks.scoring import (
    score_counts,
    score_exact,
    score_pairs,
    score_presence,
)


def test_counts_by_hand() -> None:
    score = score_counts(["1", "one", "5 cats", "none"], ["1", "2", 5, 3], scorer="gvt_official")
    assert score.accuracy == 0.5
    assert score.correct == (True, False, True, False)
    assert score.mae == (0 + 1 + 0 + 3) / 4
    assert score.rmse == math.sqrt((1 + 9) / 4)
    assert (score.majority, score.unread) == (0.25, 0)
    low, high = score.bins  # true counts 1, 2 and 3, 5
    assert (low.low, low.high, low.n, low.accuracy, low.mae) == (0, 3, 2, 0.5, 0.5)
    assert (high.low, high.high, high.n, high.accuracy, high.mae) == (3, 6, 2, 0.5, 1.5)
    assert (low.rmse, high.rmse) == (math.sqrt(1 / 2), math.sqrt(9 / 2))


def test_unread_counts_are_wrong_even_where_nothing_is_true() -> None:
    score = score_counts(["a lot", "0"], [0, 0])
    assert (score.accuracy, score.unread, score.mae) == (0.5, 0.5, 0)


def test_bins_by_the_number_of_objects() -> None:
    bins = score_presence(["yes", "yes", "no"], ["yes", "no", "no"], sizes=[4, 15, 40]).bins
    assert [(b.low, b.high, b.accuracy) for b in bins] == [(0, 10, 1), (10, 20, 0), (20, None, 1)]


def test_a_bin_begins_with_its_lower_edge() -> None:
    counts = score_counts(["2", "3", "5", "6", "8", "9", "40"], [2, 3, 5, 6, 8, 9, 40]).bins
    assert [(b.low, b.high, b.n) for b in counts] == [(0, 3, 1), (3, 6, 2), (6, 9, 2), (9, None, 2)]
    objects = score_presence(["yes"] * 5, ["yes"] * 5, sizes=[0, 9, 10, 19, 20]).bins
    assert [(b.low, b.high, b.n) for b in objects] == [(0, 10, 2), (10, 20, 2), (20, None, 1)]


def test_official_presence_accepts_yes_or_no_anywhere() -> None:
    answers, truths = ["I do not know", "I do not know", "yes and no", "yes and no", "maybe"], "No. Yes. No. Yes. Yes."
    score = score_presence(answers, truths.split(), scorer="gvt_official")
    assert score.correct == (True, False, True, True, False)
    assert score_presence(answers, truths.split()).accuracy == 0
    assert score.unread == 0.2


def test_what_was_not_asked_is_wrong_and_unread_by_every_scorer() -> None:
    for scorer in ("gvt_official", "pope_official", "strict"):
        score = score_presence([None, "yes"], ["yes", "yes"], scorer=scorer)
        assert (score.correct, score.unread, score.yes_ratio) == ((False, True), 0.5, 0.5)
    for scorer in ("gvt_official", "strict"):
        counted = score_counts([None, "0"], [0, 0], scorer=scorer)
        assert (counted.correct, counted.unread) == ((False, True), 0.5)
    paired = score_pairs([None, "(a)"], ["(a)", "(a)"], options=["(a) Open (b) Closed"] * 2, pairs=[0, 0])
    assert (paired.correct, paired.unread) == ((False, True), 0.5)
    exact = score_exact([None, "red"], ["red", "red"])
    assert (exact.correct, exact.unread) == ((False, True), 0.5)


def test_presence_by_hand() -> None:
    answers = ["yes", "yes", "no", "no", "yes", "no"]
    truths = ["yes", "no", "yes", "no", "yes", "no"]
    score = score_presence(answers, truths, scorer="pope_official", sizes=[1, 1, 1, 25, 25, 25])
    assert score.accuracy == 4 / 6
    assert (score.precision, score.recall, score.yes_ratio) == (2 / 3, 2 / 3, 0.5)
    assert score.f1 == pytest.approx(2 / 3)
    assert [(b.n, b.accuracy) for b in score.bins] == [(3, 1 / 3), (3, 1)]


@pytest.mark.parametrize("scorer", ["gvt_official", "pope_official", "strict"])
def test_always_yes_finds_every_yes(scorer: str) -> None:
    score = score_presence(["Yes."] * 4, ["Yes.", "no", "no", "No"], scorer=scorer)
    assert (score.accuracy, score.precision, score.recall, score.yes_ratio) == (0.25, 0.25, 1, 1)
    assert (score.majority, score.majority_answer) == (0.75, "no")


def test_presence_with_no_yes_at_all() -> None:
    score = score_presence(["no", "no"], ["no", "yes"])
    assert (score.precision, score.recall, score.f1, score.majority) == (0, 0, 0, 0.5)


def test_the_yes_ratio_is_of_all_answers_the_unread_included() -> None:
    score = score_presence(["yes", "maybe", "perhaps", "no"], ["yes", "no", "no", "no"])
    assert (score.yes_ratio, score.unread, score.accuracy) == (0.25, 0.5, 0.5)


def test_pairs_by_hand() -> None:
    options = ["(a) Open (b) Closed"] * 6
    answers = ["(a)", "closed", "(a)", "?", "b", "b"]
    score = score_pairs(answers, ["(a)", "(b)"] * 3, options=options, pairs=[1, 1, 2, 2, 3, 3])
    assert score.accuracy == 4 / 6
    assert (score.pairs, score.pair_accuracy) == (3, 1 / 3)
    assert score.unread == 1 / 6


def test_summary_is_json_without_the_items() -> None:
    summary = score_counts(["1", "2"], [1, 1]).summary()
    assert "correct" not in summary
    assert json.loads(json.dumps(summary))["bins"][0]["n"] == 2


def test_bootstrap_of_equal_models_is_zero() -> None:
    interval = paired_bootstrap([1, 0, 1], [1, 0, 1])
    assert (interval.difference, interval.low, interval.high) == (0, 0, 0)


def test_bootstrap_agrees_with_the_normal_approximation_and_repeats() -> None:
    rng = np.random.default_rng(1)
    first, second = rng.random(1000) < 0.6, rng.random(1000) < 0.5
    interval = paired_bootstrap(first, second, resamples=4000)
    gain = first.astype(float) - second
    half = 1.96 * gain.std() / math.sqrt(1000)
    assert interval.difference == pytest.approx(gain.mean())
    assert interval.low == pytest.approx(gain.mean() - half, abs=0.005)
    assert interval.high == pytest.approx(gain.mean() + half, abs=0.005)
    assert interval == paired_bootstrap(first, second, resamples=4000)
    assert interval != paired_bootstrap(first, second, resamples=4000, seed=1)


def test_bootstrap_over_clusters_is_wider_where_items_repeat() -> None:
    rng = np.random.default_rng(2)
    first, second = np.repeat(rng.random(50) < 0.6, 10), np.repeat(rng.random(50) < 0.5, 10)
    alone = paired_bootstrap(first, second, resamples=1000)
    clustered = paired_bootstrap(first, second, clusters=np.repeat(range(50), 10).tolist(), resamples=1000)
    assert clustered.high - clustered.low > 2 * (alone.high - alone.low)


def test_bootstrap_draws_clusters_of_any_size_with_their_own_number_of_items() -> None:
    interval = paired_bootstrap([1] * 6, [0] * 6, clusters=["a", "a", "a", "a", "b", "c"], resamples=100)
    assert (interval.difference, interval.low, interval.high) == (1, 1, 1)


def test_bootstrap_covers_the_luck_of_seeds() -> None:
    """Two trainings of which one wins every item and one loses every item: anything may come out."""
    first, second = [[1.0] * 40, [0.0] * 40], [[0.0] * 40, [1.0] * 40]
    interval = paired_bootstrap(first, second, resamples=1000)
    assert (interval.difference, interval.low, interval.high) == (0, -1, 1)
    averaged = paired_bootstrap([0.5] * 40, [0.5] * 40, resamples=1000)
    assert averaged.low == averaged.high == 0, "an average over seeds hides it"
    with pytest.raises(UserError, match=r"\(2, 40\), \(1, 40\)"):
        paired_bootstrap(first, [0.5] * 40)


def test_mistakes_are_named() -> None:
    with pytest.raises(UserError, match=r"\[2, 1\]"):
        score_counts(["1", "2"], [1])
    with pytest.raises(UserError, match="non-empty"):
        score_presence([], [])
    with pytest.raises(UserError, match="did you mean 'strict'"):
        score_counts(["1"], [1], scorer="strickt")
    with pytest.raises(UserError, match="truth 'maybe'"):
        score_presence(["yes"], ["maybe"])


def test_exact_answers_by_hand() -> None:
    score = score_exact(["Red.", " blue", "a red", ""], ["red", "Blue", "red", "red"])
    assert score.correct == (True, True, False, False)
    assert (score.accuracy, score.majority, score.majority_answer, score.scorer) == (0.5, 0.75, "red", "exact")


@pytest.mark.parametrize("scorer", ["strict", "gvt_official"])
def test_a_number_too_large_for_64_bits_is_a_large_error(scorer: str) -> None:
    score = score_counts(["10000000000000000000000", "2"], ["3", "2"], scorer=scorer)
    assert score.accuracy == 0.5
    assert score.mae == pytest.approx(5e21)
    assert score.rmse == pytest.approx(1e22 / 2**0.5)


def test_f1_is_the_harmonic_mean() -> None:
    score = score_presence(["yes"] * 4, ["yes", "no", "no", "no"])
    assert (score.precision, score.recall, score.f1) == (0.25, 1, pytest.approx(0.4))


def test_the_right_letter_may_end_with_a_full_stop() -> None:
    score = score_pairs(["a", "B"], ["a.", "(b)."], options=["(a) Open (b) Closed"] * 2, pairs=[0, 0])
    assert score.pair_accuracy == 1
