"""Convert a model into a base folder: an Orbax checkpoint that every command and sst_jax.load open.

sst-jax convert --from google/gemma-3-1b-pt --to models/gemma-3-1b
sst-jax convert --from model.gguf --to models/base --dtype float32
sst-jax convert --from model.gguf --to models/base --quantize nf4 --calibrate data/train.jsonl
"""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Sequence

from sst_jax.console.command import Parser, called, new_folder, run, write_json
from sst_jax.errors import InputError


def parser() -> Parser:
    parser = Parser(prog="python -m sst_jax.convert", description=__doc__)
    parser.add_argument(
        "--from",
        dest="source",
        required=True,
        metavar="MODEL",
        help="a Hugging Face folder, a hub id (owner/name or owner/name@revision), a GGUF file, a converted folder or "
        "a training run",
    )
    parser.takes_template()
    parser.takes_base()
    parser.add_argument("--to", required=True, metavar="DIR", help="new folder; one that holds anything is refused")
    parser.add_argument(
        "--quantize",
        choices=("none", "nf4", "nf4_double"),
        default="none",
        help="storage of the linears: unchanged (default), 4.25 bits a weight, or 4.13 with quantised scales",
    )
    parser.add_argument(
        "--calibrate",
        metavar="FILE",
        help="quantise for what this text feeds the linears (GPTQ): a text file, or .jsonl with text, or question and "
        "answer; texts like those to be trained on, and never a test",
    )
    parser.add_argument(
        "--calibrate-tokens", type=int, default=32_768, metavar="N", help="tokens read from FILE (default: %(default)s)"
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="dtype of the base (default: the source's)")
    parser.add_argument("--text-only", action="store_true", help="omit a multimodal source's vision tower")
    parser.add_argument("--json", metavar="FILE", help="write the summary to FILE")
    return parser


def main(argv: Sequence[str]) -> None:
    args = parser().parse_args(argv)
    target = new_folder(args.to)
    if args.calibrate and args.quantize == "none":
        raise InputError("--calibrate needs --quantize nf4 or nf4_double: nothing else is fitted to texts")

    from sst_jax.data.template_file import use_template_file
    from sst_jax.inference.model import Model
    from sst_jax.weights import converting, loading

    started, reference = time.monotonic(), loading.resolve(args.source, args.base)
    dtype, source = args.dtype or reference.dtype, reference.source
    if args.calibrate and source is None:
        raise InputError(
            f"--calibrate reads a foreign checkpoint layer by layer, and {args.source} is none: give the Hugging Face "
            "folder or GGUF file that it was made from"
        )
    if source is not None:
        names = ("quantize", "calibrate", "calibrate_tokens", "text_only", "chat_template")
        options = converting.ConvertOptions(dtype, **{name: getattr(args, name) for name in names})
        provenance = converting.convert_source(source, reference.location, target, options, reference.revision)
        backbone = source.backbone
    else:
        model = Model(*reference.open(dtype, args.quantize))
        if args.chat_template:
            use_template_file(model.tokenizer, args.chat_template, "--chat-template")
        model.save(target, vision=not args.text_only)
        provenance, backbone = model.provenance, model.config.backbone
    seconds = time.monotonic() - started
    size = sum(file.stat().st_size for file in target.rglob("*") if file.is_file())
    quantized = f", linears in {provenance.quantize}" if provenance.quantize != "none" else ""
    texts = f", for {provenance.calibration['tokens']:,} tokens of {args.calibrate}" if provenance.calibration else ""
    print(
        f"{backbone.family}: {backbone.num_layers} layers, {backbone.num_params / 1e6:,.0f}M parameters, {dtype}",
        end="",
    )
    print(f"{quantized}{texts}\nwritten to {target}: {size / 1e6:,.0f} MB in {seconds:.1f} s")
    print(f"next: {called('generate')} --model {shlex.quote(str(target))} --prompt 'The capital of France is'")
    if args.json:
        result = {"to": str(target), "bytes": size, "seconds": seconds, "dtype": dtype, "source": provenance.to_json()}
        write_json(args.json, result)


if __name__ == "__main__":
    sys.exit(run(main))
