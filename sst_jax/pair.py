"""Trains a stream and what it must be measured against: same data, order and seeds, one command.

  python -m sst_jax.pair --config configs/sst.py:size=1b --seeds 3 --workdir runs/pair
  python -m sst_jax.pair --config configs/quickstart.py --config.data.path=DIR --seeds 3 --workdir runs/pair \\
      --task gsm8k --data DIR --limit 100

Arms: stream, baseline (the stream off), compute (the baseline with the stream's FLOPs as more steps), parameters (the
baseline with a LoRA rank that has at least the stream's parameters more), and on request memoryless (the stream's
parameters in their place, without a memory). --task then measures every run and compares stream with each other arm.

DIR/arms.json has every arm's overrides, resolved recipe and its differences from the stream's; DIR/ARM-SEED are run
folders of `train`, DIR/evaluations/ARM-SEED those of `evaluate`. The same command goes on where it stopped.
"""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sst_jax.console.command import Parser, run, write_json
from sst_jax.errors import InputError
from sst_jax.files import read_json


def parser() -> Parser:
    parser = Parser(prog="python -m sst_jax.pair", description=__doc__)
    add = parser.add_argument
    add("--config", required=True, metavar="FILE", help="a recipe with the stream on, such as configs/quickstart.py")
    parser.takes_overrides("--config.train.steps=200, in all arms")
    add("--workdir", required=True, metavar="DIR", help="run folders and results go here")
    add("--seeds", type=int, default=1, metavar="N", help="train.seed and the N - 1 after it (default: 1)")
    add("--arms", metavar="A,B", help="default: stream,baseline,compute,parameters")
    add("--task", metavar="NAME", help="measure every run on this task of `evaluate`")
    add("--measure", choices=("answers", "loss"), default="loss", help="default: loss, of the worked answers")
    add("--depth", default="1", metavar="P,Q", help="depth policies of arms with a stream (default: 1)")
    add("--data", metavar="DIR", help="folder with the task's file")
    add("--limit", type=int, default=0, metavar="N", help="only the first N items (0: all)")
    add("--batch-size", type=int, default=8, metavar="B", help="items measured together (default: 8)")
    add("--json", metavar="FILE", help="write the result here too (always in DIR/result.json)")
    return parser


def main(argv: Sequence[str]) -> None:
    args, overrides = parser().parse_with_overrides(argv)
    if args.seeds < 1:
        raise InputError(f"--seeds {args.seeds} must be at least 1")

    from sst_jax import evaluate
    from sst_jax.files import diff
    from sst_jax.inference.policies import parse_list
    from sst_jax.lab.studies import arms
    from sst_jax.training import recipe
    from sst_jax.training.run import check_recipe
    from sst_jax.weights.loading import backbone_of

    # Everything that can be wrong with the input shows before the first run.
    if args.task:
        evaluate.check_sizes(args)
        evaluate.asked(args, parse_list(args.depth, files=True))
    chosen = args.arms.split(",") if args.arms else list(arms.DEFAULT)
    stream = recipe.resolve(recipe.read(args.config, overrides))
    arms.check(chosen, stream)
    baseline = recipe.resolve(recipe.read(args.config, [*overrides, arms.OFF]))
    found = arms.costs(stream, baseline, backbone_of(stream.model.source))
    workdir = Path(args.workdir)
    record: dict[str, Any] = {
        "config": args.config, "overrides": overrides, "step_flops": {"stream": found.stream_flops,
        "baseline": found.baseline_flops, "ratio": found.ratio}, "stream_parameters": found.blend_parameters,
        "seeds": [stream.train.seed + number for number in range(args.seeds)], "arms": {},
    }  # fmt: skip
    runs: list[tuple[str, Path, list[str]]] = []
    resolved: dict[str, Any] = {}
    for arm in chosen:
        own = arms.overrides(arm, stream, found)
        read = recipe.read(args.config, [*overrides, *own])
        arm_recipe = recipe.resolve(read)
        resolved[arm] = recipe.recorded(read)
        differences = [
            {"key": key, "stream": there, arm: here}
            for key, there, here in diff(resolved.get("stream", resolved[arm]), resolved[arm])
        ]
        record["arms"][arm] = {
            "overrides": own, "steps": arm_recipe.train.steps, "rank": arm_recipe.adapter.rank,
            "differences": differences,
            "resolved": resolved[arm],
        }  # fmt: skip
        for seed in record["seeds"]:
            whole = [*overrides, *own, f"--config.train.seed={seed}"]
            target = workdir / f"{arm}-{seed}"
            check_recipe(target, recipe.recorded(recipe.read(args.config, whole)))
            runs.append((arm, target, whole))
    write_json(workdir / "arms.json", record)
    say_arms(record)

    for arm, target, whole in runs:
        train_one(args.config, whole, target)
        if args.task:
            evaluate_one(args, target, workdir / "evaluations" / target.name, arm in ("stream", "memoryless"))
    result = {**record, "results": heldout(runs)}
    if args.task:
        result["comparisons"] = compare_all(workdir, chosen, record["seeds"])
    write_json(workdir / "result.json", result)
    report(result)
    if args.json:
        write_json(args.json, result)


