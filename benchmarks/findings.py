"""The tables of docs/findings.md, each from one command; whatever a folder holds already is not computed again.

    python benchmarks/findings.py --study scratch          S3 and parity from scratch, also deeper: minutes
    python benchmarks/findings.py --study further          the same with two passes, and at mixed depths from the start
    python benchmarks/findings.py --study marks            at mixed depths from the start, with iterations told apart
    python benchmarks/findings.py --study pointers         pointers followed one to six times, k told, at mixed depths
    python benchmarks/findings.py --study lengths          words of 12, 32 and 64 symbols, tested at 1,024
    python benchmarks/findings.py --study rooms            SmolLM2-135M on entity tracking: streams, LoRA, equal compute
    python benchmarks/findings.py --study hidden --config.data.path=DIR --data DIR       GSM8K, its steps not shown

The pretrained studies go seed by seed, all arms of a seed before the next one, so that what an interruption leaves are
whole seeds; `--arms` and `--seeds` widen a folder that is there. Their arms are ARMS below and the controls of
`sst_jax/lab/studies/arms.py`, matched to `two-range`: `compute` is the baseline with two passes' FLOPs as more steps.
`--deeper` measures streams at depth 2, 3 and 4 too, at the lengths they were trained at, each against its own depth 1.
"""

from __future__ import annotations

import dataclasses
import pathlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sst_jax.console.command import Parser, run, write_json
from sst_jax.errors import InputError
from sst_jax.files import read_json

CONFIGS = pathlib.Path(__file__).parents[1] / "configs"

# Beside the controls, by name: what is set otherwise than in configs/tracking.py (exact, alpha free).
RANGE = ("--config.stream.alpha_range=(0.015,0.10)",)
GAIN = ("--config.stream.gain=3.0", "--config.stream.learn_gain=True")
TWO = ("--config.stream.forward=two_pass",)
ARMS = {
    "exact-free": (), "exact-range": RANGE, "exact-gain": (*RANGE, *GAIN),
    "two-free": TWO, "two-range": (*TWO, *RANGE), "two-gain": (*TWO, *RANGE, *GAIN),
    "exact-faint": ("--config.stream.alpha_init=0.001",),  # begins as LoRA alone, all but
    "exact-warm": ("--config.stream.alpha_warmup=40",),  # alpha rises from 0 to where it would begin
    "mixed-depths": ("--config.stream.depths=(1,2,3,4)",),
}  # fmt: skip
LABELS = {  # in figures
    "exact-free": "exact, alpha free", "exact-range": "exact, published alpha",
    "exact-gain": "exact, published alpha, gain learned", "exact-faint": "exact, alpha from .001",
    "exact-warm": "exact, alpha warmed up", "two-free": "two_pass, alpha free",
    "two-range": "two_pass, published alpha", "two-gain": "two_pass, published alpha, gain learned",
    "mixed-depths": "exact, depths 1 to 4", "baseline": "LoRA alone", "compute": "LoRA alone, equal compute",
    "parameters": "LoRA alone, equal parameters",
}  # fmt: skip
CONTROLS = ("baseline", "compute", "parameters")
REFERENCE = "two-range"  # what the controls are matched to
DEEPER = "2,3,4"


class Pretrained(NamedTuple):
    """A study of the pretrained recipe: what it sets, what its runs are measured on, and its arms in order."""

    overrides: tuple[str, ...]
    tasks: tuple[str, ...]
    arms: tuple[str, ...]


class Scratch(NamedTuple):
    """A study of `configs/statetrack.py`, once for each task."""

    tasks: tuple[str, ...]
    overrides: tuple[str, ...]


