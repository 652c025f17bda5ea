"""Export a model as PyTorch safetensors.

  sst-jax export --from runs/quickstart --to out/sst --format sst
  sst-jax export --from runs/quickstart --to out/merged --format merged
  sst-jax export --from runs/quickstart --to out/adapter --format adapter

sst      the whole model, stream included: a transformers folder with its own PyTorch modelling files, for
         AutoModelForCausalLM.from_pretrained(DIR, trust_remote_code=True) and generate(..., depth=4)
merged   the plain backbone with LoRA folded in, for AutoModelForCausalLM; it has no stream
adapter  a PEFT folder with the LoRA factors, for PeftModel over the base; it has no stream either

Beside merged and adapter the stream lies as stream.safetensors, its options as stream.json. `convert` and every other
command read all three back.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sst_jax.console.command import Parser, new_folder, run, write_json
from sst_jax.console.progress import counted
from sst_jax.errors import InputError

if TYPE_CHECKING:
    from sst_jax.types import Json

MEASURED = 500_000_000  # parameters up to which the logit gap is measured without being asked


def parser() -> Parser:
    parser = Parser(prog="python -m sst_jax.export", description=__doc__)
    parser.add_argument("--from", dest="source", required=True, metavar="DIR", help="a training run or any other MODEL")
    parser.takes_template()
    parser.takes_base()
    parser.add_argument("--to", required=True, metavar="DIR", help="new folder; one that holds anything is refused")
    parser.add_argument(
        "--format", required=True, choices=("sst", "merged", "adapter"), help="what to write, see above"
    )
    parser.add_argument(
        "--merge-base",
        choices=("original", "dequantized"),
        default="original",
        help="of a base in NF4, the weights that LoRA is added to: those it was quantised from, or those it stands "
        "for, on which LoRA was trained (default: original)",
    )
    parser.add_argument("--keep-lora", action="store_true", help="sst: keep the LoRA factors apart from the weights")
    parser.add_argument(
        "--base-name",
        metavar="NAME",
        help="adapter: base model that PEFT loads, such as owner/name or owner/name@revision (default: the base)",
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="dtype of the weights (default: the source's)")
    parser.add_argument(
        "--layout",
        choices=("text", "multimodal", "multimodal_v5"),
        help="merged: layout of the keys (default: the source's)",
    )
    parser.add_argument("--text-only", action="store_true", help="omit a multimodal source's vision tower")
    parser.add_argument(
        "--measure-gap",
        action=argparse.BooleanOptionalAction,
        help="read the export back and compare its logits with "
        f"the model's on a short text (default: up to {MEASURED / 1e6:.0f}M parameters)",
    )
    parser.add_argument("--push", metavar="REPO", help="upload to this hub repository (owner/name), private if new")
    parser.add_argument("--public", action="store_true", help="make a new repository public")
    parser.add_argument("--force", action="store_true", help="push to a repository that already holds files")
    parser.add_argument("--dry-run", action="store_true", help="print what --push would upload, without asking the hub")
    parser.add_argument("--json", metavar="FILE", help="write the summary to FILE")
    return parser


def main(argv: Sequence[str]) -> None:
    args = parser().parse_args(argv)
    target = new_folder(args.to)
    for flag in ("public", "force", "dry_run"):
        if getattr(args, flag) and not args.push:
            raise InputError(f"--{flag.replace('_', '-')} is about --push REPO, which is not given")
    if args.measure_gap and args.format == "adapter":
        raise InputError("--measure-gap is for --format sst or merged, not adapter")

    from sst_jax.data.template_file import use_template_file
    from sst_jax.weights import exporting, hub, loading

    names = ("format", "dtype", "merge_base", "keep_lora", "base_name", "layout", "text_only")
    options = exporting.ExportOptions(**{name: getattr(args, name) for name in names})
    if args.push and not args.dry_run:
        hub.check(args.push, args.force)
    started, reference = time.monotonic(), loading.resolve(args.source, args.base)
    model = reference.open(reference.dtype, lazy=True)  # narrowed or widened as it is written
    if args.chat_template:
        use_template_file(model.tokenizer, args.chat_template, "--chat-template")
    small, source = model.config.backbone.num_params <= MEASURED, model.provenance.to_json()
    result = {"to": str(target), "format": args.format, "source": source}
    result |= exporting.export_model(model, target, options)
    del model  # the weights are not needed any more, and the gap wants the room
    notes, result["seconds"] = result.pop("notes"), time.monotonic() - started
    size = sum(file.stat().st_size for file in target.iterdir())
    print(f"{args.format}: {size / 1e6:,.1f} MB in {result['dtype']} at {target} ({result['seconds']:.1f} s)")
    print("\n".join(notes))
    measure = small if args.measure_gap is None else args.measure_gap
    if measure and args.format != "adapter":
        result["logit_gap"] = gap = exporting.logit_gap(args.source, target, args.format == "sst", args.base)
        print(
            f"logits of the export against the model's on {gap['tokens']} tokens: {gap['relative']:.2e} apart "
            f"(relative norm), top-1 agreement {gap['same_best']:.0%}"
        )
    print(f"next: {next_step(args.format, target, result.get('base_name'))}")
    if args.push:
        result["push"] = upload(args, target)
    if args.json:
        write_json(args.json, result)


def next_step(kind: str, target: Path, base: str | None = None) -> str:
    """Return the Python call that opens an export; `base`: of an adapter, the name that PEFT finds in it."""
    load = "transformers.AutoModelForCausalLM.from_pretrained"
    if kind == "adapter":
        from sst_jax.data.records import is_hub_id

        if base is not None and (is_hub_id(base) or Path(base).is_dir()):
            return f'peft.AutoPeftModelForCausalLM.from_pretrained("{target}")'
        call = f'peft.PeftModel.from_pretrained({load}(BASE), "{target}")'
        return f"{call}, where BASE is a folder or hub id: PEFT cannot load {base}. --base-name BASE writes it down"
    return f'{load}("{target}"' + (", trust_remote_code=True)" if kind == "sst" else ")")


def upload(args: argparse.Namespace, target: Path) -> Json:
    """Push the folder, or print what that would do."""
    from sst_jax.weights import hub

    files = {file.name: file.stat().st_size for file in sorted(target.iterdir())}
    if args.dry_run:
        kind = "public" if args.public else "private"
        size = f"{counted(len(files), 'file')}, {sum(files.values()) / 1e6:,.1f} MB"
        print(f"would push {size}, to {args.push} ({kind} if new):")
        print("\n".join(f"  {name}  {size:,} bytes" for name, size in files.items()))
        return {"repo": args.push, "dry_run": True, "files": files}
    message = f"sst_jax export, format {args.format}"
    try:
        url = hub.push(target, args.push, force=args.force, private=not args.public, message=message)
    except InputError as error:
        raise InputError(f"{error}; the export itself is complete at {target}") from None
    print(f"pushed: {url}")
    return {"repo": args.push, "dry_run": False, "files": files, "url": url}


if __name__ == "__main__":
    sys.exit(run(main))
