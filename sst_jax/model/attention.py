"""Attention over whole sequences, and over caches for one position: rotation, masks, sliding windows.

Queries see keys of three sources: each position's last iteration (`last_iteration`), a cache of earlier positions
(`with_cache`), and their own iteration (`with_own_iteration`). Each gives a `Visible`; `attention` attends over it.

Local and global layers are the two branches of one `lax.cond`, so that each has its static window while all layers stay
one scan. The arithmetic is the library's, behind `attention`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sst_jax.errors import InputError
from sst_jax.model import compiler
from sst_jax.model.config import BackboneConfig
from sst_jax.model.kernels import KERNELS, fitting, same_document
from sst_jax.model.layers import rope_frequencies, rope_table, rotate
from sst_jax.types import (
    AttentionMask,
    AttentionOutput,
    CacheStack,
    Heads,
    KeysValues,
    OnePositionKeys,
    PositionKeys,
    Positions,
    Queries,
    QueryScale,
    Ring,
    RotaryTable,
    RowBools,
    RowInts,
    ScalarBool,
    ScalarInt,
    SeenKeys,
    SegmentIds,
)

LAYER_KIND = "layer_kind"  # scope of the branches (local, global), of which a plan counts each as often as it runs
SHARES = 8  # of a cache's slots, whose weighted values are added up apart
REDUCED = ("cuda", "rocm", "interpreted")  # platforms where one query is multiplied and added up, without products

Table = tuple[RotaryTable, RotaryTable]


class Ropes(NamedTuple):
    """Rotation tables of the two kinds of layer."""

    local: Table
    glob: Table
    query_scale: QueryScale | None = None  # of a backbone with `query_scaling`

    def of(self, kind: str) -> Table:
        """Return the tables of "local" or "global" layers."""
        return self.glob if kind == "global" else self.local


class QKV(NamedTuple):
    """What a layer projects its input to, not yet rotated."""

    q: Queries
    k: KeysValues
    v: KeysValues


class KV(NamedTuple):
    """Key/value caches, stacked over the layers of each kind, with its own heads, keys already rotated.

    Local layers keep a ring of W = min(window, S) slots, position p in slot p mod W; global layers keep all S.
    """

    local_k: CacheStack  # of W slots
    local_v: CacheStack
    global_k: CacheStack
    global_v: CacheStack

    def of(self, kind: str) -> tuple[CacheStack, CacheStack]:
        """Return keys and values of "local" or "global" layers."""
        return (self.global_k, self.global_v) if kind == "global" else (self.local_k, self.local_v)


class Past(NamedTuple):
    """The caches that rows continue from."""

    kv: KV
    length: RowInts  # positions that each row has in them


class Sequences(NamedTuple):
    """How whole sequences are attended over, the same in all layers.

    keep: what later positions see of a position's iterations, "overwrite" (the last) or "first".
    kernel: one of `model/kernels.py` after `pick`; iterations and rows with a past always take XLA's.
    """

    ropes: Ropes
    segment_ids: SegmentIds
    depth: int = 1
    keep: str = "overwrite"
    kernel: str = "xla"
    past: Past | None = None


class CachedStep(NamedTuple):
    """One position of every row that is being decoded, the same in all layers."""

    ropes: Ropes
    position: RowInts
    write: RowBools  # rows whose keys and values enter the caches
    seen: dict[tuple[str, int | None], SeenKeys]  # slots that a row sees of its caches, by kind of layer and window


class Visible(NamedTuple):
    """What queries see, besides what `is_causal` and `window` leave out."""

    keys: Heads  # [B', S, K, H]
    values: Heads
    mask: AttentionMask  # [B' or 1, 1, T, S]
    is_causal: bool = False
    window: int | None = None


def ring_positions(newest: RowInts, size: int) -> Ring:
    """Return the position that each slot of a ring holds, [B, size], when `newest` is the last; negative where none."""
    return newest[:, None] - (newest[:, None] - jnp.arange(size)) % size


def attention(q: Heads, visible: Visible, scale: float) -> Heads:
    """Return softmax attention, [B, T, N, H], of q over what it sees."""
    k, v, mask, is_causal, window = visible
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


def attention_once(q: Queries, k: Heads, v: Heads, seen: SeenKeys, scale: float) -> Queries:
    """Return `attention` of one query a row, [B, 1, N, H].

    The keys are the first factor of their product: with the library's order XLA transposes them on a CPU.

    Args:
      q: [B, 1, N, H].
      k: [B, S, K, H].
      v: [B, S, K, H].
      seen: which of the keys a row's query sees.
      scale: of the scores.
    """
    if compiler.platform() in REDUCED:
        return _reduced(q, k, v, seen, scale)
    if q.dtype == jnp.bfloat16:  # of several rows and heads, for which XLA's CPU backend lacks this product
        return attention(q, Visible(k, v, seen[:, None, None, :]), scale)
    rows, _, heads, size = k.shape
    wide = jnp.promote_types(q.dtype, jnp.float32)
    grouped = q.reshape(rows, heads, -1, size)
    scores = jax.lax.dot_general(k, grouped, (((3,), (3,)), ((0, 2), (0, 1))), preferred_element_type=wide)
    scores = jnp.where(seen[:, None, :, None], scores * scale, jnp.finfo(wide).min)  # [B, K, S, N/K]
    weights = jax.nn.softmax(scores, axis=2).astype(v.dtype)
    out = jax.lax.dot_general(weights, v, (((2,), (1,)), ((0, 1), (0, 2))), preferred_element_type=wide)
    return out.reshape(q.shape).astype(q.dtype)


def _reduced(q: Queries, k: Heads, v: Heads, seen: SeenKeys, scale: float) -> Queries:
    """Return `attention_once` by multiplying and adding up.

    XLA fuses that with the caches as they lie in memory. For products of one query with [B, S, K, H] it lays them out
    anew, all of them, in and out of every chunk of tokens.
    """
    rows, slots, heads, size = k.shape
    wide, shares = jnp.promote_types(q.dtype, jnp.float32), math.gcd(slots, SHARES)
    grouped = q.reshape(rows, heads, -1, size).astype(wide)
    # Masked before they are added up, or that is a kernel of its own; a sum of the least numbers is to stay finite.
    products = k.astype(wide)[:, :, :, None] * grouped[:, None]
    scores = jnp.where(seen[:, :, None, None, None], products, jnp.finfo(wide).min / (2 * size)).sum(-1) * scale
    weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(1, keepdims=True)))  # not yet divided by their sum

    def weighted(weights: jax.Array) -> jax.Array:
        return (v.astype(wide) * weights[..., None]).reshape(rows, shares, -1, heads, size).sum(2)

    # One sum for each query of a head: of all at once XLA lays wide values out anew. The barrier lets it take them in
    # one kernel, which reads the values once; as few sums of all slots it would compute from products in memory.
    sums = jax.lax.optimization_barrier([weighted(weights[..., j]) for j in range(grouped.shape[2])])
    out = jnp.stack([part.sum(1) for part in sums], axis=2) / weights.sum(1)[..., None]
    return out.reshape(q.shape).astype(q.dtype)


def ropes(backbone: BackboneConfig, positions: Positions) -> Ropes:
    """Return the tables for `positions`.

    Raises: InputError where the rows are longer than what LongRoPE's short divisors are for.
    """
    size, scale = backbone.num_rotated, backbone.rope_scale_global
    if backbone.rope_short and positions.shape[1] > backbone.position_limit:
        raise InputError(
            f"rows of {positions.shape[1]} positions need LongRoPE's long divisors (rope_scaling.long_factor), which "
            f"are not computed: use rows of at most {backbone.position_limit}"
        )
    local = rope_frequencies(size, backbone.rope_theta_local, 1.0)
    glob = rope_frequencies(
        backbone.global_head_dim or size,
        backbone.rope_theta_global,
        scale,
        backbone.rope_llama3,
        backbone.rope_yarn,
        backbone.rope_short,
    )
    if backbone.rope_angles_global is not None:
        glob = np.where(np.arange(len(glob)) < backbone.rope_angles_global, glob, np.zeros_like(glob))
    positions = jnp.asarray(positions)
    tables = Ropes(rope_table(positions, local), rope_table(positions, glob))
    if backbone.rope_magnitude != 1.0:
        cos, sin = tables.glob
        tables = tables._replace(glob=(cos * backbone.rope_magnitude, sin * backbone.rope_magnitude))
    if backbone.query_scaling is not None:
        beta, length = backbone.query_scaling
        wide = positions[..., None].astype(local.dtype)
        tables = tables._replace(query_scale=1.0 + beta * jnp.log1p(jnp.floor(wide / length)))
    return tables


def ropes_of_layer(tables: Ropes, rotates: ScalarBool | None) -> Ropes:
    """Return the tables of one layer: no rotation where it has none; `rotates` is None where all layers rotate."""
    if rotates is None:
        return tables
    local, glob = ((jnp.where(rotates, cos, 1.0), jnp.where(rotates, sin, 0.0)) for cos, sin in tables[:2])
    return tables._replace(local=local, glob=glob)


def rotate_queries(q: Heads, table: Table, scale: QueryScale | None) -> Heads:
    """Return queries rotated, and multiplied by their position's number where they are scaled by it."""
    q = rotate(q, table)
    return q if scale is None else q * scale[..., None].astype(q.dtype)


