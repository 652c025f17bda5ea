"""The feed-forward of one layer step after step: what `exact` does in a layer, and what stands in for sweeps.

In between the two are spans of consecutive steps: walked through step after step, all of them side by side.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from sst_jax.model import compiler
from sst_jax.model.collected import Taken, Walked, tickets
from sst_jax.model.decoder import Context, Layer
from sst_jax.model.halves import walk_groups, with_transposed_kernels
from sst_jax.model.layers import to_float32
from sst_jax.model.loops import over_chunks
from sst_jax.model.passes import recurrent_step
from sst_jax.model.remat import KEPT, walking
from sst_jax.model.sharding import row_parts
from sst_jax.model.state import initial_state, state_update
from sst_jax.types import AnyFloat, Hidden, RowHidden, Scalar, ScalarBool, ScalarInt

CHUNK = 32  # positions between checkpoints, at most
# Rows that keep a product's arithmetic busy, by platform; accelerators need more, to make up for reading the weights.
ROWS, ROWS_OF_OTHERS = {"cpu": 64}, 1024


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
    if not groups:
        layer = with_transposed_kernels(layer, len(x), x.dtype)  # once, for all steps

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
            one = layer._replace(lora=walked) if walked else layer
            o, m = recurrent_step(one, Taken(constant, at, h), s, mine, context, x.dtype)
            return m[:, 0], (o[:, 0], m[:, 0])

        # Where kernels are launched, two positions a turn: they share what counts turns and writes their results.
        unroll = 2 if groups and steps % 2 == 0 else 1
        return jax.lax.scan(step, m, (jnp.arange(steps), h, s0, left), unroll=unroll)

    first = jnp.zeros_like(state_update(stream, x[:, 0], to_float32(x[:, 0]))) if before is None else before
    with walking(True):
        return over_chunks(through, first, (h, s0, masks), chunk=CHUNK, recompute=context.recompute, name=KEPT)


def span_length(rows: int, steps: int) -> int:
    """Return how many steps a span of `scan_spans` has: as many as leave a product of a turn ROWS, at least 1."""
    enough = ROWS.get(compiler.platform(), ROWS_OF_OTHERS) * row_parts()
    spans = -(-steps // max(1, rows * steps // enough))
    return -(-steps // max(1, spans))


class _Turn(NamedTuple):
    """What `scan_spans` carries from turn to turn."""

    number: ScalarInt  # of turns before
    s: Hidden  # what the turn before has left for this one, [B, spans, D]
    o: AnyFloat  # [length, B, spans, D], as is the next
    state_out: AnyFloat
    squares: AnyFloat  # of the states that enter a step, summed, [length, B]
    change: Scalar  # how far `s` is from what entered the same steps before, in relation to all states of a row


def scan_spans(
    layer: Layer, x: Hidden, h: Hidden, context: Context, before: RowHidden | None, *, length: int, tolerance: float
) -> tuple[Hidden, Hidden, Scalar, ScalarBool]:
    """Cut rows into spans, and run the feed-forward step after step in all spans at once, until the states agree.

    A turn is one step of every span. In the first round no state enters the spans but a row's first; in the next ones
    each is entered by the state that the span before has left. A round costs what a sweep over all steps does, and
    takes a difference `length` steps on instead of one. It may end early: once a turn leaves the states that it left
    the round before, no other step is entered by anything new.

    Args:
      layer: its parameters.
      x: into the layer.
      h: after attention.
      context: what all layers share, of a stream without decay, which would be slow to cross from span to span.
      before: the state of rows continued from a cache; None: there are none.
      length: steps of a span.
      tolerance: by how much, in relation to their norm, the states that entered a row's steps may differ from those
        left by the steps before.

    Returns:
      o, the state after every step, how often every step was run, on average, and whether the states agree.
    """
    stream, has_state, (rows, steps, _) = context.stream, layer.stream.masks.has_state, h.shape

    def cut(part: jax.Array) -> jax.Array:  # [B, steps, ...] -> [length, B, spans, ...]
        part = jnp.pad(part, ((0, 0), (0, -steps % length), (0, 0)))
        return jnp.moveaxis(part.reshape(rows, -1, length, part.shape[-1]), 2, 0)

    def joined(part: jax.Array) -> jax.Array:
        return jnp.moveaxis(part, 0, 2).reshape(rows, -1, part.shape[-1])[:, :steps]

    own = initial_state(stream, x) if stream.initial == "own" else None  # else zeros, or unused
    is_read = jnp.pad(has_state[:, 1:], ((0, 0), (0, 1), (0, 0)))  # whether the next step is entered by a step's state
    inputs = jax.tree.map(cut, (layer.stream.masks, h, is_read, own))
    empty = jnp.zeros_like(state_update(stream, inputs[1], inputs[1]))
    first = empty[0] if before is None else empty[0].at[:, 0].set(before)
    is_first = jnp.arange(first.shape[1])[:, None] == 0
    # Where no state enters a later span, one round is all there is to do.
    unknown = jnp.where(jnp.any(inputs[0].has_state[0] & ~is_first), jnp.inf, 0.0).astype(jnp.float32)

    def squared(part: jax.Array, where: jax.Array) -> jax.Array:  # of each row, so that a short one counts
        return jnp.sum(jnp.square(jnp.where(where, to_float32(part), 0.0)), axis=(1, 2)).astype(jnp.float32)

    def turn(carry: _Turn) -> _Turn:
        place = carry.number % length
        (masks, h, is_read, own), old = jax.tree.map(lambda part: part[place], (inputs, carry.state_out))
        masks = masks._replace(has_state=masks.has_state & (is_first | (carry.number > 0)))
        s = jnp.where(masks.has_state, carry.s, 0.0 if own is None else own)
        o, m = recurrent_step(layer, h, s, masks, context, x.dtype)
        squares = carry.squares.at[place].set(squared(m, is_read))
        moved = squared(to_float32(m) - to_float32(old), is_read) / jnp.maximum(jnp.sum(squares, axis=0), 1e-30)
        change = jnp.where(carry.number < length, unknown, jnp.sqrt(jnp.max(moved)))
        s = jnp.where(place == length - 1, first.at[:, 1:].set(m[:, :-1]), m)
        return _Turn(carry.number + 1, s, carry.o.at[place].set(o), carry.state_out.at[place].set(m), squares, change)

    def moving(carry: _Turn) -> jax.Array:
        again = ~(carry.change <= tolerance) & (carry.number < stream.sweep_cap * length)
        return (carry.number < length) | again

    start = _Turn(jnp.int32(0), first, empty.astype(x.dtype), empty, jnp.zeros((length, rows), jnp.float32), unknown)
    last = jax.lax.while_loop(moving, turn, start)
    count = last.number.astype(jnp.float32) / length
    return joined(last.o), joined(last.state_out), count, last.change <= tolerance
