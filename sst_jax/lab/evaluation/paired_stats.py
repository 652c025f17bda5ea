"""Two evaluations, item by item: what differs between them, and what the difference is worth.

A side is one evaluation, or several that differ in the training seed alone. Where both sides measured a policy, it is
compared with itself; a policy that only one side has is compared with the other side's first one (a baseline knows no
depth). Holm's adjustment runs over all those comparisons.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from sst_jax.console.command import folder_for, write_json
from sst_jax.console.figure import Axes, new_figure
from sst_jax.errors import InputError
from sst_jax.files import diff, read_json
from sst_jax.lab.evaluation.runner import HEADER, RESULT, Outcome, by_policy, read_outcomes
from sst_jax.lab.statistics import bootstrap_mean, clustered_mean, finite, holm, mcnemar, t_mean
from sst_jax.types import Json

# What must agree, or the items are not the same test; all else that differs is shown.
SAME = ("task", "measure", "items", "items_sha256")
EXPECTED = ("model", "environment", "policies", "overlap", "data")  # what two sides may differ in without a word


class Side(NamedTuple):
    """Evaluations of one model under several training seeds: headers, results, and outcomes by policy."""

    paths: list[Path]
    headers: list[Json]
    results: list[Json]
    outcomes: list[dict[str, list[Outcome]]]

    @property
    def policies(self) -> list[str]:
        return self.headers[0]["policies"]


def read_side(folders: Sequence[str | Path]) -> Side:
    """Return the evaluations in one folder, or in several, one a seed.

    Raises: InputError naming the folder that is no finished evaluation, or not of the same test as the first.
    """
    paths = [Path(folder) for folder in folders]
    headers, results, outcomes = [], [], []
    for path in paths:
        if not (path / HEADER).is_file():
            if (path / RESULT).is_file() and "tasks" in read_json(path / RESULT):
                raise InputError(f"{path} was evaluated with --tasks; compare takes evaluations with --task")
            raise InputError(f"{path} is not an evaluation: it holds no {HEADER}")
        if not (path / RESULT).is_file():
            raise InputError(f"{path}: the evaluation is not finished; the command that began it resumes it")
        headers.append(read_json(path / HEADER))
        results.append(read_json(path / RESULT))
        if "choose" in results[-1].get("stages", {}):
            raise InputError(f"{path} chose a setting on half of its documents: its result.json holds its comparisons")
        outcomes.append(dict(by_policy(read_outcomes(path))))
        check_same(paths[0], headers[0], path, headers[-1])
        if headers[-1]["policies"] != headers[0]["policies"]:
            raise InputError(f"{path} has the policies {headers[-1]['policies']}, {paths[0]} {headers[0]['policies']}")
    return Side(paths, headers, results, outcomes)


def check_same(one: Path, header: Json, other: Path, against: Json) -> None:
    """Raise InputError where two evaluations are not of the same items."""
    for key in SAME:
        if header.get(key) != against.get(key):
            raise InputError(
                f"{one} and {other} are not the same test: {key} is {header.get(key)} and {against.get(key)}"
            )


def compare(a: Sequence[str | Path], b: Sequence[str | Path], out: str | Path | None = None) -> Json:
    """Compare two evaluations of the same items, or of the same seeds.

    Args:
        a, b: folders of evaluations on each side, one a training seed, in the same order.
        out: result.json, compare.png and, of answers, differing_items.jsonl go here; None: nothing is written.

    Returns:
        Every comparison, JSON-ready; differences are A minus B.

    Raises: InputError as `read_side` and `compare_sides`, and where `out` holds an evaluation.
    """
    if out is not None and (Path(out) / HEADER).is_file():
        raise InputError(f"--out {out} holds an evaluation, whose result would be lost: choose another folder")
    folder = None if out is None else folder_for("--out", out)
    one, other = read_side(a), read_side(b)
    result = compare_sides(one, other)
    if folder is not None:
        figure(result, folder / "compare.png")
        if result["measure"] == "answers":
            with (folder / "differing_items.jsonl").open("w", encoding="utf-8") as file:
                file.writelines(json.dumps(item) + "\n" for item in differing_items(one, other))
        write_json(folder / RESULT, result)
    return result


def compare_sides(a: Side, b: Side) -> Json:
    """Return every comparison of the two sides, JSON-ready; differences are A minus B.

    Raises: InputError where they are not of the same test, or not of the same number of seeds.
    """
    check_same(a.paths[0], a.headers[0], b.paths[0], b.headers[0])
    if len(a.paths) != len(b.paths):
        raise InputError(f"A has {len(a.paths)} evaluations and B {len(b.paths)}: give both sides the same seeds")
    loss = a.headers[0]["measure"] == "loss"
    records = [(compare_losses if loss else compare_answers)(a, b, *pair) for pair in pairs(a.policies, b.policies)]
    if not loss:
        for record, adjusted in zip(records, holm([record["p"] for record in records]), strict=True):
            record["p_holm"] = adjusted
    settings = [found for found in diff(a.headers[0], b.headers[0]) if found[0].split(".")[0] not in EXPECTED]
    oracles = {name: side.results[0]["oracle"] for name, side in (("A", a), ("B", b)) if "oracle" in side.results[0]}
    return {
        "task": a.headers[0]["task"],
        "measure": a.headers[0]["measure"],
        "items": a.headers[0]["items"],
        "A": [str(path) for path in a.paths],
        "B": [str(path) for path in b.paths],
        "settings_that_differ": [{"key": key, "A": old, "B": new} for key, old, new in settings],
        "scores": {name: scores(side) for name, side in (("A", a), ("B", b))},
        "comparisons": records,
        **({"oracles": oracles} if oracles else {}),
    }


def pairs(a: Sequence[str], b: Sequence[str]) -> list[tuple[str, str]]:
    """Return (policy of A, policy of B) to compare."""
    both = [(policy, policy) for policy in a if policy in b]
    only_a = [(policy, b[0]) for policy in a if policy not in b]
    only_b = [(a[0], policy) for policy in b if policy not in a]
    return list(dict.fromkeys([*both, *only_a, *only_b]))  # with one policy against others, both lists name the first


def scores(side: Side) -> dict[str, list[Json]]:
    """Return by policy one score a seed with its interval."""
    field = "nats_per_token" if side.headers[0]["measure"] == "loss" else "strict"
    return {policy: [result["policies"][policy][field] for result in side.results] for policy in side.policies}


def matched(a: list[Outcome], b: list[Outcome]) -> list[tuple[Outcome, Outcome]]:
    """Return outcomes of the same items, in A's order."""
    there = {outcome["id"]: outcome for outcome in b}
    return [(outcome, there[outcome["id"]]) for outcome in a]


