"""The one driver of decoding, under `Model`, evaluation and the server alike: prefill, step, stop.

A `Session` holds a batch of rows. Requests begin together (`start`: a batch that is answered as a whole) or one by one
in free rows (`prefill_prompt`, then `admit`: continuous batching). Each `step` decodes a chunk of tokens for all rows
on the device, and `stop` frees rows whose answers have ended. Rows are independent: a row computes the same numbers
with any neighbours. What runs on the device is `programs.py`.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Generator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sst_jax.errors import InputError
from sst_jax.inference.decode_state import DecodeState, empty_state
from sst_jax.inference.kv_cache import Cache, map_rows
from sst_jax.inference.policies import Policy, depth_budget, flat, selected_depth
from sst_jax.inference.prefill import capacity_for, padded, prefill, prefill_chunks
from sst_jax.inference.programs import (
    CHUNK,
    SampledTokens,
    begin,
    decode_chunk,
    each_score,
    pick_rows,
    score_positions,
    seat,
)
from sst_jax.inference.sampling import NONE_SPECIAL, Sampling, Scores, SpecialTokens, sampling_params
from sst_jax.model.config import ModelConfig
from sst_jax.model.decoder import Params
from sst_jax.types import HostRowBools, HostRowInts, HostTokens, RowHidden

ONCE, GREEDY = flat(1), Sampling()


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


class PrefilledPrompt(NamedTuple):
    """Prompts that have been read: copies of them may begin any number of answers."""

    cache: Cache
    hidden: RowHidden  # of each prompt's last position
    scores: list[Scores]  # of one prompt's own tokens but the first, where they were asked for


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
    if len(request.tokens) + request.max_new_tokens > config.backbone.position_limit:
        raise InputError(
            f"a prompt of {len(request.tokens)} tokens and {request.max_new_tokens} new ones exceed the backbone's "
            f"{config.backbone.position_limit} positions"
        )
    check_policy(config, request.policy, whole_text=request.prompt_scored)


def _padded_prompts(prompts: Sequence[tuple[int, ...]], width: int, pad_id: int) -> tuple[HostTokens, HostRowInts]:
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
        special: SpecialTokens = NONE_SPECIAL,
        pad_id: int = 0,
        chunk: int = CHUNK,
        top: int = 0,
    ):
        """Make a session; no memory is taken before its first rows begin.

        Args:
            rows: how many are decoded together.
            capacity: positions that each has room for; as `capacity_for` rounds them.
            special: tokens that end a row, or are never chosen.
            pad_id: what fills prompts up.
            chunk: tokens that `step` decodes.
            top: how many of the best tokens come with a score; 0: no scores.
        """
        self.config, self.params, self.rows, self.capacity = config, params, rows, capacity
        self._special, self._pad_id, self._chunk, self._top = special, pad_id, chunk, top
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
                found = score_positions(
                    self.config, self.params, part.positions[0], following[0, at : at + size], top=self._top
                )
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
        self._state = seat(
            empty_state(self.config, self.rows, self.capacity) if self._state is None else self._state,
            state,
            np.int32(row),
        )
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
            special=self._special,
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
            special=self._special,
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


def generate_tokens(
    config: ModelConfig,
    params: Params,
    requests: Sequence[Request],
    *,
    special: SpecialTokens = NONE_SPECIAL,
    pad_id: int = 0,
) -> Generator[SampledTokens, HostRowBools | None, None]:
    """Yield new tokens of a batch of requests until all have ended, the first chunk being one token.

    The receiver may `send` a bool [B] of rows to end, such as those whose text holds a stop string.

    Args:
        requests: one a row.
        special: tokens that end a row, or are never chosen.
        pad_id: what fills prompts up.

    Raises: InputError as `Session.start`.
    """
    longest = max(len(request.tokens) for request in requests)
    capacity = capacity_for(longest + max(request.max_new_tokens for request in requests))
    session = Session(config, params, rows=len(requests), capacity=capacity, special=special, pad_id=pad_id)
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
