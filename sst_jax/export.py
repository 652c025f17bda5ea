"""Exports a model as PyTorch safetensors.

  python -m sst_jax.export --from runs/quickstart --to out/merged --format merged

merged: the plain backbone with LoRA folded in, loadable by transformers' AutoModelForCausalLM. It has no stream; its
blend parameters, where there are any, go beside the weights as stream.safetensors, their options as stream.json.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections.abc import Sequence

from sst_jax.console.command import Parser, new_folder, run, write_json


def parser() -> Parser:
    parser = Parser(prog="python -m sst_jax.export", description=__doc__)
    parser.add_argument("--from", dest="source", required=True, metavar="DIR", help="a training run or any other MODEL")
    parser.add_argument("--to", required=True, metavar="DIR", help="new folder; one that holds anything is refused")
    parser.add_argument("--format", required=True, choices=("merged",), help="what to write, see above")
    parser.add_argument(
        "--merge-base",
        choices=("original", "dequantized"),
        default="original",
        help="of a base in NF4, the weights that LoRA is added to: those it was quantised from, or those it stands "
        "for, on which LoRA was trained (default: original)",
    )
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), help="type of the weights (default: the source's own)"
    )
    parser.add_argument(
        "--layout", choices=("text", "multimodal", "multimodal_v5"), help="spelling of the keys (default: the source's)"
    )
    parser.add_argument("--text-only", action="store_true", help="leave a multimodal source's vision tower out")
    parser.add_argument("--json", metavar="FILE", help="write the summary to FILE")
    return parser


def main(argv: Sequence[str]) -> None:
    args = parser().parse_args(argv)
    target = new_folder(args.to)

    import numpy as np
    from safetensors.numpy import save

    from sst_jax.console.progress import bar
    from sst_jax.weights.huggingface import write_folder
    from sst_jax.weights.lora import gap, merge
    from sst_jax.weights.models import open_model, open_original, source_dtype, vision_of

    started = time.monotonic()
    dtype = args.dtype or source_dtype(args.source)
    config, params, tokenizer, facts = open_model(args.source, dtype, lazy=True)
    base, gaps = params["base"], None
    if facts["quantize"] != "none" and args.merge_base == "original":
        original = open_original(facts, dtype, lazy=True).params["base"]
        gaps, base = gap(original, base, config.adapter), original
    merged = merge(base, params["adapter"], config.adapter)
    files = tokenizer.export_files()
    ends = {
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": sorted(tokenizer.stop_ids),
        "pad_token_id": tokenizer.pad_id,
    }
    files["generation_config.json"] = (json.dumps(ends, indent=2) + "\n").encode()
    if config.stream is not None:
        blend = {name: np.asarray(value) for name, value in params["blend"].items()}
        files["stream.safetensors"] = save(blend, metadata={"format": "pt"})
        options = {"format": "sst_jax.stream", "version": 1, "stream": dataclasses.asdict(config.stream)}
        files["stream.json"] = (json.dumps(options, indent=2) + "\n").encode()
    layout = args.layout or ("text" if args.text_only else facts.get("layout")) or "text"
    tower, tower_config = ({}, {}) if layout == "text" else vision_of(facts)
    with bar(None, "writing", unit="B", unit_scale=True) as meter:

        def update(done: int, total: int) -> None:
            meter.total = total
            meter.update(done - meter.n)

        write_folder(
            target, config.backbone, merged, dtype, layout, extra_files=files, extra_tensors=tower,
            extra_config=tower_config, progress=update,
        )  # fmt: skip
    seconds = time.monotonic() - started
    changed = sorted(params["adapter"])
    print(
        f"{args.format}: {config.backbone.num_params / 1e6:,.0f}M parameters in {dtype} at {target} ({seconds:.1f} s)"
    )
    print(f"LoRA folded into {', '.join(changed)}" if changed else "no adapter: the weights are the base's")
    if facts["quantize"] != "none":
        print(
            f"merged onto the dequantised weights ({facts['quantize']}), on which LoRA was trained"
            if gaps is None
            else f"merged onto the original weights; LoRA was trained on {facts['quantize']}, whose kernels are "
            f"{gaps['all']:.2%} away from them (Frobenius norm)"
        )
    if config.stream is not None:
        print("the stream is not part of the plain backbone: see stream.safetensors and stream.json")
    print(f'next: transformers.AutoModelForCausalLM.from_pretrained("{target}")')
    if args.json:
        result = {"to": str(target), "format": args.format, "dtype": dtype, "seconds": seconds, "source": facts}
        write_json(args.json, {**result, "merge_base": args.merge_base, "gap": gaps})


if __name__ == "__main__":
    sys.exit(run(main))
