"""The decode loop: prompts in, tokens out, a chunk of steps at a time on the device."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sst_jax.errors import InputError
from sst_jax.inference.decode_state import Cache, decode_step, map_rows
from sst_jax.inference.policies import DepthBudget, Policy, as_policy, depth_budget, selected_depth
from sst_jax.inference.prefill import capacity_for, padded, prefill
from sst_jax.inference.sampling import Sampling, SamplingParams, Scores, sample, sampling_params, score
from sst_jax.model import decoder
from sst_jax.model.config import ModelConfig
from sst_jax.model.decoder import Params
from sst_jax.model.sharding import constrain

CHUNK = 16  # tokens between two looks of the host at what was generated


class DecodeState(NamedTuple):
    """A batch that is being decoded."""

    cache: Cache
    token: jax.Array  # int32 [B], the newest token of each row, not yet fed
    done: jax.Array  # bool [B]
    left: jax.Array  # int32 [B], how many tokens a row may still draw
    depth_budget: DepthBudget
    sampling_params: SamplingParams


class SampledTokens(NamedTuple):
    """Tokens of every row, [B, n] each; where a row had ended its token is -1."""

    tokens: jax.Array
    depths: jax.Array  # iterations at the position that each token came from
    scores: Scores | None  # where they were asked for


STATIC = ("config", "stop_ids", "top")


def _draw(
    params: Params, rows: DecodeState, hidden: jax.Array, stop_ids: tuple[int, ...], top: int, scored: jax.Array | None
) -> tuple[DecodeState, Scores | None]:
    """Rows with their next token, the first of those that `rows.left` still counts, and its scores."""
    logits = decoder.head(params, hidden)
    token = sample(rows.sampling_params, logits, rows.cache.length)
    scores = None
    if top:
        shapes = jax.eval_shape(lambda: score(logits, token, top))
        nothing = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
        scores = jax.lax.cond(scored, lambda: score(logits, token, top), lambda: nothing)
    stopped = jnp.isin(token, jnp.asarray(stop_ids, jnp.int32)) | (rows.left <= 1)
    ended = rows.done | stopped
    left = jnp.where(rows.done, rows.left, rows.left - 1)
    return rows._replace(token=jnp.where(rows.done, rows.token, token), done=ended, left=left), scores


@functools.partial(jax.jit, static_argnames=(*STATIC, "prompt"), donate_argnums=(2,))
def begin(
    config: ModelConfig,
    params: Params,
    cache: Cache,
    hidden: jax.Array,
    last: jax.Array,
    left: jax.Array,
    depth_budget: DepthBudget,
    sampling_params: SamplingParams,
    *,
    prompt: str,
    stop_ids: tuple[int, ...],
    top: int = 0,
    scored: jax.Array | None = None,
) -> tuple[SampledTokens, DecodeState]:
    """Draws the first token [B, 1] after `prefill`.

    last: the last prompt token [B], at which depth begins with prompt="last" (see StreamConfig; "all" says that the
    prompt has been iterated already). left: how many tokens [B] each row may draw, this one included. top, scored: as
    for `decode_chunk`.
    """
    used = jnp.ones_like(last)
    if prompt == "last":
        hidden, cache, used = decode_step(
            config, params, last, cache, depth_budget.now, depth_budget.tolerance, 1, hidden
        )
    elif prompt == "all":
        used = depth_budget.now
    if prompt != "none":
        depth_budget = depth_budget._replace(now=depth_budget.rest)
    rows = DecodeState(cache, last, jnp.zeros(last.shape, bool), left, depth_budget, sampling_params)
    rows, scores = _draw(params, rows, hidden, stop_ids, top, scored)
    return _seen(SampledTokens(*jax.tree.map(lambda part: part[:, None], (rows.token, used, scores))), rows)


@functools.partial(jax.jit, static_argnames=(*STATIC, "size"), donate_argnums=(2,))
def decode_chunk(
    config: ModelConfig,
    params: Params,
    rows: DecodeState,
    count: jax.Array | int,
    *,
    stop_ids: tuple[int, ...],
    top: int = 0,
    scored: jax.Array | None = None,
    size: int = CHUNK,
) -> tuple[SampledTokens, DecodeState]:
    """`count` <= `size` more tokens a row, in columns [B, size]. Stops early when all rows have ended.

    top: above 0, tokens come with their scores and those of the `top` likeliest, where `scored` (bool []) is true.
    """

    def more(carry: tuple) -> jax.Array:
        i, _, rows = carry
        return (i < count) & ~jnp.all(rows.done)

    def one(carry: tuple) -> tuple:
        i, out, rows = carry
        depth = jnp.where(rows.done, 0, rows.depth_budget.now)
        hidden, cache, used = decode_step(config, params, rows.token, rows.cache, depth, rows.depth_budget.tolerance)
        moved = rows._replace(cache=cache, depth_budget=rows.depth_budget._replace(now=rows.depth_budget.rest))
        after, scores = _draw(params, moved, hidden, stop_ids, top, scored)
        new = SampledTokens(jnp.where(rows.done, -1, after.token), used, scores)
        return i + 1, jax.tree.map(lambda column, part: column.at[:, i].set(part), out, new), after

    batch = rows.token.shape[0]
    whole = jnp.full((batch, size), -1, jnp.int32)
    scores = None
    if top:
        wide = jnp.promote_types(config.dtype, jnp.float32)
        scores = Scores(
            jnp.zeros((batch, size), wide),
            jnp.zeros((batch, size, top), jnp.int32),
            jnp.zeros((batch, size, top), wide),
        )
    _, out, rows = jax.lax.while_loop(more, one, (jnp.int32(0), SampledTokens(whole, whole, scores), rows))
    return _seen(out, rows)


def _seen(drawn: SampledTokens, rows: DecodeState) -> tuple[SampledTokens, DecodeState]:
    """The same, with what the host looks at on every device of a mesh."""
    everywhere = functools.partial(jax.tree.map, lambda part: constrain(part, *[None] * part.ndim))
    return everywhere(drawn), rows._replace(done=everywhere(rows.done))


@jax.jit
def pick_rows(cache: Cache, hidden: jax.Array, index: jax.Array) -> tuple[Cache, jax.Array]:
    """Copies of the sequences `index` [B'] of caches and hidden states, as often as each is named."""
    return map_rows(lambda axis, part: jnp.take(part, index, axis=axis), cache), hidden[index]


def check(
    config: ModelConfig, prompts: Sequence[Sequence[int]], policies: Sequence[Policy], max_new_tokens: int
) -> None:
    """Raises InputError on an empty prompt, or more positions than the backbone has."""
    for number, prompt in enumerate(prompts):
        if not len(prompt):
            raise InputError(f"prompt {number} is empty: give at least one token")
    if max_new_tokens < 1:
        raise InputError(f"max_new_tokens={max_new_tokens} must be at least 1")
    longest = max(len(prompt) for prompt in prompts)
    if longest + max_new_tokens > config.backbone.max_positions:
        raise InputError(
            f"a prompt of {longest} tokens and {max_new_tokens} new ones exceed the backbone's "
            f"{config.backbone.max_positions} positions"
        )
    if prompt_mode(config) == "all":
        for policy in policies:
            if policy.tolerance:
                raise InputError(f'stream.prompt="all" runs a prompt at one depth, which {policy.name} does not name')


def prompt_mode(config: ModelConfig) -> str:
    """`stream.prompt`; without a stream nothing is iterated."""
    return "none" if config.stream is None else config.stream.prompt


def prompt_depth(prompt: str, policy: Policy) -> int:
    """Iterations at every position of a prompt that is treated as `prompt` says."""
    return policy.first if prompt == "all" else 1


class Chunk(NamedTuple):
    """What the host sees: new tokens [B, n], -1 after a row's end, their depths, and which rows have ended [B]."""

    tokens: np.ndarray
    depths: np.ndarray
    done: np.ndarray


def generate_tokens(
    config: ModelConfig,
    params: Params,
    prompts: Sequence[Sequence[int]],
    *,
    depth: Sequence[int | str | Policy],
    max_new_tokens: int,
    sampling: Sampling,
    seeds: Sequence[int],
    stop_ids: tuple[int, ...],
    pad_id: int,
) -> Iterator[Chunk]:
    """Yields new tokens of every prompt, the first chunk being one token; prompts that are equal are prefilled once.

    The receiver may `send` a bool [B] of rows to end (a stop string was seen). Rows do not depend on each other.

    Raises: InputError as `check`, and on a depth that is none.
    """
    policies = [as_policy(each) for each in depth]
    check(config, prompts, policies, max_new_tokens)
    prompt = prompt_mode(config)
    asked = [(prompt_depth(prompt, policy), tuple(each)) for each, policy in zip(prompts, policies, strict=True)]
    # Equal prompts once, and those of one depth together.
    distinct = sorted(dict.fromkeys(asked), key=lambda one: one[0])
    longest = max(len(each) for each in prompts)
    capacity, filled = capacity_for(longest + max_new_tokens), []
    for deep, several in itertools.groupby(distinct, key=lambda one: one[0]):
        rows_here = [each for _, each in several]
        tokens = np.full((len(rows_here), padded(longest)), pad_id, np.int32)
        for row, each in zip(tokens, rows_here, strict=True):
            row[: len(each)] = each
        lengths = np.array([len(each) for each in rows_here], np.int32)
        filled.append(prefill(config, params, tokens, lengths, capacity=capacity, depth=deep))
    hidden, cache = filled[0]
    if len(filled) > 1:
        hidden = jnp.concatenate([hidden for hidden, _ in filled])
        cache = map_rows(lambda axis, *parts: jnp.concatenate(parts, axis), *(cache for _, cache in filled))
    if distinct != asked:
        cache, hidden = pick_rows(cache, hidden, np.array([distinct.index(one) for one in asked]))

    last = np.array([each[-1] for each in prompts], np.int32)
    left = np.full(len(prompts), max_new_tokens, np.int32)
    drawn, rows = begin(
        config,
        params,
        cache,
        hidden,
        last,
        left,
        depth_budget(policies),
        sampling_params([sampling] * len(prompts), seeds),
        prompt=prompt,
        stop_ids=stop_ids,
    )
    # Where depth begins at the first token's own position, that one step goes before the choice.
    waiting = any(policy.select_depth for policy in policies)
    unmoved = prompt == "none"
    while True:
        if waiting and not unmoved:
            rows, waiting = route(rows, policies), False
        ended = yield Chunk(np.asarray(drawn.tokens), np.asarray(drawn.depths), np.asarray(rows.done))
        if ended is not None:
            rows = rows._replace(done=rows.done | jnp.asarray(ended))
        if bool(rows.done.all()):
            return
        drawn, rows = decode_chunk(config, params, rows, 1 if waiting else CHUNK, stop_ids=stop_ids)
        unmoved = False


def route(rows: DecodeState, policies: Sequence[Policy]) -> DecodeState:
    """Rows that go on as their policies choose from the states at hand."""
    if rows.cache.state is None:
        return rows
    states, rest = np.asarray(rows.cache.state), np.array(rows.depth_budget.rest)
    for row, policy in enumerate(policies):
        if policy.select_depth:
            rest[row] = selected_depth(policy, states[:, row])
    return rows._replace(depth_budget=rows.depth_budget._replace(now=jnp.asarray(rest), rest=jnp.asarray(rest)))
