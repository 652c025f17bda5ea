"""Streams between layers: what solves the recurrence where a layer's state enters another one (`StreamConfig.links`).

With a source above its destination a position needs the whole stack of the step before, so the recurrence no longer
falls apart into one of each layer, as the rules of `model/rules.py` have it. What there is in a layer, is here in the
stack, with the states of all layers and steps [L, B, T*I, D] handed from one run of it to the next:

    stacked_passes      `two_pass` and `k_pass`: the stack without states, then again with those of the time before
    scan_stack          `exact`: step after step the layers between the ends of links, over keys and values of the steps
                        before; the others once
    fixed_point_stack   passes until the states that enter stand still; of S steps S + 1 passes are `exact`

A link from a layer to itself is none of these: it stays inside its layer, as without links.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from sst_jax.model import decoder, kinds
from sst_jax.model.attention import KeptStep, Ropes, attend_kept, ropes_of_layer
from sst_jax.model.backbone import BackboneConfig
from sst_jax.model.config import ModelConfig
from sst_jax.model.decoder import Context, Layer, Params, Residuals
from sst_jax.model.halves import attend, attention_residual, project
from sst_jax.model.kinds import ByKind
from sst_jax.model.layers import to_float32
from sst_jax.model.loops import chunked_scan, fixed_point
from sst_jax.model.passes import next_pass_states, pass_once, recurrent_step, sweep_tolerance
from sst_jax.model.scales import StepSquares, step_squares
from sst_jax.model.state import Masks, initial_state, sources_of, state_update
from sst_jax.types import (
    AllSteps,
    AnyArray,
    CacheStack,
    Hidden,
    IteratedHidden,
    PositionKeys,
    RowStates,
    Scalar,
    ScalarBool,
    ScalarInt,
    Tokens,
)

CHUNK = 32  # steps of `scan_stack` between checkpoints, at most


class Solved(NamedTuple):
    """What a solver returns: hidden states as `decoder.run` does, and the state after every step of every layer."""

    hidden: IteratedHidden
    state_out: AllSteps
    squares: StepSquares  # of every layer


class PassOutputs(NamedTuple):
    """What a pass leaves in a layer."""

    state_out: Hidden
    k: PositionKeys | ByKind
    v: PositionKeys | ByKind
    o: Hidden


Intervention = Callable[[AllSteps], AllSteps]  # of the states entering every step of every layer


def stacked_passes(
    params: Params, tokens: Tokens, context: Context, *, remat: str = "none", every: bool = False
) -> Solved:
    """Run the stack `context.options.num_residuals` times, each time with the states of the time before.

    Args:
      params: the three trees.
      tokens: of whole rows.
      context: of the same rows.
      remat: of each layer, one of `remat.REMAT`.
      every: as for `decoder.read_out`.
    """
    sources = sources_of(context.config)
    residuals: Residuals = (_embedded(params, tokens, context),)

    (o,), (state_out, squares) = decoder.run_layers(params, _pass, residuals, context, None, remat=remat)

    def again(carry: tuple, _: None) -> tuple[tuple, None]:
        (o,), new = decoder.run_layers(params, _pass, residuals, context, carry[1][sources], remat=remat)
        return (o, *new), None

    passes = context.options.num_residuals - 1
    if passes == 1:
        (o, state_out, squares), _ = again((o, state_out, squares), None)
    elif passes:
        (o, state_out, squares), _ = jax.lax.scan(again, (o, state_out, squares), None, length=passes)
    return Solved(decoder.read_out(context.config, params, o, context.depth, every=every), state_out, squares)


def _pass(layer: Layer, residuals: Residuals, earlier: Hidden | None, context: Context) -> tuple[Residuals, tuple]:
    """Run a layer with the states of the time before, or without; a rule of `decoder.run_layers`."""
    (x,) = residuals
    h, _ = attend(layer, x, context)
    s = None if earlier is None else next_pass_states(layer, x, earlier, context)
    o, state_out = pass_once(layer, x, h, s, context)
    return (o,), (state_out, step_squares(o, state_out))


class _Step(NamedTuple):
    """What is a step's own in `scan_stack`, [B, ...] each."""

    x: AnyArray
    place: AnyArray  # of its position in the row
    writes: AnyArray  # whether later positions see its keys
    number: AnyArray
    segment: AnyArray
    tables: Ropes
    masks: Masks


class StepIntervention(NamedTuple):
    """What enters a step instead of its states.

    memo     what it knows at first
    change   (memo, the states [L, B, D] that would enter, the step's number) -> (memo, the states that do)
    """

    memo: Any
    change: Callable[[Any, RowStates, ScalarInt], tuple[Any, RowStates]]


