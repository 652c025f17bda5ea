"""In float64, on families whose blocks are their own: exact against token-by-token decoding, and two passes' order."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest

from sst_jax.families.registry import BY_NAME
from sst_jax.inference.decode_state import decode_step
from sst_jax.inference.kv_cache import init_cache
from sst_jax.model import rules
from tests.support import toys

DEPTH, LENGTH = 2, 20  # beyond the tiny members' windows and what their queries' scaling counts by


@pytest.mark.slow
@pytest.mark.parametrize("family", ["smollm3", "granite", "olmo3", "phi3", "ministral3", "gemma4", "gemma4_unified"])
def test_the_recurrence_is_exact(family, float64):
    config = toys.in_float64(toys.config({"alpha_range": (0.0, 1.0)}, BY_NAME[family].tiny))
    params, tokens = toys.params(config, "float64"), toys.tokens(1, LENGTH, vocabulary=262)
    exact = toys.quick_jit(functools.partial(rules.hidden, forward="exact", depth=DEPTH), "config")
    expected = np.asarray(exact(config, params, tokens)).reshape(1, LENGTH, -1, config.backbone.d_model)[:, :, -1]
    step = toys.quick_jit(functools.partial(decode_step, halting=None), "config")
    cache, found = init_cache(config, 1, LENGTH), []
    for position in range(LENGTH):
        hidden, cache, _ = step(config, params, jnp.asarray(tokens[:, position]), cache, jnp.array([DEPTH]))
        found.append(np.asarray(hidden))
    difference = np.abs(np.stack(found, axis=1) - expected).max()
    print(f"{family}: {difference:.1e} of {np.abs(expected).max():.1f}")
    assert difference <= 1e-11


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gemma4", "gemma4_unified"])
def test_the_error_of_two_passes_falls_with_alpha_squared(family, float64):
    config = toys.config({"alpha_range": (0.0, 1.0), "granularity": "scalar"}, BY_NAME[family].tiny)
    slope = toys.two_pass_slope(config, toys.params(config, "float64"), toys.tokens(1, 32, vocabulary=262))
    print(f"{family}: slope {slope:.3f}")
    assert abs(slope - 2.0) <= 0.1