DEPTHS = "--config.test.depths=(1,2,3,4)"
MAIN = ("exact-free", "baseline", "two-range", "exact-range", "compute")
STUDIES: dict[str, Pretrained | Scratch] = {
    "scratch": Scratch(("s3", "parity"), (DEPTHS, "--config.arms=stream,plain,range,longer,deepened")),
    "further": Scratch(("s3", "parity"), (DEPTHS, "--config.arms=stream,published,two_pass,depths,mixed")),
    "marks": Scratch(("s3", "parity"), (DEPTHS, "--config.arms=stream,depths,marked")),
    "pointers": Scratch(("pointers",), (
        DEPTHS, "--config.arms=plain,stream,depths,marked,deep", "--config.task.length=24", "--config.test.times=(1,)",
    )),
    "lengths": Scratch(("s5", "mod5", "s3", "parity"), (
        "--config.arms=stream", "--config.train.lengths=(12,32,64)", "--config.task.length=64",
        "--config.train.steps=1500", "--config.test.times=(1,4,16)", "--config.test.rows=128",
        "--config.model.d_model=128", "--config.model.d_ff=256",
    )),
    "rooms": Pretrained(("--config.data.name=rooms:1-4",), ("rooms:1-4", "rooms:8"), MAIN),
    "boxes": Pretrained(("--config.data.name=boxes:1-4", "--config.train.steps=400"), ("boxes:1-4", "boxes:8"), MAIN),
    "hidden": Pretrained(
        ("--config.data.name=gsm8k:result", "--config.data.length=128", "--config.data.overlong=drop"),
        ("gsm8k:result",), MAIN,
    ),
    "hidden-words": Pretrained(
        ("--config.data.name=words:result", "--config.data.length=72"), ("words:result",), MAIN
    ),
}  # fmt: skip


def parser() -> Parser:
    parser = Parser(prog="python benchmarks/findings.py", description=__doc__)
    add = parser.add_argument
    add("--study", required=True, choices=tuple(STUDIES))
    add("--workdir", metavar="DIR", help="default: runs/findings-STUDY")
    add("--seeds", type=int, default=3, metavar="N", help="default: %(default)s")
    add("--arms", metavar="A,B", help=f"of {', '.join((*ARMS, *CONTROLS))} (pretrained studies)")
    add("--deeper", metavar="A,B", help=f"streams to measure at depth {DEEPER} too (pretrained studies)")
    add(
        "--limit", type=int, default=200, metavar="N", help="items of a task (pretrained studies; default: %(default)s)"
    )
    add("--data", metavar="DIR", help="folder with the task's file, where it needs one")
    parser.takes_overrides("--config.train.steps=200, in all arms")
    add("--json", metavar="FILE", help="write the result here too (always in DIR/result.json)")
    return parser


def main(argv: Sequence[str]) -> None:
    args, overrides = parser().parse_with_overrides(argv)
    if args.seeds < 1:
        raise InputError(f"--seeds {args.seeds} must be at least 1")
    study, workdir = STUDIES[args.study], Path(args.workdir or f"runs/findings-{args.study}")
    result = (from_scratch if isinstance(study, Scratch) else pretrained)(args, study, overrides, workdir)
    write_json(workdir / "result.json", result)
    if args.json:
        write_json(args.json, result)


def from_scratch(args: Any, study: Scratch, overrides: Sequence[str], workdir: Path) -> dict[str, Any]:
    """Train and measure the arms of each task."""
    from sst_jax.lab.studies import scratch_study
    from sst_jax.training import recipe

    result = {}
    for task in study.tasks:
        own = [f"--config.task.name={task}", f"--config.train.seeds={args.seeds}", *study.overrides, *overrides]
        result[task] = scratch_study.run(recipe.read(str(CONFIGS / "statetrack.py"), own), workdir / task)
    return result


