"""The state stream of one layer: how a state is updated, moved to the next step, and blended in.

Every step (one iteration of one position; at depth 1 a position) leaves a state m in a layer. Entering the next step it
is called s, and is blended into the post-attention residual h:

    h' = h + alpha * (gain * N(s) - h)        `blend`
    f  = FFN(h'),   o = h' + f
    u  = f  or  o                             `state_update`
    m  = decay * s + (1 - decay) * u          `decay_state`: sequential, one step
    s_t = m_{t-1}                             `scan_states` and `shift_right`: all steps at once, from an earlier pass

Two masks say where. `has_state`: a state enters from the step before. `is_initial`: none does, and the config gives an
initial state. Both are false on padding. `has_state` is false where a document begins: no state enters from another.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sst_jax.model.config import ModelConfig, StreamConfig
from sst_jax.model.layers import Block, to_float32, unit_rms
from sst_jax.types import (
    Activations,
    Alpha,
    AnyFloat,
    AnyInts,
    Gain,
    Hidden,
    Positions,
    RowHidden,
    Scalar,
    SegmentIds,
    StepMask,
    StepRamp,
    Tokens,
)

EPS = 1e-6


class Masks(NamedTuple):
    """Where states enter, bool [B, T*I, 1] each, and how far; see the module's docstring."""

    has_state: StepMask
    is_initial: StepMask
    ramp: StepRamp | None = None  # what alpha is scaled by at every step; None: by nothing

    @property
    def blends(self) -> StepMask:
        """Where a state is blended in."""
        return self.has_state | self.is_initial


class LayerStream(NamedTuple):
    """The stream in one layer."""

    masks: Masks
    alpha: Alpha
    gain: Gain


class PassValues(NamedTuple):
    """What a pass over all steps computes in a layer, [B, T*I, D] each."""

    x: Hidden  # into the layer
    h: Hidden  # after attention, float32 or wider
    f: Hidden  # of the feed-forward, float32 or wider
    o: Hidden  # out of the layer
    scalar: AnyFloat | None = None  # what the layer's output is multiplied by; None: nothing


def learned_alpha(stream: StreamConfig, theta: AnyFloat, alpha_warmup_fraction: Scalar | float | None) -> AnyFloat:
    """Return alpha in theta's shape; `alpha_warmup_fraction` as for `alpha_and_gain`."""
    if stream.gate == "tanh":
        alpha = jnp.tanh(theta)
        return alpha if alpha_warmup_fraction is None else alpha * alpha_warmup_fraction
    lo, hi = stream.alpha_range
    alpha = lo + (hi - lo) * jax.nn.sigmoid(theta)
    return alpha if alpha_warmup_fraction is None else lo + (alpha - lo) * alpha_warmup_fraction


def alpha_and_gain(stream: StreamConfig, block: Block, alpha_warmup_fraction: Scalar | None) -> tuple[Alpha, Gain]:
    """Return alpha, [D] or [1], and gain of one layer.

    `alpha_warmup_fraction`, in [0, 1], raises a learned alpha from the range's lower end to its value; None is 1.
    """
    if stream.alpha is None:
        alpha = learned_alpha(stream, block.theta[...], alpha_warmup_fraction)
    else:
        alpha = jnp.full(1, stream.alpha)
    return alpha, block.gain[...] if stream.learn_gain else jnp.full(1, stream.gain)


def normalise(stream: StreamConfig, s: Activations, h: Activations) -> Activations:
    """Return the normalised state N(s) in float32 or wider; h is what "match" rescales it to."""
    if stream.norm == "none":
        return to_float32(s)
    unit = unit_rms(s, EPS)
    return (
        unit if stream.norm == "rms" else unit * safe_sqrt(jnp.mean(jnp.square(to_float32(h)), axis=-1, keepdims=True))
    )


def safe_sqrt(x: AnyFloat) -> AnyFloat:
    """Return the square root of x >= 0, with gradient 0 where x is 0.

    There the root has none, and what multiplies it with 0 afterwards (a mask, a square's gradient) makes it NaN: so
    where a padding row's embedding is zero.
    """
    positive = x > 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, x, 1.0)), 0.0)


