"""What decoding keeps between positions, and how a prompt fills it.

A `Cache` holds keys and values (a ring of the window for local layers, everything for global ones) and one state vector
a layer: the stream's share is L*D numbers a sequence, whatever the length.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sst_jax.model import decoder
from sst_jax.model.attention import KV, attend_cached, ropes
from sst_jax.model.config import ModelConfig
from sst_jax.model.decoder import Context, Layer, Params
from sst_jax.model.forward import Left, exact, feed, plain, project, rejoin, sweep
from sst_jax.model.state import Masks, initial, remember, thought


class Cache(NamedTuple):
    """Decoding state of B sequences. A donated argument of every function that returns a new one."""

    kv: KV
    state: jax.Array | None  # [L, B, D], the memory that enters the next step; None without a stream
    live: jax.Array  # bool [B], whether that memory holds anything
    length: jax.Array  # int32 [B], positions filled so far

    @property
    def capacity(self) -> int:
        return self.kv.global_k.shape[2]


def state_dtype(config: ModelConfig, dtype: jnp.dtype) -> jnp.dtype:
    """The type that states are stored in: `stream.dtype`, where float32 means "or wider"."""
    return jnp.dtype(jnp.bfloat16) if config.stream.dtype == "bfloat16" else jnp.promote_types(dtype, jnp.float32)


def init_cache(config: ModelConfig, batch: int, capacity: int, dtype: jnp.dtype) -> Cache:
    """An empty cache for `batch` sequences of at most `capacity` positions."""
    backbone = config.backbone
    count = backbone.layer_types.count
    heads = (backbone.num_kv_heads, backbone.head_dim)
    # A kind without layers keeps one empty stack of one layer, so that both branches have an array to look at.
    local = jnp.zeros((max(count("local"), 1), batch, min(backbone.window, capacity), *heads), dtype)
    glob = jnp.zeros((max(count("global"), 1), batch, capacity, *heads), dtype)
    state = None
    if config.stream is not None:
        state = jnp.zeros((backbone.num_layers, batch, backbone.d_model), state_dtype(config, dtype))
    return Cache(KV(local, local, glob, glob), state, jnp.zeros(batch, bool), jnp.zeros(batch, jnp.int32))


@functools.partial(jax.jit, static_argnames=("config", "capacity", "depth", "bos_id", "dtype"))
def prefill(
    config: ModelConfig, params: Params, tokens: jax.Array, lengths: jax.Array, *, capacity: int, depth: int = 1,
    bos_id: int | None = None, dtype: str = "float32",
) -> tuple[jax.Array, Cache]:  # fmt: skip
    """Solves the recurrence over right-padded prompts tokens [B, T] of `lengths` [B], as `stream.prefill` says.

    Returns the normed hidden state of each prompt's last position, [B, D], and the cache behind it.
    """
    backbone, (batch, length) = config.backbone, tokens.shape
    inside = jnp.arange(length)[None, :] < lengths[:, None]
    depth = depth if config.stream is not None else 1
    last = (lengths - 1) * depth + depth - 1
    context = decoder.row_context(config, tokens, inside.astype(jnp.int32), depth=depth, bos_id=bos_id, options={})
    solve = plain
    if config.stream is not None:
        solve = sweep if config.stream.prefill == "sweeps" else exact

    def rule(*arguments: Any) -> tuple[tuple, Left]:
        streams, left = solve(*arguments)
        if left.memory is not None:
            left = left._replace(memory=jnp.take_along_axis(left.memory, last[:, None, None], axis=1)[:, 0])
        return streams, left

    x = jnp.repeat(decoder.embed(config, params, tokens, jnp.dtype(dtype)), depth, axis=1)
    (x,), left = decoder.run_layers(params, rule, (x,), context)
    k, v, state = left.k, left.v, left.memory
    hidden = jnp.take_along_axis(x, last[:, None, None], axis=1)[:, 0]

    empty = init_cache(config, batch, capacity, jnp.dtype(dtype))
    kinds = np.array(backbone.layer_types)
    kv = empty.kv._replace(
        **{name: _into_ring(getattr(empty.kv, name), part[kinds == "local"], lengths)
           for name, part in (("local_k", k), ("local_v", v)) if "local" in kinds},
        **{name: getattr(empty.kv, name).at[:, :, :length].set(part[kinds == "global"])
           for name, part in (("global_k", k), ("global_v", v)) if "global" in kinds},
    )  # fmt: skip
    live = jnp.ones(batch, bool)
    if config.stream is not None and config.stream.initial == "skip_bos" and bos_id is not None:
        live = jnp.take_along_axis(tokens, lengths[:, None] - 1, axis=1)[:, 0] != bos_id
    return decoder.final_norm(config, params, hidden), Cache(kv, state, live, lengths)


def _into_ring(ring: jax.Array, part: jax.Array, lengths: jax.Array) -> jax.Array:
    """Keys or values [layers, B, T, K, H] as rings [layers, B, W, K, H]: slot j gets the newest p = j mod W."""
    slots = jnp.arange(ring.shape[2])
    newest = lengths[:, None] - 1 - (lengths[:, None] - 1 - slots[None, :]) % ring.shape[2]
    return jnp.take_along_axis(part, jnp.maximum(newest, 0)[None, :, :, None, None], axis=2)


def step(
    config: ModelConfig, params: Params, token: jax.Array, cache: Cache, depth: jax.Array, start: int = 0,
    bos_id: int | None = None, dtype: str = "float32", hidden: jax.Array | None = None,
) -> tuple[jax.Array, Cache]:  # fmt: skip
    """One position a row, iterated `depth` [B] times: the whole stack again for each, from the same token [B].

    Rows that have had their depth, or that have depth 0, keep everything as it was. With `start`=1 the last position
    is taken up again after its first iteration (which `prefill` ran); `hidden` is then what that iteration gave.

    Returns the normed hidden state [B, D] after each row's last iteration, and the cache one position on.
    """
    backbone, stream = config.backbone, config.stream
    batch = token.shape[0]
    position = cache.length - start
    if stream is None:
        depth = jnp.minimum(depth, 1)
    embedded = decoder.embed(config, params, token[:, None], jnp.dtype(dtype))
    if hidden is None:
        hidden = jnp.zeros((batch, backbone.d_model), embedded.dtype)
    tables = ropes(backbone, position[:, None])
    source = jnp.ones(batch, bool)
    if stream is not None and stream.initial == "skip_bos" and bos_id is not None:
        source = token != bos_id

    def iteration(carry: tuple) -> tuple:
        i, hidden, kv, state = carry
        active = i < depth
        masks = None
        if stream is not None:
            live = jnp.where(i == 0, cache.live, source)
            begins = ~live & (i == 0) & (position == 0) & (stream.initial in ("zero", "own"))
            masks = Masks(live[:, None, None], begins[:, None, None])
        write = active & ((i == 0) | (stream is None or stream.kv == "overwrite"))
        context = Context(config, tables, masks=masks)

        def rule(layer: Layer, streams: tuple, m: jax.Array | None, context: Context) -> tuple[tuple, jax.Array | None]:
            x, kv = streams
            q, k, v = project(layer, x, context)
            out, kv = attend_cached(backbone, layer.is_global, layer.slot, tables, position, write, q, k, v, kv)
            h = rejoin(layer, x, out)
            if stream is None:
                return (feed(layer, h, context, x.dtype)[0], kv), None
            s = jnp.where(layer.masks.live, m[:, None], initial(stream, x))
            o, f = feed(layer, h, context, x.dtype, s, layer.masks.blends)
            new = remember(stream, s, thought(stream, o, f), layer.masks.blends)[:, 0]
            return (o, kv), jnp.where(active[:, None], new, m)

        (x, kv), state = decoder.run_layers(params, rule, (embedded, kv), context, state)
        hidden = jnp.where(active[:, None], decoder.final_norm(config, params, x[:, 0]), hidden)
        return i + 1, hidden, kv, state

    begin = (jnp.int32(start), hidden, cache.kv, cache.state)
    _, hidden, kv, state = jax.lax.while_loop(lambda carry: carry[0] < jnp.max(depth), iteration, begin)
    moved = depth > 0
    return hidden, Cache(kv, state, jnp.where(moved, source, cache.live), jnp.where(moved, position + 1, cache.length))
