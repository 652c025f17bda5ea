"""docs/adding-a-forward.md: its code is run here, registered, and held to `exact`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sst_jax.errors import InputError
from sst_jax.lab.analysis.approximation import parse_forward
from sst_jax.model import rules
from sst_jax.training.step import ForwardConfig, batch_losses
from tests.support import guides, toys

PAGE = "adding-a-forward.md"


@pytest.fixture
def damped(monkeypatch):
    """The page's forward, as if its code stood in rules.py."""
    monkeypatch.setattr(rules, "FORWARDS", dict(rules.FORWARDS))
    for number, block in enumerate(guides.code_blocks(guides.read_guide(PAGE))):
        code = compile(f"from __future__ import annotations\n{block}", f"{PAGE}, block {number}", "exec")
        exec(code, vars(rules))
    yield
    for name in ("Damping", "damped"):
        vars(rules).pop(name)


def hidden(config, params, tokens, forward, **settings):
    return np.asarray(toys.hidden_in_float64(config, params, tokens, forward=forward, **settings))


@pytest.mark.fast_cases(1)
@pytest.mark.parametrize("depth", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_it_converges_to_exact(damped, depth, float64):
    config = toys.config({"alpha_range": (0.0, 1.0), "decay": 0.3, "initial": "own"})
    params, tokens = toys.params(config, "float64"), toys.tokens(2, 5)
    truth = hidden(config, params, tokens, "exact", depth=depth)
    errors = [
        np.abs(hidden(config, params, tokens, f"damped:{passes}:0.1", depth=depth) - truth).max() for passes in (2, 24)
    ]
    assert errors[0] > 1e-3
    assert errors[1] <= 1e-11


def test_without_damping_it_is_local(damped, float64):
    config = toys.config({"alpha_range": (0.0, 1.0)})
    params, tokens = toys.params(config, "float64"), toys.tokens(2, 9)
    local = hidden(config, params, tokens, "local:3")
    assert np.abs(hidden(config, params, tokens, "damped:3:0.0") - local).max() <= 1e-13
    assert np.abs(hidden(config, params, tokens, "damped:3:0.5") - local).max() > 1e-4


def test_it_trains_and_is_analysed_by_its_spelling(damped):
    config = toys.config({})
    params, tokens = toys.params(config), toys.tokens(2, 12)
    settings = ForwardConfig("damped:3:0.5", mix_share=1.0, mix_passes=4)
    assert settings.at(0, 0).forward == "k_pass"
    batch = {
        "tokens": tokens,
        "segment_ids": np.ones_like(tokens),
        "positions": np.broadcast_to(np.arange(12, dtype=np.int32), tokens.shape),
        "answer_mask": np.ones(tokens.shape, bool),
    }

    def loss(blend):
        trainable = {"adapter": params["adapter"], "blend": blend}
        return batch_losses(config, ForwardConfig("damped:3:0.5"), params["base"], trainable, batch).sum()

    value, gradient = jax.value_and_grad(loss)(params["blend"])
    assert np.isfinite(value)
    assert float(jnp.abs(gradient["theta"]).max()) > 0
    assert parse_forward("damped:3:0.5") == ("damped:3:0.5", 2)


@pytest.mark.parametrize(
    ("spelling", "message"),
    [
        ("damped:3:much", "keep 'much' is not float"),
        ("damped:3.5", "passes '3.5' is not int"),
        ("damped:1:0.5:2", "more options than it takes, which are damped:PASSES:KEEP"),
        ("damped:3:1.0", r"keep in \[0, 1\)"),
        ("damp:3", "not one of plain, two_pass, k_pass, local, exact, damped"),
        ("exact:2", "more options than it takes, which are exact"),
        ("two_pass:3", "k_pass and local take"),
        ("local:0", "passes=0 must be at least 1"),
    ],
)
def test_spellings_that_do_not_fit_are_named(damped, spelling, message):
    with pytest.raises(InputError, match=message):
        rules.bind(spelling)


def test_passes_are_spelled_or_given():
    config = toys.config({})
    params, tokens = toys.params(config), toys.tokens(1, 8)
    for name in ("k_pass", "local"):
        given = rules.hidden(config, params, tokens, forward=name, passes=3)
        assert np.array_equal(given, rules.hidden(config, params, tokens, forward=f"{name}:3"))
        assert not np.array_equal(given, rules.hidden(config, params, tokens, forward=name))
    spelled = ForwardConfig("k_pass:3")
    assert (spelled.forward, spelled.passes) == ("k_pass", 3)
