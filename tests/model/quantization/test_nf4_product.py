"""Products that read four bits a weight, in Pallas' interpreter, against the unpacked kernel; and their uses."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sst_jax.families.registry import PRESETS
from sst_jax.inference.decode_state import decode_step_at_depth
from sst_jax.inference.prefill import prefill
from sst_jax.model import compiler, rules
from sst_jax.model.layers import Linear, joined, side_by_side
from sst_jax.model.quantization import nf4, nf4_product, storages
from sst_jax.model.quantization.base import StackedLinear
from tests.model.quantization.test_nf4 import BACKBONE
from tests.support import toys


def stacked(inputs, outputs, kind, layers=3, seed=0):
    weights = jax.random.normal(jax.random.key(seed), (layers, inputs, outputs)) * 0.02
    return jax.jit(nf4.quantise, static_argnums=1)(weights, kind)


def both(x, dys, stacks, at, kind):
    """x W and dy W^T as the kernels compute them, of which no unpacked kernel may be read."""

    @jax.jit
    def run(x, dys, stacks):
        linears = [
            StackedLinear(stack, jnp.int32(at), jnp.full((x.shape[-1], dy.shape[-1]), jnp.nan, x.dtype), storage)
            for stack, dy in zip(stacks, dys, strict=True)
        ]
        ys, pull = jax.vjp(lambda x: storages.products(x, linears), x)
        return jnp.concatenate(ys, axis=-1), pull(dys)[0]

    storage = storages.get(kind)
    with compiler.compiled_for("interpreted"):
        jaxpr = str(jax.make_jaxpr(run)(x, dys, stacks))
        assert jaxpr.count("pallas_call[") == (2 if len(x) > 1 else 0)  # one forward and one backward, however many
        return run(x, dys, stacks)


def check(inputs, outputs, rows, kind):
    for unlike, size in unlike_elements(inputs, outputs, rows, kind):
        assert unlike <= max(1, size / 1000)


def unlike_elements(inputs, outputs, rows, kind):
    """How many elements differ after rounding, each within a unit, and of how many: forward and backward."""
    outputs = (outputs,) if isinstance(outputs, int) else outputs
    stacks = [stacked(inputs, each, kind, seed=number) for number, each in enumerate(outputs)]
    keys = jax.random.split(jax.random.key(rows))
    x = jax.random.normal(keys[0], (rows, 1, inputs)).astype(jnp.bfloat16)
    dy = jax.random.normal(keys[1], (rows, 1, sum(outputs))).astype(jnp.bfloat16)
    dys = tuple(jnp.split(dy, np.cumsum(outputs)[:-1], axis=-1))
    kernel = jax.jit(nf4.kernel_of, static_argnums=1)
    each = [kernel(jax.tree.map(lambda part: part[1], stack), jnp.dtype("float32")) for stack in stacks]
    weights = np.concatenate([np.asarray(one, np.float64) for one in each], axis=-1)
    counts = []
    for ours, theirs in zip(both(x, dys, stacks, 1, kind), (weights, weights.T), strict=True):
        exact = np.asarray(x if theirs is weights else dy, np.float64) @ theirs
        assert ours.dtype == jnp.bfloat16
        assert ours.shape == exact.shape
        rounded = np.asarray(jnp.asarray(exact, jnp.bfloat16), np.float64)
        unlike = np.asarray(ours, np.float64) != rounded
        counts.append((unlike.sum(), unlike.size))
        # One unit of rounding, where sums in another order fall on the other side; small sums of large terms move more.
        size = np.abs(np.asarray(x if theirs is weights else dy, np.float64)) @ np.abs(theirs)
        assert (np.abs(np.asarray(ours, np.float64) - exact) <= 2**-7 * np.abs(exact) + 1e-6 * size).all()
    return counts


@pytest.mark.parametrize("kind", nf4.KINDS)
@pytest.mark.parametrize(
    ("shape", "rows"), [((256, 384), 1), ((640, 256), 5), ((384, 192), 64)], ids=lambda value: str(value)
)
def test_equals_the_unpacked_kernel_forward_and_backward(shape, rows, kind):
    check(*shape, rows, kind)


@pytest.mark.fast_cases(2)
@pytest.mark.parametrize("kind", nf4.KINDS)
@pytest.mark.parametrize("rows", [1, 5, 64])
def test_linears_of_one_input_are_one_product(rows, kind):
    check(384, (256, 128, 192), rows, kind)  # one more than a group of scales, and tiles of 64


@pytest.mark.parametrize("rows", [5, 33])
def test_lora_is_one_more_term_of_the_sums(rows):
    """Forward and backward, of two linears in several shares, against the product of the unpacked kernels."""
    kind, inputs, outputs, rank = "nf4", 384, (192, 128), 16
    stacks = [stacked(inputs, each, kind, seed=number) for number, each in enumerate(outputs)]
    keys = jax.random.split(jax.random.key(rows), 4)
    shapes = (rows, 1, inputs), (rows, 1, sum(outputs)), (inputs, 2 * rank), (rank, sum(outputs))
    x, dy, down, up = (jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True))
    x, dy, down, up = (part.astype(jnp.bfloat16) for part in (x, dy, down * 0.02, up * 0.02))
    storage = storages.get(kind)
    linears = [
        StackedLinear(stack, jnp.int32(1), jnp.full((inputs, each), jnp.nan, x.dtype), storage)
        for stack, each in zip(stacks, outputs, strict=True)
    ]
    with compiler.compiled_for("interpreted"):
        factors = nf4_product.LowRank(down, up)
        assert storages.takes_low_rank((rows, inputs), linears, x.dtype)
        y, pull = jax.vjp(lambda x: storages.adapted_products(x, linears, factors), x)
        (dx,) = pull(dy)
    kernels = [nf4.kernel_of(jax.tree.map(lambda part: part[1], stack), jnp.dtype("float32")) for stack in stacks]
    wide = np.concatenate([np.asarray(kernel, np.float64) for kernel in kernels], axis=-1)
    parts = np.split(np.asarray(up, np.float64), [outputs[0]], axis=-1)
    added = np.asarray(down, np.float64).reshape(inputs, 2, rank)
    wide = wide + np.concatenate([added[:, number] @ part for number, part in enumerate(parts)], axis=-1)
    for ours, exact in ((y, np.asarray(x, np.float64) @ wide), (dx, np.asarray(dy, np.float64) @ wide.T)):
        assert ours.dtype == jnp.bfloat16
        assert np.linalg.norm(np.asarray(ours, np.float64) - exact) <= 2**-8 * np.linalg.norm(exact)


@pytest.mark.slow
@pytest.mark.optimised
@pytest.mark.parametrize("kind", nf4.KINDS)
@pytest.mark.parametrize("rows", [1, 2, 8, 32, 64])
@pytest.mark.parametrize("size", ["270m", "qwen2.5-0.5b"])
def test_equals_it_at_shapes_of_real_models(size, rows, kind):
    """Of larger ones only the number of programs differs, each of which takes one tile and one block after another."""
    shapes = PRESETS[size].linear_shapes
    check(*shapes["k"], rows, kind)
    check(*shapes["down"], rows, kind)


def sharing_as(monkeypatch, part, whole):
    """Let products with a part of a linear's outputs, or of its inputs, share their sums as those with all of them do.

    Into how many shares a sum is cut depends on how many sums there are.
    """
    wanted, reduced = nf4_product._wanted, nf4_product.REDUCED
    monkeypatch.setattr(nf4_product, "_wanted", lambda rows: math.ceil(wanted(rows) * part / whole))
    monkeypatch.setattr(nf4_product, "REDUCED", math.ceil(reduced * part / whole))


SIZES = ("270m", "1b", "4b", "12b", "27b", "qwen3-32b")
SHAPES = sorted({shape for size in SIZES for shape in PRESETS[size].linear_shapes.values()})
TILES = 2 * nf4.GROUP  # outputs of four tiles, whose scales are of two groups


@pytest.mark.slow
@pytest.mark.optimised
@pytest.mark.parametrize("kind", nf4.KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def test_rounds_as_the_unpacked_kernel_does_at_every_shape_of_the_large_models(shape, kind, monkeypatch):
    """With all of a sum's terms and shares, which its rounding depends on, and a few of the sums.

    Forward the sums are over inputs, and a few tiles of outputs are computed; backward over outputs, and of a few
    blocks of inputs. One in a thousand may differ of all, not of the few that one row has.
    """
    inputs, outputs = shape
    for part in ((inputs, min(outputs, TILES)), (min(inputs, TILES), outputs)):
        counts = []
        for rows in (1, 2, 8, 64):
            with monkeypatch.context() as patch:
                sharing_as(patch, math.prod(part), math.prod(shape))
                counts.append(unlike_elements(*part, rows, kind))
        unlike, size = np.sum(counts, axis=0).T  # forward and backward
        assert (unlike <= size / 1000).all()


@pytest.mark.parametrize("name", [name for name in PRESETS if not name.startswith("tiny")])
def test_every_linear_of_every_model_has_a_tile(name):
    for inputs, outputs in PRESETS[name].linear_shapes.values():
        assert inputs % nf4_product.BLOCK == 0
        assert nf4_product.columns(outputs) is not None


@pytest.fixture(scope="module")
def toy():
    """A model whose linears all have tiles, in bfloat16."""
    backbone = dataclasses.replace(
        BACKBONE, num_layers=2, layer_types=("local", "global"), head_dim=32, num_kv_heads=2, d_ff=128
    )
    config = dataclasses.replace(toys.config({"alpha_range": (0.0, 1.0)}, backbone), dtype="bfloat16")
    params = toys.params(config)
    base = storages.cast(params["base"], jnp.bfloat16)
    return config, {**params, "base": {**base, "layers": storages.quantise_layers(base["layers"], "nf4")}}


def apart(ours, theirs):
    ours, theirs = (
        np.concatenate([np.ravel(np.asarray(leaf, np.float64)) for leaf in jax.tree.leaves(tree)])
        for tree in (ours, theirs)
    )
    return np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)


@pytest.mark.slow
def test_the_gradient_of_exact_is_as_far_from_float32_with_them_as_without(toy):
    config, params = toy
    tokens = jnp.asarray(toys.tokens(3, 12))

    def gradient(dtype):
        narrow = dataclasses.replace(config, dtype=dtype)

        def loss(trainable):
            logits = rules.logits(narrow, {"base": params["base"], **trainable}, tokens, forward="exact")
            return -jnp.take_along_axis(jax.nn.log_softmax(logits[:, :-1]), tokens[:, 1:, None], axis=-1).mean()

        return jax.jit(jax.grad(loss))({name: params[name] for name in ("adapter", "blend")})

    exact, plain = gradient("float32"), gradient("bfloat16")
    with compiler.compiled_for("interpreted"):
        assert "pallas_call" in str(jax.make_jaxpr(lambda: gradient("bfloat16"))())
        fused = gradient("bfloat16")
    assert apart(fused, exact) <= 1.1 * apart(plain, exact)


@pytest.mark.slow
def test_decoding_comes_to_what_it_comes_to_without(toy):
    config, params = toy
    tokens = toys.tokens(3, 9)
    _, cache = prefill(config, params, tokens, np.full(3, 9), capacity=16)

    def step(cache):
        token, depth = jnp.asarray(tokens[:, 0]), jnp.full(3, 2)
        return decode_step_at_depth(config, params, token, cache, depth)[0]

    plain = jax.jit(step)(cache)
    with compiler.compiled_for("interpreted"):
        assert (
            str(jax.make_jaxpr(step)(cache)).count("pallas_call[") == 4
        )  # queries, keys and values; o; gate and up; down
        fused = jax.jit(step)(cache)
    assert apart(fused, plain) < 0.03


@pytest.mark.fast_cases(1)
def test_a_prefill_takes_lora_in_its_kernels(toy):
    """Of the two large linears, whose LoRA apart would write and read as much as they do; as near to float32."""
    config, params = toy
    tokens = toys.tokens(2, 64)

    def hidden(dtype):
        narrow = dataclasses.replace(config, dtype=dtype)
        return prefill(narrow, params, tokens, np.full(2, 64), capacity=64)[0]

    exact, plain = hidden("float32"), hidden("bfloat16")
    with compiler.compiled_for("interpreted"):
        ours = hidden("bfloat16")
        jaxpr = str(jax.make_jaxpr(lambda: hidden("bfloat16"))())
    inputs, rank = config.backbone.d_model, config.adapter.rank
    assert f"bf16[{inputs + 2 * rank},{config.backbone.d_ff}]" in jaxpr
    assert not np.array_equal(ours, plain)
    assert apart(ours, exact) <= 1.1 * apart(plain, exact)


@pytest.mark.parametrize("ranks", [(4, 4), (4, 2), (4, 0)], ids=str)
def test_lora_in_a_kernel_is_what_it_is_apart(ranks):
    """Unless one of the linears has none, of few rows, or where the kernel is not unpacked."""
    rngs, storage, stack = nnx.Rngs(0), storages.get("nf4"), stacked(64, 64, "nf4", layers=1)
    linears = [Linear((64, 64), rank, 0.5, jnp.float32, rngs, bias=rank == 2) for rank in ranks]
    for linear in linears:
        if linear.rank:
            linear.lora_b.set_value(jax.random.normal(rngs.params(), linear.lora_b[...].shape))
    x = jax.random.normal(jax.random.key(1), (3, 30, 64))
    separate = [np.asarray(part) for part in side_by_side(linears, x, [None] * len(linears))]
    assert joined(linears, x.shape, x.dtype) is None  # not of a base that is stored as it is
    for linear in linears:
        kernel = linear.kernel[...]
        linear.kernel.set_value(StackedLinear(stack, jnp.int32(0), kernel, storage))
    assert joined(linears, (2, 1, 64), jnp.bfloat16) is None  # multiplied at four bits
    one = joined(linears, x.shape, x.dtype)
    if 0 in ranks:
        assert one is None
        return
    assert [kernel.shape for kernel in one.kernels] == [(64 + sum(ranks), 64)] * 2
    for ours, theirs in zip(side_by_side(linears, x, [None] * 2, one), separate, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


def low_rank_apart(platform, outputs=(48, 16, 40)):
    """How far linears with LoRA, of one row, are from the same in float64; and what they were made of."""
    rngs = nnx.Rngs(0)
    linears = [Linear((64, each), 4, 0.5, jnp.float32, rngs, bias=each == 16) for each in outputs]
    for linear in linears:
        linear.lora_b.set_value(jax.random.normal(rngs.params(), linear.lora_b[...].shape))
    if platform is not None:  # of one without an adapter too
        linears.append(Linear((64, 24), 0, 0.0, jnp.float32, rngs))
    x = jax.random.normal(jax.random.key(1), (1, 1, 64)).astype(jnp.bfloat16)
    with compiler.compiled_for(platform):
        jaxpr = str(jax.make_jaxpr(lambda x: side_by_side(linears, x, [None] * len(linears)))(x))
        ours = side_by_side(linears, x, [None] * len(linears))
    assert [part.shape for part in ours] == [(1, 1, linear.kernel[...].shape[1]) for linear in linears]

    def exact(linear):
        parts = {name: np.asarray(value[...], np.float64) for name, value in nnx.state(linear).items()}
        low = np.asarray(x, np.float64) @ parts["lora_a"] @ parts["lora_b"] * linear.scale if linear.rank else 0.0
        return np.asarray(x, np.float64) @ parts["kernel"] + low + parts.get("bias", 0.0)

    return apart(ours, [exact(linear) for linear in linears]), jaxpr


def test_lora_of_one_row_is_added_up_for_all_linears_of_an_input_at_once():
    plain, products = low_rank_apart(None)
    ours, sums = low_rank_apart("interpreted")
    assert "dot_general" in products
    assert "dot_general" not in sums
    assert ours <= max(1.2 * plain, 4e-3)


def test_a_kernel_in_bfloat16_is_read_where_it_lies_by_one_and_two_rows():
    kernel = jax.random.normal(jax.random.key(0), (96, 40)).astype(jnp.bfloat16)
    for rows in (1, 2):
        x = jax.random.normal(jax.random.key(rows), (rows, 1, 96)).astype(jnp.bfloat16)
        with compiler.compiled_for("interpreted"):
            assert "dot_general" not in str(jax.make_jaxpr(storages.product)(x, kernel))
            ours = storages.product(x, kernel)
        assert ours.shape == (rows, 1, 40)
        assert apart(ours, np.asarray(x, np.float64) @ np.asarray(kernel, np.float64)) < 3e-3
