"""Basin shifts: where iterating at a position moves the hidden state a little, and where it lands somewhere else.

The cosine distance of two states is bounded at 0, where nearly all of it lies, and spans orders of magnitude (half the
squared change of direction), so shapes are judged on its log10, the *log distance*. There a
state that changes by a share of its length is a peak whose place says how large the share is, and two kinds of change
are two peaks. Whether there are two is asked of the data and may be denied; positions of one text are alike, so
intervals come from resampling texts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np

from sst_jax.console import extras
from sst_jax.errors import InputError
from sst_jax.lab.analysis.collection import Problem
from sst_jax.lab.analysis.cosine import cosine_distance
from sst_jax.lab.statistics import Interval, bootstrap_mean, clustered_mean, finite
from sst_jax.types import HostFloats, Json

FLOOR = 1e-12  # a smaller cosine distance counts as none
LEVEL = 0.05  # of the dip test
PER_TEXT = 10  # positions of a text that the dip test, which takes its values for independent, is given at a time
DRAWS = 51  # such samples, of which the median p counts
REFITS = 200  # bootstrap of the mixture
MOST = 20_000  # values that a mixture is fitted to
REACH = 16  # positions behind a shift that are compared


class TextMetrics(NamedTuple):
    """What is kept of one problem once its states have been read. I counts depths; the first is the reference."""

    id: str
    cosine_distance: np.ndarray  # [I, T, L], against the first depth
    replaced: np.ndarray  # [I, T], how many of the reference's top tokens are no longer among them
    winner: np.ndarray  # int [I, T], the top-1 token
    rank: np.ndarray  # [I, T], the place of the winner among the reference's top tokens, from 1; top + 1 beyond
    depth_square: np.ndarray  # [L, D], mean over positions of the squared change from the first depth to the last
    rounding_square: np.ndarray | None  # [L, D], of the squared change from float32 to bfloat16
    controls: Json


def measure(problem: Problem) -> TextMetrics:
    reference, top = problem.states[0], problem.top_ids.shape[-1]
    winner = problem.top_ids[:, :, 0]
    kept = (problem.top_ids[:, :, :, None] == problem.top_ids[0][None, :, None, :]).any(-1).sum(-1)
    places = winner[:, :, None] == problem.top_ids[0][None]
    rank = np.where(places.any(-1), places.argmax(-1) + 1, top + 1)

    def square(other: np.ndarray) -> np.ndarray:
        return np.square(other.astype(np.float64) - reference).mean(axis=0)

    return TextMetrics(
        problem.id,
        cosine_distance(problem.states, reference[None]),
        top - kept,
        winner,
        rank,
        square(problem.states[-1]),
        None if problem.rounded is None else square(problem.rounded),
        problem.controls,
    )


# --------------------------------------------------------------------------------------------------- One mode or two?


class MixtureFit(NamedTuple):
    """Whether cosine distances are of two kinds, and where they part. result.json has it as `modes`.

    bic         of one normal component and of two, on log distances
    dip, dip_p  Hartigan's dip and its p-value: median over samples of at most PER_TEXT positions a text
    bimodal     two components have the lower BIC, and the dip test rejects one mode
    means, deviations, weights  of the two components, the stable one first, whether or not there are two
    threshold   the cosine similarity at which both components are equally likely; None where there is one mode
    share       of positions that shifted, beyond the threshold
    """

    bic: tuple[float, float]
    dip: float
    dip_p: float
    bimodal: bool
    means: tuple[float, float]
    deviations: tuple[float, float]
    weights: tuple[float, float]
    threshold: Interval | None
    share: Interval | None

    @property
    def cut(self) -> float | None:
        """The threshold as a log distance."""
        return None if self.threshold is None else float(np.log10(1.0 - self.threshold.value))


def logs(values: np.ndarray) -> np.ndarray:
    return np.log10(np.maximum(values, FLOOR))


def fit_mixture(groups: Sequence[np.ndarray], seed: int = 0, refits: int = REFITS) -> MixtureFit:
    """Return whether cosine distances, one array a text, are of two kinds.

    Raises: InputError on fewer than 20 values, and on values that are not numbers.
    """
    groups = [logs(np.asarray(group, float)) for group in groups if len(group)]
    values = np.concatenate(groups) if groups else np.empty(0)
    if len(values) < 20:
        raise InputError(f"{len(values)} positions are too few to see how they are distributed: give at least 20")
    if not np.isfinite(values).all():
        raise InputError("a cosine similarity is not a number: the states hold NaN or infinity")
    if np.ptp(values) < 1e-6:  # nothing moves, or everything alike
        value = float(values[0])
        return MixtureFit((0.0, 0.0), 0.0, 1.0, False, (value, value), (0.0, 0.0), (1.0, 0.0), None, None)
    rng = np.random.default_rng(seed)
    dip, dip_p = thinned_dip(groups, rng)
    sample = values if len(values) <= MOST else rng.choice(values, MOST, replace=False)
    one, two = mixture(sample, 1), mixture(sample, 2)
    bic = one.bic(sample[:, None]), two.bic(sample[:, None])
    means, deviations, weights = components(two)
    bimodal = bool(bic[1] < bic[0] and dip_p < LEVEL)
    threshold = share = None
    if bimodal:
        cut = crossing(means, deviations, weights)
        found = [(cut, float(np.mean(values > cut)))]
        for _ in range(refits if len(groups) > 1 else 0):
            again = np.concatenate([groups[index] for index in rng.integers(len(groups), size=len(groups))])
            fitted = mixture(again if len(again) <= MOST // 4 else rng.choice(again, MOST // 4), 2, two)
            cut_again = crossing(*components(fitted))
            found.append((cut_again, float(np.mean(again > cut_again))))
        cuts, shares = np.array(found).T
        threshold, share = (_between(column) for column in (1.0 - 10.0**cuts, shares))
    return MixtureFit(bic, dip, dip_p, bimodal, means, deviations, weights, threshold, share)


def _between(column: np.ndarray) -> Interval:
    """The first value, with the central interval of the others, its refits."""
    if len(column) < 3:
        return Interval(float(column[0]), -np.inf, np.inf)
    return Interval(float(column[0]), *map(float, np.quantile(column[1:], [0.025, 0.975])))


def thinned_dip(groups: Sequence[np.ndarray], rng: np.random.Generator) -> tuple[float, float]:
    """Hartigan's dip (Hartigan and Hartigan 1985) of samples with at most PER_TEXT values a group: medians of DRAWS."""
    diptest = extras.require("diptest", "analysis", "the dip test").diptest
    found = []
    for _ in range(DRAWS):
        parts = [rng.choice(group, min(PER_TEXT, len(group)), replace=False) for group in groups]
        found.append(diptest(np.concatenate(parts)))
    dip, p = np.median(found, axis=0)
    return float(dip), float(p)


