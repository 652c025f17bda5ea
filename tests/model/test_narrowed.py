"""LoRA factors that are cast once a layer: the product is the same, and its gradient is added up in float32."""

import jax
import jax.numpy as jnp
import numpy as np

from sst_jax.model import compiler
from sst_jax.model.layers import Factor, factor_product, narrowed


def test_only_gpus_and_narrow_types_get_them():
    adapter = {"q": {"lora_a": jnp.ones((4, 2)), "lora_b": jnp.ones((2, 4))}}
    assert narrowed(adapter, jnp.bfloat16) is adapter
    with compiler.compiled_for("cuda"):
        assert narrowed(adapter, jnp.float32) is adapter
        factors = narrowed(adapter, jnp.dtype("bfloat16"))["q"]
    assert all(isinstance(factor, Factor) for factor in factors.values())
    assert factors["lora_a"].narrow.dtype == jnp.bfloat16
    assert factors["lora_a"].value.dtype == jnp.float32


def test_the_gradient_of_a_walk_is_float32_s_where_a_cast_inside_it_rounds_every_sum():
    rng = np.random.default_rng(0)
    factor = jnp.asarray(rng.standard_normal((16, 4)), jnp.float32)
    z, dy = (jnp.asarray(rng.standard_normal((200, 2, size)), jnp.bfloat16) for size in (16, 4))

    def gradient(product):
        def loss(factor):
            steps = lambda total, pair: (total + (product(pair[0], factor) * pair[1]).sum().astype(jnp.float32), None)  # noqa: E731
            return jax.lax.scan(steps, jnp.float32(0), (z, dy))[0]

        return np.asarray(jax.jit(jax.grad(loss))(factor), np.float64)

    exact = np.einsum("tbr,tbn->rn", np.asarray(z, np.float64), np.asarray(dy, np.float64))
    ours = gradient(lambda z, factor: factor_product(z, factor, jax.lax.stop_gradient(factor).astype(z.dtype)))
    plain = gradient(lambda z, factor: z @ factor.astype(z.dtype))

    def far(found):
        return np.linalg.norm(found - exact) / np.linalg.norm(exact)

    assert far(ours) < 1e-6 < far(plain)
    z0 = z[0]
    assert np.array_equal(factor_product(z0, factor, factor.astype(z0.dtype)), z0 @ factor.astype(z0.dtype))
