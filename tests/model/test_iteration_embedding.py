"""A learned vector an iteration, against the mechanism written plainly, in every forward, decoding and the export."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sst_jax.errors import InputError
from sst_jax.inference.decode_state import decode_step_at_depth
from sst_jax.inference.kv_cache import init_cache
from sst_jax.inference.model import count
from sst_jax.model import decoder, rules
from sst_jax.model.config import ModelConfig, StreamConfig
from tests.support import naive, toys

MARKED = {"alpha_range": (0.0, 1.0), "iteration_embedding": 3}
BACKBONE = dataclasses.replace(toys.SHALLOW, num_layers=2, layer_types=("local", "global"), window=3)
DEPTH = 4  # one beyond what is told apart


def toy(fields, dtype="float32"):
    """A model whose vectors are not zero."""
    config = toys.config(fields, BACKBONE)
    params = toys.params(config, dtype)
    if decoder.MARKS in params["blend"]:
        marks = params["blend"][decoder.MARKS]
        drawn = np.random.default_rng(5).standard_normal(marks.shape) * 0.3
        params["blend"][decoder.MARKS] = jnp.asarray(drawn, marks.dtype)
    return config, params


def oracle(config, params, tokens, depth):
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    return naive.hidden(config, params, tokens, depth, toys.BOS)


def apart(got, expected):
    return np.linalg.norm(np.asarray(got, np.float64) - expected) / np.linalg.norm(expected)


@pytest.mark.slow
@pytest.mark.parametrize(
    "more",
    [
        {},
        {"kv": "first", "state": "block"},
        {"links": ((1, 0),), "iteration_embedding": 2},
    ],
)
def test_it_is_the_plain_mechanism_with_a_vector_added(more, float64):
    config, params = toy({**MARKED, **more}, "float64")
    tokens = toys.tokens(6)
    truth = oracle(config, params, tokens, DEPTH)
    ours = toys.hidden_in_float64(config, params, tokens[None], forward="exact", depth=DEPTH)[0]
    assert apart(ours, truth) <= 1e-11
    passes = 6 * DEPTH + 1
    swept = toys.hidden_in_float64(config, params, tokens[None], forward="k_pass", passes=passes, depth=DEPTH)[0]
    assert apart(swept, truth) <= 1e-9
    unmarked = {**params, "blend": {**params["blend"], decoder.MARKS: jnp.zeros_like(params["blend"][decoder.MARKS])}}
    assert apart(oracle(config, unmarked, tokens, DEPTH), truth) > 1e-2
    assert np.array_equal(oracle(config, unmarked, tokens, 1), oracle(config, params, tokens, 1))


def test_decoding_marks_the_same_iterations(float64):
    config, params = toy(MARKED, "float64")
    config, tokens = toys.in_float64(config), toys.tokens(6)
    depths = [1, 4, 2, 3, 1, 4]
    step = toys.quick_jit(functools.partial(decode_step_at_depth, config))
    cache, found = init_cache(config, 1, 64), []
    for token, depth in zip(tokens, depths, strict=True):
        out, cache = step(params, jnp.array([token]), cache, jnp.array([depth]))
        found.append(np.asarray(out[0]))
    assert apart(np.stack(found), oracle(config, params, tokens, depths)) <= 1e-11


@pytest.mark.slow
def test_fresh_vectors_change_nothing_and_learn_from_iterations_alone():
    config = toys.config(MARKED, BACKBONE)
    params, tokens = toys.params(config), toys.tokens(2, 5)
    params["blend"] = {
        **params["blend"],
        **{decoder.MARKS: decoder.init_blend(config, jax.random.key(0))[decoder.MARKS]},
    }
    without = dataclasses.replace(config, stream=dataclasses.replace(config.stream, iteration_embedding=0))
    plain = {**params, "blend": {"theta": params["blend"]["theta"]}}

    @functools.partial(jax.jit, static_argnums=1)
    def gradient(params, depth):
        return jax.grad(
            lambda params: jnp.square(rules.logits(config, params, tokens, forward="exact", depth=depth)).sum()
        )(params)["blend"][decoder.MARKS]

    assert np.array_equal(
        rules.logits(config, params, tokens, forward="exact", depth=3),
        rules.logits(without, plain, tokens, forward="exact", depth=3),
    )
    assert np.abs(gradient(params, 1)).max() == 0.0
    two, three = (np.abs(gradient(params, depth)).max(-1) for depth in (2, 3))
    assert (two[0] > 0, two[1]) == (True, 0.0)  # the vectors of iterations 2 and 3
    assert three.min() > 0


def test_vectors_count_and_are_recorded_where_there_are_any():
    config, plain = (ModelConfig(BACKBONE, StreamConfig(iteration_embedding=number)) for number in (3, 0))
    shapes = [decoder.abstract_params(each)["blend"] for each in (config, plain)]
    assert count(shapes[0]) - count(shapes[1]) == 2 * BACKBONE.d_model
    assert "iteration_embedding" not in plain.to_dict()["stream"]
    assert ModelConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize("number", [1, -2, True, pytest.param(2.0, marks=pytest.mark.wrong_types)])
def test_vectors_of_no_two_iterations_are_refused(number):
    with pytest.raises(InputError, match=r"stream\.iteration_embedding=.* 2 or more, or 0"):
        StreamConfig(iteration_embedding=number)