def pretrained(args: Any, study: Pretrained, overrides: Sequence[str], workdir: Path) -> dict[str, Any]:
    """Trains and measures seed by seed, and compares what is whole after each."""
    from sst_jax.lab.evaluation import EvalConfig
    from sst_jax.lab.evaluation.evaluation import read_task
    from sst_jax.lab.studies import arms, pairs
    from sst_jax.training import recipe
    from sst_jax.weights.loading import resolve

    # Everything that can be wrong with the input shows before the first run.
    measured = {task: EvalConfig(task, "loss", data=args.data, limit=args.limit, batch_size=25) for task in study.tasks}
    for settings in measured.values():
        read_task(settings)
    deepened = dataclasses.replace(measured[study.tasks[0]], policies=tuple(DEEPER.split(",")))
    names, config = args.arms.split(",") if args.arms else list(study.arms), str(CONFIGS / "tracking.py")
    for name in names:
        if name not in (*ARMS, *CONTROLS):
            raise InputError(f"--arms {name} is unknown; arms are {', '.join((*ARMS, *CONTROLS))}")
    deeper = args.deeper.split(",") if args.deeper else []
    for name in deeper:
        if name not in names or name in CONTROLS:
            streams = ", ".join(arm for arm in names if arm in ARMS)
            raise InputError(f"--deeper {name} is no stream among the arms, which are {streams}")
    shared = [*study.overrides, *overrides]
    reference = recipe.resolve(recipe.read(config, [*shared, *ARMS[REFERENCE]]))
    baseline = recipe.resolve(recipe.read(config, [*shared, arms.OFF]))
    found = arms.costs(reference, baseline, resolve(reference.model.source).backbone)
    own = {name: ARMS[name] if name in ARMS else arms.overrides(name, reference, found) for name in names}
    runs = {
        (name, seed): [*shared, *own[name], f"--config.train.seed={seed}"]
        for seed in range(args.seeds) for name in names
    }  # fmt: skip
    for (name, seed), whole in runs.items():
        pairs.check_run(config, whole, workdir / f"{name}-{seed}")
    for seed in range(args.seeds):
        for name in names:
            target = workdir / f"{name}-{seed}"
            pairs.train_one(config, runs[name, seed], target)
            for task in study.tasks:
                pairs.evaluate_one(measured[task], target, evaluation(workdir, task, name, seed))
            if name in deeper:
                pairs.evaluate_one(deepened, target, evaluation(workdir, study.tasks[0], name, seed, True))
        result = {
            "study": args.study, "overrides": shared, "arms": {name: list(own[name]) for name in names},
            "step_flops_ratio": found.ratio, "seeds": seed + 1,
            "tasks": {task: compare_all(workdir, task, names, seed + 1) for task in study.tasks},
            "deeper": {name: compare_depths(workdir, study.tasks[0], name, seed + 1) for name in deeper},
            "seconds": {name: [read_json(workdir / f"{name}-{s}" / "result.json")["seconds"] for s in range(seed + 1)]
                        for name in names},
        }  # fmt: skip
        draw(result, workdir / "figure.png")
        write_json(workdir / "result.json", result)
        report(result)
    return result


def evaluation(workdir: Path, task: str, arm: str, seed: int, deeper: bool = False) -> Path:
    return workdir / "evaluations" / f"{task.replace(':', '-')}{'-deeper' * deeper}" / f"{arm}-{seed}"


def compare_sides(a: Sequence[Path], b: Sequence[Path], out: Path) -> list[dict[str, Any]]:
    """The records of `compare` on evaluations of the same seeds."""
    from sst_jax.lab.evaluation import compare

    return compare(a, b, out)["comparisons"]


def compare_depths(workdir: Path, task: str, name: str, seeds: int) -> dict[str, Any]:
    """A stream at each of DEEPER less itself at depth 1."""
    deep, once = ([evaluation(workdir, task, name, seed, deeper) for seed in range(seeds)] for deeper in (True, False))
    records = compare_sides(deep, once, workdir / "comparisons" / f"{task.replace(':', '-')}-deeper" / name)
    policies = [read_json(path / "result.json")["policies"] for path in deep]
    right = {depth: sum(found[depth]["greedy"]["value"] for found in policies) / seeds for depth in policies[0]}
    return {record["A"]: {**record, "greedy": right[record["A"]]} for record in records}


