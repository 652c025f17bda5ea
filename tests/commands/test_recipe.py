"""The command that prints a recipe's knobs."""

import json

import pytest

from sst_jax import recipe
from sst_jax.console.command import run
from sst_jax.training import knobs
from sst_jax.training.recipe import defaults, recipe_names


def test_every_knob_says_what_it_means():
    config = defaults()
    names = [f"{section}.{knob}" for section in config for knob in config[section]]
    assert len(names) > 60
    assert [name for name in names if not knobs.meaning(name)] == []
    assert knobs.meaning("train.steps") == "batches that are trained on"
    assert knobs.meaning("optimizer.b2") == "decay rates of Adam's moments"
    assert knobs.meaning("data.heldout_share").startswith("the part of one's own rows that is held out")


def test_a_value_says_where_it_comes_from(tmp_path, capsys):
    flags = ["--config", "quickstart", "--config.train.steps=40", "--config.train.keep=2"]
    assert run(recipe.main, [*flags, "--json", str(tmp_path / "knobs.json")]) == 0
    found = {knob["name"]: knob for knob in json.loads((tmp_path / "knobs.json").read_text())}
    origin = {name: knob["origin"] for name, knob in found.items()}
    assert (found["train.steps"]["value"], origin["train.steps"]) == (40, "command line")
    assert (found["adapter.rank"]["value"], origin["data.name"]) == (16, "recipe")
    assert origin["train.keep"] == origin["stream.state"] == "default"
    said = capsys.readouterr().out
    assert "train.steps = 40  (command line)\n    batches that are trained on\n" in said
    assert "stream.state = 'ffn'\n" in said
    assert run(recipe.main, [*flags, "--changed"]) == 0
    said = capsys.readouterr().out
    assert "stream.state" not in said
    assert "train.steps = 40" in said


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_is_printed(name, capsys):
    assert run(recipe.main, ["--config", name]) == 0
    assert " = " in capsys.readouterr().out


def test_a_knob_that_is_none_is_refused_in_one_line(capsys):
    assert run(recipe.main, ["--config", "tiny", "--config.train.stepz=3"]) == 2
    assert "stepz" in capsys.readouterr().err
    assert run(recipe.main, ["--config", "tiny", "--config.train.steps=0"]) == 2
    assert "train.steps=0 must be at least 1" in capsys.readouterr().err
