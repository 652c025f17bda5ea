"""Converts a model into a base folder: an Orbax checkpoint that every command and sst_jax.load open.

  python -m sst_jax.convert --from google/gemma-3-1b-pt --to models/gemma-3-1b
  python -m sst_jax.convert --from model.gguf --to models/base --dtype float32
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path

from sst_jax.console.command import Parser, run, write_json
from sst_jax.errors import InputError


def parser() -> Parser:
    parser = Parser(prog="python -m sst_jax.convert", description=__doc__)
    parser.add_argument(
        "--from", dest="source", required=True, metavar="MODEL",
        help="a Hugging Face folder, a hub id, a GGUF file, a converted folder or a training run",
    )  # fmt: skip
    parser.add_argument("--to", required=True, metavar="DIR", help="new folder; one that holds anything is refused")
    parser.add_argument("--quantize", choices=("none",), default="none", help="storage of the linears (default: none)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="type of the base (default: the source's own)")
    parser.add_argument("--json", metavar="FILE", help="write the summary to FILE")
    return parser


def main(argv: Sequence[str]) -> None:
    args = parser().parse_args(argv)
    target = Path(args.to)
    if target.is_dir() and any(target.iterdir()):
        raise InputError(f"--to {target} is not empty: nothing is overwritten, choose another folder")

    from sst_jax.inference.model import Model
    from sst_jax.weights.models import open_model, source_dtype

    started = time.monotonic()
    model = Model(*open_model(args.source, args.dtype or source_dtype(args.source)))
    model.save(target)
    seconds = time.monotonic() - started
    size = sum(file.stat().st_size for file in target.rglob("*") if file.is_file())
    print(f"{model}\nwritten to {target}: {size / 1e6:,.0f} MB in {seconds:.1f} s")
    print(f"next: python -m sst_jax.generate --model {target} --prompt 'The capital of France is'")
    if args.json:
        result = {"to": str(target), "bytes": size, "seconds": seconds, "dtype": model.dtype, "source": model.facts}
        write_json(args.json, result)


if __name__ == "__main__":
    sys.exit(run(main))
