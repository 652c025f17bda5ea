"""What a run measures on its way, which checkpoint it keeps, and when it ends early."""

import dataclasses
import json
import shutil
from types import SimpleNamespace
from unittest.mock import create_autospec

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from sst_jax import train
from sst_jax.console.command import run
from sst_jax.data import grading
from sst_jax.data.documents import Item, Pair, Problem
from sst_jax.data.tokenizer import ByteTokenizer
from sst_jax.errors import InputError
from sst_jax.families.registry import PRESETS
from sst_jax.inference.model import Model, load
from sst_jax.model import sharding
from sst_jax.model.config import ModelConfig
from sst_jax.training import evaluating, fit, read_recipe, scoring
from sst_jax.training.inputs import check_inputs
from sst_jax.training.progress import Progress
from sst_jax.training.scoring import BATCH, Score, TrainTask, read_task
from sst_jax.training.sections import TrainConfig
from sst_jax.training.telemetry import CompileClock, peak_memory
from sst_jax.weights.checkpoint import newest_good, read_metrics

KNOBS = {
    "model.source": "random:tiny-llama", "train.steps": 6, "train.eval_every": 1, "train.save_every": 6,
    "train.keep": 1, "train.sample_tokens": 2, "data.limit": 24, "data.heldout": 2, "data.batch_size": 2,
    "train.eval_task": "heldout", "train.eval_items": 2, "train.sample_every": 2, "train.keep_best": "loss",
    "train.patience": 2, "optimizer.learning_rate": 0.5, "optimizer.warmup_steps": 1, "data.name": "rooms:1",
    "data.length": 192,
}  # fmt: skip


def evaluated(losses, scores=None):
    scores = scores or {}
    return Progress(max(losses), losses, scores={step: (right, 10) for step, right in scores.items()})


def test_the_best_evaluation_is_the_first_of_the_best_and_never_the_one_before_training():
    losses = {0: 0.5, 2: 3.0, 4: 1.0, 6: 1.0, 8: 2.0}
    assert evaluating.best_step(evaluated(losses), TrainConfig()) == 4
    by_task = TrainConfig(keep_best="task", eval_task="heldout")
    assert evaluating.best_step(evaluated(losses, {0: 9, 2: 3, 4: 1, 6: 3, 8: 2}), by_task) == 2
    assert evaluating.best_step(evaluated({0: 1.0}), TrainConfig()) is None


@pytest.mark.parametrize(
    ("losses", "patience", "over"),
    [
        ({0: 3.0, 2: 2.0, 4: 2.5}, 2, False),
        ({0: 3.0, 2: 2.0, 4: 2.5, 6: 2.0}, 2, True),  # as good is no better
        ({0: 3.0, 2: 2.0, 4: 2.5, 6: 1.9}, 2, False),
        ({0: 3.0, 2: 2.0, 4: 2.5, 6: 2.6}, 0, False),
        ({0: 3.0}, 1, False),
    ],
)
def test_a_run_ends_after_so_many_evaluations_without_a_better_one(losses, patience, over):
    assert evaluating.stops_early(evaluated(losses), TrainConfig(patience=patience)) is over


def test_answers_are_counted_as_they_are_graded_in_batches_of_one_shape():
    """Forty questions, of which every third is answered right by construction."""
    items = [Item(Problem(str(number), f"{number}?", "", "yes")) for number in range(40)]
    task = TrainTask("t", items, grading.WORD, 3, "1", [[number] for number in range(40)])
    shapes = []

    def generate(prompts, depth, max_new_tokens, stop):
        shapes.append((len(prompts), max_new_tokens, stop))
        return [SimpleNamespace(text=" Yes." if number % 3 == 0 else "no") for (number,) in prompts]

    model, seen = create_autospec(Model, instance=True), []
    model.generate.side_effect = generate
    found = scoring.score(model, task, "plain", lambda size: seen.append(size) or True)
    assert found == (14, 40)  # 0, 3, ..., 39
    assert shapes == [(BATCH, 3, ["Question:"])] * 2
    assert seen == [32, 8]
    assert scoring.score(model, task, "plain", lambda size: False) is None
    low, high = stats.binomtest(14, 40).proportion_ci(0.95, method="wilson")
    assert found.interval == (low, high)
    assert str(found) == f"35.0% [{low:.0%}, {high:.0%}] of 40"