def scan_stack(
    params: Params,
    tokens: Tokens,
    context: Context,
    *,
    remat: str = "none",
    every: bool = False,
    intervene: StepIntervention | None = None,
) -> Solved:
    """Run the layers between a link's ends step after step, the keys and values of earlier positions beside them.

    No state enters the layers below, and none that leaves those above enters another one: they run once, at all steps
    together. For small models, or links that span few layers.

    With `context.recompute` a chunk's steps are run again for their gradients, from the keys and states before it.

    Args:
      params: the three trees.
      tokens: of whole rows.
      context: of the same rows.
      remat: of each layer within a step, one of `remat.REMAT`.
      every: as for `decoder.read_out`.
      intervene: what enters every step instead of its states; None: these.
    """
    config, stream, depth = context.config, context.stream, context.depth
    backbone, sources, segments = config.backbone, sources_of(config), context.segment_ids
    assert segments is not None
    assert context.masks is not None
    below, between, above = _parts(config)
    stack = decoder.stack_of(params, config, between)  # once: within a step its slices would be copied at every one
    x, left_below = _once(params, _embedded(params, tokens, context), context, below, remat=remat)
    rows, length = segments.shape
    number = jnp.broadcast_to(jnp.arange(length * depth), (rows, length * depth))

    def per_step(part: AnyArray) -> AnyArray:
        return jnp.repeat(part, depth, axis=1)

    steps = _Step(
        x,
        number // depth,
        (number % depth == 0) | (stream.kv == "overwrite"),
        number,
        per_step(segments),
        jax.tree.map(per_step, context.ropes),
        context.masks,
    )

    def take(carry: tuple, step: _Step) -> tuple[tuple, tuple]:
        one = jax.tree.map(lambda part: part[:, None], step)
        kept_step = KeptStep(one.tables, segments, step.place[0], step.writes[0])

        def rule(layer: Layer, residuals: Residuals, extra: tuple, context: Context) -> tuple[Residuals, tuple]:
            (x,), (k, v, entering) = residuals, extra
            here = kept_step._replace(ropes=ropes_of_layer(one.tables, layer.rotates))
            out, (k, v) = attend_kept(context.config.backbone, layer.kind, project(layer, x, context), (k, v), here)
            masks = layer.stream.masks
            s = jnp.where(masks.has_state, entering[:, None], initial_state(stream, x))
            o, m = recurrent_step(layer, attention_residual(layer, x, out), s, masks, context, x.dtype)
            return (o,), ((context.by_kind(k), context.by_kind(v), m[:, 0]), step_squares(o, m))

        k, v, state, memo = carry
        entering = state[sources]
        if intervene is not None:
            memo, entering = intervene.change(memo, entering, step.number[0])
        extras = (k, v, entering[between])
        residuals: Residuals = (one.x,)
        here = dataclasses.replace(context, ropes=one.tables, masks=one.masks, segment_ids=one.segment)
        (o,), (left, squares) = decoder.run_stack(stack, rule, residuals, here, extras, remat=remat)
        *columns, new = left
        k, v = jax.tree.map(
            lambda old, column: jax.lax.dynamic_update_slice_in_dim(old, column, step.place[0], axis=2),
            (k, v),
            tuple(columns),
        )
        ys = (jnp.moveaxis(new, 0, 1), jax.tree.map(lambda part: jnp.moveaxis(part[:, :, 0], 0, 1), squares))
        return (k, v, state.at[between].set(new), memo), (o[:, 0], *ys)

    kept = _no_keys(backbone, between, (rows, length), x.dtype)
    state = jnp.zeros((backbone.num_layers, *x[:, 0].shape), state_update(stream, x, to_float32(x)).dtype)
    first = (kept, kept, state, None if intervene is None else intervene.memo)
    x, *left = chunked_scan(take, first, steps, chunk=CHUNK, recompute=context.recompute)
    left_between = jax.tree.map(lambda part: jnp.moveaxis(part, 2, 0), tuple(left))
    x, left_above = _once(params, x, context, above, remat=remat)
    states, squares = kinds.concatenated([*left_below, left_between, *left_above])
    return Solved(decoder.read_out(config, params, x, depth, every=every), states, squares)


def _parts(config: ModelConfig) -> tuple[slice, slice, slice]:
    """Return the layers below all ends of links, those between them, ends included, and those above."""
    ends = [end for link in (config.stream and config.stream.links) or () for end in link]
    first, last = min(ends), max(ends) + 1
    return slice(0, first), slice(first, last), slice(last, config.backbone.num_layers)


def _no_keys(backbone: BackboneConfig, layers: slice, shape: tuple[int, int], dtype: DTypeLike) -> CacheStack | ByKind:
    """Return zeros in the place of the keys, or values, that some layers keep of rows of a shape [B, T]."""

    def empty(layers: int, one: BackboneConfig) -> CacheStack:
        return jnp.zeros((layers, *shape, one.num_kv_heads, one.head_dim), dtype)

    types = backbone.layer_types[layers]
    if not backbone.has_stacks_by_kind:
        return empty(len(types), backbone)
    counts = {kind: types.count(kind) for kind in ("local", "global")}
    return ByKind(*(empty(count, backbone.of_kind(kind)) if count else None for kind, count in counts.items()))


