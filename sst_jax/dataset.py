"""Show what a recipe would learn from: counts, lengths, and examples with their learned tokens marked.

  sst-jax dataset --config quickstart --config.data.path=mine.jsonl --show 3
  sst-jax dataset --config sst:size=1b --config.data.path=owner/name --config.data.config=main --json data.json

Rows are messages, prompt and completion, instruction and output, question and answer, or text, in .jsonl, .json, .csv
or .parquet files, a folder of them, or a set of the hub. Nothing is trained; of the model only its tokenizer is used.
Learned tokens are green on a terminal, and stand in « » elsewhere.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from sst_jax.console.command import Parser, run, write_json
from sst_jax.errors import InputError


def parser() -> Parser:
    parser = Parser(prog="python -m sst_jax.dataset", description=__doc__)
    parser.add_argument("--config", required=True, metavar="FILE", help="a recipe, such as quickstart or sst:size=1b")
    parser.takes_overrides("--config.data.path=mine.jsonl")
    parser.add_argument("--show", type=int, default=2, metavar="N", help="examples shown of each source (default: 2)")
    parser.add_argument("--json", metavar="FILE", help="write counts and examples to FILE too")
    return parser


def main(argv: Sequence[str]) -> None:
    args, overrides = parser().parse_with_overrides(argv)
    if args.show < 0:
        raise InputError(f"--show {args.show} must not be negative")

    from sst_jax.data.template_file import use_template_file
    from sst_jax.training import data_report
    from sst_jax.training.problems import split_problems
    from sst_jax.training.recipe import read_recipe
    from sst_jax.weights.loading import resolve

    recipe = read_recipe(args.config, overrides)
    split = split_problems(recipe.data, recipe.train.seed)
    tokenizer = resolve(recipe.model.source).tokenizer()
    if recipe.data.chat_template:
        use_template_file(tokenizer, recipe.data.chat_template, "data.chat_template")
    found = data_report.report(split, recipe.data, tokenizer, args.show)
    print(data_report.describe(found, colour=sys.stdout.isatty()))
    if args.json:
        write_json(args.json, found)


if __name__ == "__main__":
    sys.exit(run(main))
