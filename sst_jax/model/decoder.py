"""The stack: parameters as three trees, and one scan that runs any layer rule over them.

    params = {"base": {embed, final_norm, layers}, "adapter": {...}, "blend": {...}}      all layers stacked, [L, ...]

An output head that is not tied to the embedding is base["head"]. Where global layers have shapes of their own, each
kind of layers is a stack, those of global ones under names that begin with "global_" (`model/kinds.py`).

A rule takes (layer, residuals, per-layer extra, context) and returns (residuals, per-layer output). `run_layers`
unpacks one layer's parameters at a time, quantised kernels included, under `jax.checkpoint` when training; `run` is the
whole stack from tokens to normed hidden states. The rules are in `model/rules.py`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from sst_jax.model import compiler, kinds
from sst_jax.model.attention import LayerKind, Past, Ropes, ropes
from sst_jax.model.backbone import BackboneConfig
from sst_jax.model.collected import Walked
from sst_jax.model.config import ModelConfig, StreamConfig
from sst_jax.model.layers import Adapter, Base, Blend, Block, Joined, Transposed, capped, narrowed, to_float32, unit_rms
from sst_jax.model.layers import embed as embed_tokens
from sst_jax.model.quantization import storages
from sst_jax.model.remat import recomputed
from sst_jax.model.sharding import constrain, gather, on_a_mesh
from sst_jax.model.state import LayerStream, Masks, alpha_and_gain, masks_for
from sst_jax.types import (
    Activations,
    AnyFloat,
    AnyInts,
    Embedding,
    HeadTable,
    Hidden,
    IteratedHidden,
    Params,
    Positions,
    PyTree,
    RandomKey,
    Scalar,
    ScalarBool,
    SegmentIds,
    Tokens,
)

MARKS = "iteration"  # of the tree "blend", the one that is not stacked over layers: [I - 1, D]
Residuals = tuple[Hidden, ...]
Carry = TypeVar("Carry")  # carried from layer to layer: `Residuals`, with caches beside them in decoding
LayerOutput = TypeVar("LayerOutput")


class Layer(NamedTuple):
    """One layer, unpacked: what a rule works with."""

    block: Block
    kind: LayerKind
    maybe_stream: LayerStream | None  # None where no stream is
    drop: dict[str, AnyFloat]  # LoRA dropout factors by linear, [B, 1, inputs]
    rotates: ScalarBool | None = None  # whether queries and keys are rotated; None: as in all layers
    # LoRA or kernels of linears of one input by the first of them, where a walk or a prefill has them otherwise than
    # `Linear`.
    lora: Mapping[str, Walked | Joined | Transposed] = MappingProxyType({})

    @property
    def stream(self) -> LayerStream:
        """Masks, alpha and gain, of a layer of a model with a stream."""
        if self.maybe_stream is None:
            raise ValueError("the model has no stream")
        return self.maybe_stream


class LayerFacts(NamedTuple):
    """What is known of every layer from its number, [L]; in the scan over layers of one, []."""

    number: np.ndarray | jax.Array
    is_global: np.ndarray | jax.Array
    cache_index: np.ndarray | jax.Array
    has_stream: np.ndarray | jax.Array
    rotates: np.ndarray | jax.Array | None = None  # None: all do
    kind_number: np.ndarray | jax.Array | None = None  # of `LayerKind`


@dataclasses.dataclass(frozen=True)
class ForwardOptions:
    """Settings that a forward has of its own. This class is for a forward that has none."""

    @property
    def num_residuals(self) -> int:
        """How many residual streams the stack carries."""
        return 1


@dataclasses.dataclass(frozen=True)
class Context:
    """What all layers share. Arrays here are closed over by the scan, not carried."""

    config: ModelConfig
    ropes: Ropes
    segment_ids: SegmentIds | None = None  # None when decoding
    masks: Masks | None = None
    depth: int = 1
    alpha_warmup_fraction: Scalar | None = None
    dropout_key: RandomKey | None = None
    options: ForwardOptions = ForwardOptions()  # of the forward that runs
    attention: str = "xla"  # the kernel that attends over whole rows, see `model/kernels.py`
    recompute: bool = False  # whether `exact` runs its chunks again for their gradients, or keeps what these read
    past: Past | None = None  # what caches hold of earlier positions, where rows continue from them
    kind: str | None = None  # of the layers that `config` is of, where each kind has shapes of its own

    @property
    def stream(self) -> StreamConfig:
        """The stream's config, of a model that has one."""
        if self.config.stream is None:
            raise ValueError("the model has no stream")
        return self.config.stream

    def of_kind(self, kind: str) -> Context:
        """Return the context of the layers of one kind, of a backbone with stacks by kind."""
        config = dataclasses.replace(self.config, backbone=self.config.backbone.of_kind(kind))
        return dataclasses.replace(self, config=config, kind=kind)

    def by_kind(self, value: Any) -> Any:
        """Return what a layer leaves whose shape is its kind's: marked, where kinds have shapes of their own."""
        return value if self.kind is None else kinds.ByKind.of(self.kind, value)


