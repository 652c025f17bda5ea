"""Scores of a known text: log-probabilities of its tokens, and whether greedy decoding would have written them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sst_jax.inference.model import Model
from sst_jax.model import decoder, rules
from sst_jax.model.compiler import program
from sst_jax.model.config import ModelConfig
from sst_jax.model.decoder import Params
from sst_jax.model.scales import LayerScales
from sst_jax.types import BlockLosses, BlockMask, FlatIndex, Hidden, SegmentIds, Tokens

BUCKET = 64  # rows are padded to multiples of this, so that few shapes are compiled
CHUNK = 64  # positions whose logits exist at one time


class Scores(NamedTuple):
    """The scored tokens of one sequence: log-probabilities in nats, and whether each was the top-1 token."""

    logprobs: np.ndarray
    greedy: np.ndarray


def score(model: Model, rows: Sequence[Sequence[int]], starts: Sequence[int], depth: int = 1) -> list[Scores]:
    """Return the scores of `score_and_scales`."""
    return score_and_scales(model, rows, starts, depth)[0]


def score_and_scales(
    model: Model, rows: Sequence[Sequence[int]], starts: Sequence[int], depth: int = 1
) -> tuple[list[Scores], LayerScales]:
    """Score the tokens of each row from `starts` on, each given all before it, under the exact recurrence.

    With a stream, every position has `depth` iterations, as in `Model.logits`: generation gives them only from the
    first new token on. A row begins with its context, of at least one token.

    Returns:
        The scores, and RMS of residual stream and states by layer and iteration over all positions of all rows.
    """
    length = -(-max(map(len, rows)) // BUCKET) * BUCKET
    tokens = np.zeros((len(rows), length), np.int32)
    for row, ids in enumerate(rows):
        tokens[row, : len(ids)] = ids
    segments = np.arange(length) < np.array([[len(ids)] for ids in rows])
    # Flat places in [B, T] of the positions that predict a scored token.
    places = [
        row * length + np.arange(start - 1, len(ids) - 1)
        for row, (ids, start) in enumerate(zip(rows, starts, strict=True))
    ]
    flat = np.concatenate(places)
    padded = np.pad(flat, (0, -len(flat) % CHUNK)).astype(np.int32)
    logprobs, greedy, scales = _score(
        model.config,
        model.params,
        tokens,
        segments.astype(np.int32),
        padded,
        depth=depth,
    )
    cuts = np.cumsum([len(part) for part in places])[:-1]
    parts = (np.split(np.asarray(array)[: len(flat)], cuts) for array in (logprobs, greedy))
    return [Scores(*pair) for pair in zip(*parts, strict=True)], scales


@program(static_argnames=("config", "depth"))
def _score(
    config: ModelConfig,
    params: Params,
    tokens: Tokens,
    segment_ids: SegmentIds,
    places: jax.Array,
    *,
    depth: int,
) -> tuple[jax.Array, jax.Array, LayerScales]:
    hidden, scales = rules.hidden_and_scales(
        config, params, tokens, forward="exact", depth=depth, segment_ids=segment_ids
    )
    return *token_scores(config, params, hidden, tokens, places), scales


def token_scores(
    config: ModelConfig, params: Params, hidden: Hidden, tokens: Tokens, places: FlatIndex
) -> tuple[BlockLosses, BlockMask]:
    """Return the log-probability of the token that follows each place, and whether it is the top-1 token.

    Args:
        config: of the model.
        params: the three trees.
        hidden: normed, [B, T, D].
        tokens: [B, T].
        places: flat places in [B, T], a multiple of CHUNK; so many positions have their logits in memory together.
    """
    flat, targets = hidden.reshape(-1, hidden.shape[-1]), jnp.roll(tokens, -1, axis=1).reshape(-1)

    def some(part: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits, wanted = decoder.head(config, params, flat[part]), targets[part]
        picked = jnp.take_along_axis(logits, wanted[:, None], axis=1)[:, 0]
        return picked - jax.nn.logsumexp(logits, axis=1), jnp.argmax(logits, axis=1) == wanted

    logprobs, greedy = jax.lax.map(some, places.reshape(-1, CHUNK))
    return logprobs.reshape(-1), greedy.reshape(-1)
