"""The runner of the pretrained studies, end to end on the tiny random model."""

import pytest

from benchmarks import findings
from sst_jax.console.command import run
from sst_jax.files import read_json
from sst_jax.weights.checkpoint import read_metrics

TINY = [
    "--study", "rooms", "--limit", "6", "--config.model.source=random:tiny", "--config.data.length=384",
    "--config.train.steps=2", "--config.train.eval_every=2", "--config.train.save_every=2", "--config.data.heldout=2",
    "--config.data.batch_size=2", "--config.train.sample_tokens=2", "--config.data.limit=16",
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.optimised
def test_a_study_goes_seed_by_seed_and_compares_streams_with_controls(tmp_path, capsys):
    workdir = tmp_path / "rooms"
    arguments = [*TINY, "--arms", "exact-range,baseline,compute", "--workdir", str(workdir)]
    assert run(findings.main, [*arguments, "--seeds", "1"]) == 0
    one = read_json(workdir / "result.json")
    assert one["seeds"] == 1
    assert run(findings.main, [*arguments, "--seeds", "2", "--deeper", "exact-range"]) == 0
    result = read_json(workdir / "result.json")
    assert set(result["tasks"]) == {"rooms:1-4", "rooms:8"}
    for task in result["tasks"].values():
        assert set(task["against"]) == {"exact-range"}
        assert set(task["against"]["exact-range"]) == {"baseline", "compute"}
        assert all(len(scores["nats_per_token"]) == 2 for scores in task["scores"].values())
        stream, plain = (task["scores"][arm]["nats_per_token"] for arm in ("exact-range", "baseline"))
        difference = task["against"]["exact-range"]["baseline"]["difference"]
        assert difference == pytest.approx((sum(stream) - sum(plain)) / 2)
    assert result["seconds"]["baseline"][0] == one["seconds"]["baseline"][0]  # was not trained again
    assert list(result["deeper"]) == ["exact-range"]
    assert list(result["deeper"]["exact-range"]) == ["2", "3", "4"]
    for depth, record in result["deeper"]["exact-range"].items():
        deep, once = (
            [read_json(workdir / "evaluations" / folder / f"exact-range-{seed}" / "result.json") for seed in range(2)]
            for folder in ("rooms-1-4-deeper", "rooms-1-4")
        )
        losses = [[found["policies"][key]["nats_per_token"]["value"] for found in side]
                  for side, key in ((deep, depth), (once, "1"))]  # fmt: skip
        assert record["difference"] == pytest.approx((sum(losses[0]) - sum(losses[1])) / 2)
        assert record["over_seeds"]
    lines = {arm: len(read_metrics(workdir / f"{arm}-0")) for arm in ("exact-range", "baseline", "compute")}
    assert lines["compute"] > lines["baseline"] == lines["exact-range"]
    out = capsys.readouterr().out
    assert "| exact-range |" in out
    assert "| arm | depth 2 | depth 3 | depth 4 |" in out
    assert (workdir / "figure.png").stat().st_size > 5000
    # What is there is not taken for runs of another recipe, nor for an evaluation of other items.
    before = (workdir / "result.json").read_bytes()
    assert run(findings.main, [*arguments, "--seeds", "2", "--config.train.steps=3"]) == 2
    assert "holds a run of another config" in capsys.readouterr().err
    assert run(findings.main, [*arguments, "--seeds", "2", "--limit", "5"]) == 2
    assert "holds another evaluation" in capsys.readouterr().err
    assert (workdir / "result.json").read_bytes() == before


def test_bad_arms_are_named():
    with pytest.raises(findings.InputError, match="--arms nothing is unknown; arms are exact-free"):
        findings.main([*TINY, "--arms", "nothing"])
    with pytest.raises(findings.InputError, match="--deeper compute is no stream among the arms, which"):
        findings.main([*TINY, "--deeper", "compute"])
    with pytest.raises(findings.InputError, match="--limit -1"):
        findings.main([*TINY, "--limit", "-1"])
    with pytest.raises(findings.InputError, match=r"nowhere \(--data\): no such folder"):
        findings.main(["--study", "hidden", "--data", "nowhere"])
    with pytest.raises(findings.InputError, match="--seeds 0"):
        findings.main([*TINY, "--seeds", "0"])
