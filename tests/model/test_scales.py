"""RMS of residual stream and states by layer and iteration, against the naive decoder."""

import jax
import numpy as np
import pytest

from sst_jax.model import rules
from sst_jax.model.scales import scalars
from tests.support import naive, toys

STREAMS = {
    "own": ({"alpha_range": (0.0, 1.0)}, "exact"),
    "linked": ({"alpha_range": (0.0, 1.0), "links": ((2, 0),), "state": "block"}, "exact"),
    "passes": ({"alpha_range": (0.0, 1.0), "links": ((2, 0),)}, "k_pass"),
    "plain": (None, "plain"),
}


@pytest.mark.fast_cases(2)
@pytest.mark.parametrize("name", STREAMS)
def test_scales_are_those_of_the_naive_decoder(name):
    """Over two documents and no padding; the hidden states are those of the forward without them."""
    fields, forward = STREAMS[name]
    config, depth = toys.config(fields, toys.LLAMA), 1 if fields is None else 2
    params, segments = toys.params(config), np.array([[1, 1, 1, 2, 2, 0]])
    tokens = toys.tokens(1, 6)
    settings = {"forward": forward, "depth": depth, "segment_ids": segments, "passes": 13}
    out, found = rules.hidden_and_scales(config, params, tokens, **settings)
    assert np.array_equal(out[0, :5], rules.hidden(config, params, tokens, **settings)[0, :5])
    states, outputs = [], []
    numbers = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    for document in (1, 2):
        memories, handed = {}, {}
        naive.hidden(config, numbers, tokens[segments == document], depth, toys.BOS, memories=memories, outputs=handed)
        states.append(memories)
        outputs.append(handed)
    for part, record in ((found.residual, outputs), (found.state, states)):
        if part is None:
            assert fields is None
            continue
        truth = np.zeros((3, depth))
        for layer, iteration in np.ndindex(truth.shape):
            values = [v for each in record for (at, _, i), v in each.items() if (at, i) == (layer, iteration)]
            assert len(values) == 5
            truth[layer, iteration] = np.sqrt(np.mean(np.square(values)))
        assert np.allclose(part, truth, rtol=1e-4)
    names = scalars(found)
    assert names["rms/residual/2/1"] == float(found.residual[2, 0])
    assert len(names) == (3 if fields is None else 12)
