"""What the depth effect is without its cause: runs in which no state enters, or the wrong one.

    alpha_0    the blend switched off: further iterations repeat the first, and nothing may move
    plain      without a stream against alpha = 0, two programs: the same but for rounding
    shuffled   iterations from the second on are entered by the real run's states of another position of the text
    another_text  by those of another text of the batch, where there is one
    random     by random directions of the real states' lengths

The last three say whether it matters which state entered, or only that something of this size was blended in.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np

from sst_jax.lab.analysis.collect import Batch, DepthStates, Swap, TextRunner
from sst_jax.lab.analysis.cosine import cosine_similarity
from sst_jax.lab.statistics import bootstrap_mean, finite
from sst_jax.model.config import StreamConfig
from sst_jax.types import Json


def another_order(counts: np.ndarray, length: int, seed: int) -> np.ndarray:
    """int32 [B, T]: for each position another of its text, none its own where there are two; padding stays."""
    rng = np.random.default_rng(seed)
    order = np.tile(np.arange(length, dtype=np.int32), (len(counts), 1))
    for row, count in zip(order, counts, strict=True):
        cycle = rng.permutation(count)
        row[cycle] = np.roll(cycle, 1)
    return order


def collect_batch(runner: TextRunner, batch: Batch, shallow: DepthStates, deep: DepthStates) -> list[Json]:
    """Return what every control did to each problem of a batch, beside what depth did.

    Args:
        runner: of the model.
        batch: the problems.
        shallow, deep: their states at the first and the last depth.

    Returns:
        One dict a problem, by name of the control, "depth" being the real thing: cosine similarity [T][L] of two runs
        as "overlap", and whether the top-1 token changed [T].
    """
    settings, config = runner.settings, runner.model.config
    depth = settings.depths[-1]
    off = dataclasses.replace(config, stream=dataclasses.replace(config.stream or StreamConfig(), alpha=0.0))
    plain = dataclasses.replace(config, stream=None)
    repeated = runner(batch, depth, config=off, every=True)
    without, zeroed = (runner(batch, 1, config=each, what="output")[0] for each in (plain, off))
    pairs = {"depth": (shallow, deep), "alpha_0": (repeated[0], repeated[-1]), "plain": (without, zeroed)}
    order = another_order(batch.counts, batch.inputs.shape[1], settings.seed)
    rows = np.arange(len(batch.counts), dtype=np.int32)
    swaps = {"shuffled": Swap(rows, order), "random": Swap(rows, order, jax.random.key(settings.seed))}
    if len(rows) > 1:
        others = np.roll(rows, 1)
        swaps["another_text"] = Swap(others, np.arange(order.shape[1], dtype=np.int32) % batch.counts[others, None])
    for name, swap in swaps.items():
        (seen,) = runner(batch, depth, intervene=swap)
        pairs[name] = (shallow, seen)
    return [
        {name: compared(*(each.row(row, count) for each in pair)) for name, pair in pairs.items()}
        for row, count in enumerate(batch.counts.tolist())
    ]


def compared(first: DepthStates, second: DepthStates) -> Json:
    """Return how one problem's two runs differ, JSON-ready."""
    changed = first.top_ids[:, 0] != second.top_ids[:, 0]
    return {"overlap": cosine_similarity(first.states, second.states).tolist(), "argmax_changed": changed.tolist()}


def summarise(problems: Sequence[Json]) -> Json:
    """Return by name of the control how far states and tokens moved, over the problems that were controlled.

    moved: mean cosine distance over positions and layers, with an interval over problems; largest: the maximum.
    """
    found = {}
    for name in dict.fromkeys(name for problem in problems for name in problem):
        records = [problem[name] for problem in problems if name in problem]
        moved = [1.0 - np.asarray(record["overlap"]) for record in records]
        changed = [np.mean(record["argmax_changed"]) for record in records]
        found[name] = {
            "moved": finite(bootstrap_mean([part.mean() for part in moved])),
            "largest": max(float(part.max()) for part in moved),
            "argmax_changed": finite(bootstrap_mean(changed)),
            "problems": len(records),
        }
    return found
