"""The feed-forward of one layer step after step: what `exact` does in a layer, and what stands in for sweeps."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from sst_jax.model.collected import Taken, Walked, tickets
from sst_jax.model.decoder import Context, Layer
from sst_jax.model.halves import walk_groups
from sst_jax.model.layers import to_float32
from sst_jax.model.loops import over_chunks
from sst_jax.model.passes import recurrent_step
from sst_jax.model.remat import KEPT, walking
from sst_jax.model.state import initial_state, state_update
from sst_jax.types import Hidden, RowHidden

CHUNK = 32  # positions between checkpoints, at most


def scan_positions(
    layer: Layer, x: Hidden, h: Hidden, context: Context, before: RowHidden | None = None
) -> tuple[Hidden, Hidden]:
    """Run the feed-forward of one layer step after step.

    With `context.recompute` in chunks that the backward pass runs again, so that about every CHUNK-th state is kept
    until then; where the whole layer is recomputed first, only under remat="memories" and "offload", or the positions
    are scanned once more for them.

    Args:
      layer: its parameters.
      x: into the layer.
      h: after attention.
      context: what all layers share.
      before: the state of rows continued from a cache; None: there are none.

    Returns:
      o, and the state after every step.
    """
    stream, masks = context.stream, layer.stream.masks
    begins = stream.initial in ("zero", "own")  # with a state; else none is blended in where `has_state` is false
    s0 = initial_state(stream, x) if stream.initial == "own" else None  # else zeros, or unused
    groups = walk_groups(layer, len(x), x.dtype)

    def through(m: jax.Array, chunk: tuple) -> tuple[jax.Array, tuple]:
        h, s0, masks = chunk
        if not begins:  # said here, where XLA leaves out what is false everywhere
            masks = masks._replace(is_initial=jnp.zeros_like(masks.has_state))
        steps, constant = len(h), jax.lax.stop_gradient(h)
        left = {name: tickets(*group, (steps, len(x))) for name, group in groups.items()}

        def step(m: jax.Array, own: tuple) -> tuple[jax.Array, tuple]:
            at, h, s0, left = own
            mine, s = Taken(masks, at), m[:, None]
            if begins:
                s = jnp.where(mine.here().has_state, s, 0.0 if s0 is None else s0[:, None])
            walked = {name: Walked(groups[name][1], ticket) for name, ticket in left.items()}
            o, m = recurrent_step(layer._replace(walked=walked), Taken(constant, at, h), s, mine, context, x.dtype)
            return m[:, 0], (o[:, 0], m[:, 0])

        # Where kernels are launched, two positions a turn: they share what counts turns and writes their results.
        unroll = 2 if groups and steps % 2 == 0 else 1
        return jax.lax.scan(step, m, (jnp.arange(steps), h, s0, left), unroll=unroll)

    first = jnp.zeros_like(state_update(stream, x[:, 0], to_float32(x[:, 0]))) if before is None else before
    with walking(True):
        return over_chunks(through, first, (h, s0, masks), chunk=CHUNK, recompute=context.recompute, name=KEPT)
