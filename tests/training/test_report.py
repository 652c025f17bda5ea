"""The summary of a run: the lowest loss, and commands that run where they are pasted."""

import shlex
import sys

import pytest

from sst_jax.console.command import Parser, called
from sst_jax.training.report import RunResult, Sample, describe


def result(losses, question="Where is Ann?"):
    steps = max(losses)
    samples = [Sample(question, "kitchen", 1, " kitchen"), Sample(question, "kitchen", 4, " hall")]
    return RunResult(steps, "two_pass", "exact", losses, losses[0], losses[steps], 0, 60.0, samples, "figure.png")


def test_the_lowest_loss_is_told_where_it_is_not_the_last(tmp_path):
    said = describe(result({0: 2.25, 12: 1.0, 24: 1.25}), tmp_path, with_stream=True)
    assert "2.2500 -> 1.2500 in 60 s; it was lowest at step 12, 1.0000\n" in said
    (tmp_path / "checkpoints" / "12").mkdir(parents=True)
    said = describe(result({0: 2.25, 12: 1.0, 24: 1.25}), tmp_path, with_stream=True)
    assert f"1.0000 ({tmp_path}/checkpoints/12)\n" in said
    assert "it was lowest" not in describe(result({0: 2.25, 24: 1.25}), tmp_path, with_stream=True)


def test_one_of_several_runs_tells_its_losses_alone(tmp_path):
    said = describe(result({0: 2.25, 24: 1.25}), tmp_path, with_stream=True, brief=True)
    assert "2.2500 -> 1.2500" in said
    assert said.endswith("figure.png")
    assert "next" not in said


@pytest.mark.parametrize(
    ("program", "begins"),
    [
        ("sst-jax ", ["sst-jax", "generate"]),
        ("python -m sst_jax ", [sys.executable, "-m"]),
        (None, [sys.executable, "-m"]),
    ],
)
def test_the_commands_that_come_next_are_called_as_this_one(monkeypatch, tmp_path, program, begins):
    if program is not None:
        monkeypatch.setattr(Parser, "program", program)
    run = tmp_path / "my run"
    said = describe(result({0: 2.0, 2: 1.0}, "Who's there?"), run, with_stream=True)
    generate = shlex.split(said.splitlines()[-2])
    assert generate[:2] == begins
    assert generate[-6:] == ["--model", str(run), "--depth", "4", "--question", "Who's there?"]
    assert "--depth" not in describe(result({0: 2.0, 2: 1.0}), run, with_stream=False)


def test_a_program_that_the_shell_does_not_find_goes_by_its_path(monkeypatch, tmp_path):
    """As `.venv/bin/sst-jax` is called where the environment is not active."""
    own = tmp_path / "my env" / "sst-jax"
    own.parent.mkdir()
    own.write_text("#!/bin/sh\n")
    own.chmod(0o755)
    monkeypatch.setattr(Parser, "program", "sst-jax ")
    monkeypatch.setattr(sys, "argv", [str(own)])
    monkeypatch.setenv("PATH", str(tmp_path))
    assert shlex.split(called("generate")) == [str(own), "generate"]
    monkeypatch.setenv("PATH", str(own.parent))
    assert called("generate") == "sst-jax generate"
