"""What a `Session` runs on the device: a prompt's first token, a chunk of tokens, rows taken and put.

Each function is compiled once for each shape and each of its static arguments.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sst_jax.inference.decode_state import DecodeState, decode_step
from sst_jax.inference.kv_cache import Cache, map_rows
from sst_jax.inference.sampling import Scores, SpecialTokens, sample, score
from sst_jax.model import decoder
from sst_jax.model.compiler import program
from sst_jax.model.config import ModelConfig
from sst_jax.model.decoder import Params
from sst_jax.model.sharding import constrain
from sst_jax.types import (
    AnyArray,
    AnyRowInts,
    PickedHidden,
    PickedRows,
    PositionHidden,
    PositionTokens,
    RowHidden,
    ScalarBool,
    ScalarInt,
)

CHUNK = 16  # tokens between two looks of the host at what was generated
BLOCK = 64  # prompt positions whose logits over the vocabulary are in memory together


class SampledTokens(NamedTuple):
    """New tokens of every row: jax arrays in a compiled program, numpy arrays from a session."""

    tokens: AnyArray  # int32 [B, n]; -1 where a row had ended
    depths: AnyArray  # int32 [B, n], iterations at the position that each token came from
    done: AnyArray  # bool [B], rows that have ended
    scores: Scores | None = None  # where they were asked for


STATIC = ("config", "special", "top")


def _sample(
    config: ModelConfig,
    params: Params,
    state: DecodeState,
    hidden: RowHidden,
    special: SpecialTokens,
    top: int,
    scored: ScalarBool | None,
) -> tuple[DecodeState, Scores | None]:
    """Return the state with every row's next token, counted off `state.left`, and the tokens' scores."""
    logits = decoder.head(config, params, hidden)
    choice = logits.at[:, list(special.suppressed)].set(-jnp.inf) if special.suppressed else logits
    token = sample(state.sampling_params, choice, state.cache.length)
    scores = None
    if top:
        shapes = jax.eval_shape(lambda: score(logits, token, top))
        nothing = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
        scores = jax.lax.cond(scored, lambda: score(logits, token, top), lambda: nothing)
    stopped = jnp.isin(token, jnp.asarray(special.stop_ids, jnp.int32)) | (state.left <= 1)
    ended = state.done | stopped
    left = jnp.where(state.done, state.left, state.left - 1)
    return state._replace(token=jnp.where(state.done, state.token, token), done=ended, left=left), scores


@program(static_argnames=(*STATIC, "iterated"), donate_argnums=(2,))
def begin(
    config: ModelConfig,
    params: Params,
    state: DecodeState,
    hidden: RowHidden,
    *,
    iterated: str,
    special: SpecialTokens,
    top: int = 0,
    scored: ScalarBool | None = None,
) -> tuple[SampledTokens, DecodeState]:
    """Sample the first token [B, 1] after prefilling.

    Args:
        state: fresh rows, whose `token` is the last prompt token.
        hidden: [B, D], of the last prompt position after its first iteration.
        iterated: which prompt positions have the depth, as `StreamConfig` says: "last" begins with the last one, "all"
            were iterated while they were prefilled, "none".
        special, top, scored: as for `decode_chunk`.
    """
    budget = state.depth_budget
    used: AnyRowInts = jnp.ones_like(state.token)
    if iterated == "last":
        hidden, cache, used = decode_step(
            config, params, state.token, state.cache, budget.now, budget.halting, start=1, hidden=hidden
        )
        state = state._replace(cache=cache)
    elif iterated == "all":
        used = budget.now
    if iterated != "none":
        state = state._replace(depth_budget=budget._replace(now=budget.rest))
    state, scores = _sample(config, params, state, hidden, special, top, scored)
    columns = jax.tree.map(lambda part: part[:, None], (state.token, used, scores))
    return _seen(SampledTokens(columns[0], columns[1], state.done, columns[2]), state)


@program(static_argnames=(*STATIC, "size"), donate_argnums=(2,))
def decode_chunk(
    config: ModelConfig,
    params: Params,
    state: DecodeState,
    count: ScalarInt | int,
    *,
    special: SpecialTokens,
    top: int = 0,
    scored: ScalarBool | None = None,
    size: int = CHUNK,
) -> tuple[SampledTokens, DecodeState]:
    """Decode `count` <= `size` more tokens a row, in columns [B, size]; stop early when all rows have ended.

    Args:
        state: donated.
        special: tokens that end a row, or are never chosen.
        top: above 0, tokens come with their scores and those of the `top` best, where `scored` (bool []) is true.
    """

    def more(carry: tuple) -> ScalarBool:
        i, _, state = carry
        return (i < count) & ~jnp.all(state.done)

    def one(carry: tuple) -> tuple:
        i, columns, state = carry
        budget = state.depth_budget
        depth = jnp.where(state.done, 0, budget.now)
        hidden, cache, used = decode_step(config, params, state.token, state.cache, depth, budget.halting)
        moved = state._replace(cache=cache, depth_budget=budget._replace(now=budget.rest))
        after, scores = _sample(config, params, moved, hidden, special, top, scored)
        new = (jnp.where(state.done, -1, after.token), used, scores)
        return i + 1, jax.tree.map(lambda column, part: column.at[:, i].set(part), columns, new), after

    batch = state.token.shape[0]
    whole = jnp.full((batch, size), -1, jnp.int32)
    scores = None
    if top:
        kind = jnp.promote_types(config.dtype, jnp.float32)
        several = jnp.zeros((batch, size, top), kind)
        scores = Scores(jnp.zeros((batch, size), kind), jnp.zeros((batch, size, top), jnp.int32), several)
    _, (tokens, depths, scores), state = jax.lax.while_loop(more, one, (jnp.int32(0), (whole, whole, scores), state))
    return _seen(SampledTokens(tokens, depths, state.done, scores), state)


def _seen(sampled: SampledTokens, state: DecodeState) -> tuple[SampledTokens, DecodeState]:
    """Return the same, with all that the host reads on every device of a mesh."""
    sampled = jax.tree.map(lambda part: constrain(part, *[None] * part.ndim), sampled)
    return sampled, state._replace(done=sampled.done)


@jax.jit
def pick_rows(cache: Cache, hidden: RowHidden, index: PickedRows) -> tuple[Cache, PickedHidden]:
    """Return copies of the sequences `index` [B'] of caches and hidden states, as often as each is named."""
    return map_rows(lambda axis, part: jnp.take(part, index, axis=axis), cache), hidden[index]


@functools.partial(jax.jit, donate_argnums=(0,))
def seat(batch: DecodeState, one: DecodeState, row: ScalarInt) -> DecodeState:
    """Return the batch with the only row of `one` at `row`."""

    def put(axis: int, whole: AnyArray, new: AnyArray) -> AnyArray:
        return jax.lax.dynamic_update_slice_in_dim(whole, new.astype(whole.dtype), row, axis)

    rest = jax.tree.map(functools.partial(put, 0), tuple(batch[1:]), tuple(one[1:]))
    return DecodeState(map_rows(put, batch.cache, one.cache), *rest)


@program(static_argnames=("config", "top"))
def score_positions(
    config: ModelConfig, params: Params, hidden: PositionHidden, following: PositionTokens, *, top: int
) -> Scores:
    """Score the tokens `following` [T] the positions of hidden [T, D], a block of logits at a time."""
    blocks = hidden.reshape(-1, min(BLOCK, hidden.shape[0]), hidden.shape[1])
    found = jax.lax.map(
        lambda part: score(decoder.head(config, params, part[0]), part[1], top),
        (blocks, following.reshape(blocks.shape[:2])),
    )
    return jax.tree.map(lambda part: part.reshape(-1, *part.shape[2:]), found)


def each_score(scores: Scores, count: int) -> list[Scores]:
    """Return the first `count` of stacked scores, one by one, as numpy."""
    whole = jax.tree.map(np.asarray, scores)
    return [jax.tree.map(lambda part, at=at: part[at], whole) for at in range(count)]
