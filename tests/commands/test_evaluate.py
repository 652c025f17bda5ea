"""evaluate and compare on the command line: what they leave behind, going on after a kill, and what they refuse."""

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import pytest

from sst_jax import compare, evaluate
from sst_jax.console.command import run
from sst_jax.inference.model import load
from sst_jax.lab import evaluation
from sst_jax.lab.evaluation import EvalConfig
from tests.support.problems import gsm8k_lines, write_lines

WORDS = ["--task", "words", "--limit", "5", "--batch-size", "2", "--max-new-tokens", "8"]


def outcomes(folder):
    """Without times, which no two runs share."""
    lines = (pathlib.Path(folder) / "outcomes.jsonl").read_text().splitlines()
    return [{key: value for key, value in json.loads(line).items() if key != "seconds"} for line in lines]


def scores(folder):
    result = json.loads((pathlib.Path(folder) / "result.json").read_text())
    return [{key: value for key, value in found.items() if key != "seconds"} for found in result["policies"].values()]


@pytest.fixture(scope="module")
def evaluated(finished, tmp_path_factory):
    """The finished run on five problems under three policies."""
    out = tmp_path_factory.mktemp("evaluated") / "out"
    arguments = ["--model", str(finished), *WORDS, "--depth", "1,2,until_stable:0.01:3", "--out", str(out)]
    assert run(evaluate.main, arguments) == 0
    return out


def test_an_evaluation_leaves_what_it_promises(evaluated, finished):
    result = json.loads((evaluated / "result.json").read_text())
    assert result["format"] == "plain"
    assert result["first_prompt"].startswith("Question: ")
    assert result["stop"] == ["Question:"]
    assert result["model"]["run"] == str(finished.resolve())
    assert result["overlap"]["checked"]
    assert result["overlap"]["same_question"] == []
    assert [change["to"] for change in result["between_policies"]] == ["2", "until_stable:0.01:3"]
    assert "upper bound that no policy reaches" in result["oracle"]["what"]
    assert result["environment"]["versions"]["jax"]
    lines = outcomes(evaluated)
    assert len(lines) == 15
    assert [line["id"] for line in lines[:5]] == [line["id"] for line in lines[5:10]]
    assert {line["policy"]: line["depth"] for line in lines}["2"] > 1.0
    assert all(line["truncated"] and line["new_tokens"] == 8 for line in lines if len(line["output"]) > 8)


def test_a_call_leaves_the_same_folder_as_the_command(evaluated, finished, tmp_path):
    config = EvalConfig("words", policies=("1", "2", "until_stable:0.01:3"), limit=5, max_new_tokens=8, batch_size=2)
    result = evaluation.run(load(finished), config, tmp_path / "out")
    assert outcomes(tmp_path / "out") == outcomes(evaluated)
    assert result == json.loads((tmp_path / "out" / "result.json").read_text())
    for name in ("evaluation.json", "items.jsonl"):
        assert (tmp_path / "out" / name).read_bytes() == (evaluated / name).read_bytes()


def test_answers_are_those_that_the_model_gives(evaluated, finished):
    model, line = load(finished), outcomes(evaluated)[7]
    items = [json.loads(text) for text in (evaluated / "items.jsonl").read_text().splitlines()]
    question = next(item["question"] for item in items if item["id"] == line["id"])
    answer = model.generate(f"Question: {question}\nAnswer:", depth=2, max_new_tokens=8, stop=["Question:"])[0]
    assert line["output"] == answer.text
    assert line["prompt_tokens"] == answer.prompt_tokens


