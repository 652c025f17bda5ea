"""The scale of what a model carries: RMS of the residual stream and of the states, by layer and iteration.

Cross-entropy leaves both free where norms stand before every product, and what a blend does depends on their ratio.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from sst_jax.model.layers import to_float32
from sst_jax.types import AllStepScalars, Hidden, LayerIterations, SegmentIds, StepScalars


class StepSquares(NamedTuple):
    """Mean squares over D of every step, [B, T*I] of a layer, [L, B, T*I] of all."""

    residual: StepScalars | AllStepScalars  # what leaves the layer
    state: StepScalars | AllStepScalars | None  # the state after the step; None where no forward has one


class LayerScales(NamedTuple):
    """RMS over positions and dimensions, [L, I]."""

    residual: LayerIterations
    state: LayerIterations | None


def step_squares(residual: Hidden, state: Hidden | None) -> StepSquares:
    """Return the mean squares of a layer's steps."""
    squares = [jnp.mean(jnp.square(to_float32(part)), axis=-1) for part in (residual, state) if part is not None]
    return StepSquares(squares[0], None if state is None else squares[1])


def layer_scales(squares: StepSquares, segment_ids: SegmentIds, depth: int) -> LayerScales:
    """Return RMS by layer and iteration of steps [L, B, T*I], over the positions that are no padding."""
    real = (jnp.asarray(segment_ids) > 0)[..., None]

    def root(part: AllStepScalars) -> LayerIterations:
        part = part.reshape(len(part), *segment_ids.shape, depth)
        return jnp.sqrt(jnp.sum(jnp.where(real, part, 0.0), axis=(1, 2)) / jnp.maximum(real.sum(), 1))

    return LayerScales(root(squares.residual), None if squares.state is None else root(squares.state))


def scalars(scales: LayerScales) -> dict[str, float]:
    """Return scales by name, "rms/state/LAYER/ITERATION", layers from 0 and iterations from 1, for logs."""
    parts = {"residual": scales.residual, "state": scales.state}
    return {
        f"rms/{name}/{layer}/{iteration + 1}": float(value)
        for name, part in parts.items()
        if part is not None
        for (layer, iteration), value in np.ndenumerate(np.asarray(part))
    }
