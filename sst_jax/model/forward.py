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
from typing import Any

import jax
import jax.numpy as jnp

from sst_jax.errors import InputError
from sst_jax.model import decoder
from sst_jax.model.attention import attend_rows
from sst_jax.model.config import ModelConfig
from sst_jax.model.decoder import Context, Layer, Params, Streams
from sst_jax.model.layers import wide
from sst_jax.model.state import Masks, blend, initial, propagate, remember, thought

FORWARDS = ("plain", "two_pass", "k_pass", "local", "exact")
CHUNK = 16  # positions of `exact` between checkpoints


def project(layer: Layer, x: jax.Array, context: Context) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Queries [B, T*I, N, H], keys and values [B, T*I, K, H] of a layer's input, normed, not yet rotated."""
    backbone, block = context.config.backbone, layer.block
    y = block.pre_attn_norm(x).astype(x.dtype)
    q, k, v = (getattr(block, name)(y, layer.drop.get(name)) for name in ("q", "k", "v"))
    q, k, v = (part.reshape(*part.shape[:2], -1, backbone.head_dim) for part in (q, k, v))
    return block.q_norm(q).astype(x.dtype), block.k_norm(k).astype(x.dtype), v


def rejoin(layer: Layer, x: jax.Array, out: jax.Array) -> jax.Array:
    """h, wide: the residual stream after attention's output [B, T*I, N*H] has gone through o and its norm."""
    return wide(x) + layer.block.post_attn_norm(layer.block.o(out, layer.drop.get("o")))


def attend(layer: Layer, x: jax.Array, context: Context) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """h [B, T*I, D], wide, and the keys and values that a cache would hold."""
    backbone, stream = context.config.backbone, context.config.stream
    keep = "overwrite" if stream is None else stream.kv
    q, k, v = project(layer, x, context)
    out, k, v = attend_rows(
        backbone, layer.is_global, context.ropes, context.segment_ids, context.depth, keep, q, k, v
    )  # fmt: skip
    return rejoin(layer, x, out), (k, v)


