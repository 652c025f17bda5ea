"""The train command: what a run leaves behind, that it resumes to the same numbers, and what it refuses."""

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import jax
import pytest

from sst_jax.inference.model import load
from sst_jax.weights.checkpoint import newest_good, read_metrics
from tests.support.runs import SMALL, TINY, assert_same_run, train_small, trainables


def test_a_run_leaves_what_the_readme_promises(finished):
    for name in ("config.json", "base.json", "environment.json", "metrics.jsonl", "samples.jsonl", "result.json"):
        assert (finished / name).is_file(), name
    assert (finished / "figures" / "learning_curve.png").stat().st_size > 1000
    assert list((finished / "tensorboard").iterdir())
    result = json.loads((finished / "result.json").read_text())
    assert result["heldout_after"] < result["heldout_before"]
    assert [line["step"] for line in read_metrics(finished)] == [0, 1, 2, 3, 4]
    assert [sample["depth"] for sample in result["samples"]] == [1, 4]


def test_no_checkpoint_holds_the_base(finished):
    names = {entry.name for entry in (finished / "checkpoints" / "4").iterdir() if entry.is_dir()}
    assert names == {"trainable", "optimizer", "meta", "data"}
    stored = sum(file.stat().st_size for file in (finished / "checkpoints" / "4" / "trainable").rglob("*"))
    trained = sum(leaf.nbytes for leaf in jax.tree.leaves(trainables(finished)))
    assert stored < 2 * trained + 100_000


@pytest.mark.slow
@pytest.mark.parametrize("step", [0, 1, 3])
def test_resumes_to_the_same_numbers_bit_for_bit(copied, finished, step):
    """As if killed right after `step` was saved; the log already holds lines of later steps."""
    for later in range(step + 1, 5):
        shutil.rmtree(copied / "checkpoints" / str(later))
        (copied / "manifests" / f"{later}.json").unlink()
    (copied / "result.json").unlink()
    assert train_small(copied) == 0
    assert_same_run(copied, finished)


def test_a_finished_run_trains_no_further(copied, finished):
    assert train_small(copied) == 0
    assert_same_run(copied, finished)


@pytest.mark.slow
def test_a_damaged_checkpoint_is_noticed_and_the_one_before_it_used(copied, finished, caplog):
    victim = max((copied / "checkpoints" / "4" / "trainable").rglob("*"), key=lambda file: file.stat().st_size)
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.write_bytes(content)
    assert newest_good(copied) == 3
    assert "has changed since it was written" in caplog.text
    assert train_small(copied) == 0
    assert_same_run(copied, finished)


@pytest.mark.slow
def test_a_save_cut_off_half_way_does_not_count(copied, finished):
    (copied / "manifests" / "4.json").unlink()
    assert newest_good(copied) == 3
    assert train_small(copied) == 0
    assert_same_run(copied, finished)


@pytest.mark.slow
@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_killed_for_real_and_restarted(finished, tmp_path, sent):
    command = [sys.executable, "-m", "sst_jax.train", "--config", TINY, *SMALL, "--workdir", str(tmp_path / "run")]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 300
    while not (tmp_path / "run" / "manifests" / "1.json").exists() and time.monotonic() < deadline:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.02)
    process.send_signal(sent)
    _, errors = process.communicate(timeout=300)
    if sent != signal.SIGKILL and process.returncode:
        assert process.returncode == 1
        assert "the same command resumes" in errors
    assert subprocess.run(command, capture_output=True).returncode == 0
    assert_same_run(tmp_path / "run", finished)


