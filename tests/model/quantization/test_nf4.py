"""NF4: codes, scales and values are qwix's bit for bit, and a model on such a base is that on what it stands for."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sst_jax.errors import InputError
from sst_jax.model import rules
from sst_jax.model.config import BackboneConfig
from sst_jax.model.quantization import nf4, storages
from tests.support import toys

BACKBONE = BackboneConfig(
    num_layers=7,
    d_model=64,
    d_ff=192,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    vocab_size=61,
    window=6,
    query_pre_attn_scalar=9.0,
    rope_scale_global=8.0,
    max_positions=600,
)


def kernel(inputs, outputs, dtype="float32", seed=0):
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.standard_normal((inputs, outputs)) * rng.exponential(size=outputs), dtype)


def unpacked(codes):
    codes = np.asarray(codes)
    return np.stack((codes & 15, codes >> 4), axis=1).reshape(-1, codes.shape[-1])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", [(64, 7), (640, 300), (2048, 256)])
def test_codes_scales_and_values_are_qwix_s(shape, dtype):
    qarray = pytest.importorskip("qwix._src.core.qarray")
    weights = kernel(*shape, dtype).astype(jnp.float32)
    # Levels, halves between them, and a block that is all zeros, besides random numbers.
    middles = (nf4.LEVELS[1:] + nf4.LEVELS[:-1]) / 2
    weights = weights.at[:31, 0].set(np.concatenate([nf4.LEVELS, middles])).at[:64, 1].set(0.0)
    how = qarray.HowToQuantize(qtype="nf4", channelwise_axes=(1,), tiled_axes={0: nf4.BLOCK})
    theirs = qarray.quantize(weights, how)
    ours = jax.jit(nf4.quantise)(weights)
    assert np.array_equal(unpacked(ours["codes"]), np.asarray(theirs.qvalue).astype(np.uint8))
    narrow = dataclasses.replace(theirs, scale=theirs.scale.astype(jnp.bfloat16))
    assert np.array_equal(ours["scales"], narrow.scale)
    for out in ("bfloat16", "float32"):
        values = jax.jit(nf4.kernel_of, static_argnums=1)(ours, jnp.dtype(out))
        assert values.dtype == out
        assert np.array_equal(values, qarray.dequantize(narrow).astype(out))


def test_a_stack_is_its_layers():
    stack = jnp.stack([kernel(128, 20, seed=seed) for seed in range(3)])
    for kind in ("nf4", "nf4_double"):
        together = nf4.quantise(stack, kind)
        for layer in range(3):
            alone = nf4.quantise(stack[layer], kind)
            assert all(np.array_equal(together[name][layer], alone[name]) for name in alone)
            assert np.array_equal(nf4.kernel_of(together)[layer], nf4.kernel_of(alone))


@pytest.mark.parametrize(("kind", "bits", "loss"), [("nf4", 4.25, 0.0), ("nf4_double", 4.13, 0.01)])
def test_storage_and_what_double_quantisation_costs(kind, bits, loss):
    weights = kernel(512, 1024)
    leaf = nf4.quantise(weights, kind)
    stored = sum(part.size * part.dtype.itemsize for part in leaf.values())
    assert 8 * stored / weights.size <= bits
    reference = np.asarray(nf4.kernel_of(nf4.quantise(weights)), np.float32)
    values = np.asarray(nf4.kernel_of(leaf), np.float32)
    assert np.linalg.norm(values - reference) <= loss * np.linalg.norm(reference)
    assert 0.08 < np.linalg.norm(values - weights) / np.linalg.norm(weights) < 0.11


def test_what_cannot_be_quantised_is_named():
    with pytest.raises(InputError, match="100 inputs"):
        nf4.quantise(kernel(100, 4))
    with pytest.raises(InputError, match="int3"):
        nf4.quantise(kernel(64, 4), "int3")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "kind", "dtype"),
    [("two_pass", "nf4", "float32"), ("exact", "nf4_double", "bfloat16")],
)
def test_a_forward_on_nf4_is_the_forward_on_its_values(name, kind, dtype):
    config = dataclasses.replace(toys.config({"alpha": 0.3}, backbone=BACKBONE), dtype=dtype)
    params = toys.params(config, dtype)
    quantised = {**params["base"], "layers": storages.quantise_layers(params["base"]["layers"], kind)}
    assert storages.kind_of(quantised) == kind
    assert storages.kind_of(params["base"]) == "none"
    values = {**params["base"], "layers": storages.dequantise(quantised["layers"], jnp.dtype(dtype))}
    tokens = toys.tokens(2, 24)

    def loss(adapter, base):
        model = {"base": base, "adapter": adapter, "blend": params["blend"]}
        logits = rules.logits(config, model, tokens, forward=name)
        return jnp.square(logits).mean(), logits

    def compute(base):
        return jax.jit(jax.value_and_grad(loss, has_aux=True))(params["adapter"], base)

    (_, ours), gradients = compute(quantised)
    (_, theirs), expected = compute(values)
    other = rules.logits(config, params, tokens, forward=name)
    bound = 1e-5 if dtype == "float32" else 0.02  # the same numbers, in programs that XLA may order otherwise
    assert np.abs(ours - theirs).max() <= bound * np.abs(theirs).max()
    assert np.abs(ours - other).max() > 2 * bound * np.abs(theirs).max()
    for got, wanted in zip(jax.tree.leaves(gradients), jax.tree.leaves(expected), strict=True):
        assert np.linalg.norm(got - wanted) <= 10 * bound * np.linalg.norm(wanted) + 1e-7