def blend(stream: StreamConfig, layer: LayerStream, h: Hidden, s: Hidden, masks: Masks) -> Hidden:
    """Return h moved by alpha towards the state where there is one, and h elsewhere.

    Args:
      stream: the normalisation N.
      layer: alpha, how far, and gain, the factor of the normalised state.
      h: after attention, or what leaves the layer, as `stream.site` says.
      s: the state that enters each step.
      masks: the steps that one enters, which need not be those of `layer`.

    Returns:
      h' in float32 or wider.
    """
    h, alpha = to_float32(h), ramped(layer.alpha, masks)
    return jnp.where(masks.blends, h + alpha * (layer.gain * normalise(stream, s, h) - h), h)


def ramped(alpha: AnyFloat, masks: Masks) -> AnyFloat:
    """Return alpha [D] as it is at every step, [B, T*I, D] where it rises with the position."""
    return alpha if masks.ramp is None else alpha * masks.ramp.astype(alpha.dtype)


def state_update(stream: StreamConfig, o: Activations, f: Activations) -> Activations:
    """Return u, what a step contributes to the state, in the type that states are kept in."""
    u = f if stream.state == "ffn" else o
    return u.astype(jnp.bfloat16) if stream.dtype == "bfloat16" else to_float32(u)


def initial_state(stream: StreamConfig, x: Activations) -> Activations:
    """Return the state entering a document's first step, from the layer's input x; read only where `is_initial`."""
    s = unit_rms(x, EPS) if stream.initial == "own" else jnp.zeros(x.shape, to_float32(x).dtype)
    return s.astype(jnp.bfloat16) if stream.dtype == "bfloat16" else s


def decay_state(stream: StreamConfig, s: Hidden, u: Hidden, where: StepMask) -> Hidden:
    """Return the state m after steps: a decaying average, or u alone where no state entered.

    Args:
      stream: the decay.
      s: the states that entered.
      u: as `state_update` returns it.
      where: the steps that a state entered.
    """
    if stream.decay == 0.0:
        return u
    return jnp.where(where, stream.decay * to_float32(s) + (1.0 - stream.decay) * to_float32(u), to_float32(u)).astype(
        u.dtype
    )


def scan_states(
    stream: StreamConfig, layer: LayerStream, values: PassValues, before: RowHidden | None = None
) -> Hidden:
    """Return the state after every step from a pass over all steps at once.

    Solves m_t = a_t m_{t-1} + b_t with `jax.lax.associative_scan`, a = 0 where no state enters. Without decay and
    linear carry a is zero everywhere, and the state is u itself.

    Args:
      stream: the recurrence.
      layer: its masks, alpha and gain in this layer.
      values: of the pass.
      before: the state entering the first step of rows continued from a cache; None: there are none.
    """
    x, h, f, o, scalar = values
    masks, gain = layer.masks, layer.gain
    alpha = ramped(layer.alpha, masks)
    u = state_update(stream, o, f)
    if stream.decay == 0.0 and not stream.linear_carry:
        return u
    through, rest = jnp.zeros_like(alpha), to_float32(u)
    if (
        stream.linear_carry
    ):  # o = (1 - alpha) h + alpha gain s + f wherever a state is blended in, times the layer's scalar
        through, rest = (
            alpha * gain,
            jnp.where(masks.blends, (1.0 - alpha) * to_float32(h), to_float32(h)) + to_float32(f),
        )
        if scalar is not None:
            through, rest = through * scalar, rest * scalar
    a = jnp.broadcast_to(stream.decay + (1.0 - stream.decay) * through, rest.shape)
    b = jnp.where(masks.blends, (1.0 - stream.decay) * rest, rest)
    b = b + jnp.where(masks.is_initial, a * to_float32(initial_state(stream, x)), 0.0)
    a = jnp.where(masks.has_state, a, 0.0)
    if before is not None:
        b = b.at[:, 0].add(a[:, 0] * to_float32(before))

    def compose(first: tuple[jax.Array, jax.Array], second: tuple[jax.Array, jax.Array]):
        return first[0] * second[0], second[0] * first[1] + second[1]

    return jax.lax.associative_scan(compose, (a, b), axis=1)[1].astype(u.dtype)


