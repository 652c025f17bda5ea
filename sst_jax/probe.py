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

import sys
from collections.abc import Sequence
from typing import Any

from sst_jax.console.command import Parser, folder_for, run, write_json
from sst_jax.errors import InputError


def parser() -> Parser:
    parser = Parser(prog="python -m sst_jax.probe", description=__doc__)
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="fit|apply", parser_class=Parser)
    add = kinds.add_parser("fit", help="nested cross-validation, and a probe of all items").add_argument
    add("--model", required=True, metavar="MODEL", help="the model that the outcomes are of")
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
    add = kinds.add_parser("apply", help="print a probe's decision for each prompt").add_argument
    add("--model", required=True, metavar="MODEL", help="the model that the probe was fitted on")
    add("--probe", required=True, metavar="FILE", help="probe file written by fit")
    add("--prompts", required=True, metavar="FILE", help="one prompt a line, or .jsonl with a field `prompt` a line")
    add("--dtype", choices=("float32", "bfloat16"), help="default: float32 on a CPU, else bfloat16")
    add("--json", metavar="FILE", help="write probabilities and depths to FILE")
    return parser


def main(argv: Sequence[str]) -> None:
    args = parser().parse_args(argv)
    {"fit": fit, "apply": apply}[args.kind](args)


def fit(args: Any) -> None:
    for name in ("first", "inputs", "hidden", "permutations"):
        if getattr(args, name) < 1:
            raise InputError(f"--{name} {getattr(args, name)} must be at least 1")
    try:
        depths = tuple(int(part) for part in args.depths.split(","))
    except ValueError:
        depths = ()
    if len(depths) != 2 or not 1 <= depths[0] < depths[1]:
        raise InputError(f"--depths {args.depths}: give two depths, the smaller first, such as 1,4")

    from sst_jax.inference.model import load
    from sst_jax.lab.analysis import figures
    from sst_jax.lab.probing import fit as room
    from sst_jax.lab.probing import probe_dataset

    records = probe_dataset.read(args.outcomes, depths)
    model = load(args.model, args.dtype)
    layers = model.config.backbone.num_layers
    layer = layers // 2 if args.layer is None else args.layer
    if model.config.stream is None:
        raise InputError(f"--model {args.model} has no stream, and so no memory to read")
    if not 0 <= layer < layers:
        raise InputError(f"--layer {layer}: the model has layers 0 to {layers - 1}")
    out = folder_for("--out", args.out)  # before the hours
    items = probe_dataset.items(records, depths, model.tokenizer, model.provenance)
    settings = room.Settings(args.inputs, args.hidden, permutations=args.permutations, seed=args.seed)
    room.asked_about(items, args.label)  # before the states are computed
    states = room.first_states(model, [item.prompt for item in items], args.first)
    fitted = room.fit_probe(model, items, states, depths, args.label, layer, args.first, settings, args.sweep)
    room.save(fitted, out / "probe.safetensors")
    scores = fitted.facts["scores"]
    figures.save(figures.roc(scores["roc"], scores["auc"]["value"]), out)
    result = {**fitted.facts, "outcomes": args.outcomes, "items": [item.id for item in items]}
    write_json(out / "result.json", result)
    if args.json:
        write_json(args.json, result)
    report(scores)
    print(f"\nprobe: {out / 'probe.safetensors'}")


def report(scores: dict[str, Any]) -> None:
    """Print the summary of a fit."""
    print(scores["summary"])
    capacity = scores["capacity"]
    print(
        f"fitted to the items themselves {capacity['fitted_accuracy']:.1%} right, to shuffled labels "
        f"{capacity['fitted_accuracy_shuffled']:.1%}: what a probe of this size can memorise"
    )
    print(f"\n{'policy':10}{'correct':>9}{'regressions':>13}{'fixes':>7}{'mean depth':>12}")
    for name, found in scores["routing"].items():
        print(f"{name:10}{found['right']:9}{found['broken']:13}{found['mended']:7}{found['depth']:12.2f}")
    if scores["harm"]:
        harm = scores["harm"]
        print(
            f"regressions by routing, of correct answers: {harm['value']:.1%} [{harm['low']:.1%}, {harm['high']:.1%}]"
        )
    for record in scores["sweep"] or ():
        low, high = record["null"]
        print(
            f"layer {record['layer']:3}: AUROC {record['auc']:.3f}, shuffled labels {low:.3f} to {high:.3f}; against "
            f"the best layer of each shuffle p = {record['p_of_the_largest']:.3g}"
        )


def apply(args: Any) -> None:
    from sst_jax.data.prompts import read_prompts

    prompts = [record["prompt"] for record in read_prompts(args.prompts)]

    from sst_jax.inference import halting_probe as probes
    from sst_jax.inference.model import load
    from sst_jax.lab.probing.fit import first_states

    probe = probes.load(args.probe)
    model = load(args.model, args.dtype)
    probe.check(model)
    states = first_states(model, [model.tokenizer.encode(prompt) for prompt in prompts], probe.facts["first"])
    decisions = [
        {"prompt": prompt, "probability": probe.probability(state), "depth": probe(state)}
        for prompt, state in zip(prompts, states, strict=True)
    ]
    print(f"{'p(' + probe.facts['label'] + ')':>12}{'depth':>7}  prompt")
    for found in decisions:
        print(f"{found['probability']:12.3f}{found['depth']:7}  {found['prompt'][:80]}")
    if args.json:
        write_json(args.json, {"probe": args.probe, "decisions": decisions})


if __name__ == "__main__":
    sys.exit(run(main))
