"""The difference between two models on the same items, and how much of it could be chance.

S: seeds, N: items, K: clusters, R: resamples.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lavis_xformer.errors import UserError

_AT_ONCE = 250  # resamples drawn at a time, to limit memory


@dataclass(frozen=True)
class Interval:
    """The mean of the first minus the mean of the second, and the ends of its 95 % bootstrap interval."""

    difference: float
    low: float
    high: float


def paired_bootstrap(
    first: Sequence[Any],
    second: Sequence[Any],
    *,
    clusters: Sequence[Hashable] | None = None,
    resamples: int = 10_000,
    seed: int = 0,
) -> Interval:
    """Return the 95 % percentile interval of the difference between two models on the same items.

    If there are several seeds, they are resampled too, so that the interval covers the variation between trainings as
    well as between items. With three seeds it is still somewhat too narrow: a bootstrap of n values has only
    (n - 1) / n of their variance.

    Args:
        first: N scores of one model, such as :attr:`.scoring.Score.correct`; or S lists of N, one per seed.
        second: the other model's scores of the same items (and seeds).
        clusters: (N,) each item's cluster, such as a question's image, resampled as a whole; None: one per item.
        resamples: R, how many times seeds and clusters are drawn with replacement.
        seed: of the resampling.

    Raises:
        UserError: the lists differ in length or are empty.
    """
    ours, theirs = (np.atleast_2d(np.asarray(scores, dtype=np.float64)) for scores in (first, second))
    if ours.shape != theirs.shape or not ours.size or (clusters is not None and len(clusters) != ours.shape[1]):
        lengths = [ours.shape, theirs.shape, None if clusters is None else len(clusters)]
        raise UserError(f"a bootstrap needs non-empty lists of equal length; these have {lengths}")
    gain = ours - theirs  # (S, N)
    members: dict[Hashable, int] = {}
    names = range(gain.shape[1]) if clusters is None else clusters
    member = [members.setdefault(name, len(members)) for name in names]  # (N,) the cluster of each item
    sums = np.stack([np.bincount(member, weights=row) for row in gain])  # (S, K)
    sizes = np.bincount(member)  # (K,)
    rng = np.random.default_rng(seed)
    means = np.concatenate(
        [_resample(sums, sizes, rng, min(_AT_ONCE, resamples - done)) for done in range(0, resamples, _AT_ONCE)]
    )
    low, high = np.quantile(means, (0.025, 0.975))
    return Interval(float(gain.mean()), float(low), float(high))


def _resample(sums: np.ndarray, sizes: np.ndarray, rng: np.random.Generator, count: int) -> np.ndarray:
    """The mean over ``count`` draws of S seeds and K clusters: (count,)."""
    seeds, clusters = sums.shape
    drawn_seeds = rng.multinomial(seeds, np.full(seeds, 1 / seeds), size=count)  # (count, S)
    drawn = rng.multinomial(clusters, np.full(clusters, 1 / clusters), size=count)  # (count, K)
    return ((drawn_seeds @ sums) * drawn).sum(axis=1) / (seeds * (drawn @ sizes))
