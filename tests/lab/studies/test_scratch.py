"""Tiny models from scratch: arms side by side, folders that go on, and what the tables count."""

import json
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sst_jax import train
from sst_jax.console.command import run
from sst_jax.data import statetrack
from sst_jax.errors import InputError
from sst_jax.inference.model import load
from sst_jax.lab.studies import scratch
from sst_jax.lab.studies import scratch_study as studies
from sst_jax.model import rules
from sst_jax.training import recipe
from sst_jax.weights.loading import open_model

pytestmark = pytest.mark.slow  # all are about runs of three arms

CONFIG = str(pathlib.Path(__file__).parents[3] / "configs" / "statetrack.py")
SMALL = [
    "--config.train.steps=3", "--config.train.further_steps=2", "--config.test.times=(1,2)",
    "--config.train.warmup_steps=1", "--config.train.batch_size=4", "--config.train.seeds=2",
    "--config.test.rows=12", "--config.task.length=8", "--config.model.d_model=16", "--config.model.d_ff=16",
    "--config.model.heads=2", "--config.model.layers=1",
]  # fmt: skip


def small(*overrides):
    return studies.resolve(recipe.read(CONFIG, [*SMALL, *overrides]))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("scratch") / "run"
    arms = ["--config.arms=stream,plain,deepened", "--config.test.depths=(1,2)"]
    assert run(train.main, ["--config", CONFIG, *SMALL, *arms, "--workdir", str(workdir)]) == 0
    return workdir


def test_a_run_holds_tables_for_every_arm(finished):
    result = json.loads((finished / "result.json").read_text())
    assert set(result["arms"]) == {"stream", "plain", "deepened"}
    assert set(result["arms"]["stream"]) == {"1/1", "1/2", "2/1"}
    assert set(result["arms"]["plain"]) == {"1/1", "2/1"}
    assert [(part["arm"], part["depth"]) for part in result["deeper"]] == [("stream", 2), ("deepened", 2)]
    assert [(part["length"], part["depth"]) for part in result["trained_deeper"]] == [(8, 1), (8, 2), (16, 1)]
    assert set(result["stream_against"]) == {"plain", "deepened"}
    assert result["facts"]["deepened"]["depths"] == [1, 2, 3, 4]
    plain, stream = (result["facts"][name]["parameters"] for name in ("plain", "stream"))
    assert stream - plain == 16  # one alpha a dimension, and nothing else
    assert (finished / "figure.png").stat().st_size > 5000


def test_tables_count_what_the_models_write(finished):
    """One cell again, one word at a time and without the machinery of arms."""
    arm = small().arms["stream"]
    params = scratch.load_params(finished / "stream", arm.config)
    words = statetrack.draw(statetrack.find("s3"), "test", 12, 16, (studies.TESTS, 2))
    shares = []
    for seed in range(2):
        mine = jax.tree.map(lambda leaf, seed=seed: leaf[seed], params)
        guesses = [rules.logits(arm.config, mine, word[None], forward="exact")[0].argmax(-1) for word in words.symbols]
        shares.append(float(np.mean(np.array(guesses) == words.states)))
    result = json.loads((finished / "result.json").read_text())
    assert result["arms"]["stream"]["2/1"]["seeds"] == pytest.approx(shares)


def test_finished_arms_are_not_trained_again_and_more_may_be_added(finished, monkeypatch):
    trained = []
    real = studies.train_arm
    monkeypatch.setattr(
        studies, "train_arm", lambda study, name, *rest: trained.append(name) or real(study, name, *rest)
    )
    before = json.loads((finished / "result.json").read_text())
    more = ["--config.arms=stream,plain,range", "--config.test.depths=(1,2)", "--workdir", str(finished)]
    assert run(train.main, ["--config", CONFIG, *SMALL, *more]) == 0
    assert trained == ["range"]
    after = json.loads((finished / "result.json").read_text())
    assert after["arms"]["stream"] == before["arms"]["stream"]


def test_a_folder_of_another_config_is_refused(finished, capsys):
    arguments = ["--config", CONFIG, *SMALL, "--config.task.name=parity", "--workdir", str(finished)]
    assert run(train.main, arguments) == 2
    assert "task.name: 's3' there, 'parity' now" in capsys.readouterr().err


