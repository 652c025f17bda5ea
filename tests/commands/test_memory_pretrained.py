"""The runner of the pretrained study of short memory, end to end on the tiny random model."""

import json

import pytest

from benchmarks import memory_pretrained
from sst_jax.console.command import run
from sst_jax.files import read_json
from sst_jax.inference.model import load

STUDY = {
    "about": "a toy", "reach": {"2": [2]}, "words": 9, "window": 24, "windows": 6, "seeds": 2,
    "overrides": [
        "--config.model.source=random:tiny-llama", "--config.data.name=text", "--config.data.length=64",
        "--config.data.heldout=2", "--config.train.steps=2", "--config.train.eval_every=2",
        "--config.train.save_every=2", "--config.train.sample_tokens=2", "--config.data.batch_size=2",
    ],
    "reference": "two-range",
    "arms": {
        "baseline": [], "compute": [], "full": ["--config.stream.on=False"],
        "two-range": ["--config.stream.forward=two_pass", "--config.stream.alpha_range=(0.015,0.10)"],
    },
    "streams": ["two-range"], "against": ["baseline", "compute"],
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.optimised
def test_arms_share_windows_but_for_the_full_one_and_are_compared_by_document(tmp_path, capsys):
    for split in ("train", "test"):
        rows = [{"question": f"Ann has {n} pens and {split}s.", "answer": f"So she has {n}."} for n in range(12)]
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "study.json").write_text(json.dumps(STUDY))
    workdir = tmp_path / "run"
    arguments = ["--data", str(tmp_path), "--protocol", str(tmp_path / "study.json"), "--reach", "2"]
    assert run(memory_pretrained.main, [*arguments, "--workdir", str(workdir)]) == 0
    result = read_json(workdir / "result.json")
    assert result["seeds"] == 2
    assert set(result["against"]["two-range"]) == {"baseline", "compute"}
    stream, plain = (result["scores"][name] for name in ("two-range", "baseline"))
    record = result["against"]["two-range"]["baseline"]
    assert record["difference"] == pytest.approx((sum(stream) - sum(plain)) / 2, abs=1e-6)
    assert record["over_documents"]["low"] <= record["difference"] <= record["over_documents"]["high"]
    windows = {name: load(workdir / f"{name}-0").config.backbone.attention_window for name in STUDY["arms"]}
    assert windows["full"] is None
    assert all(set(found) == {2} for name, found in windows.items() if name != "full")
    out = capsys.readouterr().out
    assert "reach" in out
    assert "| `two-range` |" in out
    assert run(memory_pretrained.main, [*arguments, "--arms", "best"]) == 2
    assert "--arms best is none of baseline, compute" in capsys.readouterr().err