def feed(
    layer: Layer, h: jax.Array, context: Context, dtype: jnp.dtype, s: jax.Array | None = None,
    where: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    """o in `dtype` and f wide, [B, T*I, D]: the feed-forward half, with the state s blended in `where` one enters."""
    block, mixed = layer.block, h
    if s is not None:
        mixed = blend(context.config.stream, layer.alpha, layer.gain, h, s, where)
    y = block.pre_ffn_norm(mixed).astype(dtype)
    gate, up = block.gate(y, layer.drop.get("gate")), block.up(y, layer.drop.get("up"))
    f = block.post_ffn_norm(block.down(jax.nn.gelu(gate, approximate=True) * up, layer.drop.get("down")))
    return (mixed + f).astype(dtype), f


def plain(layer: Layer, streams: Streams, extra: Any, context: Context) -> tuple[Streams, Any]:
    """The backbone: no state."""
    (x,) = streams
    h, kv = attend(layer, x, context)
    o, _ = feed(layer, h, context, x.dtype)
    return (o,), kv


def k_pass(layer: Layer, streams: Streams, extra: Any, context: Context) -> tuple[Streams, Any]:
    """Each stream blended with the states of the one before it; the first is plain."""
    stream, s, outputs = context.config.stream, None, []
    for x in streams:
        h, _ = attend(layer, x, context)
        o, f = feed(layer, h, context, x.dtype, s, layer.masks.blends)
        outputs.append(o)
        s = propagate(stream, layer.alpha, layer.gain, x, h, f, o, layer.masks)
        s = s if stream.pass1_grad else jax.lax.stop_gradient(s)
    return tuple(outputs), None


def local(layer: Layer, streams: Streams, extra: Any, context: Context) -> tuple[Streams, Any]:
    """Attention once; the feed-forward `passes` times, each blended with the states of the time before."""
    stream, (x,), s = context.config.stream, streams, None
    h, kv = attend(layer, x, context)
    for _ in range(context.options["passes"]):
        o, f = feed(layer, h, context, x.dtype, s, layer.masks.blends)
        s = propagate(stream, layer.alpha, layer.gain, x, h, f, o, layer.masks)
        s = s if stream.pass1_grad else jax.lax.stop_gradient(s)
    return (o,), kv


def exact(layer: Layer, streams: Streams, extra: Any, context: Context) -> tuple[Streams, Any]:
    """Attention once; the feed-forward step after step, in checkpointed chunks. Also returns what a decoder needs.

    The per-layer output is (keys, values, memory after the step that `options["last"]` [B] names, if it does).
    """
    stream, (x,) = context.config.stream, streams
    h, kv = attend(layer, x, context)
    rows, steps, _ = h.shape

    def step(m: jax.Array, inputs: tuple) -> tuple[jax.Array, tuple]:
        h_t, s0, live, begins = inputs
        masks = Masks(live, begins)
        s = jnp.where(live, m, s0)
        o, f = feed(layer, h_t[:, None], context, x.dtype, s[:, None], masks.blends[:, None])
        m = remember(stream, s, thought(stream, o, f)[:, 0], masks.blends)
        return m, (o[:, 0], m)

    chunk = min(CHUNK, steps)
    padding = -steps % chunk

    def chunked(part: jax.Array) -> jax.Array:  # [B, T*I, ...] -> [chunks, chunk, B, ...]
        part = jnp.pad(part, ((0, 0), (0, padding), (0, 0)))
        return jnp.moveaxis(part, 1, 0).reshape(-1, chunk, rows, part.shape[-1])

    inputs = jax.tree.map(chunked, (h, initial(stream, x), layer.masks.live, layer.masks.begins))
    inner = jax.checkpoint(lambda m, part: jax.lax.scan(step, m, part), prevent_cse=False)
    first = jnp.zeros_like(thought(stream, x[:, 0], wide(x[:, 0])))
    _, (o, memory) = jax.lax.scan(inner, first, inputs)
    o, memory = (jnp.moveaxis(part.reshape(-1, *part.shape[2:])[:steps], 0, 1) for part in (o, memory))
    last = context.options.get("last")
    kept = None if last is None else jnp.take_along_axis(memory, last[:, None, None], axis=1)[:, 0]
    return (o,), (*kv, kept)


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


@functools.partial(
    jax.jit, static_argnames=("config", "forward", "passes", "depth", "bos_id", "dtype", "remat", "normed")
)
def hidden(
    config: ModelConfig, params: Params, tokens: jax.Array, *, forward: str = "two_pass", passes: int = 2,
    depth: int = 1, segment_ids: jax.Array | None = None, positions: jax.Array | None = None,
    bos_id: int | None = None, warmth: jax.Array | None = None, dropout_key: jax.Array | None = None,
    dtype: str = "float32", remat: bool = False, normed: bool = True,
) -> jax.Array:  # fmt: skip
    """Final hidden states [B, T, D] of tokens [B, T], after the last norm unless `normed` is False.

    Args:
      config, params: what `decoder.init_params` takes and returns. Without a stream every forward is `plain`.
      forward: one of FORWARDS; `passes` is k of k_pass and local.
      depth: iterations I at every position; the last one's output is returned.
      segment_ids: [B, T], 0 on padding, one number a document; None: each row is one document.
      positions: [B, T]; None: counted within each document.
      bos_id: the beginning-of-sequence token, for initial="skip_bos".
      warmth: [] in [0, 1], how far alpha's warm-up has come; None is done.
      dropout_key: LoRA dropout on when given.
      dtype: of the activations.
      remat: recompute each layer in the backward pass.

    Raises: InputError on a forward, passes or depth that do not fit together.
    """
    check(forward, passes, depth)
    if config.stream is None or (config.stream.alpha == 0.0 and forward == "exact"):
        # Without a blend there is nothing to scan over, and row-by-row products would round differently.
        forward, depth = "plain", 1
    context = decoder.row_context(
        config, tokens, segment_ids, positions, depth=depth, bos_id=bos_id, warmth=warmth, dropout_key=dropout_key,
        options={"passes": passes},
    )  # fmt: skip
    x = jnp.repeat(decoder.embed(config, params, tokens, jnp.dtype(dtype)), depth, axis=1)
    copies = passes if forward in ("two_pass", "k_pass") else 1
    streams, _ = decoder.run_layers(params, without_extras(RULES[forward]), (x,) * copies, context, remat=remat)
    x = streams[-1].reshape(*tokens.shape, depth, -1)[:, :, -1]
    return decoder.final_norm(config, params, x) if normed else x


def without_extras(rule: Any) -> Any:
    """The rule without its per-layer output, so that the scan stacks nothing that nobody reads."""

    def bare(layer: Layer, streams: Streams, extra: Any, context: Context) -> tuple[Streams, None]:
        return rule(layer, streams, extra, context)[0], None

    return bare


@functools.partial(jax.jit, static_argnames=("config", "forward", "passes", "depth", "bos_id", "dtype"))
def logits(config: ModelConfig, params: Params, tokens: jax.Array, **settings: Any) -> jax.Array:
    """Logits [B, T, V], float32 or wider; settings as for `hidden`."""
    return decoder.head(params, hidden(config, params, tokens, **settings))