class LayerKind(NamedTuple):
    """One layer's attention."""

    is_global: ScalarBool
    cache_index: ScalarInt  # the layer's place among the layers that share its caches
    number: ScalarInt | None = None  # in `backbone.attention_kinds`; None: local ones are 0, global ones 1


def by_kind(backbone: BackboneConfig, layer: LayerKind, branch: Callable[[str, int | None], tuple]) -> tuple:
    """Return `branch(kind, window)` for this layer's kind; no `lax.cond` where all layers are of one kind."""
    kinds = backbone.attention_kinds
    if len(kinds) == 1:
        return branch(*kinds[0])
    with jax.named_scope(LAYER_KIND):
        if layer.number is None:
            return jax.lax.cond(layer.is_global, lambda: branch(*kinds[1]), lambda: branch(*kinds[0]))
        return jax.lax.switch(layer.number, [functools.partial(branch, *kind) for kind in kinds])


def table_of_layer(backbone: BackboneConfig, tables: Ropes, layer: LayerKind) -> Table:
    """Return the tables of a layer's kind.

    For few positions: to choose between tables takes fewer kernels than between what is rotated by either.
    """
    if len({kind for kind, _ in backbone.attention_kinds}) == 1:
        return tables.of(backbone.attention_kinds[0][0])
    cos, sin = (jnp.where(layer.is_global, glob, local) for glob, local in zip(tables.glob, tables.local, strict=True))
    return cos, sin


