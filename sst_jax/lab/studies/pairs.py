"""A stream and its controls, trained and measured on the same data, order and seeds: what `pair` does, as calls."""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax

from sst_jax.console.command import write_json
from sst_jax.errors import InputError
from sst_jax.files import diff, read_json
from sst_jax.inference.model import load
from sst_jax.inference.policies import flat
from sst_jax.lab import evaluation
from sst_jax.lab.evaluation import EvalConfig, report
from sst_jax.lab.evaluation.evaluation import finished, read_task
from sst_jax.lab.evaluation.paired_stats import policy_label
from sst_jax.lab.studies import arms
from sst_jax.training import recipe as recipes
from sst_jax.training.loop import fit
from sst_jax.training.recipe import default_record
from sst_jax.training.run import check_recipe
from sst_jax.types import Json
from sst_jax.weights.loading import resolve

WITH_STREAM = ("stream", "memoryless")


@dataclasses.dataclass(frozen=True)
class PairConfig:
    """config      a recipe with the stream on, as --config takes it
    overrides   --config.KEY=VALUE, in all arms
    seeds       train.seed and the ones after it
    arms        of `arms.ARMS`
    evaluation  how every run is measured; None: by its held-out loss alone. Arms without a stream are at depth 1.
    """

    config: str
    overrides: tuple[str, ...] = ()
    seeds: int = 1
    arms: tuple[str, ...] = arms.DEFAULT
    evaluation: EvalConfig | None = None

    def __post_init__(self) -> None:
        if self.seeds < 1:
            raise InputError(f"--seeds {self.seeds} must be at least 1")


class PlannedRun(NamedTuple):
    """A run folder, and the overrides that make its recipe."""

    arm: str
    folder: Path
    overrides: list[str]


def pair(config: PairConfig, workdir: Path) -> Json:
    """Train and measure all arms into a folder; resume what an earlier call left there.

    Returns:
        What DIR/result.json holds: the arms, their held-out losses, and comparisons of the stream with each other arm.

    Raises: InputError before the first run, on whatever is wrong with the recipe, the arms, the task or the folder.
    """
    if config.evaluation is not None:
        read_task(config.evaluation)
    record, runs = plan(config, workdir)
    write_json(workdir / "arms.json", record)
    print_arms(record)
    for run in runs:
        train_one(config.config, run.overrides, run.folder)
        if config.evaluation is not None:
            own = config.evaluation
            if run.arm not in WITH_STREAM:
                own = dataclasses.replace(own, policies=(flat(1),))
            evaluate_one(own, run.folder, workdir / "evaluations" / run.folder.name)
    result = {**record, "results": heldout(runs)}
    if config.evaluation is not None:
        result["comparisons"] = compare_arms(workdir, config.arms, record["seeds"])
    write_json(workdir / "result.json", result)
    return result


def plan(config: PairConfig, workdir: Path) -> tuple[Json, list[PlannedRun]]:
    """Return what arms.json records, and the runs in order.

    Raises: InputError on arms that do not fit the recipe, and where a run folder holds another recipe.
    """
    stream = recipes.resolve(recipes.read(config.config, config.overrides))
    arms.check(config.arms, stream)
    baseline = recipes.resolve(recipes.read(config.config, [*config.overrides, arms.OFF]))
    costs = arms.costs(stream, baseline, resolve(stream.model.source).backbone)
    record: Json = {
        "config": config.config,
        "overrides": list(config.overrides),
        "step_flops": {"stream": costs.stream_flops, "baseline": costs.baseline_flops, "ratio": costs.ratio},
        "stream_parameters": costs.blend_parameters,
        "seeds": [stream.train.seed + number for number in range(config.seeds)],
        "arms": {},
    }
    own = {arm: arms.overrides(arm, stream, costs) for arm in config.arms}
    knobs = {arm: recipes.read(config.config, [*config.overrides, *own[arm]]) for arm in config.arms}
    resolved = {arm: recipes.recorded(read) for arm, read in knobs.items()}
    runs = []
    for arm in config.arms:
        arm_recipe = recipes.resolve(knobs[arm])
        record["arms"][arm] = {
            "overrides": own[arm],
            "steps": arm_recipe.train.steps,
            "rank": arm_recipe.adapter.rank,
            "differences": [
                {"key": key, "stream": there, arm: here} for key, there, here in diff(resolved["stream"], resolved[arm])
            ],
            "resolved": resolved[arm],
        }
        for seed in record["seeds"]:
            whole = [*config.overrides, *own[arm], f"--config.train.seed={seed}"]
            runs.append(PlannedRun(arm, workdir / f"{arm}-{seed}", whole))
    for run in runs:
        check_run(config.config, run.overrides, run.folder)
    return record, runs