def row_context(
    config: ModelConfig,
    tokens: Tokens,
    segment_ids: SegmentIds | None = None,
    positions: Positions | None = None,
    *,
    depth: int = 1,
) -> Context:
    """Return the context of whole rows; `dataclasses.replace` sets its other fields.

    Args:
      config: of the model.
      tokens: of the rows.
      segment_ids: 0 on padding, one number a document; None: a row is one document.
      positions: None: they restart with every document.
      depth: iterations at every position.
    """
    if segment_ids is None:
        if positions is None:  # plainly, or XLA spends seconds folding a constant scan
            positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        segment_ids = jnp.ones_like(tokens)
    elif positions is None:
        positions = document_positions(segment_ids)
    masks = None
    if config.stream is not None:
        masks = masks_for(config.stream, segment_ids, tokens, positions, depth, config.bos_id)
    return Context(config, ropes(config.backbone, positions), segment_ids, masks, depth)


def document_positions(segment_ids: SegmentIds) -> Positions:
    """Return positions counted from 0 at the start of every run of equal segment ids."""
    index = jnp.broadcast_to(jnp.arange(segment_ids.shape[1]), segment_ids.shape)
    starts = jnp.concatenate(
        [jnp.ones_like(segment_ids[:, :1], bool), segment_ids[:, 1:] != segment_ids[:, :-1]], axis=1
    )
    return index - jax.lax.cummax(jnp.where(starts, index, 0), axis=1)


def layer_facts(config: ModelConfig) -> LayerFacts:
    """Return what the config says of each layer."""
    types, stream = config.backbone.layer_types, config.stream
    number = np.arange(len(types), dtype=np.int32)
    has_stream = np.ones(len(types), bool)
    if stream is not None and stream.carriers is not None:
        has_stream = np.isin(number, stream.carriers)
    return LayerFacts(
        number,
        np.array([kind == "global" for kind in types]),
        np.array([types[:layer].count(kind) for layer, kind in enumerate(types)], np.int32),
        has_stream,
        ~np.isin(number, config.backbone.nope_layers) if config.backbone.nope_layers else None,
        kind_numbers(config.backbone),
    )


def kind_numbers(backbone: BackboneConfig) -> np.ndarray | None:
    """Return every layer's number in `backbone.attention_kinds`, [L]; None where its kind says it."""
    if backbone.attention_window is None:
        return None
    pairs = zip(backbone.layer_types, backbone.windows, strict=True)
    return np.array([backbone.attention_kinds.index(pair) for pair in pairs], np.int32)


def init_params(config: ModelConfig, key: RandomKey, dtype: DTypeLike = jnp.float32) -> Params:
    """Return random parameters: base in `dtype`, adapter and blend in float32."""
    backbone = config.backbone
    embed_key, layers_key = jax.random.split(key)

    def stacked(config: ModelConfig, keys: RandomKey) -> tuple[Params, ...]:
        def one_layer(layer_key: RandomKey) -> tuple[nnx.State, ...]:
            block = Block(config, dtype, nnx.Rngs(layer_key))
            return nnx.split(block, Base, Adapter, Blend)[1:]

        return tuple(nnx.to_pure_dict(state) for state in jax.vmap(one_layer)(keys))

    keys = jax.random.split(layers_key, backbone.num_layers)
    if backbone.has_stacks_by_kind:
        types = np.array(backbone.layer_types)
        found = {
            kind: stacked(dataclasses.replace(config, backbone=backbone.of_kind(kind)), keys[types == kind])
            for kind in dict.fromkeys(backbone.layer_types)
        }
        base, adapter = (kinds.joined({kind: trees[part] for kind, trees in found.items()}) for part in (0, 1))
        blend = kinds.in_order(backbone.layer_types, {kind: trees[2] for kind, trees in found.items()})
    else:
        base, adapter, blend = stacked(config, keys)
    if config.stream is not None and config.stream.granularity == "scalar":
        blend = {name: value[:1] if name == "theta" else value for name, value in blend.items()}
    if config.stream is not None and config.stream.iteration_embedding:
        blend = {**blend, MARKS: jnp.zeros((config.stream.iteration_embedding - 1, backbone.d_model), float)}

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


