"""Hidden states of known texts at any iteration depth.

A known text is run as decoding would run it: the prompt at depth 1 (`stream.iterate_prompt`), then depth I at every
position from the first one that depth applies to. Position 0 is that one, the prompt's last, and predicts the first
token of the text. All positions of a layer are computed together (`model/rules.py`, `exact`).

What a depth's state is: by default (between="runs") each depth has a run of its own, so depth I is what a user of
`--depth I` would have; the states of earlier positions differ too. With between="iterations" one run at the greatest
depth is kept after each of its iterations. At position 0 the two are the same.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from sst_jax.errors import InputError
from sst_jax.inference.kv_cache import Cache
from sst_jax.inference.model import Model
from sst_jax.inference.prefill import chunk_context, prefill
from sst_jax.inference.session import prompt_mode
from sst_jax.model import decoder, links
from sst_jax.model.config import ModelConfig
from sst_jax.model.decoder import Context, Layer, Residuals
from sst_jax.model.layers import to_float32
from sst_jax.model.quantization import storages
from sst_jax.model.rules import Intervened, exact, plain
from sst_jax.types import AllStates, AnyRowInts, Hidden, IteratedHidden, Params, RandomKey, RowHidden, RowInts, Tokens

TOP = 100  # tokens with the largest logits that are kept


class Text(NamedTuple):
    """A prompt and, where it is given rather than generated, what follows it, as tokens."""

    id: str
    prompt: list[int]
    given: list[int] | None = None


@dataclasses.dataclass(frozen=True)
class Settings:
    """depths    ascending; the first is what the others are compared with
    between   "runs" or "iterations", see the module's docstring
    what      "output": the residual stream that a layer passes on; "memory": the state that its stream carries
    rounding  run each text once more in bfloat16, at the first depth, for the noise floor
    controls  how many problems are also run with states that do not belong there
    new_tokens  of a generated text;  batch  problems run together;  seed  of the controls
    """

    depths: tuple[int, ...] = (1, 4)
    between: str = "runs"
    what: str = "output"
    rounding: bool = True
    controls: int = 10
    new_tokens: int = 64
    batch: int = 4
    seed: int = 0


class Swap(NamedTuple):
    """An intervention on iterations after the first: states of other positions, or noise, enter instead of their own.

    The state from the position before comes in as it was.
    """

    row: AnyRowInts  # of the batch, for each row
    order: Tokens  # [B, T], positions of that row
    key: RandomKey | None = None  # noise as long as each state, drawn from it, instead of other states

    def enter(self, layer: Layer, states: Hidden) -> Hidden:
        """Return what enters every step instead of the states [B, T*I, D]."""
        depth = states.shape[1] // self.order.shape[1]
        by_position = decoder.fold(states, depth)
        if self.key is None:
            wrong = by_position[self.row[:, None], self.order]
        else:
            kind = jax.random.fold_in(self.key, layer.kind.is_global.astype(jnp.int32))
            noise = jax.random.normal(jax.random.fold_in(kind, layer.kind.cache_index), by_position.shape)
            length = jnp.linalg.norm(to_float32(by_position), axis=-1, keepdims=True)
            wrong = (noise * length / jnp.linalg.norm(noise, axis=-1, keepdims=True)).astype(states.dtype)
        again = (jnp.arange(states.shape[1]) % depth > 0)[:, None]
        return jnp.where(again, wrong.reshape(states.shape), states)


class DepthStates(NamedTuple):
    """One run of a batch after one iteration of every position, in host memory."""

    states: np.ndarray  # [L, B, T, D]; of one problem [T, L, D]
    top_ids: np.ndarray  # int32 [B, T, TOP], the next tokens with the largest logits; of one problem [T, TOP]
    top_logits: np.ndarray

    def row(self, number: int, count: int) -> DepthStates:
        """One problem's `count` positions."""
        states = np.moveaxis(self.states[:, number, :count], 0, 1).astype(np.float32)
        return DepthStates(states, self.top_ids[number, :count], self.top_logits[number, :count].astype(np.float32))


# ------------------------------------------------------------------------------------------------------- Running texts


class ReadOut(NamedTuple):
    """What is kept of a run; a program is compiled for each.

    what    of each layer, as `Settings.what`; without a stream it is always the output
    depth   I, iterations of every position
    every   keep each of the I iterations; else the last one only
    """

    what: str = "output"
    depth: int = 1
    every: bool = False


@functools.partial(jax.jit, static_argnames=("config", "read"))
def run_texts(
    config: ModelConfig,
    params: Params,
    tokens: Tokens,
    count: RowInts,
    cache: Cache,
    read: ReadOut,
    intervene: Swap | None = None,
) -> tuple[Float[Array, "L B T I D"], Int[Array, "B T I top"], Float[Array, "B T I top"]]:
    """Run right-padded texts, continued from the caches of their prompts.

    Args:
        config: of the model.
        params: the three trees.
        tokens: [B, T].
        count: [B], how many of a text's positions are real.
        cache: of the prompts, filled.
        read: what is kept.
        intervene: what enters the iterations after the first instead of their states; None: nothing.

    Returns:
        States [L, B, T, I, D], I counting the kept iterations, and the TOP tokens and their logits [B, T, I, TOP].
    """
    depth = read.depth if config.stream is not None else 1
    context = chunk_context(config, tokens, count, cache, fresh=False, depth=depth)
    if config.stream is not None and config.stream.is_linked:
        hidden, states = _run_linked(config, params, tokens, context, cache, read)
        return states, *_top(config, params, hidden)
    if intervene is not None:
        context = dataclasses.replace(context, options=Intervened())

    def rule(
        layer: Layer, residuals: Residuals, before: RowHidden | None, context: Context
    ) -> tuple[Residuals, IteratedHidden]:
        if config.stream is None:
            residuals, left = plain(layer, residuals, before, context)
        else:
            residuals, left = exact(layer, residuals, before, context, intervene and intervene.enter)
        kept = residuals[-1] if read.what == "output" or left.state_out is None else left.state_out
        return residuals, decoder.fold(kept, depth)[:, :, 0 if read.every else depth - 1 :]

    hidden, states = decoder.run(params, rule, tokens, context, cache.state, every=read.every)
    return states, *_top(config, params, hidden)


