"""The idea: what a layer remembers, how the memory moves on, and how it is blended in.

At every step (one iteration of one position; at depth 1 simply a position) a layer holds a memory m: what it was just
thinking. Entering the next step that memory is the state s, blended into the post-attention residual stream h:

    h' = h + alpha * (gain * N(s) - h)        `blend`
    f  = FFN(h'),   o = h' + f
    u  = f  or  o                             `state_update`
    m  = decay * s + (1 - decay) * u          `decay_state`: sequential, one step
    s_t = m_{t-1}                             `scan_states` and `shift_right`: all steps at once, from an earlier pass

Two masks say where. `has_state`: a state comes in from the step before. `is_initial`: nothing comes in, but the config
gives an initial state. Neither holds on padding; `has_state` is off where a document begins: no state crosses a border.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sst_jax.model.config import StreamConfig
from sst_jax.model.layers import Block, to_float32, unit_rms
from sst_jax.types import SegmentIds, Tokens

EPS = 1e-6


class Masks(NamedTuple):
    """Where states enter, bool [B, T*I, 1] each; see the module's docstring."""

    has_state: jax.Array
    is_initial: jax.Array

    @property
    def blends(self) -> jax.Array:
        return self.has_state | self.is_initial


def learned_alpha(stream: StreamConfig, theta: jax.Array, alpha_warmup_fraction: jax.Array | float | None) -> jax.Array:
    """alpha, as many as theta; `alpha_warmup_fraction` as for `alpha_and_gain`."""
    lo, hi = stream.alpha_range
    alpha = lo + (hi - lo) * jax.nn.sigmoid(theta)
    return alpha if alpha_warmup_fraction is None else lo + (alpha - lo) * alpha_warmup_fraction


def alpha_and_gain(
    stream: StreamConfig, block: Block, alpha_warmup_fraction: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """alpha, [D] or [1], and gain, [1], of one layer. `alpha_warmup_fraction` [] scales it up."""
    if stream.alpha is None:
        alpha = learned_alpha(stream, block.theta[...], alpha_warmup_fraction)
    else:
        alpha = jnp.full(1, stream.alpha)
    return alpha, block.gain[...] if stream.learn_gain else jnp.full(1, stream.gain)


def normalise(stream: StreamConfig, s: jax.Array, h: jax.Array) -> jax.Array:
    """N(s), wide."""
    if stream.norm == "none":
        return to_float32(s)
    unit = unit_rms(s, EPS)
    return (
        unit if stream.norm == "rms" else unit * jnp.sqrt(jnp.mean(jnp.square(to_float32(h)), axis=-1, keepdims=True))
    )


def blend(stream: StreamConfig, alpha: jax.Array, gain: jax.Array, h: jax.Array, s: jax.Array, where: jax.Array):
    """h', wide: h moved by alpha towards the state where there is one, h itself elsewhere."""
    h = to_float32(h)
    return jnp.where(where, h + alpha * (gain * normalise(stream, s, h) - h), h)


def state_update(stream: StreamConfig, o: jax.Array, f: jax.Array) -> jax.Array:
    """u, what the layer was just thinking, in the type that states are kept in."""
    u = f if stream.state == "ffn" else o
    return u.astype(jnp.bfloat16) if stream.dtype == "bfloat16" else to_float32(u)


def initial_state(stream: StreamConfig, x: jax.Array) -> jax.Array:
    """The state entering a document's first step, from the layer's input x. Read only where `begins`."""
    s = unit_rms(x, EPS) if stream.initial == "own" else jnp.zeros(x.shape, to_float32(x).dtype)
    return s.astype(jnp.bfloat16) if stream.dtype == "bfloat16" else s


def decay_state(stream: StreamConfig, s: jax.Array, u: jax.Array, where: jax.Array) -> jax.Array:
    """m after one step that s entered: a decaying average, or u alone where nothing entered."""
    if stream.decay == 0.0:
        return u
    return jnp.where(where, stream.decay * to_float32(s) + (1.0 - stream.decay) * to_float32(u), to_float32(u)).astype(
        u.dtype
    )


def scan_states(
    stream: StreamConfig,
    alpha: jax.Array,
    gain: jax.Array,
    x: jax.Array,
    h: jax.Array,
    f: jax.Array,
    o: jax.Array,
    masks: Masks,
    before: jax.Array | None = None,
) -> jax.Array:
    """What the layer holds after every step, from a pass over all steps: x into the layer, h, f and o inside it.

    Solves m_t = a_t m_{t-1} + b_t with `jax.lax.associative_scan`, a = 0 where no state comes in. Without decay and
    linear carry a is zero everywhere, and the memory is u itself. All arrays [B, T*I, D]; `before` [B, D] is the memory
    that the first step finds where rows go on from a cache.
    """
    u = state_update(stream, o, f)
    if stream.decay == 0.0 and not stream.linear_carry:
        return u
    through, rest = jnp.zeros_like(alpha), to_float32(u)
    if stream.linear_carry:  # o = (1 - alpha) h + alpha gain s + f wherever a state is blended in
        through, rest = (
            alpha * gain,
            jnp.where(masks.blends, (1.0 - alpha) * to_float32(h), to_float32(h)) + to_float32(f),
        )
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
    stream: StreamConfig, x: jax.Array, memory: jax.Array, masks: Masks, before: jax.Array | None = None
) -> jax.Array:
    """The state entering every step: the memory after the step before, or the initial state. [B, T*I, D]."""
    earlier = jnp.pad(memory[:, :-1], ((0, 0), (1, 0), (0, 0)))
    if before is not None:
        earlier = earlier.at[:, 0].set(before)
    return jnp.where(masks.has_state, earlier, initial_state(stream, x))


def masks_for(stream: StreamConfig, segment_ids: SegmentIds, tokens: Tokens, depth: int, bos_id: int | None) -> Masks:
    """Masks for whole rows, [B, T*I, 1], from segment_ids [B, T] (0 is padding) and tokens [B, T]."""
    real = segment_ids > 0
    source = real
    if stream.initial == "skip_bos" and bos_id is not None:
        source = real & (tokens != bos_id)
    previous = jnp.pad(segment_ids[:, :-1], ((0, 0), (1, 0)))
    entering = real & (segment_ids == previous) & jnp.pad(source[:, :-1], ((0, 0), (1, 0)))
    # The first iteration is entered from the position before, every later one from the iteration before.
    live = jnp.stack([entering] + [source] * (depth - 1), axis=-1)
    begins = jnp.zeros_like(live)
    if stream.initial in ("zero", "own"):
        begins = begins.at[..., 0].set(real & ~entering)
    rows = segment_ids.shape[0]
    return Masks(live.reshape(rows, -1, 1), begins.reshape(rows, -1, 1))


def carriers(stream: StreamConfig, stack: Any) -> Any:
    """Of a blend parameter of all layers, stacked, the rows of layers that carry a state; of one for all that one."""
    if stream.layers is None or len(stack) == 1:
        return stack
    return stack[np.array(sorted(set(stream.layers)), int)]


def alpha_summary(
    stream: StreamConfig | None, blend: dict[str, jax.Array], alpha_warmup_fraction: jax.Array | float | None = None
) -> dict[str, float]:
    """Mean, smallest and largest learned alpha as it is in use, for logs; empty where none is learned."""
    if stream is None or "theta" not in blend:
        return {}
    alpha = learned_alpha(stream, carriers(stream, blend["theta"]), alpha_warmup_fraction)
    return {"alpha_mean": float(alpha.mean()), "alpha_min": float(alpha.min()), "alpha_max": float(alpha.max())}