def compare_answers(a: Side, b: Side, policy: str, other: str) -> Json:
    """Compare the answers of one policy pair: discordant items, McNemar on the first seed, intervals over
    all.
    """
    seeds = [matched(x[policy], y[other]) for x, y in zip(a.outcomes, b.outcomes, strict=True)]
    differences = np.array([[int(x["correct"]) - int(y["correct"]) for x, y in rows] for rows in seeds])
    only_a, only_b = ([x["id"] for x, y in seeds[0] if (x["correct"], y["correct"]) == way] for way in (A_ONLY, B_ONLY))
    each = discordant(differences)
    return {
        "A": policy,
        "B": other,
        **over_items_and_seeds(differences),
        "only_A": len(only_a),
        "only_B": len(only_b),
        "p": each[0]["p"],
        "seeds": each,
        "only_A_items": only_a,
        "only_B_items": only_b,
    }


A_ONLY, B_ONLY = (True, False), (False, True)


def compare_losses(a: Side, b: Side, policy: str, other: str) -> Json:
    """Compare losses of one policy pair, in nats per answer token."""
    seeds = [matched(x[policy], y[other]) for x, y in zip(a.outcomes, b.outcomes, strict=True)]
    for x, y in seeds[0]:
        if x["answer_tokens"] != y["answer_tokens"]:
            raise InputError(f"{x['id']} has {x['answer_tokens']} answer tokens in A and {y['answer_tokens']} in B")
    length = np.mean([x["answer_tokens"] for x, _ in seeds[0]])
    differences = np.array([[x["loss"] - y["loss"] for x, y in rows] for rows in seeds]) / length
    better = int((differences.mean(axis=0) < 0).sum())
    record = {"A": policy, "B": other, **over_items_and_seeds(differences), "items_better_in_A": better}
    if all("document" in x for x, _ in seeds[0]):  # windows of one text are no independent items
        totals: dict[int, list[float]] = {}
        for (x, _), value in zip(seeds[0], differences.mean(axis=0), strict=True):
            totals.setdefault(x["document"], []).append(float(value))
        record["over_documents"] = finite(clustered_mean([np.array(values) for values in totals.values()]))
    if all("greedy" in outcome for rows in seeds for pair in rows for outcome in pair):  # older evaluations lack it
        greedy = np.array([[int(x["greedy"]) - int(y["greedy"]) for x, y in rows] for rows in seeds])
        record["greedy"] = {**over_items_and_seeds(greedy), "seeds": discordant(greedy)}
    return record


def discordant(differences: np.ndarray) -> list[Json]:
    """Return each seed's discordant counts and exact McNemar p, from differences [seeds, items] of correct answers."""
    found = [{"only_A": int((row > 0).sum()), "only_B": int((row < 0).sum())} for row in differences]
    return [{**record, "p": mcnemar(record["only_B"], record["only_A"])} for record in found]


