"""The caches of a batch: keys and values of earlier positions, and one state vector a layer.

Local layers keep a ring of the window, global layers keep every position. The stream's share is L*D numbers a sequence,
whatever the length. `prefill.py` fills a cache, `decode_state.py` takes it one position further.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sst_jax.model.attention import KV
from sst_jax.model.config import ModelConfig
from sst_jax.types import AnyArray, CacheStack, RowBools, RowInts, RowStates


class Cache(NamedTuple):
    """The caches of B sequences. A donated argument of every function that returns a new one."""

    kv: KV
    state: RowStates | None  # [L, B, D], enters the next step; None without a stream
    has_state: RowBools  # whether that state holds anything
    length: RowInts  # positions filled so far


def state_dtype(config: ModelConfig) -> jnp.dtype:
    """Return the type that states are stored in: `stream.dtype`, where float32 means "or wider"."""
    if config.stream is not None and config.stream.dtype == "bfloat16":
        return jnp.dtype(jnp.bfloat16)
    return jnp.promote_types(config.dtype, jnp.float32)


def init_cache(config: ModelConfig, batch: int, capacity: int) -> Cache:
    """Return an empty cache for `batch` sequences of at most `capacity` positions."""
    backbone = config.backbone
    count = backbone.layer_types.count

    def stack(kind: str, slots: int) -> CacheStack:
        one = backbone.of_kind(kind) if backbone.has_stacks_by_kind else backbone
        heads = (one.num_kv_heads, one.head_dim)
        # A kind without layers keeps one empty stack of one layer, so that both branches have an array to look at.
        return jnp.zeros((max(count(kind), 1), batch, slots, *heads), jnp.dtype(config.dtype))

    ring = min(backbone.window or 1, capacity)
    kv = KV(stack("local", ring), stack("local", ring), stack("global", capacity), stack("global", capacity))
    state = None
    if config.stream is not None:
        state = jnp.zeros((backbone.num_layers, batch, backbone.d_model), state_dtype(config))
    return Cache(kv, state, jnp.zeros(batch, bool), jnp.zeros(batch, jnp.int32))


def bytes_per_sequence(config: ModelConfig, capacity: int) -> dict[str, int]:
    """Return the bytes of one sequence's cache: "state" (constant), "local" (up to the window), "global" (linear)."""
    cache = jax.eval_shape(lambda: init_cache(config, 1, capacity))

    def size(*arrays: jax.ShapeDtypeStruct | None) -> int:
        return sum(int(np.prod(array.shape)) * array.dtype.itemsize for array in arrays if array is not None)

    kv = cache.kv
    return {
        "state": size(cache.state),
        "local": size(kv.local_k, kv.local_v),
        "global": size(kv.global_k, kv.global_v),
    }


def map_rows(function: Callable[..., AnyArray], *caches: Cache) -> Cache:
    """Apply `function(axis, *arrays)` to every array of caches; `axis` is the one that counts sequences."""
    places: Any = Cache(KV(*[1] * 4), None if caches[0].state is None else 1, 0, 0)  # type: ignore[arg-type]  # axes
    return jax.tree.map(function, places, *caches)
