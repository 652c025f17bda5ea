"""The forwards: one layer cut in two halves, and a rule for each way to solve the recurrence between them.

    attend   x  -> h        attention, no state in it
    feed     h, s -> o, f   blend the state in, feed-forward; o goes up, f (or o) is what the layer was thinking

    plain      blend off
    two_pass   the whole stack plain, its states moved one position on, the whole stack again blended; the paper's
    k_pass     the same with k stacks, each blended with the states of the one before; all stacks climb in lockstep
    local      inside each layer: attention once, the feed-forward k times, states moved on in between
    exact      inside each layer: attention once, then the feed-forward position after position; the oracle

At iteration depth I a position is I consecutive steps ([B, T*I, D]) and every rule stays as it is: attention gives each
iteration its own view of the past (`model/attention.py`), states enter a step from the step before.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike

from sst_jax.errors import InputError
from sst_jax.model import decoder
from sst_jax.model.attention import attend_rows
from sst_jax.model.config import ModelConfig
from sst_jax.model.decoder import Context, Layer, Params, Residuals
from sst_jax.model.layers import ACTIVATIONS, to_float32
from sst_jax.model.state import Masks, blend, decay_state, initial_state, scan_states, shift_right, state_update
from sst_jax.types import Positions, SegmentIds, Tokens

FORWARDS = ("plain", "two_pass", "k_pass", "local", "exact")
CHUNK = 32  # positions of `exact` between checkpoints, at most


class LayerOutputs(NamedTuple):
    """What a rule leaves behind in a layer besides its streams; whatever nobody reads is not computed."""

    k: jax.Array | None = None  # [B, T, K, H], rotated, what a cache would hold
    v: jax.Array | None = None
    state_out: jax.Array | None = None  # [B, T*I, D], the memory after every step
    sweeps: jax.Array | None = None  # int32 [], what `fixed_point_states` took


class AttentionResidual(NamedTuple):
    """h as what it is the sum of: together half the bytes of the wide sum in bfloat16, and so what gradients keep."""

    x: jax.Array  # [B, T*I, D], the layer's input
    out: jax.Array  # [B, T*I, D], what attention adds to it, before its norm


# Where a function below is under `jax.checkpoint`, its arguments are kept for its gradients and what lies in between is
# not. The products with frozen kernels are not repeated for that: no gradient reads their results.


def project(layer: Layer, x: jax.Array, context: Context) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Queries [B, T*I, N, H], keys and values [B, T*I, K, H] of a layer's input, normed, not yet rotated."""
    backbone, block = context.config.backbone, layer.block

    @jax.checkpoint
    def linears(x: jax.Array) -> tuple[jax.Array, ...]:
        y = block.pre_attn_norm(x).astype(x.dtype)
        return tuple(
            linear(y, layer.drop.get(name)) for name, linear in zip("qkv", (block.q, block.k, block.v), strict=True)
        )

    q, k, v = linears(x)
    q, k, v = (part.reshape(*part.shape[:2], -1, backbone.head_dim) for part in (q, k, v))
    return block.q_norm(q).astype(x.dtype), block.k_norm(k).astype(x.dtype), v


def attention_residual(layer: Layer, x: jax.Array, out: jax.Array) -> AttentionResidual:
    """h of a layer's input and attention's output [B, T*I, N*H]."""
    return AttentionResidual(x, layer.block.o(out, layer.drop.get("o")))


def residual_after_attention(layer: Layer, h: AttentionResidual | jax.Array) -> jax.Array:
    """h [B, T*I, D], wide: the residual stream after attention; as it is where it has been summed before."""
    return to_float32(h.x) + layer.block.post_attn_norm(h.out) if isinstance(h, AttentionResidual) else h


def attend(layer: Layer, x: jax.Array, context: Context) -> tuple[AttentionResidual, tuple[jax.Array, jax.Array]]:
    """h, not yet summed, and the keys and values that a cache would hold."""
    backbone, stream = context.config.backbone, context.config.stream
    keep = "overwrite" if stream is None else stream.kv
    q, k, v = project(layer, x, context)
    past = None if context.past is None else (context.past, layer.cache_index)
    if context.segment_ids is None:
        raise ValueError("rows are attended over with their segment ids")
    out, k, v = attend_rows(
        backbone,
        layer.is_global,
        context.ropes,
        context.segment_ids,
        context.depth,
        keep,
        q,
        k,
        v,
        context.attention,
        past,
    )
    return attention_residual(layer, x, out), (k, v)


