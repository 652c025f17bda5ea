"""The study of short memory: end to end on a toy, states taken away where it says so, and its tables by other sums."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import short_memory as command
from sst_jax.console.command import run
from sst_jax.inference.decode_state import decode_step_at_depth
from sst_jax.inference.kv_cache import init_cache
from sst_jax.lab.studies import memory_tables
from sst_jax.lab.studies import short_memory as study
from sst_jax.model import decoder, rules
from tests.support import toys

pytest.importorskip("tokenizers")

PROTOCOL = {
    "about": "a toy", "vocabulary": 280, "length": 40, "heldout": 6,
    "model": {"layers": 1, "d_model": 16, "d_ff": 16, "heads": 2},
    "train": {"steps": 2, "batch_size": 2, "learning_rate": 0.01, "warmup_steps": 1},
    "seeds": [0, 1], "cuts": [4], "after": 12,
    "arms": {
        "plain": {"attention_window": 2}, "full": {}, "compute": {"attention_window": 2, "steps": 1.5},
        "stream": {"attention_window": 2, "stream": {"alpha_range": [0.0, 1.0], "alpha_init": 0.5}},
    },
    "against": ["plain", "compute"], "full": "full",
}  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("memory")
    for split, first in (("train", 10), ("test", 60)):
        lines = [
            {
                "question": f"Ann has {n} pens and buys {n + 3} more at the shop. How many?",
                "answer": f"She has {2 * n + 3}",
            }
            for n in range(first, first + 8)
        ]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "protocol.json").write_text(json.dumps(PROTOCOL))
    assert run(command.main, arguments(folder)) == 0
    return folder


def arguments(folder):
    return ["--data", str(folder), "--protocol", str(folder / "protocol.json"), "--workdir", str(folder / "run")]


@pytest.mark.slow
def test_tables_are_sums_of_what_was_measured(finished):
    result = json.loads((finished / "run" / "result.json").read_text())
    protocol = study.read_protocol(finished / "protocol.json")
    assert result["protocol"] == protocol.sha256
    texts = study.read_texts(protocol, finished)
    real = texts.heldout.real[:, 1:]
    own = {
        name: [np.load(finished / "run" / f"{name}-{seed}" / "losses.npz")["own"] for seed in (0, 1)]
        for name in protocol.arms
    }
    means = {name: np.mean([one[real].mean() for one in each]) for name, each in own.items()}
    assert result["against"]["plain"]["value"] == pytest.approx(means["stream"] - means["plain"], abs=1e-5)
    taken = means["plain"] - means["full"]
    assert result["given_back"]["value"] == pytest.approx((means["plain"] - means["stream"]) / taken, rel=1e-3)
    assert sum(row["tokens"] for row in result["by_last_mention"]) == real.sum()
    assert result["arms"]["plain"]["reach"] == 1
    assert result["arms"]["full"]["reach"] is None
    steps = {name: arm["steps"] for name, arm in result["arms"].items()}
    assert steps == {"plain": 2, "full": 2, "compute": 3, "stream": 2}
    flops = {name: arm["flops"] / arm["steps"] for name, arm in result["arms"].items()}
    assert flops["stream"] == flops["plain"]  # `exact` multiplies as often as the plain model does
    assert (finished / "run" / "figure.png").stat().st_size > 5000


@pytest.mark.slow
def test_what_is_there_is_not_computed_again_and_is_of_one_protocol(finished, monkeypatch, capsys):
    before = (finished / "run" / "result.json").read_bytes()
    monkeypatch.setattr(study, "train", None)
    monkeypatch.setattr(study, "measure", None)
    assert run(command.main, arguments(finished)) == 0
    assert (finished / "run" / "result.json").read_bytes() == before
    assert "the window took" in capsys.readouterr().out
    assert run(command.main, [*arguments(finished), "--only", "plain,stream", "--seeds", "1"]) == 0
    some = json.loads((finished / "run" / "result.json").read_text())
    assert (some["seeds"], some["missing"], set(some["against"])) == ([1], ["full", "compute"], {"plain"})
    assert some["against"]["plain"]["over_seeds"]["low"] is None
    assert "given_back" not in some
    (finished / "other.json").write_text(json.dumps({**PROTOCOL, "heldout": 5}))
    assert run(command.main, [*arguments(finished), "--protocol", str(finished / "other.json")]) == 2
    assert "holds a run of another protocol" in capsys.readouterr().err
    (finished / "bad.json").write_text(json.dumps({**PROTOCOL, "against": ["best"]}))
    assert run(command.main, [*arguments(finished), "--protocol", str(finished / "bad.json")]) == 2
    assert "bad.json: 'best' is none of the arms plain, full" in capsys.readouterr().err


@pytest.mark.slow
def test_a_state_is_taken_away_where_it_is_said_and_the_recurrence_runs_on(finished):
    """Against decoding position by position, with the cache's states zeroed or exchanged before one of them."""
    protocol = study.read_protocol(finished / "protocol.json")
    config = study.model_config(protocol, "stream")
    params, tokens, cut = toys.params(config), toys.tokens(3, 9, vocabulary=280), 4
    segments, where = jnp.ones_like(tokens), jnp.zeros(tokens.shape, bool).at[:, cut].set(True)
    step = jax.jit(functools.partial(decode_step_at_depth, config))
    ones = jnp.ones(3, jnp.int32)
    for zero in (True, False):
        cache, clean, found = init_cache(config, 3, 64), init_cache(config, 3, 64), []
        for position in range(9):
            if position == cut:
                state = clean.state
                cache = cache._replace(state=jnp.zeros_like(state) if zero else jnp.roll(state, 1, axis=1))
            hidden, cache = step(params, tokens[:, position], cache, ones)
            _, clean = step(params, tokens[:, position], clean, ones)
            found.append(decoder.head(config, params, hidden))
        ours = study.exchanged(config, params, tokens, segments, where, zero=zero)
        np.testing.assert_allclose(ours, np.stack(found, 1), rtol=1e-4, atol=1e-4)
    nowhere = study.exchanged(config, params, tokens, segments, jnp.zeros_like(where), zero=True)
    exact = rules.logits(config, params, tokens, forward="exact")
    np.testing.assert_allclose(nowhere, exact, rtol=1e-5, atol=1e-5)
    assert np.abs(ours - exact)[:, :cut].max() <= 1e-5
    assert np.abs(ours - exact)[:, cut:].min(axis=(1, 2)).max() < np.abs(ours - exact)[:, cut:].max()
    assert np.abs(ours - exact)[:, -1].max() > 1e-3  # five positions on, where attention reaches one


def test_distances_to_the_last_mention():
    rows = study.Rows(np.array([[5, 6, 5, 5, 7, 6]], np.int32), np.ones((1, 6), bool))
    assert study.distance_to_last(rows).tolist() == [[0, 2, 1, 0, 4]]


def test_what_three_seeds_would_show():
    """Simulated: of studies with three seeds that far apart, four in five exclude zero."""
    each = [-0.03, 0.0, 0.03]
    shown = memory_tables.detectable(each)
    draws = np.random.default_rng(0).normal(shown, 0.03, (20_000, 3))
    half = 4.303 * draws.std(1, ddof=1) / np.sqrt(3)
    assert np.mean(draws.mean(1) - half > 0) == pytest.approx(0.8, abs=0.02)
    assert dataclasses.is_dataclass(study.Protocol)
