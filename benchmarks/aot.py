"""The 27B train step compiled for hardware that is not here: memory of a device, bytes sent, compile time. Estimates.

    python benchmarks/aot.py --json benchmarks/aot-27b.json                 rows that this environment can compile
    python benchmarks/aot.py --json benchmarks/aot-27b.json --only v6e-8    one of them, anew

Every device has one row of 1,024 tokens, of the 32 rows to an update, trained by two passes; all lie along `fsdp`.
Needs the extra cuda for GPUs and tpu for slices (two environments can fill one file, whose other rows stay), and
minutes of CPU for a slice.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sst_jax.console.command import Parser, run, write_json
from sst_jax.console.progress import print_line
from sst_jax.errors import InputError
from sst_jax.files import read_json

ROWS = (  # target, storage of the base
    ("v5e-8", "nf4"),
    ("v5p-8", "none"),
    ("v6e-8", "none"),
    ("rtx-pro-6000", "nf4"),
    ("rtx-pro-6000x2", "nf4"),
    ("rtx-pro-6000x8", "nf4"),
    ("h100x8", "none"),
)
UPDATE = 32  # rows, as in configs/sst.py
CONFIG = Path(__file__).parents[1] / "configs" / "sst.py"
GIB = 2**30


def parser() -> Parser:
    parser = Parser(prog="python benchmarks/aot.py", description=__doc__)
    parser.add_argument("--size", default="27b", help="of configs/sst.py (default: 27b)")
    parser.add_argument("--only", metavar="TARGET,...", help="these targets, even where the file has them")
    parser.add_argument("--json", metavar="FILE", help="keep the figures in FILE; rows it has are not compiled again")
    return parser


def plan(size: str, target: Any, quantize: str) -> dict[str, Any] | str:
    """The record that `plan` writes, from a process of its own; or why there is none."""
    knobs = {
        "data.batch_size": target.chips, "optimizer.accumulate": UPDATE // target.chips, "model.quantize": quantize
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "plan.json"
        command = [sys.executable, "-m", "sst_jax.plan", "--config", f"{CONFIG}:size={size}", "--target", target.name]
        command += [f"--config.{name}={value}" for name, value in knobs.items()] + ["--json", str(out)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            return done.stderr.strip().splitlines()[-1]
        return read_json(out)["plans"][0]


def table(records: Sequence[dict[str, Any]]) -> str:
    """The records as Markdown."""
    lines = [
        "| target | devices | base | arguments | temporaries | peak | of | fits | GB sent a step | compile s |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for record in records:
        base = record["dtype"] if record["quantize"] == "none" else record["quantize"]
        cells = [record["target"], record["chips"], base]
        if "peak" in record:
            cells += [f"{record[name] / GIB:.1f}" for name in ("arguments", "temporaries", "peak", "memory")]
            sent = ", ".join(f"{kind} {size / 1e9:.1f}" for kind, size in record["sent"].items())
            cells += ["yes" if record["fits"] else "**no**", sent or "none", f"{record['compile_seconds']:.0f}"]
        else:
            cells += ["", "", "", f"{record['memory'] / GIB:.1f}", f"**no**: {record['compiler']}", "", ""]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def main(argv: Sequence[str]) -> None:
    from sst_jax.lab.planning import targets

    args = parser().parse_args(argv)
    only = args.only.split(",") if args.only else None
    if only and not set(only) <= {name for name, _ in ROWS}:
        raise InputError(f"--only {args.only}: the rows are {', '.join(dict.fromkeys(name for name, _ in ROWS))}")
    found: dict[str, dict[str, Any]] = {}
    if args.json and Path(args.json).is_file():
        found = {f"{row['target']} {row['quantize']}": row for row in read_json(Path(args.json))["records"]}
    for name, quantize in ROWS:
        key = f"{name} {quantize}"
        if name not in only if only else key in found:
            continue
        print_line(f"{key} ...")
        record = plan(args.size, targets.find(name), quantize)
        if isinstance(record, str):
            print_line(f"  {record}")
            continue
        found[key] = record
        if args.json:
            write_json(args.json, {"estimates": True, "records": list(found.values())})
    order = [f"{name} {quantize}" for name, quantize in ROWS]
    print(table([found[key] for key in order if key in found]))


if __name__ == "__main__":
    sys.exit(run(main))