def test_an_interrupted_run_keeps_its_finished_arms(tmp_path, monkeypatch):
    """Killed while the second arm is measured: neither training is repeated."""
    real = studies.measure

    def broken(arm, *rest):
        if arm.config.stream is not None:
            raise KeyboardInterrupt
        return real(arm, *rest)

    monkeypatch.setattr(studies, "measure", broken)
    own = ["--config.arms=plain,stream", "--config.test.times=(1,)", "--workdir", str(tmp_path / "run")]
    arguments = ["--config", CONFIG, *SMALL, *own]
    assert run(train.main, arguments) == 1
    monkeypatch.setattr(studies, "measure", real)
    monkeypatch.setattr(scratch, "fit", None)
    assert run(train.main, arguments) == 0


def test_a_seed_trains_as_it_would_alone():
    found = small()
    task, arm = found.task, found.arms["stream"]
    both, losses = scratch.fit(arm, task, 8, found.schedule)
    alone, first = scratch.fit(arm, task, 8, scratch.Schedule(3, 4, warmup_steps=1, seeds=1))
    np.testing.assert_allclose(first[:, 0], losses[:, 0], rtol=1e-5)
    assert not np.allclose(losses[:, 0], losses[:, 1])
    for one, two in zip(jax.tree.leaves(alone), jax.tree.leaves(both), strict=True):
        np.testing.assert_allclose(one[0], two[0], rtol=1e-4, atol=1e-6)


def test_weights_come_back_as_they_were(tmp_path):
    arm = small().arms["stream"]
    params = jax.vmap(lambda seed: scratch.decoder.init_params(arm.config, jax.random.key(seed)))(jnp.arange(2))
    scratch.save_params(tmp_path, params)
    back = scratch.load_params(tmp_path, arm.config)
    assert jax.tree.structure(back) == jax.tree.structure(params)
    assert all((one == two).all() for one, two in zip(jax.tree.leaves(back), jax.tree.leaves(params), strict=True))


def test_rereading_counts_words_whose_symbols_stand_twice(finished):
    found = small("--config.arms=stream", "--config.test.depths=(1,2)")
    arm = found.arms["stream"]
    params = scratch.load_params(finished / "stream", arm.config)
    table = np.array([[0, 1, 2, 3, 4, 5]] * 6)  # the state is the last symbol, however often it stands
    same = studies.measure(arm, params, statetrack.Automaton("last", table), 8, 12, (1,), (1, 2))
    np.testing.assert_array_equal(same["reread 1/2"], same["share 1/2"])
    task = statetrack.find("s3")
    with np.load(finished / "stream" / "outcomes.npz") as outcomes:
        words = statetrack.draw(task, "test", 12, 8, (studies.TESTS, 1))
        for seed in range(2):
            mine = jax.tree.map(lambda leaf, seed=seed: leaf[seed], params)
            guesses = rules.logits(arm.config, mine, words.symbols, forward="exact", depth=2).argmax(-1)
            states, right = np.zeros(12, int), np.zeros(12, int)
            for position, symbols in enumerate(words.symbols.T):
                states = task.table[task.table[states, symbols], symbols]
                right += np.array(guesses[:, position] == states)
            np.testing.assert_allclose(outcomes["reread 1/2"][seed], right / 8)


def test_change_counts_broken_and_mended_words():
    before = np.array([[True, True, False, False, True], [True, True, True, False, False]])
    after = np.array([[True, False, True, True, True], [False, False, False, False, False]])
    found = studies.change(before, after)
    assert [(seed["broken"], seed["mended"]) for seed in found["seeds"]] == [(1, 2), (3, 0)]
    assert found["seeds"][1]["p"] == pytest.approx(0.25)  # three of three against a fair coin, two-sided
    assert found["difference"] == pytest.approx((1 - 3) / 10)
    assert found["over_words"]["low"] <= found["difference"] <= found["over_words"]["high"]


