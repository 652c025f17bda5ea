"""A layer's feed-forward half together with its states: over all steps at once, and of one step.

What the rules of `model/rules.py`, the solvers of `model/links.py` and decoding have in common.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from sst_jax.model.collected import Taken, here
from sst_jax.model.config import StreamConfig
from sst_jax.model.decoder import Context, Layer
from sst_jax.model.halves import AttentionResidual, feed, residual_after_attention
from sst_jax.model.layers import to_float32
from sst_jax.model.state import Masks, PassValues, decay_state, scan_states, shift_right, state_update
from sst_jax.types import Hidden, RowHidden


def pass_once(
    layer: Layer,
    x: Hidden,
    h: AttentionResidual | Hidden,
    s: Hidden | None,
    context: Context,
    before: RowHidden | None = None,
) -> tuple[Hidden, Hidden]:
    """Run the feed-forward over all steps at once.

    Args:
      layer: its parameters.
      x: into the layer.
      h: after attention.
      s: the states entering each step; None: none enters any.
      context: what all layers share.
      before: the state of rows continued from a cache; None: there are none.

    Returns:
      o, and the state after every step.
    """
    o, f = feed(layer, h, context, x.dtype, s, layer.stream.masks)
    scalar = layer.block.layer_scalar
    scale = None if scalar is None else to_float32(scalar.scale[...])
    values = PassValues(x, residual_after_attention(layer, h), f, o, scale)
    with jax.named_scope("states"):
        return o, scan_states(context.stream, layer.stream, values, before)


@jax.named_scope("states")
def next_pass_states(layer: Layer, x: Hidden, state_out: Hidden, context: Context) -> Hidden:
    """Return the states that a pass over x blends in: those of the pass before, shifted by one step.

    Args:
      layer: its masks.
      x: into the layer.
      state_out: the state after every step of the pass before; without its gradient unless `stream.pass1_grad`.
      context: what all layers share.
    """
    kept = state_out if context.stream.pass1_grad else jax.lax.stop_gradient(state_out)
    return shift_right(context.stream, x, kept, layer.stream.masks)


def recurrent_step(
    layer: Layer,
    h: AttentionResidual | Taken | Hidden,
    s: Hidden,
    masks: Masks | Taken,
    context: Context,
    dtype: DTypeLike,
) -> tuple[Hidden, Hidden]:
    """Run the feed-forward of one step, [B, 1, D]: of `exact`'s scan, and of decoding.

    Args:
      layer: its parameters; `masks` stands in for the masks of its stream.
      h: after attention.
      s: the state that enters the step where `masks` say that one does.
      masks: of the step.
      context: what all layers share.
      dtype: of the products and of o.

    Returns:
      o in `dtype`, and the state after the step.
    """
    o, f = feed(layer, h, context, dtype, s, masks)
    with jax.named_scope("states"):
        return o, decay_state(context.stream, s, state_update(context.stream, o, f), here(masks).blends)


def sweep_tolerance(stream: StreamConfig, dtype: DTypeLike) -> float:
    """Return at which change sweeps have converged: below the rounding of the activations' type they never would."""
    return max(stream.sweep_tolerance, float(jnp.finfo(dtype).eps))