def attend_sequences(
    backbone: BackboneConfig, layer: LayerKind, qkv: QKV, sequences: Sequences
) -> tuple[AttentionOutput, tuple[PositionKeys, PositionKeys]]:
    """Attend causally within documents.

    Iteration i of a position sees the keys and values of earlier positions as their last iteration left them and its
    own from iteration i (keep="overwrite"), or all positions' from iteration 1 (keep="first").

    Args:
      backbone: heads, windows, scale.
      layer: its kind.
      qkv: of the layer's input.
      sequences: what all layers share.

    Returns:
      The output [B, T*I, N*H], and the keys and values [B, T, K, H] that a cache would now hold.
    """

    def branch(kind: str, window: int | None) -> tuple[jax.Array, jax.Array, jax.Array]:
        look = _Look(kind, _fitting(window, sequences.segment_ids.shape[1]), layer.cache_index, _scale(backbone))
        if sequences.depth == 1 and sequences.past is None:
            return _attend_positions(look, qkv, sequences)
        return _attend_iterations(look._replace(window=window), qkv, sequences)

    out, k, v = by_kind(backbone, layer, branch)
    return out.reshape(*out.shape[:2], -1), (k, v)


class _Look(NamedTuple):
    """How the layers of one kind look back."""

    kind: str
    window: int | None
    cache_index: ScalarInt
    scale: float


def _attend_positions(look: _Look, qkv: QKV, sequences: Sequences) -> tuple[Queries, PositionKeys, PositionKeys]:
    """Attend over sequences of one iteration, by the kernel that has been picked."""
    (q, k, v), segment_ids = qkv, sequences.segment_ids
    table = sequences.ropes.of(look.kind)
    q, k = rotate_queries(q, table, sequences.ropes.query_scale), rotate(k, table)
    kernel = fitting(sequences.kernel, q.shape[-1])
    if kernel in KERNELS:
        return KERNELS[kernel](q, k, v, segment_ids, look.scale, look.window), k, v
    visible = Visible(k, v, same_document(segment_ids), is_causal=True, window=look.window)
    return attention(q, visible, look.scale), k, v