def say_arms(record: dict[str, Any]) -> None:
    """What is about to be trained, and how the arms differ."""
    print(f"a train step with the stream costs {record['step_flops']['ratio']:.3f} of one without, counted in FLOPs")
    print(f"the stream has {record['stream_parameters']:,} parameters; seeds {record['seeds']}")
    for arm, facts in record["arms"].items():
        own = ", ".join(f"{part['key']}={part[arm]!r}" for part in facts["differences"])
        print(f"{arm:12}{facts['steps']:6} steps, rank {facts['rank']}" + f"; differs in {own}" * bool(own))


def train_one(config: str, overrides: Sequence[str], target: Path) -> None:
    """One run, unless it has been finished before."""
    import jax

    from sst_jax import train

    if not (target / "result.json").is_file():
        print(f"\n--- {target}")
        train.main(["--config", config, *overrides, "--workdir", str(target)])
        gc.collect()  # the base of one run is gone before the next is read
        jax.clear_caches()


def evaluate_one(args: Any, target: Path, out: Path, deep: bool) -> None:
    """Measures one run, unless it has been before. `evaluate` goes on where it stopped, and refuses other settings."""
    from sst_jax import evaluate
    from sst_jax.inference.policies import parse_list
    from sst_jax.lab.evaluation.runner import HEADER, RESULT

    data, depth = ["--data", args.data] if args.data else [], args.depth if deep else "1"
    if (out / RESULT).is_file():
        there = read_json(out / HEADER)
        settings = evaluate.asked(args, parse_list(depth, files=True)).settings
        if all(there.get(key) == value for key, value in settings.items()):
            return  # without reading the model
    evaluate.main(
        [
            "--model",
            str(target),
            "--task",
            args.task,
            "--measure",
            args.measure,
            "--depth",
            depth,
            *data,
            "--limit",
            str(args.limit),
            "--batch-size",
            str(args.batch_size),
            "--out",
            str(out),
        ]
    )


def heldout(runs: Sequence[tuple[str, Path, list[str]]]) -> dict[str, list[dict[str, Any]]]:
    """By arm, what each seed's run came to by its own held-out problems."""
    found: dict[str, list[dict[str, Any]]] = {}
    for arm, target, _ in runs:
        result = json.loads((target / "result.json").read_text(encoding="utf-8"))
        keys = ("steps", "heldout_before", "heldout_after", "heldout_forward", "seconds")
        found.setdefault(arm, []).append({"run": str(target), **{key: result[key] for key in keys}})
    return found


def compare_all(workdir: Path, arms: Sequence[str], seeds: Sequence[int]) -> dict[str, Any]:
    """The stream against every other arm; tables are printed, and kept beside a figure."""
    from sst_jax import compare

    def side(arm: str) -> str:
        return ",".join(str(workdir / "evaluations" / f"{arm}-{seed}") for seed in seeds)

    found = {}
    for arm in arms:
        if arm != "stream":
            print(f"\n--- stream (A) against {arm} (B)")
            out = workdir / f"stream-against-{arm}"
            compare.main([side("stream"), side(arm), "--out", str(out)])
            found[arm] = json.loads((out / "result.json").read_text(encoding="utf-8"))["comparisons"]
    return found


def report(result: dict[str, Any]) -> None:
    """The held-out losses of training, a line an arm."""
    print("\nheld-out loss of training, each seed:")
    for arm, seeds in result["results"].items():
        losses = " ".join(f"{seed['heldout_after']:.4f}" for seed in seeds)
        mean = sum(seed["heldout_after"] for seed in seeds) / len(seeds)
        print(f"{arm:12}{losses}   mean {mean:.4f}   {sum(seed['seconds'] for seed in seeds):.0f} s of training")


if __name__ == "__main__":
    sys.exit(run(main))
