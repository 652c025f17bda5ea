"""The approximation analysis: its measures against plain definitions, its orders against the theory, its command."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from sst_jax import analyze
from sst_jax.console.command import run
from sst_jax.errors import InputError
from sst_jax.lab.analysis import approximation
from tests.support import toys


def test_order_recovers_a_planted_power_law_and_ignores_large_alphas():
    alphas = [0.003, 0.01, 0.03, 0.3]
    errors = [5.0 * alpha**2.5 for alpha in alphas[:3]] + [7.0]
    assert approximation.order(alphas, errors) == pytest.approx(2.5)
    assert approximation.order([0.01], [1e-3]) is None
    assert approximation.order([0.01, 0.02], [0.0, 1e-3]) is None


def test_kl_equals_scipys():
    rng = np.random.default_rng(0)
    p, q = rng.normal(size=(2, 3, 7)), rng.normal(size=(2, 3, 7))
    expected = [
        scipy.stats.entropy(np.exp(a) / np.exp(a).sum(), np.exp(b) / np.exp(b).sum())
        for a, b in zip(p.reshape(-1, 7), q.reshape(-1, 7), strict=True)
    ]
    assert approximation.kl(p, q) == pytest.approx(np.mean(expected), rel=1e-5)
    assert approximation.kl(p, p) == pytest.approx(0.0, abs=1e-7)


@pytest.mark.parametrize(
    ("text", "expected"), [("two_pass", ("two_pass", 2)), ("local:3", ("local", 3)), ("k_pass:4", ("k_pass", 4))]
)
def test_forwards_are_read(text, expected):
    assert approximation.parse_forward(text) == expected


@pytest.mark.parametrize("text", ["three_pass", "two_pass:3", "local:x", "exact", "local:0", ""])
def test_bad_forwards_are_named(text):
    with pytest.raises(InputError):
        approximation.parse_forward(text)


@pytest.mark.slow
@pytest.mark.parametrize("state", ["ffn", "block"])
def test_errors_fall_with_the_order_of_the_passes(float64, state):
    """states and logits of two_pass and local, order 2; of three passes, order 3; KL twice that."""
    config = toys.in_float64(toys.config({"state": state}))
    params = toys.params(config, "float64")
    names = [("two_pass", 2), ("k_pass", 3), ("local", 2)]
    todo = list(approximation.cases(names, [0.004, 0.016], [1], [20]))
    records = approximation.measure(config, params, toys.tokens(2, 20), todo, gradients=False)
    for line in approximation.orders(records):
        expected = 3 if line["name"] == "k_pass k=3" else 2
        assert line["states"] == pytest.approx(expected, abs=0.2)
        assert line["logits"] == pytest.approx(expected, abs=0.2)
        assert line["kl"] == pytest.approx(2 * expected, abs=0.4)


@pytest.mark.slow
def test_gradients_are_compared_with_exact_ones(float64):
    """Alpha's gradient is itself a first-order effect of the stream, so its relative error loses one order."""
    config = toys.in_float64(toys.config({}))
    todo = list(approximation.cases([("two_pass", 2)], [0.004, 0.016], [1], [12]))
    records = approximation.measure(config, toys.params(config, "float64"), toys.tokens(1, 12), todo)
    (line,) = approximation.orders(records)
    assert line["adapter_gradient"] > 1.75
    assert line["blend_gradient"] == pytest.approx(1, abs=0.25)
    assert all(record["adapter_cosine"] > 0.999 for record in records)


def test_alpha_is_what_was_asked_for():
    config, blend = approximation.with_alpha(toys.config({"alpha_range": (0.015, 0.1)}), 0.3)
    from sst_jax.model.state import alpha_summary

    summary = alpha_summary(config.stream, blend)
    assert summary["alpha_min"] == pytest.approx(0.3)
    assert summary["alpha_max"] == pytest.approx(0.3)
    assert jnp.shape(blend["theta"]) == (7, 32)


def test_command_writes_a_report(tmp_path, capsys):
    arguments = ["approximation", "--model", "random:tiny", "--out", str(tmp_path), "--alphas", "0.01,0.04"]
    settings = ["--forwards", "two_pass", "--lengths", "24", "--batch", "1", "--no-gradients"]
    assert run(analyze.main, [*arguments, *settings]) == 0
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["orders"][0]["logits"] == pytest.approx(2, abs=0.25)
    assert [record["alpha"] for record in result["records"]] == [0.01, 0.04]
    assert (tmp_path / "approximation.png").stat().st_size > 1000
    assert "two_pass" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "culprit"),
    [
        (["--alphas", "a"], "--alphas a"),
        (["--alphas", "0"], "--alphas 0"),
        (["--alphas", "1.5"], "--alphas 1.5"),
        (["--forwards", "exact"], "--forwards exact"),
        (["--depths", "-1"], "--depths -1"),
        (["--text", "/no/text"], "/no/text"),
        (["--lengths", "99999999"], "tokens"),
        (["--lengths", "24,1"], "--lengths 24,1"),
    ],
)
def test_command_names_bad_flags(tmp_path, capsys, flags, culprit):
    arguments = ["approximation", "--model", "random:tiny", "--out", str(tmp_path / "out"), *flags]
    assert run(analyze.main, arguments) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert culprit in message
