"""The runner of the pretrained studies, end to end on the tiny random model."""

import json

import pytest

from benchmarks import findings
from sst_jax.console.command import run
from sst_jax.training.run import read_metrics

TINY = [
    "--study", "rooms", "--limit", "6", "--config.model.source=random:tiny", "--config.data.length=384",
    "--config.train.steps=2", "--config.train.eval_every=2", "--config.train.save_every=2", "--config.data.heldout=2",
    "--config.data.batch_size=2", "--config.train.sample_tokens=2", "--config.data.limit=16",
]  # fmt: skip


@pytest.mark.slow
def test_a_study_goes_seed_by_seed_and_compares_streams_with_controls(tmp_path, capsys):
    workdir = tmp_path / "rooms"
    arguments = [*TINY, "--arms", "exact-range,baseline,compute", "--workdir", str(workdir)]
    assert run(findings.main, [*arguments, "--seeds", "1"]) == 0
    one = json.loads((workdir / "result.json").read_text())
    assert one["seeds"] == 1
    assert run(findings.main, [*arguments, "--seeds", "2"]) == 0
    result = json.loads((workdir / "result.json").read_text())
    assert set(result["tasks"]) == {"rooms:1-4", "rooms:8"}
    for task in result["tasks"].values():
        assert set(task["against"]) == {"exact-range"}
        assert set(task["against"]["exact-range"]) == {"baseline", "compute"}
        assert all(len(scores["nats_per_token"]) == 2 for scores in task["scores"].values())
        stream, plain = (task["scores"][arm]["nats_per_token"] for arm in ("exact-range", "baseline"))
        difference = task["against"]["exact-range"]["baseline"]["difference"]
        assert difference == pytest.approx((sum(stream) - sum(plain)) / 2)
    assert result["seconds"]["baseline"][0] == one["seconds"]["baseline"][0]  # was not trained again
    lines = {arm: len(read_metrics(workdir / f"{arm}-0")) for arm in ("exact-range", "baseline", "compute")}
    assert lines["compute"] > lines["baseline"] == lines["exact-range"]
    assert "| exact-range |" in capsys.readouterr().out
    assert (workdir / "figure.png").stat().st_size > 5000


def test_bad_arms_are_named():
    with pytest.raises(findings.InputError, match="--arms nothing is unknown; arms are exact-free"):
        findings.main([*TINY, "--arms", "nothing"])
    with pytest.raises(findings.InputError, match="--seeds 0"):
        findings.main([*TINY, "--seeds", "0"])
