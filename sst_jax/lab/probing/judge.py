"""What a probe is worth: nested leave-one-out scores beside those on shuffled labels, and what routing by it does."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from scipy import stats

from sst_jax.errors import InputError
from sst_jax.lab.probing.fit import Settings, choose_strengths, fit, out_of_fold
from sst_jax.lab.probing.probe_dataset import Item
from sst_jax.lab.statistics import bootstrap_mean, finite, wilson
from sst_jax.types import Json


def auc(scores: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return the area under the ROC curve (AUROC) along the last axis, [...] from [..., n]."""
    ranks, positive = stats.rankdata(scores, axis=-1), labels.sum(-1)
    pairs = positive * (labels.shape[-1] - positive)
    return (np.sum(ranks * labels, axis=-1) - positive * (positive + 1) / 2) / pairs


def roc(scores: np.ndarray, labels: np.ndarray) -> list[list[float]]:
    """Return points (false positives, true positives) as shares, from the highest threshold to the lowest."""
    points = [[0.0, 0.0]]
    for cut in np.unique(scores)[::-1]:
        above = scores >= cut
        points.append([float(above[~labels].mean()), float(above[labels].mean())])
    return points


def shuffles(labels: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Return [count, n]: the labels in random orders."""
    rng = np.random.default_rng(seed)
    return np.array([rng.permutation(labels) for _ in range(count)]).reshape(count, len(labels))


def exceeded(null: np.ndarray, value: float) -> float:
    """Return the p-value of a permutation test."""
    return float((1 + np.sum(null >= value)) / (1 + len(null)))


def middle(null: np.ndarray) -> list[float]:
    """Return the ends of the central 95% of shuffles.

    Values well below 1/2 are usual: leaving an item out pulls its class's mean away.
    """
    return np.quantile(null, [0.025, 0.975]).tolist()


def judge(x: np.ndarray, labels: np.ndarray, settings: Settings) -> tuple[Json, np.ndarray]:
    """Return the scores of the nested procedure on x [n, D] and labels bool [n], and the out-of-fold p [n].

    auc with its permutation p; accuracy with a binomial test against always saying the larger class; capacity: what
    the same probe reaches on the very items it was fitted to, and there on shuffled labels, which it can only memorise.

    Raises: InputError where a state is not a number.
    """
    if not np.isfinite(x).all():
        raise InputError(f"the first state of item number {int(np.argwhere(~np.isfinite(x))[0, 0])} is not a number")
    null = shuffles(labels, settings.permutations, settings.seed + 1)
    every = out_of_fold(x, np.concatenate([labels[None], null]), settings)
    areas = auc(every, np.concatenate([labels[None], null]))
    right = (every[0] > 0.5) == labels
    majority = max(labels.mean(), 1 - labels.mean())
    each_class = [float(right[labels == kind].mean()) for kind in (True, False)]
    fitted = np.concatenate([labels[None], null[:20]])
    strengths = choose_strengths(x, fitted, np.ones(fitted.shape), settings)
    _, memorised = fit(x, fitted, np.ones(fitted.shape), strengths, settings)
    inside = ((memorised > 0.5) == fitted).mean(-1)
    scores = {
        "items": len(labels),
        "positive": int(labels.sum()),
        "auc": {"value": float(areas[0]), "p_permutation": exceeded(areas[1:], areas[0]), "null": middle(areas[1:])},
        "accuracy": wilson(int(right.sum()), len(labels))._asdict(),
        "right": int(right.sum()),
        "balanced_accuracy": float(np.mean(each_class)),
        "majority": float(majority),
        "p_binomial": float(stats.binomtest(int(right.sum()), len(labels), majority, "greater").pvalue),
        "capacity": {
            "parameters": settings.parameters,
            "items": len(labels),
            "fitted_accuracy": float(inside[0]),
            "fitted_accuracy_shuffled": float(inside[1:].mean()),
        },
        "permutations": settings.permutations,
        "roc": roc(every[0], labels),
    }
    return scores, every[0]


def sweep(states: np.ndarray, labels: np.ndarray, settings: Settings) -> list[Json]:
    """Score every layer of states [n, L, D] by itself: nested AUROC, and its p against the best layer of each shuffle.

    Looking at all layers and keeping the best is what the largest of them under shuffling accounts for. The penalty is
    the first of `strengths` everywhere.
    """
    settings = dataclasses.replace(settings, strengths=settings.strengths[:1])
    every = np.concatenate([labels[None], shuffles(labels, settings.permutations, settings.seed + 2)])
    layers = range(states.shape[1])
    areas = np.stack(  # [L, 1 + P]; variances of large states vanish in float32
        [auc(out_of_fold(states[:, layer].astype(np.float64), every, settings), every) for layer in layers]
    )
    best = areas[:, 1:].max(axis=0)
    return [
        {
            "layer": layer,
            "auc": float(areas[layer, 0]),
            "null": middle(areas[layer, 1:]),
            "p_of_the_largest": exceeded(best, areas[layer, 0]),
        }
        for layer in layers
    ]


def routing(items: Sequence[Item], go_deep: np.ndarray, depths: tuple[int, int]) -> Json:
    """Return each policy's correct answers, regressions and fixes against the smaller depth, and its mean depth.

    go_deep bool [items]: the larger depth is taken. harm: the share of what was right that routing breaks.
    """
    right = np.array([item.right for item in items])
    taken = {f"depth {depth}": np.full(len(items), number) for number, depth in enumerate(depths)}
    taken["routed"] = go_deep.astype(int)
    found = {}
    for name, which in taken.items():
        now = right[np.arange(len(items)), which]
        found[name] = {
            "right": int(now.sum()),
            "of": len(items),
            "broken": int((right[:, 0] & ~now).sum()),
            "mended": int((~right[:, 0] & now).sum()),
            "depth": float(np.asarray(depths)[which].mean()),
        }
    before = int(right[:, 0].sum())
    harm = finite(wilson(int(found["routed"]["broken"]), before)) if before else None
    change = right[np.arange(len(items)), taken["routed"]].astype(float) - right[:, 0]
    return {"routing": found, "harm": harm, "gain": finite(bootstrap_mean(change))}
