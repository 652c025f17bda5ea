"""Analyze what iterating at a position does to a model's hidden states, as one HTML page.

  sst-jax analyze --model runs/27b --prompts prompts.txt --depths 1,4 --out runs/27b/basins
  sst-jax analyze --model runs/27b --task gsm8k --data DIR --limit 50 --depths 1,2,3,4 --out runs/27b/basins
  sst-jax analyze approximation --model MODEL --out DIR

Each text is run at every depth. Cosine similarities between depths, the tokens that change with them, the noise floor
and the controls go to DIR/report.html, figures and result.json. The same command on the same folder resumes. Prompts
are continued at the first depth, unless a .jsonl gives a field `text` to every one, or --text worked takes the worked
answers of a task.

approximation: how far the parallel forwards are from the exact recurrence, and how the error falls with alpha.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sst_jax.console.command import Parser, folder_for, numbers, opening, run, write_json

if TYPE_CHECKING:
    from sst_jax.types import Json

FORWARDS = "two_pass,k_pass:3,k_pass:4,local:2,local:3"


def parser() -> Parser:
    parser = Parser(prog="python -m sst_jax.analyze", description=__doc__)
    add = parser.add_argument
    parser.takes_model("any model with a stream")
    given = parser.add_mutually_exclusive_group(required=True)
    given.add_argument(
        "--prompts", metavar="FILE", help="one prompt a line, or .jsonl with `prompt` and optionally `text`"
    )
    given.add_argument("--task", metavar="NAME", help="the questions of a task of `evaluate`, such as gsm8k, or a file")
    add("--out", required=True, metavar="DIR", help="report.html, figures, result.json and what was collected go here")
    add("--depths", default="1,4", metavar="A,B,...", help="the first is compared with the others (default: 1,4)")
    add(
        "--text",
        choices=("generated", "worked"),
        default="generated",
        help="continuation of a task's questions: generated, or the worked answer",
    )
    add("--data", metavar="DIR", help="folder with the task's file (default: from the hub)")
    add("--grade", metavar="G", help="of a file of questions and answers, as `evaluate` takes it")
    add("--limit", type=int, default=50, metavar="N", help="use only the first N prompts (default: 50; 0: all)")
    add(
        "--format",
        choices=("plain", "chat"),
        help="format of a task's prompts (default: as the run was trained, else plain)",
    )
    add("--max-new-tokens", type=int, default=64, metavar="N", help="length of generated texts (default: 64)")
    add(
        "--between",
        choices=("runs", "iterations"),
        default="runs",
        help="compare one run per depth, or the iterations of one run",
    )
    add(
        "--what",
        choices=("output", "memory"),
        default="output",
        help="compare layer outputs, or the states of the stream (memory)",
    )
    add("--layer", type=int, default=-1, metavar="L", help="layer in which shifts are tested (default: -1, the last)")
    add("--controls", type=int, default=10, metavar="N", help="problems that are also run as controls (default: 10)")
    add("--no-rounding", action="store_true", help="omit the bfloat16 run, and with it the noise floor")
    add("--batch-size", type=int, default=4, metavar="B", help="problems per batch (default: 4)")
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="dtype of the model (default: float32)")
    add("--probe", metavar="FILE", help="include this probe's scores in the report")
    add("--json", metavar="FILE", help="write the result to FILE too (always in DIR/result.json)")
    return parser


def approximation_parser() -> Parser:
    parser = Parser(
        prog="python -m sst_jax.analyze approximation",
        description="Sweeps alpha, passes, depth, length and forward; measures states, logits, KL and gradients.",
    )
    add = parser.add_argument
    parser.takes_model("any model; its stream's options are kept, its alpha is swept")
    add("--out", required=True, metavar="DIR", help="result.json and approximation.png go here")
    add("--text", metavar="FILE", help="text to measure on (default: the embedded word problems)")
    add("--alphas", default="0.003,0.01,0.03,0.1,0.3", metavar="A,B,...", help="default: %(default)s")
    add("--forwards", default=FORWARDS, metavar="F,G:K,...", help="default: %(default)s")
    add("--depths", default="1", metavar="I,...", help="iteration depths (default: 1)")
    add("--lengths", default="128", metavar="T,...", help="positions (default: 128)")
    add("--batch", type=int, default=2, metavar="B", help="sequences of text (default: 2)")
    add("--state", choices=("ffn", "block"), help="what a state is (default: the model's own)")
    add("--norm", choices=("none", "rms", "match"), help="how a state is normed (default: the model's own)")
    add("--propagate", choices=("scan", "shift"), help="how block states are carried (default: the model's own)")
    add("--no-gradients", action="store_true", help="omit gradients")
    add("--dtype", choices=("float32", "float64"), default="float32", help="float64 shows orders below 1e-6")
    add("--json", metavar="FILE", help="write the result to FILE too (always in DIR/result.json)")
    return parser


def main(argv: Sequence[str]) -> None:
    if argv and argv[0] == "approximation":
        args = approximation_parser().parse_args(argv[1:])
        result = approximate(args)
    else:
        args = parser().parse_args(argv)
        result = analyze(args)
    if args.json:
        write_json(args.json, result)


def analyze(args: argparse.Namespace) -> Json:
    from sst_jax.inference import halting_probe, model
    from sst_jax.lab.analysis import analysis, findings

    config = analysis.AnalysisConfig(
        prompts=args.prompts,
        task=args.task if args.grade is None else f"{args.task}:{args.grade}",
        text=args.text,
        data=args.data,
        limit=args.limit,
        format=args.format,
        depths=tuple(numbers("--depths", args.depths, int)),
        max_new_tokens=args.max_new_tokens,
        between=args.between,
        what=args.what,
        layer=args.layer,
        controls=args.controls,
        rounding=not args.no_rounding,
        batch_size=args.batch_size,
    )
    questions, out = analysis.read_questions(config), folder_for("--out", args.out)  # before the model is read
    probe = None if args.probe is None else halting_probe.load(args.probe)
    result = analysis.run(model.load(args.model, args.dtype, **opening(args)), config, out, questions, probe)
    print(f"{findings.summary(result)}\n\npage: {out / 'report.html'}")
    return result


def approximate(args: argparse.Namespace) -> Json:
    import jax

    if args.dtype == "float64":  # before any module of the model makes its constants
        jax.config.update("jax_enable_x64", True)

    from sst_jax.inference import model
    from sst_jax.lab.analysis import approximation

    config = approximation.ApproximationConfig(
        forwards=tuple(args.forwards.split(",")),
        alphas=tuple(numbers("--alphas", args.alphas, float)),
        depths=tuple(numbers("--depths", args.depths, int)),
        lengths=tuple(numbers("--lengths", args.lengths, int)),
        text=args.text,
        batch=args.batch,
        stream={name: getattr(args, name) for name in ("state", "norm", "propagate") if getattr(args, name)},
        gradients=not args.no_gradients,
        dtype=args.dtype,
    )
    out = folder_for("--out", args.out)
    result = approximation.run(model.load(args.model, "float32", **opening(args)), config, out, Path(args.model).name)
    approximation.print_orders(result)
    print(f"\nfigure: {out / approximation.FIGURE}")
    return result


if __name__ == "__main__":
    sys.exit(run(main))
