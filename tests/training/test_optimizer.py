"""Schedules of learning rates and weight decay, against their formulas; rates as the optimizer's state counts them."""

import math

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sst_jax.errors import InputError
from sst_jax.training.optimizer import OptimizerConfig, learning_rates, make_optimizer, schedule


def formula(shape, peak, factor, warmup, updates, at):
    if at < warmup:
        return peak * at / warmup
    part = min((at - warmup) / (updates - warmup), 1.0)
    match shape:
        case "constant":
            return peak
        case "linear":
            return peak * (1 + (factor - 1) * part)
        case "cosine":
            return peak * (factor + (1 - factor) * (1 + math.cos(math.pi * part)) / 2)


@pytest.mark.parametrize("warmup", [0, 3])
@pytest.mark.parametrize("shape", ["cosine", "linear", "constant"])
def test_rates_follow_their_formula(shape, warmup):
    config = OptimizerConfig(schedule=shape, warmup_steps=warmup, final_factor=0.25, accumulate=2)
    rate = schedule(config, 0.5, 20)
    for at in range(12):
        assert float(rate(at)) == pytest.approx(formula(shape, 0.5, 0.25, warmup, 10, at), abs=1e-7)


@pytest.mark.parametrize(("shape", "final"), [("linear", 0.0), ("cosine", 0.5), ("cosine", 2.0), ("constant", 1.0)])
def test_weight_decay_follows_its_schedule(shape, final):
    """Without a gradient an update is the decay alone: -rate * decay(update) * weight, by the formula."""
    config = OptimizerConfig(
        learning_rate=0.1, schedule="constant", warmup_steps=0, weight_decay=0.5,
        decay_schedule=shape, decay_final=final,
    )  # fmt: skip
    optimizer = make_optimizer(config, 8)
    params = {"adapter": jnp.array([2.0]), "blend": jnp.array([3.0])}
    state, still = optimizer.init(params), optax.tree.zeros_like(params)
    for at in range(10):
        updates, state = optimizer.update(still, state, params)
        decay = formula(shape, 0.5, final, 0, 8, at)
        np.testing.assert_allclose(updates["adapter"], [-0.1 * decay * 2.0], rtol=1e-5, atol=1e-8)
        np.testing.assert_array_equal(updates["blend"], [0.0])


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_rate_that_is_logged_is_that_of_the_update_just_made(accumulate):
    config = OptimizerConfig(learning_rate=0.5, blend_learning_rate=0.25, warmup_steps=2, accumulate=accumulate)
    optimizer = make_optimizer(config, 8)
    params = {"adapter": jnp.array([0.0]), "blend": jnp.array([0.0])}
    state, slope, before = optimizer.init(params), optax.tree.ones_like(params), 0.0
    for _ in range(4):
        for _ in range(accumulate):
            more = {"finite": jnp.bool_(True), "answer_tokens": jnp.int32(1)} if accumulate > 1 else {}
            updates, state = optimizer.update(slope, state, params, **more)
        rates = learning_rates(config, state, 8)
        # Adam's first updates on a constant gradient are the rate itself.
        np.testing.assert_allclose(-updates["adapter"], [rates["learning_rate"]], rtol=1e-4, atol=1e-7)
        np.testing.assert_allclose(-updates["blend"], [rates["blend_learning_rate"]], rtol=1e-4, atol=1e-7)
        assert rates["learning_rate"] == pytest.approx(2 * rates["blend_learning_rate"])
        assert rates["learning_rate"] != before or not before
        before = rates["learning_rate"]


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"schedule": "step"}, "optimizer.schedule='step' is not one of 'cosine', 'linear', 'constant'"),
        ({"decay_schedule": "up"}, "optimizer.decay_schedule='up'"),
        ({"decay_final": 0.5}, "optimizer.decay_final=0.5 has no effect"),
        ({"decay_schedule": "linear", "decay_final": -1.0}, "optimizer.decay_final=-1.0"),
    ],
)
def test_bad_schedules_are_named(knobs, message):
    with pytest.raises(InputError, match="optimizer") as raised:
        OptimizerConfig(**knobs)
    assert message in str(raised.value)