def init_embedding(backbone: BackboneConfig, key: RandomKey, dtype: DTypeLike) -> Embedding:
    """Return a random embedding table [V, D]; the input one of `init_params` has the first half of its split key."""
    embedding = jax.random.normal(key, (backbone.vocab_size, backbone.d_model), dtype)
    return embedding * jnp.asarray(backbone.d_model**-0.5, dtype)


def init_blend(config: ModelConfig, key: RandomKey) -> Params:
    """Return the stream's parameters alone, as `init_params` makes them, without making a base."""
    return jax.jit(lambda key: init_params(config, key)["blend"])(key)


def abstract_params(config: ModelConfig, dtype: DTypeLike = jnp.float32) -> Params:
    """Return the shapes and types of `init_params`."""
    return jax.eval_shape(lambda: init_params(config, jax.random.key(0), dtype))


def run(
    params: Params,
    rule: Callable[[Layer, Residuals, Any, Context], tuple[Residuals, LayerOutput]],
    tokens: Tokens,
    context: Context,
    extras: PyTree = None,
    *,
    remat: str = "none",
    every: bool = False,
) -> tuple[IteratedHidden, LayerOutput]:
    """Embed tokens, unfold positions into iterations, run the rule through the stack, fold, and norm.

    Args:
      params: the three trees.
      rule: one of `model/rules.py`; `context.options.num_residuals` residual streams enter the first layer.
      tokens: of whole rows.
      context: of the same rows.
      extras: [L, ...], handed out a layer at a time; None: nothing.
      remat: one of `remat.REMAT`.
      every: return each of the I iterations, not one alone: the last, or as `stream.readout` says.

    Returns:
      Normed hidden states of the last residual stream, [B, T, I, D] or [B, T, 1, D], and what the rule left in each
      layer, [L, ...].
    """
    config, depth = context.config, context.depth
    x = embed_steps(config, params, tokens, depth)
    residuals, left = run_layers(params, rule, (x,) * context.options.num_residuals, context, extras, remat=remat)
    return read_out(config, params, residuals[-1], depth, every=every), left


def read_out(config: ModelConfig, params: Params, x: Hidden, depth: int, *, every: bool = False) -> IteratedHidden:
    """Return normed hidden states [B, T, 1, D] of the iteration that logits are of, or of `every` one, [B, T, I, D].

    Args:
      config: its stream says which iteration that is.
      params: the three trees.
      x: behind the last layer.
      depth: iterations I at every position.
      every: return all.
    """
    iterations = fold(x, depth)
    if every:
        return final_norm(config, params, iterations)
    which = 0 if config.stream is not None and config.stream.readout == "first" else -1
    return final_norm(config, params, iterations[:, :, which])[:, :, None]


def fold(steps: Hidden, depth: int) -> IteratedHidden:
    """Return steps as positions and their iterations."""
    return steps.reshape(steps.shape[0], -1, depth, steps.shape[-1])


class Stack(NamedTuple):
    """Layers as `run_stack` scans over them, L of them.

    layer_types   the kind of each
    whole         linears of all layers of the model, whose products find a layer's kernel by its number
    own           (base, adapter) without those linears, [L, ...]; where kinds have shapes of their own {kind: the same}
    shared        (blend, facts), [L, ...]
    """

    layer_types: tuple[str, ...]
    whole: Params
    own: Any
    shared: tuple[Params, LayerFacts]


