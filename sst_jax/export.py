"""Exports a model as PyTorch safetensors.

  python -m sst_jax.export --from runs/quickstart --to out/sst --format sst
  python -m sst_jax.export --from runs/quickstart --to out/merged --format merged
  python -m sst_jax.export --from runs/quickstart --to out/adapter --format adapter

sst      the whole model, stream included: a transformers folder with its own PyTorch modelling files, for
         AutoModelForCausalLM.from_pretrained(DIR, trust_remote_code=True) and generate(..., depth=4)
merged   the plain backbone with LoRA folded in, for AutoModelForCausalLM; it has no stream
adapter  a PEFT folder with the LoRA factors, for PeftModel over the base; it has no stream either

Beside merged and adapter the stream lies as stream.safetensors, its options as stream.json. `convert` and every other
command read all three back.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sst_jax.console.command import Parser, new_folder, run, write_json
from sst_jax.errors import InputError

MEASURED = 500_000_000  # parameters up to which the logit gap is measured without being asked
TEXT = (
    "Ann has 3 boxes of 4 pens and gives 5 pens away. How many pens has she left? She had 3 * 4 = 12 pens. "
    "Of these 12 - 5 = 7 are left. The answer is 7."
)


def parser() -> Parser:
    parser = Parser(prog="python -m sst_jax.export", description=__doc__)
    parser.add_argument("--from", dest="source", required=True, metavar="DIR", help="a training run or any other MODEL")
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
    parser.add_argument("--base-name", metavar="NAME", help="adapter: what PEFT shall load as base (default: the base)")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), help="type of the weights (default: the source's own)"
    )
    parser.add_argument(
        "--layout",
        choices=("text", "multimodal", "multimodal_v5"),
        help="merged: spelling of the keys (default: the source's)",
    )
    parser.add_argument("--text-only", action="store_true", help="leave a multimodal source's vision tower out")
    parser.add_argument(
        "--measure-gap",
        action=argparse.BooleanOptionalAction,
        help="read the export back and compare its logits with "
        f"the model's on a short text (default: up to {MEASURED / 1e6:.0f}M parameters)",
    )
    parser.add_argument(
        "--push", metavar="REPO", help="then upload to this hub repository (owner/name), private if new"
    )
    parser.add_argument("--public", action="store_true", help="make a new repository public")
    parser.add_argument("--force", action="store_true", help="push to a repository that already holds files")
    parser.add_argument("--dry-run", action="store_true", help="say what --push would upload, and do not ask the hub")
    parser.add_argument("--json", metavar="FILE", help="write the summary to FILE")
    return parser


def main(argv: Sequence[str]) -> None:
    args = parser().parse_args(argv)
    target = new_folder(args.to)
    check(args)

    from sst_jax.weights import hub
    from sst_jax.weights.loading import resolve

    if args.push and not args.dry_run:
        hub.check(args.push, args.force)
    started = time.monotonic()
    reference = resolve(args.source)
    own = reference.dtype  # what the model is read in; it is narrowed or widened as it is written
    dtype = "float32" if args.format == "adapter" else args.dtype or own
    opened = reference.open(own, lazy=True)
    config, provenance = opened.config, opened.provenance
    result: dict[str, Any] = {"to": str(target), "format": args.format, "dtype": dtype, "source": provenance.to_json()}
    if args.format == "adapter":
        result |= write_adapter(args, target, opened)
    else:
        result |= write_model(args, target, dtype, opened)
    del opened  # the weights are not needed any more, and the gap wants the room
    result["seconds"] = time.monotonic() - started
    size = sum(file.stat().st_size for file in target.iterdir())
    print(f"{args.format}: {size / 1e6:,.1f} MB in {dtype} at {target} ({result['seconds']:.1f} s)")
    print(describe(args, config, provenance, result))
    measure = config.backbone.num_params <= MEASURED if args.measure_gap is None else args.measure_gap
    if measure and args.format != "adapter":
        result["logit_gap"] = gap = logit_gap(args.source, target, with_stream=args.format == "sst")
        print(
            f"logits of the export against the model's on {gap['tokens']} tokens: {gap['relative']:.2e} apart "
            f"(relative norm), the same best token at {gap['same_best']:.0%} of them"
        )
    print(f"next: {next_step(args.format, target)}")
    if args.push:
        result["push"] = upload(args, target)
    if args.json:
        write_json(args.json, result)


def check(args: argparse.Namespace) -> None:
    """Raises InputError where options do not belong to the format, or to each other."""
    for flag, value, formats in (
        ("--keep-lora", args.keep_lora, ("sst",)),
        ("--base-name", args.base_name, ("adapter",)),
        ("--layout", args.layout, ("merged",)),
        ("--text-only", args.text_only, ("merged",)),
        ("--dtype", args.dtype, ("sst", "merged")),
        ("--measure-gap", args.measure_gap, ("sst", "merged")),
    ):
        if value and args.format not in formats:
            raise InputError(f"{flag} is for --format {' or '.join(formats)}, not {args.format}")
    for flag in ("public", "force", "dry_run"):
        if getattr(args, flag) and not args.push:
            raise InputError(f"--{flag.replace('_', '-')} is about --push REPO, which is not given")


def write_model(args: argparse.Namespace, target: Path, dtype: str, opened: Any) -> dict[str, Any]:
    """The formats sst and merged: the backbone's weights, and what goes with them."""
    from sst_jax.console.progress import bar
    from sst_jax.weights import export_format
    from sst_jax.weights.huggingface import write_folder
    from sst_jax.weights.loading import vision_of
    from sst_jax.weights.lora import merge

    config, params, tokenizer, provenance = opened
    sst = args.format == "sst"
    if sst and config.stream is None:
        raise InputError(f"{args.source} has no stream: export it with --format merged")
    base, gaps = merge_base(args.merge_base, opened)
    merged = merge(base, {} if args.keep_lora else params["adapter"], config.adapter)
    ends = {
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": sorted(tokenizer.stop_ids),
        "pad_token_id": tokenizer.pad_id,
    }
    files = tokenizer.export_files() | {"generation_config.json": (json.dumps(ends, indent=2) + "\n").encode()}
    files["README.md"] = card(args, opened, gaps).encode()
    layout = args.layout or ("text" if args.text_only or sst else provenance.layout) or "text"
    tensors, own_config = ({}, {}) if layout == "text" else vision_of(provenance)
    if sst:
        files |= export_format.torch_files(config.backbone)
        own_config = ends | export_format.sst_config(config, provenance, args.keep_lora)
        tensors = export_format.blend_tensors(params["blend"])
        if args.keep_lora:
            tensors |= export_format.lora_tensors(config.backbone, params["adapter"])
    elif config.stream is not None:
        files |= export_format.stream_files(config, params["blend"], provenance)
    with bar(None, "writing", unit="B", unit_scale=True) as meter:

        def update(done: int, total: int) -> None:
            meter.total = total
            meter.update(done - meter.n)

        write_folder(
            target,
            config.backbone,
            merged,
            dtype,
            layout,
            extra_files=files,
            extra_tensors=tensors,
            extra_config=own_config,
            progress=update,
        )
    return {"merge_base": args.merge_base, "gap": gaps, "layout": layout}


