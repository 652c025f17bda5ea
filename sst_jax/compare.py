"""Compare two evaluations of the same items, pair by pair.

  sst-jax compare runs/stream/gsm8k runs/baseline/gsm8k --out runs/compare
  sst-jax compare runs/stream-0/loss,runs/stream-1/loss runs/baseline-0/loss,runs/baseline-1/loss

A and B are folders of `evaluate --task`, or several separated by commas: one a training seed, in the same order on both
sides. Answers: exact McNemar on the discordant pairs of the first seed, Holm over all comparisons, a paired bootstrap.
Losses: a paired bootstrap over items. Several seeds: Student's interval over them too.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from sst_jax.console.command import Parser, run, write_json


def parser() -> Parser:
    parser = Parser(prog="python -m sst_jax.compare", description=__doc__)
    parser.add_argument("a", metavar="OUT_A", help="an evaluation folder, or one per seed: DIR,DIR,DIR")
    parser.add_argument("b", metavar="OUT_B", help="the evaluation folders to compare with")
    parser.add_argument("--out", metavar="DIR", help="result.json, compare.png and differing_items.jsonl go here")
    parser.add_argument("--json", metavar="FILE", help="write the result to FILE")
    return parser


def main(argv: Sequence[str]) -> None:
    args = parser().parse_args(argv)

    from sst_jax.lab.evaluation import compare, report

    result = compare(args.a.split(","), args.b.split(","), Path(args.out) if args.out else None)
    report.print_comparison(result)
    if args.out:
        print(f"\nwritten to {args.out}")
    if args.json:
        write_json(args.json, result)


if __name__ == "__main__":
    sys.exit(run(main))