def over_items_and_seeds(differences: np.ndarray) -> Json:
    """Return the mean of differences [seeds, items]: bootstrap over items of the seeds' means, and Student's over
    seeds.
    """
    found: Json = {
        "difference": float(differences.mean()),
        "over_items": finite(bootstrap_mean(differences.mean(axis=0))),
        "each_seed": [finite(bootstrap_mean(row)) for row in differences],
    }
    if len(differences) > 1:
        found["over_seeds"] = finite(t_mean(differences.mean(axis=1)))
    return found


def differing_items(a: Side, b: Side) -> list[Json]:
    """Return every item whose first seed's answer is correct on one side only, with both outputs."""
    found = []
    for policy, other in pairs(a.policies, b.policies):
        for x, y in matched(a.outcomes[0][policy], b.outcomes[0][other]):
            if x["correct"] != y["correct"]:
                sides = {
                    name: {key: outcome[key] for key in ("policy", "strict", "correct", "truncated", "output")}
                    for name, outcome in (("A", x), ("B", y))
                }
                found.append({"id": x["id"], "reference": x["reference"], **sides})
    return found


def _shared(texts: Sequence[str]) -> str:
    """Return how texts begin, all of them."""
    alike = itertools.takewhile(lambda letters: len(set(letters)) == 1, zip(*texts, strict=False))
    return "".join(letters[0] for letters in alike)


def side_names(result: Json) -> tuple[str, str]:
    """Return what the folders of A and B are called where they differ, of several seeds what they share; else "A", "B".

    runs/stream/gsm8k and runs/baseline/gsm8k are stream and baseline; stream-0,stream-1 are stream too.
    """
    sides = [[Path(path).parts for path in result[side]] for side in "AB"]
    every = [*sides[0], *sides[1]]
    shortest = min(map(len, every))
    lead = next((at for at in range(shortest) if len({parts[at] for parts in every}) > 1), shortest)
    tail = next((at for at in range(shortest) if len({parts[-1 - at] for parts in every}) > 1), shortest)
    one, other = (
        _shared(["/".join(parts[lead : len(parts) - tail]) for parts in side]).rstrip("-_/") for side in sides
    )
    return (one, other) if one and other and one != other else ("A", "B")


def policy_label(record: Json) -> str:
    """Return the depth policies of a comparison in a few characters: one name where both sides have the same."""
    return record["A"] if record["A"] == record["B"] else f"{record['A']} v {record['B']}"


def figure(result: Json, target: Path) -> None:
    """Draw the scores of both sides by policy, and the differences, with their intervals, each seed's beside."""
    loss, sides = result["measure"] == "loss", dict(zip("AB", side_names(result), strict=True))
    picture = new_figure(9.0, 3.8)
    left, right = picture.subplots(1, 2)
    names = list(dict.fromkeys([*result["scores"]["A"], *result["scores"]["B"]]))
    for place, side in enumerate("AB"):
        label: str | None = sides[side]
        for policy, seeds in result["scores"][side].items():
            for index, found in enumerate(seeds):
                at = names.index(policy) + 0.3 * (place - 0.5) + 0.06 * (index - (len(seeds) - 1) / 2)
                _bar(left, at, found, f"C{place}", label)
                label = None
    left.set_xticks(range(len(names)), names)
    left.set(
        xlabel="depth policy", xlim=(-0.5, len(names) - 0.5),
        ylabel="nats per answer token" if loss else "accuracy (strict)",
    )  # fmt: skip
    left.legend()
    for number, record in enumerate(result["comparisons"]):
        several = len(record["each_seed"]) > 1
        _bar(right, number, record["over_items"], "C2", "all seeds" if several and not number else None)
        for index, found in enumerate(record["each_seed"] if several else ()):
            _bar(right, number + 0.12 * (index + 1), found, "0.6", None if number or index else "each seed")
    right.axhline(0.0, color="0.5", linewidth=0.8)
    labels = [policy_label(record) for record in result["comparisons"]]
    right.set_xticks(range(len(labels)), labels)
    right.set(xlabel="depth policy", ylabel=f"{sides['A']} minus {sides['B']}", xlim=(-0.6, len(labels) - 0.4))
    if right.get_legend_handles_labels()[1]:
        right.legend()
    picture.suptitle(f"{result['task']}, {result['items']} items, 95% intervals")
    picture.savefig(target, dpi=150)


def _bar(axes: Axes, at: float, found: dict[str, float | None], colour: str, label: str | None) -> None:
    value, low, high = (found[name] for name in ("value", "low", "high"))
    reach = [[0.0], [0.0]]
    if value is not None and low is not None and high is not None:
        reach = [[value - low], [high - value]]
    axes.errorbar(
        [at],
        [np.nan if value is None else value],
        yerr=reach,
        fmt="o",
        color=colour,
        markersize=4,
        capsize=3,
        label=label,
    )