def compare_all(workdir: Path, task: str, names: Sequence[str], seeds: int) -> dict[str, Any]:
    """Every arm's score on a task, and every stream against every control."""

    def side(arm: str) -> list[Path]:
        return [evaluation(workdir, task, arm, seed) for seed in range(seeds)]

    scores: dict[str, Any] = {}
    for name in names:
        policies = [
            read_json(evaluation(workdir, task, name, seed) / "result.json")["policies"]["1"] for seed in range(seeds)
        ]
        scores[name] = {key: [found[key]["value"] for found in policies] for key in ("nats_per_token", "greedy")}
    against: dict[str, Any] = {}
    for name in names:
        for control in names:
            if name in ARMS and control in CONTROLS:
                out = workdir / "comparisons" / task.replace(":", "-") / f"{name}-against-{control}"
                against.setdefault(name, {})[control] = compare_sides(side(name), side(control), out)[0]
    return {"scores": scores, "against": against}


def report(result: dict[str, Any]) -> None:
    """Markdown tables, as they stand in docs/findings.md."""
    for task, found in result["tasks"].items():
        controls = [name for name in found["scores"] if name in CONTROLS]
        print(f"\n{task}, {result['seeds']} seeds\n")
        print("| arm | nats/token | accuracy |" + "".join(f" minus {name} |" for name in controls))
        print("|---|---|---|" + "---|" * len(controls))
        for name, scores in found["scores"].items():
            loss, right = (sum(scores[key]) / len(scores[key]) for key in ("nats_per_token", "greedy"))
            row = f"| {name} | {loss:.3f} | {right:.1%} |"
            for control in controls:
                record = found["against"].get(name, {}).get(control)
                row += f" {interval(record)} |" if record else " |"
            print(row)
    if result["deeper"]:
        print(f"\n{next(iter(result['tasks']))}: nats minus the same stream's at depth 1; accuracy\n")
        print("| arm |" + "".join(f" depth {depth} |" for depth in DEEPER.split(",")))
        print("|---|" + "---|" * len(DEEPER.split(",")))
        for name, records in result["deeper"].items():
            cells = (f"{interval(records[depth])}; {records[depth]['greedy']:.1%}" for depth in DEEPER.split(","))
            print(f"| {name} | " + " | ".join(cells) + " |")


def draw(result: dict[str, Any], target: Path) -> None:
    """Draw loss and accuracy of every arm, a point a seed and a bar at their mean, for each task; by loss."""
    from sst_jax.console.figure import new_figure

    first = next(iter(result["tasks"].values()))["scores"]
    order = sorted(first, key=lambda name: sum(first[name]["nats_per_token"]))
    figure = new_figure(9.6, 4.4)
    panels = figure.subplots(1, 2)
    for axes, key, label in zip(
        panels, ("nats_per_token", "greedy"), ("loss (nats per answer token)", "accuracy"), strict=True
    ):
        for number, (task, found) in enumerate(result["tasks"].items()):
            for place, name in enumerate(order):
                at, values = place + 0.3 * (number - (len(result["tasks"]) - 1) / 2), found["scores"][name][key]
                marker = "o" if name in ARMS else "s"
                if len(values) > 1:
                    axes.plot([at] * len(values), values, marker, color=f"C{number}", markersize=4, alpha=0.6)
                axes.hlines(sum(values) / len(values), at - 0.13, at + 0.13, color=f"C{number}", linewidth=2)
            axes.plot([], [], "-", color=f"C{number}", label=f"{task}, mean")
        for marker, means in (("o", "a seed, with a stream"), ("s", "a seed, without")):
            axes.plot([], [], marker, color="0.5", markersize=4, label=means)
        axes.set_xticks(range(len(order)), [LABELS.get(name, name) for name in order], rotation=35, ha="right")
        axes.set(ylabel=label)
        axes.grid(alpha=0.3, axis="y")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), fontsize="small")
    figure.suptitle(f"{result['study']}: SmolLM2-135M, trained the same way in every arm, {result['seeds']} seeds")
    figure.savefig(target, dpi=110)


def interval(record: dict[str, Any]) -> str:
    """A difference with its interval over items, and over seeds where there are several."""
    parts = [record["over_items"], *([record["over_seeds"]] if "over_seeds" in record else [])]
    return f"{record['difference']:+.3f} " + " ".join(f"[{part['low']:+.3f}, {part['high']:+.3f}]" for part in parts)


if __name__ == "__main__":
    sys.exit(run(main))
