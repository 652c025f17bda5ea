"""Gradients of adapter and blend against finite differences, and `exact` against backpropagation through time."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sst_jax.lab.planning.count import count
from sst_jax.model import walk
from sst_jax.model.remat import REMAT
from sst_jax.model.rules import hidden
from tests.support import naive, toys

BACKBONE = dataclasses.replace(toys.BACKBONE, num_layers=2, layer_types=("local", "global"), window=3)
FFN = toys.config(
    {"alpha_range": (0.0, 1.0), "decay": 0.3, "norm": "match", "initial": "own", "learn_gain": True, "gain": 1.3},
    BACKBONE,
)
BLOCK = toys.config({"alpha_range": (0.0, 1.0), "state": "block", "learn_gain": True, "kv": "first"}, BACKBONE)
TOKENS = toys.tokens(8)
WEIGHTS = np.random.default_rng(1).standard_normal((len(TOKENS), BACKBONE.d_model))
SIZE = 1e-5  # of the finite differences' steps


def split(config):
    """(base, trainable) in float64."""
    params = toys.params(config, "float64")
    return params["base"], {name: params[name] for name in ("adapter", "blend")}


@functools.cache
def value_and_gradient(config, **settings):
    """A compiled function of (trainable, base): a weighted sum of hidden states, and its gradient in the trainables."""

    def loss(trainable, base):
        out = hidden(toys.in_float64(config), {"base": base, **trainable}, TOKENS[None], **settings)
        return (out[0] * WEIGHTS).sum()

    return toys.quick_jit(jax.value_and_grad(loss))


def inner(a, b):
    return sum(jax.tree.leaves(jax.tree.map(jnp.vdot, a, b)))


def largest_difference(a, b):
    """Largest absolute difference, relative to the largest number of each leaf; then over leaves."""
    return max(jax.tree.leaves(jax.tree.map(lambda x, y: float(jnp.abs(x - y).max() / jnp.abs(y).max()), a, b)))


@pytest.mark.fast_cases(2)
@pytest.mark.parametrize(
    ("config", "settings"),
    [
        (FFN, {"forward": "two_pass"}),
        pytest.param(BLOCK, {"forward": "two_pass", "depth": 2}, marks=pytest.mark.slow),
        pytest.param(BLOCK, {"forward": "k_pass", "passes": 3}, marks=pytest.mark.slow),
        pytest.param(FFN, {"forward": "local", "passes": 3}, marks=pytest.mark.slow),
        (FFN, {"forward": "exact", "depth": 1}),
        (BLOCK, {"forward": "exact", "depth": 2}),
    ],
    ids=lambda part: "-".join(map(str, part.values())) if isinstance(part, dict) else part.stream.state,
)
def test_gradients_are_finite_differences(config, settings, float64):
    """In random directions, over each tree alone, so that the large gradients of one do not cover for the other."""
    base, trainable = split(config)
    function = value_and_gradient(config, **settings)
    gradient = function(trainable, base)[1]
    rng = np.random.default_rng(2)
    for tree in ("adapter", "blend", "adapter", "blend"):
        direction = jax.tree.map(jnp.zeros_like, trainable)
        direction[tree] = jax.tree.map(lambda leaf: jnp.asarray(rng.standard_normal(leaf.shape)), trainable[tree])
        length = jnp.sqrt(inner(direction, direction))
        direction = jax.tree.map(lambda leaf, length=length: leaf / length, direction)
        moved = (jax.tree.map(lambda x, y, by=by: x + by * y, trainable, direction) for by in (SIZE, -SIZE))
        ahead, behind = (function(point, base)[0] for point in moved)
        difference = (ahead - behind) / (2 * SIZE)
        error = abs(inner(gradient, direction) / difference - 1)
        print(f"{tree}: relative error {error:.1e}")
        assert error <= 1e-6


@pytest.mark.parametrize(("config", "depth"), [(FFN, 1), (BLOCK, 2)], ids=["ffn-1", "block-2"])
def test_exact_is_backpropagation_through_time(config, depth, float64):
    """Every entry of the gradient, against a plain loop over tokens, iterations and layers under PyTorch's autograd."""
    torch = pytest.importorskip("torch")
    base, trainable = split(config)
    value, gradient = value_and_gradient(config, forward="exact", depth=depth)(trainable, base)

    def tensors(tree, learned):
        return jax.tree.map(lambda leaf: torch.tensor(np.array(leaf), requires_grad=learned), tree)

    learned = tensors(trainable, True)
    out = naive.hidden(config, {"base": tensors(base, False), **learned}, TOKENS, depth, xp=torch)
    true_value = (out * torch.tensor(WEIGHTS)).sum()
    true_value.backward()
    assert abs(value - true_value.item()) <= 1e-11
    error = largest_difference(gradient, jax.tree.map(lambda leaf: leaf.grad.numpy(), learned))
    print(f"largest relative difference {error:.1e}")
    assert error <= 1e-10


