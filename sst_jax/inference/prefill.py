"""How a prompt fills a cache: in chunks, each solved in parallel, states and caches handed from one to the next.

A chunk's attention needs a chunk of queries against what is cached, never all positions against all, and all full
chunks of all prompts are one program. Lengths are rounded up by `padded`, so that few others are compiled.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sst_jax.inference.decode_state import decode_step_at_depth
from sst_jax.inference.kv_cache import Cache, init_cache
from sst_jax.model import decoder, links
from sst_jax.model.attention import KV, Past, ring_positions
from sst_jax.model.compiler import program
from sst_jax.model.config import ModelConfig
from sst_jax.model.decoder import Context, Layer, Params, Residuals
from sst_jax.model.halves import with_joined_lora
from sst_jax.model.kinds import ByKind
from sst_jax.model.rules import SETTLED, Rule, exact, fixed_point_states, plain
from sst_jax.model.sharding import constrain_tree, device_put_sharded
from sst_jax.model.state import read_in
from sst_jax.types import AnyRowInts, CacheStack, Hidden, PositionKeys, RowHidden, RowInts, Tokens

CHUNK = 512  # positions that are solved together
SMALLEST = 64


def padded(length: int) -> int:
    """Return `length` rounded up to 64, 128, 256 or 512, or beyond that to full chunks and one of these."""
    full, rest = divmod(length, CHUNK)
    if rest == 0:
        return full * CHUNK
    tail = SMALLEST
    while tail < rest:
        tail *= 2
    return full * CHUNK + tail


def capacity_for(length: int) -> int:
    """Return the slots of a cache for `length` positions, so that every chunk of a `padded` prompt fits."""
    return padded(length) if length <= CHUNK else -(-length // CHUNK) * CHUNK


def prefill(
    config: ModelConfig,
    params: Params,
    tokens: Tokens,
    lengths: AnyRowInts,
    *,
    capacity: int,
    depth: int = 1,
    chunk: int = CHUNK,
) -> tuple[RowHidden, Cache]:
    """Solve the recurrence over right-padded prompts, as `stream.prefill` says.

    Args:
        config: of the model.
        params: the three trees.
        tokens: [B, T].
        lengths: [B], positions of each prompt.
        capacity: positions of the cache, as `capacity_for` rounds them.
        depth: iterations of every position.
        chunk: positions that are solved together.

    Returns:
        The normed hidden state [B, D] of each prompt's last position, and the cache after it.
    """
    *_, last = prefill_chunks(config, params, tokens, lengths, capacity=capacity, depth=depth, chunk=chunk)
    return last.hidden, last.cache


class PrefillChunk(NamedTuple):
    """A prompt up to the end of one of its chunks."""

    cache: Cache
    hidden: RowHidden  # normed, of the last position of each row so far
    positions: Hidden  # normed, of the chunk's positions; padding holds nothing of meaning


def prefill_chunks(
    config: ModelConfig,
    params: Params,
    tokens: Tokens,
    lengths: AnyRowInts,
    *,
    capacity: int,
    depth: int = 1,
    chunk: int = CHUNK,
) -> Iterator[PrefillChunk]:
    """Yield what `prefill` does, chunk by chunk; a cache is donated once the next chunk is asked for."""
    cache = device_put_sharded(init_cache(config, tokens.shape[0], capacity))
    hidden = jnp.zeros((tokens.shape[0], config.backbone.d_model), jnp.dtype(config.dtype))
    for at in range(0, tokens.shape[1], chunk):
        part = tokens[:, at : at + chunk]
        count = jnp.clip(lengths - at, 0, part.shape[1])
        hidden, positions, cache = fill_chunk(config, params, part, count, cache, hidden, fresh=at == 0, depth=depth)
        yield PrefillChunk(cache, hidden, positions)


class ChunkOutputs(NamedTuple):
    """What a chunk leaves in a layer."""

    k: PositionKeys | ByKind | None
    v: PositionKeys | ByKind | None
    state: RowHidden | None  # after each row's last position


@program(static_argnames=("config", "fresh", "depth"), donate_argnums=(4,))
@jax.named_scope("prefill")
def fill_chunk(
    config: ModelConfig,
    params: Params,
    tokens: Tokens,
    count: RowInts,
    cache: Cache,
    hidden: RowHidden,
    *,
    fresh: bool,
    depth: int,
) -> tuple[RowHidden, Hidden, Cache]:
    """Extend caches by right-padded tokens; rows with count 0 stay as they are.

    Args:
        config: of the model.
        params: the three trees.
        tokens: [B, T].
        count: [B], how many of a row's positions are real.
        cache: of the positions before; donated.
        hidden: [B, D], what rows with count 0 keep.
        fresh: the caches are empty, so that attention need not read them.
        depth: iterations of every position.

    Returns:
        The normed hidden state of each row's last position [B, D], those of all positions [B, T, D], and the caches.
    """
    stream = config.stream
    depth = depth if stream is not None else 1
    if stream is not None and stream.is_linked:
        return fill_linked(config, params, tokens, count, cache, hidden, fresh=fresh, depth=depth)
    context = chunk_context(config, tokens, count, cache, fresh=fresh, depth=depth)
    solve: Rule = plain
    if stream is not None:
        solve = fixed_point_states if stream.prefill == "sweeps" else exact
    last = jnp.maximum(count - 1, 0)
    last_step = last * depth + depth - 1

    def rule(
        layer: Layer, residuals: Residuals, before: RowHidden | None, context: Context
    ) -> tuple[Residuals, ChunkOutputs]:
        layer = with_joined_lora(layer, residuals[0].shape, residuals[0].dtype)  # once, for all sweeps
        residuals, left = solve(layer, residuals, before, context)
        state = left.state_out
        if state is not None:
            state = jnp.take_along_axis(state, last_step[:, None, None], axis=1)[:, 0]
        return residuals, ChunkOutputs(left.k, left.v, state)

    iterations, left = decoder.run(params, rule, tokens, context, None if fresh else cache.state)
    x = iterations[:, :, 0]

    return extended(config, tokens, count, cache, hidden, x, left)


def extended(
    config: ModelConfig,
    tokens: Tokens,
    count: RowInts,
    cache: Cache,
    hidden: RowHidden,
    x: Hidden,
    left: ChunkOutputs,
) -> tuple[RowHidden, Hidden, Cache]:
    """Return what `fill_chunk` does.

    Args:
      config: of the model.
      tokens: of the chunk, [B, T].
      count: how many of a row's positions are real.
      cache: of the positions before.
      hidden: what rows with count 0 keep.
      x: normed hidden states of the chunk's positions [B, T, D].
      left: what it left in the layers, [L, ...].
    """
    stream, going, last = config.stream, count > 0, jnp.maximum(count - 1, 0)
    hidden = jnp.where(going[:, None], jnp.take_along_axis(x, last[:, None, None], axis=1)[:, 0], hidden)
    state = cache.state
    if state is not None and left.state is not None:
        state = jnp.where(going[:, None], left.state, state)
    source = jnp.ones(tokens.shape[0], bool)
    if stream is not None and stream.initial == "skip_bos" and config.bos_id is not None:
        source = jnp.take_along_axis(jnp.asarray(tokens), last[:, None], axis=1)[:, 0] != config.bos_id
    live = jnp.where(going, source, cache.has_state)
    cache = Cache(update_kv_cache(config, cache, left, count), state, live, cache.length + count)
    return hidden, x, constrain_tree(cache)


def fill_linked(
    config: ModelConfig,
    params: Params,
    tokens: Tokens,
    count: RowInts,
    cache: Cache,
    hidden: RowHidden,
    *,
    fresh: bool,
    depth: int,
) -> tuple[RowHidden, Hidden, Cache]:
    """Return what `fill_chunk` does for a stream between layers: by passes of the stack, or position by position.

    Passes, `stream.sweep_cap` at most, end once the states stand still; where they do not, or with
    stream.prefill="sequential", the chunk is decoded. Arguments as for `fill_chunk`.
    """
    stream = config.stream
    assert stream is not None

    def sequential() -> tuple[RowHidden, Hidden, Cache]:
        def one(carry: tuple[RowHidden, Cache], column: tuple) -> tuple[tuple, RowHidden]:
            (hidden, cache), (token, place) = carry, column
            inside = place < count
            new, cache = decode_step_at_depth(config, params, token, cache, jnp.where(inside, depth, 0))
            return (jnp.where(inside[:, None], new, hidden), cache), new

        columns = (jnp.asarray(tokens).T, jnp.arange(tokens.shape[1]))
        (last, after), positions = jax.lax.scan(one, (hidden, cache), columns)
        return last, jnp.moveaxis(positions, 0, 1), constrain_tree(after)

    if stream.prefill == "sequential":
        return sequential()
    context = chunk_context(config, tokens, count, cache, fresh=fresh, depth=depth)
    last_step = jnp.maximum(count - 1, 0) * depth + depth - 1

    def keep(outputs: links.PassOutputs) -> ChunkOutputs:
        state = jnp.take_along_axis(outputs.state_out, last_step[:, None, None], axis=1)[:, 0]
        return ChunkOutputs(outputs.k, outputs.v, state)

    settled = links.fixed_point_stack(
        params, tokens, context, None if fresh else cache.state, cap=stream.sweep_cap, keep=keep
    )
    x = decoder.read_out(config, params, settled.x, depth)[:, :, 0]
    with jax.named_scope(SETTLED):
        return jax.lax.cond(
            settled.converged,
            lambda: extended(config, tokens, count, cache, hidden, x, settled.outputs),
            sequential,
        )


def chunk_context(
    config: ModelConfig,
    tokens: Tokens,
    count: RowInts,
    cache: Cache,
    *,
    fresh: bool,
    depth: int,
) -> Context:
    """Return the context of right-padded rows, `count` of whose positions are real, that continue from caches."""
    inside = jnp.arange(tokens.shape[1])[None, :] < count[:, None]
    positions = cache.length[:, None] + jnp.arange(tokens.shape[1])
    past = None if fresh else Past(cache.kv, cache.length)
    context = decoder.row_context(config, tokens, inside.astype(jnp.int32), positions, depth=depth)
    context = dataclasses.replace(context, past=past)
    if fresh or context.masks is None:
        return context
    # A chunk's first step is entered from the cache, and no document begins there.
    entered = cache.has_state & inside[:, 0] & read_in(context.stream, 0)
    live = context.masks.has_state.at[:, 0, 0].set(entered)
    begins = context.masks.is_initial.at[:, 0, 0].set(False)
    return dataclasses.replace(context, masks=context.masks._replace(has_state=live, is_initial=begins))


def update_kv_cache(config: ModelConfig, cache: Cache, left: ChunkOutputs, count: RowInts) -> KV:
    """Return the caches with the keys and values [L, B, T, K, H] of a chunk, `count` of whose positions are real."""
    kinds, kv = np.array(config.backbone.layer_types), cache.kv
    held = ring_positions(cache.length + count - 1, kv.local_k.shape[2]) - cache.length[:, None]  # [B, W], in the chunk

    def ring(old: CacheStack, new: CacheStack) -> CacheStack:
        taken = jnp.take_along_axis(new, jnp.maximum(held, 0)[None, :, :, None, None], axis=2)
        return jnp.where((held >= 0)[None, :, :, None, None], taken, old)

    # What padding leaves behind a row's end is never looked at, and is overwritten by the positions that come there.
    whole = jax.vmap(
        lambda old, new, at: jax.lax.dynamic_update_slice_in_dim(old, new, at, axis=1), in_axes=(1, 1, 0), out_axes=1
    )
    for kind, put, names in (
        ("local", ring, ("local_k", "local_v")),
        ("global", lambda old, new: whole(old, new, cache.length), ("global_k", "global_v")),
    ):
        if kind in kinds and left.k is not None and left.v is not None:
            for name, part in zip(names, (left.k, left.v), strict=True):
                mine = part.get(kind) if isinstance(part, ByKind) else part[kinds == kind]
                new = mine.astype(kv.local_k.dtype)
                kv = kv._replace(**{name: put(getattr(kv, name), new)})
    return kv