@runtime_checkable
class Mixture(Protocol):
    """What is read of scikit-learn's fitted `GaussianMixture`: C components of one dimension."""

    means_: HostFloats  # [C, 1]
    covariances_: HostFloats  # [C, 1, 1]
    precisions_: HostFloats  # [C, 1, 1]
    weights_: HostFloats  # [C]

    def bic(self, X: HostFloats) -> float: ...


def mixture(values: np.ndarray, count: int, near: Mixture | None = None) -> Mixture:
    """Return a normal mixture with `count` components fitted to values [n]; `near`: one to start from."""
    library = extras.require("sklearn.mixture", "analysis", "the mixture")
    start: Json = {"n_init": 3}
    if near is not None:
        start = {"means_init": near.means_, "weights_init": near.weights_, "precisions_init": near.precisions_}
    return library.GaussianMixture(count, random_state=0, **start).fit(values[:, None])


def components(fitted: Mixture) -> tuple[tuple[float, float], ...]:
    """Means, deviations and weights, the smaller mean first."""
    order = np.argsort(fitted.means_[:, 0])
    parts = fitted.means_[order, 0], np.sqrt(fitted.covariances_[order, 0, 0]), fitted.weights_[order]
    return tuple((float(smaller), float(larger)) for smaller, larger in parts)


def density(x: np.ndarray, means: Sequence[float], deviations: Sequence[float], weights: Sequence[float]) -> np.ndarray:
    """Weighted normal densities of every component, [components, n]."""
    mean, deviation, weight = (np.asarray(part)[:, None] for part in (means, deviations, weights))
    return weight * np.exp(-0.5 * np.square((x[None] - mean) / deviation)) / (deviation * np.sqrt(2 * np.pi))


def crossing(means: Sequence[float], deviations: Sequence[float], weights: Sequence[float]) -> float:
    """Where, between the means, the second component becomes likelier than the first."""
    x = np.linspace(means[0], means[1], 4001)
    first, second = density(x, means, deviations, weights)
    return float(x[np.argmax(second > first)]) if (second > first).any() else float(means[1])


# ------------------------------------------------------------------------------------------------- What goes with them


def shifted(measured: Sequence[TextMetrics], layer: int, found: MixtureFit) -> tuple[list[np.ndarray], float, str]:
    """Return which positions [T] of each problem shifted at the last depth, the cut as a log distance, and its origin.

    With one mode nothing shifted; the tenth of the positions that moved most then stands in, so that a figure can still
    contrast them. The text that is returned says so.
    """
    values = [logs(each.cosine_distance[-1, :, layer]) for each in measured]
    cut, how = found.cut, "the positions beyond the fit's threshold"
    if cut is None:
        cut, how = float(np.quantile(np.concatenate(values), 0.9)), "the tenth of the positions that moved most"
    return [value > cut for value in values], cut, how


