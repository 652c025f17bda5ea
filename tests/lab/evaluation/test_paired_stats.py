"""Two evaluations against each other, on outcomes written by hand."""

import json

import numpy as np
import pytest

from sst_jax.errors import InputError
from sst_jax.lab.evaluation import paired_stats
from sst_jax.lab.statistics import bootstrap_mean, holm, mcnemar, t_mean

HEADER = {
    "task": "gsm8k",
    "measure": "answers",
    "items": 6,
    "items_sha256": "x",
    "format": "plain",
    "model": {"path": "m"},
}


def write(folder, rows, measure="answers", likely=0.0, **header):
    """`rows`: by policy, "1" for each right answer, "0" for a wrong one; or losses, greedily written below `likely`."""
    folder.mkdir(parents=True)
    header = {**HEADER, "measure": measure, "policies": list(rows), **header}
    outcomes, scores = [], {}
    for policy, row in rows.items():
        for number, value in enumerate(row):
            outcome = {"id": f"i{number}", "policy": policy}
            if measure == "loss":
                outcome |= {"loss": value, "answer_tokens": 4, "greedy": value < likely}
            else:
                outcome |= {
                    "strict": value,
                    "correct": value == "1",
                    "reference": "1",
                    "truncated": False,
                    "output": value,
                }
            outcomes.append(outcome)
        value = float(np.mean([float(item) for item in row]))
        scores[policy] = {
            "strict" if measure == "answers" else "nats_per_token": {
                "value": value,
                "low": value - 0.1,
                "high": value + 0.1,
            }
        }
    (folder / "evaluation.json").write_text(json.dumps(header))
    (folder / "outcomes.jsonl").write_text("".join(json.dumps(outcome) + "\n" for outcome in outcomes))
    (folder / "result.json").write_text(json.dumps({**header, "policies": scores}))
    return str(folder)


def compared(a, b):
    return paired_stats.compare(a.split(","), b.split(","))


def test_depths_meet_their_like_and_new_depths_meet_the_baseline(tmp_path):
    a = write(tmp_path / "a", {"1": "110000", "2": "111100", "4": "111111"})
    b = write(tmp_path / "b", {"1": "101000"})
    result = compared(a, b)
    records = result["comparisons"]
    assert [(r["A"], r["B"]) for r in records] == [("1", "1"), ("2", "1"), ("4", "1")]
    assert [(r["only_A"], r["only_B"]) for r in records] == [(1, 1), (2, 0), (4, 0)]
    assert records[0]["only_A_items"] == ["i1"]
    assert records[0]["only_B_items"] == ["i2"]
    assert [r["p"] for r in records] == [mcnemar(1, 1), mcnemar(0, 2), mcnemar(0, 4)]
    assert [r["p_holm"] for r in records] == holm([r["p"] for r in records])
    assert records[2]["difference"] == pytest.approx(4 / 6)
    expected = bootstrap_mean([0, 1, 0, 1, 1, 1])
    assert records[2]["over_items"] == expected._asdict()
    assert "over_seeds" not in records[0]


def test_depths_without_depth_1_meet_it_once_each(tmp_path):
    a = write(tmp_path / "a", {"2": "111100", "4": "111111"})
    b = write(tmp_path / "b", {"1": "101000"})
    records = compared(a, b)["comparisons"]
    assert [(r["A"], r["B"]) for r in records] == [("2", "1"), ("4", "1")]
    assert [r["p_holm"] for r in records] == holm([mcnemar(0, 2), mcnemar(0, 4)])


def test_several_seeds_are_paired_in_order(tmp_path):
    sides = {
        name: ",".join(write(tmp_path / name / str(seed), {"1": row}) for seed, row in enumerate(rows))
        for name, rows in (("a", ["111000", "111100", "100000"]), ("b", ["110000", "110000", "110000"]))
    }
    (record,) = compared(sides["a"], sides["b"])["comparisons"]
    assert [(s["only_A"], s["only_B"]) for s in record["seeds"]] == [(1, 0), (2, 0), (0, 1)]
    assert record["over_seeds"] == t_mean([1 / 6, 2 / 6, -1 / 6])._asdict()
    assert record["over_items"]["value"] == pytest.approx(record["difference"]) == pytest.approx(1 / 9)
    assert len(record["each_seed"]) == 3