def test_held_out_rows_of_ones_own_are_graded_word_for_word_and_named_ones_as_their_data_set():
    train = dataclasses.replace(TrainConfig(), eval_task="heldout", eval_items=1)
    task = read_task(train, "prompt_completion", [Pair("a", "2+2=", " 4 "), Pair("b", "", "")])
    assert [item.problem.result for item in task.items] == ["4"]
    assert task.grading.is_right(task.grading.extract("4\n", True), task.items[0], "4\n")
    assert read_task(train, "words", [Problem("a", "q", "", "18.0")]).items[0].problem.result == "18"
    assert read_task(TrainConfig(), "words", []) is None


def test_a_question_and_its_answer_fit_the_positions_that_are_computed():
    """Of LongRoPE's fewer than the config has."""
    config = ModelConfig(PRESETS["tiny-phi3"])
    assert config.backbone.position_limit == 1024 < config.backbone.max_positions
    task = TrainTask("t", [Item(Problem("a", "q", "", "1"))], grading.WORD, 1020, "1")
    with pytest.raises(InputError, match=r"t: a has \d+ tokens, which with 1020 .* exceed the model's 1024 positions"):
        task.asked(ByteTokenizer(), "plain", config)
    assert dataclasses.replace(task, max_new_tokens=8).asked(ByteTokenizer(), "plain", config).prompts


@pytest.mark.parametrize(
    ("knobs", "data", "message"),
    [
        (
            {"eval_task": "heldout"},
            ("text", [Problem("a", "", "", "running text")]),
            "nothing is asked in rows of text",
        ),
        ({"eval_task": "heldout"}, ("alpaca", [Problem("a", "q", "", "b")]), "which answers to alpaca are right"),
        ({"eval_task": "no_such"}, ("words", []), "train.eval_task=no_such: --task no_such is unknown"),
        ({"eval_task": "f.jsonl:python:g.py"}, ("words", []), "which `evaluate --allow-code` alone runs"),
    ],
)
def test_a_task_that_cannot_be_scored_is_refused_by_its_knob(knobs, data, message):
    with pytest.raises(InputError, match=r"train\.eval_task") as raised:
        read_task(TrainConfig(**knobs), *data)
    assert message in str(raised.value)


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"keep_best": "score"}, "train.keep_best='score' is not one of '', 'loss', 'task'"),
        ({"keep_best": "task"}, "train.keep_best='task' needs train.eval_task"),
        ({"patience": -1}, "train.patience=-1 must not be negative"),
        ({"loggers": "tensorboard,mlflow"}, "'mlflow' is not one of tensorboard, wandb"),
        ({"eval_depth": "deep"}, "train.eval_depth='deep'"),
    ],
)
def test_bad_knobs_are_named(knobs, message):
    with pytest.raises(InputError, match="train") as raised:
        TrainConfig(**knobs)
    assert message in str(raised.value)


LOSSES = (3.0, 2.0, 1.0, 1.5, 1.25, 0.5, 0.25)  # by step: the lowest within reach at step 2


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    """A run whose held-out losses are these, so that it is known when it ends."""
    workdir = tmp_path_factory.mktemp("runs") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluating, "heldout_loss", lambda run, programs: (LOSSES[run.progress.step], {}))
        return workdir, fit(read_recipe("tiny", KNOBS), workdir)


@pytest.mark.slow
def test_a_run_that_gets_no_better_ends_early_and_opens_as_its_best(ended):
    workdir, result = ended
    assert result.stopped_early
    assert (result.steps, result.kept) == (4, 2)
    assert newest_good(workdir) == 4  # where it would resume
    assert load(workdir).provenance.step == 2
    assert json.loads((workdir / "best.json").read_text())["heldout_loss"] == 1.0
    assert sorted(entry.name for entry in (workdir / "checkpoints").iterdir()) == ["2", "4"]  # of keep=1 and the best