@pytest.mark.parametrize(
    ("override", "culprit"),
    [
        ("--config.train.stepz=3", "stepz"),
        ("--config.train.steps=many", "steps"),
        ("--config.train.steps=0", "train.steps"),
        ("--config.model.source=/does/not/exist", "/does/not/exist"),
        ("--config.model.source=", "model.source"),
        ("--config.model.dtype=float16", "model.dtype"),
        ("--config.stream.state=mlp", "stream.state"),
        ("--config.stream.forward=three_pass", "three_pass"),
        ("--config.stream.passes=3", "passes=3"),
        ("--config.train.eval_forward=none", "none"),
        ("--config.stream.alpha_init=0.5", "stream.alpha_init"),
        ("--config.adapter.targets=('q','w')", "adapter.targets"),
        ("--config.optimizer.learning_rate=-1.0", "optimizer.learning_rate"),
        ("--config.data.name=chess", "data.name"),
        ("--config.data.format=markdown", "data.format"),
        ("--config.data.overlong=error", "data.length"),
        ("--config.data.heldout=0", "data.heldout"),
        ("--config.data.length=4", "data.length"),
        ("--config.data.limit=-5", "data.limit=-5"),
        ("--config.train.sample_tokens=0", "train.sample_tokens=0"),
        ("--config.train.seed=-1", "train.seed=-1"),
        ("--config.train.eval_forward=foo", "train.eval_forward='foo'"),
        ("--config.train.eval_forward=local:0", "train.eval_forward='local:0': passes=0"),
        ("--config.optimizer.accumulate=3", "train.steps=4 must be a multiple of optimizer.accumulate=3"),
        ("--config.optimizer.accumulate=64", "train.steps=4 must be a multiple of optimizer.accumulate=64"),
        ("--config.optimizer.b1=1.0", "optimizer.b1=1.0"),
        ("--config.optimizer.b2=-3.0", "optimizer.b2=-3.0"),
        ("--config.optimizer.weight_decay=-1.0", "optimizer.weight_decay=-1.0"),
        ("--config.optimizer.final_factor=-1.0", "optimizer.final_factor=-1.0"),
        ("--config.adapter.targets=()", "adapter.targets is empty"),
        ("--config.stream.layers=()", "stream.layers is empty"),
        ("--config.stream.alpha=0.03", "stream.alpha_warmup=3 is for a learned alpha"),
    ],
)
def test_bad_knobs_are_named_and_nothing_is_written(tmp_path, capsys, override, culprit):
    assert train_small(tmp_path / "run", override) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ")
    assert message.count("\n") == 1
    assert culprit in message
    assert not (tmp_path / "run").exists()


def test_nothing_to_train_is_said_before_the_folder_is_taken(tmp_path, capsys):
    fixed = ["--config.stream.alpha=0.1", "--config.stream.alpha_warmup=0"]
    assert train_small(tmp_path / "run", *fixed, "--config.adapter.rank=0") == 2
    assert "nothing to train" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_vocabulary_without_bos_has_none_to_skip(tmp_path, capsys, monkeypatch):
    from sst_jax.data.tokenizer import ByteTokenizer

    monkeypatch.setattr(ByteTokenizer, "bos_id", None)
    assert train_small(tmp_path / "run", "--config.stream.initial=skip_bos") == 2
    assert "stream.initial='skip_bos': the vocabulary of random:tiny has no BOS" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_run_whose_prompts_are_iterated_ends_with_its_samples(tmp_path):
    assert train_small(tmp_path / "run", "--config.stream.iterate_prompt=all", "--config.train.steps=1") == 0
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert [sample["depth"] for sample in result["samples"]] == [1, 4]
    assert result["skipped"] == 0


def test_missing_recipe_and_stray_argument(tmp_path, capsys):
    from sst_jax import train
    from sst_jax.console.command import run

    assert run(train.main, ["--config", str(tmp_path / "none.py")]) == 2
    assert "none.py does not exist" in capsys.readouterr().err
    assert run(train.main, ["--config", TINY, "--steps", "3"]) == 2
    assert "--steps" in capsys.readouterr().err
    assert run(train.main, ["--config", TINY, "--config.train.steps", "3"]) == 2
    assert "write --config.train.steps=3, without a space" in capsys.readouterr().err


