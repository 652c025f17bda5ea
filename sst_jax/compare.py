"""Compares two evaluations of the same items, pair by pair.

  python -m sst_jax.compare runs/stream/gsm8k runs/baseline/gsm8k --out runs/compare
  python -m sst_jax.compare runs/stream-0/loss,runs/stream-1/loss runs/baseline-0/loss,runs/baseline-1/loss

A and B are folders of `evaluate --task`, or several separated by commas: one a training seed, in the same order on both
sides. Answers: exact McNemar on the discordant pairs of the first seed, Holm over all comparisons, a paired bootstrap.
Losses: a paired bootstrap over items. Several seeds: Student's interval over them too.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sst_jax.console.command import Parser, folder_for, run, write_json
from sst_jax.errors import InputError


def parser() -> Parser:
    parser = Parser(prog="python -m sst_jax.compare", description=__doc__)
    parser.add_argument("a", metavar="OUT_A", help="an evaluation, or one a seed: DIR,DIR,DIR")
    parser.add_argument("b", metavar="OUT_B", help="what it is compared with")
    parser.add_argument("--out", metavar="DIR", help="result.json, compare.png and differing_items.jsonl go here")
    parser.add_argument("--json", metavar="FILE", help="write the result to FILE")
    return parser


def main(argv: Sequence[str]) -> None:
    args = parser().parse_args(argv)

    from sst_jax.lab.evaluation import paired_stats

    if args.out and (Path(args.out) / paired_stats.HEADER).is_file():
        raise InputError(f"--out {args.out} holds an evaluation, whose result would be lost: choose another folder")
    out = folder_for("--out", args.out) if args.out else None
    a, b = (paired_stats.read_side(text) for text in (args.a, args.b))
    result = paired_stats.compare(a, b)
    report(result)
    if out is not None:
        paired_stats.figure(result, out / "compare.png")
        if result["measure"] == "answers":
            with (out / "differing_items.jsonl").open("w", encoding="utf-8") as file:
                file.writelines(json.dumps(item) + "\n" for item in paired_stats.differing_items(a, b))
        write_json(out / "result.json", result)
        print(f"\nwritten to {out}")
    if args.json:
        write_json(args.json, result)


def report(result: dict[str, Any]) -> None:
    """The table that a person reads."""
    loss, seeds = result["measure"] == "loss", len(result["A"])
    print(f"{result['task']}, {result['items']} items" + f", {seeds} seeds" * (seeds > 1))
    for side in "AB":
        print(f"{side}: {', '.join(result[side])}")
    for found in result["settings_that_differ"]:
        print(f"settings differ: {found['key']} is {found['A']!r} in A and {found['B']!r} in B")
    unit, scale = ("", 1.0) if loss else ("%", 100.0)
    print(f"\n{'policy A':18}{'policy B':18}{'A':>10}{'B':>10}{'A - B':>10}  {'95% over items':24}", end="")
    print("items better in A" if loss else f"{'only A':>8}{'only B':>8}{'p':>10}{'Holm':>10}")
    for record in result["comparisons"]:
        means = []
        for side in "AB":
            scores = result["scores"][side][record[side]]
            means.append(sum(score["value"] for score in scores) / len(scores))
        row = f"{record['A']:18}{record['B']:18}"
        row += "".join(f"{value * scale:9.4g}{unit or ' '}" for value in (*means, record["difference"]))
        row += f"  {interval(record['over_items'], scale):24}"
        if loss:
            row += f"{record['items_better_in_A']} of {result['items']}"
        else:
            row += f"{record['only_A']:8}{record['only_B']:8}{record['p']:10.3g}{record['p_holm']:10.3g}"
        print(row)
        if "over_seeds" in record:
            each = ", ".join(f"{found['value'] * scale:.4g}" for found in record["each_seed"])
            print(f"{'':36}each seed {each}; 95% over seeds {interval(record['over_seeds'], scale)}")
    for side, found in result.get("oracles", {}).items():
        union, noise = found["union"], found["noise_control"]
        print(
            f"{side}: oracle over depths {', '.join(found['policies'])}, not a score: {union['value']:.1%}; redrawing "
            f"as many answers at random gives {noise['value']:.1%} [{noise['low']:.1%}, {noise['high']:.1%}]"
        )


def interval(found: dict[str, Any], scale: float) -> str:
    """An interval as text; of a single item or seed there is none."""
    if found["low"] is None:
        return "-"
    return f"[{found['low'] * scale:.4g}, {found['high'] * scale:.4g}]"


if __name__ == "__main__":
    sys.exit(run(main))
