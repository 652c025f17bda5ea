"""Perplexities of windows under settings, and paired differences from a baseline, with intervals over documents."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from sst_jax.console.figure import new_figure
from sst_jax.lab.statistics import Interval, clustered_ratio, finite
from sst_jax.types import Json

EDGES = (0, 16, 64, 128, 256, 512, 1024, 2048, 4096)  # of the bins of positions


def summarise(outcomes: Mapping[str, Sequence[Json]], baseline: str) -> Json:
    """Return what a stage shows.

    Args:
      outcomes: by setting, of the same windows in one order.
      baseline: the setting that others are compared with.

    Returns:
      policies: by setting nats a token and perplexity, with intervals, by position and by kind of text.
      paired: of every other setting its difference from the baseline, in nats a token, and the ratio of perplexities.
    """
    policies = {name: of_setting(lines) for name, lines in outcomes.items()}
    others = [name for name in outcomes if name != baseline]
    return {
        "windows": len(outcomes[baseline]),
        "documents": len({line["document"] for line in outcomes[baseline]}),
        "baseline": baseline,
        "policies": policies,
        "paired": [paired(name, outcomes[name], outcomes[baseline]) for name in others],
    }


def of_setting(lines: Sequence[Json]) -> Json:
    """Return one setting's figures."""
    nats = np.array([line["nats"] for line in lines])
    mean = over_documents(lines, nats)
    return {
        "nats_per_token": finite(mean),
        "perplexity": finite(Interval(*(math.exp(min(value, 700.0)) for value in mean))),
        "by_position": by_position(lines, nats),
        "seconds": float(np.mean([line["seconds"] for line in lines])),
        "rms": next((line["rms"] for line in lines if "rms" in line), None),  # of the first batch, by layer
    }


def paired(name: str, lines: Sequence[Json], baseline: Sequence[Json]) -> Json:
    """Return a setting's difference from the baseline, window by window; above 0 it is worse."""
    difference = np.array([line["nats"] for line in lines]) - np.array([line["nats"] for line in baseline])
    mean = over_documents(lines, difference)
    kinds = list(dict.fromkeys(line["kind"] for line in lines))
    picked = {kind: [number for number, line in enumerate(lines) if line["kind"] == kind] for kind in kinds}
    return {
        "setting": name,
        "difference": finite(mean),
        "perplexity_ratio": finite(Interval(*(math.exp(min(value, 700.0)) for value in mean))),
        "windows_better": int((difference.sum(axis=1) < 0).sum()),
        "identical": bool((difference == 0).all()),
        "by_position": by_position(lines, difference),
        "by_kind": {
            kind: finite(over_documents([lines[number] for number in rows], difference[rows]))
            for kind, rows in picked.items()
        },
    }


def by_position(lines: Sequence[Json], values: np.ndarray) -> list[Json]:
    """Return means of values [windows, T-1] over bins of positions, each with its interval over documents."""
    ends = [*(edge for edge in EDGES if edge < values.shape[1]), values.shape[1]]
    return [
        {"from": start, "to": end, **finite(over_documents(lines, values[:, start:end]))}
        for start, end in itertools.pairwise(ends)
    ]


def over_documents(lines: Sequence[Json], values: np.ndarray) -> Interval:
    """Return the mean of values [windows, tokens] with an interval from resampling documents."""
    documents = list(dict.fromkeys(line["document"] for line in lines))
    sums, counts = np.zeros(len(documents)), np.zeros(len(documents))
    for line, row in zip(lines, values, strict=True):
        sums[documents.index(line["document"])] += row.sum()
        counts[documents.index(line["document"])] += len(row)
    return clustered_ratio(sums, counts)


def best(stage: Json, baseline: str) -> str:
    """Return the setting, other than the baseline, with the fewest nats a token."""
    others = {name: found["nats_per_token"]["value"] for name, found in stage["policies"].items() if name != baseline}
    return min(others, key=lambda name: others[name])


def figure(result: Json, target: Path) -> Path:
    """Draw every setting's difference from the baseline by position, of the last stage; return the file."""
    stage = result["stages"].get("test") or result["stages"]["all"]
    picture = new_figure(7.2, 4.2)
    axes = picture.add_subplot()
    for number, record in enumerate(record for record in stage["paired"] if not record["identical"]):
        parts = [part for part in record["by_position"] if part["low"] is not None]
        middles = np.array([(part["from"] + part["to"]) / 2 for part in parts])
        value, low, high = (np.array([part[name] for part in parts]) for name in ("value", "low", "high"))
        reach = np.stack([value - low, high - value])
        axes.errorbar(middles + number, value, reach, fmt="o-", markersize=3, capsize=2, label=record["setting"])
    axes.axhline(0.0, color="0.5", linewidth=0.8)
    axes.set(xlabel="position in the window", ylabel=f"nats a token against {stage['baseline']}")
    axes.set_yscale("symlog", linthresh=0.01)
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=8)
    picture.suptitle(f"{stage['windows']} windows, 95% over {stage['documents']} documents")
    picture.savefig(target, dpi=110)
    return target


def print_text(result: Json) -> None:
    """Print a result: every stage's settings, and how far they are from the baseline."""
    print(f"text, {result['items']} windows of {result['protocol']['window']} tokens, protocol", end=" ")
    print(result["protocol_sha256"][:12])
    for stage, found in result["stages"].items():
        print(f"\n{stage}: {found['windows']} windows of {found['documents']} documents", end="")
        print(f"; chosen: {found['chosen']}" if "chosen" in found else "")
        differences = {record["setting"]: record for record in found["paired"]}
        for name, score in found["policies"].items():
            line = f"  {name:<26} perplexity {score['perplexity']['value']:9.3f}  {score['seconds']:.2f} s a window"
            if name in differences:
                record = differences[name]["difference"]
                low, high = ("-" if record[end] is None else f"{record[end]:+.4f}" for end in ("low", "high"))
                same = "  (identical)" if differences[name]["identical"] else ""
                line += f"  {record['value']:+.4f} [{low}, {high}] nats against {found['baseline']}{same}"
            print(line)
