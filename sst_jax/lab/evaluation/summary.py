"""Scores of one evaluation: one number a policy that could be deployed, and apart from them what is only an oracle."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from sst_jax.data.documents import Item
from sst_jax.lab.evaluation.runner import Outcome, by_policy
from sst_jax.lab.statistics import bootstrap_mean, finite, holm, mcnemar, redraw_union, wilson
from sst_jax.types import Json

ORACLE = (
    "an item counts if any policy had it right: an upper bound that no policy reaches, not a score; compare it with "
    "its noise control"
)


def summarise(items: Sequence[Item], outcomes: Sequence[Outcome], measure: str) -> Json:
    """Return what result.json holds of an evaluation's outcomes; `measure` is "answers" or "loss"."""
    if measure == "loss":
        return {"policies": {policy: loss_summary(group) for policy, group in by_policy(outcomes)}}
    groups = dict(by_policy(outcomes))
    found: Json = {"policies": {policy: answer_summary(group) for policy, group in groups.items()}}
    if len(groups) > 1:
        found["between_policies"] = between(groups)
        found["oracle"] = oracle(items, groups)
    return found


def answer_summary(group: Sequence[Outcome]) -> Json:
    """Return the accuracies of one policy, with counts of unparsed and truncated answers."""

    def share(field: str) -> Json:
        right, count = sum(outcome[field] for outcome in group), len(group)
        return {"right": right, "of": count, **wilson(right, count)._asdict()}

    opinions = [outcome for outcome in group if outcome["second_opinion"] is not None]
    return {
        "strict": share("correct"),
        "flexible": share("correct_flexible"),
        "unparsed": {name: sum(outcome[name] is None for outcome in group) for name in ("strict", "flexible")},
        "truncated": sum(outcome["truncated"] for outcome in group),
        "second_opinion": {
            "asked": len(opinions),
            "right": sum(outcome["second_opinion"] for outcome in opinions),
            "only_strict_says_right": _ids(opinions, lambda o: o["correct"] and not o["second_opinion"]),
            "only_second_says_right": _ids(opinions, lambda o: o["second_opinion"] and not o["correct"]),
        },
        "new_tokens": float(np.mean([outcome["new_tokens"] for outcome in group])),
        "depth": float(np.mean([outcome["depth"] for outcome in group])),
        "seconds": float(np.mean([outcome["seconds"] for outcome in group])),
    }


def _ids(outcomes: Sequence[Outcome], wanted: Callable[[Outcome], bool]) -> list[str]:
    return [outcome["id"] for outcome in outcomes if wanted(outcome)]


def loss_summary(group: Sequence[Outcome]) -> Json:
    """Return nats per answer token over all items with a bootstrap interval over items, and greedy
    exact match.
    """
    per_token, greedy = token_weighted(group), sum(outcome["greedy"] for outcome in group)
    return {
        "nats_per_token": finite(bootstrap_mean(per_token)),
        "greedy": {"right": greedy, **wilson(greedy, len(group))._asdict()},
        "answer_tokens": sum(outcome["answer_tokens"] for outcome in group),
        "of": len(group),
        "seconds": float(np.mean([outcome["seconds"] for outcome in group])),
        **rms_over(group),
    }


def rms_over(group: Sequence[Outcome]) -> Json:
    """Return {"rms": by name, as `model/scales.py` has them} over all batches; nothing where none was measured."""
    batches = [outcome for outcome in group if "rms" in outcome]
    if not batches:  # evaluated by an earlier version
        return {}
    weights = np.array([outcome["rms_positions"] for outcome in batches], float)
    squares = {name: np.array([outcome["rms"][name] for outcome in batches]) ** 2 for name in batches[0]["rms"]}
    return {"rms": {name: float(np.sqrt(values @ weights / weights.sum())) for name, values in squares.items()}}


def token_weighted(group: Sequence[Outcome]) -> np.ndarray:
    """Return items' losses [items] over the mean answer length, so that their mean is nats/token over all tokens."""
    losses = np.array([outcome["loss"] for outcome in group])
    return losses / np.mean([outcome["answer_tokens"] for outcome in group])


def between(groups: dict[str, list[Outcome]]) -> list[Json]:
    """Return each further policy's regressions and fixes against the first one, with exact McNemar p, Holm-adjusted."""
    first, *rest = groups
    found = []
    for policy in rest:
        pairs = list(zip(groups[first], groups[policy], strict=True))
        broken = [a["id"] for a, b in pairs if a["correct"] and not b["correct"]]
        mended = [a["id"] for a, b in pairs if b["correct"] and not a["correct"]]
        found.append(
            {
                "from": first,
                "to": policy,
                "broken": len(broken),
                "mended": len(mended),
                "changed": sum(a["strict"] != b["strict"] for a, b in pairs),
                "p": mcnemar(len(broken), len(mended)),
                "broken_items": broken,
                "mended_items": mended,
            }
        )
    for record, adjusted in zip(found, holm([record["p"] for record in found]), strict=True):
        record["p_holm"] = adjusted
    return found


def oracle(items: Sequence[Item], groups: dict[str, list[Outcome]]) -> Json:
    """Return the any-policy union, and what redrawing as many answers at random would have made of the first policy."""
    first, *rest = groups.values()
    right = np.array([[outcome["correct"] for outcome in group] for group in groups.values()])
    changed = [sum(a["strict"] != b["strict"] for a, b in zip(first, group, strict=True)) for group in rest]
    union, alone = int(right.any(axis=0).sum()), float(right[0].mean())
    chance = [item.chance(alone) for item in items]
    choices = any(item.order for item in items)
    return {
        "what": ORACLE,
        "policies": list(groups),
        "union": {"right": union, "of": len(items), **wilson(union, len(items))._asdict()},
        "answers_changed": changed,
        "chance_of_a_redrawn_answer": "1 / choices" if choices else f"the first policy's score, {alone:.4f}",
        "noise_control": redraw_union(right[0], changed, chance)._asdict(),
    }
