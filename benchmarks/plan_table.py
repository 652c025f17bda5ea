"""Planned memory and time of a train step, a line a size and storage and a column a card, as a table of Markdown.

    python benchmarks/plan_table.py --sizes qwen3-14b,qwen3-32b --targets rtx-pro-6000,h100 --quantize nf4,none

Each cell is the train step of `sst-jax plan` (extra `cuda`; no card is needed): the peak in GiB and the seconds of a
step of one sequence of 1024 tokens, two passes. A cell of "-" does not fit; the peak is behind it where the compiler
came to one. About half a minute a cell.
"""

import argparse
import os

os.environ.update({"JAX_PLATFORMS": "cpu", "TF_CPP_MIN_LOG_LEVEL": "3"})  # the compilers for cards run on the CPU

import jax

from sst_jax.lab.planning import records, targets
from sst_jax.training.recipe import read_recipe
from sst_jax.weights.loading import resolve

NAMES = {"nf4": "NF4", "none": "bf16"}
SIZES = "qwen3-14b,qwen3-32b,qwen2.5-7b,qwen2.5-14b,qwen2.5-32b,qwen2.5-72b,llama-3.3-70b,gemma-4-31b"


def planned(size: str, quantize: str, target: str, length: int) -> str:
    """Return the cell of one plan."""
    knobs = {"model.quantize": quantize, "data.batch_size": 1, "data.length": length, "optimizer.accumulate": 1}
    recipe = read_recipe(f"configs/sst.py:size={size}", knobs)
    backbone = resolve(recipe.model.source).backbone
    plan = records.plan_record(recipe, backbone, targets.find(target), 0.4, phases=False)
    jax.clear_caches()
    return cell(plan)


def cell(plan: dict) -> str:
    """Return the peak and the time of a plan."""
    if "peak" not in plan:  # the compiler's own word
        return "-"
    peak = f"{plan['peak'] / 2**30:.1f} GiB"
    return f"{peak}, {plan['assumed_seconds']:.2f} s" if plan["fits"] else f"- ({peak})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default=SIZES, help="of configs/sst.py (default: %(default)s)")
    parser.add_argument("--targets", default="rtx-pro-6000,rtx-5090,rtx-4090,h100", help="as for sst-jax plan")
    parser.add_argument("--quantize", default="nf4,none", help="storages of the base (default: %(default)s)")
    parser.add_argument("--length", type=int, default=1024, help="tokens of the sequence (default: %(default)s)")
    args = parser.parse_args()
    chosen = args.targets.split(",")
    print("| size | base |", " | ".join(chosen), "|")
    print("|---" * (2 + len(chosen)) + "|")
    for size in args.sizes.split(","):
        for quantize in args.quantize.split(","):
            cells = [planned(size, quantize, target, args.length) for target in chosen]
            print(f"| {size} | {NAMES.get(quantize, quantize)} |", " | ".join(cells), "|", flush=True)


if __name__ == "__main__":
    main()
