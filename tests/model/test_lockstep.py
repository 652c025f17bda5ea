"""All passes inside one scan over layers, against the same passes run one after the other through the whole stack."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.scale import hidden_apart
from sst_jax.model import rules
from tests.support import toys

SEGMENTS = np.repeat([1, 2, 0, 3, 0], [9, 5, 2, 6, 2])[None].repeat(2, axis=0)


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["none", "layer"])
@pytest.mark.parametrize(
    ("passes", "fields"),
    [
        (2, {}),
        (2, {"state": "block", "decay": 0.4, "initial": "own", "learn_gain": True, "gain": 1.3}),
        (3, {"norm": "match", "layers": (0, 2, 5)}),
        (3, {"pass1_grad": False}),
    ],
)
def test_lockstep_changes_neither_values_nor_gradients(passes, fields, remat, float64):
    config = toys.in_float64(toys.config({"alpha_range": (0.0, 1.0), **fields}))
    params, tokens = toys.params(config, "float64"), toys.tokens(*SEGMENTS.shape)
    weights = np.random.default_rng(1).standard_normal((*tokens.shape, config.backbone.d_model))
    base = params.pop("base")

    def outcome(way):
        def score(trainable):
            out = way(config, {"base": base, **trainable}, tokens, segment_ids=SEGMENTS, remat=remat)
            out = jnp.where(SEGMENTS[..., None] > 0, out, 0.0)
            return jnp.sum(out * weights), out

        return toys.quick_jit(jax.grad(score, has_aux=True))(params)

    together = outcome(lambda *rest, **settings: rules.hidden(*rest, forward="k_pass", passes=passes, **settings))
    apart = outcome(lambda *rest, **settings: hidden_apart(*rest, passes=passes, **settings))
    for ours, theirs in zip(jax.tree.leaves(together), jax.tree.leaves(apart), strict=True):
        assert np.linalg.norm(ours - theirs) <= 1e-12 * np.linalg.norm(theirs)
    assert all(np.linalg.norm(leaf) > 0 for leaf in jax.tree.leaves(apart))
