"""The one driver of decoding, under `Model`, evaluation and the server alike: prefill, step, stop.

A `Session` holds a batch of rows. Requests begin together (`start`: a batch that is answered as a whole) or one by one
in free rows (`prefill_prompt`, then `admit`: continuous batching). Each `step` decodes a chunk of tokens for all rows
on the device, and `stop` frees rows whose answers have ended. Rows are independent: a row computes the same numbers
with any neighbours.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Collection, Generator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sst_jax.errors import InputError
from sst_jax.inference.decode_state import DecodeState, decode_step
from sst_jax.inference.kv_cache import Cache, init_cache, map_rows
from sst_jax.inference.policies import DepthBudget, Halting, Policy, depth_budget, flat, selected_depth
from sst_jax.inference.prefill import capacity_for, padded, prefill, prefill_chunks
from sst_jax.inference.sampling import Sampling, SamplingParams, Scores, sample, sampling_params, score
from sst_jax.model import decoder
from sst_jax.model.config import ModelConfig
from sst_jax.model.decoder import Params
from sst_jax.model.sharding import constrain
from sst_jax.types import AnyRowInts, RowHidden, RowInts

CHUNK = 16  # tokens between two looks of the host at what was generated
ONCE, GREEDY = flat(1), Sampling()
BLOCK = 64  # prompt positions whose logits over the vocabulary are in memory together


@dataclasses.dataclass(frozen=True)
class Request:
    """One answer to one prompt.

    tokens         of the prompt
    stop           strings that end the answer; the session leaves them to its caller, who sees the text
    scored         with log-probabilities of the new tokens
    prompt_scored  and of the prompt's own, all of whose positions then have the depth policy.first
    """

    tokens: tuple[int, ...]
    max_new_tokens: int
    policy: Policy = ONCE
    sampling: Sampling = GREEDY
    seed: int = 0
    stop: tuple[str, ...] = ()
    scored: bool = False
    prompt_scored: bool = False


class SampledTokens(NamedTuple):
    """New tokens of every row: jax arrays in a compiled program, numpy arrays from a session."""

    tokens: jax.Array | np.ndarray  # int32 [B, n]; -1 where a row had ended
    depths: jax.Array | np.ndarray  # int32 [B, n], iterations at the position that each token came from
    done: jax.Array | np.ndarray  # bool [B], rows that have ended
    scores: Scores | None = None  # where they were asked for


class PrefilledPrompt(NamedTuple):
    """Prompts that have been read: copies of them may begin any number of answers."""

    cache: Cache
    hidden: RowHidden  # of each prompt's last position
    scores: list[Scores]  # of one prompt's own tokens but the first, where they were asked for


# ---------------------------------------------------------------------------------------------- Compiled on the device

STATIC = ("config", "stop_ids", "top")


def _sample(
    params: Params,
    state: DecodeState,
    hidden: RowHidden,
    stop_ids: tuple[int, ...],
    top: int,
    scored: jax.Array | None,
) -> tuple[DecodeState, Scores | None]:
    """Return the state with every row's next token, counted off `state.left`, and the tokens' scores."""
    logits = decoder.head(params, hidden)
    token = sample(state.sampling_params, logits, state.cache.length)
    scores = None
    if top:
        shapes = jax.eval_shape(lambda: score(logits, token, top))
        nothing = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
        scores = jax.lax.cond(scored, lambda: score(logits, token, top), lambda: nothing)
    stopped = jnp.isin(token, jnp.asarray(stop_ids, jnp.int32)) | (state.left <= 1)
    ended = state.done | stopped
    left = jnp.where(state.done, state.left, state.left - 1)
    return state._replace(token=jnp.where(state.done, state.token, token), done=ended, left=left), scores


@functools.partial(jax.jit, static_argnames=(*STATIC, "iterated"), donate_argnums=(2,))
def begin(
    config: ModelConfig,
    params: Params,
    state: DecodeState,
    hidden: RowHidden,
    *,
    iterated: str,
    stop_ids: tuple[int, ...],
    top: int = 0,
    scored: jax.Array | None = None,
) -> tuple[SampledTokens, DecodeState]:
    """Sample the first token [B, 1] after prefilling.

    Args:
        state: fresh rows, whose `token` is the last prompt token.
        hidden: [B, D], of the last prompt position after its first iteration.
        iterated: which prompt positions have the depth, as `StreamConfig` says: "last" begins with the last one, "all"
            were iterated while they were prefilled, "none".
        stop_ids, top, scored: as for `decode_chunk`.
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
    state, scores = _sample(params, state, hidden, stop_ids, top, scored)
    columns = jax.tree.map(lambda part: part[:, None], (state.token, used, scores))
    return _seen(SampledTokens(columns[0], columns[1], state.done, columns[2]), state)


