"""One finished tiny run that many tests look at."""

import os
import pathlib
import shutil

import jax
import pytest

from sst_jax import train
from sst_jax.console.command import run

ROOT = pathlib.Path(__file__).parents[2]
TINY = str(ROOT / "configs" / "tiny.py")
SMALL = [
    "--config.train.steps=4", "--config.train.eval_every=2", "--config.train.save_every=1", "--config.train.keep=9",
    "--config.data.limit=24", "--config.data.heldout=2", "--config.data.batch_size=2", "--config.train.sample_tokens=3",
    "--config.adapter.dropout=0.1", "--config.stream.alpha_warmup=3",
]  # fmt: skip


def train_small(workdir, *more) -> int:
    """Trains the tiny recipe for a few steps in this process; returns the exit code."""
    return run(train.main, ["--config", TINY, *SMALL, "--workdir", str(workdir), *more])


@pytest.fixture(scope="session", autouse=True)
def compilation_cache(tmp_path_factory):
    """Every run compiles the same programs: keep them for the length of the session, in subprocesses too."""
    folder = str(tmp_path_factory.mktemp("xla"))
    settings = {
        "jax_compilation_cache_dir": folder,
        "jax_persistent_cache_min_compile_time_secs": 0.5,
        "jax_persistent_cache_min_entry_size_bytes": 0,
    }
    before = {name: getattr(jax.config, name) for name in settings}
    for name, value in settings.items():
        jax.config.update(name, value)
        os.environ[name.upper()] = str(value)
    yield
    for name, value in before.items():
        jax.config.update(name, value)
        del os.environ[name.upper()]


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """A run of four steps with a checkpoint after each. Not to be written in."""
    workdir = tmp_path_factory.mktemp("runs") / "finished"
    assert train_small(workdir) == 0
    return workdir


@pytest.fixture
def copied(finished, tmp_path):
    """A private copy of `finished`."""
    return pathlib.Path(shutil.copytree(finished, tmp_path / "run"))