def feed(
    layer: Layer,
    h: AttentionResidual | jax.Array,
    context: Context,
    dtype: DTypeLike,
    s: jax.Array | None = None,
    where: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """o in `dtype` and f wide, [B, T*I, D]: the feed-forward half, with the state s blended in `where` one enters."""
    block, activation = layer.block, ACTIVATIONS[context.config.backbone.activation]

    @jax.checkpoint
    def widen(h: AttentionResidual | jax.Array, s: jax.Array | None) -> tuple[jax.Array, ...]:
        h = residual_after_attention(layer, h)
        if s is None or where is None:
            mixed = h
        else:
            mixed = blend(context.stream, *layer.stream[1:], h, s, where)
        y = block.pre_ffn_norm(mixed).astype(dtype)
        return mixed, block.gate(y, layer.drop.get("gate")), block.up(y, layer.drop.get("up"))

    @jax.checkpoint
    def narrow(gate: jax.Array, up: jax.Array) -> jax.Array:
        return block.down(activation(gate) * up, layer.drop.get("down"))

    mixed, gate, up = widen(h, s)
    f = block.post_ffn_norm(narrow(gate, up))
    return (mixed + f).astype(dtype), f


def plain(layer: Layer, residuals: Residuals, extra: Any, context: Context) -> tuple[Residuals, LayerOutputs]:
    """The backbone: no state."""
    (x,) = residuals
    h, kv = attend(layer, x, context)
    o, _ = feed(layer, h, context, x.dtype)
    return (o,), LayerOutputs(*kv)


def k_pass(layer: Layer, residuals: Residuals, extra: Any, context: Context) -> tuple[Residuals, LayerOutputs]:
    """Each stream blended with the states of the one before it; the first is plain.

    All streams enter the first layer as the same embeddings. Computing its attention once would take a branch in every
    layer, and what a branch keeps for its gradients costs more memory, and no less time, than the sharing saves.
    """
    s: jax.Array | None = None
    memory: jax.Array | None = None
    outputs = []
    for x in residuals:
        h, _ = attend(layer, x, context)
        if memory is not None:
            s = next_pass_states(layer, x, memory, context)
        o, memory = pass_once(layer, x, h, s, context)
        outputs.append(o)
    return tuple(outputs), LayerOutputs(state_out=memory)


def pass_once(
    layer: Layer,
    x: jax.Array,
    h: AttentionResidual | jax.Array,
    s: jax.Array | None,
    context: Context,
    before: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """o and the memory after every step, from the feed-forward over all steps at once with the states s."""
    masks, alpha, gain = layer.stream
    o, f = feed(layer, h, context, x.dtype, s, masks.blends)
    whole = residual_after_attention(layer, h)
    return o, scan_states(context.stream, alpha, gain, x, whole, f, o, masks, before)


def next_pass_states(layer: Layer, x: jax.Array, memory: jax.Array, context: Context) -> jax.Array:
    """The states that a pass over x blends in, from the memory of the pass before, with or without its gradient."""
    kept = memory if context.stream.pass1_grad else jax.lax.stop_gradient(memory)
    return shift_right(context.stream, x, kept, layer.stream[0])


def local(layer: Layer, residuals: Residuals, extra: Any, context: Context) -> tuple[Residuals, LayerOutputs]:
    """Attention once; the feed-forward `passes` times, each blended with the states of the time before."""
    (x,), s = residuals, None
    h, kv = attend(layer, x, context)
    for _ in range(context.options["passes"]):
        o, memory = pass_once(layer, x, h, s, context)
        s = next_pass_states(layer, x, memory, context)
    return (o,), LayerOutputs(*kv, memory)


def exact(layer: Layer, residuals: Residuals, before: Any, context: Context) -> tuple[Residuals, LayerOutputs]:
    """Attention once; the feed-forward step after step. `before` [B, D]: the memory of rows that go on."""
    (x,) = residuals
    h, kv = attend(layer, x, context)
    o, memory = scan_positions(layer, x, residual_after_attention(layer, h), context, before)
    return (o,), LayerOutputs(*kv, memory)


def scan_positions(
    layer: Layer, x: jax.Array, h: jax.Array, context: Context, before: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """o and the memory after every step, [B, T*I, D], of one layer: its feed-forward run step after step.

    With `context.recompute` in chunks that the backward pass walks again, so that about every CHUNK-th memory is kept
    until then; where the whole layer is recomputed first, only under remat="memories" and "offload", or the positions
    are walked once more for them.
    """
    stream, (entries, *_) = context.stream, layer.stream
    rows, steps, _ = h.shape

    def step(m: jax.Array, inputs: tuple) -> tuple[jax.Array, tuple]:
        h_t, s0, live, begins = inputs
        masks = Masks(live, begins)
        s = jnp.where(live, m, 0.0 if s0 is None else s0)
        o, f = feed(layer, h_t[:, None], context, x.dtype, s[:, None], masks.blends[:, None])
        m = decay_state(stream, s, state_update(stream, o, f)[:, 0], masks.blends)
        return m, (o[:, 0], m)

    chunk = -(-steps // -(-steps // CHUNK))  # chunks of about one size, so that hardly a step is padding
    padding = -steps % chunk

    def chunked(part: jax.Array) -> jax.Array:  # [B, T*I, ...] -> [chunks, chunk, B, ...]
        part = jnp.pad(part, ((0, 0), (0, padding), (0, 0)))
        return jnp.moveaxis(part, 1, 0).reshape(-1, chunk, rows, part.shape[-1])

    s0 = initial_state(stream, x) if stream.initial == "own" else None  # else zeros, or read by nobody
    inputs = jax.tree.map(chunked, (h, s0, entries.has_state, entries.is_initial))

    def through(m: jax.Array, part: tuple) -> tuple[jax.Array, tuple]:
        return jax.lax.scan(step, m, part)

    if context.recompute:
        through = jax.checkpoint(through, prevent_cse=False)

    def inner(m: jax.Array, part: tuple) -> tuple[jax.Array, tuple]:
        return through(checkpoint_name(m, decoder.KEPT), part)

    first = jnp.zeros_like(state_update(stream, x[:, 0], to_float32(x[:, 0]))) if before is None else before
    _, (o, memory) = jax.lax.scan(inner, first, inputs)
    o, memory = (jnp.moveaxis(part.reshape(-1, *part.shape[2:])[:steps], 0, 1) for part in (o, memory))
    return o, memory


def fixed_point_states(
    layer: Layer, residuals: Residuals, before: Any, context: Context
) -> tuple[Residuals, LayerOutputs]:
    """`local` with as many sweeps as it takes for the states to stand still, else `exact`. Not differentiable.

    `sweeps` says how many; sweep_cap + 1 that they did not suffice and the positions were walked one by one.
    """
    stream, (x,), (masks, *_) = context.stream, residuals, layer.stream
    summands, kv = attend(layer, x, context)
    h = residual_after_attention(layer, summands)

    def norm(part: jax.Array) -> jax.Array:  # of each row, so that a short one is not lost beside a long one
        return jnp.sqrt(jnp.sum(jnp.square(jnp.where(masks.has_state, to_float32(part), 0.0)), axis=(1, 2)))

    def moving(carry: tuple) -> jax.Array:
        count, _, _, change = carry
        return (change > stream.sweep_tolerance) & (count < stream.sweep_cap)

    def again(carry: tuple) -> tuple:
        count, _, s, _ = carry
        o, memory = pass_once(layer, x, h, s, context, before)
        moved = shift_right(stream, x, memory, masks, before)
        change = jnp.max(norm(to_float32(moved) - to_float32(s)) / jnp.maximum(norm(moved), 1e-30))
        return count + 1, (o, memory), moved, change.astype(jnp.float32)

    o, memory = pass_once(layer, x, h, None, context, before)
    begin = (jnp.int32(1), (o, memory), shift_right(stream, x, memory, masks, before), jnp.float32(jnp.inf))
    count, (o, memory), _, change = jax.lax.while_loop(moving, again, begin)
    o, memory, count = jax.lax.cond(
        change <= stream.sweep_tolerance,
        lambda: (o, memory, count),
        lambda: (*scan_positions(layer, x, h, context, before), jnp.int32(stream.sweep_cap + 1)),
    )
    return (o,), LayerOutputs(*kv, memory, count)


RULES = {"plain": plain, "two_pass": k_pass, "k_pass": k_pass, "local": local, "exact": exact}


def check(forward: str, passes: int, depth: int) -> None:
    """Raises InputError on a forward that does not exist or settings that it cannot have."""
    if forward not in FORWARDS:
        raise InputError(f"forward={forward!r} is not one of {', '.join(FORWARDS)}")
    if passes < 1 or (forward == "two_pass" and passes != 2):
        raise InputError(f"passes={passes} does not fit forward={forward!r}: k_pass and local take passes >= 1")
    if depth < 1:
        raise InputError(f"depth={depth} must be at least 1")
    if forward == "plain" and depth != 1:
        raise InputError("forward='plain' has no state, so a second iteration would repeat the first: use depth=1")


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
    alpha_warmup_fraction: jax.Array | None = None,
    dropout_key: jax.Array | None = None,
    remat: str = "none",
    attention: str = "xla",
) -> jax.Array:
    """Final hidden states [B, T, D] of tokens [B, T], after the last norm.

    Args:
      config, params: what `decoder.init_params` takes and returns. Without a stream every forward is `plain`.
      forward: one of FORWARDS; `passes` is k of k_pass and local.
      depth: iterations I at every position; the last one's output is returned.
      segment_ids: [B, T], 0 on padding, one number a document; None: each row is one document.
      positions: [B, T]; None: counted within each document.
      alpha_warmup_fraction: [] in [0, 1], how far alpha's warm-up has come; None is done.
      dropout_key: LoRA dropout on when given.
      remat: what the backward pass recomputes of each layer; one of `decoder.REMAT`.
      attention: the kernel, as `kernels.pick` names it.

    Raises: InputError on a forward, passes or depth that do not fit together.
    """
    check(forward, passes, depth)
    if config.stream is None or (config.stream.alpha == 0.0 and (forward == "exact" or depth > 1)):
        # Without a blend there is nothing to scan over or to repeat, and products of other shapes round differently.
        forward, depth = "plain", 1
    context = decoder.row_context(
        config,
        tokens,
        segment_ids,
        positions,
        depth=depth,
        alpha_warmup_fraction=alpha_warmup_fraction,
        dropout_key=dropout_key,
        options={"passes": passes},
        attention=attention,
        recompute=remat != "none",
    )

    def rule(*arguments: Any) -> tuple[Residuals, None]:
        return RULES[forward](*arguments)[0], None  # what the layers leave behind would be stacked for nobody

    x = jnp.repeat(decoder.embed(config, params, tokens), depth, axis=1)
    residuals, _ = decoder.run_layers(params, rule, (x,) * num_residuals(forward, passes), context, remat=remat)
    x = residuals[-1].reshape(*tokens.shape, depth, -1)[:, :, -1]
    return decoder.final_norm(config, params, x)


def num_residuals(forward: str, passes: int) -> int:
    """How many streams climb the stack together."""
    return passes if forward in ("two_pass", "k_pass") else 1


@functools.partial(jax.jit, static_argnames=SETTINGS)
def logits(config: ModelConfig, params: Params, tokens: Tokens, **settings: Any) -> jax.Array:
    """Logits [B, T, V], float32 or wider; settings as for `hidden`."""
    return decoder.head(params, hidden(config, params, tokens, **settings))


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
) -> jax.Array:
    """What every layer remembers after every iteration, [L, B, T, I, D], as the named forward has it (not plain).

    Raises: InputError as `hidden`, and where there is no stream.
    """
    check(forward, passes, depth)
    if config.stream is None or forward == "plain":
        raise InputError("states need a stream and a forward other than 'plain'")
    context = decoder.row_context(config, tokens, segment_ids, depth=depth, options={"passes": passes})

    def rule(*arguments: Any) -> tuple[Residuals, jax.Array | None]:
        residuals, left = RULES[forward](*arguments)
        return residuals, left.state_out

    x = jnp.repeat(decoder.embed(config, params, tokens), depth, axis=1)
    _, memory = decoder.run_layers(params, rule, (x,) * num_residuals(forward, passes), context)
    return memory.reshape(memory.shape[0], *tokens.shape, depth, -1)
