"""Train LoRA and a state stream on a frozen backbone.

  sst-jax train --config configs/quickstart.py --workdir runs/quickstart
  sst-jax train --config configs/sst.py:size=1b --config.data.path=DIR --workdir runs/1b
  sst-jax train --config configs/sst.py:size=1b --config.data.path=DIR --dry-run
  sst-jax train --config configs/statetrack.py --workdir runs/s3      (tiny models from scratch)

The same command on the same folder resumes, to the same numbers. Ctrl-C, SIGTERM and SIGUSR1 save first; a step whose
loss or gradient is not finite is skipped, and train.max_skipped such steps in a row end the run. From scratch nothing
is saved before an arm is done: --stop-within and --stall-minutes have no effect there.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from sst_jax.console.command import Parser, run, write_json
from sst_jax.errors import InputError


def parser() -> Parser:
    parser = Parser(prog="python -m sst_jax.train", description=__doc__)
    parser.add_argument("--config", required=True, metavar="FILE", help="a recipe, such as configs/quickstart.py")
    parser.takes_overrides()
    parser.add_argument("--workdir", metavar="DIR", help="run folder (default: runs/NAME-OF-RECIPE)")
    parser.add_argument("--json", metavar="FILE", help="write the summary to FILE too (always in DIR/result.json)")
    parser.add_argument(
        "--stop-within",
        type=float,
        default=0.0,
        metavar="S",
        help="seconds from SIGTERM, SIGINT or SIGUSR1 to exit, saved or not (default: until the save is done)",
    )
    parser.add_argument(
        "--stall-minutes",
        type=float,
        default=15.0,
        metavar="M",
        help="write DIR/stall.txt when no step has finished for M minutes; 0: never (default: %(default)g)",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="check everything, show the first batch and the memory that a step is planned to take, and write nothing",
    )
    parser.add_argument("--base", metavar="MODEL", help="resume on the base at this place, by its digest the same")
    parser.add_argument(
        "--allow-changed",
        action="store_true",
        help="resume although base, data, tokenizer or chat template are not those that the run began with, or with "
        "more train.steps or another train.eval_every, and record it in DIR/config.json",
    )
    return parser


def main(argv: Sequence[str]) -> None:
    args, overrides = parser().parse_with_overrides(argv)

    from sst_jax.lab.studies import scratch_study
    from sst_jax.training import distributed, dry_run, loop, recipe
    from sst_jax.training.watchdog import Watch

    watch, knobs = Watch(args.stop_within, args.stall_minutes), recipe.read(args.config, overrides)
    workdir = Path(args.workdir or f"runs/{Path(args.config.split(':')[0]).stem}")
    if "kind" in knobs:
        if args.allow_changed or args.base or args.dry_run:
            raise InputError(
                "--allow-changed, --base and --dry-run are for a run on a base, and this recipe trains from scratch"
            )
        result = scratch_study.run(knobs, workdir)
    elif args.dry_run:
        result = dry_run.dry_run(recipe.resolve(knobs), workdir, args.base)
        print(result["describe"])
    else:
        result = loop.fit(knobs, workdir, watch=watch, base=args.base, allow_changed=args.allow_changed).to_json()
    if args.json and distributed.is_primary():
        write_json(args.json, result)


if __name__ == "__main__":
    sys.exit(run(main))
