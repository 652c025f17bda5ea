"""Attention over whole sequences in plain JAX, a block of queries against a block of keys at a time.

For heads and cards that the libraries' flash kernels refuse: like these it never stores T x T scores, forward or
backward (arXiv 2205.14135). A block of queries walks over the blocks of keys that its causal window can reach; what it
keeps for the gradient is its output's normaliser alone, and the backward pass walks again.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from sst_jax.types import KeysValues, Queries, SegmentIds

BLOCK = 256  # queries, and keys, of a block: scores of [B, N, 256, 256] in memory at once


class _Shape(NamedTuple):
    """What is static of a call."""

    scale: float
    window: int | None
    block: int
    blocks: int

    @property
    def reach(self) -> int:
        """Blocks of keys before its own that a block of queries may see."""
        if self.window is None:
            return self.blocks - 1
        return min(-(-(self.window - 1) // self.block), self.blocks - 1)


def chunked(
    q: Queries,
    k: KeysValues,
    v: KeysValues,
    segment_ids: SegmentIds,
    scale: float,
    window: int | None,
    block: int = BLOCK,
) -> Queries:
    """Attend as `kernels.cudnn` does.

    Args:
      q, k, v, segment_ids, scale, window: as there.
      block: queries, and keys, that are looked at together.

    Returns:
      The output, in q's shape and dtype.
    """
    length, heads = q.shape[1], k.shape[2]
    block = min(block, length)
    more = -length % block
    widths = ((0, 0), (0, more), (0, 0), (0, 0))
    q, k, v = (jnp.pad(part, widths) for part in (q, k, v))
    segments = jnp.pad(segment_ids, ((0, 0), (0, more)), constant_values=-1)
    blocks = q.shape[1] // block

    def cut(part: jax.Array) -> jax.Array:  # [B, T, K, G, H] -> [blocks, B, K, G, block, H]
        part = part.reshape(part.shape[0], blocks, block, *part.shape[2:])
        return jnp.moveaxis(jnp.moveaxis(part, 1, 0), 2, -2)

    grouped = q.reshape(*q.shape[:2], heads, -1, q.shape[-1])
    shape = _Shape(scale, window, block, blocks)
    pieces = jnp.moveaxis(segments.reshape(-1, blocks, block), 1, 0)
    out = _attend(cut(grouped), cut(k), cut(v), pieces, shape)
    out = jnp.moveaxis(jnp.moveaxis(out, -2, 2), 0, 1)
    return out.reshape(q.shape)[:, :length]


def _scores(
    q: jax.Array, k: jax.Array, pieces: jax.Array, at: jax.Array, other: jax.Array, shape: _Shape
) -> tuple[jax.Array, jax.Array]:
    """Return scores of a block of queries with a block of keys, float32 [B, K, G, block, block], and which are seen."""
    scores = jnp.einsum("bkgth,bksh->bkgts", q, k, preferred_element_type=jnp.float32) * shape.scale
    inside = jnp.arange(shape.block)
    distance = (at - other) * shape.block + inside[:, None] - inside[None, :]
    seen = distance >= 0 if shape.window is None else (distance >= 0) & (distance < shape.window)
    seen = seen & (pieces[at][:, :, None] == pieces[other][:, None, :])
    return scores, seen[:, None, None]


def _forward(q: jax.Array, k: jax.Array, v: jax.Array, pieces: jax.Array, shape: _Shape) -> tuple[jax.Array, jax.Array]:
    """Return outputs [blocks, B, K, G, block, H] and the logarithms of their normalisers, without the last axis."""

    def queries(at: jax.Array) -> tuple[jax.Array, jax.Array]:
        def keys(back: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            top, total, out = carry
            other = at - back
            scores, seen = _scores(q[at], k[other], pieces, at, other, shape)
            scores = jnp.where(seen, scores, -jnp.inf)
            new = jnp.maximum(top, scores.max(-1))
            weights, shrink = jnp.exp(scores - new[..., None]), jnp.exp(top - new)
            added = jnp.einsum(
                "bkgts,bksh->bkgth", weights.astype(v.dtype), v[other], preferred_element_type=jnp.float32
            )
            return new, total * shrink + weights.sum(-1), out * shrink[..., None] + added

        # Its own block comes first, where every query sees itself: no maximum is ever that of nothing.
        start = (jnp.full(q.shape[1:-1], -jnp.finfo(jnp.float32).max), jnp.zeros(q.shape[1:-1]), jnp.zeros(q.shape[1:]))
        top, total, out = jax.lax.fori_loop(0, jnp.minimum(at, shape.reach) + 1, keys, start)
        return (out / total[..., None]).astype(q.dtype), top + jnp.log(total)

    return jax.lax.map(queries, jnp.arange(shape.blocks))


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attend(q: jax.Array, k: jax.Array, v: jax.Array, pieces: jax.Array, shape: _Shape) -> jax.Array:
    return _forward(q, k, v, pieces, shape)[0]


def _attend_forward(q: jax.Array, k: jax.Array, v: jax.Array, pieces: jax.Array, shape: _Shape) -> tuple:
    out, normaliser = _forward(q, k, v, pieces, shape)
    return out, (q, k, v, pieces, out, normaliser)


def _attend_backward(shape: _Shape, saved: tuple, dout: jax.Array) -> tuple:
    q, k, v, pieces, out, normaliser = saved
    own = (out.astype(jnp.float32) * dout.astype(jnp.float32)).sum(-1)
    product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)

    def queries(carry: tuple[jax.Array, jax.Array], at: jax.Array) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
        def keys(back: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            dq, dk, dv = carry
            other = at - back
            scores, seen = _scores(q[at], k[other], pieces, at, other, shape)
            weights = jnp.where(seen, jnp.exp(scores - normaliser[at][..., None]), 0.0)
            pulled = product("bkgth,bksh->bkgts", dout[at], v[other])
            dscores = (weights * (pulled - own[at][..., None]) * shape.scale).astype(q.dtype)
            dq = dq + product("bkgts,bksh->bkgth", dscores, k[other])
            dk = dk.at[other].add(product("bkgts,bkgth->bksh", dscores, q[at]))
            dv = dv.at[other].add(product("bkgts,bkgth->bksh", weights.astype(q.dtype), dout[at]))
            return dq, dk, dv

        start = (jnp.zeros(q.shape[1:]), *carry)
        dq, dk, dv = jax.lax.fori_loop(0, jnp.minimum(at, shape.reach) + 1, keys, start)
        return (dk, dv), dq.astype(q.dtype)

    zeros = jnp.zeros(k.shape)
    (dk, dv), dq = jax.lax.scan(queries, (zeros, zeros), jnp.arange(shape.blocks))
    return dq, dk.astype(k.dtype), dv.astype(v.dtype), None


_attend.defvjp(_attend_forward, _attend_backward)