@functools.partial(jax.jit, static_argnames=(*STATIC, "size"), donate_argnums=(2,))
def decode_chunk(
    config: ModelConfig,
    params: Params,
    state: DecodeState,
    count: jax.Array | int,
    *,
    stop_ids: tuple[int, ...],
    top: int = 0,
    scored: jax.Array | None = None,
    size: int = CHUNK,
) -> tuple[SampledTokens, DecodeState]:
    """Decode `count` <= `size` more tokens a row, in columns [B, size]; stop early when all rows have ended.

    Args:
        state: donated.
        stop_ids: tokens that end a row.
        top: above 0, tokens come with their scores and those of the `top` best, where `scored` (bool []) is true.
    """

    def more(carry: tuple) -> jax.Array:
        i, _, state = carry
        return (i < count) & ~jnp.all(state.done)

    def one(carry: tuple) -> tuple:
        i, columns, state = carry
        budget = state.depth_budget
        depth = jnp.where(state.done, 0, budget.now)
        hidden, cache, used = decode_step(config, params, state.token, state.cache, depth, budget.halting)
        moved = state._replace(cache=cache, depth_budget=budget._replace(now=budget.rest))
        after, scores = _sample(params, moved, hidden, stop_ids, top, scored)
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
def pick_rows(cache: Cache, hidden: RowHidden, index: RowInts) -> tuple[Cache, RowHidden]:
    """Return copies of the sequences `index` [B'] of caches and hidden states, as often as each is named."""
    return map_rows(lambda axis, part: jnp.take(part, index, axis=axis), cache), hidden[index]