def _attend_iterations(look: _Look, qkv: QKV, sequences: Sequences) -> tuple[Queries, PositionKeys, PositionKeys]:
    """Attend with the iterations side by side, [B * I, T, heads, H], and over caches where rows have a past."""
    depth, (batch, length) = sequences.depth, sequences.segment_ids.shape
    table, query_scale = jax.tree.map(
        lambda part: jnp.repeat(part, depth, axis=0), (sequences.ropes.of(look.kind), sequences.ropes.query_scale)
    )

    def side_by_side(part: jax.Array) -> jax.Array:
        part = jnp.moveaxis(part.reshape(batch, length, depth, *part.shape[2:]), 2, 1)
        return part.reshape(batch * depth, length, *part.shape[3:])

    q, k, v = (side_by_side(part) for part in qkv)
    q, k = rotate_queries(q, table, query_scale), rotate(k, table)
    kept = 0 if sequences.keep == "first" else depth - 1
    kept_k, kept_v = (part.reshape(batch, depth, *part.shape[1:])[:, kept] for part in (k, v))
    visible = last_iteration(kept_k, kept_v, sequences, _fitting(look.window, length))
    if sequences.past is not None:
        visible = with_cache(visible, look, sequences)
    if sequences.keep == "overwrite" and depth > 1:
        visible = with_own_iteration(visible, k, v)
    out = attention(q, visible, look.scale)
    out = jnp.moveaxis(out.reshape(batch, depth, length, *out.shape[2:]), 1, 2)
    return out.reshape(qkv.q.shape), kept_k, kept_v


def last_iteration(k: PositionKeys, v: PositionKeys, sequences: Sequences, window: int | None) -> Visible:
    """Return the keys that one iteration of each position has left, as all iterations see them.

    Args:
      k: [B, T, K, H], rotated.
      v: beside k.
      sequences: their documents, and how many iterations look.
      window: of the layer; None: everything before.
    """
    index, depth = jnp.arange(k.shape[1]), sequences.depth
    distance = index[:, None] - index[None, :]
    within = (distance >= 0) if window is None else (distance >= 0) & (distance < window)
    mask = same_document(sequences.segment_ids) & within
    k, v, mask = (jnp.repeat(part, depth, axis=0) for part in (k, v, mask))
    return Visible(k, v, mask)


def with_cache(visible: Visible, look: _Look, sequences: Sequences) -> Visible:
    """Return what is visible with the caches of the positions before behind it.

    Args:
      visible: of the positions that continue them.
      look: the layer's kind, window and caches.
      sequences: with a past.
    """
    assert sequences.past is not None
    (stack_k, stack_v), length = sequences.past.kv.of(look.kind), sequences.past.length
    rows, size = stack_k.shape[1:3]
    held = (
        jnp.broadcast_to(jnp.arange(size), (rows, size)) if look.kind == "global" else ring_positions(length - 1, size)
    )
    seen = ((held >= 0) & (held < length[:, None]))[:, None, :]
    count = sequences.segment_ids.shape[1]
    if look.window is not None:
        queries = length[:, None] + jnp.arange(count)
        seen = seen & (queries[:, :, None] - held[:, None, :] < look.window)
    seen = jnp.broadcast_to(seen, (rows, count, size))
    k, v, seen = (
        jnp.repeat(part, sequences.depth, axis=0)
        for part in (stack_k[look.cache_index], stack_v[look.cache_index], seen)
    )
    return Visible(
        jnp.concatenate([visible.keys, k.astype(visible.keys.dtype)], axis=1),
        jnp.concatenate([visible.values, v.astype(visible.values.dtype)], axis=1),
        jnp.concatenate([visible.mask, seen[:, None]], axis=-1),
    )


def with_own_iteration(visible: Visible, k: Heads, v: Heads) -> Visible:
    """Return what is visible with each query's own position replaced by its own iteration of it.

    The keys k and v [B * I, T, K, H] come behind the others, and each query sees its own alone.
    """
    length = k.shape[1]
    own = jnp.eye(length, dtype=bool)
    others = jnp.pad(own, ((0, 0), (0, visible.mask.shape[-1] - length)))
    return Visible(
        jnp.concatenate([visible.keys, k], axis=1),
        jnp.concatenate([visible.values, v], axis=1),
        jnp.concatenate([visible.mask & ~others, jnp.broadcast_to(own, (*visible.mask.shape[:-1], length))], axis=-1),
    )


def _fitting(window: int | None, length: int) -> int | None:
    """Return a window; None where a row of this length is seen whole."""
    return window if window is None or window < length else None


def _scale(backbone: BackboneConfig) -> float:
    return backbone.query_pre_attn_scalar**-0.5


class KeptStep(NamedTuple):
    """One step of whole rows, the same in all layers.

    ropes        of its position
    segment_ids  of the whole rows
    place        the position's, in its row
    writes       whether later positions see this step's keys and values
    """

    ropes: Ropes
    segment_ids: SegmentIds
    place: ScalarInt
    writes: ScalarBool


