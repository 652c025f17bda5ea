"""Measure a model on a task, item by item, at one or more depth policies.

  sst-jax evaluate --model runs/27b --task gsm8k --depth 1,2,3,4 --out runs/27b/gsm8k
  sst-jax evaluate --model runs/27b --task gpqa_diamond --data DIR --depth 1,2,3,4 --out runs/27b/gpqa
  sst-jax evaluate --model runs/270m --task gsm8k --data DIR --measure loss --out runs/270m/loss
  sst-jax evaluate --model runs/27b --task text --data book.txt --depth 1,2 --out runs/27b/text
  sst-jax evaluate --model runs/27b --tasks arc_easy,hellaswag --depth 1,4 --out runs/27b/harness

Zero-shot and greedy. The same command on the same folder resumes. --task takes this project's tasks:
gsm8k, gpqa_diamond, arc_challenge, math_500, words; gsm8k:result and words:result for models that write no steps;
the stories boxes, shelves, rooms, chain, lamp and clock, as rooms:8; and text, perplexity over windows of --data FILE
(plain text, or rows with a field "text"), whose settings a --protocol FILE can fix beforehand. --tasks takes the
names of lm-evaluation-harness (extra `eval`).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sst_jax.console.command import Parser, opening, run, write_json
from sst_jax.errors import InputError

if TYPE_CHECKING:
    from sst_jax.inference.policies import Policy
    from sst_jax.types import Json


def parser() -> Parser:
    parser = Parser(prog="python -m sst_jax.evaluate", description=__doc__)
    add = parser.add_argument
    parser.takes_model()
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--task", metavar="NAME", help="one of this project's tasks, or a file of questions and answers")
    which.add_argument("--tasks", metavar="A,B", help="tasks of lm-evaluation-harness; mmlu_* is a pattern")
    add("--out", required=True, metavar="DIR", help="outcomes.jsonl and result.json go here")
    add("--depth", default="1", metavar="P,Q", help="policies: 1,4,first_token:4,until_stable:0.01:4,probe:FILE")
    add("--data", metavar="DIR", help="folder with the task's file (default: from the hub)")
    add("--protocol", metavar="FILE", help="settings and windows of --task text, fixed beforehand; see docs/links.md")
    add("--window", type=int, metavar="T", help="tokens of a window of --task text (default: 512)")
    add("--grade", metavar="G", help="of a file: exact, number, choice, math, regex:PATTERN or python:FILE")
    add("--allow-code", action="store_true", help="let python:FILE run, which defines grade(text, row)")
    add("--limit", type=int, default=0, metavar="N", help="use only the first N items (0: all)")
    add("--format", choices=("plain", "chat"), help="format of prompts (default: as the run was trained, else plain)")
    add(
        "--measure",
        choices=("answers", "loss"),
        default="answers",
        help="accuracy of answers, or loss of the worked answers in nats (default: answers)",
    )
    add("--max-new-tokens", type=int, metavar="N", help="limit of new tokens per answer (default: the task's)")
    add("--batch-size", type=int, default=8, metavar="B", help="items per batch (default: 8)")
    add("--dtype", choices=("float32", "bfloat16"), help="default: float32 on a CPU, else bfloat16")
    add(
        "--allow-overlap",
        action="store_true",
        help="evaluate a run whose training data overlaps the test, and record it",
    )
    add("--fewshot", type=int, metavar="K", help="few-shot examples in the prompt (--tasks only; default: the task's)")
    add("--include", metavar="DIR", help="folder with your own task files (--tasks only)")
    add("--system", metavar="TEXT", help="system message before each prompt (--tasks only)")
    add("--json", metavar="FILE", help="write the result to FILE too (always in DIR/result.json)")
    return parser


def main(argv: Sequence[str]) -> None:
    args = parser().parse_args(argv)

    from sst_jax.inference import model, policies
    from sst_jax.lab.evaluation import evaluation, report

    out, depths = Path(args.out), tuple(policies.parse_list(args.depth, files=True))
    for flag in ("protocol", "window"):
        if getattr(args, flag) is not None and args.task != "text":
            raise InputError(f"--{flag} goes with --task text")
    if args.tasks:
        result = through_harness(args, depths)
    elif args.task == "text":
        result = over_texts(args, depths)
    else:
        for flag in ("fewshot", "include", "system"):
            if getattr(args, flag) is not None:
                raise InputError(f"--{flag} goes with --tasks")
        config = evaluation.EvalConfig(
            args.task if args.grade is None else f"{args.task}:{args.grade}",
            args.measure,
            depths,
            args.data,
            args.limit,
            args.format,
            args.max_new_tokens,
            args.batch_size,
            args.allow_overlap,
            args.allow_code,
        )
        read = evaluation.read_task(config)  # what can be wrong with the input shows before the model is read
        result = evaluation.run(model.load(args.model, args.dtype, **opening(args)), config, out, read)
        report.print_evaluation(result, out)
    if args.json:
        write_json(args.json, result)


def over_texts(args: argparse.Namespace, policies: Sequence[Policy]) -> Json:
    """Measure perplexity over windows of texts."""
    for flag in ("grade", "format", "max_new_tokens", "fewshot", "include"):
        if getattr(args, flag) is not None:
            raise InputError(f"--{flag.replace('_', '-')} is not for --task text")
    if args.protocol is not None:
        usual = {"data": None, "depth": "1", "window": None, "limit": 0, "batch_size": 8}
        for flag, default in usual.items():
            if getattr(args, flag) != default:
                raise InputError(f"--{flag.replace('_', '-')} is fixed by --protocol {args.protocol}")
    elif args.data is None:
        raise InputError("--task text needs --data FILE (plain text, or rows with a field text), or --protocol FILE")
    elif not all(policy.is_flat for policy in policies):
        raise InputError(f"--depth {args.depth}: a known text is scored at flat depths, such as 1,2,4")
    from sst_jax.inference import model
    from sst_jax.lab.evaluation import protocol, text, text_summary

    if args.protocol is not None:
        fixed = protocol.read_protocol(args.protocol)
    else:
        depths = [policy.first for policy in policies]
        fixed = protocol.of_depths(args.data, depths, args.window or 512, args.limit, args.batch_size)
    text.read_documents(fixed.data)  # what can be wrong with it shows before the model is read
    result = text.run(model.load(args.model, args.dtype, base=args.base), fixed, Path(args.out))
    text_summary.print_text(result)
    return result


def through_harness(args: argparse.Namespace, policies: Sequence[Policy]) -> Json:
    """Run tasks of lm-evaluation-harness, once for each depth."""
    for flag, usual in (("data", None), ("measure", "answers"), ("max_new_tokens", None), ("allow_overlap", False)):
        if getattr(args, flag) != usual:
            raise InputError(f"--{flag.replace('_', '-')} goes with --task; the harness's tasks define it themselves")
    if not all(policy.is_flat for policy in policies):
        raise InputError(f"--depth {args.depth}: the harness runs at flat depths, such as 1,2,4")
    try:
        from sst_jax.inference import model
        from sst_jax.lab.evaluation import harness, report
    except ImportError as error:
        raise InputError(f"--tasks needs lm-evaluation-harness: pip install 'sst-jax[eval]' ({error})") from None
    names = tuple(name.strip() for name in args.tasks.split(",") if name.strip())
    depths = tuple(policy.first for policy in policies)
    config = harness.HarnessConfig(
        names, depths, args.format, args.limit, args.fewshot, args.batch_size, args.include, args.system
    )
    manager = harness.prepare(config, Path(args.out))
    result, measured = harness.run(model.load(args.model, args.dtype, **opening(args)), config, Path(args.out), manager)
    report.print_harness(measured)
    return result


if __name__ == "__main__":
    sys.exit(run(main))
