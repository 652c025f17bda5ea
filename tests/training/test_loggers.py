"""Loggers beside metrics.jsonl: Weights & Biases by a stand-in for its module, TensorBoard by its files."""

import json
import sys
from types import ModuleType, SimpleNamespace

import pytest

from sst_jax.errors import InputError
from sst_jax.training import loggers
from sst_jax.training.run import RunFolder


@pytest.fixture
def wandb(monkeypatch):
    """A module with the two names that are used of it, which keeps what it is told."""
    module, told = ModuleType("wandb"), SimpleNamespace(inits=[], logs=[], finished=0)

    class Run:
        def log(self, values, step):
            told.logs.append((step, values))

        def finish(self):
            told.finished += 1

    module.init = lambda **settings: told.inits.append(settings) or Run()
    module.Html = lambda text: ("html", text)
    module.__spec__ = SimpleNamespace(name="wandb")
    monkeypatch.setitem(sys.modules, "wandb", module)
    return told


def test_metrics_go_to_every_logger_and_a_resumed_run_is_the_same_one(tmp_path, wandb, monkeypatch):
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    for step in (0, 3):
        folder = RunFolder(tmp_path / "run", {"recipe": {}}, {"path": "b", "digest": "d"}, defaults={})
        folder.start_log(step, ("tensorboard", "wandb"))
        folder.log(step + 1, {"loss": 2.0, "broken": float("nan")})
        folder.log_samples(
            step + 1, [{"step": step + 1, "depth": 4, "question": "a < b?", "expected": "", "answer": "&"}]
        )
        folder.close()
    first, second = wandb.inits
    assert first == second
    assert (first["project"], first["name"], first["resume"]) == ("mine", "run", "allow")
    assert json.loads((tmp_path / "run" / "wandb.json").read_text()) == {"id": first["id"]}
    assert wandb.logs[0] == (1, {"loss": 2.0})
    assert wandb.logs[1] == (1, {"answer, depth 4": ("html", "<pre>a &lt; b?\n&amp;</pre>")})
    assert [step for step, _ in wandb.logs] == [1, 1, 4, 4]
    assert wandb.finished == 2
    assert list((tmp_path / "run" / "tensorboard").glob("events.out.*"))
    assert [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").open()] == [
        {"step": 1, "loss": 2.0}, {"step": 4, "loss": 2.0},
    ]  # fmt: skip


def test_a_logger_whose_package_is_missing_is_refused_by_name(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setattr(loggers.extras.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"train.loggers=wandb needs wandb, .*sst-jax\[wandb\]"):
        loggers.check_loggers(("wandb",))
    loggers.check_loggers(("tensorboard",))