def test_arms_differ_from_the_stream_in_what_they_say():
    arms = small("--config.arms=stream,plain,range,published,deepened,mixed,longer").arms
    stream = arms["stream"]
    assert arms["plain"].config.stream is None
    assert arms["plain"].config.backbone == stream.config.backbone
    assert arms["range"].config.stream.alpha_range == (0.015, 0.1)
    assert arms["range"].settings == stream.settings
    assert arms["published"].settings.forward == "two_pass"
    assert arms["deepened"].config == stream.config
    assert arms["deepened"].settings.depths == (1, 2, 3, 4)
    assert arms["longer"] == stream


@pytest.mark.parametrize(
    ("override", "culprit"),
    [
        ("--config.task.name=s4", "task.name='s4'"),
        ("--config.arms=stream,nothing", "'nothing' is unknown; arms are stream, plain"),
        ("--config.arms=stream,stream", "'stream' is named twice"),
        ("--config.arms=deepened,stream", "deepened continues stream"),
        ("--config.train.seeds=0", "train.seeds=0"),
        ("--config.train.warmup_steps=3", "train.warmup_steps=3"),
        ("--config.train.learning_rate=0.0", "train.learning_rate"),
        ("--config.test.depths=(2,)", "test.depths"),
        ("--config.test.times=(0,1)", "test.times"),
        ("--config.test.rows=1", "test.rows"),
        ("--config.test.times=(1,1.5)", "test.times"),
        ("--config.test.depths=(1,2.5)", "test.depths"),
        ("--config.task.length=4", "task.length=4"),
        ("--config.model.heads=3", "model.d_model=16"),
        ("--config.model.heads=0", "model.heads=0"),
        ("--config.stream.alpha_warmup=5", "stream.alpha_warmup=5"),
        ("--config.stream.initial=skip_bos", "skip_bos"),
        ("--config.stream.alpha_init=2.0", "alpha_init"),
        ("--config.stream.forward=three_pass", "forward='three_pass'"),
    ],
)
def test_bad_knobs_are_named(override, culprit):
    with pytest.raises(InputError, match=re.escape(culprit)):
        small(override)


def test_other_commands_say_that_train_alone_takes_such_a_recipe():
    with pytest.raises(InputError, match=r"kind='statetrack'.*sst_jax\.train"):
        recipe.resolve(recipe.read(CONFIG, []))


def test_trained_models_open_by_seed_and_the_folder_names_one(finished):
    with pytest.raises(InputError, match=r"from scratch.*give one of them, such as .*/deepened/models/0"):
        open_model(finished)
    study = small("--config.arms=stream,plain")
    words = statetrack.draw(study.task, "test", 4, 8, (studies.TESTS, 1)).symbols
    for name, arm in study.arms.items():
        weights = scratch.load_params(finished / name, arm.config)
        for seed in range(study.schedule.seeds):
            model = load(finished / name / "models" / str(seed))
            assert model.config.stream == arm.config.stream
            own = jax.tree.map(lambda leaf, seed=seed: leaf[seed], weights)
            wanted = rules.logits(arm.config, own, words, forward=arm.judge)
            np.testing.assert_allclose(model.logits(words), wanted, rtol=1e-5, atol=1e-5)


def test_an_arm_that_diverged_is_done_nevertheless(tmp_path, monkeypatch):
    study = small("--config.train.seeds=2")
    params = {"w": jnp.zeros((2, 3))}
    losses = np.array([[1.0, np.nan]] * 3)
    monkeypatch.setattr(scratch, "fit", lambda *_, **__: (params, losses))
    studies.train_arm(study, "plain", None, tmp_path / "plain")
    assert json.loads((tmp_path / "plain" / "training.json").read_text())["final_loss"] == [1.0, None]


@pytest.mark.slow
@pytest.mark.optimised
def test_parity_needs_the_state(tmp_path):
    """One seed: the stream counts on at four times the length it was trained at, the plain model does not."""
    knobs = {"task.name": "parity", "train.seeds": 1, "train.steps": 400, "test.rows": 128, "arms": "stream,plain"}
    arguments = [f"--config.{key}={value}" for key, value in knobs.items()]
    assert run(train.main, ["--config", CONFIG, *arguments, "--workdir", str(tmp_path / "run")]) == 0
    arms = json.loads((tmp_path / "run" / "result.json").read_text())["arms"]
    assert arms["stream"]["4/1"]["value"] > 0.95
    assert arms["plain"]["4/1"]["value"] < 0.75
