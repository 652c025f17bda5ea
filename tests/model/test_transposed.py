"""Few rows on a CPU: a walk multiplies by transposed kernels, to the same numbers and gradients."""

import jax
import numpy as np
import pytest

from sst_jax.model import layers
from sst_jax.model.rules import hidden
from tests.support import toys

PRODUCTS = 3  # of a feed-forward: gate, up, down


def value_and_gradient(config, tokens, **settings):
    """A fresh function of the trainables and the base: a weighted sum of the hidden states of `exact`."""
    weights = np.random.default_rng(1).standard_normal((*tokens.shape, config.backbone.d_model)).astype(np.float32)

    def loss(trainable, base):
        return (hidden(config, {"base": base, **trainable}, tokens, forward="exact", **settings) * weights).sum()

    return jax.value_and_grad(loss)


def barriers(function, *arguments):
    return str(jax.make_jaxpr(function)(*arguments)).count("optimization_barrier")


@pytest.mark.parametrize(
    ("backbone", "settings", "dropout"),
    [
        (toys.SHALLOW, {}, 0.0),
        (toys.SHALLOW, {"remat": "memories", "dropout_key": jax.random.key(3)}, 0.2),
        (toys.LLAMA, {"depth": 2}, 0.0),
    ],
)
def test_values_and_gradients_are_those_of_the_kernels_as_they_are(backbone, settings, dropout, monkeypatch):
    config = toys.config({"alpha": 0.3}, backbone, dropout=dropout)
    params, tokens = toys.params(config), toys.tokens(3, 12)
    arguments = {name: params[name] for name in ("adapter", "blend")}, params["base"]
    function = value_and_gradient(config, tokens, **settings)
    few, (value, gradient) = barriers(function, *arguments), function(*arguments)
    monkeypatch.setattr(layers, "FEW_ROWS", 0)
    jax.clear_caches()
    function = value_and_gradient(config, tokens, **settings)
    assert few - barriers(function, *arguments) >= PRODUCTS
    true_value, true_gradient = function(*arguments)
    jax.clear_caches()
    np.testing.assert_allclose(value, true_value, rtol=1e-5)
    for one, other in zip(jax.tree.leaves(gradient), jax.tree.leaves(true_gradient), strict=True):
        assert np.linalg.norm(one - other) <= 1e-5 * np.linalg.norm(other)


@pytest.mark.parametrize(("rows", "few"), [(1, False), (2, True), (32, True), (33, False)])
def test_one_row_reads_a_kernel_once_as_it_is_and_many_pack_it(rows, few):
    linear = layers.Linear((4, 6), 0, 1.0, np.float32, layers.nnx.Rngs(0))
    found = layers.transposed([linear], rows, np.float32)
    assert (found is not None) == few
    if few:
        np.testing.assert_array_equal(found.kernels[0], linear.kernel.get_value().T)


def test_other_types_and_platforms_keep_their_kernels():
    linear = layers.Linear((4, 6), 0, 1.0, np.float32, layers.nnx.Rngs(0))
    assert layers.transposed([linear], 8, jax.numpy.bfloat16) is None
    with layers.compiler.compiled_for("cuda"):
        assert layers.transposed([linear], 8, np.float32) is None
