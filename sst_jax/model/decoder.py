"""The stack: parameters as three trees, and one scan that runs any layer rule over them.

    params = {"base": {embed, final_norm, layers}, "adapter": {...}, "blend": {...}}      all layers stacked, [L, ...]

An output head that is not tied to the embedding is base["head"].

A rule takes (layer, streams, per-layer extras, context) and returns (streams, per-layer output); `run_layers` unpacks
one layer's parameters at a time, quantised kernels included, under `jax.checkpoint` when training. The rules are in
`model/rules.py`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike

from sst_jax.model.attention import Past, Ropes, ropes
from sst_jax.model.backbone import BackboneConfig
from sst_jax.model.config import ModelConfig, StreamConfig
from sst_jax.model.layers import Adapter, Base, Blend, Block, to_float32, unit_rms
from sst_jax.model.layers import embed as embed_tokens
from sst_jax.model.quantization import storages
from sst_jax.model.sharding import constrain, gather
from sst_jax.model.state import Masks, alpha_and_gain, masks_for
from sst_jax.types import Embedding, Positions, SegmentIds, Tokens

Params = dict[str, Any]
# What training keeps of a layer until its backward pass: everything that a gradient reads; the layer's inputs and the
# results of its products with weights; its inputs and what is named KEPT; its inputs alone; those in the host's memory.
REMAT = ("none", "products", "memories", "layer", "offload")
# Memories at the borders of `exact`'s chunks: 6% of the layers' inputs, which spare it one of four walks.
KEPT = "kept"
Residuals = tuple[jax.Array, ...]


class Layer(NamedTuple):
    """One layer, unpacked: what a rule works with."""

    block: Block
    is_global: jax.Array  # bool []
    cache_index: jax.Array  # int32 [], the layer's place among the layers of its kind
    masks: Masks | None  # where states enter this layer; None where no stream is
    alpha: jax.Array | None
    gain: jax.Array | None
    drop: dict[str, jax.Array]  # LoRA dropout factors by linear, [B, 1, inputs]

    @property
    def stream(self) -> tuple[Masks, jax.Array, jax.Array]:
        """Masks, alpha and gain, of a layer of a model with a stream."""
        if self.masks is None or self.alpha is None or self.gain is None:
            raise ValueError("the model has no stream")
        return self.masks, self.alpha, self.gain


@dataclasses.dataclass(frozen=True)
class Context:
    """What all layers share. Arrays here are closed over by the scan, not carried."""

    config: ModelConfig
    ropes: Ropes
    segment_ids: SegmentIds | None = None  # [B, T]; None when decoding
    masks: Masks | None = None
    depth: int = 1
    alpha_warmup_fraction: jax.Array | None = None
    dropout_key: jax.Array | None = None
    options: Any = None  # a forward's own settings
    attention: str = "xla"  # the kernel that attends over whole rows, see `model/kernels.py`
    recompute: bool = False  # whether `exact` walks its chunks again for their gradients, or keeps what these read
    past: Past | None = None  # what caches hold of earlier positions, where rows go on from them

    @property
    def stream(self) -> StreamConfig:
        """The stream's config, of a model that has one."""
        if self.config.stream is None:
            raise ValueError("the model has no stream")
        return self.config.stream


def row_context(
    config: ModelConfig,
    tokens: Tokens,
    segment_ids: SegmentIds | None = None,
    positions: Positions | None = None,
    *,
    depth: int = 1,
    **rest: Any,
) -> Context:
    """The context of whole rows. Without segment_ids a row is one document; positions restart with every document."""
    if segment_ids is None:
        if positions is None:  # plainly, or XLA spends seconds folding a constant scan
            positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        segment_ids = jnp.ones_like(tokens)
    elif positions is None:
        positions = document_positions(segment_ids)
    masks = None if config.stream is None else masks_for(config.stream, segment_ids, tokens, depth, config.bos_id)
    return Context(config, ropes(config.backbone, positions), segment_ids, masks, depth, **rest)


