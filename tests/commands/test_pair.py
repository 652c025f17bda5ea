"""pair: the arms of a matched comparison, trained and measured with one command."""

import json

import pytest

from sst_jax import pair
from sst_jax.console.command import run
from sst_jax.lab.planning.compile import training_work
from sst_jax.lab.studies import arms, pairs
from sst_jax.training import recipe
from sst_jax.weights.checkpoint import read_metrics
from sst_jax.weights.loading import resolve
from tests.support.runs import SMALL, TINY

ARGUMENTS = ["--config", TINY, *SMALL, "--arms", "stream,baseline,compute", "--task", "words", "--limit", "3"]


@pytest.fixture(scope="module")
def paired(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("paired") / "pair"
    assert run(pair.main, [*ARGUMENTS, "--workdir", str(workdir)]) == 0
    return workdir


def resolved(*overrides):
    return recipe.resolve(recipe.read(TINY, [*SMALL, *overrides]))


@pytest.mark.slow
def test_arms_differ_in_what_they_say_and_nothing_else(paired):
    record = json.loads((paired / "arms.json").read_text())["arms"]
    assert record["stream"]["differences"] == []
    assert record["baseline"]["differences"] == [{"key": "stream.on", "stream": True, "baseline": False}]
    assert [part["key"] for part in record["compute"]["differences"]] == ["stream.on", "train.steps"]
    for arm in record:
        assert json.loads((paired / f"{arm}-0" / "config.json").read_text())["recipe"] == record[arm]["resolved"]


@pytest.mark.slow
def test_all_arms_see_the_same_batches_in_the_same_order(paired):
    tokens = {
        arm: [line["answer_tokens"] for line in read_metrics(paired / f"{arm}-0") if line["step"]]
        for arm in ("stream", "baseline", "compute")
    }
    assert tokens["stream"] == tokens["baseline"] == tokens["compute"][: len(tokens["stream"])]
    assert len(tokens["compute"]) > len(tokens["stream"])


@pytest.mark.slow
def test_the_result_compares_stream_with_every_arm(paired):
    result = json.loads((paired / "result.json").read_text())
    assert set(result["comparisons"]) == {"baseline", "compute"}
    for arm in ("baseline", "compute"):
        losses = [
            json.loads((paired / "evaluations" / f"{name}-0" / "result.json").read_text())["policies"]["1"]
            for name in ("stream", arm)
        ]
        expected = losses[0]["nats_per_token"]["value"] - losses[1]["nats_per_token"]["value"]
        assert result["comparisons"][arm][0]["difference"] == pytest.approx(expected)
        assert (paired / f"stream-against-{arm}" / "compare.png").is_file()
    assert result["results"]["compute"][0]["steps"] == result["arms"]["compute"]["steps"]


def test_one_table_ends_it_with_every_difference(capsys):
    found = {"difference": -0.25, "over_items": {"low": -0.5, "high": 0.125}}
    seeds = {"over_seeds": {"low": None, "high": None}}
    comparisons = {"baseline": [{"A": "1", "B": "1", **found}, {"A": "4", "B": "1", **found, **seeds}]}
    pairs.print_differences({"seeds": [0], "comparisons": comparisons})
    *_, header, one, other = capsys.readouterr().out.splitlines()
    assert header.split()[:2] == ["arm", "depth"]
    assert one.split() == ["baseline", "1", "-0.25", "[-0.5,", "0.125]"]
    assert other.split() == ["baseline", "4", "v", "1", "-0.25", "[-0.5,", "0.125]"]


@pytest.mark.slow
def test_what_is_finished_is_not_done_again(paired, monkeypatch):
    for name in ("fit", "load"):
        monkeypatch.setattr(pairs, name, None)
    before = json.loads((paired / "result.json").read_text())
    assert run(pair.main, [*ARGUMENTS, "--workdir", str(paired)]) == 0
    assert json.loads((paired / "result.json").read_text()) == before


def test_more_steps_for_the_baseline_cost_what_the_stream_costs():
    stream, backbone = resolved(), resolve("random:tiny").backbone
    costs = arms.costs(stream, resolved(arms.OFF), backbone)
    assert 1.5 < costs.ratio < 2.1
    compute = resolved(*arms.overrides("compute", stream, costs))
    spent = compute.train.steps * training_work(compute, backbone).flops
    assert spent == pytest.approx(stream.train.steps * costs.stream_flops, rel=0.5 / stream.train.steps)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("drawn", "low", "high"),
    [
        (["--config.stream.depths=(1,2,3,4)"], 2.2, 20.0),
        (["--config.stream.mix_share=1.0", "--config.stream.mix_passes=6"], 4.0, 7.0),
        (["--config.stream.mix_share=0.5", "--config.stream.mix_passes=6"], 3.0, 4.5),
    ],
)
def test_the_control_of_a_stream_with_drawn_depths_or_passes_has_their_average_flops(drawn, low, high):
    stream, baseline, backbone = resolved(*drawn), resolved(arms.OFF), resolve("random:tiny").backbone
    ratio = arms.costs(stream, baseline, backbone).ratio
    assert low < ratio < high
    each = [share * training_work(stream.with_schedule(one), backbone).flops for share, one in stream.forward.draws()]
    assert ratio == pytest.approx(sum(each) / training_work(baseline, backbone).flops)


