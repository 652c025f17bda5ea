"""Rows that are sampled in different ways do not meet."""

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings

from sst_jax.inference.sampling import Sampling, sample, sampling_params, score

SAMPLE = jax.jit(sample)
ONE = st.builds(
    Sampling, st.sampled_from([0.0, 0.3, 1.0, 2.0]), st.sampled_from([0, 1, 3, 100]), st.sampled_from([1.0, 0.9, 0.2])
)


@settings(max_examples=30, deadline=None)
@given(rows=st.lists(ONE, min_size=6, max_size=6), seed=st.integers(-(2**40), 2**40))
def test_a_row_draws_what_it_would_draw_among_others_like_it(rows, seed):
    logits = jnp.asarray(np.random.default_rng(abs(seed)).normal(size=(6, 40)), jnp.float32)
    position = jnp.arange(6) + 3
    seeds = [seed + row for row in range(6)]
    together = np.asarray(SAMPLE(sampling_params(rows, seeds), logits, position))
    for row, sampling in enumerate(rows):
        alike = np.asarray(SAMPLE(sampling_params([sampling] * 6, seeds), logits, position))
        assert together[row] == alike[row]


def test_scores_are_log_probabilities():
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(2, 5, 30)), jnp.float32)
    tokens = jnp.asarray(np.random.default_rng(1).integers(0, 30, (2, 5)))
    found = score(logits, tokens, 4)
    expected = np.asarray(jax.nn.log_softmax(logits))
    np.testing.assert_allclose(found.chosen, np.take_along_axis(expected, tokens[..., None], -1)[..., 0], atol=1e-6)
    np.testing.assert_allclose(found.top, -np.sort(-expected)[..., :4], atol=1e-6)
    assert (np.take_along_axis(np.asarray(logits), np.asarray(found.top_ids), -1)[..., 0] == logits.max(-1)).all()
    best = score(logits, logits.argmax(-1), 1)
    assert (best.chosen == best.top[..., 0]).all()  # to the bit: evaluation tools tell a greedy token by equality
