"""Short runs of the tiny recipe, and what makes two runs the same."""

import jax
import numpy as np

from sst_jax import train
from sst_jax.console.command import run
from sst_jax.inference.model import load
from sst_jax.training.telemetry import OF_THE_MACHINE
from sst_jax.weights.checkpoint import read_metrics
from tests.support import ROOT

TINY = str(ROOT / "configs" / "tiny.py")
SMALL = [
    "--config.train.steps=4", "--config.train.eval_every=2", "--config.train.save_every=1", "--config.train.keep=9",
    "--config.data.limit=24", "--config.data.heldout=2", "--config.data.batch_size=2", "--config.train.sample_tokens=3",
    "--config.adapter.dropout=0.1", "--config.stream.alpha_warmup=3",
]  # fmt: skip


def train_small(workdir, *more) -> int:
    """Trains the tiny recipe for a few steps in this process; returns the exit code."""
    return run(train.main, ["--config", TINY, *SMALL, "--workdir", str(workdir), *more])


def trainables(run):
    params = load(run).params
    return {name: params[name] for name in ("adapter", "blend")}


def assert_same_run(run, reference):
    """Final parameters and every logged loss, bit for bit."""
    assert jax.tree.all(jax.tree.map(lambda a, b: np.array_equal(a, b), trainables(run), trainables(reference)))
    timeless = [
        [{key: value for key, value in line.items() if key not in OF_THE_MACHINE} for line in read_metrics(folder)]
        for folder in (run, reference)
    ]
    assert timeless[0] == timeless[1]
