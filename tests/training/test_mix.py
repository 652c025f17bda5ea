"""Steps with more passes, drawn by seed."""

import numpy as np
import pytest

from sst_jax.errors import InputError
from sst_jax.training.step import ForwardConfig


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


@pytest.mark.parametrize("bad", [{"mix_share": 1.5}, {"mix_share": -0.1}, {"forward": "exact", "mix_share": 0.5}])
def test_bad_mixes_are_refused(bad):
    with pytest.raises(InputError, match="mix_share"):
        ForwardConfig(**bad)