def test_a_finished_evaluation_is_not_computed_again(evaluated, finished, capsys):
    before = (evaluated / "outcomes.jsonl").read_bytes()
    arguments = ["--model", str(finished), *WORDS, "--depth", "1,2,until_stable:0.01:3", "--out", str(evaluated)]
    assert run(evaluate.main, arguments) == 0
    assert (evaluated / "outcomes.jsonl").read_bytes() == before
    printed = capsys.readouterr().out
    assert "oracle, not a score" in printed
    assert f"5 items, plain prompts, {finished.resolve()}, step 4 (on random:tiny)" in printed
    assert "accuracy" in printed
    assert " regressions, " in printed
    assert run(evaluate.main, [*arguments, "--limit", "4"]) == 2
    assert "holds another evaluation" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("wanted", [1, 7, 11])
def test_killed_for_real_and_started_again(evaluated, finished, tmp_path, wanted):
    """kill -9 once `wanted` outcomes stand; what is left is valid, and the second run comes to the same scores."""
    out = tmp_path / "out"
    command = [sys.executable, "-m", "sst_jax.evaluate", "--model", str(finished), *WORDS]
    command += ["--depth", "1,2,until_stable:0.01:3", "--out", str(out)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    deadline, file = time.monotonic() + 300, out / "outcomes.jsonl"
    while time.monotonic() < deadline and not (file.exists() and file.read_bytes().count(b"\n") >= wanted):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert not (out / "result.json").exists()
    for line in file.read_text().splitlines()[:wanted]:
        json.loads(line)
    assert subprocess.run(command, capture_output=True).returncode == 0
    assert outcomes(out) == outcomes(evaluated)
    assert scores(out) == scores(evaluated)


def edited(folder, target, change):
    """A copy of an evaluation with `change` made to every line of its outcomes."""
    shutil.copytree(folder, target)
    lines = [json.loads(line) for line in (target / "outcomes.jsonl").read_text().splitlines()]
    for line in lines:
        change(line)
    (target / "outcomes.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return target


@pytest.fixture(scope="module")
def losses(finished, tmp_path_factory):
    """Losses of the finished run, at two depths."""
    out = tmp_path_factory.mktemp("losses") / "out"
    arguments = ["--model", str(finished), "--task", "words", "--limit", "4", "--measure", "loss", "--depth", "1,2"]
    assert run(evaluate.main, [*arguments, "--out", str(out)]) == 0
    return out


def test_losses_and_their_comparison(losses, tmp_path, capsys):
    found = json.loads((losses / "result.json").read_text())["policies"]
    assert found["1"]["nats_per_token"]["low"] < found["1"]["nats_per_token"]["value"]
    other, tokens = edited(losses, tmp_path / "other", lambda line: line.update(loss=line["loss"] + 3.0)), {}
    for line in outcomes(losses):
        tokens.setdefault(line["policy"], []).append(line["answer_tokens"])
    assert run(compare.main, [str(other), str(losses), "--out", str(tmp_path / "compared")]) == 0
    assert "items better in A" in capsys.readouterr().out
    result = json.loads((tmp_path / "compared" / "result.json").read_text())
    expected = [3.0 * len(counts) / sum(counts) for counts in tokens.values()]
    assert [record["difference"] for record in result["comparisons"]] == pytest.approx(expected)
    assert [record["items_better_in_A"] for record in result["comparisons"]] == [0, 0]
    assert (tmp_path / "compared" / "compare.png").stat().st_size > 5000


def test_compare_prints_and_writes_what_differs(evaluated, tmp_path, capsys):
    """One item of five, right on the other side under each of three policies."""
    target, changed = tmp_path / "comparison.json", outcomes(evaluated)[2]["id"]

    def turn(line):
        line["correct"] ^= line["id"] == changed

    other = edited(evaluated, tmp_path / "other", turn)
    arguments = [str(evaluated), str(other), "--out", str(tmp_path / "out"), "--json", str(target)]
    assert run(compare.main, arguments) == 0
    printed = capsys.readouterr().out
    assert "Holm" in printed
    assert "oracle over depths 1, 2, until_stable:0.01:3, not a score" in printed
    result = json.loads(target.read_text())
    assert result == json.loads((tmp_path / "out" / "result.json").read_text())
    assert [(r["p"], r["p_holm"]) for r in result["comparisons"]] == [(1.0, 1.0)] * 3
    assert [r["only_A"] + r["only_B"] for r in result["comparisons"]] == [1] * 3
    differing = [json.loads(line) for line in (tmp_path / "out" / "differing_items.jsonl").read_text().splitlines()]
    assert [item["id"] for item in differing] == [changed] * 3


def test_a_single_item_has_no_interval(finished, tmp_path, capsys):
    out = tmp_path / "out"
    arguments = ["--model", str(finished), "--task", "words", "--limit", "1", "--measure", "loss", "--out", str(out)]
    assert run(evaluate.main, arguments) == 0
    assert "[-, -] nats per token" in capsys.readouterr().out
    assert json.loads((out / "result.json").read_text())["policies"]["1"]["nats_per_token"]["low"] is None
    assert run(compare.main, [str(out), str(out)]) == 0


def test_a_comparison_is_not_written_over_an_evaluation(losses, capsys):
    before = (losses / "result.json").read_bytes()
    assert run(compare.main, [str(losses), str(losses), "--out", str(losses)]) == 2
    assert "holds an evaluation" in capsys.readouterr().err
    assert (losses / "result.json").read_bytes() == before


def test_the_file_for_the_result_is_looked_at_before_the_work(tmp_path, capsys):
    (tmp_path / "file").write_text("x")
    for where, says in ((tmp_path, "is a folder"), (tmp_path / "file" / "a.json", "cannot be a folder")):
        arguments = ["--model", "/no/model", "--task", "words", "--out", str(tmp_path / "out"), "--json", str(where)]
        assert run(evaluate.main, arguments) == 2
        assert says in capsys.readouterr().err


def test_compare_refuses_in_one_line(evaluated, losses, tmp_path, capsys):
    (tmp_path / "result.json").write_text('{"tasks": ["arc_easy"]}')
    for arguments, culprit in (
        ([str(evaluated), str(tmp_path)], "was evaluated with --tasks"),
        ([str(evaluated), "nowhere"], "nowhere is not an evaluation"),
        ([str(evaluated), str(losses)], "not the same test: measure is answers and loss"),
        ([str(evaluated)], "OUT_B"),
    ):
        assert run(compare.main, arguments) == 2
        message = capsys.readouterr().err
        assert message.startswith("error: ")
        assert message.count("\n") == 1
        assert culprit in message


@pytest.mark.parametrize(
    ("arguments", "culprit"),
    [
        (["--task", "gsm9k"], "--task gsm9k is unknown; tasks are gsm8k"),
        (["--task", "gsm8k", "--data", "nowhere"], "nowhere (--data): no such folder"),
        (["--task", "gpqa_diamond", "--data", "."], "holds no gpqa_diamond.csv"),
        (["--task", "words", "--model", "nowhere"], "nowhere does not exist"),
        (["--task", "words", "--depth", "2"], "needs a model with a stream"),
        (["--task", "words", "--depth", "1,x"], "depth='x' is not one of"),
        (["--task", "words", "--depth", "1,1"], "names 1 twice"),
        (["--task", "words", "--limit", "-1"], "--limit -1"),
        (["--task", "words", "--batch-size", "0"], "--batch-size 0"),
        (["--task", "words", "--max-new-tokens", "9999"], "exceed the model's 4096 positions"),
        (["--task", "words", "--format", "verse"], "--format"),
        (["--task", "words", "--fewshot", "3"], "--fewshot goes with --tasks"),
        (["--task", "words", "--measure", "loss", "--depth", "first_token:2"], "scored at flat depths"),
        (["--task", "words", "--out", __file__], "is not a folder"),
        (["--tasks", "arc_easy", "--data", "."], "--data goes with --task"),
        (["--tasks", "arc_easy", "--depth", "first_token:2"], "flat depths"),
        ([], "--task"),
    ],
)
def test_evaluate_refuses_in_one_line(arguments, culprit, tmp_path, capsys):
    usual = {"--model": "random:tiny", "--out": str(tmp_path / "out")}
    usual = [part for flag, value in usual.items() if flag not in arguments for part in (flag, value)]
    assert run(evaluate.main, [*usual, *arguments]) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ")
    assert message.count("\n") == 1
    assert culprit in message
    assert not (tmp_path / "out" / "outcomes.jsonl").exists()


def test_the_harness_runs_our_tasks_and_its_own(finished, tmp_path, capsys):
    """--tasks by name: one of a folder of ours; and a misspelt one of the harness's."""
    pytest.importorskip("lm_eval", reason="the extra eval is not installed")
    data = write_lines(tmp_path / "tasks" / "sums.jsonl", [{"q": f"{n} + 1 =", "gold": f" {n + 1}"} for n in range(3)])
    (tmp_path / "tasks" / "sums.yaml").write_text(
        f"task: sst_sums\ndataset_path: json\ntest_split: test\ndataset_kwargs:\n  data_files:\n    test: {data}\n"
        "output_type: loglikelihood\ndoc_to_text: q\ndoc_to_target: gold\nmetric_list:\n  - metric: perplexity\n"
    )
    arguments = ["--model", str(finished), "--include", str(tmp_path / "tasks"), "--out", str(tmp_path / "out")]
    assert run(evaluate.main, [*arguments, "--tasks", "sst_sums", "--depth", "1,2"]) == 0
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    perplexities = [result["policies"][depth]["sst_sums"]["perplexity,none"] for depth in ("1", "2")]
    assert perplexities[0] != perplexities[1]
    assert (tmp_path / "out" / "samples-sst_sums-depth-2.jsonl").is_file()
    assert "depth 2" in capsys.readouterr().out
    assert run(evaluate.main, [*arguments, "--tasks", "arc_eesy"]) == 2
    assert "arc_eesy is not a task of the harness; near it: arc_easy" in capsys.readouterr().err


@pytest.mark.parametrize("task", ["gpqa_diamond", "arc_challenge"])
def test_tasks_without_worked_answers_have_no_loss(task, tmp_path, capsys):
    arguments = ["--model", "random:tiny", "--task", task, "--measure", "loss", "--out", str(tmp_path / "out")]
    assert run(evaluate.main, arguments) == 2
    assert f"worked answers, which {task} has none of" in capsys.readouterr().err


def test_a_malformed_row_is_named_by_its_line(tmp_path, capsys):
    write_lines(tmp_path / "test.jsonl", [*gsm8k_lines("test", 2), {"question": "And?", "answer": "It is 7."}])
    arguments = ["--model", "random:tiny", "--task", "gsm8k", "--data", str(tmp_path), "--out", str(tmp_path / "out")]
    assert run(evaluate.main, arguments) == 2
    assert "test.jsonl, line 3: the answer lacks its '####' line" in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_trained_on_the_test_file_is_refused(copied, tmp_path, capsys):
    """As if the run had been trained on a folder whose train.jsonl is the test file."""
    for split in ("train", "test"):
        write_lines(tmp_path / "data" / f"{split}.jsonl", gsm8k_lines("test", 5))
    config = json.loads((copied / "config.json").read_text())
    config["recipe"]["data"] |= {"name": "gsm8k", "path": str(tmp_path / "data"), "limit": 0}
    (copied / "config.json").write_text(json.dumps(config))
    arguments = ["--model", str(copied), "--task", "gsm8k", "--data", str(tmp_path / "data"), "--max-new-tokens", "2"]
    assert run(evaluate.main, [*arguments, "--out", str(tmp_path / "out")]) == 2
    assert "3 of 5 test questions are in the training data of this run" in capsys.readouterr().err
    assert run(evaluate.main, [*arguments, "--allow-overlap", "--out", str(tmp_path / "out")]) == 0
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert len(result["overlap"]["same_question"]) == 3
