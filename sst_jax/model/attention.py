"""Attention over whole rows, and over caches for one position: rotation, masks, sliding windows.

Local and global layers are the two branches of one `lax.cond`, so that each has its static window while all layers stay
one scan. The arithmetic is the library's, behind `attention`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from sst_jax.model.config import BackboneConfig
from sst_jax.model.kernels import KERNELS
from sst_jax.model.layers import rope_frequencies, rope_table, rotate
from sst_jax.types import Positions, SegmentIds

Table = tuple[jax.Array, jax.Array]


class Ropes(NamedTuple):
    """Rotation tables of the two kinds of layer."""

    local: Table
    glob: Table


class KV(NamedTuple):
    """Key/value caches, stacked over the layers of each kind, keys already rotated.

    Local layers keep a ring of W = min(window, S) slots, position p in slot p mod W; global layers keep all S.
    """

    local_k: jax.Array  # [layers, B, W, K, H]
    local_v: jax.Array
    global_k: jax.Array  # [layers, B, S, K, H]
    global_v: jax.Array


class Past(NamedTuple):
    """What rows that go on find in the caches: `length` [B] positions of each."""

    kv: KV
    length: jax.Array


def ring_positions(newest: jax.Array, size: int) -> jax.Array:
    """The position that each slot of a ring holds, [B, size], when `newest` [B] is the last; negative where none."""
    return newest[:, None] - (newest[:, None] - jnp.arange(size)) % size


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: jax.Array,
    scale: float,
    *,
    is_causal: bool = False,
    window: int | None = None,
) -> jax.Array:
    """Softmax attention, [B, T, N, H] from q [B, T, N, H], k and v [B, S, K, H] and mask bool [B or 1, 1, T, S].

    `window` W keeps a query's own and the W - 1 keys before it.
    """
    if q.dtype != jnp.float64:
        sides = None if window is None else (window - 1, 0)
        return jax.nn.dot_product_attention(
            q, k, v, mask=mask, scale=scale, is_causal=is_causal, local_window_size=sides
        )
    # The library rounds its softmax to float32, which would be the floor of every error measured in float64.
    distance = jnp.arange(q.shape[1])[:, None] - jnp.arange(k.shape[1])[None, :]
    if is_causal:
        mask = mask & (distance >= 0)
    if window is not None:
        mask = mask & (distance < window)
    group = q.shape[2] // k.shape[2]
    k, v = jnp.repeat(k, group, axis=2), jnp.repeat(v, group, axis=2)
    scores = jnp.where(mask, jnp.einsum("btnh,bsnh->bnts", q, k) * scale, jnp.finfo(q.dtype).min)
    return jnp.einsum("bnts,bsnh->btnh", jax.nn.softmax(scores, axis=-1), v)


def attention_once(q: jax.Array, k: jax.Array, v: jax.Array, seen: jax.Array, scale: float) -> jax.Array:
    """`attention` of one query a row: [B, 1, N, H] from q [B, 1, N, H], k and v [B, S, K, H] and seen [B, S].

    The keys come first in their product, as they lie in memory: in the library's order XLA transposes them on a CPU.
    """
    if q.dtype == jnp.bfloat16:  # of several rows and heads, for which XLA's CPU backend lacks this product
        return attention(q, k, v, seen[:, None, None, :], scale)
    rows, _, heads, size = k.shape
    wide = jnp.promote_types(q.dtype, jnp.float32)
    grouped = q.reshape(rows, heads, -1, size)
    scores = jax.lax.dot_general(k, grouped, (((3,), (3,)), ((0, 2), (0, 1))), preferred_element_type=wide)
    scores = jnp.where(seen[:, None, :, None], scores * scale, jnp.finfo(wide).min)  # [B, K, S, N/K]
    weights = jax.nn.softmax(scores, axis=2).astype(v.dtype)
    out = jax.lax.dot_general(weights, v, (((2,), (1,)), ((0, 1), (0, 2))), preferred_element_type=wide)
    return out.reshape(q.shape).astype(q.dtype)


def ropes(backbone: BackboneConfig, positions: Positions) -> Ropes:
    """Tables for `positions` [B, T]."""
    size, scale = backbone.head_dim, backbone.rope_scale_global
    local = rope_frequencies(size, backbone.rope_theta_local, 1.0)
    glob = rope_frequencies(size, backbone.rope_theta_global, scale, backbone.rope_llama3)
    positions = jnp.asarray(positions)
    return Ropes(rope_table(positions, local), rope_table(positions, glob))


def by_kind(backbone: BackboneConfig, is_global: jax.Array, branch: Callable[[str], tuple]) -> tuple:
    """`branch(kind)` for this layer's kind; no `lax.cond` where all layers are of one kind."""
    kinds = sorted(set(backbone.layer_types))
    if len(kinds) == 1:
        return branch(kinds[0])
    return jax.lax.cond(is_global, lambda: branch("global"), lambda: branch("local"))