def _run_linked(
    config: ModelConfig, params: Params, tokens: Tokens, context: Context, cache: Cache, read: ReadOut
) -> tuple[IteratedHidden, AllStates]:
    """Return normed hidden states and what is kept of each layer where states go between layers: by passes until they
    stand still, as many as it takes.
    """
    depth = context.depth

    def keep(outputs: links.PassOutputs) -> IteratedHidden:
        kept = outputs.o if read.what == "output" else outputs.state_out
        return decoder.fold(kept, depth)[:, :, 0 if read.every else depth - 1 :]

    settled = links.fixed_point_stack(params, tokens, context, cache.state, cap=tokens.shape[1] * depth + 1, keep=keep)
    return decoder.read_out(config, params, settled.x, depth, every=read.every), settled.outputs


def _top(
    config: ModelConfig, params: Params, hidden: IteratedHidden
) -> tuple[Int[Array, "B T I top"], Float[Array, "B T I top"]]:
    """Return the TOP tokens and their logits, [B, T, I, TOP], of hidden states [B, T, I, D]."""
    # One row at a time, so that a vocabulary's worth of logits exists for one row's positions only.
    top_logits, top_ids = jax.lax.map(
        lambda row: jax.lax.top_k(decoder.head(config, params, row), min(TOP, config.backbone.vocab_size)), hidden
    )
    return top_ids, top_logits


def split(model: Model, text: Text, answer: Sequence[int]) -> tuple[list[int], list[int], list[int]]:
    """Return (prefix, inputs, predicted) tokens: inputs[t] is read at position t, where predicted[t] is the next token.

    Raises: InputError where a prompt or a text is too short to have a position to look at.
    """
    whole = [*text.prompt, *answer]
    start = len(text.prompt) - (prompt_mode(model.config) != "none")
    if not start or len(whole) < start + 2:
        raise InputError(f"{text.id}: a prompt of {len(text.prompt)} and a text of {len(answer)} tokens are too short")
    return whole[:start], whole[start:-1], whole[start + 1 :]


class Batch(NamedTuple):
    """Texts of one batch, padded to the whole collection's shapes."""

    prefix: np.ndarray  # int32 [B, P]
    prefix_counts: np.ndarray  # [B]
    inputs: np.ndarray  # int32 [B, T]
    counts: np.ndarray  # [B]
    predicted: list[list[int]]

    @classmethod
    def of(cls, model: Model, texts: Sequence[Text], answers: Sequence[Sequence[int]], shape: tuple[int, int]) -> Batch:
        parts = [split(model, text, answer) for text, answer in zip(texts, answers, strict=True)]

        def rows(number: int, width: int) -> tuple[np.ndarray, np.ndarray]:
            filled = np.full((len(parts), width), model.tokenizer.pad_id, np.int32)
            for row, part in zip(filled, parts, strict=True):
                row[: len(part[number])] = part[number]
            return filled, np.array([len(part[number]) for part in parts], np.int32)

        return cls(*rows(0, shape[0]), *rows(1, shape[1]), [part[2] for part in parts])


class TextRunner:
    """Run batches through one model at any depth."""

    def __init__(self, model: Model, settings: Settings, capacity: int):
        self.model, self.settings, self.capacity = model, settings, capacity
        self._bases: dict[str, Params] = {model.dtype: model.params["base"]}

    def __call__(
        self,
        batch: Batch,
        depth: int,
        *,
        every: bool = False,
        config: ModelConfig | None = None,
        what: str | None = None,
        intervene: Swap | None = None,
    ) -> list[DepthStates]:
        """Run a batch.

        Args:
            batch: prompts and texts.
            depth: iterations of every position of the texts.
            every: return the batch after each iteration, not only after the last.
            config: another than the model's own.
            what: is kept of each layer, as `Settings.what`; None: as the settings say.
            intervene: what enters instead of states; None: nothing.

        Returns:
            The batch after the last iteration, or after every one.
        """
        config = config or self.model.config
        params = self._params(config)
        _, cache = prefill(
            config,
            params,
            batch.prefix,
            batch.prefix_counts,
            capacity=self.capacity,
            depth=depth if prompt_mode(config) == "all" else 1,
        )
        states, *top = run_texts(
            config,
            params,
            batch.inputs,
            batch.counts,
            cache,
            ReadOut(what or self.settings.what, depth, every),
            intervene,
        )
        states, (ids, logits) = np.asarray(states), map(np.asarray, top)
        return [DepthStates(states[..., k, :], ids[:, :, k], logits[:, :, k]) for k in range(ids.shape[2])]

    def _params(self, config: ModelConfig) -> Params:
        """The model's parameters as `config` takes them, the base in its dtype."""
        if config.dtype not in self._bases:
            self._bases[config.dtype] = storages.cast(self.model.params["base"], config.dtype)
        blend = {name: self.model.params["blend"][name] for name in decoder.abstract_params(config)["blend"]}
        return {**self.model.params, "base": self._bases[config.dtype], "blend": blend}
