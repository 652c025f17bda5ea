"""Measure a recipe's programs and kernels on the device at hand, beside what a plan says of them.

  sst-jax measure                                              the 27B recipe, all of its layers
  sst-jax measure --layers 4 --json measured.json              of its first four layers, for smaller cards
  sst-jax measure --config configs/sst.py:size=4b --trace out  with a profile that TensorBoard and Perfetto read

Weights are random and have the real shapes: nothing is downloaded. Measured are how far every attention kernel and the
NF4 product are from float32, the time of the recipe's train step, of its held-out evaluation, of a prefill, and of a
token at several rows and depths, and the peak of the device's memory. The table goes into a report as it is.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from sst_jax.console.command import Parser, folder_for, numbers, run, write_json
from sst_jax.errors import InputError


def parser() -> Parser:
    parser = Parser(prog="python -m sst_jax.measure", description=__doc__)
    parser.add_argument("--config", default="sst", metavar="FILE", help="a recipe (default: the 27B of configs/sst.py)")
    parser.takes_overrides("--config.data.batch_size=4")
    parser.add_argument("--layers", type=int, metavar="N", help="run the first N layers alone, and scale up to all")
    parser.add_argument("--rows", default="1,8", metavar="N,...", help="sequences decoded together (default: 1,8)")
    parser.add_argument("--depths", default="1,2,3,4", metavar="N,...", help="iterations per token (default: 1,2,3,4)")
    parser.add_argument("--capacity", type=int, default=4096, help="positions in a cache (default: 4096)")
    parser.add_argument("--prompt", type=int, default=512, help="positions that are prefilled (default: 512)")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each program; the median counts (default: 3)")
    parser.add_argument("--trace", metavar="DIR", help="write a profile of every program into DIR")
    parser.add_argument("--json", metavar="FILE", help="write the figures to FILE")
    return parser


def main(argv: Sequence[str]) -> None:
    args, overrides = parser().parse_with_overrides(argv)
    for name in ("layers", "capacity", "prompt", "repeats"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise InputError(f"--{name} {value} must be at least 1")
    if args.prompt > args.capacity:
        raise InputError(f"--prompt {args.prompt} does not fit --capacity {args.capacity}")
    rows, depths = (tuple(numbers(f"--{name}", getattr(args, name), int)) for name in ("rows", "depths"))
    trace = None if args.trace is None else Path(folder_for("--trace", args.trace))

    from sst_jax.lab.planning import measuring
    from sst_jax.training.recipe import read_recipe
    from sst_jax.weights.loading import resolve

    recipe = read_recipe(args.config, overrides)
    backbone = resolve(recipe.model.source).backbone
    layers = args.layers or backbone.num_layers
    if layers > backbone.num_layers:
        raise InputError(f"--layers {layers}: the model has {backbone.num_layers}")
    sizes = measuring.Sizes(layers, rows, depths, args.capacity, args.prompt, args.repeats)
    record = measuring.measure(recipe, backbone, sizes, trace)
    print(measuring.describe(record))
    if args.json:
        write_json(args.json, record)


if __name__ == "__main__":
    sys.exit(run(main))