def attend_rows(
    backbone: BackboneConfig,
    is_global: jax.Array,
    tables: Ropes,
    segment_ids: SegmentIds,
    depth: int,
    keep: str,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    implementation: str = "xla",
    past: tuple[Past, jax.Array] | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Causal attention within documents; q [B, T*I, N, H], k and v [B, T*I, K, H] not yet rotated.

    Iteration i of a position sees the keys and values of earlier positions as their last iteration left them and its
    own from iteration i (keep="overwrite"), or everybody's from iteration 1 (keep="first").
    `implementation` is one of `model/kernels.py` after `pick`; iterations (depth > 1) always take XLA's, and so do rows
    that go on from a `past`, given with the layer's place in its kind's stack.
    Returns the output [B, T*I, N*H] and the keys and values, [B, T, K, H], that a cache would now hold.
    """
    batch, length = segment_ids.shape
    same = segment_ids[:, None, :, None] == segment_ids[:, None, None, :]
    scale = backbone.query_pre_attn_scalar**-0.5

    def branch(kind: str) -> tuple[jax.Array, jax.Array, jax.Array]:
        table = tables.glob if kind == "global" else tables.local
        window = backbone.window if kind == "local" else None
        window = window if window is None or window < length else None
        if depth == 1 and past is None:
            rq, rk = rotate(q, table), rotate(k, table)
            if implementation in KERNELS:
                return KERNELS[implementation](rq, rk, v, segment_ids, scale, window), rk, v
            return attention(rq, rk, v, same, scale, is_causal=True, window=window), rk, v
        # Iterations side by side: [B, T*I, heads, H] -> [B * I, T, heads, H].
        qs, ks, vs = (
            jnp.moveaxis(part.reshape(batch, length, depth, *part.shape[2:]), 2, 1) for part in (q, k, v)
        )  # [B, I, T, heads, H]
        table_rows = jnp.repeat(table[0], depth, axis=0), jnp.repeat(table[1], depth, axis=0)
        qs = rotate(qs.reshape(batch * depth, length, *q.shape[2:]), table_rows)
        ks = rotate(ks.reshape(batch * depth, length, *k.shape[2:]), table_rows).reshape(ks.shape)
        kept = 0 if keep == "first" else depth - 1
        kept_k, kept_v = ks[:, kept], vs[:, kept]
        index = jnp.arange(length)
        distance = index[:, None] - index[None, :]
        within = (distance >= 0) if window is None else (distance >= 0) & (distance < window)
        mask = jnp.repeat(same & within, depth, axis=0)
        keys, values = jnp.repeat(kept_k, depth, axis=0), jnp.repeat(kept_v, depth, axis=0)
        if past is not None:
            earlier_k, earlier_v, seen = (
                jnp.repeat(part, depth, axis=0) for part in earlier(*past, kind, backbone, length)
            )
            mask = jnp.concatenate([mask, seen[:, None]], axis=-1)
            keys, values = (
                jnp.concatenate([new, old.astype(new.dtype)], axis=1)
                for new, old in ((keys, earlier_k), (values, earlier_v))
            )
        if keep == "overwrite" and depth > 1:  # a second block of keys, of which each query sees its own only
            own = distance == 0
            others = jnp.pad(own, ((0, 0), (0, mask.shape[-1] - length)))
            mask = jnp.concatenate([mask & ~others, jnp.broadcast_to(own, (*mask.shape[:-1], length))], axis=-1)
            keys = jnp.concatenate([keys, ks.reshape(-1, *ks.shape[2:])], axis=1)
            values = jnp.concatenate([values, vs.reshape(-1, *vs.shape[2:])], axis=1)
        out = attention(qs, keys, values, mask, scale)
        out = jnp.moveaxis(out.reshape(batch, depth, length, *out.shape[2:]), 1, 2)
        return out.reshape(q.shape), kept_k, kept_v

    out, k, v = by_kind(backbone, is_global, branch)
    return out.reshape(*q.shape[:2], -1), k, v


def earlier(
    past: Past, slot: jax.Array, kind: str, backbone: BackboneConfig, count: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Keys and values [B, S, K, H] in a layer's cache, and which of them the next `count` positions see, [B, T, S]."""
    keys, values = (past.kv.global_k, past.kv.global_v) if kind == "global" else (past.kv.local_k, past.kv.local_v)
    rows, size = keys.shape[1:3]
    if kind == "global":
        held = jnp.broadcast_to(jnp.arange(size), (rows, size))
    else:
        held = ring_positions(past.length - 1, size)
    seen = ((held >= 0) & (held < past.length[:, None]))[:, None, :]
    if kind == "local" and backbone.window is not None:
        queries = past.length[:, None] + jnp.arange(count)
        seen = seen & (queries[:, :, None] - held[:, None, :] < backbone.window)
    return keys[slot], values[slot], jnp.broadcast_to(seen, (rows, count, size))


def attend_cached(
    backbone: BackboneConfig,
    is_global: jax.Array,
    slot: jax.Array,
    tables: Ropes,
    position: jax.Array,
    write: jax.Array,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    kv: KV,
) -> tuple[jax.Array, KV]:
    """One position a row: q [B, 1, N, H] against the caches, which take in k and v first where `write` [B] says so.

    `slot` is the layer's place in its kind's stack, `position` [B] each row's position. Returns [B, 1, N*H] and caches.
    """
    rows = jnp.arange(q.shape[0])
    ring, capacity = kv.local_k.shape[2], kv.global_k.shape[2]
    scale = backbone.query_pre_attn_scalar**-0.5

    def put(cache: jax.Array, new: jax.Array, mine: jax.Array, index: jax.Array) -> jax.Array:
        # An index past the end drops the write: for rows that keep what they have, and for the other kind's stack.
        row = jnp.where(write & mine, rows, cache.shape[1])
        return cache.at[slot, row, index].set(new[:, 0].astype(cache.dtype), mode="drop")

    def rotated(kind: str) -> tuple[jax.Array, jax.Array]:
        table = tables.glob if kind == "global" else tables.local
        return rotate(q, table), rotate(k, table)

    q, k = by_kind(backbone, is_global, rotated)
    local, glob = ~is_global, is_global
    kv = KV(
        put(kv.local_k, k, local, position % ring),
        put(kv.local_v, v, local, position % ring),
        put(kv.global_k, k, glob, position),
        put(kv.global_v, v, glob, position),
    )

    def branch(kind: str) -> tuple[jax.Array]:
        keys, values = (kv.global_k, kv.global_v) if kind == "global" else (kv.local_k, kv.local_v)
        index = jnp.arange(capacity if kind == "global" else ring)
        if kind == "global":
            seen = index[None, :] <= position[:, None]
        else:  # slot j holds the newest position that is j modulo the ring's size, if there has been one
            seen = ring_positions(position, ring) >= 0
        return (attention_once(q, keys[slot].astype(q.dtype), values[slot].astype(q.dtype), seen, scale),)

    (out,) = by_kind(backbone, is_global, branch)
    return out.reshape(*q.shape[:2], -1), kv