def test_parameters_of_layers_without_a_state_are_not_matched():
    costs = arms.costs(resolved("--config.stream.layers=(0,3)"), resolved(arms.OFF), resolve("random:tiny").backbone)
    assert costs.blend_parameters == 2 * 64


def test_a_larger_rank_has_at_least_the_streams_parameters_and_the_same_scale():
    stream = resolved()
    costs = arms.costs(stream, resolved(arms.OFF), resolve("random:tiny").backbone)
    assert costs.blend_parameters == 7 * 64
    larger = resolved(*arms.overrides("parameters", stream, costs)).adapter
    added = (larger.rank - stream.adapter.rank) * costs.parameters_a_rank
    assert costs.blend_parameters <= added < costs.blend_parameters + costs.parameters_a_rank
    assert larger.scale == pytest.approx(stream.adapter.scale)


@pytest.mark.slow
def test_the_memoryless_arm_computes_the_same_whatever_came_before():
    """Its blend is a learned shrink: a position's states do not reach the next."""
    import dataclasses

    import numpy as np

    from sst_jax.model import rules
    from tests.support import toys

    memoryless = resolved(*arms.overrides("memoryless", resolved(), arms.Costs(2.0, 1.0, 0, 1)))
    config = dataclasses.replace(toys.config(), stream=memoryless.stream.config)
    params, tokens = toys.params(config), toys.tokens(2, 12)
    outputs = [np.asarray(rules.hidden(config, params, tokens, forward=name)) for name in ("two_pass", "exact")]
    np.testing.assert_allclose(outputs[0], outputs[1], atol=1e-5)
    plain = rules.hidden(toys.config(), {**params, "blend": {}}, tokens, forward="plain")
    assert np.abs(outputs[0] - np.asarray(plain)).max() > 0.01
    remembering = dataclasses.replace(config, stream=dataclasses.replace(config.stream, gain=1.0))
    two, exact = (rules.hidden(remembering, params, tokens, forward=name) for name in ("two_pass", "exact"))
    assert np.abs(np.asarray(two) - np.asarray(exact)).max() > 1e-3


@pytest.mark.parametrize(
    ("arguments", "culprit"),
    [
        (["--arms", "stream,basline"], "--arms basline is unknown; arms are stream, baseline"),
        (["--arms", "stream"], "needs stream, and something to compare it with"),
        (["--arms", "stream,stream"], "names stream twice"),
        (["--seeds", "0"], "--seeds 0"),
        (["--task", "gsm9k"], "--task gsm9k is unknown"),
        (["--task", "words", "--limit", "-3"], "--limit -3"),
        (["--task", "words", "--batch-size", "0"], "--batch-size 0"),
        (["--task", "words", "--depth", "deep"], "deep"),
        (["--task", "words", "--depth", "first_token:4"], "scored at flat depths"),
        (["--task", "gsm8k", "--data", "nowhere"], "nowhere"),
        (["--task", "gpqa_diamond"], "--measure loss needs worked answers"),
        (["--config.stream.on=False"], "the recipe has its stream off"),
        (["--config.adapter.rank=0"], "adapter.rank=0"),
        (["--config.stream.alpha=0.03", "--arms", "stream,parameters"], "the arm parameters has nothing to match"),
        (["--config.stream.alhpa=0.03"], "alhpa"),
    ],
)
def test_pair_refuses_in_one_line(arguments, culprit, tmp_path, capsys):
    assert run(pair.main, ["--config", TINY, *arguments, "--workdir", str(tmp_path / "pair")]) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ")
    assert message.count("\n") == 1
    assert culprit in message
    assert not list(tmp_path.glob("pair/*-0"))


@pytest.mark.slow
def test_a_folder_of_another_pair_is_refused_before_anything_is_trained(paired, capsys):
    before = (paired / "arms.json").read_bytes()
    assert run(pair.main, [*ARGUMENTS, "--config.optimizer.learning_rate=0.5", "--workdir", str(paired)]) == 2
    assert "holds a run of another config" in capsys.readouterr().err
    assert (paired / "arms.json").read_bytes() == before


@pytest.mark.slow
@pytest.mark.parametrize(
    "other", [["--limit", "2"], ["--task", "boxes"], ["--measure", "answers"]], ids=lambda part: part[0]
)
def test_other_settings_of_an_evaluation_are_not_answered_with_the_old_one(paired, capsys, other):
    before = (paired / "result.json").read_bytes()
    assert run(pair.main, [*ARGUMENTS, *other, "--workdir", str(paired)]) == 2
    assert "holds another evaluation" in capsys.readouterr().err
    assert (paired / "result.json").read_bytes() == before
