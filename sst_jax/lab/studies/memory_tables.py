"""Tables of `short_memory.py`: arms in nats a token, what sets the stream apart, and what its state carries how far.

Intervals are 95%: over documents a bootstrap of the seeds' means (documents are clusters of tokens), over seeds
Student's. A difference is settled where both exclude zero.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from sst_jax.console.figure import new_figure
from sst_jax.console.progress import counted
from sst_jax.files import read_json
from sst_jax.lab.statistics import RESAMPLES, Interval, clustered_ratio, finite, t_mean
from sst_jax.lab.studies.short_memory import PLAIN, STREAM, Protocol, Texts, distance_to_last
from sst_jax.types import Json

POWER, DRAWS = 0.8, 2_000
LAST = ((1, 4), (5, 16), (17, 32), (33, 64), (65, 10**6))  # positions back at which a token last stood
AFTER = ((0, 0), (1, 4), (5, 8), (9, 64))  # positions behind a cut

Losses = dict[str, np.ndarray]  # by what was measured, [documents, T - 1]


def summarise(
    protocol: Protocol, texts: Texts, workdir: Path, seeds: Sequence[int], names: Sequence[str]
) -> Json | None:
    """Return the tables of what a folder holds of some arms and seeds; None where a run of them is missing."""
    folders = {name: [workdir / f"{name}-{seed}" for seed in seeds] for name in names}
    if not all((folder / "losses.npz").is_file() for each in folders.values() for folder in each):
        return None
    if not {STREAM, PLAIN} <= set(names):
        return None
    losses: dict[str, list[Losses]] = {}
    for name, each in folders.items():
        losses[name] = [dict(np.load(folder / "losses.npz")) for folder in each]
    facts = {name: [read_json(folder / "training.json") for folder in each] for name, each in folders.items()}
    real = texts.heldout.real[:, 1:]
    own = {name: [one["own"] for one in each] for name, each in losses.items()}
    result: Json = {
        "protocol": protocol.sha256, "about": protocol.about, "seeds": list(seeds),
        "documents": len(real), "tokens": int(real.sum()),
        "arms": {name: {**arm_facts(facts[name]), **level(own[name], real)} for name in names},
        "missing": [name for name in protocol.arms if name not in names],
        "against": {
            name: difference(own[STREAM], own[name], real) for name in protocol.against if name in names
        },
    }  # fmt: skip
    if protocol.full in names:
        result["took"] = difference(own[PLAIN], own[protocol.full], real)
        result["given_back"] = given_back(own[PLAIN], own[STREAM], own[protocol.full], real)
    result["by_last_mention"] = by_last_mention(own, texts)
    result["without_its_state"] = without_its_state(losses[STREAM], real)
    result["carried"] = carried(losses[STREAM], texts, protocol)
    result["hours"] = sum(one["core_seconds"] for each in facts.values() for one in each) / 3600
    return result


def arm_facts(facts: Sequence[Json]) -> Json:
    """Return what an arm is, and what it cost, the same for all seeds but for seconds."""
    one = facts[0]
    return {
        "steps": one["steps"], "parameters": one["parameters"], "reach": one["reach"],
        "flops": one["step_flops"] * one["steps"], "core_seconds": [each["core_seconds"] for each in facts],
        "alpha": [each["alpha"] for each in facts],
    }  # fmt: skip


def ratio(values: np.ndarray, where: np.ndarray) -> Interval:
    """Return the mean of values [documents, T] where `where` says, with an interval over documents."""
    return clustered_ratio((values * where).sum(1), where.sum(1))


def level(seeds: Sequence[np.ndarray], real: np.ndarray) -> Json:
    """Return nats a token: the seeds' mean with an interval over documents, and each seed's."""
    each = [float((one * real).sum() / real.sum()) for one in seeds]
    return {"nats": finite(ratio(np.mean(seeds, 0), real)), "by_seed": each}


def difference(first: Sequence[np.ndarray], second: Sequence[np.ndarray], where: np.ndarray) -> Json:
    """Return nats a token of one arm minus another's, paired by document and by seed."""
    moved = [a - b for a, b in zip(first, second, strict=True)]
    each = [float((one * where).sum() / where.sum()) for one in moved]
    documents, seeds = ratio(np.mean(moved, 0), where), t_mean(each)
    settled = documents.low * documents.high > 0 and seeds.low * seeds.high > 0 and math.isfinite(seeds.low)
    return {
        "value": documents.value, "over_documents": finite(documents), "over_seeds": finite(seeds), "by_seed": each,
        "settled": bool(settled), "detectable": detectable(each),
    }  # fmt: skip


