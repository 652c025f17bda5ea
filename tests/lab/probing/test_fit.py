"""The halting probe: planted signals found, shuffled labels not, files, routing, and the whole way by the commands."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

import sst_jax
from sst_jax import evaluate, generate
from sst_jax import probe as command
from sst_jax.console.command import run
from sst_jax.errors import InputError
from sst_jax.inference import halting_probe as probes
from sst_jax.inference.policies import Policy, parse, parse_list
from sst_jax.lab.probing import fit, judge, probe_dataset, probing

QUICK = fit.Settings(inputs=6, hidden=3, strengths=(0.1,), steps=60, rate=0.05, permutations=19)


def planted(rng, items=48, positive=29, dimensions=120, shift=1.5, carriers=4):
    """States [n, D] of which a few dimensions differ between the classes, and the labels."""
    labels = rng.permutation(np.arange(items) < positive)
    x = rng.standard_normal((items, dimensions))
    x[:, :carriers] += shift * labels[:, None]
    return 3.0 + 5.0 * x, labels


def test_a_planted_signal_is_found():
    """29 of 48, as published: scores far above the larger class, and above every shuffle of the labels."""
    x, labels = planted(np.random.default_rng(0))
    scores, p = judge.judge(x, labels, QUICK)
    assert scores["auc"]["value"] > 0.85
    assert scores["auc"]["p_permutation"] == pytest.approx(1 / 20)
    assert scores["p_binomial"] < 1e-3
    assert scores["accuracy"]["low"] > scores["majority"]
    assert p.shape == (48,)
    assert scores["capacity"]["parameters"] == 6 * 4 + 2 * 3 + 1


def test_the_penalty_closes_the_gates_of_noise():
    x, labels = planted(np.random.default_rng(8), shift=2.5, carriers=3, dimensions=6)
    gates = [
        fit.fit(x, labels[None], np.ones((1, 48)), np.array([strength]), QUICK)[0]["gate"][0] for strength in (0.0, 1.0)
    ]
    assert (gates[0] != 0.0).all()
    assert (np.abs(gates[1][:3]) > 0.1).any()
    assert (gates[1][3:] == 0.0).any()


def test_noise_is_not_found_and_capacity_says_why_fitting_would():
    x, labels = planted(np.random.default_rng(1), shift=0.0)
    scores, _ = judge.judge(x, labels, QUICK)
    assert scores["auc"]["p_permutation"] > 0.05
    assert scores["p_binomial"] > 0.05
    # Chosen and fitted on the items themselves, even shuffled labels look learnt.
    assert scores["capacity"]["fitted_accuracy_shuffled"] > 0.85


def test_choosing_dimensions_outside_the_folds_would_deceive():
    """The trap that nesting avoids: dimensions chosen with all labels make noise look like a signal."""
    x, labels = planted(np.random.default_rng(2), shift=0.0, dimensions=400)
    null = judge.shuffles(labels, 10, 0)
    inside = judge.auc(fit.out_of_fold(x, null, QUICK), null)
    weights, _ = fit.fit(x, null, np.ones(null.shape), np.full(10, 0.1), QUICK)
    outside = [
        judge.auc(fit.out_of_fold(x[:, chosen], label[None], QUICK), label[None])[0]
        for chosen, label in zip(weights["chosen"], null, strict=True)
    ]
    assert np.mean(inside) < 0.6
    assert np.mean(outside) > 0.75


def test_a_probe_that_reads_nothing_ranks_nothing():
    """With all gates closed every item has one score; the odds of the other items would put each class last."""
    x, labels = planted(np.random.default_rng(9), shift=0.0)
    settings = dataclasses.replace(QUICK, strengths=(50.0,), steps=200)
    p = fit.out_of_fold(x, labels[None], settings)
    assert np.ptp(p) < 1e-3
    assert p.mean() == pytest.approx(29 / 48, abs=0.02)


def test_no_fold_sees_its_own_item():
    """Changing an item's label changes other scores, and its own only by how common the label is in all."""
    x, labels = planted(np.random.default_rng(3), items=20, positive=9, dimensions=30)
    settings = dataclasses.replace(QUICK, strengths=(0.03, 0.3), steps=40)
    one = fit.out_of_fold(x, labels[None], settings)[0]
    turned = labels.copy()
    turned[7] = ~turned[7]
    other = fit.out_of_fold(x, turned[None], settings)[0]
    one, other = (np.log(p / (1 - p)) - fit.log_odds(label) for p, label in ((one, labels), (other, turned)))
    assert one[7] == pytest.approx(other[7], abs=1e-4)
    assert np.abs(np.delete(one - other, 7)).max() > 1e-3