def check_run(config: str, overrides: Sequence[str], folder: Path) -> None:
    """Raise InputError where a run folder holds a run of another recipe."""
    check_recipe(folder, recipes.recorded(recipes.read(config, overrides)), default_record())


def train_one(config: str, overrides: Sequence[str], folder: Path) -> None:
    """Train one run, unless it is finished."""
    if not (folder / "result.json").is_file():
        print(f"\n--- {folder}")
        fit(recipes.read(config, overrides), folder, brief=True)
        gc.collect()  # the base of one run is gone before the next is read
        jax.clear_caches()


def evaluate_one(config: EvalConfig, run: Path, out: Path) -> Json:
    """Measure one run into a folder, or return the result that the folder already holds of these settings.

    Raises: InputError as `evaluation.run`, and where the folder holds an evaluation of other settings.
    """
    result = finished(config, out)
    if result is None:
        result = evaluation.run(load(str(run)), config, out)
        report.print_evaluation(result, out)
    return result


def heldout(runs: Sequence[PlannedRun]) -> dict[str, list[Json]]:
    """Return, by arm, what each seed's run came to on its own held-out problems."""
    found: dict[str, list[Json]] = {}
    for run in runs:
        result = read_json(run.folder / "result.json")
        keys = ("steps", "heldout_before", "heldout_after", "heldout_forward", "seconds")
        found.setdefault(run.arm, []).append({"run": str(run.folder), **{key: result[key] for key in keys}})
    return found


def compare_arms(workdir: Path, names: Sequence[str], seeds: Sequence[int]) -> Json:
    """Compare the stream with every other arm; print the tables, and write them and a figure to a folder each."""

    def side(arm: str) -> list[Path]:
        return [workdir / "evaluations" / f"{arm}-{seed}" for seed in seeds]

    found = {}
    for arm in names:
        if arm != "stream":
            print(f"\n--- stream (A) against {arm} (B)")
            result = evaluation.compare(side("stream"), side(arm), workdir / f"stream-against-{arm}")
            report.print_comparison(result)
            found[arm] = result["comparisons"]
    return found


def print_differences(result: Json) -> None:
    """Print every difference between the stream and another arm in one table."""
    several = len(result["seeds"]) > 1
    seeds = f"{'95% over seeds':26}" if several else ""
    print(f"\nstream minus each other arm:\n{'arm':14}{'depth':22}{'difference':>12}  {'95% over items':26}{seeds}")
    for arm, records in result["comparisons"].items():
        for record in records:
            row = f"{arm:14}{policy_label(record):22}{record['difference']:12.4g}"
            row += f"  {report.interval(record['over_items'], 1.0):26}"
            print(row + (report.interval(record["over_seeds"], 1.0) if several else ""))


def print_arms(record: Json) -> None:
    """Print what is about to be trained, and how the arms differ."""
    print(f"a train step with the stream costs {record['step_flops']['ratio']:.3f} of one without, counted in FLOPs")
    print(f"the stream has {record['stream_parameters']:,} parameters; seeds {record['seeds']}")
    for arm, facts in record["arms"].items():
        own = ", ".join(f"{part['key']}={part[arm]!r}" for part in facts["differences"])
        print(f"{arm:12}{facts['steps']:6} steps, rank {facts['rank']}" + f"; differs in {own}" * bool(own))


def print_heldout(result: Json) -> None:
    """Print the held-out losses of training, a line an arm."""
    print("\nheld-out loss of training, each seed:")
    for arm, seeds in result["results"].items():
        losses = " ".join(f"{seed['heldout_after']:.4f}" for seed in seeds)
        mean = sum(seed["heldout_after"] for seed in seeds) / len(seeds)
        print(f"{arm:12}{losses}   mean {mean:.4f}   {sum(seed['seconds'] for seed in seeds):.0f} s of training")
