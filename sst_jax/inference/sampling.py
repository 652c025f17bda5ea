"""From logits to the next token."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sst_jax.errors import InputError
from sst_jax.types import AnyRowFloats, AnyRowInts, AnyRowSeeds, RowInts, RowLogits, SomeLogits, SomeTokens

DRAWN = "drawn"  # scope of the branches (all rows are greedy, one draws)


@dataclasses.dataclass(frozen=True)
class Sampling:
    """Greedy at temperature 0; otherwise softmax(logits / temperature), cut to the top_k best (0: all) and to the
    smallest set of tokens whose probability reaches top_p (1: all), in that order."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if not self.temperature >= 0.0:
            raise InputError(f"temperature={self.temperature} must be >= 0")
        if self.top_k < 0:
            raise InputError(f"top_k={self.top_k} must be >= 0")
        if not 0.0 < self.top_p <= 1.0:
            raise InputError(f"top_p={self.top_p} must be in (0, 1]")


class SpecialTokens(NamedTuple):
    """What tokens mean for answers: constants of a program."""

    stop_ids: tuple[int, ...] = ()  # end a row
    suppressed: tuple[int, ...] = ()  # are never chosen


NONE_SPECIAL = SpecialTokens()


class SamplingParams(NamedTuple):
    """How each row of a batch is sampled, [B] each: settings are data, so that any mix of them is one program."""

    temperature: AnyRowFloats
    top_k: AnyRowInts
    top_p: AnyRowFloats
    seed: AnyRowSeeds


class Scores(NamedTuple):
    """Log-probabilities of chosen tokens [...] and the top tokens with theirs, [..., top]."""

    chosen: jax.Array
    top_ids: jax.Array
    top: jax.Array


def sampling_params(samplings: Sequence[Sampling], seeds: Sequence[int]) -> SamplingParams:
    """Return the rows of a batch; seeds are taken modulo 2**32."""
    return SamplingParams(
        np.array([sampling.temperature for sampling in samplings], np.float32),
        np.array([sampling.top_k for sampling in samplings], np.int32),
        np.array([sampling.top_p for sampling in samplings], np.float32),
        np.array([seed % 2**32 for seed in seeds], np.uint32),
    )


def sample(rows: SamplingParams, logits: RowLogits, position: AnyRowInts) -> RowInts:
    """Return next tokens int32 [B] from logits [B, V]; a row draws from its seed and `position` [B],
    independent of the other rows.
    """
    greedy = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    warm = rows.temperature > 0.0

    def drawn() -> RowInts:
        scaled = logits / jnp.where(warm, rows.temperature, 1.0)[:, None]
        scaled = jax.lax.cond(
            jnp.any((rows.top_k > 0) | (rows.top_p < 1.0)), lambda: _cut(rows, scaled), lambda: scaled
        )
        keys = jax.vmap(lambda seed, at: jax.random.fold_in(jax.random.key(seed), at))(rows.seed, position)
        return jnp.where(warm, jax.vmap(jax.random.categorical)(keys, scaled), greedy)

    # Sorting and drawing over a vocabulary of 262,144 takes longer than a layer, so only where a row wants it.
    with jax.named_scope(DRAWN):
        return jax.lax.cond(jnp.any(warm), drawn, lambda: greedy)


def _cut(rows: SamplingParams, logits: RowLogits) -> RowLogits:
    """Return logits with -inf wherever top_k or top_p leave a token out; those of rows that cut nothing as they are."""
    top_k = jnp.where(rows.top_k > 0, rows.top_k, logits.shape[-1])[:, None]
    top_p = jnp.where(rows.top_p < 1.0, rows.top_p, jnp.inf)[:, None]  # a rounded sum may reach 1 before the last token
    ordered = jnp.sort(logits, axis=-1)[:, ::-1]
    ordered = jnp.where(jnp.arange(ordered.shape[-1]) < top_k, ordered, -jnp.inf)
    p = jax.nn.softmax(ordered, axis=-1)
    kept = (jnp.cumsum(p, axis=-1) - p < top_p) & jnp.isfinite(ordered)
    floor = jnp.min(jnp.where(kept, ordered, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(logits >= floor, logits, -jnp.inf)


def score(logits: SomeLogits, tokens: SomeTokens, top: int) -> Scores:
    """Return log-probabilities of `tokens` [...] under logits [..., V], unscaled by any temperature, and of the `top`
    best.
    """
    total = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    best, ids = jax.lax.top_k(logits, top)
    chosen = jnp.take_along_axis(logits, tokens[..., None], axis=-1)
    return Scores((chosen - total)[..., 0], ids, best - total)
