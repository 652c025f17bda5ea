"""The aliases in sst_jax/types.py hold at run time, for what is public and for what a layer hands around inside."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from beartype import beartype
from jaxtyping import jaxtyped

from sst_jax.model import decoder, halves, rules, state
from sst_jax.types import Hidden, KeysValues, Logits, Positions, Queries, SegmentIds, Tokens
from tests.support import toys

CONFIG = toys.config({"state": "block", "initial": "own", "decay": 0.3})
checked = jaxtyped(typechecker=beartype)


def abstract(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.int32)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("name", "depth"), [("plain", 1), ("two_pass", 1), ("k_pass", 2), ("local", 3), ("exact", 1), ("exact", 3)]
)
def test_logits_of_every_forward(name, depth, dtype):
    @checked
    def logits(tokens: Tokens, segment_ids: SegmentIds, positions: Positions) -> Logits:
        params = decoder.init_params(CONFIG, jax.random.key(0), jnp.dtype(dtype))
        settings = {"segment_ids": segment_ids, "positions": positions}
        config = dataclasses.replace(CONFIG, dtype=dtype)
        return rules.logits(config, params, tokens, forward=name, depth=depth, **settings)

    out = jax.eval_shape(logits, *[abstract(2, 11)] * 3)
    assert (out.shape, out.dtype) == ((2, 11, CONFIG.backbone.vocab_size), jnp.float32)


def test_a_wrong_shape_would_be_seen():
    @checked
    def wrong(tokens: Tokens) -> Logits:
        return jnp.zeros((*tokens.shape, 2, 2))

    with pytest.raises(Exception, match="wrong"):
        jax.eval_shape(wrong, abstract(2, 11))


@pytest.mark.parametrize("depth", [1, 3])
def test_the_two_halves_of_a_layer(depth):
    """Every array in a rule is [B, T*I, ...], and blending keeps h wide where activations are bfloat16."""

    @checked
    def project(x: Hidden, layer, context) -> tuple[Queries, KeysValues, KeysValues]:
        return tuple(halves.project(layer, x, context))

    @checked
    def feed(h: Hidden, s: Hidden, masks: state.Masks, layer, context) -> tuple[Hidden, Hidden]:
        return halves.feed(layer, h, context, jnp.bfloat16, s, masks)

    @checked
    def memories(x: Hidden, h: Hidden, f: Hidden, o: Hidden, layer) -> Hidden:
        return state.scan_states(CONFIG.stream, layer.stream, state.PassValues(x, h, f, o))

    @checked
    def move(x: Hidden, memory: Hidden, layer) -> Hidden:
        return state.shift_right(CONFIG.stream, x, memory, layer.stream.masks)

    def rule(layer, residuals, extra, context):
        (x,) = residuals
        project(x, layer, context)
        summands, _ = halves.attend(layer, x, context)
        h = halves.residual_after_attention(layer, summands)
        o, f = feed(h, jnp.zeros_like(h), layer.stream.masks, layer, context)
        s = move(x, memories(x, h, f, o, layer), layer)
        assert h.dtype == f.dtype == s.dtype == jnp.float32
        assert o.dtype == jnp.bfloat16
        assert h.shape == f.shape == s.shape == o.shape == (2, 11 * depth, CONFIG.backbone.d_model)
        return (o,), None

    def run(tokens):
        params = decoder.init_params(CONFIG, jax.random.key(0), jnp.bfloat16)
        x = jnp.repeat(decoder.embed(dataclasses.replace(CONFIG, dtype="bfloat16"), params, tokens), depth, axis=1)
        return decoder.run_layers(params, rule, (x,), decoder.row_context(CONFIG, tokens, depth=depth))[0]

    jax.eval_shape(run, abstract(2, 11))
