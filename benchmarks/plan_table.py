"""Planned memory and time of a train step, a line a size and storage and a column a card, as a table of Markdown.

    python benchmarks/plan_table.py --sizes qwen3-14b,qwen3-32b --targets rtx-pro-6000,h100 --quantize nf4,none

Each cell is one `sst-jax plan` (extra `cuda`; no card is needed): the peak in GiB and the seconds of a step of one
sequence of 1024 tokens, two passes. A cell of "-" does not fit.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

NAMES = {"nf4": "NF4", "none": "bf16"}


def planned(size: str, quantize: str, target: str, length: int) -> str:
    """Return the cell of one plan, from a process of its own, whose memory goes back when it ends."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "plan.json"
        knobs = {
            "model.quantize": quantize, "data.batch_size": 1, "data.length": length, "optimizer.accumulate": 1,
        }  # fmt: skip
        overrides = [f"--config.{name}={value}" for name, value in knobs.items()]
        command = [sys.executable, "-m", "sst_jax.plan", "--config", f"configs/sst.py:size={size}", *overrides]
        subprocess.run([*command, "--target", target, "--json", str(out)], check=True, stdout=subprocess.DEVNULL)
        (plan,) = json.loads(out.read_text())["plans"]
    return cell(plan)


def cell(plan: dict) -> str:
    """Return the peak and the time of a plan."""
    if "peak" not in plan:  # the compiler's own word
        return "-"
    peak = f"{plan['peak'] / 2**30:.1f} GiB"
    return f"{peak}, {plan['assumed_seconds']:.2f} s" if plan["fits"] else f"- ({peak})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="qwen3-14b,qwen3-32b,llama-3.3-70b", help="of configs/sst.py")
    parser.add_argument("--targets", default="rtx-pro-6000,rtx-5090,rtx-4090,h100", help="as for sst-jax plan")
    parser.add_argument("--quantize", default="nf4,none", help="storages of the base (default: %(default)s)")
    parser.add_argument("--length", type=int, default=1024, help="tokens of the sequence (default: %(default)s)")
    args = parser.parse_args()
    targets = args.targets.split(",")
    print("| size | base |", " | ".join(targets), "|")
    print("|---" * (2 + len(targets)) + "|")
    for size in args.sizes.split(","):
        for quantize in args.quantize.split(","):
            cells = [planned(size, quantize, target, args.length) for target in targets]
            print(f"| {size} | {NAMES.get(quantize, quantize)} |", " | ".join(cells), "|", flush=True)


if __name__ == "__main__":
    main()
