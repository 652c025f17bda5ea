"""A run that meets bad numbers, signals at bad moments, a full disk, or folders that vanish."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from sst_jax.console.progress import print_line
from sst_jax.training import step as steps
from sst_jax.training.watchdog import StallWatchdog
from sst_jax.weights.checkpoint import newest_good, read_metrics
from tests.support import kills
from tests.support.runs import SMALL, TINY, assert_same_run, train_small, trainables

DIVERGES = [f"--config.{knob}" for knob in ("optimizer.learning_rate=1e30", "optimizer.warmup_steps=0")]


@pytest.mark.slow
def test_a_run_that_diverges_stops_and_keeps_the_batches(tmp_path, capsys):
    """The first update is finite and ruins the parameters; every step after it is skipped."""
    run = tmp_path / "run"
    for attempt in range(2):  # the second goes on from the newest checkpoint, and comes to the same end
        assert train_small(run, *DIVERGES, "--config.train.eval_every=99", "--config.train.max_skipped=2") == 1
        message = capsys.readouterr().err
        assert "step 3: loss, gradient or update is not finite" in message
        assert "bad_batches/3.safetensors. So were 2 in a row; the newest good checkpoint is 2" in message
        assert "Traceback" not in message
        assert newest_good(run) == 2, attempt
    assert sorted(file.name for file in (run / "bad_batches").iterdir()) == ["2.safetensors", "3.safetensors"]
    batch = load_file(run / "bad_batches" / "3.safetensors")
    assert {name: value.shape for name, value in batch.items()} == dict.fromkeys(
        ("tokens", "segment_ids", "positions", "answer_mask"), (2, 384)
    )
    lines = read_metrics(run)
    assert [(line["step"], line.get("skipped"), "loss" in line) for line in lines[1:]] == [(1, 0, True), (2, 1, False)]
    assert "NaN" not in (run / "metrics.jsonl").read_text()


@pytest.mark.slow
def test_a_held_out_loss_that_is_not_finite_ends_the_run(tmp_path, capsys):
    assert train_small(tmp_path / "run", *DIVERGES) == 1
    assert "step 2: the held-out loss is not finite; the newest good checkpoint is 1" in capsys.readouterr().err


@pytest.fixture
def poisoned(monkeypatch):
    """Training losses that are not finite for some batches, by their tokens; evaluation is left alone."""
    plain = steps.batch_losses

    def losses(config, settings, base, trainable, batch, **options):
        found = plain(config, settings, base, trainable, batch, **options)
        bad = options.get("dropout_key") is not None
        return jax.numpy.where(bad & (batch["tokens"].sum() % 3 == 0), jax.numpy.nan, found)

    monkeypatch.setattr(steps, "batch_losses", losses)


@pytest.mark.slow
def test_skipped_steps_are_counted_and_resumed_over_bit_for_bit(poisoned, tmp_path, capsys):
    settings = ("--config.train.steps=8", "--config.train.eval_every=4")
    assert train_small(tmp_path / "whole", *settings) == 0
    skipped = [line["step"] for line in read_metrics(tmp_path / "whole") if line.get("skipped")]
    assert 0 < len(skipped) < 8
    assert capsys.readouterr().out.count("and the step is skipped") == len(skipped)
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    for later in range(skipped[0] + 1, 9):  # as if killed right after the first of them
        shutil.rmtree(tmp_path / "cut" / "checkpoints" / str(later))
    assert train_small(tmp_path / "cut", *settings) == 0
    assert_same_run(tmp_path / "cut", tmp_path / "whole")


def stopping_at(beats):
    """`Stalls.beat`, with a SIGTERM at one of its calls."""
    count, beat = [0], StallWatchdog.beat

    def counted(self):
        count[0] += 1
        if count[0] == beats:
            os.kill(os.getpid(), signal.SIGTERM)
        beat(self)

    return counted


@pytest.mark.slow
@pytest.mark.parametrize("beats", [3, 5, 8, 4])
def test_a_signal_at_any_moment_is_saved_and_resumed_from(finished, tmp_path, monkeypatch, capsys, beats):
    """SIGTERM after a step; before, and while, a held-out loss is computed; and while the last one is."""
    with monkeypatch.context() as patch:
        patch.setattr(StallWatchdog, "beat", stopping_at(beats))
        assert train_small(tmp_path / "run") == 1
    assert "stopped by SIGTERM and saved at step" in capsys.readouterr().err
    assert not (tmp_path / "run" / "result.json").exists()
    assert train_small(tmp_path / "run") == 0
    assert_same_run(tmp_path / "run", finished)


@pytest.mark.slow
def test_going_on_with_a_held_out_loss_does_not_write_its_checkpoint_again(tmp_path, monkeypatch):
    """The newest good one would be gone while it is written, and it may be the only one."""
    from sst_jax.weights.checkpoint import Checkpoints

    save, steps = Checkpoints.save, []
    with monkeypatch.context() as patch:
        patch.setattr(StallWatchdog, "beat", stopping_at(4))
        assert train_small(tmp_path / "run") == 1
    newest = max(int(folder.name) for folder in (tmp_path / "run" / "checkpoints").iterdir() if folder.name.isdigit())
    monkeypatch.setattr(Checkpoints, "save", lambda self, step, *rest: steps.append(step) or save(self, step, *rest))
    assert train_small(tmp_path / "run") == 0
    assert steps == list(range(newest + 1, 5))


@pytest.mark.slow
def test_data_that_vanished_is_named_and_the_run_stays_as_it_was(tmp_path, capsys):
    data, run = tmp_path / "gsm8k", tmp_path / "run"
    data.mkdir()
    row = json.dumps({"question": "Tom has 3 pens and buys 4. How many?", "answer": "3 + 4 = 7.\n#### 7"})
    (data / "train.jsonl").write_text((row + "\n") * 12)
    settings = ["--config.data.name=gsm8k", f"--config.data.path={data}", "--config.stream.on=False"]
    assert train_small(run, *settings) == 0
    before = {file: file.read_bytes() for file in run.rglob("*") if file.is_file()}
    shutil.rmtree(data)
    assert train_small(run, *settings) == 2
    assert str(data) in capsys.readouterr().err
    assert {file: file.read_bytes() for file in run.rglob("*") if file.is_file()} == before


@pytest.mark.slow
def test_a_run_folder_that_vanishes_is_not_made_anew(copied, monkeypatch, capsys):
    for later in (3, 4):
        shutil.rmtree(copied / "checkpoints" / str(later))
    monkeypatch.setattr("sst_jax.training.loop.print_line", lambda text: (print_line(text), shutil.rmtree(copied)))
    assert train_small(copied) == 1
    assert f"the run folder {copied} is gone" in capsys.readouterr().err
    assert not (copied / "checkpoints").exists()


@pytest.mark.slow
def test_a_disk_that_takes_no_more_is_named_and_the_last_checkpoint_stays(copied, finished):
    """The kernel refuses to let files grow beyond 60 kB, as a full disk would refuse all."""
    for later in (3, 4):
        shutil.rmtree(copied / "checkpoints" / str(later))
    command = [sys.executable, "-m", "sst_jax.train", "--config", TINY, *SMALL, "--workdir", str(copied)]
    limited = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, resource.RLIM_INFINITY))  # noqa: E731
    caching = ("JAX_COMPILATION", "JAX_PERSISTENT")  # nor would the cache's files be written
    environment = {name: value for name, value in os.environ.items() if not name.startswith(caching)}
    ended = subprocess.run(
        command,
        preexec_fn=limited,
        capture_output=True,
        text=True,
        timeout=300,
        env=environment,
    )
    assert ended.returncode == 1
    assert "checkpoints/3 cannot be written" in ended.stderr
    assert "File too large" in ended.stderr
    assert "The newest good one is 2; make room" in ended.stderr
    assert newest_good(copied) == 2
    assert not list((copied / "checkpoints").glob("*tmp*"))
    assert train_small(copied) == 0
    assert_same_run(copied, finished)


@pytest.mark.slow
def test_eight_kills(tmp_path):
    """`python -m tests.support.kills` does a hundred."""
    result = kills.kill(tmp_path, kills=8, steps=30, seed=1)
    assert result["kills"] == 8
    assert np.isfinite(jax.tree.leaves(trainables(tmp_path / "killed"))[0]).all()
