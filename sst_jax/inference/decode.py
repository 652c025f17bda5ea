"""The decode loop: prompts in, tokens out, a chunk of steps at a time on the device."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sst_jax.errors import InputError
from sst_jax.inference.cache import Cache, prefill, step
from sst_jax.inference.sampling import Sampling, sample
from sst_jax.model import decoder
from sst_jax.model.config import ModelConfig
from sst_jax.model.decoder import Params

CHUNK = 16  # tokens between two looks of the host at what was generated
BUCKET = 64  # prompts and caches are padded to multiples of this, so that few shapes are compiled


class Rows(NamedTuple):
    """A batch that is being decoded."""

    cache: Cache
    token: jax.Array  # int32 [B], the newest token of each row, not yet fed
    done: jax.Array  # bool [B]
    depth: jax.Array  # int32 [B]
    keys: jax.Array  # one key a row


def _next_token(
    params: Params, sampling: Sampling, hidden: jax.Array, cache: Cache, keys: jax.Array, stop_ids: tuple[int, ...]
) -> tuple[jax.Array, jax.Array]:
    """The next token of each row and whether it ends the row."""
    drawn = sample(sampling, decoder.head(params, hidden), jax.vmap(jax.random.fold_in)(keys, cache.length))
    stops = jnp.asarray(stop_ids, jnp.int32)
    return drawn, (drawn[:, None] == stops[None, :]).any(axis=1) if stop_ids else jnp.zeros(drawn.shape, bool)


@functools.partial(jax.jit, static_argnames=("config", "sampling", "stop_ids", "bos_id", "dtype"), donate_argnums=(2,))
def begin(
    config: ModelConfig, params: Params, cache: Cache, hidden: jax.Array, last: jax.Array, depth: jax.Array,
    keys: jax.Array, *, sampling: Sampling, stop_ids: tuple[int, ...], bos_id: int | None, dtype: str,
) -> Rows:  # fmt: skip
    """Draws the first token after `prefill`; iterates at the last prompt token [B], `last`, if the config says."""
    if config.stream is not None and config.stream.prompt == "last":
        hidden, cache = step(config, params, last, cache, depth, 1, bos_id, dtype, hidden)
    token, done = _next_token(params, sampling, hidden, cache, keys, stop_ids)
    return Rows(cache, token, done, depth, keys)


@functools.partial(
    jax.jit, static_argnames=("config", "count", "sampling", "stop_ids", "bos_id", "dtype"), donate_argnums=(2,)
)
def decode_chunk(
    config: ModelConfig, params: Params, rows: Rows, *, count: int, sampling: Sampling, stop_ids: tuple[int, ...],
    bos_id: int | None, dtype: str,
) -> tuple[jax.Array, Rows]:  # fmt: skip
    """Up to `count` more tokens a row, int32 [B, count]; -1 where a row had ended. Stops early when all rows have."""

    def more(carry: tuple) -> jax.Array:
        i, _, rows = carry
        return (i < count) & ~jnp.all(rows.done)

    def one(carry: tuple) -> tuple:
        i, out, rows = carry
        depth = jnp.where(rows.done, 0, rows.depth)
        hidden, cache = step(config, params, rows.token, rows.cache, depth, 0, bos_id, dtype)
        token, stopped = _next_token(params, sampling, hidden, cache, rows.keys, stop_ids)
        out = out.at[:, i].set(jnp.where(rows.done, -1, token))
        return i + 1, out, rows._replace(cache=cache, token=token, done=rows.done | stopped)

    out = jnp.full((rows.token.shape[0], count), -1, jnp.int32)
    _, out, rows = jax.lax.while_loop(more, one, (jnp.int32(0), out, rows))
    return out, rows


def generate_tokens(
    config: ModelConfig, params: Params, prompts: Sequence[Sequence[int]], *, depth: Sequence[int],
    max_new_tokens: int, sampling: Sampling, seeds: Sequence[int], stop_ids: tuple[int, ...], pad_id: int,
    bos_id: int | None, dtype: str,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:  # fmt: skip
    """Yields new tokens [B, n] (-1 after a row's end) and which rows have ended [B]; the first yield is one token.

    The receiver may `send` a bool [B] of rows to end (a stop string was seen). Greedy rows do not depend on each other.

    Raises: InputError on an empty prompt, a depth below 1, or more positions than the backbone has.
    """
    longest = max(len(prompt) for prompt in prompts)
    for number, (prompt, rounds) in enumerate(zip(prompts, depth, strict=True)):
        if not len(prompt):
            raise InputError(f"prompt {number} is empty: give at least one token")
        if rounds < 1:
            raise InputError(f"depth={rounds} of prompt {number} must be at least 1")
    if max_new_tokens < 1:
        raise InputError(f"max_new_tokens={max_new_tokens} must be at least 1")
    if longest + max_new_tokens > config.backbone.max_positions:
        raise InputError(
            f"a prompt of {longest} tokens and {max_new_tokens} new ones exceed the backbone's "
            f"{config.backbone.max_positions} positions"
        )
    length = -(-longest // BUCKET) * BUCKET
    capacity = -(-(length + max_new_tokens) // BUCKET) * BUCKET
    tokens = np.full((len(prompts), length), pad_id, np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = prompt
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    whole = config.stream is not None and config.stream.prompt == "all"
    if whole and len(set(depth)) > 1:
        raise InputError('stream.prompt="all" runs a batch of prompts at one depth: call once for each depth')

    hidden, cache = prefill(
        config, params, tokens, lengths, capacity=capacity, depth=depth[0] if whole else 1, bos_id=bos_id, dtype=dtype
    )
    settings = {"sampling": sampling, "stop_ids": stop_ids, "bos_id": bos_id, "dtype": dtype}
    keys = jax.vmap(jax.random.key)(jnp.asarray(seeds))
    last = tokens[np.arange(len(prompts)), lengths - 1]
    rows = begin(config, params, cache, hidden, last, jnp.asarray(depth, jnp.int32), keys, **settings)
    new, produced = np.asarray(rows.token)[:, None], 1
    while True:
        ended = yield new, np.asarray(rows.done)
        if ended is not None:
            rows = rows._replace(done=rows.done | jnp.asarray(ended))
        if produced >= max_new_tokens or bool(rows.done.all()):
            return
        # A full chunk even where fewer tokens are wanted: one program serves every length, the surplus is cut off.
        new, rows = decode_chunk(config, params, rows, count=CHUNK, **settings)
        new = np.asarray(new)[:, : max_new_tokens - produced]
        produced += new.shape[1]