def document_positions(segment_ids: SegmentIds) -> jax.Array:
    """Positions [B, T] counted from 0 at the start of every run of equal segment ids."""
    index = jnp.broadcast_to(jnp.arange(segment_ids.shape[1]), segment_ids.shape)
    starts = jnp.concatenate(
        [jnp.ones_like(segment_ids[:, :1], bool), segment_ids[:, 1:] != segment_ids[:, :-1]], axis=1
    )
    return index - jax.lax.cummax(jnp.where(starts, index, 0), axis=1)


def layer_slots(layer_types: tuple[str, ...]) -> np.ndarray:
    """Each layer's index among the layers of its own kind."""
    return np.array([layer_types[:layer].count(kind) for layer, kind in enumerate(layer_types)], np.int32)


def init_params(config: ModelConfig, key: jax.Array, dtype: DTypeLike = jnp.float32) -> Params:
    """Random parameters: base in `dtype`, adapter and blend in float32. Also the shapes, under `jax.eval_shape`."""
    backbone = config.backbone
    embed_key, layers_key = jax.random.split(key)

    def one_layer(layer_key: jax.Array) -> tuple[nnx.State, ...]:
        block = Block(config, dtype, nnx.Rngs(layer_key))
        return nnx.split(block, Base, Adapter, Blend)[1:]

    states = jax.vmap(one_layer)(jax.random.split(layers_key, backbone.num_layers))
    base, adapter, blend = (nnx.to_pure_dict(state) for state in states)
    if config.stream is not None and config.stream.granularity == "scalar":
        blend = {name: value[:1] if name == "theta" else value for name, value in blend.items()}

    head = {}
    if not backbone.tied_head:
        head = {"head": {"embedding": init_embedding(backbone, jax.random.fold_in(embed_key, 1), dtype)}}
    return {
        "base": {
            "embed": {"embedding": init_embedding(backbone, embed_key, dtype)},
            "final_norm": {"scale": jnp.full(backbone.d_model, 1.0 - backbone.norm_offset, dtype)},
            "layers": base,
            **head,
        },
        "adapter": adapter,
        "blend": blend,
    }


def init_embedding(backbone: BackboneConfig, key: jax.Array, dtype: DTypeLike) -> Embedding:
    """Return a random embedding table [V, D]; the input one of `init_params` has the first half of its split key."""
    embedding = jax.random.normal(key, (backbone.vocab_size, backbone.d_model), dtype)
    return embedding * jnp.asarray(backbone.d_model**-0.5, dtype)


def init_blend(config: ModelConfig, key: jax.Array) -> Params:
    """The stream's parameters alone, as `init_params` makes them, without making a base."""
    return jax.jit(lambda key: init_params(config, key)["blend"])(key)


def abstract_params(config: ModelConfig, dtype: DTypeLike = jnp.float32) -> Params:
    """`init_params` as shapes and types only."""
    return jax.eval_shape(lambda: init_params(config, jax.random.key(0), dtype))


def run_layers(
    params: Params,
    rule: Callable[..., tuple[Any, Any]],
    residuals: Any,
    context: Context,
    extras: Any = None,
    *,
    remat: str = "none",
) -> tuple[Any, Any]:
    """Runs `rule` through the stack in one scan over layers.

    `residuals` is carried from layer to layer (the first is the residual stream), `extras` [L, ...] is handed out a
    layer at a time, and what the rule returns beside them comes back stacked, [L, ...]. `remat` is one of REMAT.
    """
    config, backbone = context.config, context.config.backbone
    dtype = residuals[0].dtype if residuals else jnp.bfloat16
    block = nnx.eval_shape(lambda: Block(config, jnp.float32, nnx.Rngs(0)))
    graphdef = nnx.split(block, Base, Adapter, Blend)[0]
    layers = backbone.num_layers
    carries = np.ones(layers, bool)
    if config.stream is not None and config.stream.layers is not None:
        carries = np.isin(np.arange(layers), config.stream.layers)
    blend = dict(params["blend"])
    if config.stream is not None and config.stream.granularity == "scalar" and "theta" in blend:
        blend["theta"] = jnp.broadcast_to(blend["theta"], (layers, 1))
    facts = {
        "index": np.arange(layers, dtype=np.int32),
        "is_global": np.array([kind == "global" for kind in backbone.layer_types]),
        "slot": layer_slots(backbone.layer_types),
        "carries": carries,
    }

    def body(residuals: Any, slices: tuple) -> tuple[Any, Any]:
        base, adapter, blend, facts, extra = slices
        if context.segment_ids is not None:  # a single position has less to send than a layer has
            base, adapter = gather(base), gather(adapter)
            residuals = tuple(constrain(x, "rows", "sequence", None) for x in residuals)
        # Here, so that all passes share one dequantised copy and none outlives its layer, backward pass included.
        layer = unpack(nnx.merge(graphdef, storages.unpack(base, dtype), adapter, blend), facts, context)
        return rule(layer, residuals, extra, context)

    xs = (params["base"]["layers"], params["adapter"], blend, facts, extras)
    return jax.lax.scan(recomputed(body, remat), residuals, xs)


