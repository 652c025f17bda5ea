"""Recipes: what is recorded, what counts as the same, former names, and where the package's own are found."""

import dataclasses
import json
import os
import pathlib
import sys

import pytest

from sst_jax.errors import InputError
from sst_jax.training import recipe as recipes
from sst_jax.training.recipe import (
    Recipe,
    default_record,
    defaults,
    find_file,
    read,
    read_recipe,
    recipe_names,
    resolve,
)
from sst_jax.training.run import check_recipe

ROOT = pathlib.Path(__file__).parents[2]
OLD_RUN = ROOT / "tests" / "fixtures" / "v0_1_0" / "run"
OLD_KNOBS = {
    "model.source": "random:tiny-llama", "adapter.rank": 2, "train.steps": 4, "train.eval_every": 2,
    "train.save_every": 2, "train.keep": 2, "train.sample_tokens": 8, "data.length": 512, "data.limit": 32,
    "data.heldout": 4,
}  # fmt: skip


def tiny(**knobs) -> Recipe:
    return read_recipe("tiny", {key.replace("__", "."): value for key, value in knobs.items()})


@pytest.mark.parametrize("name", [name for name in recipe_names() if name not in ("statetrack", "t2mlr")])
def test_a_recipe_records_the_knobs_as_they_were_set(name):
    """As version 0.1.0 did, from the ConfigDict itself."""
    knobs = read(name, ["--config.model.source=random:tiny"])
    expected = json.loads(knobs.to_json_best_effort())
    del expected["mesh"], expected["train"]["loggers"]
    assert resolve(knobs).to_json() == expected


def test_every_knob_is_a_field_of_its_section():
    knobs = defaults()
    for name, section in dataclasses.asdict(tiny()).items():
        fields = {**section.pop("state"), **section.pop("schedule"), **section} if name == "stream" else section
        assert set(knobs[name]) == set(fields), name


def old_run(tmp_path, edit=lambda recipe: None) -> pathlib.Path:
    """A run folder with the record of the fixture, edited."""
    record = json.loads((OLD_RUN / "config.json").read_text())
    edit(record["recipe"])
    (tmp_path / "config.json").write_text(json.dumps(record))
    return tmp_path


def test_a_run_folder_of_0_1_0_holds_the_recipe_it_was_trained_with(tmp_path):
    check_recipe(old_run(tmp_path), read_recipe("tiny", OLD_KNOBS).to_json())
    with pytest.raises(InputError, match=r"recipe.adapter.rank: 2 there, 3 now"):
        check_recipe(tmp_path, read_recipe("tiny", OLD_KNOBS | {"adapter.rank": 3}).to_json())


def test_a_knob_that_an_older_version_did_not_have_counts_as_its_default(tmp_path):
    run = old_run(tmp_path, lambda recipe: (recipe["train"].pop("max_skipped"), recipe["stream"].pop("depths")))
    check_recipe(run, read_recipe("tiny", OLD_KNOBS).to_json())
    with pytest.raises(InputError, match=r"recipe.train.max_skipped: 10 there, 5 now"):
        check_recipe(run, read_recipe("tiny", OLD_KNOBS | {"train.max_skipped": 5}).to_json())


def test_a_section_that_an_older_version_did_not_have_counts_as_its_defaults(tmp_path):
    run = old_run(tmp_path, lambda recipe: recipe.pop("optimizer"))
    knobs = {f"optimizer.{key}": value for key, value in default_record()["optimizer"].items()}
    check_recipe(run, read_recipe("tiny", OLD_KNOBS | knobs).to_json())
    with pytest.raises(InputError, match=r"recipe.optimizer.learning_rate: 0.0002 there, 0.01 now"):
        check_recipe(run, read_recipe("tiny", OLD_KNOBS).to_json())


def test_a_knob_that_is_no_more_counts_where_it_had_an_effect(tmp_path, monkeypatch):
    monkeypatch.setitem(recipes.RETIRED, "train.echo", 1)
    run = old_run(tmp_path, lambda recipe: recipe["train"].update(echo=1))
    check_recipe(run, read_recipe("tiny", OLD_KNOBS).to_json())
    old_run(tmp_path, lambda recipe: recipe["train"].update(echo=2))
    with pytest.raises(InputError, match=r"recipe.train.echo: 2 there, None now"):
        check_recipe(run, read_recipe("tiny", OLD_KNOBS).to_json())