def stack_of(params: Params, config: ModelConfig, layers: slice | None = None) -> Stack:
    """Return a model's layers as `run_stack` takes them.

    Args:
      params: the three trees.
      config: of the model.
      layers: the only ones that are to run; None: all. Of a part copies are made: outside of a loop, if the part runs
        in one.
    """
    backbone = config.backbone
    types, facts, adapter = backbone.layer_types, layer_facts(config), params["adapter"]
    blend = {name: value for name, value in params["blend"].items() if name != MARKS}
    if config.stream is not None and config.stream.granularity == "scalar" and "theta" in blend:
        blend["theta"] = jnp.broadcast_to(blend["theta"], (backbone.num_layers, 1))
    whole, sliced = storages.split_stacks(params["base"]["layers"], "mesh" if on_a_mesh() else compiler.platform())

    def some(stacks: Any) -> Any:
        return stacks if layers is None else jax.tree.map(lambda part: part[layers], stacks)

    here = types if layers is None else types[layers]
    if not backbone.has_stacks_by_kind:
        return Stack(here, whole, some((sliced, adapter)), some((blend, facts)))
    own = {kind: (kinds.of_kind(sliced, kind), kinds.of_kind(adapter, kind)) for kind in dict.fromkeys(here)}
    if layers is not None:
        own = {kind: kinds.among(types, kind, layers, stacks) for kind, stacks in own.items()}
    return Stack(here, whole, own, some((blend, facts)))


def run_stack(
    stack: Stack,
    rule: Callable[[Layer, Carry, Any, Context], tuple[Carry, LayerOutput]],
    residuals: Carry,
    context: Context,
    extras: PyTree = None,
    *,
    remat: str = "none",
) -> tuple[Carry, LayerOutput]:
    """Run a rule through layers in one scan over them.

    Args:
      stack: the layers.
      rule: (layer, residuals, extra, context) -> (residuals, per-layer output).
      residuals: what is carried from layer to layer; the first is a residual stream.
      context: what all layers share.
      extras: [L, ...], handed out a layer at a time; None: nothing.
      remat: one of `remat.REMAT`.

    Returns:
      The residuals behind the last layer, and what the rule left in each, stacked, [L, ...].
    """
    shared = (*stack.shared, extras)

    def one_layer(context: Context, whole: Params) -> Callable[[Carry, tuple], tuple[Carry, LayerOutput]]:
        return recomputed(layer_body(rule, context, whole, residuals), remat)

    with jax.named_scope("layers"):
        if not context.config.backbone.has_stacks_by_kind:
            return jax.lax.scan(one_layer(context, stack.whole), residuals, (stack.own, shared))
        bodies = {kind: one_layer(context.of_kind(kind), kinds.of_kind(stack.whole, kind)) for kind in stack.own}
        return kinds.scan_kinds(stack.layer_types, bodies, stack.own, shared, residuals)


def run_layers(
    params: Params,
    rule: Callable[[Layer, Carry, Any, Context], tuple[Carry, LayerOutput]],
    residuals: Carry,
    context: Context,
    extras: PyTree = None,
    *,
    remat: str = "none",
    layers: slice | None = None,
) -> tuple[Carry, LayerOutput]:
    """Run a rule through a model's layers, or through some of them; as `stack_of` and `run_stack`."""
    return run_stack(stack_of(params, context.config, layers), rule, residuals, context, extras, remat=remat)


def layer_body(
    rule: Callable[[Layer, Carry, Any, Context], tuple[Carry, LayerOutput]],
    context: Context,
    stacks: Params,
    residuals: Carry,
) -> Callable[[Carry, tuple], tuple[Carry, LayerOutput]]:
    """Return one layer of `run_layers` as a scan takes it, its parameters unpacked.

    Args:
      rule: as there.
      context: of the layers that are scanned over.
      stacks: linears whose products read the whole stack.
      residuals: as there, of which the type is used.
    """
    config = context.config
    dtype = jax.tree.leaves(residuals)[0].dtype if residuals else jnp.bfloat16
    block = nnx.eval_shape(lambda: Block(config, jnp.float32, nnx.Rngs(0)))
    graphdef = nnx.split(block, Base, Adapter, Blend)[0]

    def body(residuals: Carry, slices: tuple) -> tuple[Carry, LayerOutput]:
        (base, adapter), (blend, facts, extra) = slices
        if context.segment_ids is not None:  # a single position has less to send than a layer has
            base, adapter = gather(base), gather(adapter)
            residuals = jax.tree.map(lambda x: constrain(x, "rows", "sequence", None), residuals)
            adapter = narrowed(adapter, dtype)  # a single position multiplies by each factor but once
        # Here, so that all passes share one dequantised copy and none outlives its layer, backward pass included.
        place = facts.number if context.kind is None else facts.cache_index  # in its stack
        with jax.named_scope("weights"):
            block = nnx.merge(graphdef, storages.unpack(base, dtype, stacks, place), adapter, blend)
        return rule(unpack(block, facts, context), residuals, extra, context)

    return body


