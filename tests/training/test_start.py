"""Going on from what has been trained: a run, an adapter, an export with a stream; recorded as a chain."""

import json
import shutil

import jax
import numpy as np
import pytest

from sst_jax import export
from sst_jax.console.command import run
from sst_jax.errors import InputError
from sst_jax.inference.model import load
from sst_jax.lab.evaluation import contamination
from sst_jax.training import fit, read_recipe
from sst_jax.training.start import trained_digest

KNOBS = {
    "model.source": "random:tiny-llama", "train.steps": 2, "train.eval_every": 1, "train.save_every": 1,
    "train.keep": 9, "train.sample_tokens": 2, "data.limit": 24, "data.heldout": 2, "data.batch_size": 2,
}  # fmt: skip


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """A run, and what training it returned."""
    folder = tmp_path_factory.mktemp("chain")
    return folder / "0", fit(read_recipe("tiny", KNOBS), folder / "0")


@pytest.fixture(scope="module")
def chain(first):
    """Three runs, each from the one before."""
    folder, results = first[0].parent, [first[1]]
    for number, rate in ((1, 0.005), (2, 0.006)):
        knobs = KNOBS | {"model.source": str(folder / str(number - 1)), "optimizer.learning_rate": rate}
        results.append(fit(read_recipe("tiny", knobs), folder / str(number)))
    return folder, results


def trained(model):
    return {name: model.params[name] for name in ("adapter", "blend")}


@pytest.mark.slow
def test_a_run_begins_where_its_source_ended(chain):
    folder, results = chain
    first, second, _ = results
    # With one seed the held-out questions are the same: so is their loss.
    assert second.heldout_before == pytest.approx(first.heldout_after, rel=1e-6)
    base = [json.loads((folder / name / "base.json").read_text()) for name in ("0", "1", "2")]
    assert base[0] == base[1] == base[2]


@pytest.mark.slow
def test_a_run_records_the_chain_before_it(chain):
    folder, _ = chain
    record = json.loads((folder / "2" / "config.json").read_text())["started_from"]
    assert (record["run"], record["step"]) == (str(folder / "1"), 2)
    assert record["sha256"] == trained_digest(trained(load(folder / "1")))
    assert record["recipe"]["optimizer"]["learning_rate"] == 0.005
    assert record["started_from"]["run"] == str(folder / "0")
    assert "started_from" not in record["started_from"]
    recipes = contamination.recipes_of(load(folder / "2").provenance)
    assert [recipe["optimizer"]["learning_rate"] for recipe in recipes] == [0.006, 0.005, 0.01]


@pytest.mark.slow
def test_a_run_that_started_from_another_resumes_bit_for_bit(chain, tmp_path):
    folder, results = chain
    again = shutil.copytree(folder / "1", tmp_path / "again")
    shutil.rmtree(again / "checkpoints" / "2")
    knobs = KNOBS | {"model.source": str(folder / "0"), "optimizer.learning_rate": 0.005}
    assert fit(read_recipe("tiny", knobs), again).heldout_loss == results[1].heldout_loss
    for one, other in zip(*(jax.tree.leaves(trained(load(at))) for at in (again, folder / "1")), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.slow
def test_an_adapter_and_an_export_with_a_stream_are_gone_on_with(chain, tmp_path):
    folder, results = chain
    for format in ("adapter", "sst"):
        argv = ["--from", str(folder / "0"), "--to", str(tmp_path / format), "--format", format]
        assert run(export.main, argv) == 0
        knobs = KNOBS | {"model.source": str(tmp_path / format), "train.steps": 1}
        found = fit(read_recipe("tiny", knobs), tmp_path / f"{format}-run")
        assert found.heldout_before == pytest.approx(results[0].heldout_after, rel=1e-4)
        assert load(tmp_path / f"{format}-run").provenance.started_from["model"] == str(tmp_path / format)


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"adapter.rank": 4}, 'another adapter: set "--config.adapter.rank=8"'),
        ({"stream.alpha_range": (0.0, 1.0)}, 'another stream: set "--config.stream.alpha_range=(0.015, 0.1)"'),
        ({"stream.on": False}, "stream.on=False would lose it"),
    ],
)
def test_a_recipe_for_another_adapter_or_stream_is_refused_with_the_knob(first, tmp_path, knobs, message):
    with pytest.raises(InputError, match=r"model\.source=") as raised:
        fit(read_recipe("tiny", KNOBS | {"model.source": str(first[0])} | knobs), tmp_path / "run")
    assert message in str(raised.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_windows_of_a_recipe_are_those_of_its_run(tmp_path, capsys):
    """Held-out losses, the opened run and a further run all look through them; the base on disk has none."""
    knobs = KNOBS | {"model.attention_window": "(2,)", "stream.on": False}
    fit(read_recipe("tiny", knobs), tmp_path / "run")
    opened = load(tmp_path / "run")
    layers = opened.config.backbone.num_layers
    assert opened.config.backbone.attention_window == (2,) * layers
    said = f"attention windows of 2 in {layers} layers reach {layers} positions back"
    assert said in capsys.readouterr().out
    assert said in repr(opened)
    tokens = np.arange(30, 30 + 2 * layers)[None]
    other = tokens.copy()
    other[0, 0] += 1
    moved = np.abs(np.asarray(opened.logits(tokens)) - np.asarray(opened.logits(other)))[0].max(-1)
    assert moved[layers] > 0
    assert moved[layers + 1 :].max() == 0
    with pytest.raises(InputError, match=r"holds a run of another config \(recipe.model.attention_window"):
        fit(read_recipe("tiny", KNOBS | {"stream.on": False}), tmp_path / "run")
    further = fit(
        read_recipe("tiny", KNOBS | {"model.source": str(tmp_path / "run"), "stream.on": False}), tmp_path / "2"
    )
    assert load(tmp_path / "2").config.backbone.attention_window == (2,) * layers
    assert further.heldout_before == pytest.approx(load_loss(tmp_path / "run"), rel=1e-6)


def load_loss(run):
    return json.loads((run / "result.json").read_text())["heldout_after"]


def test_windows_that_do_not_fit_the_layers_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"model.attention_window=\(3, 2\) must be .* one a layer"):
        fit(read_recipe("tiny", KNOBS | {"model.attention_window": "(3,2)"}), tmp_path / "run")
    with pytest.raises(InputError, match=r"model.attention_window=.*1 or more"):
        read_recipe("tiny", KNOBS | {"model.attention_window": "0"})