@pytest.mark.slow
def test_a_run_records_scores_rates_costs_and_answers_on_its_way(ended):
    workdir, result = ended
    lines = {line["step"]: line for line in read_metrics(workdir)}
    assert sorted(lines) == list(range(result.steps + 1))
    assert set(result.scores) == set(result.heldout_loss) == set(lines)
    assert all(isinstance(score, Score) and score.asked == 2 for score in result.scores.values())
    assert [lines[step]["task_accuracy"] for step in lines] == [s.right / 2 for s in result.scores.values()]
    # Warmed up over one update, then a cosine to a tenth: of six updates these are the first.
    assert [lines[1]["learning_rate"], lines[2]["learning_rate"]] == pytest.approx([0.0, 0.5])
    assert all(lines[step]["step_seconds"] > 0 for step in lines if step)
    assert lines[1]["compile_seconds"] > lines[2]["compile_seconds"] >= 0
    answers = [json.loads(line) for line in (workdir / "samples.jsonl").read_text().splitlines()]
    asked = {answer["question"] for answer in answers}
    assert asked == {result.samples[0].question}
    assert {(0, 1), (0, 4), (2, 1), (result.kept, 4)} <= {(answer["step"], answer["depth"]) for answer in answers}
    assert [sample.step for sample in result.before] == [0, 0]


@pytest.mark.slow
def test_a_run_killed_before_its_best_was_recorded_comes_to_the_same(ended, tmp_path):
    """As if killed after the last save: everything that follows from it is made again, and nothing is trained."""
    workdir, result = ended
    run = shutil.copytree(workdir, tmp_path / "run")
    (run / "best.json").unlink()
    (run / "result.json").unlink()
    again = fit(read_recipe("tiny", KNOBS), run)
    assert (again.heldout_loss, again.scores, again.kept) == (result.heldout_loss, result.scores, result.kept)
    assert again.samples == result.samples
    assert json.loads((run / "best.json").read_text()) == json.loads((workdir / "best.json").read_text())


def test_compiling_is_counted_while_it_is_watched():
    with CompileClock() as clock:
        jax.jit(lambda x: jnp.sin(x) * 3)(jnp.ones(7)).block_until_ready()
        first = clock.take()
        assert first > 0
        assert clock.take() == 0
    jax.jit(lambda x: jnp.cos(x) * 5)(jnp.ones(9)).block_until_ready()
    assert clock.total == first
    assert 0 < peak_memory()["peak_host_memory_gib"] < 1000


def test_a_dry_run_says_what_would_be_trained_and_writes_nothing(tmp_path, capsys):
    out = tmp_path / "plan.json"
    flags = [f"--config.{key}={value}" for key, value in KNOBS.items()]
    workdir = tmp_path / "run"
    argv = ["--config", "tiny", *flags, "--workdir", str(workdir), "--dry-run", "--json", str(out)]
    assert run(train.main, argv) == 0
    assert not workdir.exists()
    found, said = json.loads(out.read_text()), capsys.readouterr().out
    recipe = read_recipe("tiny", KNOBS)
    with jax.set_mesh(sharding.make_mesh(recipe.mesh)):
        inputs = check_inputs(recipe, workdir)
    first = next(inputs.rows())
    assert found["batch"]["shapes"] == {name: [2, 192] for name in first}
    assert found["batch"]["learned_tokens"] == int(first["answer_mask"].sum())
    assert found["batch"]["documents"] == int(first["segment_ids"].max(1).sum())
    assert found["heldout"] == {"examples": 2, "batches": 1, "task": "heldout, 2 questions"}
    # What is there when a step begins: base, trained parameters twice over for Adam, the batch.
    parameters = sum(leaf.nbytes for leaf in jax.tree.leaves(inputs.opened.params["base"]))
    trained = 4 * (found["model"]["adapter"] + found["model"]["blend"])
    batch = sum(np.asarray(value).nbytes for value in first.values())
    assert found["memory"]["arguments"] == pytest.approx(parameters + 3 * trained + batch, rel=0.01)
    assert found["memory"]["temporaries"] > 0
    assert f"{found['model']['adapter']:,} of LoRA" in said
    assert "nothing has been written" in said
    assert run(train.main, ["--config", "statetrack", "--dry-run", "--workdir", str(workdir)]) == 2
