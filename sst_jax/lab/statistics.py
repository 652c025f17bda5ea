"""Statistics of paired evaluations: what a difference between two runs on the same items is worth.

Outcomes are arrays over items: 0 or 1 for answers, nats for losses. Intervals are two-sided at `confidence`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

CONFIDENCE = 0.95
RESAMPLES = 10_000


class Interval(NamedTuple):
    """An estimate with the ends of its interval."""

    value: float
    low: float
    high: float


def finite(interval: Interval) -> dict[str, float | None]:
    """Return an interval for JSON, which has no infinity: an end that is not finite becomes None."""
    return {name: float(value) if math.isfinite(value) else None for name, value in interval._asdict().items()}


def wilson(successes: int, count: int, confidence: float = CONFIDENCE) -> Interval:
    """Return a proportion with Wilson's score interval (1927); statsmodels' `proportion_confint(method="wilson")`."""
    result = stats.binomtest(successes, count).proportion_ci(confidence, method="wilson")
    return Interval(successes / count, float(result.low), float(result.high))


def mcnemar(regressions: int, fixes: int) -> float:
    """Return the two-sided p of the exact McNemar test: discordant pairs against a fair coin; 1 without any."""
    total = regressions + fixes
    return float(stats.binomtest(regressions, total).pvalue) if total else 1.0


def holm(pvalues: Sequence[float] | np.ndarray) -> list[float]:
    """Return Holm's step-down adjustment (Holm 1979), in the order given: reject where the adjusted p is below the
    level.
    """
    adjusted, running = [0.0] * len(pvalues), 0.0
    for rank, index in enumerate(np.argsort(pvalues, kind="stable")):
        running = max(running, min(1.0, (len(pvalues) - rank) * pvalues[index]))
        adjusted[index] = running
    return adjusted


def bootstrap_mean(
    values: Sequence[float] | np.ndarray, confidence: float = CONFIDENCE, resamples: int = RESAMPLES, seed: int = 0
) -> Interval:
    """Return the mean of values over items with a percentile interval from resampling items.

    Given differences of two runs on the same items, this is the paired bootstrap. One item tells nothing: (-inf, inf).
    """
    items = np.asarray(values, float)
    if len(items) < 2:
        return Interval(float(items.mean()), -math.inf, math.inf)
    result = stats.bootstrap(
        (items,),
        np.mean,
        confidence_level=confidence,
        n_resamples=resamples,
        method="percentile",
        batch=500,
        rng=np.random.default_rng(seed),
    )
    low, high = map(float, result.confidence_interval)
    return Interval(float(items.mean()), low, high)


def clustered_ratio(
    above: Sequence[float] | np.ndarray,
    below: Sequence[float] | np.ndarray,
    confidence: float = CONFIDENCE,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Interval:
    """Return sum(above) / sum(below) over clusters with a percentile interval from resampling clusters.

    The mean of values that come in clusters (positions of a text), given each cluster's sum and count. Clusters that
    have nothing below do not count; nan where none has, and no interval from a single one.
    """
    sums, counts = (np.asarray(side, float)[np.asarray(below) > 0] for side in (above, below))
    if len(counts) < 2:
        value = float(sums.sum() / counts.sum()) if len(counts) else math.nan
        return Interval(value, -math.inf, math.inf)
    drawn = np.random.default_rng(seed).multinomial(len(counts), np.full(len(counts), 1 / len(counts)), resamples)
    ends = np.quantile((drawn @ sums) / (drawn @ counts), [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(float(sums.sum() / counts.sum()), float(ends[0]), float(ends[1]))


def clustered_mean(
    groups: Sequence[np.ndarray], confidence: float = CONFIDENCE, resamples: int = RESAMPLES, seed: int = 0
) -> Interval:
    """Return `clustered_ratio` of the values in groups, as their mean."""
    sums, counts = [float(np.sum(group)) for group in groups], [len(group) for group in groups]
    return clustered_ratio(sums, counts, confidence, resamples, seed)


def t_mean(values: Sequence[float] | np.ndarray, confidence: float = CONFIDENCE) -> Interval:
    """Return the mean of a few values, such as one difference a seed, with Student's interval; (-inf, inf) for one
    value.
    """
    few = np.asarray(values, float)
    mean, count = float(few.mean()), len(few)
    if count < 2:
        return Interval(mean, -math.inf, math.inf)
    half = float(stats.t.ppf(0.5 + confidence / 2, count - 1) * few.std(ddof=1) / math.sqrt(count))
    return Interval(mean, mean - half, mean + half)


def redraw_union(
    right: Sequence[bool] | np.ndarray,
    changed: Sequence[int] | np.ndarray,
    chance: Sequence[float] | np.ndarray,
    draws: int = RESAMPLES,
    seed: int = 0,
    confidence: float = CONFIDENCE,
) -> Interval:
    """Return the any-policy union that chance alone would give: the noise control of an oracle.

    Policy 1 was right where `right` [items] says. Further policy j is replaced by one that knows nothing: as many
    answers as it changed, changed[j], are drawn anew for items picked at random, and are right with the item's
    `chance` [items]. An item counts as soon as one answer to it was right, so redrawing can only raise the union.

    Returns the expected union as a share, exactly, and the central interval of `draws` simulations.
    """
    first, lucky = np.asarray(right, bool), np.asarray(chance, float)
    count, rng = len(first), np.random.default_rng(seed)
    missed = np.prod([1.0 - share / count * lucky for share in changed], axis=0) if len(changed) else np.ones(count)
    expected = float(np.where(first, 1.0, 1.0 - missed).mean())
    unions = np.empty(draws)
    for draw in range(draws):
        found = first.copy()
        for share in changed:
            picked = rng.permutation(count)[:share]
            found[picked] |= rng.random(share) < lucky[picked]
        unions[draw] = found.mean()
    tail = (1.0 - confidence) / 2
    return Interval(expected, *map(float, np.quantile(unions, [tail, 1.0 - tail])))


def discordant_range(first: int, second: int, count: int) -> list[tuple[int, int]]:
    """Return all (regressions, fixes) that two published accuracies, as counts, allow: `first` and `second` of `count`
    items.

    Counts alone do not say how many items both had right, so a p-value from them is a range.
    """
    lowest, highest = max(0, first + second - count), min(first, second)  # items that both had right
    return [(first - both, second - both) for both in range(highest, lowest - 1, -1)]
