"""Generates text, streamed as it comes.

  python -m sst_jax.generate --model runs/quickstart --depth 4 --question "Ann has 3 boxes of 4 pens. How many?"
  python -m sst_jax.generate --model google/gemma-3-1b-it --chat --prompt "Why is the sky blue?"
  python -m sst_jax.generate --model MODEL --prompts prompts.txt --json answers.json

--depth I iterates the stack I times at every position from the first generated one; it needs a model with a stream.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from sst_jax.console.command import Parser, run, write_json
from sst_jax.errors import InputError


def parser() -> Parser:
    parser = Parser(prog="python -m sst_jax.generate", description=__doc__)
    parser.add_argument("--model", required=True, metavar="MODEL", help="folder, hub id, GGUF file or training run")
    given = parser.add_mutually_exclusive_group(required=True)
    given.add_argument("--prompt", metavar="TEXT", help="continue TEXT")
    given.add_argument("--question", metavar="TEXT", help="ask TEXT in the format of the training examples")
    given.add_argument("--prompts", metavar="FILE", help="one prompt a line, answered in one batch")
    parser.add_argument("--chat", action="store_true", help="wrap the prompt in the chat template")
    parser.add_argument("--depth", type=int, default=1, metavar="I", help="iterations at each position (default: 1)")
    parser.add_argument("--max-new-tokens", type=int, default=128, metavar="N", help="at most N tokens (default: 128)")
    parser.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0 is greedy (default)")
    parser.add_argument("--top-k", type=int, default=0, metavar="K", help="sample from the K likeliest (0: all)")
    parser.add_argument("--top-p", type=float, default=1.0, metavar="P", help="sample from the likeliest share P")
    parser.add_argument("--seed", type=int, default=0, help="of sampling (default: 0)")
    parser.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="end an answer here; may be repeated"
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: float32 on a CPU, else bfloat16")
    parser.add_argument("--json", metavar="FILE", help="write prompts, answers and speed to FILE")
    return parser


def main(argv: Sequence[str]) -> None:
    args = parser().parse_args(argv)
    if args.depth < 1:
        raise InputError(f"--depth {args.depth} must be at least 1")
    prompts = [args.prompt if args.question is None else args.question]
    if args.prompts:
        try:
            prompts = [line for line in Path(args.prompts).read_text(encoding="utf-8").splitlines() if line.strip()]
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"--prompts {args.prompts} cannot be read: {error}") from None
        if not prompts:
            raise InputError(f"--prompts {args.prompts} holds no prompt")

    from sst_jax.data.prompts import prompt_tokens
    from sst_jax.inference.model import load

    model = load(args.model, args.dtype)
    if args.depth > 1 and model.config.stream is None:
        raise InputError(f"--depth {args.depth} needs a model with a stream; {args.model} is a plain backbone")
    asked: list = prompts
    if args.question is not None:
        recipe = model.facts.get("recipe") or {}
        asked = [prompt_tokens(args.question, model.tokenizer, recipe.get("data", {}).get("format", "plain"))]
    started, first, live = time.monotonic(), None, len(prompts) == 1
    if live and args.prompt is not None and not args.chat:
        print(args.prompt, end="", flush=True)
    answers = {}
    for piece in model.stream(
        asked, depth=args.depth, max_new_tokens=args.max_new_tokens, temperature=args.temperature, top_k=args.top_k,
        top_p=args.top_p, seed=args.seed, stop=args.stop, chat=args.chat,
    ):  # fmt: skip
        first = first or time.monotonic()
        if live:
            print(piece.text, end="", flush=True)
        if piece.generation is not None:
            answers[piece.index] = piece.generation
            if not live:
                print(f"--- {prompts[piece.index]}\n{piece.generation.text}")
    if live:
        print()
    tokens, end = sum(len(answer.tokens) for answer in answers.values()), time.monotonic()
    speed = tokens / (end - started)
    # The first token waits for compilation; what comes after it is the speed that a longer answer would see.
    note = f"{tokens} tokens in {end - started:.1f} s with compilation, depth {args.depth}"
    if tokens > len(prompts) and end > first:
        note += f"; {(tokens - len(prompts)) / (end - first):.1f} tokens/s after the first"
    print(note, file=sys.stderr)
    if args.json:
        found = [{"prompt": prompts[row], **dataclasses.asdict(answers[row])} for row in sorted(answers)]
        write_json(args.json, {"model": args.model, "depth": args.depth, "tokens_per_second": speed, "answers": found})


if __name__ == "__main__":
    sys.exit(run(main))
