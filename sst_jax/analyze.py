"""Looks inside a model.

  python -m sst_jax.analyze approximation --model MODEL --out DIR

approximation: how far the parallel forwards are from the exact recurrence, and how the error falls with alpha.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sst_jax.console.command import Parser, run, write_json
from sst_jax.errors import InputError

FORWARDS = "two_pass,k_pass:3,k_pass:4,local:2,local:3"


def parser() -> Parser:
    parser = Parser(prog="python -m sst_jax.analyze", description=__doc__)
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="KIND", parser_class=Parser)
    add = kinds.add_parser(
        "approximation",
        help="errors of the parallel forwards against exact",
        description="Sweeps alpha, passes, depth, length and forward; measures states, logits, KL and gradients.",
    ).add_argument
    add("--model", required=True, metavar="MODEL", help="any model; its stream's options are kept, its alpha is swept")
    add("--out", required=True, metavar="DIR", help="result.json and approximation.png go here")
    add("--text", metavar="FILE", help="text to measure on (default: the embedded word problems)")
    add("--alphas", default="0.003,0.01,0.03,0.1,0.3", metavar="A,B,...", help="default: %(default)s")
    add("--forwards", default=FORWARDS, metavar="F,G:K,...", help="default: %(default)s")
    add("--depths", default="1", metavar="I,...", help="iteration depths (default: 1)")
    add("--lengths", default="128", metavar="T,...", help="positions (default: 128)")
    add("--batch", type=int, default=2, metavar="B", help="rows of text (default: 2)")
    add("--state", choices=("ffn", "block"), help="what a state is (default: the model's own)")
    add("--norm", choices=("none", "rms", "match"), help="how a state is normed (default: the model's own)")
    add("--propagate", choices=("scan", "shift"), help="how block states are carried (default: the model's own)")
    add("--no-gradients", action="store_true", help="leave gradients out")
    add("--dtype", choices=("float32", "float64"), default="float32", help="float64 shows orders below 1e-6")
    return parser


def main(argv: Sequence[str]) -> None:
    args = parser().parse_args(argv)
    approximation(args)


def numbers(text: str, kind: type, flag: str) -> list[Any]:
    """A list from a comma-separated flag; raises InputError naming the flag."""
    try:
        values = [kind(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise InputError(f"{flag} {text}: not a list of {kind.__name__}s separated by commas") from None
    if not values or min(values) <= 0:
        raise InputError(f"{flag} {text}: needs positive numbers")
    return values


def approximation(args: Any) -> None:
    import dataclasses

    import jax

    if args.dtype == "float64":
        jax.config.update("jax_enable_x64", True)
    import jax.numpy as jnp
    import numpy as np

    from sst_jax.analysis import approximation as room
    from sst_jax.console.progress import bar
    from sst_jax.inference.model import load
    from sst_jax.model.config import StreamConfig

    alphas = numbers(args.alphas, float, "--alphas")
    if max(alphas) >= 1:
        raise InputError(f"--alphas {args.alphas}: must be below 1")
    todo = list(
        room.cases(
            [room.parse_forward(part) for part in args.forwards.split(",")],
            alphas,
            numbers(args.depths, int, "--depths"),
            numbers(args.lengths, int, "--lengths"),
        )
    )
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    model = load(args.model, "float32")
    longest = max(case.length for case in todo)
    tokens = text_tokens(model.tokenizer, args.text, args.batch, longest)
    chosen = {name: getattr(args, name) for name in ("state", "norm", "propagate") if getattr(args, name)}
    stream = dataclasses.replace(model.config.stream or StreamConfig(), **chosen)
    config = dataclasses.replace(model.config, stream=stream)
    params = jax.tree.map(lambda x: jnp.asarray(np.asarray(x), args.dtype), model.params)
    with bar(len(todo), "measuring", "case") as meter:
        records = room.measure(
            config, params, tokens, todo, args.dtype, model.tokenizer.bos_id, not args.no_gradients, meter.update
        )
    fitted = room.orders(records)
    title = f"{Path(args.model).name}, state={stream.state}"
    room.figure(records, out / "approximation.png", title)
    write_json(
        out / "result.json",
        {"model": model.facts, "stream": dataclasses.asdict(stream), "dtype": args.dtype, "batch": args.batch,
         "records": records, "orders": fitted},
    )  # fmt: skip
    report(records, fitted)
    print(f"\nfigure: {out / 'approximation.png'}")


def text_tokens(tokenizer: Any, file: str | None, rows: int, length: int) -> Any:
    """[rows, length] tokens of running text, every row beginning with BOS."""
    import numpy as np

    from sst_jax.data.problems import word_problems

    if file is None:
        problems = word_problems("validation", 40 * rows, 0)
        text = "\n\n".join(f"Question: {problem.question}\nAnswer: {problem.answer}" for problem in problems)
    else:
        try:
            text = Path(file).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"--text {file} cannot be read: {error}") from None
    ids = tokenizer.encode_text(text)
    width = length - 1
    if len(ids) < rows * width:
        raise InputError(
            f"--text {file or '(embedded)'} has {len(ids)} tokens; {rows} rows of {length} need {rows * width}"
        )
    body = np.asarray(ids[: rows * width], np.int32).reshape(rows, width)
    return np.concatenate([np.full((rows, 1), tokenizer.bos_id, np.int32), body], axis=1)


def report(records: list[dict[str, Any]], fitted: list[dict[str, Any]]) -> None:
    """The table that a person reads: errors at each alpha, and the fitted order."""
    alphas = sorted({record["alpha"] for record in records}, reverse=True)
    for depth, length in sorted({(record["depth"], record["length"]) for record in records}):
        here = [record for record in records if (record["depth"], record["length"]) == (depth, length)]
        print(f"\nrelative error of the logits against exact, depth {depth}, {length} positions")
        print(f"{'':14}" + "".join(f"{f'alpha {alpha:g}':>12}" for alpha in alphas) + f"{'order':>8}")
        effect = {record["alpha"]: record["stream_effect"] for record in here}
        print(f"{'stream effect':14}" + "".join(f"{effect[alpha]:12.1e}" for alpha in alphas))
        for line in fitted:
            if (line["depth"], line["length"]) != (depth, length):
                continue
            errors = {record["alpha"]: record["logits"] for record in here if record["name"] == line["name"]}
            slope = f"{line['logits']:8.2f}" if line["logits"] is not None else f"{'-':>8}"
            print(f"{line['name']:14}" + "".join(f"{errors[alpha]:12.1e}" for alpha in alphas) + slope)
        if "adapter_gradient" in here[0]:
            near = min(alphas, key=lambda alpha: abs(alpha - 0.03))
            print(f"gradients at alpha {near:g}: error (cosine), adapter and alpha's parameters")
            for record in here:
                if record["alpha"] == near:
                    parts = (
                        f"{record[f'{part}_gradient']:.1e} ({record[f'{part}_cosine']:.6f})"
                        for part in ("adapter", "blend")
                    )
                    print(f"{record['name']:14}  " + "   ".join(parts))


if __name__ == "__main__":
    sys.exit(run(main))
