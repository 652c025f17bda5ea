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

import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sst_jax.console.command import Parser, folder_for, run, write_json
from sst_jax.errors import InputError

FORWARDS = "two_pass,k_pass:3,k_pass:4,local:2,local:3"


def parser() -> Parser:
    parser = Parser(prog="python -m sst_jax.analyze", description=__doc__)
    add = parser.add_argument
    add("--model", required=True, metavar="MODEL", help="any model with a stream")
    given = parser.add_mutually_exclusive_group(required=True)
    given.add_argument(
        "--prompts", metavar="FILE", help="one prompt a line, or .jsonl with `prompt` and optionally `text`"
    )
    given.add_argument("--task", metavar="NAME", help="the questions of a task of `evaluate`, such as gsm8k or words")
    add("--out", required=True, metavar="DIR", help="report.html, figures, result.json and what was collected go here")
    add("--depths", default="1,4", metavar="A,B,...", help="the first is compared with the others (default: 1,4)")
    add(
        "--text",
        choices=("generated", "worked"),
        default="generated",
        help="continuation of a task's questions: generated, or the worked answer",
    )
    add("--data", metavar="DIR", help="folder with the task's file (default: from the hub)")
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
    add("--model", required=True, metavar="MODEL", help="any model; its stream's options are kept, its alpha is swept")
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
        approximation(approximation_parser().parse_args(argv[1:]))
    else:
        basins(parser().parse_args(argv))


def basins(args: Any) -> None:
    for name, least in (("limit", 0), ("max_new_tokens", 1), ("controls", 0), ("batch_size", 1)):
        if getattr(args, name) < least:
            raise InputError(f"--{name.replace('_', '-')} {getattr(args, name)} must be at least {least}")
    depths = tuple(numbers(args.depths, int, "--depths"))
    if len(depths) < 2 or list(depths) != sorted(set(depths)):
        raise InputError(f"--depths {args.depths}: give two or more depths in ascending order, such as 1,4")
    asked, out = read_asked(args), folder_for("--out", args.out)
    for package in ("sklearn", "diptest", "tensorstore"):
        if importlib.util.find_spec(package) is None:
            raise InputError(f"the analysis needs {package}, which is not installed: pip install 'sst-jax[analysis]'")

    from sst_jax.console.progress import bar
    from sst_jax.inference import halting_probe as probes
    from sst_jax.inference.model import load
    from sst_jax.lab.analysis import findings, report
    from sst_jax.lab.analysis.collect import Settings
    from sst_jax.lab.analysis.collection import collect

    probe = None if args.probe is None else probes.load(args.probe)
    model = load(args.model, args.dtype)
    layers = model.config.backbone.num_layers
    if model.config.stream is None:
        raise InputError(f"--model {args.model} has no stream: there is nothing that further iterations could change")
    if not -layers <= args.layer < layers:
        raise InputError(f"--layer {args.layer}: the model has layers 0 to {layers - 1}")
    if probe is not None:
        probe.check(model)
    settings = Settings(
        depths, args.between, args.what, not args.no_rounding, args.controls, args.max_new_tokens, args.batch_size
    )
    texts = texts_of(args, asked, model)
    with bar(len(texts), f"walking texts at depths {args.depths}", "problem") as meter:
        collection = collect(model, texts, settings, out / "collected", meter.update)
    with bar(len(texts), "measuring", "problem") as meter:
        found = findings.measure(model, collection, settings, args.layer % layers, meter.update)
    result = {"model": {**model.provenance.to_json(), "recipe": None}, "settings": vars(args), **found.result}
    write_json(out / "result.json", result)
    if args.json:
        write_json(args.json, result)
    page = report.write(out, found, model, probe)
    print(findings.summary(found.result))
    print(f"\npage: {page}")


def read_asked(args: Any) -> list[Any]:
    """Return the prompts' records or the task's items, before the model is read."""
    if args.prompts:
        from sst_jax.data.prompts import read_prompts

        for flag, value, usual in (
            ("--data", args.data, None),
            ("--format", args.format, None),
            ("--text", args.text, "generated"),
        ):
            if value != usual:
                raise InputError(f"{flag} goes with --task")
        asked: list[Any] = read_prompts(args.prompts)
        given = [isinstance(record.get("text"), str) for record in asked]
        if any("text" in record for record in asked) and not all(given):
            raise InputError(
                f"--prompts {args.prompts}, prompt {given.index(False) + 1}, has no text under the key text; give one "
                "to every prompt or to none"
            )
    else:
        from sst_jax.lab.evaluation import tasks

        task = tasks.find(args.task)
        if args.text == "worked" and not task.worked:
            raise InputError(f"--text worked needs worked answers, which {task.name} has none of")
        asked = task.read(args.data)
    return asked[: args.limit or None]