@pytest.mark.fast_cases(1)
@pytest.mark.parametrize("remat", REMAT[1:])
@pytest.mark.parametrize(
    "settings", [{"forward": "two_pass"}, pytest.param({"forward": "exact", "depth": 1}, marks=pytest.mark.slow)]
)
def test_remat_changes_no_gradient(settings, remat, float64):
    base, trainable = split(FFN)
    kept = value_and_gradient(FFN, **settings)(trainable, base)
    again = value_and_gradient(FFN, **settings, remat=remat)(trainable, base)
    assert largest_difference(again, kept) <= 1e-12


@pytest.mark.slow
@pytest.mark.parametrize("remat", REMAT)
@pytest.mark.parametrize("chunk", [3, 7])
def test_chunks_of_exact_change_no_gradient(chunk, remat, float64, monkeypatch):
    """Eight positions in three chunks of three (one of them padding) and in two of four."""
    base, trainable = split(FFN)
    whole = value_and_gradient(FFN, forward="exact", depth=1)(trainable, base)
    monkeypatch.setattr(walk, "CHUNK", chunk)
    jax.clear_caches()
    cut = value_and_gradient.__wrapped__(FFN, forward="exact", depth=1, remat=remat)(trainable, base)
    jax.clear_caches()
    assert largest_difference(cut, whole) <= 1e-12


@pytest.mark.parametrize(("name", "spared"), [("exact", True), ("two_pass", False)])
def test_kept_memories_spare_exact_a_walk(name, spared, float64):
    """Forward, backward, and one feed-forward again for a chunk's gradients, without a second for the whole layer's."""
    base, trainable = split(FFN)

    def work(remat):
        return count(value_and_gradient(FFN, forward=name, remat=remat).trace(trainable, base).jaxpr).flops

    shapes = BACKBONE.linear_shapes
    walk = BACKBONE.num_layers * len(TOKENS) * sum(2 * math.prod(shapes[part]) for part in ("gate", "up", "down"))
    fewer = work("layer") - work("memories")
    assert walk <= fewer <= 1.5 * walk if spared else fewer == 0  # LoRA's products are spared too


def test_pass1_grad_changes_gradients_but_no_values(float64):
    base, trainable = split(FFN)
    value, gradient = value_and_gradient(FFN, forward="two_pass")(trainable, base)
    stopped = dataclasses.replace(FFN, stream=dataclasses.replace(FFN.stream, pass1_grad=False))
    same_value, other = value_and_gradient(stopped, forward="two_pass")(trainable, base)
    assert abs(same_value - value) <= 1e-12
    assert largest_difference(other, gradient) > 0.01
    # The blend of the last layer's second pass needs no gradient of pass 1.
    assert np.allclose(other["blend"]["theta"][-1], gradient["blend"]["theta"][-1], rtol=1e-10, atol=0)


@pytest.mark.fast_cases(1)
@pytest.mark.parametrize("forward", ["two_pass", pytest.param("exact", marks=pytest.mark.slow)])
def test_a_zero_embedding_under_padding_has_finite_gradients(forward):
    """Hugging Face's `padding_idx` makes a row of the embedding zero, and h with it where nothing attends yet.

    norm="match" takes the root of h's mean square there: masked or not, its gradient must not be NaN. The gradients are
    those of a table whose padding row is another one.
    """
    config = toys.config({"alpha_range": (0.0, 1.0), "norm": "match", "initial": "own", "learn_gain": True}, BACKBONE)
    params, tokens = toys.params(config), toys.tokens(1, 6)
    tokens[0, :2] = 0
    segments = np.array([[0, 0, 1, 1, 1, 1]])
    table = params["base"]["embed"]["embedding"]

    @jax.jit
    def gradient(padding_row):
        base = {**params["base"], "embed": {"embedding": table.at[0].set(padding_row)}}

        def loss(trainable):
            out = hidden(config, {"base": base, **trainable}, tokens, forward=forward, segment_ids=segments)
            return (out[0, 2:] * WEIGHTS[2:6]).sum()

        return jax.grad(loss)({name: params[name] for name in ("adapter", "blend")})

    at_zero, elsewhere = gradient(jnp.zeros_like(table[0])), gradient(jnp.ones_like(table[0]))
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(at_zero))
    assert largest_difference(at_zero, elsewhere) <= 1e-4
