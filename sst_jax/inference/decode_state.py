"""What decoding keeps between positions, and the step that takes it one position on.

A `Cache` holds keys and values (a ring of the window for local layers, everything for global ones) and one state vector
a layer: the stream's share is L*D numbers a sequence, whatever the length. `inference/prefill.py` fills it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sst_jax.model import decoder
from sst_jax.model.attention import KV, attend_cached, ropes
from sst_jax.model.config import ModelConfig
from sst_jax.model.decoder import Context, Layer, Params
from sst_jax.model.rules import attention_residual, feed, project
from sst_jax.model.state import Masks, decay_state, initial_state, state_update


class Cache(NamedTuple):
    """Decoding state of B sequences. A donated argument of every function that returns a new one."""

    kv: KV
    state: jax.Array | None  # [L, B, D], the memory that enters the next step; None without a stream
    has_state: jax.Array  # bool [B], whether that memory holds anything
    length: jax.Array  # int32 [B], positions filled so far


def state_dtype(config: ModelConfig) -> jnp.dtype:
    """Return the type that states are stored in: `stream.dtype`, where float32 means "or wider"."""
    if config.stream.dtype == "bfloat16":
        return jnp.dtype(jnp.bfloat16)
    return jnp.promote_types(config.dtype, jnp.float32)


def init_cache(config: ModelConfig, batch: int, capacity: int) -> Cache:
    """An empty cache for `batch` sequences of at most `capacity` positions."""
    backbone = config.backbone
    count = backbone.layer_types.count
    heads = (backbone.num_kv_heads, backbone.head_dim)

    def stack(kind: str, slots: int) -> jax.Array:
        # A kind without layers keeps one empty stack of one layer, so that both branches have an array to look at.
        return jnp.zeros((max(count(kind), 1), batch, slots, *heads), jnp.dtype(config.dtype))

    ring = min(backbone.window or 1, capacity)
    kv = KV(stack("local", ring), stack("local", ring), stack("global", capacity), stack("global", capacity))
    state = None
    if config.stream is not None:
        state = jnp.zeros((backbone.num_layers, batch, backbone.d_model), state_dtype(config))
    return Cache(kv, state, jnp.zeros(batch, bool), jnp.zeros(batch, jnp.int32))


def bytes_per_sequence(config: ModelConfig, capacity: int) -> dict[str, int]:
    """Bytes of one sequence's cache: "state" (constant), "local" (bounded by the window), "global" (linear)."""
    cache = jax.eval_shape(lambda: init_cache(config, 1, capacity))

    def size(*arrays: Any) -> int:
        return sum(int(np.prod(array.shape)) * array.dtype.itemsize for array in arrays if array is not None)

    kv = cache.kv
    return {
        "state": size(cache.state),
        "local": size(kv.local_k, kv.local_v),
        "global": size(kv.global_k, kv.global_v),
    }


def map_rows(function: Callable[..., jax.Array], *caches: Cache) -> Cache:
    """`function(axis, *arrays)` on every array of caches, `axis` being the one that counts sequences."""
    axes = Cache(KV(1, 1, 1, 1), None if caches[0].state is None else 1, 0, 0)
    return jax.tree.map(function, axes, *caches)


def decode_step_at_depth(
    config: ModelConfig,
    params: Params,
    token: jax.Array,
    cache: Cache,
    depth: jax.Array,
    start: int = 0,
    hidden: jax.Array | None = None,
) -> tuple[jax.Array, Cache]:
    """`decode_step` without a tolerance: every row iterates `depth` [B] times. Returns hidden [B, D] and the cache."""
    never = jnp.zeros(depth.shape, jnp.float32)
    return decode_step(config, params, token, cache, depth, never, start, hidden)[:2]


def decode_step(
    config: ModelConfig,
    params: Params,
    token: jax.Array,
    cache: Cache,
    depth: jax.Array,
    tolerance: jax.Array,
    start: int = 0,
    hidden: jax.Array | None = None,
) -> tuple[jax.Array, Cache, jax.Array]:
    """One position a row, iterated up to `depth` [B] times: the whole stack again for each, from the same token [B].

    A row with a `tolerance` [B] above 0 stops before that, after the first iteration from the second on that moves its
    normed hidden state by no more than this share of its length. Rows that have stopped, or that have depth 0, keep
    everything as it was. With `start`=1 the last position is taken up again after its first iteration (which `prefill`
    ran); `hidden` is then what that iteration gave.

    Returns the normed hidden state [B, D] after each row's last iteration, the cache one position on, and how many
    iterations [B] each row has had at the position.
    """
    backbone, stream = config.backbone, config.stream
    batch = token.shape[0]
    position = cache.length - start
    if stream is None:
        depth = jnp.minimum(depth, 1)
    embedded = decoder.embed(config, params, token[:, None])
    if hidden is None:
        hidden = jnp.zeros((batch, backbone.d_model), embedded.dtype)
    tables = ropes(backbone, position[:, None])
    source = jnp.ones(batch, bool)
    if stream is not None and stream.initial == "skip_bos" and config.bos_id is not None:
        source = token != config.bos_id

    def iteration(carry: tuple) -> tuple:
        i, active, used, hidden, kv, state = carry
        masks = None
        if stream is not None:
            live = jnp.where(i == 0, cache.has_state, source)
            begins = ~live & (i == 0) & (position == 0) & (stream.initial in ("zero", "own"))
            masks = Masks(live[:, None, None], begins[:, None, None])
        write = active & ((i == 0) | (stream is None or stream.kv == "overwrite"))
        context = Context(config, tables, masks=masks)

        def rule(
            layer: Layer, residuals: tuple, m: jax.Array | None, context: Context
        ) -> tuple[tuple, jax.Array | None]:
            x, kv = residuals
            q, k, v = project(layer, x, context)
            out, kv = attend_cached(backbone, layer.is_global, layer.cache_index, tables, position, write, q, k, v, kv)
            h = attention_residual(layer, x, out)
            if stream is None:
                return (feed(layer, h, context, x.dtype)[0], kv), None
            s = jnp.where(layer.masks.has_state, m[:, None], initial_state(stream, x))
            o, f = feed(layer, h, context, x.dtype, s, layer.masks.blends)
            new = decay_state(stream, s, state_update(stream, o, f), layer.masks.blends)[:, 0]
            return (o, kv), jnp.where(active[:, None], new, m)

        (x, kv), state = decoder.run_layers(params, rule, (embedded, kv), context, state)
        new = decoder.final_norm(config, params, x[:, 0])
        still = _share_moved(new, hidden) <= tolerance
        going = active & (i + 1 < depth) & ~(still & (tolerance > 0.0) & (i > 0))
        return i + 1, going, used + active, jnp.where(active[:, None], new, hidden), kv, state

    used = jnp.where(depth > 0, start, 0)
    begin = (jnp.int32(start), depth > start, used, hidden, cache.kv, cache.state)
    _, _, used, hidden, kv, state = jax.lax.while_loop(lambda carry: jnp.any(carry[1]), iteration, begin)
    moved = depth > 0
    cache = Cache(kv, state, jnp.where(moved, source, cache.has_state), jnp.where(moved, position + 1, cache.length))
    return hidden, cache, used


def _share_moved(new: jax.Array, old: jax.Array) -> jax.Array:
    """|new - old| / |new| of each row, float32 [B]."""
    new, old = new.astype(jnp.float32), old.astype(jnp.float32)
    return jnp.linalg.norm(new - old, axis=-1) / jnp.maximum(jnp.linalg.norm(new, axis=-1), 1e-30)
