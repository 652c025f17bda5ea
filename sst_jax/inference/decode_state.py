"""One position of decoding: the whole stack, iterated until each row's halting rule or its depth ends it."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from sst_jax.inference.kv_cache import Cache, init_cache
from sst_jax.inference.policies import DepthBudget, Halting, StepSeen, halted
from sst_jax.inference.sampling import SamplingParams
from sst_jax.model import decoder
from sst_jax.model.attention import KV, CachedStep, attend_cached, ropes, ropes_of_layer, seen_slots
from sst_jax.model.config import ModelConfig, StreamConfig
from sst_jax.model.decoder import Context, Layer, Params
from sst_jax.model.halves import attention_residual, feed, project
from sst_jax.model.passes import recurrent_step
from sst_jax.model.state import Masks, initial_state, ramp_at, read_in, sources_of
from sst_jax.types import AnyArray, AnyRowBools, AnyRowInts, RowBools, RowHidden, RowInts, RowStates, ScalarInt


class DecodeState(NamedTuple):
    """A batch that is being decoded."""

    cache: Cache
    token: AnyRowInts  # the newest token of each row, not yet fed
    done: AnyRowBools
    left: AnyRowInts  # how many tokens a row may still sample
    depth_budget: DepthBudget
    sampling_params: SamplingParams


class StateIn(NamedTuple):
    """The states [B, D] of one layer before a step, [L, B, D] of all."""

    own: RowHidden | RowStates  # what a row keeps that does not take the step
    entering: RowHidden | RowStates  # of the layer whose state enters


def empty_state(config: ModelConfig, rows: int, capacity: int) -> DecodeState:
    """Return a batch of rows that have all ended, with caches of `capacity` positions."""

    def zeros(kind: str) -> AnyArray:
        return jnp.zeros(rows, kind)

    return DecodeState(
        init_cache(config, rows, capacity),
        zeros("int32"),
        ~zeros("bool"),
        zeros("int32"),
        DepthBudget(zeros("int32"), zeros("int32"), Halting(zeros("int32"), zeros("float32"))),
        SamplingParams(zeros("float32"), zeros("int32"), zeros("float32"), zeros("uint32")),
    )


class StepCarry(NamedTuple):
    """What one iteration at a position hands to the next."""

    iteration: ScalarInt  # int32 [], iterations done at the position
    active: RowBools  # rows that iterate again
    used: RowInts  # iterations that each row has had
    hidden: RowHidden  # normed, after each row's last iteration
    first: RowHidden | None  # normed, after its first, where logits are of that one
    kv: KV
    state: RowStates | None


def decode_step_at_depth(
    config: ModelConfig,
    params: Params,
    token: AnyRowInts,
    cache: Cache,
    depth: AnyRowInts,
    start: int = 0,
    hidden: RowHidden | None = None,
) -> tuple[RowHidden, Cache]:
    """Return `decode_step`'s hidden states and cache without a halting rule: every row iterates `depth` times."""
    return decode_step(config, params, token, cache, depth, None, start, hidden)[:2]