def _once(
    params: Params, x: Hidden, context: Context, layers: slice, rule: Callable[..., Any] = _pass, remat: str = "none"
) -> tuple[Hidden, list[Any]]:
    """Return what leaves layers that no state enters, at all steps, and in a list what the rule left (none: [])."""
    if layers.start == layers.stop:
        return x, []
    residuals: Residuals = (x,)
    residuals, left = decoder.run_layers(params, rule, residuals, context, None, remat=remat, layers=layers)
    return residuals[0], [left]


class Settled(NamedTuple):
    """What `fixed_point_stack` returns: of the last pass its outputs [L, ...], and the residual stream behind it."""

    x: Hidden
    outputs: Any
    passes: ScalarInt
    converged: ScalarBool


def fixed_point_stack(
    params: Params,
    tokens: Tokens,
    context: Context,
    before: RowStates | None = None,
    *,
    cap: int,
    keep: Callable[[PassOutputs], Any] = lambda outputs: outputs,
    intervene: Intervention | None = None,
) -> Settled:
    """Run passes until the states that enter change by rounding alone. Not differentiable.

    They go through the layers between the ends of links; those below and above run once, as in `scan_stack`.

    Args:
      params: the three trees.
      tokens: [B, T].
      context: of the same rows, with a past where they continue from caches.
      before: the states of rows that continue from caches; None: there are none.
      cap: passes at most; the first has no states, and of S steps S + 1 passes are exact.
      keep: what of a layer is stacked, besides its states.
      intervene: changes the states [L, B, T*I, D] that enter every step before they do; None: nothing.
    """
    config, stream = context.config, context.stream
    below, between, above = _parts(config)
    stack = decoder.stack_of(params, config, between)
    sources = sources_of(config)[between]  # of layers between the ends, and among them
    assert context.masks is not None
    has_state = context.masks.has_state

    def rule(layer: Layer, residuals: Residuals, earlier: Hidden | None, context: Context) -> tuple[Residuals, tuple]:
        (x,) = residuals
        h, (k, v) = attend(layer, x, context)
        s = None
        if earlier is not None:
            s = jnp.where(layer.stream.masks.has_state, earlier, initial_state(stream, x))
        o, state_out = pass_once(layer, x, h, s, context)
        return (o,), (state_out, keep(PassOutputs(state_out, k, v, o)))

    def enter(state_out: AllSteps) -> AllSteps:
        earlier = jnp.pad(state_out[sources - between.start, :, :-1], ((0, 0), (0, 0), (1, 0), (0, 0)))
        if before is not None:
            earlier = earlier.at[:, :, 0].set(before[sources])
        if intervene is None:
            return earlier
        everywhere = jnp.zeros((config.backbone.num_layers, *earlier.shape[1:]), earlier.dtype)
        return intervene(everywhere.at[between].set(earlier))[between]

    x, left_below = _once(params, _embedded(params, tokens, context), context, below, rule)
    residuals: Residuals = (x,)

    def sweep(entering: AllSteps | None) -> tuple[tuple, AllSteps]:
        (o,), left = decoder.run_stack(stack, rule, residuals, context, entering)
        return (o, left), enter(left[0])

    carriers = jnp.array(sorted({destination - between.start for _, destination in stream.links or ()}))

    def norm(part: AllSteps) -> jax.Array:  # of each row and link
        part = jnp.where(has_state, to_float32(part[carriers]), 0.0)
        return jnp.sqrt(jnp.sum(jnp.square(part), axis=(2, 3)))

    def change(new: AllSteps, old: AllSteps) -> Scalar:
        return jnp.max(norm(to_float32(new) - to_float32(old)) / jnp.maximum(norm(new), 1e-30))

    outputs, entering = sweep(None)
    # Roundings of the layers between source and destination add up as independent ones do.
    rounding = 4 * float(jnp.finfo(x.dtype).eps) * len(stack.layer_types) ** 0.5
    (o, left), count, converged = fixed_point(
        sweep,
        outputs,
        entering,
        distance=change,
        tolerance=sweep_tolerance(stream, x.dtype),
        cap=cap,
        rounding=rounding,
    )
    x, left_above = _once(params, o, context, above, rule)
    _, kept = kinds.concatenated([*left_below, left, *left_above])
    return Settled(x, kept, count, converged)


def _embedded(params: Params, tokens: Tokens, context: Context) -> Hidden:
    return decoder.embed_steps(context.config, params, tokens, context.depth)
