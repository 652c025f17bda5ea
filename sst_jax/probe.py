"""Fit or apply the halting probe: it reads a state at the first generated position and chooses the depth of the rest.

  sst-jax evaluate --model MODEL --task gsm8k --depth 1,4 --out OUTCOMES
  sst-jax probe fit --model MODEL --outcomes OUTCOMES --label breaks --out DIR
  sst-jax probe apply --model MODEL --probe DIR/probe.safetensors --prompts FILE
  sst-jax generate --model MODEL --halt DIR/probe.safetensors --prompt TEXT
  sst-jax evaluate --model MODEL --task gsm8k --depth 1,4,probe:DIR/probe.safetensors --out OUT

fit learns from answers at two depths: which become wrong at the larger depth (regressions: --label breaks), which
become right (fixes: mends), which depth was right where only one was (differs), or whether the text changes at all
(changes). All numbers come from nested leave-one-out. Scores on the items that a probe was fitted to mean nothing:
evaluate on others.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from sst_jax.console.command import Parser, folder_for, numbers, opening, run, write_json

if TYPE_CHECKING:
    from sst_jax.types import Json


def parser() -> Parser:
    parser = Parser(prog="python -m sst_jax.probe", description=__doc__)
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="fit|apply", parser_class=Parser)
    fit = kinds.add_parser("fit", help="nested cross-validation, and a probe of all items")
    fit.takes_model("the model that the outcomes are of")
    add = fit.add_argument
    add("--outcomes", required=True, nargs="+", metavar="DIR", help="folders of `evaluate` with answers at both depths")
    add("--out", required=True, metavar="DIR", help="probe.safetensors, probe.png and result.json go here")
    add("--depths", default="1,4", metavar="A,B", help="the depths to choose between (default: 1,4)")
    add("--label", choices=("breaks", "mends", "differs", "changes"), default="breaks", help="default: breaks")
    add(
        "--layer",
        type=int,
        metavar="L",
        help="layer whose state is read; choose it beforehand (default: the middle one)",
    )
    add("--first", type=int, default=1, metavar="I", help="iterations before the probe reads the state (default: 1)")
    add("--inputs", type=int, default=16, metavar="K", help="input dimensions of the probe (default: 16)")
    add("--hidden", type=int, default=4, metavar="H", help="hidden units of the probe (default: 4)")
    add(
        "--permutations",
        type=int,
        default=200,
        metavar="N",
        help="label permutations of the null distribution (default: 200)",
    )
    add("--sweep", action="store_true", help="also score every layer, corrected for multiple layers")
    add("--seed", type=int, default=0, help="default: 0")
    add("--dtype", choices=("float32", "bfloat16"), help="default: float32 on a CPU, else bfloat16")
    add("--json", metavar="FILE", help="write the result to FILE too (always in DIR/result.json)")
    apply = kinds.add_parser("apply", help="print a probe's decision for each prompt")
    apply.takes_model("the model that the probe was fitted on")
    add = apply.add_argument
    add("--probe", required=True, metavar="FILE", help="probe file written by fit")
    add("--prompts", required=True, metavar="FILE", help="one prompt a line, or .jsonl with a field `prompt` a line")
    add("--dtype", choices=("float32", "bfloat16"), help="default: float32 on a CPU, else bfloat16")
    add("--json", metavar="FILE", help="write probabilities and depths to FILE")
    return parser


def main(argv: Sequence[str]) -> None:
    args = parser().parse_args(argv)
    result = {"fit": fit, "apply": apply}[args.kind](args)
    if args.json:
        write_json(args.json, result)


def fit(args: argparse.Namespace) -> Json:
    from sst_jax.inference.model import load
    from sst_jax.lab.probing import probe_dataset, probing

    settings = probing.Settings(args.inputs, args.hidden, permutations=args.permutations, seed=args.seed)
    depths = tuple(numbers("--depths", args.depths, int))
    config = probing.ProbeConfig(tuple(args.outcomes), depths, args.label, args.layer, args.first, settings, args.sweep)
    outcomes = probe_dataset.read(config.outcomes, config.pair)  # before the model is read
    out = folder_for("--out", args.out)
    result = probing.run(load(args.model, args.dtype, **opening(args)), config, out, outcomes)
    probing.print_scores(result["scores"])
    print(f"\nprobe: {out / probing.PROBE}")
    return result


def apply(args: argparse.Namespace) -> Json:
    from sst_jax.data.prompts import read_prompts
    from sst_jax.inference import halting_probe, model
    from sst_jax.lab.probing import probing

    prompts = [record["prompt"] for record in read_prompts(args.prompts)]
    probe = halting_probe.load(args.probe)
    decisions = probing.decide(model.load(args.model, args.dtype, **opening(args)), probe, prompts)
    probing.print_decisions(probe.facts["label"], decisions)
    return {"probe": args.probe, "decisions": decisions}


if __name__ == "__main__":
    sys.exit(run(main))
