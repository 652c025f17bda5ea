"""The programs of a recipe, as they run: train step, held-out losses, decoding, prefill, on arrays of its shapes.

Each comes with what is needed to plan it, and `measure` runs it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from sst_jax.inference import policies, sampling
from sst_jax.inference.decode_state import DecodeState, decode_step_at_depth, empty_state
from sst_jax.inference.kv_cache import Cache, init_cache
from sst_jax.inference.prefill import fill_chunk
from sst_jax.inference.programs import CHUNK, decode_chunk
from sst_jax.lab.planning.traffic import Assumed
from sst_jax.model import attention, compiler, decoder, rules
from sst_jax.model.config import BackboneConfig, ModelConfig
from sst_jax.model.quantization import storages
from sst_jax.training.optimizer import make_optimizer
from sst_jax.training.recipe import Recipe, with_attention_kernel
from sst_jax.training.step import TrainState, heldout_losses, init_state, train_step
from sst_jax.types import Params, PyTree

BOS = 2  # of Gemma's tokenizer; its value changes nothing in a plan
SWEEPS = 3  # of a prefill's layers: what the pretrained 270M takes in bfloat16, in every layer
EXAMPLE = 243  # tokens of an example, GSM8K's mean: what a plan takes for data that it does not read
ROWS = ("tokens", "segment_ids", "positions")

Parts = Mapping[str, PyTree]  # of a program's arguments, by name


class Program(NamedTuple):
    """A program to be planned.

    step           what is compiled
    counted        what is counted: the same step with XLA's attention, as a kernel's products cannot be seen
    arguments      gives its arguments, under `jax.eval_shape`
    attention      the name of its attention kernel
    parts          splits the arguments into parts by name
    donated        whether the first argument is given up, and the first of two results takes its place
    trips, flash   as `count` takes them
    assumed        of the optimised HLO; its outermost loop runs `turns` times
    turns          steps that one run takes: what is planned is one of them
    """

    step: Callable
    counted: Callable
    arguments: Callable[[], tuple]
    attention: str = "xla"
    parts: Callable[..., Parts] = lambda *_: {}
    donated: bool = True
    trips: int = 1
    flash: bool = True
    assumed: Assumed = Assumed()
    turns: int = 1


# (config, dtype, storage) -> (base, trainable)
Parameters = Callable[[ModelConfig, str, str], tuple[Params, Params]]


def abstract_parameters(config: ModelConfig, dtype: str, quantize: str) -> tuple[Params, Params]:
    """Return base and trainable parameters of a model; call it under `jax.eval_shape`, which allocates neither."""
    params = decoder.init_params(config, jax.random.key(0), jnp.dtype(dtype))
    base = {**params["base"], "layers": storages.quantise_layers(params["base"]["layers"], quantize)}
    return base, {"adapter": params["adapter"], "blend": params["blend"]}


def branches(backbone: BackboneConfig) -> dict[str, tuple[float, ...]]:
    """Return how often the branches run of what is decided on the device, as `Assumed` takes them."""
    layers = list(zip(backbone.layer_types, backbone.windows, strict=True))
    shares = tuple(layers.count(kind) / backbone.num_layers for kind in backbone.attention_kinds)
    greedy_and_settled = {policies.READS_LOGITS: (1.0, 0.0), sampling.DRAWN: (1.0, 0.0), rules.SETTLED: (0.0, 1.0)}
    return {attention.LAYER_KIND: shares, **greedy_and_settled}


def batch(rows: int, length: int) -> Params:
    """Return a batch of rows of one document each, all of it learned."""
    whole = {name: jnp.ones((rows, length), jnp.int32) for name in ROWS}
    positions = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (rows, length))
    return {**whole, "positions": positions, "answer_mask": jnp.ones((rows, length), bool)}


def training_step(
    recipe: Recipe, backbone: BackboneConfig, parameters: Parameters = abstract_parameters
) -> tuple[Callable, Callable[[], tuple]]:
    """Return the train step of a recipe whose attention kernel is chosen, and its arguments under `jax.eval_shape`."""
    config, data = recipe.model_config(backbone, BOS), recipe.data
    optimizer = make_optimizer(recipe.optimizer, recipe.train.steps)

    def arguments() -> tuple:
        base, trainable = parameters(config, recipe.model.dtype, recipe.model.quantize)
        return init_state(trainable, optimizer), base, batch(data.batch_size, data.length), jax.random.key(0)

    return functools.partial(train_step, config, recipe.forward, optimizer), arguments


def training(recipe: Recipe, backbone: BackboneConfig, parameters: Parameters = abstract_parameters) -> Program:
    """Return the train step of a recipe whose attention kernel is chosen; `parameters` makes its arguments."""
    step, arguments = training_step(recipe, backbone, parameters)
    counted, _ = training_step(with_attention_kernel(recipe, lambda *_: "xla"), backbone)

    def parts(state: TrainState, base: Params, batch: Params, _: jax.Array) -> Parts:
        return {"base": base, "adapter and stream": state.trainable, "optimizer": state.optimizer, "batch": batch}

    assumed = Assumed(branches=branches(recipe.model_config(backbone).backbone))
    return Program(step, counted, arguments, recipe.forward.attention, parts, assumed=assumed)


def heldout_rows(recipe: Recipe, devices: int = 1) -> tuple[int, int]:
    """Return (rows of a held-out batch, batches), of examples of `EXAMPLE` tokens, for devices that share rows."""
    data = recipe.data
    rows = math.ceil(data.heldout * min(EXAMPLE, data.length) / data.length) if data.pack else data.heldout
    count = math.ceil(rows / max(data.heldout_rows, devices))
    return math.ceil(rows / count / devices) * devices, count


def evaluation(
    recipe: Recipe, backbone: BackboneConfig, rows: int, parameters: Parameters = abstract_parameters
) -> Program:
    """Return the losses of a held-out batch, of a recipe whose attention kernel is chosen."""
    config = recipe.model_config(backbone, BOS)

    def losses(recipe: Recipe) -> Callable:
        return functools.partial(heldout_losses, config, recipe.heldout_forward)

    def arguments() -> tuple:
        base, trainable = parameters(config, recipe.model.dtype, recipe.model.quantize)
        return base, trainable, batch(rows, recipe.data.length)

    counted = losses(with_attention_kernel(recipe, lambda *_: "xla"))
    assumed = Assumed(branches=branches(config.backbone))
    return Program(losses(recipe), counted, arguments, recipe.heldout_forward.attention, donated=False, assumed=assumed)


def decoding(
    recipe: Recipe,
    backbone: BackboneConfig,
    rows: int,
    capacity: int,
    depth: int,
    parameters: Parameters = abstract_parameters,
) -> Program:
    """Return the decoding of a chunk of tokens of `rows` sequences, greedily, of which one token is planned.

    Args:
        recipe: how the model is stored.
        backbone: of the model.
        rows: sequences decoded together.
        capacity: positions in their caches.
        depth: iterations per token.
        parameters: makes its arguments.
    """
    config = recipe.model_config(backbone)

    def arguments() -> tuple:
        base, trainable = parameters(config, recipe.model.dtype, recipe.model.quantize)
        state, whole = empty_state(config, rows, capacity), jnp.full(rows, depth, jnp.int32)
        going = state.depth_budget._replace(now=whole, rest=jnp.copy(whole))
        left = jnp.full(rows, capacity, jnp.int32)
        state = state._replace(done=jnp.zeros(rows, bool), left=left, depth_budget=going)
        return state, {"base": base, **trainable}, jnp.int32(CHUNK)

    def step(state: DecodeState, params: Params, count: jax.Array) -> tuple:
        sampled, decoded = decode_chunk(config, params, state, count, special=sampling.NONE_SPECIAL)
        return decoded, sampled

    def counted(state: DecodeState, params: Params, _: jax.Array) -> jax.Array:
        depths = jnp.asarray(state.depth_budget.now)
        hidden = decode_step_at_depth(config, params, jnp.asarray(state.token), state.cache, depths)[0]
        return decoder.head(config, params, hidden)

    def parts(state: DecodeState, params: Params, _: jax.Array) -> Parts:
        trained = [params["adapter"], params["blend"]]
        return {"base": params["base"], "adapter and stream": trained, "caches": state.cache}

    assumed = Assumed((CHUNK, depth), branches(config.backbone))
    return Program(step, counted, arguments, parts=parts, trips=depth, flash=False, assumed=assumed, turns=CHUNK)


def prefilling(
    recipe: Recipe,
    backbone: BackboneConfig,
    length: int,
    capacity: int,
    parameters: Parameters = abstract_parameters,
) -> Program:
    """Return the first chunk of a prompt of `length` positions, whose layers settle after SWEEPS evaluations.

    Args:
        recipe: how the model is stored.
        backbone: of the model.
        length: positions of the chunk.
        capacity: of its cache.
        parameters: makes its arguments.
    """
    config = recipe.model_config(backbone)

    def arguments() -> tuple:
        base, trainable = parameters(config, recipe.model.dtype, recipe.model.quantize)
        hidden = jnp.zeros((1, backbone.d_model), jnp.dtype(config.dtype))
        tokens = jnp.ones((1, length), jnp.int32)
        return init_cache(config, 1, capacity), {"base": base, **trainable}, tokens, jnp.full(1, length), hidden

    def step(cache: Cache, params: Params, tokens: jax.Array, count: jax.Array, hidden: jax.Array) -> tuple:
        hidden, positions, filled = fill_chunk(config, params, tokens, count, cache, hidden, fresh=True, depth=1)
        return filled, (hidden, positions)

    def counted(*arguments: Any) -> tuple:  # as for a TPU: in sweeps, where a CPU has spans, and without kernels
        with compiler.compiled_for("tpu"):
            return step(*arguments)

    # A jaxpr's costlier branch, the walk, stands for the last of the sweeps.
    assumed = Assumed((SWEEPS - 1,), branches(config.backbone))
    return Program(step, counted, arguments, trips=SWEEPS - 2, assumed=assumed)
