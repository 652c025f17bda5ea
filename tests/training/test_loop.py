"""`fit` as a call, and what a checkpoint says of a run's progress."""

import json
import shutil
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from sst_jax.errors import InputError
from sst_jax.files import sha256
from sst_jax.inference.model import load
from sst_jax.training import fit, open_run, read_recipe
from sst_jax.training.optimizer import as_multi_steps, make_optimizer
from sst_jax.training.progress import Progress
from sst_jax.training.recipe import read
from sst_jax.weights.checkpoint import Checkpoints, read_metrics

OLD_RUN = Path(__file__).parents[1] / "fixtures" / "v0_1_0" / "run"
KNOBS = {
    "model.source": "random:tiny-llama", "train.steps": 2, "train.eval_every": 1, "train.save_every": 1,
    "train.sample_tokens": 2, "data.limit": 24, "data.heldout": 2, "data.batch_size": 2,
}  # fmt: skip


def test_progress_comes_back_as_it_was_written():
    progress = Progress(7, {0: 5.5, 4: 3.25}, 12.5, skipped=3, consecutive_skips=1, pending={"loss": 2.0})
    assert Progress.from_json(7, json.loads(json.dumps(progress.to_json()))) == progress
    assert Progress.from_json(0, Progress().to_json()) == Progress()