def detectable(each: Sequence[float]) -> float | None:
    """Return the difference that so many seeds, as far apart as these, would show in four of five studies."""
    count = len(each)
    if count < 2:
        return None
    limit, spread = float(stats.t.ppf(0.975, count - 1)), float(np.std(each, ddof=1)) / math.sqrt(count)
    low, high = 0.0, 100.0
    for _ in range(60):
        middle = (low + high) / 2
        shown = 1.0 - float(stats.nct.cdf(limit, count - 1, middle))
        low, high = (middle, high) if shown < POWER else (low, middle)
    return high * spread


def given_back(
    plain: Sequence[np.ndarray], stream: Sequence[np.ndarray], full: Sequence[np.ndarray], real: np.ndarray
) -> Json:
    """Return (plain - stream) / (plain - full): the share of what the window took, with an interval over documents."""
    sums = [(np.mean(arm, 0) * real).sum(1) for arm in (plain, stream, full)]
    count = len(real)
    drawn = np.random.default_rng(0).multinomial(count, np.full(count, 1 / count), RESAMPLES)
    a, b, c = (drawn @ each for each in sums)
    low, high = np.quantile((a - b) / (a - c), [0.025, 0.975])
    each = [float(((p - s) * real).sum() / ((p - f) * real).sum()) for p, s, f in zip(plain, stream, full, strict=True)]
    value = float((sums[0] - sums[1]).sum() / (sums[0] - sums[2]).sum())
    return {"value": value, "low": float(low), "high": float(high), "by_seed": each}


def by_last_mention(own: dict[str, list[np.ndarray]], texts: Texts) -> list[Json]:
    """Return every arm by how far back the predicted token last stood, and where it never did.

    Within the windows' reach attention has seen it; beyond, a stream alone can have kept it.
    """
    real, distance = texts.heldout.real[:, 1:], distance_to_last(texts.heldout)
    bins = [(f"{low} to {high}" if high < 10**6 else f"{low} and more", low, high) for low, high in LAST]
    rows = []
    for name, low, high in [*bins, ("never", 0, 0)]:
        where = real & (distance >= low) & (distance <= high)
        if not where.any():
            continue
        rows.append({
            "last": name, "tokens": int(where.sum()),
            "arms": {arm: level(seeds, where) for arm, seeds in own.items()},
            "stream_minus_plain": difference(own[STREAM], own[PLAIN], where),
        })  # fmt: skip
    return rows


def without_its_state(stream: Sequence[Losses], real: np.ndarray) -> Json:
    """Return what the trained stream loses where its states are switched off, zeroed, or another document's."""
    found = {}
    for key in ("off", "zeroed", "shuffled"):
        where = real
        if key == "shuffled":  # where the other document goes on too
            where = real & real[stream[0]["donor"]]
        found[key] = difference([one[key] for one in stream], [one["own"] for one in stream], where)
    return found


def carried(stream: Sequence[Losses], texts: Texts, protocol: Protocol) -> dict[str, list[Json]]:
    """Return by distance what it costs to take the state away, or exchange it, at one position alone.

    A distance of 0 is the position whose entering state is changed. Of each cut, documents that go on for
    `protocol.after` tokens, and whose donor has got to the cut.
    """
    real, found = texts.heldout.real[:, 1:], {}
    place = np.arange(real.shape[1])
    for key in ("zeroed", "shuffled"):
        rows = []
        for low, high in AFTER:
            sums, counts, total, number = np.zeros(len(real)), np.zeros(len(real)), 0.0, 0
            each = np.zeros(len(stream))
            for cut in protocol.cuts:
                long = real[:, min(cut + protocol.after, real.shape[1]) - 1] & real[stream[0]["donor"], cut]
                after = (place >= cut + low) & (place <= cut + min(high, protocol.after))
                where = real & long[:, None] & after
                moved = [one[f"{key} at {cut}"] - one["own"] for one in stream]
                sums, counts = sums + (np.mean(moved, 0) * where).sum(1), counts + where.sum(1)
                each += [(one * where).sum() for one in moved]
                total += float((np.mean(np.abs(moved), 0) * where).sum())
                number += int(where.sum())
            if not number:
                continue
            documents, seeds = clustered_ratio(sums, counts), t_mean(each / number)
            rows.append({
                "after": f"{low}" if low == high else f"{low} to {min(high, protocol.after)}", "tokens": number,
                "over_documents": finite(documents), "over_seeds": finite(seeds),
                "by_seed": (each / number).tolist(),
                "moved": total / number,
            })  # fmt: skip
        found[key] = rows
    return found