@functools.partial(jax.jit, donate_argnums=(0,))
def seat(batch: DecodeState, one: DecodeState, row: jax.Array) -> DecodeState:
    """Return the batch with the only row of `one` at `row`."""

    def put(axis: int, whole: jax.Array, new: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_slice_in_dim(whole, new.astype(whole.dtype), row, axis)

    rest = jax.tree.map(functools.partial(put, 0), tuple(batch[1:]), tuple(one[1:]))
    return DecodeState(map_rows(put, batch.cache, one.cache), *rest)


@functools.partial(jax.jit, static_argnames=("top",))
def score_positions(params: Params, hidden: jax.Array, following: jax.Array, *, top: int) -> Scores:
    """Score the tokens `following` [T] the positions of hidden [T, D], a block of logits at a time."""
    blocks = hidden.reshape(-1, min(BLOCK, hidden.shape[0]), hidden.shape[1])
    found = jax.lax.map(
        lambda part: score(decoder.head(params, part[0]), part[1], top), (blocks, following.reshape(blocks.shape[:2]))
    )
    return jax.tree.map(lambda part: part.reshape(-1, *part.shape[2:]), found)


def each_score(scores: Scores, count: int) -> list[Scores]:
    """Return the first `count` of stacked scores, one by one, as numpy."""
    whole = jax.tree.map(np.asarray, scores)
    return [jax.tree.map(lambda part, at=at: part[at], whole) for at in range(count)]


# ------------------------------------------------------------------------------------------------------------- Prompts


def prompt_mode(config: ModelConfig) -> str:
    """Return which prompt positions iterate, `stream.iterate_prompt`; without a stream none do."""
    return "none" if config.stream is None else config.stream.iterate_prompt


def prompt_depth(iterated: str, policy: Policy) -> int:
    """Return the iterations at every position of a prompt."""
    return policy.first if iterated == "all" else 1


def check_policy(config: ModelConfig, policy: Policy, *, whole_text: bool = False) -> None:
    """Refuse a policy that would be run at another depth than it names.

    Args:
        whole_text: all positions of a known text have the depth, so that it must be one number.

    Raises: InputError naming the policy, and why it does not fit.
    """
    if config.stream is None and (policy.max_depth > 1 or policy.select_depth is not None):
        raise InputError(f"depth={policy.name} needs a model with a stream; this one has none: use depth=1")
    if whole_text and not policy.is_flat:
        raise InputError(f"depth={policy.name}: a known text is scored at one depth, such as 4")
    if prompt_mode(config) == "all" and policy.halt is not None:
        raise InputError(f'stream.iterate_prompt="all" runs a prompt at one depth, which {policy.name} does not name')


def check_request(config: ModelConfig, request: Request, number: int = 0) -> None:
    """Refuse a request that cannot be answered.

    Raises: InputError on an empty prompt, more positions than the backbone has, or as `check_policy`.
    """
    if not len(request.tokens):
        raise InputError(f"prompt {number} is empty: give at least one token")
    if request.max_new_tokens < 1:
        raise InputError(f"max_new_tokens={request.max_new_tokens} must be at least 1")
    if len(request.tokens) + request.max_new_tokens > config.backbone.max_positions:
        raise InputError(
            f"a prompt of {len(request.tokens)} tokens and {request.max_new_tokens} new ones exceed the backbone's "
            f"{config.backbone.max_positions} positions"
        )
    check_policy(config, request.policy, whole_text=request.prompt_scored)


def _padded_prompts(prompts: Sequence[tuple[int, ...]], width: int, pad_id: int) -> tuple[np.ndarray, np.ndarray]:
    """Return right-padded tokens [B, T] and their lengths [B]."""
    tokens = np.full((len(prompts), width), pad_id, np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = prompt
    return tokens, np.array([len(prompt) for prompt in prompts], np.int32)


# ------------------------------------------------------------------------------------------------------------- Session


class Session:
    """A batch of rows that are decoded together."""

    def __init__(
        self,
        config: ModelConfig,
        params: Params,
        *,
        rows: int,
        capacity: int,
        stop_ids: Collection[int] = (),
        pad_id: int = 0,
        chunk: int = CHUNK,
        top: int = 0,
    ):
        """Make a session; no memory is taken before its first rows begin.

        Args:
            rows: how many are decoded together.
            capacity: positions that each has room for; as `capacity_for` rounds them.
            stop_ids: tokens that end a row.
            pad_id: what fills prompts up.
            chunk: tokens that `step` decodes.
            top: how many of the best tokens come with a score; 0: no scores.
        """
        self.config, self.params, self.rows, self.capacity = config, params, rows, capacity
        self._stop_ids, self._pad_id, self._chunk, self._top = tuple(sorted(stop_ids)), pad_id, chunk, top
        self.reset()

    def reset(self) -> None:
        """End all rows and give their memory free."""
        self._state: DecodeState | None = None
        self._requests: dict[int, Request] = {}  # by row
        self._unselected: set[int] = set()  # rows whose policies choose from the states of their next position

    @property
    def free_rows(self) -> list[int]:
        """Rows that nothing is decoded in."""
        return [row for row in range(self.rows) if row not in self._requests]

    def start(self, requests: Sequence[Request]) -> SampledTokens:
        """Begin all rows of a session at once, and return their first tokens [B, 1]; equal prompts are read once.

        Raises: InputError as `check_request`, and where a policy chooses a depth that is none.
        """
        for number, request in enumerate(requests):
            check_request(self.config, request, number)
        iterated = prompt_mode(self.config)
        asked = [(prompt_depth(iterated, request.policy), request.tokens) for request in requests]
        distinct = sorted(dict.fromkeys(asked), key=lambda prompt: prompt[0])
        width, filled = padded(max(len(request.tokens) for request in requests)), []
        for depth, several in itertools.groupby(distinct, key=lambda prompt: prompt[0]):
            tokens, lengths = _padded_prompts([prompt for _, prompt in several], width, self._pad_id)
            filled.append(prefill(self.config, self.params, tokens, lengths, capacity=self.capacity, depth=depth))
        hidden, cache = filled[0]
        if len(filled) > 1:
            hidden = jnp.concatenate([hidden for hidden, _ in filled])
            cache = map_rows(lambda axis, *parts: jnp.concatenate(parts, axis), *(cache for _, cache in filled))
        if distinct != asked:
            cache, hidden = pick_rows(cache, hidden, np.array([distinct.index(prompt) for prompt in asked]))
        sampled, state = self._begin(requests, cache, hidden, iterated)
        self._requests = dict(enumerate(requests))
        self._state = self._select(state, requests, iterated)
        self._unselected = set(self._choosing(requests)) if iterated == "none" else set()
        return sampled

    def prompt_key(self, request: Request) -> tuple[tuple[int, ...], int, bool]:
        """Return what two requests must share for one `PrefilledPrompt` to serve both."""
        return request.tokens, prompt_depth(self._iterated(request), request.policy), request.prompt_scored

    def _iterated(self, request: Request) -> str:
        return "all" if request.prompt_scored else prompt_mode(self.config)

    def prefill_prompt(self, request: Request) -> Generator[int, None, PrefilledPrompt]:
        """Read one prompt by itself; yields the positions of each part, and returns a `PrefilledPrompt`."""
        check_policy(self.config, request.policy, whole_text=request.prompt_scored)
        tokens, lengths = _padded_prompts([request.tokens], padded(len(request.tokens)), self._pad_id)
        following, scores, at = np.pad(tokens[:, 1:], ((0, 0), (0, 1))), [], 0
        depth = prompt_depth(self._iterated(request), request.policy)
        parts = prefill_chunks(self.config, self.params, tokens, lengths, capacity=self.capacity, depth=depth)
        for part in parts:
            size = part.positions.shape[1]
            if request.prompt_scored:
                found = score_positions(self.params, part.positions[0], following[0, at : at + size], top=self._top)
                scores += each_score(found, min(size, len(request.tokens) - 1 - at))
            at += size
            yield size
        return PrefilledPrompt(part.cache, part.hidden, scores)

    def admit(self, request: Request, prompt: PrefilledPrompt) -> tuple[int, SampledTokens]:
        """Begin one request in a free row; `prompt` stays as it is. Returns the row and the first token [1, 1].

        Raises: InputError where the request's policy chooses a depth that is none.
        """
        cache, hidden = pick_rows(prompt.cache, prompt.hidden, np.zeros(1, np.int32))
        iterated = self._iterated(request)
        sampled, state = self._begin([request], cache, hidden, iterated)
        state = self._select(state, [request], iterated)
        row = self.free_rows[0]
        self._state = seat(self._empty() if self._state is None else self._state, state, np.int32(row))
        self._requests[row] = request
        if request.policy.select_depth is not None and iterated == "none":
            self._unselected.add(row)
        return row, sampled

    def step(self) -> SampledTokens:
        """Decode the next tokens [B, chunk] of all rows; one alone where a policy has to choose after it.

        An exception of the device leaves no state: `reset` then.
        """
        count = 1 if self._unselected else self._chunk
        scored = np.bool_(any(request.scored for request in self._requests.values())) if self._top else None
        sampled, state = decode_chunk(
            self.config,
            self.params,
            self._state,
            np.int32(count),
            stop_ids=self._stop_ids,
            top=self._top,
            scored=scored,
            size=self._chunk,
        )
        if self._unselected:
            state = self._selected(state, {row: self._requests[row].policy for row in sorted(self._unselected)})
            self._unselected = set()
        self._state = state
        return jax.tree.map(np.asarray, sampled)

    def stop(self, rows: Sequence[int]) -> None:
        """End rows, and free them for others."""
        for row in rows:
            self._requests.pop(row, None)
            self._unselected.discard(row)
        if len(rows) and self._state is not None:
            self._state = self._state._replace(done=jnp.asarray(self._state.done).at[np.array(rows)].set(True))

    def _begin(
        self, requests: Sequence[Request], cache: Cache, hidden: RowHidden, iterated: str
    ) -> tuple[SampledTokens, DecodeState]:
        """Return the first tokens of fresh rows, as numpy, and their state."""
        state = DecodeState(
            cache,
            np.array([request.tokens[-1] for request in requests], np.int32),
            np.zeros(len(requests), bool),
            np.array([request.max_new_tokens for request in requests], np.int32),
            depth_budget([request.policy for request in requests]),
            sampling_params([request.sampling for request in requests], [request.seed for request in requests]),
        )
        scored = np.bool_(any(request.scored for request in requests)) if self._top else None
        sampled, state = begin(
            self.config,
            self.params,
            state,
            hidden,
            iterated=iterated,
            stop_ids=self._stop_ids,
            top=self._top,
            scored=scored,
        )
        return jax.tree.map(np.asarray, sampled), state

    @staticmethod
    def _choosing(requests: Sequence[Request]) -> dict[int, Policy]:
        return {row: request.policy for row, request in enumerate(requests) if request.policy.select_depth is not None}

    def _select(self, state: DecodeState, requests: Sequence[Request], iterated: str) -> DecodeState:
        """Let policies choose from the states of a prompt's last position, where that has had the first depth."""
        return state if iterated == "none" else self._selected(state, self._choosing(requests))

    def _selected(self, state: DecodeState, policies: dict[int, Policy]) -> DecodeState:
        """Return the state with the depths that the policies of rows choose from the states at hand."""
        if not policies:
            return state
        states, rest = np.asarray(state.cache.state), np.array(state.depth_budget.rest)
        now = np.array(state.depth_budget.now)
        for row, policy in policies.items():
            now[row] = rest[row] = selected_depth(policy, states[:, row])
        return state._replace(depth_budget=state.depth_budget._replace(now=jnp.asarray(now), rest=jnp.asarray(rest)))

    def _empty(self) -> DecodeState:
        """Return a batch of rows that have all ended."""

        def zeros(kind: str) -> jax.Array:
            return jnp.zeros(self.rows, kind)

        return DecodeState(
            init_cache(self.config, self.rows, self.capacity),
            zeros("int32"),
            ~zeros("bool"),
            zeros("int32"),
            DepthBudget(zeros("int32"), zeros("int32"), Halting(zeros("int32"), zeros("float32"))),
            SamplingParams(zeros("float32"), zeros("int32"), zeros("float32"), zeros("uint32")),
        )


def generate_tokens(
    config: ModelConfig,
    params: Params,
    requests: Sequence[Request],
    *,
    stop_ids: Collection[int] = (),
    pad_id: int = 0,
) -> Generator[SampledTokens, np.ndarray | None, None]:
    """Yield new tokens of a batch of requests until all have ended, the first chunk being one token.

    The receiver may `send` a bool [B] of rows to end, such as those whose text holds a stop string.

    Args:
        requests: one a row.
        stop_ids: tokens that end a row.
        pad_id: what fills prompts up.

    Raises: InputError as `Session.start`.
    """
    longest = max(len(request.tokens) for request in requests)
    capacity = capacity_for(longest + max(request.max_new_tokens for request in requests))
    session = Session(config, params, rows=len(requests), capacity=capacity, stop_ids=stop_ids, pad_id=pad_id)
    sampled = session.start(requests)
    done = sampled.done
    while True:
        ended = yield sampled
        if ended is not None:
            session.stop(np.flatnonzero(ended).tolist())
            done = done | ended
        if done.all():
            return
        sampled = session.step()
        done = sampled.done
