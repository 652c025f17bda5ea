"""Evaluations that are cut off anywhere and go on to the same outcomes."""

import json
import random
import shutil

import numpy as np
import pytest

from sst_jax.data.prompts import render
from sst_jax.data.tasks import find
from sst_jax.errors import InputError
from sst_jax.inference.policies import parse_list
from sst_jax.lab.evaluation import report, runner, summary
from sst_jax.lab.evaluation.scoring import Scores
from sst_jax.model import rules
from sst_jax.model.scales import LayerScales, scalars

POLICIES = parse_list("1,3")
HEADER = {"task": "words", "environment": {"jax": "1"}}


@pytest.fixture(scope="module")
def items():
    return find("words").read(None)[:5]


@pytest.fixture(scope="module")
def measure(streaming, items):
    """Answers of eight tokens; each batch is computed once in this module, and counted."""
    prompt = runner.prompts(streaming, items, "plain", 8)
    known, calls = {}, []

    def answer(batch):
        calls.append(batch)
        key = tuple(batch.keys)
        if key not in known:
            known[key] = runner.answer(streaming, find("words"), prompt, [], 8, False, batch)
        return known[key]

    answer.calls = calls
    return answer


def evaluate(path, items, measure, header=HEADER):
    folder = runner.Folder(path, header, items)
    try:
        return runner.run_batches(folder, runner.batches(POLICIES, items, 2), measure, lambda count: None)
    finally:
        folder.close()


@pytest.fixture(scope="module")
def finished(tmp_path_factory, items, measure):
    path = tmp_path_factory.mktemp("finished") / "out"
    return path, evaluate(path, items, measure)


def test_outcomes_say_all_that_is_promised(finished, items, streaming):
    path, outcomes = finished
    assert [(o["policy"], o["id"]) for o in outcomes] == [(p, i.id) for p in ("1", "3") for i in items]
    assert runner.read_outcomes(path) == outcomes
    first = outcomes[0]
    own = streaming.generate([runner.prompts(streaming, items, "plain", 8)[items[0].id]], max_new_tokens=8)[0]
    assert first["output"] == own.text
    assert first["new_tokens"] == len(own.tokens)
    assert first["truncated"] is not own.finished
    assert first["depth"] == 1.0
    assert 1.0 < outcomes[-1]["depth"] <= 3.0
    assert len({o["prompt_sha256"] for o in outcomes}) == len(items)
    written = [json.loads(line) for line in (path / "items.jsonl").read_text().splitlines()]
    assert [item["question"] for item in written] == [item.problem.question for item in items]


@pytest.mark.parametrize("seed", range(12))
def test_cut_off_at_any_byte_it_goes_on_to_the_same_outcomes(finished, items, measure, tmp_path, seed):
    path, outcomes = finished
    copy = tmp_path / "out"
    shutil.copytree(path, copy)
    content = (copy / "outcomes.jsonl").read_bytes()
    (copy / "outcomes.jsonl").write_bytes(content[: random.Random(seed).randrange(len(content))])
    assert evaluate(copy, items, measure) == outcomes
    assert (copy / "outcomes.jsonl").read_bytes() == content


def test_finished_batches_are_not_computed_again(finished, items, measure, tmp_path):
    path, _ = finished
    copy = tmp_path / "out"
    shutil.copytree(path, copy)
    lines = (copy / "outcomes.jsonl").read_text().splitlines(keepends=True)
    (copy / "outcomes.jsonl").write_text("".join(lines[:3]))  # a batch of two, and half of another
    measure.calls.clear()
    evaluate(copy, items, measure)
    assert [len(batch.items) for batch in measure.calls] == [2, 1, 2, 2, 1]


def test_a_broken_line_in_the_middle_is_not_overlooked(finished, items, measure, tmp_path):
    path, _ = finished
    copy = tmp_path / "out"
    shutil.copytree(path, copy)
    lines = (copy / "outcomes.jsonl").read_text().splitlines(keepends=True)
    lines[1] = lines[1][:20] + "\n"
    (copy / "outcomes.jsonl").write_text("".join(lines))
    with pytest.raises(InputError, match=r"outcomes\.jsonl, line 2: not an outcome"):
        evaluate(copy, items, measure)


def test_another_evaluation_in_the_folder_is_refused(finished, items, measure, tmp_path):
    path, _ = finished
    with pytest.raises(InputError, match=r"another evaluation \(task: 'words' there, 'gsm8k' now\)"):
        evaluate(path, items, measure, {**HEADER, "task": "gsm8k"})
    evaluate(path, items, measure, {**HEADER, "environment": {"jax": "2"}})
    (tmp_path / "notes").write_text("mine")
    with pytest.raises(InputError, match="holds notes but no evaluation"):
        evaluate(tmp_path, items, measure)
    with pytest.raises(InputError, match="is not a folder"):
        evaluate(tmp_path / "notes", items, measure)


def test_two_processes_cannot_write_into_one_folder(items, tmp_path):
    first = runner.Folder(tmp_path / "out", HEADER, items)
    with pytest.raises(InputError, match="another process is evaluating"):
        runner.Folder(tmp_path / "out", HEADER, items)
    first.close()


def test_prompts_that_leave_no_room_are_named(plain, items):
    with pytest.raises(InputError, match="--max-new-tokens 4095 exceed the model's 4096 positions"):
        runner.prompts(plain, items, "plain", 4095)