def test_progress_is_read_from_checkpoints_of_0_1_0():
    saved = json.loads((OLD_RUN / "checkpoints" / "4" / "meta" / "metadata").read_text())
    progress = Progress.from_json(4, saved)
    assert (progress.step, set(progress.heldout), progress.consecutive_skips) == (4, {0, 2, 4}, 0)
    assert progress.pending is None
    saved |= {"in_a_row": 3, "unfinished": {"loss": 1.0}}
    assert Progress.from_json(4, saved).consecutive_skips == 3
    assert Progress.from_json(4, saved).pending == {"loss": 1.0}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of two steps, by call, and what the call returned."""
    workdir = tmp_path_factory.mktemp("runs") / "whole"
    return workdir, fit(read_recipe("tiny", KNOBS), workdir)


def trainables(run):
    params = load(run).params
    return jax.tree.leaves([params["adapter"], params["blend"]])


def test_a_call_returns_what_the_run_folder_holds(trained):
    workdir, result = trained
    assert json.loads((workdir / "result.json").read_text()) == result.to_json()
    assert sorted(result.heldout_loss) == [0, 1, 2]
    assert result.heldout_after == result.heldout_loss[2] < result.heldout_before
    assert Path(result.checkpoint) == workdir / "checkpoints" / "2"
    assert [sample.depth for sample in result.samples] == [1, 4]


def test_scales_are_logged_with_every_held_out_loss(trained):
    """RMS of residual stream and states by layer, and a figure of them."""
    workdir, _ = trained
    lines = [line for line in read_metrics(workdir) if "heldout_loss" in line]
    assert len(lines) > 1
    for line in lines:
        for name in ("residual", "state"):
            found = {key: value for key, value in line.items() if key.startswith(f"rms/{name}/")}
            assert [key.split("/")[2:] for key in found] == [[str(layer), "1"] for layer in range(len(found))]
            assert len(found) > 1
            assert all(value > 0 for value in found.values())
    assert (workdir / "figures" / "scales.png").is_file()


def test_a_call_resumes_and_takes_knobs_as_well(trained, tmp_path):
    """As if killed after its first step: its second comes to the numbers of the run that was never interrupted."""
    workdir, result = trained
    run = shutil.copytree(workdir, tmp_path / "run")
    shutil.rmtree(run / "checkpoints" / "2")
    (run / "result.json").unlink()
    again = fit(read("tiny", [f"--config.{key}={value}" for key, value in KNOBS.items()]), str(run))
    assert again.heldout_loss == result.heldout_loss
    for one, other in zip(trainables(run), trainables(workdir), strict=True):
        np.testing.assert_array_equal(one, other)


def test_each_program_of_a_run_is_compiled_once(tmp_path, monkeypatch):
    """A fresh state has the types that a step gives it back in: weakly typed leaves would have it compiled again."""
    compiled = Counter()

    def counted(name, function):
        def call(*arguments, **options):  # called by JAX where it compiles
            compiled[name] += 1
            return function(*arguments, **options)

        return call

    for name in ("train_step", "heldout_losses"):
        monkeypatch.setattr(open_run, name, counted(name, getattr(open_run, name)))
    fit(read_recipe("tiny", KNOBS | {"stream.learn_gain": True}), tmp_path / "run")
    assert compiled == {"train_step": 1, "heldout_losses": 1}


PIECES = KNOBS | {"optimizer.accumulate": 2, "train.steps": 4, "train.eval_every": 4, "train.keep": 9}


@pytest.fixture(scope="module")
def in_pieces(tmp_path_factory):
    """A run of two updates of two micro-batches each."""
    workdir = tmp_path_factory.mktemp("runs") / "pieces"
    return workdir, fit(read_recipe("tiny", PIECES), workdir)


def stopped_at(step, workdir, run):
    """A copy of a run as if killed after `step` was saved."""
    shutil.copytree(workdir, run)
    for later in range(step + 1, 5):
        shutil.rmtree(run / "checkpoints" / str(later))
        (run / "manifests" / f"{later}.json").unlink()
    return run


@pytest.mark.slow
def test_a_run_resumes_in_the_middle_of_an_update_bit_for_bit(in_pieces, tmp_path):
    workdir, result = in_pieces
    run = stopped_at(1, workdir, tmp_path / "run")
    assert fit(read_recipe("tiny", PIECES), run).heldout_loss == result.heldout_loss
    for one, other in zip(trainables(run), trainables(workdir), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.slow
@pytest.mark.parametrize("step", [1, 2])
def test_a_run_that_accumulated_in_0_1_0_resumes(in_pieces, tmp_path, capsys, step):
    """Between updates to the same numbers; inside one without the micro-batches whose answer tokens it had not kept."""
    workdir, result = in_pieces
    run = stopped_at(step, workdir, tmp_path / "run")
    saved = resave_as_0_1_0(run, step)
    assert saved.mini_step == step % 2
    again = fit(read_recipe("tiny", PIECES), run)
    assert ("1 micro-batches into an update" in capsys.readouterr().out) == (step == 1)
    assert (again.heldout_loss == result.heldout_loss) == (step == 2)
    assert again.heldout_after < again.heldout_before


def resave_as_0_1_0(run, step):
    """Write the optimizer of a checkpoint as optax.MultiSteps kept it, and return that."""
    recipe, checkpoints = read_recipe("tiny", PIECES), Checkpoints(run, 9)
    trainable = {name: load(run).params[name] for name in ("adapter", "blend")}
    state = make_optimizer(recipe.optimizer, recipe.train.steps).init(trainable)
    _, state, _ = checkpoints.restore(
        step, trainable, state, SimpleNamespace(get_state=dict, set_state=lambda place: None)
    )
    folder = run / "checkpoints" / str(step)
    shutil.rmtree(folder / "optimizer")
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save((folder / "optimizer").absolute(), as_multi_steps(state))
    files = {file.relative_to(folder).as_posix(): sha256(file) for file in folder.rglob("*") if file.is_file()}
    (run / "manifests" / f"{step}.json").write_text(json.dumps({"sha256": files}))
    return as_multi_steps(state)


def test_bad_input_is_an_error_and_leaves_nothing(tmp_path):
    with pytest.raises(InputError, match="does not exist; the recipes"):
        fit("nothing", tmp_path / "run")
    with pytest.raises(InputError, match="trains from scratch"):
        fit("statetrack", tmp_path / "run")
    assert not (tmp_path / "run").exists()
