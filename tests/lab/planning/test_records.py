"""Records of plans, from compiles whose outcome is given."""

import dataclasses
import math

import pytest

from sst_jax.families.registry import PRESETS
from sst_jax.lab.planning import compile as compiling
from sst_jax.lab.planning import programs, records, targets
from sst_jax.lab.planning.compile import Plan
from sst_jax.lab.planning.count import Product, Work
from sst_jax.lab.planning.traffic import Traffic
from sst_jax.training.recipe import read_recipe

GIB = targets.GIB
RECIPE, BACKBONE = read_recipe("tiny", {"data.batch_size": 2, "data.length": 100, "train.steps": 36}), PRESETS["tiny"]


class Half(Work):
    """Work of half a second at any speed."""

    def seconds(self, flops, bandwidth):
        assert (flops, bandwidth) != (0, 0)
        return 0.5


def compiled(gib_a_sequence):
    """A stand-in for the compiler: memory grows with the batch."""

    def plan(recipe, backbone, target):
        peak = gib_a_sequence * GIB * recipe.data.batch_size
        return Plan(peak, {"base": peak}, 0, peak, Half([]), "xla", 1.0, {"all-reduce": 2e9}, {"fsdp": target.chips})

    return plan


@pytest.mark.parametrize(("gib", "largest"), [(1.0, 16), (0.01, 1024), (100.0, 1)])
def test_the_largest_batch_that_fits_is_found(monkeypatch, gib, largest):
    monkeypatch.setattr(compiling, "plan_training", compiled(gib))
    found = records.search(RECIPE, BACKBONE, targets.find("rtx-4090"), 0.4)
    assert found["batch_size"] == largest
    assert found["fits"] == (gib < 100)


def test_a_record_of_training_counts_tokens_hours_and_what_is_sent(monkeypatch):
    monkeypatch.setattr(compiling, "plan_training", compiled(1.0))
    monkeypatch.setattr(compiling, "plan_evaluation", compiled(0.5))
    target = targets.find("h100x2")
    record = records.plan_record(RECIPE, BACKBONE, target, 0.4)
    assert record["tokens_per_second"] == 2 * 100 / 0.5
    assert record["hours"] == pytest.approx(36 * 0.5 / 3600)
    assert record["sent_seconds"] == pytest.approx(2e9 / target.link)
    assert record["margin"] == target.memory - 2 * GIB - target.reserve
    text = records.describe(record)
    assert "peak             2.00 GiB of" in text
    assert "held             2.00 GiB on each chip, parameters and optimizer: base 2.00" in text
    assert "GB from each chip all-reduce 2.00 (mesh fsdp 2)" in text
    assert "at 40% of peak arithmetic and 80% of bandwidth: 400 tokens/s" in text


def test_a_record_of_decoding_counts_caches_and_no_hours(monkeypatch):
    monkeypatch.setattr(
        compiling, "plan_decoding", lambda recipe, backbone, target, *_: compiled(30.0)(recipe, backbone, target)
    )
    monkeypatch.setattr(compiling, "plan_prefill", lambda *arguments: compiled(1.0)(*arguments[:3]))
    record = records.plan_record(RECIPE, BACKBONE, targets.find("rtx-4090"), 0.4, records.Decoding(3, 64, 2))
    assert record["tokens_per_second"] == 3 / 0.5
    assert "hours" not in record
    text = records.describe(record)
    assert "decoding 3 sequences, 64 positions, depth 2" in text
    assert "does NOT fit" in text
    assert "MiB a sequence: states" in text


def test_seconds_are_arithmetic_or_bytes_and_launches_and_phases_have_a_sum(monkeypatch):
    """As the compiled program has them: 4e12 FLOPs, or 800 GB by 1,000 kernels at 80% of 1 TB/s."""
    target = dataclasses.replace(targets.find("rtx-4090"), flops=10e12, bandwidth=1e12)
    work = Work([Product(4e12, 1.0, 1.0)])

    def plan(moved):
        traffic = Traffic(moved, 1000.0)
        return lambda *_: Plan(1, {}, 0, 1, work, "xla", 60.0, {}, {}, traffic)

    monkeypatch.setattr(compiling, "plan_training", plan(1.0))
    monkeypatch.setattr(compiling, "plan_evaluation", plan(800e9))
    recipe = read_recipe("tiny", {"train.steps": 36, "train.eval_every": 10, "data.heldout": 5})
    record = records.plan_record(recipe, BACKBONE, target, 0.4)
    step, evaluation = record["programs"]["train_step"], record["programs"]["evaluation"]
    assert (step["bytes_moved"], step["kernels"], step["flops"]) == (1.0, 1000.0, 4e12)
    assert step["seconds"] == pytest.approx(1.0 + 1000 * records.LAUNCH)
    assert evaluation["seconds"] == pytest.approx(800e9 / 0.8e12 + 1000 * records.LAUNCH)
    phases = record["phases"]
    assert phases["training"] == pytest.approx(36 * step["seconds"])
    assert (phases["evaluations"], phases["batches"]) == (5, 1)  # before, three on the way, and behind the last step
    assert phases["evaluation"] == pytest.approx(5 * evaluation["seconds"])
    assert phases["sum"] == pytest.approx(phases["training"] + phases["evaluation"] + 120)
    text = records.describe(record)
    assert "800.0 GB moved, 1,000 kernels, a held-out batch" in text
    assert "5 evaluations of 1 batches" in text


def test_held_out_rows_are_as_even_as_the_devices_allow():
    recipe = read_recipe("tiny", {"data.heldout": 100, "data.length": 1024, "data.batch_size": 2})
    packed = math.ceil(100 * programs.EXAMPLE / 1024)  # 24 rows
    assert programs.heldout_rows(recipe) == (packed, 1)
    few = dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, eval_batch_size=10))
    assert programs.heldout_rows(few) == (8, 3)
    assert programs.heldout_rows(few, 8) == (8, 3)