def texts_of(args: Any, asked: list[Any], model: Any) -> list[Any]:
    """Return prompts, and what is given to follow them, as tokens."""
    from sst_jax.data.prompts import prompt_tokens, render
    from sst_jax.lab.analysis.collect import Text

    tokenizer = model.tokenizer
    if args.prompts:
        return [
            Text(
                str(record.get("id", f"prompt {number}")), tokenizer.encode(record["prompt"]),
                tokenizer.encode_text(record["text"]) if "text" in record else None,
            )
            for number, record in enumerate(asked, 1)
        ]  # fmt: skip
    format = args.format or model.prompt_format
    texts = []
    for item in asked:
        prompt = prompt_tokens(item.problem.question, tokenizer, format)
        given = None
        if args.text == "worked":
            given = render(item.problem, tokenizer, format).tokens[len(prompt) :].tolist()
        texts.append(Text(item.id, prompt, given))
    return texts


def numbers(text: str, kind: type, flag: str) -> list[Any]:
    """Return a list from a comma-separated flag; raises InputError naming the flag."""
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

    from sst_jax.console.progress import bar
    from sst_jax.inference.model import load
    from sst_jax.lab.analysis import approximation as room
    from sst_jax.model.config import StreamConfig
    from sst_jax.model.quantization import storages

    alphas = numbers(args.alphas, float, "--alphas")
    if max(alphas) >= 1:
        raise InputError(f"--alphas {args.alphas}: must be below 1")
    lengths = numbers(args.lengths, int, "--lengths")
    if min(lengths) < 2:
        raise InputError(f"--lengths {args.lengths}: at a single position no state has come from anywhere; 2 at least")
    todo = list(
        room.cases(
            [room.parse_forward(part) for part in args.forwards.split(",")],
            alphas,
            numbers(args.depths, int, "--depths"),
            lengths,
        )
    )
    out = folder_for("--out", args.out)
    model = load(args.model, "float32")
    longest = max(case.length for case in todo)
    tokens = text_tokens(model.tokenizer, args.text, args.batch, longest)
    chosen = {name: getattr(args, name) for name in ("state", "norm", "propagate") if getattr(args, name)}
    stream = dataclasses.replace(model.config.stream or StreamConfig(), **chosen)
    config = dataclasses.replace(model.config, stream=stream, dtype=args.dtype)
    params = storages.cast(model.params, args.dtype)
    with bar(len(todo), "measuring", "case") as meter:
        records = room.measure(config, params, tokens, todo, not args.no_gradients, meter.update)
    fitted = room.orders(records)
    title = f"{Path(args.model).name}, state={stream.state}"
    room.figure(records, out / "approximation.png", title)
    result = {
        "model": model.provenance.to_json(), "stream": dataclasses.asdict(stream), "dtype": args.dtype,
        "batch": args.batch, "records": records, "orders": fitted,
    }  # fmt: skip
    write_json(out / "result.json", result)
    if args.json:
        write_json(args.json, result)
    report_orders(records, fitted)
    print(f"\nfigure: {out / 'approximation.png'}")


def text_tokens(tokenizer: Any, file: str | None, rows: int, length: int) -> Any:
    """Return [rows, length] tokens of running text, every row beginning with BOS where the model's texts do."""
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
    ids, begins = tokenizer.encode_text(text), [tokenizer.bos_id] if tokenizer.add_bos else []
    width = length - len(begins)
    if len(ids) < rows * width:
        raise InputError(
            f"--text {file or '(embedded)'} has {len(ids)} tokens; {rows} rows of {length} need {rows * width}"
        )
    body = np.asarray(ids[: rows * width], np.int32).reshape(rows, width)
    return np.concatenate([np.tile(np.array(begins, np.int32), (rows, 1)), body], axis=1)


def report_orders(records: list[dict[str, Any]], fitted: list[dict[str, Any]]) -> None:
    """Print the table: errors at each alpha, and the fitted order."""
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