@pytest.mark.fast_cases(1)
@pytest.mark.parametrize("format", ["plain", "chat"])
def test_losses_are_those_of_training(streaming, items, format):
    """Against training's own held-out loss, with the exact recurrence."""
    from sst_jax.data.loader import Layout, fixed_batches
    from sst_jax.data.prompts import render
    from sst_jax.training.step import ForwardConfig, batch_losses

    outcomes = runner.losses(streaming, format, runner.Batch(parse_list("1")[0], items))
    examples = [render(item.problem, streaming.tokenizer, format) for item in items]
    (batch,) = fixed_batches(examples, Layout(1024, len(items), pack=False))
    ids = batch.pop("ids")
    assert [row[0] for row in ids] == [outcome["id"] for outcome in outcomes]
    trainable = {name: streaming.params[name] for name in ("adapter", "blend")}
    losses = batch_losses(
        streaming.config, ForwardConfig("exact", remat="none"), streaming.params["base"], trainable, batch
    )
    np.testing.assert_allclose([outcome["loss"] for outcome in outcomes], losses.sum(axis=1), rtol=1e-5)
    assert [outcome["answer_tokens"] for outcome in outcomes] == batch["answer_mask"].sum(axis=1).tolist()
    assert not any(outcome["greedy"] for outcome in outcomes)  # a random model


def test_an_answer_counts_as_written_when_every_token_is_the_likeliest(streaming, items, monkeypatch):
    greedy = [np.array([True, True]), np.array([True, False]), np.array([False, True])]
    scores = [Scores(np.array([-0.5, -0.25]), row) for row in greedy]
    monkeypatch.setattr(runner, "score_and_scales", lambda *_: (scores, LayerScales(np.ones((7, 1)), None)))
    outcomes = runner.losses(streaming, "plain", runner.Batch(parse_list("1")[0], items[:3]))
    assert [outcome["greedy"] for outcome in outcomes] == [True, False, False]
    assert [outcome["loss"] for outcome in outcomes] == [0.75] * 3


@pytest.mark.parametrize("depth", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_scales_are_the_roots_of_mean_squares_over_all_items(streaming, items, depth):
    """Against the states of the texts one by one, and over batches of unequal length."""
    policy = parse_list(str(depth))[0]
    outcomes = [
        outcome
        for batch in runner.batches([policy], items, 2)
        for outcome in runner.losses(streaming, "plain", batch)
    ]  # fmt: skip
    assert [("rms" in outcome) for outcome in outcomes] == [True, False, True, False, True]
    found = summary.summarise(items, outcomes, "loss")["policies"][str(depth)]["rms"]
    squares, positions = {}, 0
    for item in items:
        example = render(item.problem, streaming.tokenizer, "plain")
        tokens = example.tokens[None, : example.answer_mask.nonzero()[0][-1] + 1]
        _, scales = rules.hidden_and_scales(streaming.config, streaming.params, tokens, forward="exact", depth=depth)
        for name, value in scalars(scales).items():
            squares[name] = squares.get(name, 0.0) + value**2 * tokens.shape[1]
        positions += tokens.shape[1]
    assert {name.split("/")[1] for name in found} == {"residual", "state"}
    assert found == {name: pytest.approx((value / positions) ** 0.5, rel=1e-4) for name, value in squares.items()}
    assert "RMS by layer: residual stream" in report.scales_line(found)
    assert ", states " in report.scales_line(found)


def outcome(policy, number, strict, **more):
    return {
        "id": f"i{number}", "policy": policy, "strict": strict, "flexible": strict, "correct": strict == "1",
        "correct_flexible": strict == "1", "truncated": False, "second_opinion": None, "new_tokens": 4, "depth": 1.0,
        "seconds": 0.1, **more,
    }  # fmt: skip


def test_summary_counts_broken_mended_and_the_oracle(items):
    answers = {"1": ["1", "1", "2", None, "3"], "4": ["1", "2", "1", "1", "3"]}
    outcomes = [outcome(policy, n, strict) for policy, row in answers.items() for n, strict in enumerate(row)]
    found = summary.summarise(items, outcomes, "answers")
    assert found["policies"]["1"]["strict"]["right"] == 2
    assert found["policies"]["4"]["strict"]["value"] == 0.6
    assert found["policies"]["1"]["unparsed"] == {"strict": 1, "flexible": 1}
    (change,) = found["between_policies"]
    assert (change["broken_items"], change["mended_items"], change["changed"]) == (["i1"], ["i2", "i3"], 3)
    assert change["p"] == change["p_holm"] == 1.0
    assert found["oracle"]["union"]["right"] == 4
    # Three of five answers are redrawn, each right with the first policy's score of 2 in 5.
    assert found["oracle"]["noise_control"]["value"] == pytest.approx(0.4 + 0.6 * 0.6 * 0.4)


def test_summary_counts_disagreeing_opinions(items):
    rows = [outcome("1", n, "1" if n < 2 else "2", second_opinion=n in (0, 3)) for n in range(5)]
    found = summary.summarise(items, rows, "answers")["policies"]["1"]["second_opinion"]
    assert found["asked"] == 5
    assert found["right"] == 2
    assert found["only_strict_says_right"] == ["i1"]
    assert found["only_second_says_right"] == ["i3"]


def test_summary_of_losses_weighs_tokens(items):
    rows = [{"id": str(n), "policy": "1", "loss": loss, "answer_tokens": size, "greedy": n == 1, "seconds": 0.0}
            for n, (loss, size) in enumerate([(10.0, 5), (2.0, 15)])]  # fmt: skip
    found = summary.summarise(items, rows, "loss")["policies"]["1"]
    assert found["nats_per_token"]["value"] == pytest.approx(12 / 20)
    assert found["answer_tokens"] == 20
    assert (found["greedy"]["right"], found["greedy"]["value"]) == (1, 0.5)
