"""The noise floor: what depth does to the hidden state, against what rounding to bfloat16 does to it.

Both are changes of the same states, of one text: from the first depth to the last one in float32, and from float32 to
bfloat16 (weights and activations) at the first depth. Root mean squares over positions and dimensions are compared; the
ratio says how many times the rounding the effect is. Texts are what is resampled and what the test counts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from scipy import stats

from sst_jax.lab.analysis.basins import TextMetrics
from sst_jax.lab.statistics import Interval, clustered_ratio, finite
from sst_jax.types import Json


def noise_floor(measured: Sequence[TextMetrics]) -> Json:
    """Return ratios of root mean squares, over everything and by layer, with intervals over texts, a test and an effect
    size.

    dimensions: of the ratios of single dimensions, texts pooled: quartiles, and the share that is above 1.
    """
    depth = np.stack([each.depth_square for each in measured])  # [texts, L, D]
    rounding = np.stack([each.rounding_square for each in measured if each.rounding_square is not None])
    if not rounding.any():
        return {"what": "rounding to bfloat16 changed nothing, so there is no floor to compare with"}
    by_layer = [compare(depth[:, layer].mean(-1), rounding[:, layer].mean(-1)) for layer in range(depth.shape[1])]
    single = np.sqrt(depth.mean(0) / np.maximum(rounding.mean(0), 1e-300))
    return {
        "everywhere": compare(depth.mean((1, 2)), rounding.mean((1, 2))),
        "by_layer": by_layer,
        "dimensions": {
            "quartiles": np.quantile(single, [0.25, 0.5, 0.75]).tolist(),
            "above_rounding": float(np.mean(single > 1.0)),
            "median_by_layer": np.median(single, axis=1).tolist(),
        },
    }


def compare(depth: np.ndarray, rounding: np.ndarray) -> Json:
    """Compare mean squares a text [texts]: ratio of the roots, Wilcoxon's signed-rank test on its logarithms, and the
    rank-biserial correlation, from -1 (rounding larger in every text) to 1 (depth larger in every text)."""
    ratio = clustered_ratio(depth, rounding)
    logs = np.log(np.maximum(depth, 1e-300)) - np.log(np.maximum(rounding, 1e-300))
    ranks = stats.rankdata(np.abs(logs))
    effect = float((ranks[logs > 0].sum() - ranks[logs < 0].sum()) / ranks.sum())
    return {
        "ratio": finite(Interval(*(math.sqrt(part) if part > 0 else part for part in ratio))),
        "p": float(stats.wilcoxon(logs).pvalue) if len(logs) > 1 else None,
        "rank_biserial": effect,
        "larger_in": int(np.sum(logs > 0)),
        "texts": len(logs),
    }