def unpack(block: Block, facts: LayerFacts, context: Context) -> Layer:
    """Return everything that a rule needs of one layer, from its slice of the stacked parameters."""
    config, stream = context.config, None
    drop: dict[str, jax.Array] = {}
    if config.stream is not None and context.masks is not None:
        has_state, is_initial, ramp = context.masks
        masks = Masks(has_state & facts.has_stream, is_initial & facts.has_stream, ramp)
        stream = LayerStream(masks, *alpha_and_gain(config.stream, block, context.alpha_warmup_fraction))
    if config.adapter.dropout and context.dropout_key is not None and context.segment_ids is not None:
        rows, rate = context.segment_ids.shape[0], config.adapter.dropout
        for place, name in enumerate(config.adapter.targets):
            # One mask a row, the same at all positions and in all passes (Gal and Ghahramani 2016): then every forward
            # computes the same function, in whichever order it goes through the positions.
            key = jax.random.fold_in(jax.random.fold_in(context.dropout_key, facts.number), place)
            shape = (rows, 1, config.backbone.linear_shapes[name][0])
            drop[name] = jax.random.bernoulli(key, 1.0 - rate, shape) / (1.0 - rate)
    rotates = None if facts.rotates is None else jnp.asarray(facts.rotates)
    number = None if facts.kind_number is None else jnp.asarray(facts.kind_number)
    kind = LayerKind(jnp.asarray(facts.is_global), jnp.asarray(facts.cache_index), number)
    return Layer(block, kind, stream, drop, rotates)


@jax.named_scope("embed")
def embed(config: ModelConfig, params: Params, tokens: Tokens) -> Hidden:
    """Return scaled token embeddings in the config's dtype."""
    return embed_tokens(
        config.backbone, params["base"]["embed"]["embedding"], jnp.asarray(tokens), jnp.dtype(config.dtype)
    )


def embed_steps(config: ModelConfig, params: Params, tokens: Tokens, depth: int) -> Hidden:
    """Return what enters the first layer at every step: the position's embedding, marked where it is iterated again."""
    x = jnp.repeat(embed(config, params, tokens), depth, axis=1)
    return marked(config, params, x, jnp.tile(jnp.arange(depth), tokens.shape[1]))


def marked(config: ModelConfig, params: Params, x: Hidden, iteration: AnyInts) -> Hidden:
    """Return embeddings with the vectors of their iterations added, as `stream.iteration_embedding` asks for them.

    Args:
      config: of the model.
      params: the three trees.
      x: embeddings of steps.
      iteration: of every step of a row, or of all, counted from 0: that one has no vector.
    """
    if config.stream is None or not config.stream.iteration_embedding:
        return x
    table = params["blend"][MARKS]
    rows = jnp.concatenate([jnp.zeros_like(table[:1]), table])
    return x + rows[jnp.minimum(iteration, len(table))].astype(x.dtype)


@jax.named_scope("final_norm")
def final_norm(config: ModelConfig, params: Params, x: Activations) -> Activations:
    """Return the last RMSNorm of x, in x's type, divided by what the backbone's logits are divided by."""
    backbone, scale = config.backbone, params["base"]["final_norm"]["scale"]
    y = unit_rms(x, backbone.norm_eps) * (backbone.norm_offset + to_float32(scale))
    return (y if backbone.logit_divisor == 1.0 else y / backbone.logit_divisor).astype(x.dtype)


def head_table(base: Params) -> HeadTable:
    """Return the output head of a base: its own where it has one, else the tied embedding."""
    return (base["head"] if "head" in base else base["embed"])["embedding"]


@jax.named_scope("head")
def head(config: ModelConfig, params: Params, hidden: Activations) -> AnyFloat:
    """Return logits [..., V] of normed hidden states [..., D], accumulated in float32 or wider."""
    table, out = head_table(params["base"]), jnp.promote_types(hidden.dtype, jnp.float32)
    logits = jnp.einsum("...d,vd->...v", hidden, table.astype(hidden.dtype), preferred_element_type=out)
    return capped(logits, config.backbone.logit_cap)
