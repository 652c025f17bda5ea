"""Statistics of paired evaluations: what a difference between two runs on the same items is worth.

Outcomes are arrays over items: 0 or 1 for answers, nats for losses. Intervals are two-sided at `confidence`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

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
    """For JSON, which knows no infinity: an end that is not finite, as where there is a single item, is None."""
    return {name: float(value) if math.isfinite(value) else None for name, value in interval._asdict().items()}


def wilson(successes: int, count: int, confidence: float = CONFIDENCE) -> Interval:
    """A share with Wilson's score interval (Wilson 1927); statsmodels' `proportion_confint(method="wilson")`."""
    result = stats.binomtest(successes, count).proportion_ci(confidence, method="wilson")
    return Interval(successes / count, float(result.low), float(result.high))


def mcnemar(broken: int, mended: int) -> float:
    """Two-sided p of the exact McNemar test: the discordant pairs against a fair coin. 1 where there are none."""
    total = broken + mended
    return float(stats.binomtest(broken, total).pvalue) if total else 1.0


def holm(pvalues: Sequence[float]) -> list[float]:
    """Holm's step-down adjustment (Holm 1979), in the order given: reject where the adjusted p is below the level."""
    adjusted, running = [0.0] * len(pvalues), 0.0
    for rank, index in enumerate(np.argsort(pvalues, kind="stable")):
        running = max(running, min(1.0, (len(pvalues) - rank) * pvalues[index]))
        adjusted[index] = running
    return adjusted


def bootstrap_mean(
    values: Sequence[float], confidence: float = CONFIDENCE, resamples: int = RESAMPLES, seed: int = 0
) -> Interval:
    """The mean of values over items with a percentile interval from resampling items.

    Given differences of two runs on the same items, this is the paired bootstrap. One item tells nothing: (-inf, inf).
    """
    values = np.asarray(values, float)
    if len(values) < 2:
        return Interval(float(values.mean()), -math.inf, math.inf)
    result = stats.bootstrap(
        (values,),
        np.mean,
        confidence_level=confidence,
        n_resamples=resamples,
        method="percentile",
        batch=500,
        rng=np.random.default_rng(seed),
    )
    return Interval(float(values.mean()), *map(float, result.confidence_interval))


def clustered_ratio(
    above: Sequence[float],
    below: Sequence[float],
    confidence: float = CONFIDENCE,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Interval:
    """sum(above) / sum(below) over clusters with a percentile interval from resampling clusters.

    The mean of values that come in clusters (positions of a text), given each cluster's sum and count. Clusters that
    have nothing below do not count; nan where none has, and no interval from a single one.
    """
    above, below = (np.asarray(side, float)[np.asarray(below) > 0] for side in (above, below))
    if len(below) < 2:
        value = float(above.sum() / below.sum()) if len(below) else math.nan
        return Interval(value, -math.inf, math.inf)
    drawn = np.random.default_rng(seed).multinomial(len(below), np.full(len(below), 1 / len(below)), resamples)
    ends = np.quantile((drawn @ above) / (drawn @ below), [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(float(above.sum() / below.sum()), *map(float, ends))


def clustered_mean(groups: Sequence[np.ndarray], **settings: Any) -> Interval:
    """`clustered_ratio` of the values in groups, as their mean."""
    return clustered_ratio([float(np.sum(group)) for group in groups], [len(group) for group in groups], **settings)


def t_mean(values: Sequence[float], confidence: float = CONFIDENCE) -> Interval:
    """The mean of a few values, such as one difference a seed, with Student's interval; (-inf, inf) for one value."""
    values = np.asarray(values, float)
    mean, count = float(values.mean()), len(values)
    if count < 2:
        return Interval(mean, -math.inf, math.inf)
    half = float(stats.t.ppf(0.5 + confidence / 2, count - 1) * values.std(ddof=1) / math.sqrt(count))
    return Interval(mean, mean - half, mean + half)


def redraw_union(
    right: Sequence[bool],
    changed: Sequence[int],
    chance: Sequence[float],
    draws: int = RESAMPLES,
    seed: int = 0,
    confidence: float = CONFIDENCE,
) -> Interval:
    """The any-policy union that chance alone would give: the noise control of an oracle.

    Policy 1 was right where `right` [items] says. Further policy j is replaced by one that knows nothing: as many
    answers as it changed, changed[j], are drawn anew for items picked at random, and are right with the item's
    `chance` [items]. An item counts as soon as one answer to it was right, so redrawing can only raise the union.

    Returns the expected union as a share, exactly, and the central interval of `sampling_params` simulations.
    """
    right, chance = np.asarray(right, bool), np.asarray(chance, float)
    count, rng = len(right), np.random.default_rng(seed)
    missed = np.prod([1.0 - share / count * chance for share in changed], axis=0) if len(changed) else np.ones(count)
    expected = float(np.where(right, 1.0, 1.0 - missed).mean())
    unions = np.empty(draws)
    for draw in range(draws):
        found = right.copy()
        for share in changed:
            picked = rng.permutation(count)[:share]
            found[picked] |= rng.random(share) < chance[picked]
        unions[draw] = found.mean()
    tail = (1.0 - confidence) / 2
    return Interval(expected, *map(float, np.quantile(unions, [tail, 1.0 - tail])))


def discordant_range(first: int, second: int, count: int) -> list[tuple[int, int]]:
    """All (broken, mended) that two published counts of right answers allow: `first` and `second` of `count` items.

    Counts alone do not say how many items both had right, so a p-value from them is a range.
    """
    lowest, highest = max(0, first + second - count), min(first, second)  # items that both had right
    return [(first - both, second - both) for both in range(highest, lowest - 1, -1)]