# ------------------------------------------------------------------------------------------------------------ Written


def interval(found: Json, digits: int = 3) -> str:
    """Return a difference with its intervals over documents and over seeds."""
    over = " ".join(
        "[-]" if part["low"] is None else f"[{part['low']:+.{digits}f}, {part['high']:+.{digits}f}]"
        for part in (found["over_documents"], found["over_seeds"])
    )
    return f"{found['over_documents']['value']:+.{digits}f} {over}"


def report(result: Json) -> str:
    """Return the tables in Markdown, as they stand in docs/findings.md."""
    lines = [
        f"\n{counted(len(result['seeds']), 'seed')}, {counted(result['documents'], 'held-out document')}, "
        f"{result['tokens']:,} tokens; "
        f"protocol {result['protocol'][:12]}; {result['hours']:.1f} core-hours of training\n",
        "| arm | nats a token | by seed | TFLOP | parameters | stream minus it | settled |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, arm in sorted(result["arms"].items(), key=lambda item: item[1]["nats"]["value"]):
        against = result["against"].get(name)
        seeds = " ".join(f"{value:.3f}" for value in arm["by_seed"])
        more = "| |" if against is None else f"{interval(against)} | {'yes' if against['settled'] else 'no'} |"
        cost = f"{arm['flops'] / 1e12:.2f} | {arm['parameters']:,}"
        lines.append(f"| `{name}` | {arm['nats']['value']:.3f} | {seeds} | {cost} | {more}")
    if result["missing"]:
        lines.append(f"\nwithout the arms {', '.join(result['missing'])}, which were not asked for")
    if back := result.get("given_back"):
        lines.append(
            f"\nthe window took {interval(result['took'])} nats a token; of that the stream gives back "
            f"{back['value']:.0%} [{back['low']:.0%}, {back['high']:.0%}] (by seed "
            f"{' '.join(f'{value:.0%}' for value in back['by_seed'])})"
        )
    lines += [
        "\n| the token last stood | tokens | plain | stream | stream minus plain |",
        "|---|---|---|---|---|",
    ]
    for row in result["by_last_mention"]:
        values = " | ".join(f"{row['arms'][key]['nats']['value']:.3f}" for key in (PLAIN, STREAM))
        lines.append(f"| {row['last']} | {row['tokens']:,} | {values} | {interval(row['stream_minus_plain'])} |")
    lines += ["\n| the stream, tested with its states | minus itself |", "|---|---|"]
    lines += [f"| {name} | {interval(found)} |" for name, found in result["without_its_state"].items()]
    lines += ["\n| positions behind one | state zeroed there | another document's there |", "|---|---|---|"]
    for zeroed, other in zip(*result["carried"].values(), strict=True):
        lines.append(f"| {zeroed['after']} | {interval(zeroed, 4)} | {interval(other, 4)} |")
    return "\n".join(lines)


def draw(result: Json, target: Path) -> None:
    """Draw every arm, a point a seed, and how far the state at one position carries."""
    figure: Any = new_figure(8.4, 3.2)
    left, right = figure.subplots(1, 2)
    arms = sorted(result["arms"].items(), key=lambda item: item[1]["nats"]["value"])
    for place, (name, arm) in enumerate(arms):
        left.plot(arm["by_seed"], [place] * len(arm["by_seed"]), "o", color="C1" if name == "stream" else "C0")
    left.set_yticks(range(len(arms)), [name for name, _ in arms])
    left.set(xlabel="nats a token, held-out documents; a point a seed")
    left.grid(alpha=0.3, axis="x")
    for number, (key, label) in enumerate((("shuffled", "another document's"), ("zeroed", "zeroed"))):
        rows = result["carried"][key]
        values = np.array([row["over_documents"]["value"] for row in rows])
        ends = np.array([[row["over_documents"][end] for row in rows] for end in ("low", "high")], float)
        right.errorbar(
            range(len(rows)), values, np.abs(ends - values), fmt="o-", color=f"C{number + 1}", capsize=2, label=label
        )
    right.set_xticks(range(len(rows)), [row["after"] for row in rows])
    right.axhline(0, color="grey", linewidth=0.8)
    right.set(xlabel="positions behind the one whose state is exchanged", ylabel="nats a token more")
    right.legend()
    figure.savefig(target, dpi=110)
