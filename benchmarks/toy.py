"""One toy, trained from scratch under each forward: what the approximation costs in what can be learned.

    python benchmarks/toy.py --steps 600         S3 words, four forwards and plain, three seeds
    python benchmarks/toy.py --steps 600 --layers 4 --forwards exact,two_pass,local:2
    python benchmarks/toy.py --alpha-range 0.015,0.10 --alpha-init 0.027

The task is to follow a word in the permutation group S3 (`sst_jax/data/statetrack.py`): each symbol is a permutation,
the answer at each position is the product so far. Every answer needs the one before it, so a model without memory that
is trained at one length fails beyond it. All parameters train. Accuracy is over all positions of new words, under the
exact recurrence whatever the model was trained with, at the training length and at two and four times that; chance is
1/6. The errors are those of the parallel forwards' logits against `exact`, on the trained model with alpha set to 0.03.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Sequence
from typing import Any

from sst_jax.console.command import Parser, run, write_json

FORWARDS = "plain,two_pass,local:2,k_pass:3,exact"
PARALLEL = (("two_pass", 2), ("local", 2), ("k_pass", 3))


def parser() -> Parser:
    parser = Parser(prog="python benchmarks/toy.py", description=__doc__)
    parser.add_argument("--forwards", default=FORWARDS, metavar="F,G:K,...", help="default: %(default)s")
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="default: %(default)s")
    parser.add_argument("--steps", type=int, default=1500, metavar="N", help="default: %(default)s")
    parser.add_argument("--layers", type=int, default=2, metavar="L", help="default: %(default)s")
    parser.add_argument("--batch", type=int, default=128, metavar="B", help="default: %(default)s")
    parser.add_argument("--length", type=int, default=12, metavar="T", help="default: %(default)s")
    parser.add_argument("--alpha-range", default="0,1", metavar="LO,HI", help="default: %(default)s, free")
    parser.add_argument("--alpha-init", type=float, default=0.5, metavar="A", help="default: %(default)s")
    parser.add_argument("--gain", type=float, default=1.0, metavar="G", help="factor on the state (default: 1)")
    parser.add_argument("--json", metavar="FILE", help="write the figures to FILE")
    return parser


def train(args: Any, name: str, passes: int) -> dict[str, Any]:
    """Trains all seeds under one forward; their accuracies [seeds, lengths], losses and errors."""
    import jax
    import numpy as np

    from sst_jax.data import statetrack
    from sst_jax.lab.studies import scratch, scratch_study
    from sst_jax.model import rules

    task, times = statetrack.find("s3"), (1, 2, 4)
    lo, hi = (float(part) for part in args.alpha_range.split(","))
    knobs = scratch.stream_knobs().to_dict() | {
        "on": name != "plain", "forward": name, "passes": passes, "alpha_range": (lo, hi),
        "alpha_init": args.alpha_init, "gain": args.gain,
    }  # fmt: skip
    arm = scratch.make_arm(scratch.make_backbone(task, layers=args.layers, d_model=64, d_ff=128, heads=4), knobs)
    schedule = scratch.Schedule(args.steps, args.batch, warmup_steps=min(100, args.steps - 1), seeds=args.seeds)
    started = time.monotonic()
    params, losses = scratch.fit(arm, task, args.length, schedule, title=name)
    found = scratch_study.measure(arm, params, task, args.length, 512, times, depths=(1,))
    errors: dict[str, list[float]] = {}
    if arm.config.stream is not None:
        narrow = dataclasses.replace(arm.config, stream=dataclasses.replace(arm.config.stream, alpha=0.03))
        words = statetrack.draw(task, "test", 512, args.length * times[-1], (scratch_study.TESTS, 0))
        for seed in range(args.seeds):
            fixed = {**jax.tree.map(lambda leaf, seed=seed: leaf[seed], params), "blend": {}}
            truth = rules.logits(narrow, fixed, words.symbols, forward="exact")
            for kind, k in PARALLEL:
                off = rules.logits(narrow, fixed, words.symbols, forward=kind, passes=k) - truth
                error = float(np.linalg.norm(off) / np.linalg.norm(truth))
                errors.setdefault(f"{kind}:{k}", []).append(error)
    return {
        "forward": name, "passes": passes, "losses": losses[-50:].mean(0).tolist(), "errors": errors,
        "accuracy": np.stack([found[f"share {factor}/1"].mean(1) for factor in times], 1).tolist(),
        "seconds": time.monotonic() - started,
    }  # fmt: skip


def main(argv: Sequence[str]) -> None:
    args = parser().parse_args(argv)
    import numpy as np

    records = []
    for text in args.forwards.split(","):
        name, _, passes = text.partition(":")
        record = train(args, name, int(passes or 2))
        records.append(record)
        table = np.array(record["accuracy"])
        spread = "  ".join(
            f"{middle:.2f} [{low:.2f}, {high:.2f}]"
            for middle, low, high in zip(table.mean(0), table.min(0), table.max(0), strict=True)
        )
        seconds = record["seconds"]
        print(f"{text:10} accuracy at 1x, 2x, 4x, mean [range]: {spread}   {seconds:.0f} s", flush=True)
        if record["errors"]:
            errors = "  ".join(f"{kind} {np.mean(values):.1e}" for kind, values in record["errors"].items())
            print(f"{'':10} errors at alpha = 0.03: {errors}", flush=True)
    if args.json:
        write_json(args.json, {"arguments": vars(args), "records": records})


if __name__ == "__main__":
    sys.exit(run(main))