@pytest.mark.slow
def test_shuffled_labels_are_called_a_signal_as_often_as_the_level_says():
    """200 sets of noise, each with 19 shuffles: the permutation test at 5% and the binomial test."""
    rng = np.random.default_rng(4)
    quick = dataclasses.replace(QUICK, inputs=4, hidden=2, steps=30, rate=0.1)
    false = {"permutation": 0, "binomial": 0}
    for _ in range(200):
        x, labels = planted(rng, items=24, positive=14, dimensions=40, shift=0.0)
        scores, _ = judge.judge(x, labels, quick)
        false["permutation"] += scores["auc"]["p_permutation"] <= 0.05
        false["binomial"] += scores["p_binomial"] <= 0.05
    # 10 are expected of the permutation test, which is exact: 3 to 19 in 99.7% of all repetitions.
    assert 3 <= false["permutation"] <= 19
    assert false["binomial"] <= 19


def test_the_penalty_is_chosen_without_the_label_that_is_left_out():
    """Its label is not used in any fit, and must not move the others from one inner fold to the next either."""
    x, labels = planted(np.random.default_rng(9), items=24, positive=12, shift=0.0, dimensions=30)
    settings = dataclasses.replace(QUICK, strengths=(0.1, 0.5))
    used = 1.0 - np.eye(24)
    flipped = np.where(np.eye(24, dtype=bool), ~labels, labels)
    chosen = [fit.choose_strengths(x, each, used, settings) for each in (np.tile(labels, (24, 1)), flipped)]
    np.testing.assert_array_equal(*chosen)


def test_the_sweep_reads_large_states_as_the_probe_does():
    """Variances as differences of squares have no digits left in float32."""
    rng = np.random.default_rng(10)
    x, labels = planted(rng, items=30, positive=16, dimensions=40)
    far = (x + 1e5).astype(np.float32)
    found = judge.sweep(far[:, None], labels, QUICK)[0]["auc"]
    settings = dataclasses.replace(QUICK, permutations=1)
    assert found == pytest.approx(judge.judge(far.astype(np.float64), labels, settings)[0]["auc"]["value"])
    assert found > 0.8


def test_the_sweep_pays_for_looking_at_every_layer():
    rng = np.random.default_rng(5)
    noise = rng.standard_normal((30, 5, 20))
    labels = np.arange(30) < 16
    noise[:, 3, :3] += 2.0 * labels[:, None]
    found = judge.sweep(noise, labels, QUICK)
    assert [record["layer"] for record in found] == list(range(5))
    assert max(found, key=lambda record: record["auc"])["layer"] == 3
    assert found[3]["p_of_the_largest"] == pytest.approx(1 / 20)
    assert min(record["p_of_the_largest"] for record in found if record["layer"] != 3) > 0.05


def test_area_and_curve_equal_scikit_learns():
    metrics = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(6)
    scores, labels = rng.integers(0, 9, (5, 40)) / 9, rng.random((5, 40)) < 0.4
    expected = [metrics.roc_auc_score(label, score) for score, label in zip(scores, labels, strict=True)]
    np.testing.assert_allclose(judge.auc(scores, labels), expected)
    for score, label in zip(scores, labels, strict=True):
        assert metrics.auc(*np.array(judge.roc(score, label)).T) == pytest.approx(metrics.roc_auc_score(label, score))


def items(right, texts=None):
    texts = texts or [("a", "b")] * len(right)
    return [
        probe_dataset.Item(str(n), [2, 3], pair, text) for n, (pair, text) in enumerate(zip(right, texts, strict=True))
    ]