def test_outcomes_are_matched_by_item_not_by_line(tmp_path):
    a, b = write(tmp_path / "a", {"1": "110000"}), write(tmp_path / "b", {"1": "110000"})
    lines = (tmp_path / "b" / "outcomes.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "b" / "outcomes.jsonl").write_text("".join(reversed(lines)))
    (record,) = compared(a, b)["comparisons"]
    assert (record["only_A"], record["only_B"], record["p"]) == (0, 0, 1.0)


def test_losses(tmp_path):
    a = write(tmp_path / "a", {"1": [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]}, "loss", likely=2.0)
    b = write(tmp_path / "b", {"1": [2.0, 2.5, 2.0, 5.0, 6.0, 7.0]}, "loss", likely=2.0)
    result = compared(a, b)
    (record,) = result["comparisons"]
    assert record["difference"] == pytest.approx((21 - 24.5) / 24)
    assert record["over_items"]["low"] < record["difference"] < record["over_items"]["high"]
    assert record["items_better_in_A"] == 5
    assert record["greedy"]["difference"] == pytest.approx(1 / 6)
    assert record["greedy"]["seeds"] == [{"only_A": 1, "only_B": 0, "p": 1.0}]
    paired_stats.figure(result, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 5000


@pytest.mark.parametrize(
    ("a", "b", "names"),
    [
        (["runs/stream/gsm8k"], ["runs/baseline/gsm8k"], ("stream", "baseline")),
        (["p/e/stream-0", "p/e/stream-1"], ["p/e/baseline-0", "p/e/baseline-1"], ("stream", "baseline")),
        (["one"], ["two/of/it"], ("one", "two/of/it")),
        (["x/a/1", "x/a/2"], ["x/b/1", "x/b/2"], ("a", "b")),
        (["same"], ["same"], ("A", "B")),
        (["x/0", "x/1"], ["x/2", "x/3"], ("A", "B")),
    ],
)
def test_sides_are_called_by_what_tells_their_folders_apart(a, b, names):
    assert paired_stats.side_names({"A": a, "B": b}) == names


def test_settings_that_differ_are_shown(tmp_path):
    a = write(tmp_path / "a", {"1": "110000"}, model={"path": "a"})
    b = write(tmp_path / "b", {"1": "110000"}, format="chat")
    assert compared(a, b)["settings_that_differ"] == [{"key": "format", "A": "plain", "B": "chat"}]


def test_one_item_gives_no_interval_and_valid_json(tmp_path):
    a, b = write(tmp_path / "a", {"1": "1"}, items=1), write(tmp_path / "b", {"1": "0"}, items=1)
    result = compared(a, b)
    assert result["comparisons"][0]["over_items"] == {"value": 1.0, "low": None, "high": None}
    json.dumps(result, allow_nan=False)
    paired_stats.figure(result, tmp_path / "figure.png")


def test_items_that_differ_come_with_both_answers(tmp_path):
    a, b = write(tmp_path / "a", {"1": "10"}, items=2), write(tmp_path / "b", {"1": "01"}, items=2)
    found = paired_stats.differing_items(paired_stats.read_side([a]), paired_stats.read_side([b]))
    assert [item["id"] for item in found] == ["i0", "i1"]
    assert found[0]["A"]["correct"]
    assert found[0]["B"]["output"] == "0"


def test_what_cannot_be_compared_is_named(tmp_path):
    a = write(tmp_path / "a", {"1": "110000"})
    for name, header, culprit in (
        ("other", {"task": "arc_challenge"}, "not the same test: task is gsm8k and arc_challenge"),
        ("fewer", {"items": 3}, "items is 6 and 3"),
        ("changed", {"items_sha256": "y"}, "items_sha256 is x and y"),
    ):
        with pytest.raises(InputError, match=culprit):
            compared(a, write(tmp_path / name, {"1": "110000"}, **header))
    with pytest.raises(InputError, match="A has 2 evaluations and B 1"):
        compared(f"{a},{a}", a)
    with pytest.raises(InputError, match=r"holds no evaluation\.json"):
        compared(a, str(tmp_path / "nowhere"))
    (tmp_path / "a" / "result.json").unlink()
    with pytest.raises(InputError, match="is not finished"):
        compared(a, a)
    loss = write(tmp_path / "loss", {"1": [1.0]}, "loss", items=1)
    long = write(tmp_path / "long", {"1": [1.0]}, "loss", items=1)
    text = (tmp_path / "long" / "outcomes.jsonl").read_text().replace('"answer_tokens": 4', '"answer_tokens": 5')
    (tmp_path / "long" / "outcomes.jsonl").write_text(text)
    with pytest.raises(InputError, match="i0 has 4 answer tokens in A and 5 in B"):
        compared(loss, long)
