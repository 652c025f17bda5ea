"""measure: on whatever device there is, with random weights of the real shapes; here two layers of the tiny model."""

import json
import math

import jax
import numpy as np
import pytest

from sst_jax import measure
from sst_jax.console.command import run
from sst_jax.families.registry import PRESETS
from sst_jax.lab.planning import measuring, programs
from sst_jax.model.config import ModelConfig

SMALL = ["--layers", "2", "--rows", "2", "--depths", "1,3", "--capacity", "64", "--prompt", "64", "--repeats", "1"]
KNOBS = ["--config.data.length=32", "--config.data.batch_size=2", "--config.data.heldout=2"]


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    folder = tmp_path_factory.mktemp("measure")
    out, trace = folder / "measured.json", folder / "trace"
    arguments = ["--config", "tiny", *KNOBS, *SMALL, "--json", str(out), "--trace", str(trace)]
    assert run(measure.main, arguments) == 0
    return json.loads(out.read_text()), trace


@pytest.mark.slow
def test_every_program_has_been_run(measured):
    record, _ = measured
    names = [one["name"] for one in record["programs"]]
    assert names == [
        "train step, two_pass, 2 x 32", "evaluation, exact, 2 x 32", "prefill of 64", "decode a token, 2 rows, depth 1",
        "decode a token, 2 rows, depth 3",
    ]  # fmt: skip
    whole = record["layers_of_the_model"]
    for one in record["programs"]:
        assert one["seconds"] > 0
        assert one["scaled_seconds"] == pytest.approx(one["seconds"] * whole / 2)
        assert one["planned_seconds"] is one["ratio"] is None  # there is no data sheet of a CPU
    assert "depth 3" in measuring.describe(record)
    assert "no data sheet" in measuring.describe(record)


@pytest.mark.slow
def test_kernels_are_held_against_float32(measured):
    record, _ = measured
    errors = {one["name"]: (one["forward"], one["backward"]) for one in record["numerics"]}
    assert len(errors) == 2 * 2 + 2 * 2  # XLA and chunks, global and in a window; two kinds, two rows
    assert errors["attention by xla, global, float32"] == (0.0, 0.0)
    for kind in ("nf4", "nf4_double"):
        for rows in ("1 row", "8 rows"):
            assert all(1e-4 < error < 4e-3 for error in errors[f"product {kind}, {rows}"])  # a rounding to bfloat16


@pytest.mark.slow
def test_a_profile_of_every_program_is_written(measured):
    _, trace = measured
    assert len({file.relative_to(trace).parts[0] for file in trace.rglob("*.xplane.pb")}) == 4


def test_a_card_with_a_data_sheet_has_a_ratio():
    """Of a program whose bytes and FLOPs are known: 2 x 2 numbers, doubled."""
    target = measuring.target_of("NVIDIA RTX PRO 6000 Blackwell Server Edition")
    step = lambda x: (x * 2, None)  # noqa: E731
    program = programs.Program(step, step, lambda: (jax.numpy.ones((2, 2)),))
    (found,) = measuring.run_program(program, target, 1)
    assert found["bytes_moved"] >= 2 * 4 * 4
    assert found["ratio"] == pytest.approx(found["seconds"] / found["planned_seconds"])


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("NVIDIA H200", "h200"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA GeForce RTX 4090", "rtx-4090"),
        ("NVIDIA A100-SXM4-80GB", "a100-80g"),
        ("NVIDIA RTX PRO 6000 Blackwell Workstation Edition", "rtx-pro-6000"),
        ("NVIDIA L4", "l4"),
        ("NVIDIA L40", None),
        ("cpu", None),
    ],
)
def test_data_sheets_are_found_by_the_driver_s_names(kind, name):
    target = measuring.target_of(kind)
    assert (None if target is None else target.name) == name


def test_random_weights_have_the_shapes_of_real_ones():
    config = ModelConfig(PRESETS["tiny"])
    shapes = jax.eval_shape(lambda: programs.abstract_parameters(config, "bfloat16", "none"))
    made = measuring.random_parameters(config, "bfloat16", "none")
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), made) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), shapes
    )
    spread = np.std(np.asarray(made[0]["embed"]["embedding"], np.float32))
    assert math.isclose(spread, 0.02, rel_tol=0.05)


@pytest.mark.parametrize(
    ("arguments", "culprit"),
    [
        (["--layers", "0"], "--layers 0"),
        (["--layers", "99"], "--layers 99"),
        (["--rows", "no"], "--rows"),
        (["--prompt", "99", "--capacity", "64"], "--prompt 99"),
    ],
)
def test_refuses_in_one_line(arguments, culprit, capsys):
    assert run(measure.main, ["--config", "tiny", *arguments]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert culprit in message