def shift_right(
    stream: StreamConfig, x: Hidden, state_out: Hidden, masks: Masks, before: RowHidden | None = None
) -> Hidden:
    """Return the state entering every step: the one after the step before, or the initial state.

    Args:
      stream: its initial state.
      x: the layer's input.
      state_out: the state after every step.
      masks: where states enter.
      before: the state entering the first step of rows continued from a cache; None: there are none.
    """
    earlier = jnp.pad(state_out[:, :-1], ((0, 0), (1, 0), (0, 0)))
    if before is not None:
        earlier = earlier.at[:, 0].set(before)
    return jnp.where(masks.has_state, earlier, initial_state(stream, x))


def masks_for(
    stream: StreamConfig, segment_ids: SegmentIds, tokens: Tokens, positions: Positions, depth: int, bos_id: int | None
) -> Masks:
    """Return the masks of whole sequences.

    Args:
      stream: its initial state, whether a BOS leaves a state, which iterations read one, and alpha's ramp.
      segment_ids: 0 is padding.
      tokens: of the same sequences.
      positions: within each document.
      depth: iterations I at every position.
      bos_id: the BOS token; None: the vocabulary has none.
    """
    real = segment_ids > 0
    source = real
    if stream.initial == "skip_bos" and bos_id is not None:
        source = real & (tokens != bos_id)
    previous = jnp.pad(segment_ids[:, :-1], ((0, 0), (1, 0)))
    entering = real & (segment_ids == previous) & jnp.pad(source[:, :-1], ((0, 0), (1, 0)))
    # A position's first iteration takes the state of the position before, every later one that of the iteration before.
    first, later = (read_in(stream, iteration) for iteration in (0, 1))
    has_state = jnp.stack([entering & first] + [source & later] * (depth - 1), axis=-1)
    is_initial = jnp.zeros_like(has_state)
    if stream.initial in ("zero", "own") and first:
        is_initial = is_initial.at[..., 0].set(real & ~entering)
    rows, ramp = segment_ids.shape[0], None
    if stream.ramp:
        ramp = jnp.repeat(ramp_at(stream, positions), depth, axis=1)[..., None]
    return Masks(has_state.reshape(rows, -1, 1), is_initial.reshape(rows, -1, 1), ramp)


def read_in(stream: StreamConfig, iteration: int) -> bool:
    """Return whether a state enters an iteration of a position, 0 or a later one, as `stream.timing` says."""
    return stream.timing != ("next" if iteration else "same")


def ramp_at(stream: StreamConfig, positions: AnyInts) -> AnyFloat:
    """Return what alpha is scaled by at positions of a document, from 0 at the first."""
    return jnp.minimum(jnp.asarray(positions, jnp.result_type(float)) / stream.ramp, 1.0)


def carriers(stream: StreamConfig, stack: AnyFloat) -> AnyFloat:
    """Return the rows of a stacked blend parameter whose layers carry a state; a row shared by all layers stays."""
    if stream.carriers is None or len(stack) == 1:
        return stack
    return stack[np.array(sorted(set(stream.carriers)), int)]


def sources_of(config: ModelConfig) -> np.ndarray:
    """Return for every layer [L] the layer whose state enters it, itself where no link says otherwise."""
    sources = np.arange(config.backbone.num_layers)
    for source, destination in (config.stream and config.stream.links) or ():
        sources[destination] = source
    return sources


def alpha_summary(
    stream: StreamConfig | None, blend: dict[str, AnyFloat], alpha_warmup_fraction: Scalar | float | None = None
) -> dict[str, float]:
    """Return mean, smallest and largest learned alpha, warmed up as given, for logs; empty where none is learned."""
    if stream is None or "theta" not in blend:
        return {}
    alpha = learned_alpha(stream, carriers(stream, blend["theta"]), alpha_warmup_fraction)
    return {"alpha_mean": float(alpha.mean()), "alpha_min": float(alpha.min()), "alpha_max": float(alpha.max())}
