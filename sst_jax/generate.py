"""Generate text, printed as it comes.

  sst-jax generate --model runs/quickstart --depth 4 --question "Ann has 3 boxes of 4 pens. How many?"
  sst-jax generate --model google/gemma-3-1b-it --chat --prompt "Why is the sky blue?"
  sst-jax generate --model MODEL --prompts prompts.jsonl --n 4 --temperature 0.7 --out answers.jsonl

--depth I runs the stack I times at every position, from the prompt's last one on (or as stream.iterate_prompt says); it
needs a model with a stream.
Other policies: "first_token:I" (I times where the first token comes from, then once), "until_stable:TOL:I" (until
the final hidden state moves by a share of at most TOL), "until_confident:P:I" (until the next token's largest
probability is at least P; both at most I times) and "probe:FILE" (as a probe decides, see `sst-jax probe`).
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, TextIO

from sst_jax.console.command import Parser, opening, run, write_json
from sst_jax.console.progress import counted
from sst_jax.errors import InputError

if TYPE_CHECKING:
    from sst_jax.inference.model import Model
    from sst_jax.inference.policies import Policy
    from sst_jax.types import Json, JsonValue

# Flags that `generate_iter` takes.
SETTINGS = (
    "max_new_tokens",
    "temperature",
    "top_k",
    "top_p",
    "stop",
    "chat",
    "system",
    "template_args",
    "parse_special",
)


def parser() -> Parser:
    parser = Parser(prog="python -m sst_jax.generate", description=__doc__)
    parser.takes_model()
    given = parser.add_mutually_exclusive_group(required=True)
    given.add_argument("--prompt", metavar="TEXT", help="continue TEXT; special tokens in it are characters")
    given.add_argument("--question", metavar="TEXT", help="ask TEXT in the format of the training examples")
    given.add_argument(
        "--prompts", metavar="FILE", help="one prompt a line, or .jsonl, .json, .csv with a field `prompt`"
    )
    parser.add_argument("--chat", action="store_true", help="wrap the prompt in the chat template")
    parser.add_argument("--system", metavar="TEXT", help="a system message before the prompt, with --chat")
    parser.add_argument(
        "--template-arg",
        action="append",
        default=[],
        dest="template_args",
        metavar="NAME=VALUE",
        help="a variable of the chat template, such as enable_thinking=false; may be repeated",
    )
    parser.add_argument(
        "--parse-special",
        action="store_true",
        help='read special tokens in a prompt, such as "<|im_start|>", as such (default: as their characters)',
    )
    parser.add_argument(
        "--format", choices=("plain", "chat"), help="format of --question (default: as trained, else plain)"
    )
    depth = parser.add_mutually_exclusive_group()
    depth.add_argument("--depth", default="1", metavar="I", help="iterations per token, or a policy (default: 1)")
    depth.add_argument("--halt", metavar="PROBE", help="let a probe choose the depth, as --depth probe:PROBE")
    parser.add_argument("--n", type=int, default=1, metavar="N", help="answers per prompt (default: 1)")
    parser.add_argument("--batch", type=int, default=8, metavar="B", help="sequences decoded together (default: 8)")
    parser.add_argument(
        "--max-new-tokens", type=int, default=128, metavar="N", help="limit of new tokens per answer (default: 128)"
    )
    parser.add_argument(
        "--temperature", type=float, default=0.0, metavar="T", help="sampling temperature; 0 is greedy (default)"
    )
    parser.add_argument(
        "--top-k", type=int, default=0, metavar="K", help="sample from the K most probable tokens (0: all)"
    )
    parser.add_argument(
        "--top-p",
        type=float,
        default=1.0,
        metavar="P",
        help="sample from the smallest set of tokens with probability P (nucleus)",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of sampling (default: 0); answer i uses seed + i")
    parser.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="end an answer at TEXT; may be repeated"
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: float32 on a CPU, else bfloat16")
    parser.add_argument("--out", metavar="FILE", help="write answers to FILE, one JSON object a line, as they finish")
    parser.add_argument("--json", metavar="FILE", help="write prompts, answers and speed to FILE")
    return parser


def main(argv: Sequence[str]) -> None:
    args = parser().parse_args(argv)
    read_arguments(args)

    from sst_jax.data.prompts import read_prompts
    from sst_jax.data.unicode import check_unicode
    from sst_jax.inference import conversation, halting_probe, policies, session
    from sst_jax.inference.model import load

    for name in ("prompt", "question", "system"):
        check_unicode(getattr(args, name), f"--{name}")
    prompts = [args.prompt if args.question is None else args.question]
    if args.prompts:
        prompts = [record["prompt"] for record in read_prompts(args.prompts)]

    policy = policies.parse(args.depth if args.halt is None else f"probe:{args.halt}", files=True)
    model = load(args.model, args.dtype, **opening(args))
    if isinstance(policy.select_depth, halting_probe.Probe):
        policy.select_depth.check(model)
    try:
        session.check_policy(model.config, policy)
    except InputError as error:
        raise InputError(f"--{error} (--model {args.model})") from None
    if args.chat and (note := conversation.note_on_turns(model.tokenizer)):
        print(note, file=sys.stderr)
    asked: list[str] | list[list[int]] = prompts
    if args.question is not None:
        asked = [question_tokens(args, model)]
    answers, speed = answer_all(args, model, policy, prompts, asked)
    if args.json:
        depth = policy.first if policy.is_flat else policy.name
        write_json(args.json, {"model": args.model, "depth": depth, "tokens_per_second": speed, "answers": answers})


def read_arguments(args: argparse.Namespace) -> None:
    """Check how prompts are asked, and make a dict of --template-arg.

    Raises: InputError naming the flag.
    """
    for name in ("n", "batch"):
        if getattr(args, name) < 1:
            raise InputError(f"--{name} {getattr(args, name)} must be at least 1")
    if args.format and args.question is None:
        raise InputError("--format goes with --question; --chat wraps a prompt in the chat template")
    if args.chat and args.parse_special:
        raise InputError("--parse-special goes with a prompt as it stands, without --chat")
    if (args.system is not None or args.template_args) and not (args.chat or args.question is not None):
        raise InputError("--system and --template-arg go with --chat")
    pairs = [argument.partition("=") for argument in args.template_args]
    for name, equals, value in pairs:
        if not name or not equals:
            raise InputError(f"--template-arg {name}{equals}{value}: write NAME=VALUE")
    args.template_args = {name: _json_or_text(value) for name, _, value in pairs}


def _json_or_text(value: str) -> JsonValue:
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value


def question_tokens(args: argparse.Namespace, model: Model) -> list[int]:
    """Return the prompt of --question, in the format of the training examples."""
    from sst_jax.data.prompts import prompt_tokens
    from sst_jax.inference.model import PromptReading

    format = args.format or model.prompt_format
    if args.system is None and not args.template_args:
        return prompt_tokens(args.question, model.tokenizer, format)
    if format != "chat":
        raise InputError("--system and --template-arg go with --chat, or --question in --format chat")
    return PromptReading(True, args.system, args.template_args, False).tokens(args.question, model.tokenizer)


def answer_all(
    args: argparse.Namespace, model: Model, policy: Policy, prompts: list[str], asked: list[str] | list[list[int]]
) -> tuple[list[Json], float]:
    """Answer prompts in batches, each answer shown when it has ended, one alone as it comes.

    Returns: the answers as they are written, and tokens a second.
    """
    # Side by side, so that the samples of a prompt share its prefill.
    numbers = [number for number in range(len(prompts)) for _ in range(args.n)]
    alone = len(numbers) == 1
    if alone and args.prompt is not None and not args.chat:
        print(args.prompt, end="", flush=True)
    answers: list[Json] = [{}] * len(numbers)
    started, first = time.monotonic(), None
    with open_out(args.out) as out:
        for begin in range(0, len(numbers), args.batch):
            batch = range(begin, min(begin + args.batch, len(numbers)))
            settings = {name: getattr(args, name) for name in SETTINGS}
            if args.question is not None:  # its tokens have them
                settings |= {"system": None, "template_args": None}
            seeds = [args.seed + row for row in batch]
            for delta in model.generate_iter(
                [asked[numbers[row]] for row in batch], depth=policy, seed=seeds, **settings
            ):
                first = first or time.monotonic()
                if alone:
                    print(delta.text, end="", flush=True)
                if delta.generation is None:
                    continue
                row = begin + delta.index
                number, answer = numbers[row], dataclasses.asdict(delta.generation)
                answers[row] = {"index": number, "sample": row - args.n * number, "prompt": prompts[number], **answer}
                if out is not None:
                    print(json.dumps(answers[row], ensure_ascii=False), file=out, flush=True)
                elif not alone:
                    print(f"--- {prompts[number]}\n{delta.generation.text}")
    if alone:
        print()
    end, tokens = time.monotonic(), sum(len(answer["tokens"]) for answer in answers)
    # The first token waits for compilation; the rest says what a longer answer would see.
    note = f"{counted(tokens, 'token')} in {end - started:.1f} s with compilation, depth {policy.name}"
    rest = tokens - min(len(answers), args.batch)
    if first is not None and rest > 0 and end > first:
        note += f"; {rest / (end - first):.1f} tokens/s after the first"
    depths = [depth for answer in answers for depth in answer["depths"]]
    if not policy.is_flat and depths:
        note += f"; {sum(depths) / len(depths):.2f} iterations per token"
    print(note, file=sys.stderr)
    return answers, tokens / (end - started)


def open_out(path: str | None) -> contextlib.AbstractContextManager[TextIO | None]:
    """Return the file for --out, which must not exist yet; a context manager of None without one.

    Raises: InputError.
    """
    if path is None:
        return contextlib.nullcontext()
    try:
        return open(path, "x", encoding="utf-8")
    except OSError as error:
        raise InputError(f"--out {path} cannot be written: {error}") from None


if __name__ == "__main__":
    sys.exit(run(main))