def tokens_at(measured: Sequence[TextMetrics], masks: Sequence[np.ndarray]) -> Json:
    """Tokens at the last depth against the first, at shifted and at stable positions, with intervals over texts.

    replaced  of the top tokens;  changed  share of positions with another top-1 token;
    rank      median and largest place that a new winner had before (top + 1: beyond them)
    """
    found = {}
    for name, wanted in (("shifted", True), ("stable", False)):
        where = [mask == wanted for mask in masks]
        changed = [(each.winner[-1] != each.winner[0])[at] for each, at in zip(measured, where, strict=True)]
        by_text = [each.rank[-1][at][new] for each, at, new in zip(measured, where, changed, strict=True)]
        ranks = np.concatenate(by_text)
        found[name] = {
            "positions": int(sum(at.sum() for at in where)),
            "replaced": finite(
                clustered_mean([each.replaced[-1][at] for each, at in zip(measured, where, strict=True)])
            ),
            "changed": finite(clustered_mean(changed)),
            "winner_rank": {"median": float(np.median(ranks)), "largest": int(ranks.max())} if len(ranks) else None,
        }
    return found


ORDERS = ("state_first", "together", "token_first", "state_only", "token_only", "neither")


def onsets(events: np.ndarray) -> np.ndarray:
    """The first depth at which each position's event holds, [T] from bool [I, T]; I where it never does."""
    return np.where(events.any(axis=0), events.argmax(axis=0), len(events))


def count_orders(state: np.ndarray, token: np.ndarray, never: int) -> dict[str, int]:
    """Positions by which of two onsets came first; `never` is what stands for none."""
    both = (state < never) & (token < never)
    parts = (
        both & (state < token),
        both & (state == token),
        both & (state > token),
        (state < never) & (token == never),
        (state == never) & (token < never),
        (state == never) & (token == never),
    )
    return {name: int(part.sum()) for name, part in zip(ORDERS, parts, strict=True)}


def order_of_events(measured: Sequence[TextMetrics], layer: int, cut: float, permutations: int = 2000) -> Json:
    """Count which comes first at a position over the depths: its state's shift, or another top-1 token.

    The control shuffles the tokens' onsets among the positions of each text: how often the state would be first if the
    two had nothing to do with each other. p: share of shuffles in which the state leads by as much (one-sided).
    """
    never = len(measured[0].cosine_distance)
    states = [onsets(logs(each.cosine_distance[:, :, layer]) > cut) for each in measured]
    tokens = [onsets(each.winner != each.winner[0]) for each in measured]
    counts = count_orders(np.concatenate(states), np.concatenate(tokens), never)
    rng = np.random.default_rng(0)

    def lead(found: dict[str, int]) -> int:
        return found["state_first"] - found["token_first"]

    drawn = []
    for _ in range(permutations):
        shuffled = [rng.permutation(each) for each in tokens]
        drawn.append(count_orders(np.concatenate(states), np.concatenate(shuffled), never))
    leads = np.array([lead(each) for each in drawn])
    return {
        "counts": counts,
        "by_chance": {name: float(np.mean([each[name] for each in drawn])) for name in ORDERS},
        "lead": lead(counts),
        "p": float((1 + np.sum(leads >= lead(counts))) / (1 + permutations)),
        "depths": never,
    }


def position_zero(measured: Sequence[TextMetrics], layer: int, masks: Sequence[np.ndarray]) -> Json:
    """Return means at the first generated position and at the others: distance, shifted, another top-1 token."""
    changed = [each.winner[-1] != each.winner[0] for each in measured]
    parts = {"moved": [each.cosine_distance[-1, :, layer] for each in measured], "shifted": masks, "changed": changed}
    return {
        name: {
            "first": finite(bootstrap_mean([float(each[0]) for each in values])),
            "others": finite(clustered_mean([each[1:] for each in values])),
        }
        for name, values in parts.items()
    }


def downstream(
    measured: Sequence[TextMetrics], layer: int, masks: Sequence[np.ndarray], reach: int = REACH
) -> list[Json]:
    """How much more the state moves `distance` positions after a shifted position than after a stable one.

    Compared within each text, so that texts that move more altogether do not count as reach; mean over texts.
    """
    found = []
    for distance in range(1, reach + 1):
        differences = []
        for each, mask in zip(measured, masks, strict=True):
            after, source = each.cosine_distance[-1, distance:, layer], mask[:-distance]
            if source.any() and not source.all():
                differences.append(after[source].mean() - after[~source].mean())
        if len(differences) > 1:
            found.append({"distance": distance, "texts": len(differences), **finite(bootstrap_mean(differences))})
    return found
