"""Says whether a recipe fits a card and how fast it can be, before anything is rented or downloaded.

  python -m sst_jax.plan --config configs/sst.py --target rtx-pro-6000
  python -m sst_jax.plan --config configs/sst.py:size=4b --target rtx-4090 --search
  python -m sst_jax.plan --config configs/sst.py --target h100,rtx-4090 --decode --depth 4
  python -m sst_jax.plan --config configs/sst.py --config.data.batch_size=8 --target v5e-8,h100x8
  python -m sst_jax.plan --config configs/sst.py --target h100x8 --config.mesh.fsdp=2 --config.mesh.tensor=4 ...

Targets: rtx-pro-6000, h100, h200, b200, rtx-5090, rtx-4090, a100-80g, of each also several in one machine, as h100x8;
TPU slices v5e-8, v5p-8 (4 chips, as Google counts), v5p-16, v6e-8. On several devices the recipe's mesh is compiled,
by default all along fsdp.

The real train step (or decode step) is compiled for the described hardware on a CPU; its compiler must be installed,
the hardware and its driver need not: sst-jax[cuda] for GPUs, sst-jax[tpu] for TPU slices. All figures are estimates:
nothing is run, and the CUDA context, kernels' workspaces and fragmentation are in no plan (a reserve stands for them).
Of a recipe that draws depths or passes the costliest step is compiled, and the average counted.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Sequence
from typing import Any

from sst_jax.console.command import Parser, run, write_json
from sst_jax.errors import InputError

LARGEST = 1024  # where --search gives up


def parser() -> Parser:
    parser = Parser(prog="python -m sst_jax.plan", description=__doc__)
    parser.add_argument("--config", required=True, metavar="FILE", help="a recipe, such as configs/sst.py")
    parser.takes_overrides("--config.data.batch_size=4")
    parser.add_argument("--target", default="rtx-pro-6000", metavar="NAME,...", help="see above (default: %(default)s)")
    parser.add_argument("--search", action="store_true", help="find the largest batch that fits (powers of two)")
    parser.add_argument("--decode", action="store_true", help="plan decoding a token instead of a train step")
    parser.add_argument("--rows", type=int, default=1, help="with --decode: sequences at once (default: 1)")
    parser.add_argument("--capacity", type=int, default=4096, help="with --decode: positions kept (default: 4096)")
    parser.add_argument("--depth", type=int, default=1, help="with --decode: iterations a position (default: 1)")
    parser.add_argument(
        "--efficiency",
        type=float,
        default=0.4,
        metavar="E",
        help="assumed share of the peak FLOP/s that a step reaches; of bandwidth it is twice that (default: 0.4)",
    )
    parser.add_argument("--json", metavar="FILE", help="write the figures to FILE")
    return parser


def main(argv: Sequence[str]) -> None:
    args, overrides = parser().parse_with_overrides(argv)
    if not 0 < args.efficiency <= 1:
        raise InputError(f"--efficiency {args.efficiency} must be in (0, 1]")
    for name in ("rows", "capacity", "depth"):
        if getattr(args, name) < 1:
            raise InputError(f"--{name} {getattr(args, name)} must be at least 1")
    # The compilers for other hardware run on the CPU; a TPU's would otherwise look for machines around it.
    os.environ.update({"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"})
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # the compilers' own remarks

    from sst_jax.lab.planning import targets
    from sst_jax.training import recipe as recipes
    from sst_jax.weights.loading import backbone_of

    chosen = [targets.find(name) for name in args.target.split(",")]
    recipe = recipes.resolve(recipes.read(args.config, overrides))
    backbone = backbone_of(recipe.model.source)
    found = []
    for target in chosen:
        record = search(args, recipe, backbone, target) if args.search else plan_once(args, recipe, backbone, target)
        found.append(record)
        print(report(record, args))
    if args.json:
        write_json(args.json, {"estimates": True, "plans": found})


def plan_once(args: Any, recipe: Any, backbone: Any, target: Any) -> dict[str, Any]:
    """One compile as a JSON-ready record."""
    from sst_jax.inference.kv_cache import bytes_per_sequence
    from sst_jax.lab.planning import compile as compiling

    config = recipe.model_config(backbone)
    reserve, data = target.reserve, recipe.data
    record = {
        "target": target.name, "title": target.title, "chips": target.chips, "memory": target.memory,
        "reserve": reserve, "quantize": recipe.model.quantize, "dtype": recipe.model.dtype,
    }  # fmt: skip
    if args.decode:
        record |= {
            "rows": args.rows, "capacity": args.capacity, "depth": args.depth,
            "cache_per_sequence": bytes_per_sequence(config, args.capacity),
        }  # fmt: skip
    else:
        forward = recipe.forward.forward
        record |= {
            "batch_size": data.batch_size,
            "length": data.length,
            "forward": forward,
            "steps": recipe.train.steps,
        }
    try:
        if args.decode:
            plan = compiling.plan_decoding(recipe, backbone, target, args.rows, args.capacity, args.depth)
        else:
            plan = compiling.plan_training(recipe, backbone, target)
    except compiling.TooLarge as error:
        return record | {"fits": False, "compiler": str(error)}
    flops, bandwidth = target.flops * target.chips, target.bandwidth * target.chips
    roofline = plan.work.seconds(flops, bandwidth)
    assumed = plan.work.seconds(args.efficiency * flops, min(2 * args.efficiency, 1.0) * bandwidth)
    tokens = args.rows if args.decode else data.batch_size * data.length
    record |= {
        "arguments": plan.arguments, "argument_kinds": plan.kinds, "temporaries": plan.temporaries, "peak": plan.peak,
        "fits": plan.peak + reserve <= target.memory, "margin": target.memory - plan.peak - reserve,
        "attention": plan.attention, "compile_seconds": plan.compile_seconds, "flops": plan.work.flops,
        "bytes": plan.work.bytes, "sent": plan.sent, "mesh": plan.mesh, "roofline_seconds": roofline,
        "assumed_efficiency": args.efficiency,
        "assumed_seconds": assumed, "tokens_per_second": tokens / assumed,
    }  # fmt: skip
    if not args.decode:
        record["hours"] = assumed * recipe.train.steps / 3600
    if target.chips > 1:
        record["sent_seconds"] = sum(plan.sent.values()) / target.link
    return record


def search(args: Any, recipe: Any, backbone: Any, target: Any) -> dict[str, Any]:
    """The record of the largest power-of-two batch that fits, or of the smallest one where none does."""

    def at(batch: int) -> dict[str, Any]:
        data = dataclasses.replace(recipe.data, batch_size=batch)
        return plan_once(args, dataclasses.replace(recipe, data=data), backbone, target)

    if args.decode:
        raise InputError("--search looks for a training batch; leave --decode out")
    batch, best = target.chips // recipe.mesh.tensor, None
    while batch <= LARGEST:
        record = at(batch)
        if not record["fits"]:
            return best or record
        best, batch = record, 2 * batch
    return best


def report(record: dict[str, Any], args: Any) -> str:
    """The record as text."""
    from sst_jax.lab.planning.targets import GIB

    what = (
        f"decoding {record['rows']} rows, {record['capacity']} positions, depth {record['depth']}"
        if args.decode
        else f"{record['forward']}, {record['batch_size']} x {record['length']}"
    )
    base = record["dtype"] if record["quantize"] == "none" else record["quantize"]
    several = f"{record['chips']} x " if record["chips"] > 1 else ""
    lines = [
        f"{several}{record['title']}: {what}, base {base}   (estimates: compiled for a description, nothing was run)"
    ]
    if "peak" not in record:
        return "\n".join([*lines, f"  does not fit: {record['compiler']}", ""])
    per = " on each chip" if record["chips"] > 1 else ""
    gib = {name: record[name] / GIB for name in ("arguments", "temporaries", "peak", "memory", "reserve", "margin")}
    verdict = f"fits, {gib['margin']:.1f} to spare"
    if not record["fits"]:
        verdict = f"does NOT fit, {-gib['margin']:.1f} too much"
    kinds = ", ".join(f"{name} {size / GIB:.2f}" for name, size in record["argument_kinds"].items())
    lines += [
        f"  arguments    {gib['arguments']:8.2f} GiB{per}: {kinds}",
        f"  temporaries  {gib['temporaries']:8.2f} GiB",
        f"  peak         {gib['peak']:8.2f} GiB of {gib['memory']:.1f}, {gib['reserve']:.1f} kept aside: {verdict}",
        f"  products     {record['flops'] / 1e12:8.1f} TFLOP, {record['bytes'] / 1e9:.0f} GB read and written, counted "
        "from the jaxpr, attention unmasked",
        f"  roofline     {record['roofline_seconds']:8.3f} s a step at the data sheet's peaks",
        f"  assumed      {record['assumed_seconds']:8.3f} s at {args.efficiency:.0%} of peak arithmetic and "
        f"{min(2 * args.efficiency, 1):.0%} of bandwidth: {record['tokens_per_second']:,.0f} tokens/s",
    ]
    if record["chips"] > 1:
        kinds = ", ".join(f"{kind} {size / 1e9:.2f}" for kind, size in record["sent"].items())
        axes = ", ".join(f"{axis} {size}" for axis, size in record["mesh"].items() if size > 1)
        lines.append(
            f"  sent         {record['sent_seconds']:8.3f} s a step at the data sheet's peak; it may overlap with "
            f"arithmetic: GB from each chip {kinds or 'none'} (mesh {axes})"
        )
    if args.decode:
        kept = {name: size / 2**20 for name, size in record["cache_per_sequence"].items()}
        lines.append(
            f"  caches       {sum(kept.values()):8.1f} MiB a sequence: states {kept['state']:.2f} (constant), local "
            f"layers {kept['local']:.1f} (their window), global layers {kept['global']:.1f} (linear)"
        )
    else:
        lines.append(
            f"  recipe       {record['hours']:8.2f} h for {record['steps']} steps, without held-out evaluation"
        )
    lines.append(f"  compiled in {record['compile_seconds']:.0f} s, attention by {record['attention']}\n")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(run(main))
