"""Print a recipe's knobs: every value, where it comes from, and what it means.

  sst-jax recipe --config quickstart
  sst-jax recipe --config sst:size=1b --config.stream.forward=exact --changed

Values come from the defaults, from the recipe's file, or from the command line; --changed leaves the defaults out.
"""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Sequence

from sst_jax.console.command import Parser, run, write_json

WIDTH = 120


def parser() -> Parser:
    parser = Parser(prog="python -m sst_jax.recipe", description=__doc__)
    parser.add_argument("--config", required=True, metavar="FILE", help="a recipe, such as quickstart or sst:size=1b")
    parser.takes_overrides()
    parser.add_argument("--changed", action="store_true", help="leave out what has its default")
    parser.add_argument("--json", metavar="FILE", help="write the knobs to FILE")
    return parser


def main(argv: Sequence[str]) -> None:
    args, overrides = parser().parse_with_overrides(argv)

    from sst_jax.training import knobs

    found = [
        knob for knob in knobs.read_knobs(args.config, overrides) if knob.origin != knobs.DEFAULT or not args.changed
    ]
    for knob in found:
        print(f"{knob.name} = {knob.value!r}" + f"  ({knob.origin})" * (knob.origin != knobs.DEFAULT))
        if knob.meaning:
            print(textwrap.fill(knob.meaning, WIDTH, initial_indent="    ", subsequent_indent="    "))
    if args.json:
        write_json(args.json, [knob._asdict() for knob in found])


if __name__ == "__main__":
    sys.exit(run(main))
