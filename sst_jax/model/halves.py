"""The two halves of a decoder layer, of which every rule of `model/rules.py` is made.

attend   x  -> h        attention, no state in it
feed     h, s -> o, f   blend the state in, feed-forward; o enters the next layer, f (or o) updates the layer's state.
                        With site="output" the state is blended into o instead
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from sst_jax.model.attention import QKV, Sequences, attend_sequences, ropes_of_layer
from sst_jax.model.collected import Pair, Taken, here
from sst_jax.model.decoder import Context, Layer
from sst_jax.model.kinds import ByKind
from sst_jax.model.layers import (
    ACTIVATIONS,
    in_a_walk,
    joined,
    side_by_side,
    to_float32,
    transposed,
    unscaled_unit_rms,
)
from sst_jax.model.quantization.nf4_product import LowRank
from sst_jax.model.remat import inputs_kept
from sst_jax.model.state import Masks, blend
from sst_jax.types import AttentionOutput, Hidden, PositionKeys

LeftKeys = PositionKeys | ByKind  # what a cache would hold of a layer; marked, where kinds have shapes of their own

FEED_LINEARS = (("gate", "up"), ("down",))  # of `feed`, by their inputs


class AttentionResidual(NamedTuple):
    """h as what it is the sum of: in bfloat16 half the bytes of the float32 sum, and so of what gradients keep."""

    x: Hidden  # the layer's input
    out: Hidden  # what attention adds to it, before its norm


# Where a function below is under `inputs_kept`, its arguments are kept for its gradients and what lies in between is
# not. The products with frozen kernels are not repeated for that: no gradient reads their results.


def project(layer: Layer, x: Hidden, context: Context) -> QKV:
    """Return queries, keys and values of a layer's input, normed, not yet rotated."""
    backbone, block = context.config.backbone, layer.block

    @inputs_kept
    def linears(x: jax.Array) -> tuple[jax.Array, ...]:
        y = block.pre_attn_norm(x).astype(x.dtype)
        parts = {
            name: linear for name, linear in (("q", block.q), ("k", block.k), ("v", block.v)) if linear is not None
        }
        return tuple(side_by_side([*parts.values()], y, [layer.drop.get(name) for name in parts]))

    def normed(q: jax.Array, k: jax.Array) -> tuple[jax.Array, jax.Array]:
        return block.q_norm(q).astype(x.dtype), block.k_norm(k).astype(x.dtype)

    q, k, *own = linears(x)
    v = own[0] if own else k  # before it is normed
    if backbone.qk_norm_whole:
        q, k = normed(q, k)
    q, k, v = (part.reshape(*part.shape[:2], -1, backbone.head_dim) for part in (q, k, v))
    if backbone.v_norm:
        v = unscaled_unit_rms(v, backbone.norm_eps).astype(x.dtype)
    return QKV(q, k, v) if backbone.qk_norm_whole else QKV(*normed(q, k), v)


def attention_residual(layer: Layer, x: Hidden, out: AttentionOutput) -> AttentionResidual:
    """Return h of a layer's input and attention's output."""
    return AttentionResidual(x, layer.block.o(out, layer.drop.get("o")))


def residual_after_attention(layer: Layer, h: AttentionResidual | Taken | Hidden) -> Hidden:
    """Return h summed, in float32 or wider; as it is where it has been summed before."""
    one = here(h)
    if not isinstance(one, AttentionResidual):
        return one
    return to_float32(one.x) + scaled(layer, layer.block.post_attn_norm(one.out))


def scaled(layer: Layer, out: Hidden) -> Hidden:
    """Return what a half adds to the residual stream, times the backbone's `residual_scale`."""
    return out if layer.block.residual_scale == 1.0 else out * layer.block.residual_scale