def test_another_config_in_the_same_folder_is_refused_with_the_difference(copied, capsys):
    before = {file: file.read_bytes() for file in copied.rglob("*") if file.is_file()}
    assert train_small(copied, "--config.optimizer.learning_rate=0.5") == 2
    message = capsys.readouterr().err
    assert "recipe.optimizer.learning_rate: 0.01 there, 0.5 now" in message
    assert {file: file.read_bytes() for file in copied.rglob("*") if file.is_file()} == before


def test_a_folder_with_other_things_in_it_is_refused(tmp_path, capsys):
    (tmp_path / "thesis.tex").write_text("precious")
    assert train_small(tmp_path) == 2
    assert "thesis.tex" in capsys.readouterr().err
    assert [entry.name for entry in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_second_process_is_refused(copied, capsys):
    import fcntl

    with (copied / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert train_small(copied) == 2
    assert "another process" in capsys.readouterr().err


def test_a_run_on_another_base_is_refused(copied, capsys):
    base = json.loads((copied / "base.json").read_text())
    (copied / "base.json").write_text(json.dumps(base | {"digest": "0" * 64}))
    assert train_small(copied) == 2
    assert f"other inputs: base (random:tiny, {'0' * 12} there, random:tiny, " in capsys.readouterr().err
    assert train_small(copied, "--allow-changed") == 0
    assert json.loads((copied / "base.json").read_text()) == base
    (changed,) = json.loads((copied / "config.json").read_text())["changed"]
    assert (changed["step"], changed["before"]["base"]["digest"]) == (4, "0" * 64)


@pytest.mark.parametrize(
    ("content", "culprit"),
    [
        (None, "train.jsonl"),
        ("", "train.jsonl"),
        ('{"question": "1+1?", "answer": "2\\n#### 2"}\n{"question": "half', "train.jsonl, line 2"),
        ('{"question": "1+1?"}\n', "answer"),
        ('{"question": "1+1?", "answer": "two"}\n', "####"),
    ],
)
def test_bad_gsm8k_folders_are_named_by_file_and_line(tmp_path, capsys, content, culprit):
    folder = tmp_path / "gsm8k"
    folder.mkdir()
    if content is not None:
        (folder / "train.jsonl").write_text(content)
    assert train_small(tmp_path / "run", "--config.data.name=gsm8k", f"--config.data.path={folder}") == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert culprit in message
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_full_disk_like_failure_keeps_the_run_usable(copied, finished, monkeypatch):
    """A write that fails in the middle of a save leaves the checkpoint before it in charge."""
    from sst_jax.weights import checkpoint

    for later in (3, 4):
        shutil.rmtree(copied / "checkpoints" / str(later))
        (copied / "manifests" / f"{later}.json").unlink()

    def full(path, value):
        raise OSError(28, os.strerror(28), str(path))

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "write_json", full)
        assert train_small(copied) == 1
    assert newest_good(copied) == 2
    assert train_small(copied) == 0
    assert_same_run(copied, finished)


@pytest.mark.slow
def test_gsm8k_and_the_plain_baseline_train_too(tmp_path):
    """With the stream off the same command trains LoRA alone."""
    data = pathlib.Path(tmp_path / "gsm8k")
    data.mkdir()
    row = json.dumps({"question": "Tom has 3 pens and buys 4. How many?", "answer": "3 + 4 = <<3+4=7>>7.\n#### 7"})
    (data / "train.jsonl").write_text((row + "\n") * 12)
    settings = ["--config.data.name=gsm8k", f"--config.data.path={data}", "--config.stream.on=False"]
    assert train_small(tmp_path / "run", *settings) == 0
    model = load(tmp_path / "run")
    assert model.config.stream is None
    assert model.params["blend"] == {}
    assert json.loads((tmp_path / "run" / "result.json").read_text())["heldout_forward"] == "plain"