def test_a_former_name_works_in_run_folders_flags_and_recipe_files(tmp_path, monkeypatch):
    monkeypatch.setitem(recipes.RENAMED, "train.last_step", "train.steps")
    run = old_run(tmp_path, lambda recipe: recipe["train"].update(last_step=recipe["train"].pop("steps")))
    check_recipe(run, read_recipe("tiny", OLD_KNOBS).to_json())
    with pytest.warns(FutureWarning, match=r"train.last_step is train.steps now"):
        assert read_recipe("tiny", {"train.last_step": 6}).train.steps == 6
    file = tmp_path / "old.py"
    file.write_text(
        "from sst_jax.training.recipe import defaults\n"
        "def get_config():\n"
        "    config = defaults()\n"
        "    config.model.source = 'random:tiny'\n"
        "    config.train.last_step = 7\n"
        "    config.train.eval_every = config.train.last_step\n"
        "    return config\n"
    )
    with pytest.warns(FutureWarning, match=r"train.last_step is train.steps now"):
        old = read_recipe(str(file))
    assert (old.train.steps, old.train.eval_every) == (7, 7)
    assert "last_step" not in json.dumps(old.to_json())


@pytest.mark.parametrize("spelling", ["sst", "configs/sst.py", str(ROOT / "configs" / "sst.py")])
def test_the_packages_recipes_are_found_from_any_folder(tmp_path, monkeypatch, spelling):
    monkeypatch.chdir(tmp_path)
    assert find_file(spelling).resolve() == ROOT / "configs" / "sst.py"
    assert read_recipe(f"{spelling}:size=1b").data.batch_size == 16
    assert read_recipe(spelling).data.batch_size == 1


def test_a_file_of_ones_own_comes_before_the_packages(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").mkdir()
    own = (ROOT / "configs" / "tiny.py").read_text().replace("config.train.steps = 20", "config.train.steps = 30")
    (tmp_path / "configs" / "tiny.py").write_text(own)
    assert read_recipe("configs/tiny.py").train.steps == 30
    assert read_recipe("tiny").train.steps == 20


def test_a_recipe_that_was_edited_within_a_second_is_read_as_it_stands(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    file = tmp_path / "mine.py"
    for steps in (11, 22):
        text = "from sst_jax.training.recipe import defaults\n\ndef get_config():\n    config = defaults()\n"
        file.write_text(f"{text}    config.train.steps = {steps}\n    return config\n")
        os.utime(file, (1e9, 1e9))
        assert read(str(file)).train.steps == steps
    assert not (tmp_path / "__pycache__").exists()


@pytest.mark.parametrize("name", ["tinny", "configs/tinny.py", "elsewhere/tiny.py", "tiny.json", ""])
def test_an_unknown_recipe_lists_those_that_there_are(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    there = "baseline, quickstart, recirculation, rooms, sst, sst_v1, statetrack, t2mlr, tiny"
    with pytest.raises(InputError, match=f"does not exist; the recipes .* {there}"):
        read(name)


def test_overrides_of_every_kind_are_the_same_as_flags():
    knobs = {
        "stream.depths": (1, 2),
        "stream.on": True,
        "stream.alpha": 0.05,
        "data.pack": False,
    }
    flags = ["--config.stream.depths=(1,2)", "--config.stream.on=True", "--config.stream.alpha=0.05",
             "--config.data.pack=False"]  # fmt: skip
    assert read_recipe("tiny", knobs) == read_recipe("tiny", flags)
    assert read_recipe("tiny", knobs).stream.state.alpha == 0.05


def test_the_stream_off_trains_and_evaluates_plainly_whatever_its_other_knobs_say():
    off = tiny(stream__on=False, stream__forward="exact", stream__depths=(1, 4))
    assert (off.forward.forward, off.heldout_forward.forward, off.forward.depths) == ("plain", "plain", (1,))
    assert off.stream.config is None
    assert off.to_json()["stream"]["depths"] == [1, 4]


def test_held_out_losses_run_the_passes_of_training_where_the_forward_is_the_same():
    passes = {"stream.forward": "k_pass", "stream.passes": 5}
    assert read_recipe("tiny", passes | {"train.eval_forward": "k_pass"}).heldout_forward.passes == 5
    assert read_recipe("tiny", passes | {"train.eval_forward": "local"}).heldout_forward.passes == 2


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.stepz=3", 'recipe tiny: \'stepz\' Did you mean "steps" instead of "stepz"?'),
        ("train.steps=abc", "--config.train.steps=abc: invalid literal for int() with base 10: 'abc'"),
        ("nothing.x=3", "recipe tiny: there is no knob nothing"),
    ],
)
def test_a_message_keeps_its_quotes(override, message):
    with pytest.raises(InputError, match="recipe tiny") as raised:
        read("tiny", [f"--config.{override}"])
    assert str(raised.value).endswith(message)