def test_labels_by_their_table():
    some = items([(True, True), (True, False), (False, True), (False, False)] * 4, [("x", "x"), ("x", "y")] * 8)
    expected = {
        "breaks": ([1, 1, 0, 0], [0, 1]), "mends": ([0, 0, 1, 1], [1, 0]), "differs": ([0, 1, 1, 0], [0, 1]),
        "changes": ([1, 1, 1, 1], [0, 1, 0, 1]),
    }  # fmt: skip
    for label, (asked, positive) in expected.items():
        if label in ("breaks", "mends", "differs"):
            some_more = some * 2
        else:
            some_more = some
        found, labels = probe_dataset.asked_about(some_more, label)
        assert found.astype(int).tolist() == asked * (len(some_more) // 4)
        assert labels.astype(int).tolist() == positive * (len(labels) // len(positive))


@pytest.mark.parametrize(
    ("right", "says"), [([(True, False)] * 5, "5 are in question"), ([(True, True)] * 30, "0 of these are positive")]
)
def test_too_few_items_or_one_class_are_named(right, says):
    with pytest.raises(InputError, match=says):
        probe_dataset.asked_about(items(right), "breaks")


def test_a_state_that_is_no_number_is_named():
    x, labels = planted(np.random.default_rng(7), items=14, positive=6)
    x[5, 3] = np.nan
    with pytest.raises(InputError, match="item number 5"):
        judge.judge(x, labels, QUICK)


def test_routing_counts_what_it_breaks_and_mends():
    some = items([(True, False)] * 4 + [(False, True)] * 3 + [(True, True)] * 2 + [(False, False)])
    deep = np.array([True, False, False, False, True, True, False, True, False, True])
    found = judge.routing(some, deep, (1, 4))
    assert found["routing"]["depth 1"] == {"right": 6, "of": 10, "broken": 0, "mended": 0, "depth": 1.0}
    assert found["routing"]["depth 4"] == {"right": 5, "of": 10, "broken": 4, "mended": 3, "depth": 4.0}
    assert found["routing"]["routed"] == {"right": 7, "of": 10, "broken": 1, "mended": 2, "depth": 2.5}
    assert found["harm"]["value"] == pytest.approx(1 / 6)
    assert found["gain"]["value"] == pytest.approx(0.1)
    assert judge.routing(items([(False, True)] * 3), np.ones(3, bool), (1, 4))["harm"] is None


# ---------------------------------------------------------------------------------------------- From a model to a route


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """(folder, model): a tiny one whose stream is strong enough that depth changes answers."""
    made = sst_jax.load("random:tiny").with_stream(alpha=0.15)
    folder = str(made.save(tmp_path_factory.mktemp("models") / "tiny"))
    return folder, sst_jax.load(folder)


@pytest.fixture(scope="module")
def outcomes(model, tmp_path_factory):
    """A folder of `evaluate` at depths 1 and 2, with 40 items."""
    folder = str(tmp_path_factory.mktemp("outcomes") / "words")
    settings = ["--depth", "1,2", "--limit", "40", "--max-new-tokens", "3", "--batch-size", "40"]
    assert run(evaluate.main, ["--model", model[0], "--task", "words", "--out", folder, *settings]) == 0
    return folder


@pytest.fixture(scope="module")
def fitted(model, outcomes, tmp_path_factory):
    """The folder that `probe fit` wrote; the labels say whether the answer changed."""
    folder = tmp_path_factory.mktemp("probe")
    flags = ["--label", "changes", "--depths", "1,2", "--inputs", "4", "--permutations", "19", "--layer", "5"]
    assert run(command.main, ["fit", "--model", model[0], "--outcomes", outcomes, "--out", str(folder), *flags]) == 0
    return folder


@pytest.mark.slow
def test_first_states_are_what_routing_sees(model):
    """The states handed to a probe while generating, and those it is fitted on."""
    _, made = model
    prompts = [made.tokenizer.encode(text) for text in ("12 + 7 =", "Ann has", "x")]
    for first in (1, 3):
        states = probing.first_states(made, prompts, first)
        assert states.shape == (3, 7, 64)
        seen = []
        policy = dataclasses.replace(
            parse("1"), first=first, select_depth=lambda found, seen=seen: seen.append(found) or 1
        )
        made.generate(prompts, depth=policy, max_new_tokens=3)
        np.testing.assert_array_equal(states, seen)


@pytest.mark.slow
def test_fit_writes_a_probe_with_its_provenance(model, outcomes, fitted):
    probe = probes.load(str(fitted / "probe.safetensors"))
    result = json.loads((fitted / "result.json").read_text())
    assert result["scores"] == probe.facts["scores"]
    assert probe.facts["model"] == probes.fingerprint(model[1])
    assert (probe.facts["layer"], probe.facts["depths"], probe.facts["prompt"]) == (5, [1, 2], "last")
    assert result["scores"]["items"] == 40
    assert (fitted / "probe.png").stat().st_size > 1000
    assert sum(result["scores"]["routing"]["routed"][name] for name in ("broken", "mended")) <= 40


@pytest.mark.slow
def test_a_probe_routes_generation_and_evaluation(model, fitted, outcomes, tmp_path, capsys):
    """apply, generate --halt and evaluate --depth probe:FILE take the same decisions."""
    file, (folder, made) = str(fitted / "probe.safetensors"), model
    rows = [json.loads(line) for line in Path(outcomes, "items.jsonl").read_text().splitlines()[:8]]
    asked = tmp_path / "prompts.jsonl"
    prompts = [f"Question: {row['question']}\nAnswer:" for row in rows]
    asked.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    decided = tmp_path / "decided.json"
    arguments = ["apply", "--model", folder, "--probe", file, "--prompts", str(asked), "--json", str(decided)]
    assert run(command.main, arguments) == 0
    depths = [found["depth"] for found in json.loads(decided.read_text())["decisions"]]
    assert set(depths) <= {1, 2}
    out = tmp_path / "routed"
    settings = ["--limit", "8", "--max-new-tokens", "3", "--batch-size", "8", "--depth", f"1,2,probe:{file}"]
    assert run(evaluate.main, ["--model", folder, "--task", "words", "--out", str(out), *settings]) == 0
    by_policy = {}
    for line in (out / "outcomes.jsonl").read_text().splitlines():
        outcome = json.loads(line)
        by_policy.setdefault(outcome["policy"], []).append(outcome["output"])
    # The first position has had its one iteration when the probe chooses; the depth is that of all later ones.
    expected = made.generate(prompts, depth=[Policy("", 1, depth) for depth in depths], max_new_tokens=3)
    routed = by_policy[probes.load(file).policy.name]
    assert routed == [answer.text for answer in expected]
    assert all(routed[row] == by_policy["1"][row] for row, depth in enumerate(depths) if depth == 1)
    written = tmp_path / "halted.json"
    settings = ["--prompts", str(asked), "--max-new-tokens", "4", "--json", str(written)]
    assert run(generate.main, ["--model", folder, "--halt", file, *settings]) == 0
    answers = json.loads(written.read_text())["answers"]
    assert [answer["depths"][1:] for answer in answers] == [
        [depth] * (len(answer["depths"]) - 1) for depth, answer in zip(depths, answers, strict=True)
    ]
    capsys.readouterr()


@pytest.mark.slow
def test_a_probe_of_another_model_is_refused(model, fitted, capsys):
    file, (_, made) = str(fitted / "probe.safetensors"), model
    probe = probes.load(file)
    probe.check(made)
    with pytest.raises(InputError, match="fitted on another model"):
        probe.check(made.with_stream(alpha=0.07))
    with pytest.raises(InputError, match="needs a model with a stream"):
        probe.check(made.without_stream())
    with pytest.raises(InputError, match="the model has"):
        probe(np.zeros((3, 64)))
    with pytest.raises(InputError, match="not a number"):
        probe(np.full((7, 64), np.nan))
    for main in (generate.main, evaluate.main):
        rest = ["--prompt", "x"] if main is generate.main else ["--task", "words", "--out", "unused"]
        assert run(main, ["--model", "random:tiny", "--depth", f"probe:{file}", *rest]) == 2
        assert "stream" in capsys.readouterr().err


@pytest.mark.slow
def test_requests_cannot_open_files(fitted):
    with pytest.raises(InputError, match="is not one of"):
        parse(f"probe:{fitted / 'probe.safetensors'}")
    policies = parse_list(f"1,probe:{fitted / 'probe.safetensors'}", files=True)
    assert [policy.max_depth for policy in policies] == [1, 2]


@pytest.mark.slow
def test_damaged_probes_are_named(fitted, tmp_path):
    good = probes.load(str(fitted / "probe.safetensors"))
    metadata = {"format": probes.FORMAT, "probe": json.dumps(good.facts)}

    def written(name, weights, metadata):
        save_file({key: np.ascontiguousarray(part) for key, part in weights.items()}, tmp_path / name, metadata)
        return str(tmp_path / name)

    without = {name: part for name, part in good.weights.items() if name != "out"}
    broken = {
        "stranger": (good.weights, {"format": "pt"}, "is no probe"),
        "poor": (without, metadata, "lacks out"),
        "bent": (good.weights | {"gate": np.ones(9, np.float32)}, metadata, "gate should be"),
        "nan": (good.weights | {"mean": np.full(4, np.nan, np.float32)}, metadata, "mean should be"),
        "far": (good.weights | {"chosen": np.array([0, 1, 2, 64], np.int32)}, metadata, "chosen names"),
    }
    for name, (weights, facts, says) in broken.items():
        with pytest.raises(InputError, match=says):
            probes.load(written(name, weights, facts))
    for name, content in (("empty", b""), ("text", b"no probe at all")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match=f"{name} cannot be read"):
            probes.load(str(tmp_path / name))


@pytest.mark.parametrize(
    ("flags", "culprit"),
    [
        (["--label", "breaks"], "of 40 items"),
        (["--depths", "4,1"], "--depths 4,1"),
        (["--depths", "1,3"], "no outcomes at depth 3"),
        (["--depths", "1,2", "--layer", "7"], "--layer 7"),
        (["--first", "0"], "--first 0"),
        (["--outcomes", "/nowhere"], "/nowhere"),
        (["--depths", "1,2", "--model", "random:tiny"], "no stream"),
    ],
)
@pytest.mark.slow
def test_fit_names_what_is_wrong(model, outcomes, tmp_path, capsys, flags, culprit):
    usual = {"--model": model[0], "--outcomes": outcomes, "--out": str(tmp_path), "--depths": "1,2"}
    usual |= dict(zip(flags[::2], flags[1::2], strict=True))
    assert run(command.main, ["fit", *(part for pair in usual.items() for part in pair)]) == 2
    message = capsys.readouterr().err
    assert culprit in message
    assert message.count("\n") == 1


@pytest.mark.slow
def test_outcomes_of_another_model_are_refused(outcomes, tmp_path, capsys):
    other = str(sst_jax.load("random:tiny").with_stream(alpha=0.09).save(tmp_path / "other"))
    arguments = ["fit", "--model", other, "--outcomes", outcomes, "--out", str(tmp_path / "out"), "--depths", "1,2"]
    assert run(command.main, arguments) == 2
    assert "another model" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("foreign", [0, 1])
def test_outcomes_of_two_models_are_refused_in_either_order(model, outcomes, tmp_path, foreign):
    """One depth is another model's: whichever folder comes last, nothing is fitted."""
    folders = []
    for number, depth in enumerate(("1", "2")):
        folder = Path(shutil.copytree(outcomes, tmp_path / depth))
        lines = [json.loads(line) for line in (folder / "outcomes.jsonl").read_text().splitlines()]
        kept = [json.dumps(line) + "\n" for line in lines if line["policy"] == depth]
        (folder / "outcomes.jsonl").write_text("".join(kept))
        header = json.loads((folder / "evaluation.json").read_text())
        header["model"]["digest"] = "0" * 64 if number == foreign else header["model"]["digest"]
        (folder / "evaluation.json").write_text(json.dumps(header))
        folders.append(str(folder))
    provenance, tokenizer = model[1].provenance, model[1].tokenizer
    for order in (folders, folders[::-1]):
        with pytest.raises(InputError, match=f"{folders[foreign]} has the outcomes of another model"):
            probe_dataset.items(probe_dataset.read(order, (1, 2)), (1, 2), tokenizer, provenance)


@pytest.mark.slow
def test_generating_refuses_a_probe_of_another_model_however_it_is_asked_for(model, fitted, tmp_path, capsys):
    other = str(sst_jax.load("random:tiny").with_stream(alpha=0.2).save(tmp_path / "other"))
    file = str(fitted / "probe.safetensors")
    for flags in (["--halt", file], ["--depth", f"probe:{file}"]):
        assert run(generate.main, ["--model", other, "--prompt", "x", *flags]) == 2
        assert "fitted on another model" in capsys.readouterr().err