@jax.named_scope("decode_step")
def decode_step(
    config: ModelConfig,
    params: Params,
    token: AnyRowInts,
    cache: Cache,
    depth: AnyRowInts,
    halting: Halting | None,
    start: int = 0,
    hidden: RowHidden | None = None,
) -> tuple[RowHidden, Cache, RowInts]:
    """Run one position of every row: the whole stack again for each iteration, from the same token.

    Args:
        token: [B], fed at each row's next position.
        cache: of the positions before; donated by the callers.
        depth: [B], the most iterations; a row with 0 keeps everything as it was.
        halting: each row's rule, which may end its iterations before `depth`; None: no row has one.
        start: 1 takes the last position up again after its first iteration, which `prefill` ran.
        hidden: [B, D], what that first iteration gave; None with start=0.

    Returns:
        The normed hidden state [B, D] after each row's last iteration, or its first one as `stream.readout` says, the
        cache one position further, and the iterations [B] that each row has had at the position.
    """
    backbone, stream = config.backbone, config.stream
    position = cache.length - start
    if stream is None:
        depth = jnp.minimum(depth, 1)
    embedded = decoder.embed(config, params, token[:, None])
    if hidden is None:
        hidden = jnp.zeros((token.shape[0], backbone.d_model), embedded.dtype)
    tables, seen = ropes(backbone, position[:, None]), seen_slots(backbone, position, cache.kv)
    leaves_state = _leaves_state(config, token)

    def wants_more(
        iteration: ScalarInt, active: RowBools, new: RowHidden, old: RowHidden, state: RowStates | None
    ) -> RowBools:
        going = active & (iteration < depth)
        if halting is None:
            return going
        seen = StepSeen(iteration, new, old, state, lambda: decoder.head(config, params, new), halting.threshold)
        return going & ~halted(halting, seen, going)

    def iterate(carry: StepCarry) -> StepCarry:
        i, active = carry.iteration, carry.active
        masks = None
        if stream is not None:
            masks = _masks(stream, i, position, jnp.where(i == 0, cache.has_state, leaves_state))
        write = active & ((i == 0) | (stream is None or stream.kv == "overwrite"))
        context = Context(config, tables, masks=masks)

        step = CachedStep(tables, position, write, seen)

        def rule(
            layer: Layer, residuals: tuple, state_in: StateIn | None, context: Context
        ) -> tuple[tuple, RowHidden | None]:
            x, kv = residuals
            with jax.named_scope("attention"):
                qkv = project(layer, x, context)
                here = step._replace(ropes=ropes_of_layer(tables, layer.rotates))
                out, kv = attend_cached(context.config.backbone, layer.kind, qkv, here, kv)
                h = attention_residual(layer, x, out)
            if stream is None or state_in is None:
                return (feed(layer, h, context, x.dtype)[0], kv), None
            masks = layer.stream.masks
            s = jnp.where(masks.has_state, state_in.entering[:, None], initial_state(stream, x))
            o, state_out = recurrent_step(layer, h, s, masks, context, x.dtype)
            return (o, kv), jnp.where(active[:, None], state_out[:, 0], state_in.own)

        state_in = None
        if stream is not None and carry.state is not None:
            linked = stream.is_linked
            state_in = StateIn(carry.state, carry.state[sources_of(config)] if linked else carry.state)
        x = decoder.marked(config, params, embedded, i)
        (x, kv), state = decoder.run_layers(params, rule, (x, carry.kv), context, state_in)
        new = decoder.final_norm(config, params, x[:, 0])
        more = wants_more(i + 1, active, new, carry.hidden, state)
        hidden = jnp.where(active[:, None], new, carry.hidden)
        first = None if carry.first is None else jnp.where(i == 0, hidden, carry.first)
        return StepCarry(i + 1, more, carry.used + active, hidden, first, kv, state)

    active = jnp.asarray(depth > start)
    if start and halting is not None:
        active = wants_more(jnp.int32(start), active, hidden, jnp.zeros_like(hidden), cache.state)
    first = hidden if stream is not None and stream.readout == "first" else None
    begin = StepCarry(jnp.int32(start), active, jnp.where(depth > 0, start, 0), hidden, first, cache.kv, cache.state)
    last = jax.lax.while_loop(lambda carry: jnp.any(carry.active), iterate, begin)
    ran = depth > 0
    has_state, length = jnp.where(ran, leaves_state, cache.has_state), jnp.where(ran, position + 1, cache.length)
    given = last.hidden if last.first is None else last.first
    return given, Cache(last.kv, last.state, has_state, length), last.used


def _leaves_state(config: ModelConfig, token: AnyRowInts) -> RowBools:
    """Return after which tokens [B] the state holds something: BOS leaves none where the stream skips it."""
    stream = config.stream
    if stream is not None and stream.initial == "skip_bos" and config.bos_id is not None:
        return jnp.asarray(token != config.bos_id)
    return jnp.ones(token.shape, bool)


def _masks(stream: StreamConfig, iteration: ScalarInt, position: RowInts, has_state: RowBools) -> Masks:
    """Return where states enter an iteration of one position."""
    reads = jnp.where(iteration == 0, read_in(stream, 0), read_in(stream, 1))
    begins = stream.initial in ("zero", "own") and read_in(stream, 0)
    is_initial = ~has_state & (iteration == 0) & (position == 0) & begins
    ramp = ramp_at(stream, position)[:, None, None] if stream.ramp else None
    return Masks((has_state & reads)[:, None, None], is_initial[:, None, None], ramp)
