"""Talk to a model in a terminal; depth, system message and sampling can be changed while talking.

  sst-jax chat --model runs/27b --depth 2

A line is what is said; a line that begins with "/" is a command:

  /depth I        iterations per token from now on: a number, or a policy such as until_stable:0.01:4
  /again [I]      answer the last message once more, at depth I
  /system TEXT    the system message; without a text none. The conversation begins anew
  /set NAME=VALUE temperature, top_k, top_p, max_new_tokens or seed
  /clear          begin anew
  /help           this list
  /quit           end, as Ctrl-D does; Ctrl-C ends an answer
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

from sst_jax.console.command import Parser, opening, run
from sst_jax.errors import InputError

HELP = __doc__[__doc__.index("  /depth") :] if __doc__ else ""  # there is none under python -OO


def parser() -> Parser:
    parser = Parser(prog="python -m sst_jax.chat", description=__doc__)
    add = parser.add_argument
    parser.takes_model()
    add("--depth", default="1", metavar="I", help="iterations per token, or a policy (default: 1)")
    add("--system", metavar="TEXT", help="a system message")
    add("--max-new-tokens", type=int, default=256, metavar="N", help="limit of new tokens per answer (default: 256)")
    add("--temperature", type=float, default=0.0, metavar="T", help="sampling temperature; 0 is greedy (default)")
    add("--top-k", type=int, default=0, metavar="K", help="sample from the K most probable tokens (0: all)")
    add("--top-p", type=float, default=1.0, metavar="P", help="sample from the smallest set with probability P")
    add("--seed", type=int, default=0, help="seed of sampling (default: 0); answer number i uses seed + i")
    add("--dtype", choices=("float32", "bfloat16"), help="default: float32 on a CPU, else bfloat16")
    return parser


def main(argv: Sequence[str], read: Callable[[str], str] = input) -> None:
    args = parser().parse_args(argv)

    from sst_jax.data.unicode import check_unicode
    from sst_jax.inference import conversation
    from sst_jax.inference.model import load

    check_unicode(args.system, "--system")
    settings = conversation.Settings(args.max_new_tokens, args.temperature, args.top_k, args.top_p, args.seed)
    model = load(args.model, args.dtype, **opening(args))
    talk = conversation.Conversation(model, args.depth, args.system, settings)
    if note := conversation.note_on_turns(model.tokenizer):
        print(note, file=sys.stderr)
    print("Say something; /help lists the commands, Ctrl-D ends.", file=sys.stderr)
    while True:
        try:
            line = read("> ").strip()
        except (EOFError, KeyboardInterrupt):
            print(file=sys.stderr)
            return
        if line in ("/quit", "/exit"):
            return
        if not line:
            continue
        try:
            if line == "/help":
                print(HELP, end="", file=sys.stderr)
                continue
            for piece in talk.say(line):
                print(piece, end="", flush=True)
            print()
            if talk.note:
                print(talk.note, file=sys.stderr)
        except KeyboardInterrupt:
            print("\n(the answer is cut off here)", file=sys.stderr)
        except InputError as error:
            print(f"error: {error}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(run(main))
