"""Train a stream and its matched controls: same data, order and seeds, one command.

  sst-jax pair --config configs/sst.py:size=1b --seeds 3 --workdir runs/pair
  sst-jax pair --config configs/quickstart.py --config.data.path=DIR --seeds 3 --workdir runs/pair \\
      --task gsm8k --data DIR --limit 100

Arms: stream, baseline (the stream off), compute (the baseline with the stream's FLOPs as more steps), parameters (the
baseline with a LoRA rank that has at least the stream's parameters more), and on request memoryless (the stream's
parameters in their place, without a memory). --task then measures every run and compares stream with each other arm.

DIR/arms.json has every arm's overrides, resolved recipe and its differences from the stream's; DIR/ARM-SEED are run
folders of `train`, DIR/evaluations/ARM-SEED those of `evaluate`. The same command resumes.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from sst_jax.console.command import Parser, run, write_json


def parser() -> Parser:
    parser = Parser(prog="python -m sst_jax.pair", description=__doc__)
    add = parser.add_argument
    add("--config", required=True, metavar="FILE", help="a recipe with the stream on, such as configs/quickstart.py")
    parser.takes_overrides("--config.train.steps=200, in all arms")
    add("--workdir", required=True, metavar="DIR", help="run folders and results go here")
    add("--seeds", type=int, default=1, metavar="N", help="train.seed and the N - 1 after it (default: 1)")
    add("--arms", metavar="A,B", help="default: stream,baseline,compute,parameters")
    add("--task", metavar="NAME", help="measure every run on this task of `evaluate`")
    add("--measure", choices=("answers", "loss"), default="loss", help="default: loss, of the worked answers")
    add("--depth", default="1", metavar="P,Q", help="depth policies for arms with a stream (default: 1)")
    add("--data", metavar="DIR", help="folder with the task's file")
    add("--limit", type=int, default=0, metavar="N", help="use only the first N items (0: all)")
    add("--batch-size", type=int, default=8, metavar="B", help="items per batch (default: 8)")
    add("--json", metavar="FILE", help="write the result to FILE too (always in DIR/result.json)")
    return parser


def main(argv: Sequence[str]) -> None:
    args, overrides = parser().parse_with_overrides(argv)

    from sst_jax.inference import policies
    from sst_jax.lab.evaluation import EvalConfig
    from sst_jax.lab.studies import arms, pairs

    measured = None
    if args.task:
        depths = tuple(policies.parse_list(args.depth, files=True))
        measured = EvalConfig(
            args.task, args.measure, depths, data=args.data, limit=args.limit, batch_size=args.batch_size
        )
    names = tuple(args.arms.split(",")) if args.arms else arms.DEFAULT
    config = pairs.PairConfig(args.config, tuple(overrides), args.seeds, names, measured)
    result = pairs.pair(config, Path(args.workdir))
    pairs.print_heldout(result)
    if args.task:
        pairs.print_differences(result)
    if args.json:
        write_json(args.json, result)


if __name__ == "__main__":
    sys.exit(run(main))