@jax.named_scope("attention")
def attend(layer: Layer, x: Hidden, context: Context) -> tuple[AttentionResidual, tuple[LeftKeys, LeftKeys]]:
    """Return h, not yet summed, and the keys and values that a cache would hold.

    Raises: ValueError without segment ids in the context: one position that is being decoded has none.
    """
    backbone, stream = context.config.backbone, context.config.stream
    if context.segment_ids is None:
        raise ValueError("rows are attended over with their segment ids")
    keep = "overwrite" if stream is None else stream.kv
    ropes = ropes_of_layer(context.ropes, layer.rotates)
    sequences = Sequences(ropes, context.segment_ids, context.depth, keep, context.attention, context.past)
    qkv = project(layer, x, context)
    out, kv = attend_sequences(backbone, layer.kind, qkv, sequences)
    return attention_residual(layer, x, out), (context.by_kind(kv[0]), context.by_kind(kv[1]))


def walk_groups(layer: Layer, rows: int, dtype: DTypeLike) -> dict[str, tuple[tuple[Pair, ...], LowRank]]:
    """Return LoRA of `feed` as a walk of so many rows takes it, by the first linear of one input; see `in_a_walk`."""
    found = {}
    for names in FEED_LINEARS:
        linears = [getattr(layer.block, name) for name in names]
        group = in_a_walk(linears, rows, dtype, [layer.drop.get(name) for name in names])
        if group is not None:
            found[names[0]] = group
    return found


def with_transposed_kernels(layer: Layer, rows: int, dtype: DTypeLike) -> Layer:
    """Return a layer that runs `feed` on so many rows step after step; see `transposed`."""
    found = {}
    for names in FEED_LINEARS:
        kernels = transposed([getattr(layer.block, name) for name in names], rows, dtype)
        if kernels is not None:
            found[names[0]] = kernels
    return layer._replace(lora=found) if found else layer


def with_joined_lora(layer: Layer, shape: tuple[int, ...], dtype: DTypeLike) -> Layer:
    """Return a layer that runs `feed` on inputs of a shape more than once, and not to be trained; see `joined`."""
    one = joined([layer.block.gate, layer.block.up], shape, dtype)
    return layer if one is None else layer._replace(lora={"gate": one})


@jax.named_scope("feed_forward")
def feed(
    layer: Layer,
    h: AttentionResidual | Taken | Hidden,
    context: Context,
    dtype: DTypeLike,
    s: Hidden | None = None,
    masks: Masks | Taken | None = None,
) -> tuple[Hidden, Hidden]:
    """Run the feed-forward half, with a state blended in where one enters.

    Args:
      layer: its parameters.
      h: after attention.
      context: what all layers share.
      dtype: of the products and of o.
      s: the state entering each step; None: none enters any.
      masks: the steps that one enters; None: none.

    Returns:
      o in `dtype` and f in float32 or wider.
    """
    block, activation = layer.block, ACTIVATIONS[context.config.backbone.activation]

    site = None if s is None or masks is None else context.stream.site

    def blended(h: Hidden, s: Hidden | None) -> Hidden:
        assert s is not None
        assert masks is not None
        return blend(context.stream, layer.stream, h, s, here(masks))

    @inputs_kept
    def widen(h: AttentionResidual | Taken | Hidden, s: Hidden | None) -> tuple[jax.Array, list[jax.Array]]:
        h = residual_after_attention(layer, h)
        mixed = blended(h, s) if site == "ffn" else h
        y = block.pre_ffn_norm(mixed).astype(dtype)
        drops = [layer.drop.get(name) for name in ("gate", "up")]
        return mixed, side_by_side([block.gate, block.up], y, drops, layer.lora.get("gate"))

    @inputs_kept
    def narrow(wide: list[jax.Array]) -> jax.Array:
        gate, up = wide if len(wide) == 2 else jnp.split(wide[0], [block.gate.outputs], axis=-1)
        return side_by_side([block.down], activation(gate) * up, [layer.drop.get("down")], layer.lora.get("down"))[0]

    mixed, wide = widen(h, s)
    f = scaled(layer, block.post_ffn_norm(narrow(wide)))
    o = mixed + f if block.layer_scalar is None else block.layer_scalar(mixed + f)
    return (blended(o, s) if site == "output" else o).astype(dtype), f
