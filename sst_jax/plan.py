"""Plan a recipe: whether it fits a card and how fast it can be, before anything is rented or downloaded.

  sst-jax plan --config configs/sst.py --target rtx-pro-6000
  sst-jax plan --config configs/sst.py:size=4b --target rtx-4090 --search
  sst-jax plan --config configs/sst.py --target h100,rtx-4090 --decode --depth 4
  sst-jax plan --config configs/sst.py --config.data.batch_size=8 --target v5e-8,h100x8
  sst-jax plan --config configs/sst.py --target h100x8 --config.mesh.fsdp=2 --config.mesh.tensor=4 ...

Targets: rtx-pro-6000, h100, h200, b200, rtx-5090, rtx-4090, rtx-3090, a6000, a100-80g, a100-40g, l40s, l4, t4, of each
also several in one machine, as h100x8; TPU slices v5e-8, v5p-8 (4 chips, as Google counts), v5p-16, v6e-8. On several
devices the recipe's mesh is compiled, by default all along fsdp.

The real train step (or decode step) is compiled for the described hardware on a CPU; its compiler must be installed,
the hardware and its driver need not: sst-jax[cuda] for GPUs, sst-jax[tpu] for TPU slices. All figures are estimates:
nothing is run, and the CUDA context, kernels' workspaces and fragmentation are in no plan (a reserve stands for them).
Of a recipe that draws depths or passes the costliest step is compiled, and the average counted.
"""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Sequence

from sst_jax.console.command import Parser, numbers, run, write_json
from sst_jax.errors import InputError


def parser() -> Parser:
    parser = Parser(prog="python -m sst_jax.plan", description=__doc__)
    parser.keeps_programs = False
    parser.add_argument("--config", required=True, metavar="FILE", help="a recipe, such as configs/sst.py")
    parser.takes_overrides("--config.data.batch_size=4")
    parser.add_argument("--target", default="rtx-pro-6000", metavar="NAME,...", help="see above (default: %(default)s)")
    parser.add_argument("--search", action="store_true", help="find the largest batch that fits (powers of two)")
    parser.add_argument("--decode", action="store_true", help="plan decoding a token instead of a train step")
    parser.add_argument(
        "--rows", default="1", metavar="N,...", help="with --decode: sequences decoded together (default: 1)"
    )
    parser.add_argument(
        "--capacity", type=int, default=4096, help="with --decode: positions in a cache (default: 4096)"
    )
    parser.add_argument("--depth", type=int, default=1, help="with --decode: iterations per token (default: 1)")
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
    rows = numbers("--rows", args.rows, int)
    for name in ("capacity", "depth"):
        if getattr(args, name) < 1:
            raise InputError(f"--{name} {getattr(args, name)} must be at least 1")
    if args.search and args.decode:
        raise InputError("--search looks for a training batch; leave --decode out")
    # The compilers for other hardware run on the CPU; a TPU's would otherwise look for machines around it.
    os.environ.update({"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"})
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # the compilers' own remarks

    from sst_jax.lab.planning import records, targets
    from sst_jax.training.recipe import read_recipe
    from sst_jax.weights.loading import resolve

    chosen = [targets.find(name) for name in args.target.split(",")]
    recipe = read_recipe(args.config, overrides)
    backbone = resolve(recipe.model.source).backbone
    decodings = [records.Decoding(each, args.capacity, args.depth) for each in rows]
    plans = []
    for target, decoding in itertools.product(chosen, decodings if args.decode else [None]):
        if args.search:
            record = records.search(recipe, backbone, target, args.efficiency)
        else:
            record = records.plan_record(recipe, backbone, target, args.efficiency, decoding)
        plans.append(record)
        print(records.describe(record))
    if args.json:
        write_json(args.json, {"estimates": True, "plans": plans})


if __name__ == "__main__":
    sys.exit(run(main))