def write_adapter(args: argparse.Namespace, target: Path, opened: Any) -> dict[str, Any]:
    """The format adapter: LoRA's factors for PEFT, in float32 as they are trained."""
    from sst_jax.weights import export_format, peft

    config, params, _, provenance = opened
    if not config.adapter.rank:
        raise InputError(f"{args.source} has no LoRA adapter: export it with --format sst or merged")
    if provenance.carries == "sst":
        raise InputError(f"{provenance.path} is an sst export, no base that PEFT can load: export it with --format sst")
    _, gaps = merge_base(args.merge_base, opened)
    name = args.base_name or provenance.origin.path
    files = export_format.stream_files(config, params["blend"], provenance) | {
        "README.md": card(args, opened, gaps).encode()
    }
    peft.write_folder(target, config, params["adapter"], name, provenance.layout or "text", files)
    return {"base_name": name, "gap": gaps}


def merge_base(choice: str, opened: Any) -> tuple[dict[str, Any], dict[str, float] | None]:
    """The weights that LoRA goes onto, and how far their kernels are from those it was trained on (None: the same)."""
    from sst_jax.weights.loading import open_original
    from sst_jax.weights.lora import gap

    base = opened.params["base"]
    if opened.provenance.quantize == "none" or choice == "dequantized":
        return base, None
    original = open_original(opened.provenance, opened.provenance.dtype, lazy=True).params["base"]
    return original, gap(original, base, opened.config.adapter)


