"""Steps with more passes or at other depths, drawn by seed."""

import numpy as np
import optax
import pytest

from sst_jax.errors import InputError
from sst_jax.model import rules
from sst_jax.training.step import ForwardConfig, batch_losses
from tests.support import toys


def test_the_share_is_kept_and_the_draw_depends_on_seed_and_step_alone():
    settings = ForwardConfig("two_pass", mix_share=0.2, mix_passes=3)
    drawn = [settings.at(step, seed=1) for step in range(2000)]
    assert drawn == [settings.at(step, seed=1) for step in range(2000)]
    assert drawn != [settings.at(step, seed=2) for step in range(2000)]
    more = [part for part in drawn if part.forward == "k_pass"]
    assert all(part.passes == 3 for part in more)
    assert abs(len(more) / 2000 - 0.2) < 4 * np.sqrt(0.2 * 0.8 / 2000)
    assert len(set(drawn)) == 2  # two programs to compile, however many steps


def test_without_a_share_every_step_is_the_same():
    settings = ForwardConfig("local", passes=2)
    assert {settings.at(step, seed=0) for step in range(50)} == {settings}


def test_depths_are_drawn_evenly_and_independently_of_passes():
    settings = ForwardConfig("exact", mix_share=0.25, mix_passes=3, depths=(1, 2, 4))
    drawn = [settings.at(step, seed=3) for step in range(3000)]
    assert drawn == [settings.at(step, seed=3) for step in range(3000)]
    for depth in (1, 2, 4):
        mine = [part for part in drawn if part.depth == depth]
        assert abs(len(mine) / 3000 - 1 / 3) < 4 * np.sqrt(1 / 3 * 2 / 3 / 3000)
        more = [part for part in mine if part.forward == "k_pass"]
        assert all(part.passes == 3 for part in more)
        assert abs(len(more) / len(mine) - 0.25) < 4 * np.sqrt(0.25 * 0.75 / len(mine))
    assert len(set(drawn)) == 6


@pytest.mark.parametrize(
    "settings",
    [
        ForwardConfig("exact", mix_share=0.25, mix_passes=3, depths=(1, 2, 2, 4)),
        ForwardConfig("local", passes=2, mix_share=1.0, mix_passes=5),
        ForwardConfig("two_pass", depths=(2,)),
    ],
    ids=str,
)
def test_draws_are_what_is_drawn_as_often_as_they_say(settings):
    draws = settings.draws()
    assert sum(share for share, _ in draws) == pytest.approx(1.0)
    drawn = [settings.at(step, seed=4) for step in range(2000)]
    assert {one for _, one in draws} == set(drawn)
    for share, one in draws:
        assert abs(drawn.count(one) / 2000 - share) <= 4 * np.sqrt(share * (1 - share) / 2000)


@pytest.mark.parametrize(
    "depths",
    [
        (),
        (0,),
        pytest.param((1.5,), marks=pytest.mark.wrong_types),
        pytest.param((2, "3"), marks=pytest.mark.wrong_types),
    ],
)
def test_bad_depths_are_refused(depths):
    with pytest.raises(InputError, match="depth"):
        ForwardConfig("exact", depths=depths)


def test_plain_steps_have_no_depth():
    with pytest.raises(InputError, match="depth=1"):
        ForwardConfig("plain", depths=(1, 2))


@pytest.mark.parametrize("bad", [{"mix_share": 1.5}, {"mix_share": -0.1}, {"forward": "plain", "mix_share": 0.5}])
def test_bad_mixes_are_refused(bad):
    with pytest.raises(InputError, match="mix_share"):
        ForwardConfig(**bad)


def test_a_step_that_drew_a_depth_has_the_loss_of_that_depth():
    config = toys.config({"alpha_range": (0.0, 1.0)}, backbone=toys.SHALLOW)
    params, tokens = toys.params(config), toys.tokens(2, 7)
    batch = {"tokens": tokens, "segment_ids": np.ones_like(tokens), "answer_mask": np.ones(tokens.shape, bool)}
    batch["positions"] = np.broadcast_to(np.arange(7), (2, 7))
    settings = ForwardConfig("exact", remat="none", depths=(2,))
    found = batch_losses(config, settings.at(0, seed=0), params["base"], params, batch)
    expected = []
    for depth in (1, 2):
        logits = rules.logits(config, params, tokens, forward="exact", depth=depth)[:, :-1]
        expected.append(optax.losses.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]))
    np.testing.assert_allclose(found[:, 1:], expected[1], rtol=1e-4, atol=1e-5)
    assert np.abs(expected[0] - expected[1]).max() > 1e-2
