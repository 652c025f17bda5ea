"""The forwards: a rule for each way to solve the recurrence between the two halves of a layer (`model/halves.py`).

    plain      blend off
    two_pass   the paper's: the stack without states, then once more blended with its states, shifted by one step
    k_pass     the same with k passes, each blended with the states of the one before; layer by layer in lockstep
    local      inside each layer: attention once, the feed-forward k times, states shifted by one step in between
    exact      inside each layer: attention once, then the feed-forward position after position; the oracle

FORWARDS is the registry: a name, its rule, and the options that are its own. A forward is written "name" or, with its
options in their order, "name:option:..."; so "k_pass:3". docs/adding-a-forward.md adds one.

At iteration depth I a position is I consecutive steps ([B, T*I, D]) and every rule stays as it is: attention gives each
iteration its own view of the past (`model/attention.py`), states enter a step from the step before.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp

from sst_jax.errors import InputError
from sst_jax.model import decoder
from sst_jax.model.config import ModelConfig, StreamConfig
from sst_jax.model.decoder import Context, ForwardOptions, Layer, Params, Residuals
from sst_jax.model.halves import attend, feed, residual_after_attention
from sst_jax.model.kinds import ByKind
from sst_jax.model.layers import to_float32
from sst_jax.model.links import Solved, scan_stack, stacked_passes
from sst_jax.model.loops import fixed_point
from sst_jax.model.passes import next_pass_states, pass_once, sweep_tolerance
from sst_jax.model.remat import walking
from sst_jax.model.scales import LayerScales, StepSquares, layer_scales, step_squares
from sst_jax.model.sharding import constrain
from sst_jax.model.state import shift_right
from sst_jax.model.walk import scan_positions, scan_spans, span_length
from sst_jax.types import (
    AllStates,
    Hidden,
    Json,
    Logits,
    PositionKeys,
    Positions,
    RandomKey,
    RowHidden,
    Scalar,
    ScalarBool,
    SegmentIds,
    Tokens,
)

SETTLED = "settled"  # scope of the branches (it falls back, it settles) behind sweeps


class LayerOutputs(NamedTuple):
    """What a rule returns of a layer besides its residuals; unused outputs are not computed."""

    k: PositionKeys | ByKind | None = None  # rotated, what a cache would hold
    v: PositionKeys | ByKind | None = None
    state_out: Hidden | None = None  # the state after every step
    sweeps: Scalar | None = None  # how often `fixed_point_states` ran the feed-forward, of every step on average


# (layer, residuals, extra, context) -> (residuals, outputs). In: a layer's parameters; the residual streams that enter
# it, [B, T*I, D]; its slice of the extras of `decoder.run`; what all layers share. Out: the residual streams that leave
# it, and its outputs.
Rule = Callable[[Layer, Residuals, Any, Context], tuple[Residuals, LayerOutputs]]
# What enters a step instead of its state: (layer, the states entering every step) -> states.
Intervention = Callable[[Layer, Hidden], Hidden]

# --------------------------------------------------------------------------------------------------------- The rules


def plain(layer: Layer, residuals: Residuals, extra: object, context: Context) -> tuple[Residuals, LayerOutputs]:
    """Apply the backbone alone: no state."""
    (x,) = residuals
    h, kv = attend(layer, x, context)
    o, _ = feed(layer, h, context, x.dtype)
    return (o,), LayerOutputs(*kv)


def k_pass(layer: Layer, residuals: Residuals, extra: object, context: Context) -> tuple[Residuals, LayerOutputs]:
    """Blend each residual stream with the states of the one before it; the first is plain.

    All of them enter the first layer as the same embeddings. Computing its attention once would take a branch in every
    layer, and what a branch keeps for its gradients costs more memory, and no less time, than the sharing saves.
    """
    s: jax.Array | None = None
    state_out: jax.Array | None = None
    outputs = []
    for number, x in enumerate(residuals, start=1):
        with jax.named_scope(f"pass_{number}"):
            h, _ = attend(layer, x, context)
            if state_out is not None:
                s = next_pass_states(layer, x, state_out, context)
            o, state_out = pass_once(layer, x, h, s, context)
            outputs.append(o)
    return tuple(outputs), LayerOutputs(state_out=state_out)


def local(layer: Layer, residuals: Residuals, extra: object, context: Context) -> tuple[Residuals, LayerOutputs]:
    """Attend once; run the feed-forward `passes` times, each blended with the states of the time before."""
    (x,), s = residuals, None
    h, kv = attend(layer, x, context)
    for number in range(1, options_of(context, Passes).passes + 1):
        with jax.named_scope(f"pass_{number}"):
            o, state_out = pass_once(layer, x, h, s, context)
            s = next_pass_states(layer, x, state_out, context)
    return (o,), LayerOutputs(*kv, state_out)


def exact(
    layer: Layer,
    residuals: Residuals,
    before: RowHidden | None,
    context: Context,
    intervene: Intervention | None = None,
) -> tuple[Residuals, LayerOutputs]:
    """Attend once; run the feed-forward step after step.

    Args:
      layer: its parameters.
      residuals: (x,); with `intervene` (x, other), where other enters the first layer as x does.
      before: the state of rows continued from a cache; None: there are none.
      context: what all layers share.
      intervene: (layer, states) -> states. `other` is blended with what it makes of the states entering every step of
        x, as in causal interventions on activations; x itself stays as it is. None: there is no `other`.

    Returns:
      The residuals, and the keys, values and states of x; with `intervene` the states of `other` alone.
    """
    x = residuals[0]
    with walking(True):  # its barriers part kernels in this half too, and the peak of a step is in the other one
        h, kv = attend(layer, x, context)
        summed = residual_after_attention(layer, h)
    o, state_out = scan_positions(layer, x, summed, context, before)
    if intervene is None:
        return (o,), LayerOutputs(*kv, state_out)
    other = residuals[1]
    states = intervene(layer, shift_right(context.stream, x, state_out, layer.stream.masks, before))
    h, _ = attend(layer, other, context)
    o_other, state_out = pass_once(layer, other, h, states, context)
    return (o, o_other), LayerOutputs(state_out=state_out)


def fixed_point_states(
    layer: Layer, residuals: Residuals, before: RowHidden | None, context: Context
) -> tuple[Residuals, LayerOutputs]:
    """Iterate until the states converge, else scan as `exact` does. Not differentiable.

    Where products have rows to spare, in spans (`scan_spans`); else as `local` does, all steps at once.

    Args:
      layer: its parameters.
      residuals: (x,).
      before: the state of rows continued from a cache; None: there are none.
      context: what all layers share.

    Returns:
      The residuals, and keys, values, states and `sweeps`: how often the feed-forward was run, or sweep_cap + 1 where
      that did not suffice and the positions were scanned.
    """
    stream, (x,) = context.stream, residuals
    summands, kv = attend(layer, x, context)
    h = residual_after_attention(layer, summands)
    length = 1 if stream.decay else span_length(*h.shape[:2])
    iterate = sweep_steps if length == 1 else functools.partial(scan_spans, length=length)
    o, state_out, count, converged = iterate(layer, x, h, context, before, tolerance=sweep_tolerance(stream, x.dtype))
    with jax.named_scope(SETTLED):
        o, state_out, count = jax.lax.cond(
            converged,
            lambda: (o, state_out, count),
            lambda: (*scan_positions(layer, x, h, context, before), jnp.float32(stream.sweep_cap + 1)),
        )
    return (o,), LayerOutputs(*kv, state_out, count)


def sweep_steps(
    layer: Layer, x: Hidden, h: Hidden, context: Context, before: RowHidden | None, *, tolerance: float
) -> tuple[Hidden, Hidden, Scalar, ScalarBool]:
    """Run the feed-forward over all steps, again and again until the states agree; as `scan_spans`."""
    stream, masks = context.stream, layer.stream.masks

    def sweep(s: jax.Array | None) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
        o, state_out = pass_once(layer, x, h, s, context, before)
        return (o, state_out), shift_right(stream, x, state_out, masks, before)

    def norm(part: jax.Array) -> jax.Array:  # of each row, so that a short one is not lost beside a long one
        return jnp.sqrt(jnp.sum(jnp.square(jnp.where(masks.has_state, to_float32(part), 0.0)), axis=(1, 2)))

    def change(new: jax.Array, old: jax.Array) -> jax.Array:
        return jnp.max(norm(to_float32(new) - to_float32(old)) / jnp.maximum(norm(new), 1e-30))

    outputs, s = sweep(None)
    (o, state_out), count, converged = fixed_point(
        sweep, outputs, s, distance=change, tolerance=tolerance, cap=stream.sweep_cap
    )
    return o, state_out, count.astype(jnp.float32), converged


# ------------------------------------------------------------------------------------------------------- The registry


@dataclasses.dataclass(frozen=True)
class Passes(ForwardOptions):
    """passes   how often the feed-forward runs"""

    passes: int = 2

    def __post_init__(self) -> None:
        if self.passes < 1:
            raise InputError(f"passes={self.passes} must be at least 1")


@dataclasses.dataclass(frozen=True)
class StackedPasses(Passes):
    """passes   of the whole stack, in lockstep layer by layer"""

    @property
    def num_residuals(self) -> int:
        """How many residual streams the stack carries."""
        return self.passes


@dataclasses.dataclass(frozen=True)
class TwoPasses(StackedPasses):
    """passes   of the whole stack: 2"""

    def __post_init__(self) -> None:
        if self.passes != 2:
            raise InputError(f"passes={self.passes} does not fit forward='two_pass': k_pass and local take passes >= 1")


@dataclasses.dataclass(frozen=True)
class Forward:
    """A way to solve the recurrence.

    rule        what it does in a layer
    options     the type of its own options, each a field with a default, int or float
    has_state   whether it blends states in, and leaves them
    across      what it does over the whole stack where states go from layer to layer; None: nothing that would be it
    """

    rule: Rule
    options: type[ForwardOptions] = ForwardOptions
    has_state: bool = True
    across: Callable[..., Solved] | None = None


@dataclasses.dataclass(frozen=True)
class Intervened(ForwardOptions):
    """Of `exact` with an intervention: a residual stream as it is, and one that the intervention changes."""

    @property
    def num_residuals(self) -> int:
        """How many residual streams the stack carries."""
        return 2


FORWARDS: dict[str, Forward] = {
    "plain": Forward(plain, has_state=False),
    "two_pass": Forward(k_pass, TwoPasses, across=stacked_passes),
    "k_pass": Forward(k_pass, StackedPasses, across=stacked_passes),
    "local": Forward(local, Passes),
    "exact": Forward(exact, across=scan_stack),
}
Options = TypeVar("Options", bound=ForwardOptions)


class BoundForward(NamedTuple):
    """A forward with its options chosen."""

    name: str
    forward: Forward
    options: ForwardOptions


def bind(spelling: str, passes: int = 2, depth: int = 1) -> BoundForward:
    """Return the forward that is meant, with its options.

    Args:
      spelling: a name of FORWARDS, or with its options in their order "name:option:...", as "k_pass:3".
      passes: of a forward with this option that is not spelled out; other forwards ignore it.
      depth: iterations that it is to run.

    Raises: InputError on a forward that does not exist, or on options or a depth that it cannot have.
    """
    name, *spelled = spelling.split(":")
    if name not in FORWARDS:
        raise InputError(f"forward={spelling!r} is not one of {', '.join(FORWARDS)}")
    if depth < 1:
        raise InputError(f"depth={depth} must be at least 1")
    forward = FORWARDS[name]
    fields = dataclasses.fields(forward.options)
    if len(spelled) > len(fields):
        takes = ":".join([name, *(field.name.upper() for field in fields)])
        raise InputError(f"forward={spelling!r} has more options than it takes, which are {takes}")
    chosen: dict[str, int | float] = {"passes": passes} if any(field.name == "passes" for field in fields) else {}
    for field, text in zip(fields, spelled, strict=False):
        number: type[int | float] = float if isinstance(field.default, float) else int
        try:
            chosen[field.name] = number(text)
        except ValueError:
            raise InputError(f"forward={spelling!r}: {field.name} {text!r} is not {number.__name__}") from None
    if not forward.has_state and depth != 1:
        raise InputError(f"forward={name!r} has no state, so a second iteration would repeat the first: use depth=1")
    return BoundForward(name, forward, forward.options(**chosen))


def check_links(stream: StreamConfig | None, bound: BoundForward) -> None:
    """Raise InputError where a forward would have to pass states between layers, and cannot."""
    if stream is not None and stream.is_linked and bound.forward.has_state and bound.forward.across is None:
        raise InputError(
            f"forward={bound.name!r} refines states inside a layer, and stream.links={stream.links} carries them from "
            "layer to layer: use two_pass, k_pass or exact"
        )


def options_of(context: Context, kind: type[Options]) -> Options:
    """Return the context's options as a rule knows them.

    Raises: ValueError where the rule runs with another forward's options.
    """
    if not isinstance(context.options, kind):
        raise ValueError(f"the rule needs {kind.__name__} as context.options, not {type(context.options).__name__}")
    return context.options


SETTINGS = ("config", "forward", "passes", "depth")


@functools.partial(jax.jit, static_argnames=(*SETTINGS, "remat", "attention"))
def hidden(
    config: ModelConfig,
    params: Params,
    tokens: Tokens,
    *,
    forward: str = "two_pass",
    passes: int = 2,
    depth: int = 1,
    segment_ids: SegmentIds | None = None,
    positions: Positions | None = None,
    alpha_warmup_fraction: Scalar | None = None,
    dropout_key: RandomKey | None = None,
    remat: str = "none",
    attention: str = "xla",
) -> Hidden:
    """Return final hidden states [B, T, D], after the last norm.

    Args:
      config: of the model. Without a stream every forward is `plain`.
      params: as `decoder.init_params` returns them.
      tokens: of whole rows.
      forward: as `bind` reads it.
      passes: of a forward that takes passes.
      depth: iterations I at every position; the last one's output is returned.
      segment_ids: 0 on padding, one number a document; None: each row is one document.
      positions: None: counted within each document.
      alpha_warmup_fraction: in [0, 1], how far alpha has been warmed up; None: all the way.
      dropout_key: of LoRA's dropout; None: no dropout.
      remat: what the backward pass recomputes of each layer; one of `remat.REMAT`.
      attention: the kernel, as `kernels.pick` names it.

    Raises: InputError as `bind`.
    """
    settings: Json = {"forward": forward, "passes": passes, "depth": depth, "remat": remat, "attention": attention}
    rows: Json = {"segment_ids": segment_ids, "positions": positions}
    drawn: Json = {"alpha_warmup_fraction": alpha_warmup_fraction, "dropout_key": dropout_key}
    return _solve(config, params, tokens, **settings, **rows, **drawn)[0]


@functools.partial(jax.jit, static_argnames=(*SETTINGS, "remat", "attention"))
def hidden_and_scales(
    config: ModelConfig, params: Params, tokens: Tokens, *, segment_ids: SegmentIds | None = None, **settings: Any
) -> tuple[Hidden, LayerScales]:
    """Return what `hidden` does, and RMS of residual stream and states by layer and iteration; settings as there."""
    out, squares = _solve(config, params, tokens, segment_ids=segment_ids, scales=True, **settings)
    assert squares is not None
    depth = squares.residual.shape[-1] // tokens.shape[1]
    real = jnp.ones(tokens.shape, jnp.int32) if segment_ids is None else segment_ids
    scales = layer_scales(squares, real, depth)  # read on every host of a mesh
    return out, jax.tree.map(lambda part: constrain(part, None, None), scales)


def _solve(
    config: ModelConfig,
    params: Params,
    tokens: Tokens,
    *,
    forward: str = "two_pass",
    passes: int = 2,
    depth: int = 1,
    segment_ids: SegmentIds | None = None,
    positions: Positions | None = None,
    remat: str = "none",
    scales: bool = False,
    **context_fields: Any,
) -> tuple[Hidden, StepSquares | None]:
    """Return final hidden states, and with `scales` the mean squares of every step; the rest as for `hidden`."""
    bound = bind(forward, passes, depth)
    if config.stream is None or (config.stream.alpha == 0.0 and (bound.name == "exact" or depth > 1)):
        # Without a blend there is nothing to scan over or to repeat, and products of other shapes round differently.
        bound, depth = bind("plain"), 1
    context = dataclasses.replace(
        decoder.row_context(config, tokens, segment_ids, positions, depth=depth),
        options=bound.options,
        recompute=remat != "none",
        **context_fields,
    )
    check_links(config.stream, bound)
    if config.stream is not None and config.stream.is_linked and bound.forward.across is not None:
        solved = bound.forward.across(params, tokens, context, remat=remat)
        return solved.hidden[:, :, 0], solved.squares if scales else None

    def rule(layer: Layer, residuals: Residuals, extra: None, context: Context) -> tuple[Residuals, StepSquares | None]:
        residuals, left = bound.forward.rule(layer, residuals, extra, context)
        # Stacked outputs that nothing reads would still be stacked.
        return residuals, step_squares(residuals[-1], left.state_out) if scales else None

    iterations, squares = decoder.run(params, rule, tokens, context, remat=remat)
    return iterations[:, :, 0], squares


@functools.partial(jax.jit, static_argnames=SETTINGS)
def logits(config: ModelConfig, params: Params, tokens: Tokens, **settings: Any) -> Logits:
    """Return logits, float32 or wider; settings as for `hidden`."""
    return decoder.head(config, params, hidden(config, params, tokens, **settings))


@functools.partial(jax.jit, static_argnames=SETTINGS)
def states(
    config: ModelConfig,
    params: Params,
    tokens: Tokens,
    *,
    forward: str = "exact",
    passes: int = 2,
    depth: int = 1,
    segment_ids: SegmentIds | None = None,
) -> AllStates:
    """Return each layer's state after every iteration, as a forward has it.

    Args:
      config: of a model with a stream.
      params: as `decoder.init_params` returns them.
      tokens: of whole rows.
      forward: one with states, as `bind` reads it.
      passes: of a forward that takes passes.
      depth: iterations I at every position.
      segment_ids: as for `hidden`.

    Raises: InputError as `bind`, and where there is no stream or the forward has no states.
    """
    bound = bind(forward, passes, depth)
    if config.stream is None or not bound.forward.has_state:
        raise InputError("states need a stream and a forward other than 'plain'")
    context = decoder.row_context(config, tokens, segment_ids, depth=depth)
    context = dataclasses.replace(context, options=bound.options)
    check_links(config.stream, bound)
    if config.stream.is_linked and bound.forward.across is not None:
        return jax.vmap(lambda steps: decoder.fold(steps, depth))(
            bound.forward.across(params, tokens, context).state_out
        )

    def rule(layer: Layer, residuals: Residuals, extra: None, context: Context) -> tuple[Residuals, jax.Array | None]:
        residuals, left = bound.forward.rule(layer, residuals, extra, context)
        return residuals, None if left.state_out is None else decoder.fold(left.state_out, depth)

    _, state_out = decoder.run(params, rule, tokens, context)
    assert state_out is not None  # the forward has states
    return state_out