def recomputed(body: Callable[..., Any], remat: str) -> Callable[..., Any]:
    """A layer whose backward pass recomputes what `remat` does not keep of its forward pass."""
    if remat == "none":
        return body
    policies = jax.checkpoint_policies
    policy = {
        "layer": None,
        "memories": policies.save_only_these_names(KEPT),
        "products": policies.save_from_both_policies(
            policies.dots_with_no_batch_dims_saveable, policies.save_only_these_names(KEPT)
        ),
        "offload": policies.save_and_offload_only_these_names(
            names_which_can_be_saved=[KEPT], names_which_can_be_offloaded=["streams"], offload_src="device",
            offload_dst="pinned_host",
        ),
    }[remat]  # fmt: skip

    def named(residuals: Any, slices: tuple) -> tuple[Any, Any]:
        return body(checkpoint_name(residuals, "streams"), slices)

    # The scan already keeps XLA from undoing the recomputation, so the costly barrier is not needed.
    return jax.checkpoint(named, prevent_cse=False, policy=policy)


def unpack(block: Block, facts: dict[str, jax.Array], context: Context) -> Layer:
    """Everything that a rule needs of one layer, from its slice of the stacked parameters."""
    config, masks, alpha, gain = context.config, None, None, None
    drop: dict[str, jax.Array] = {}
    if config.stream is not None:
        alpha, gain = alpha_and_gain(config.stream, block, context.alpha_warmup_fraction)
        if context.masks is not None:
            masks = Masks(*(mask & facts["carries"] for mask in context.masks))
    if config.adapter.dropout and context.dropout_key is not None and context.segment_ids is not None:
        rows, rate = context.segment_ids.shape[0], config.adapter.dropout
        for number, name in enumerate(config.adapter.targets):
            # One mask a row, the same at all positions and in all passes (Gal and Ghahramani 2016): then every forward
            # computes the same function, in whichever order it walks the positions.
            key = jax.random.fold_in(jax.random.fold_in(context.dropout_key, facts["index"]), number)
            shape = (rows, 1, config.backbone.linear_shapes[name][0])
            drop[name] = jax.random.bernoulli(key, 1.0 - rate, shape) / (1.0 - rate)
    return Layer(block, facts["is_global"], facts["slot"], masks, alpha, gain, drop)


def embed(config: ModelConfig, params: Params, tokens: Tokens) -> jax.Array:
    """Return scaled token embeddings, [B, T, D], in the config's dtype."""
    return embed_tokens(
        config.backbone, params["base"]["embed"]["embedding"], jnp.asarray(tokens), jnp.dtype(config.dtype)
    )


def final_norm(config: ModelConfig, params: Params, x: jax.Array) -> jax.Array:
    """The last RMSNorm, in x's type."""
    scale = params["base"]["final_norm"]["scale"]
    return (unit_rms(x, config.backbone.norm_eps) * (config.backbone.norm_offset + to_float32(scale))).astype(x.dtype)


def head_table(base: Params) -> jax.Array:
    """The output head [V, D] of a base: its own where it has one, else the tied embedding."""
    return (base["head"] if "head" in base else base["embed"])["embedding"]


def head(params: Params, hidden: jax.Array) -> jax.Array:
    """Logits [..., V] of normed hidden states [..., D], accumulated in float32 or wider."""
    table, out = head_table(params["base"]), jnp.promote_types(hidden.dtype, jnp.float32)
    return jnp.einsum("...d,vd->...v", hidden, table.astype(hidden.dtype), preferred_element_type=out)
