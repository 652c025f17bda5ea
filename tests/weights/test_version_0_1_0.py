"""What users of version 0.1.0 have on their disks still opens, computes the same numbers, and trains on."""

import hashlib
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

import sst_jax
from sst_jax import train
from sst_jax.console.command import run as run_command
from sst_jax.errors import InputError
from sst_jax.training import fit, read_recipe
from sst_jax.weights.checkpoint import read_metrics

pytestmark = pytest.mark.optimised  # random bases are known by their bits

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "tests" / "fixtures" / "v0_1_0"
MODELS = ("run", "base", "base_nf4", "sst", "merged", "adapter")
FORWARDS = {"exact2": {"forward": "exact", "depth": 2}, "two_pass": {"forward": "two_pass"}}
RECIPE = {
    "model.source": "random:tiny-llama", "adapter.rank": "2", "train.steps": "4", "train.eval_every": "2",
    "train.save_every": "2", "train.keep": "2", "train.sample_tokens": "8", "data.length": "512", "data.limit": "32",
    "data.heldout": "4",
}  # fmt: skip


@pytest.fixture(scope="module", params=MODELS)
def opened(request):
    return request.param, sst_jax.load(FOLDER / request.param, "float32")


def test_parameters_are_those_of_0_1_0_bit_for_bit(opened):
    name, model = opened
    recorded = json.loads((FOLDER / "parameters.json").read_text())[name]
    found = [
        hashlib.sha256(f"{leaf.dtype}{leaf.shape}".encode() + np.asarray(leaf).tobytes()).hexdigest()[:16]
        for leaf in jax.tree.leaves(model.params)
    ]
    assert sorted(found) == recorded


@pytest.mark.fast_cases(3)
def test_logits_are_those_of_0_1_0(opened):
    """Equal to the last bit where they were recorded; other processors and versions of XLA add in another order."""
    name, model = opened
    with np.load(FOLDER / "logits.npz") as file:
        recorded = dict(file)
    tokens = recorded["tokens"]
    np.testing.assert_allclose(model.logits(tokens, forward="plain"), recorded[name], rtol=0, atol=1e-5)
    for key, settings in FORWARDS.items():
        if model.config.stream is not None:
            np.testing.assert_allclose(model.logits(tokens, **settings), recorded[f"{name}/{key}"], rtol=0, atol=1e-5)
        else:
            assert f"{name}/{key}" not in recorded


def test_its_adapter_is_not_gone_on_with_by_a_recipe_of_another_rank(tmp_path):
    with pytest.raises(InputError, match="has been trained with another adapter"):
        fit(read_recipe("tiny", {"model.source": str(FOLDER / "run")}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_an_interrupted_run_of_0_1_0_resumes_and_ends_as_it_would_have(tmp_path):
    run = tmp_path / "run"
    shutil.copytree(FOLDER / "run", run)
    there = read_metrics(run)
    shutil.rmtree(run / "checkpoints" / "4")
    overrides = [f"--config.{key}={value}" for key, value in RECIPE.items()]
    assert run_command(train.main, ["--config", "configs/tiny.py", *overrides, "--workdir", str(run)]) == 0
    now = read_metrics(run)
    assert [line["step"] for line in now] == [line["step"] for line in there] == [0, 1, 2, 3, 4]
    for line, before in zip(now, there, strict=True):
        assert set(before) <= set(line)  # more is logged since
        for key in {"loss", "heldout_loss", "gradient_norm", "alpha_mean"} & set(before):
            assert line[key] == pytest.approx(before[key], rel=1e-4)