def onto(args: argparse.Namespace, config: Any, provenance: Any, gaps: dict[str, float] | None) -> str | None:
    """What the weights are, those under the adapter where there is one, if they could be others than it says."""
    kind = provenance.quantize
    if kind == "none":
        return None
    away = "" if gaps is None else f"whose kernels are {gaps['all']:.2%} away from them (Frobenius norm)"
    if not config.adapter.rank:
        return f"The weights are the original ones of {kind}, {away}." if away else f"The weights are those of {kind}."
    verb = "stands" if args.format == "adapter" or args.keep_lora else "was merged"
    if away:
        return f"LoRA {verb} on the original weights and was trained on {kind}, {away}."
    return f"LoRA {verb} on the dequantised weights ({kind}), on which it was trained."


def card(args: argparse.Namespace, opened: Any, gaps: dict[str, float] | None) -> str:
    from sst_jax.files import read_json
    from sst_jax.training.run import read_metrics
    from sst_jax.weights.card import model_card

    provenance, metrics = opened.provenance, []
    if provenance.run and (Path(provenance.run) / "config.json").is_file():
        recipe = read_json(Path(provenance.run) / "config.json").get("recipe")
        provenance = dataclasses.replace(provenance, recipe=recipe)
        metrics = [line for line in read_metrics(Path(provenance.run)) if line["step"] <= provenance.step]
    return model_card(args.format, opened.config, provenance, metrics, onto(args, opened.config, provenance, gaps))


def describe(args: argparse.Namespace, config: Any, provenance: Any, result: dict[str, Any]) -> str:
    """What was done with LoRA and the stream, for the summary."""
    targets = ", ".join(config.adapter.targets) if config.adapter.rank else ""
    done = "kept apart" if args.keep_lora or args.format == "adapter" else "folded in"
    lines = [f"LoRA of {targets}: {done}" if targets else "no adapter: the weights are the base's"]
    lines += [text for text in (onto(args, config, provenance, result["gap"]),) if text]
    if args.format == "sst" and provenance.layout not in (None, "text"):
        lines.append("text only: the vision tower stays behind (--format merged takes it along)")
    if config.stream is not None and args.format != "sst":
        lines.append("the stream is no part of it and lies beside: stream.safetensors, stream.json")
    return "\n".join(lines)


def next_step(kind: str, target: Path) -> str:
    load = "transformers.AutoModelForCausalLM.from_pretrained"
    if kind == "adapter":
        return f'peft.PeftModel.from_pretrained({load}(BASE), "{target}")'
    return f'{load}("{target}"' + (", trust_remote_code=True)" if kind == "sst" else ")")


def logit_gap(source: str, folder: Path, with_stream: bool) -> dict[str, Any]:
    """How far the exported folder, read back, is from the model on a fixed text, both in float32.

    With the stream the exact recurrence is compared, without it the plain backbones with LoRA.
    """
    import jax.numpy as jnp
    import numpy as np

    from sst_jax.model import rules
    from sst_jax.weights.loading import open_model

    def logits(model: str | Path) -> np.ndarray:
        config, params, tokenizer, _ = open_model(model, "float32")
        if not with_stream:
            config, params = dataclasses.replace(config, stream=None), {**params, "blend": {}}
        tokens = jnp.asarray([tokenizer.encode(TEXT)], jnp.int32)
        name = "exact" if with_stream else "plain"
        return np.asarray(rules.logits(config, params, tokens, forward=name))[0]

    ours, theirs = logits(source), logits(folder)  # one after the other: one model in memory at a time
    return {
        "tokens": len(ours),
        "relative": float(np.linalg.norm(theirs - ours) / np.linalg.norm(ours)),
        "largest": float(np.abs(theirs - ours).max()),
        "same_best": float((ours.argmax(-1) == theirs.argmax(-1)).mean()),
    }


def upload(args: argparse.Namespace, target: Path) -> dict[str, Any]:
    """Pushes the folder, or says what that would do."""
    from sst_jax.weights import hub

    files = {file.name: file.stat().st_size for file in sorted(target.iterdir())}
    private = not args.public
    if args.dry_run:
        kind = "private" if private else "public"
        print(f"would push {len(files)} files, {sum(files.values()) / 1e6:,.1f} MB, to {args.push} ({kind} if new):")
        print("\n".join(f"  {name}  {size:,} bytes" for name, size in files.items()))
        return {"repo": args.push, "dry_run": True, "files": files}
    message = f"sst_jax export, format {args.format}"
    try:
        url = hub.push(target, args.push, force=args.force, private=private, message=message)
    except InputError as error:
        raise InputError(f"{error}; the export itself is complete at {target}") from None
    print(f"pushed: {url}")
    return {"repo": args.push, "dry_run": False, "files": files, "url": url}


if __name__ == "__main__":
    sys.exit(run(main))