def attend_kept(
    backbone: BackboneConfig, layer: LayerKind, qkv: QKV, kept: tuple[PositionKeys, PositionKeys], step: KeptStep
) -> tuple[AttentionOutput, tuple[OnePositionKeys, OnePositionKeys]]:
    """Attend from one step of every row, [B, 1, ...], over the keys that the positions of the row have left so far.

    Args:
      backbone: heads, windows, scale.
      layer: its kind.
      qkv: of the step, not yet rotated.
      kept: keys, rotated, and values of all positions; those behind the step are not looked at.
      step: what all layers share.

    Returns:
      The output [B, 1, N*H], and what is to be kept at the step's place, [B, 1, K, H]: written there by the caller, for
      all layers at once. As part of the whole it would be written anew with all other places, in every layer.
    """
    (q, k, v), place = qkv, step.place

    table = table_of_layer(backbone, step.ropes, layer)
    q, k = rotate_queries(q, table, step.ropes.query_scale), rotate(k, table)

    def column(old: jax.Array, new: jax.Array) -> jax.Array:
        return jnp.where(step.writes, new.astype(old.dtype), jax.lax.dynamic_slice_in_dim(old, place, 1, axis=1))

    columns = column(kept[0], k), column(kept[1], v)
    keys, values = (
        jax.lax.dynamic_update_slice_in_dim(old, new, place, axis=1) for old, new in zip(kept, columns, strict=True)
    )
    segments = jnp.asarray(step.segment_ids)
    distance = place - jnp.arange(segments.shape[1])
    mine = segments == jax.lax.dynamic_slice_in_dim(segments, place, 1, axis=1)

    def branch(kind: str, window: int | None) -> tuple[jax.Array]:
        within = (distance >= 0) if window is None else (distance >= 0) & (distance < window)
        return (attention_once(q, keys, values, mine & within, _scale(backbone)),)

    (out,) = by_kind(backbone, layer, branch)
    return out.reshape(*q.shape[:2], -1), columns


def seen_slots(backbone: BackboneConfig, position: RowInts, kv: KV) -> dict[tuple[str, int | None], SeenKeys]:
    """Return which slots of its caches a row sees at a position, by kind of layer and window."""
    found = {}
    for kind, window in backbone.attention_kinds:
        size = kv.of(kind)[0].shape[2]
        if kind == "global":
            held = jnp.arange(size)[None, :]
            seen = held <= position[:, None]
        else:  # slot j holds the newest position that is j modulo the ring's size, if there has been one
            held = ring_positions(position, size)
            seen = held >= 0
        if window is not None and window < size:
            seen = seen & (position[:, None] - held < window)
        found[kind, window] = seen
    return found


def attend_cached(
    backbone: BackboneConfig, layer: LayerKind, qkv: QKV, step: CachedStep, kv: KV
) -> tuple[AttentionOutput, KV]:
    """Attend from one position a row over the caches, which take in its key and value first.

    Args:
      backbone: heads, windows, scale.
      layer: its kind.
      qkv: of one position a row.
      step: where the rows stand, and which of them write.
      kv: the caches.

    Returns:
      The output [B, 1, N*H] and the caches.
    """
    (q, k, v), position = qkv, step.position
    rows = jnp.arange(q.shape[0])
    ring = kv.local_k.shape[2]

    def put(cache: jax.Array, new: jax.Array, mine: jax.Array, index: jax.Array) -> jax.Array:
        if cache.shape[-2:] != new.shape[-2:]:  # the other kind's, where kinds have shapes of their own
            return cache
        # An index past the end drops the write: for rows that keep what they have, and for the other kind's stack.
        row = jnp.where(step.write & mine, rows, cache.shape[1])
        return cache.at[layer.cache_index, row, index].set(new[:, 0].astype(cache.dtype), mode="drop")

    table = table_of_layer(backbone, step.ropes, layer)
    q, k = rotate_queries(q, table, step.ropes.query_scale), rotate(k, table)
    local, glob = ~layer.is_global, layer.is_global
    kv = KV(
        put(kv.local_k, k, local, position % ring),
        put(kv.local_v, v, local, position % ring),
        put(kv.global_k, k, glob, position),
        put(kv.global_v, v, glob, position),
    )

    def branch(kind: str, window: int | None) -> tuple[jax.Array]:
        keys, values = (stack[layer.cache_index].astype(q.dtype) for stack in kv.of(kind))
        return (attention_once(q, keys, values, step.seen[kind, window], _scale(backbone)),)

    (out,) = by_kind(backbone, layer, branch)
    return out.reshape(*q.shape[:2], -1), kv
