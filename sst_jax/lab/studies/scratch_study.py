"""A study of tiny models: arms trained, measured on new words, and set side by side. `train` runs it.

RUN/ARM/params.safetensors  weights of all seeds, [seeds, ...]      RUN/ARM/losses.npy    [steps, seeds]
RUN/ARM/training.json       what was trained, and how long it took  RUN/ARM/outcomes.npz  what every test word came to
RUN/ARM/models/SEED/        each of them as a model that `sst_jax.load` opens, without a tokenizer
RUN/result.json             tables, from the outcomes               RUN/figure.png        the same, drawn

What is trained, or measured, stays so: the same command resumes, and may name more arms.
"""

from __future__ import annotations

import functools
import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from sst_jax.console.command import write_json
from sst_jax.console.progress import print_line
from sst_jax.data import statetrack
from sst_jax.data.no_tokenizer import NoTokenizer
from sst_jax.data.statetrack import Automaton
from sst_jax.errors import InputError
from sst_jax.files import read_json
from sst_jax.inference.model import Model
from sst_jax.lab.statistics import bootstrap_mean, finite, holm, mcnemar, t_mean
from sst_jax.lab.studies import scratch
from sst_jax.lab.studies.scratch import Arm, Schedule, Task
from sst_jax.model import rules
from sst_jax.model.config import ModelConfig, from_mapping
from sst_jax.model.decoder import Params
from sst_jax.training.figures import study_figure
from sst_jax.training.run import RunFolder, check_recipe
from sst_jax.types import Json

OVERLAPS = 64  # words whose states are compared
TESTS = 1  # the first number of a test's seed; that of training is 0


# -------------------------------------------------------------------------------------------------------------- Runs


class Study(NamedTuple):
    """A resolved recipe."""

    task: Task
    length: int
    arms: dict[str, Arm]
    schedule: Schedule
    times: tuple[int, ...]
    rows: int
    depths: tuple[int, ...]


def resolve(recipe: ml_collections.ConfigDict) -> Study:
    """Check a recipe. Raises: InputError naming the knob."""
    task, names, test = scratch.find(recipe.task.name), recipe.arms.split(","), recipe.test
    for number, name in enumerate(names):
        if name not in scratch.ARMS or name in names[:number]:
            problem = "named twice" if name in names[:number] else "unknown"
            raise InputError(f"arms={recipe.arms}: {name!r} is {problem}; arms are {', '.join(scratch.ARMS)}")
        if name in scratch.CONTINUED and "stream" not in names[:number]:
            raise InputError(f"arms={recipe.arms}: {name} continues stream, which must stand before it")
    for key, low in (("times", 1), ("depths", 1)):
        if not test[key] or not all(isinstance(value, int) and value >= low for value in test[key]):
            raise InputError(f"test.{key}={test[key]} must be whole numbers of at least {low}")
    if recipe.task.length < statetrack.SHORTEST:
        raise InputError(f"task.length={recipe.task.length} must be at least {statetrack.SHORTEST}")
    if 1 not in test.depths or test.rows < 2:
        raise InputError(f"test.depths={test.depths} must hold 1, and test.rows={test.rows} be at least 2")
    backbone = scratch.make_backbone(task, **recipe.model.to_dict())
    arms = {name: scratch.make_arm(backbone, {**recipe.stream.to_dict(), **scratch.ARMS[name]}) for name in names}
    schedule = from_mapping(Schedule, recipe.train.to_dict())
    return Study(task, recipe.task.length, arms, schedule, tuple(test.times), test.rows, tuple(test.depths))


def run(recipe: ml_collections.ConfigDict, workdir: Path) -> Json:
    """Train and measure every arm that DIR does not hold yet; returns what result.json holds."""
    study = resolve(recipe)
    identity, defaults = (json.loads(knobs.to_json_best_effort()) for knobs in (recipe, scratch.defaults()))
    del identity["arms"], defaults["arms"]  # a folder may be given more arms
    check_recipe(workdir, identity, defaults)
    base = {"path": "none: from scratch", "digest": scratch.KIND}
    folder = RunFolder(workdir, {"recipe": identity}, base, defaults=defaults)
    try:
        outcomes, facts = {}, {}
        for name, arm in study.arms.items():
            target = workdir / name
            if not (target / "training.json").is_file():
                start = scratch.load_params(workdir / "stream", arm.config) if name in scratch.CONTINUED else None
                train_arm(study, name, start, target)
            if not (target / "outcomes.npz").is_file():
                measure_arm(study, name, target)
            save_models(arm, study.schedule.seeds, target)
            facts[name] = read_json(target / "training.json")
            with np.load(target / "outcomes.npz", allow_pickle=False) as file:
                outcomes[name] = dict(file)
            print_line(f"{name}: trained in {facts[name]['seconds']:.0f} s")
        result = {
            "task": study.task.name,
            "trained_at": study.length,
            "chance": study.task.chance,
            "seeds": study.schedule.seeds,
            "facts": facts,
            **summarise(outcomes, study.times, study.length),
        }
        losses = {name: np.load(workdir / name / "losses.npy") for name in study.arms}
        continued = [name for name in outcomes if name in scratch.CONTINUED]
        result["figure"] = str(study_figure(result, outcomes, losses, workdir / "figure.png", continued))
        write_json(workdir / "result.json", result)
        report(result, study)
        return result
    finally:
        folder.close()


def save_models(arm: Arm, seeds: int, target: Path) -> None:
    """Write the trained models of an arm as folders that open, those that are not there yet."""
    missing = [seed for seed in range(seeds) if not (target / "models" / str(seed)).is_dir()]
    params = scratch.load_params(target, arm.config) if missing else {}
    for seed in missing:
        own = jax.tree.map(lambda leaf, seed=seed: leaf[seed], params)
        folder = target / "models" / str(seed)
        Model(arm.config, own, NoTokenizer(str(folder))).save(folder)


def train_arm(study: Study, name: str, start: Params | None, target: Path) -> None:
    """Train one arm; its training.json comes last and says that it is done."""
    arm, began, worked = study.arms[name], time.monotonic(), time.process_time()
    params, losses = scratch.fit(arm, study.task, study.length, study.schedule, start, title=name)
    target.mkdir(parents=True, exist_ok=True)
    scratch.save_params(target, params)
    np.save(target / "losses.npy", losses)
    facts = {
        "forward": arm.settings.forward,
        "depths": list(arm.settings.depths),
        "judged_by": arm.judge,
        "parameters": sum(leaf[0].size for leaf in jax.tree.leaves(params)),
        "final_loss": [loss if math.isfinite(loss) else None for loss in losses[-50:].mean(0).tolist()],
        "seconds": time.monotonic() - began,
        "core_seconds": time.process_time() - worked,
    }
    write_json(target / "training.json", facts)


def measure_arm(study: Study, name: str, target: Path) -> None:
    """Measure one trained arm into outcomes.npz."""
    arm = study.arms[name]
    params = scratch.load_params(target, arm.config)
    found = measure(arm, params, study.task, study.length, study.rows, study.times, study.depths)
    partial = target / "outcomes.partial.npz"
    arrays: Json = dict(found)
    np.savez_compressed(partial, **arrays)
    partial.replace(target / "outcomes.npz")


# --------------------------------------------------------------------------------------------------------- Measuring


def measure(
    arm: Arm, params: Params, task: Task, length: int, rows: int, times: Sequence[int], depths: Sequence[int]
) -> dict[str, np.ndarray]:
    """Return what the test's words come to, by "TIMES/DEPTH", depths above 1 at the first of `times` only.

    share    [seeds, rows]        accuracy over a word's answers
    last     [seeds, rows]        whether its last one is correct
    reread   [seeds, rows]        of an automaton with depths: accuracy, had every symbol stood once an iteration
    overlap  [seeds, L, rows, T]  with depths: cosine similarity of a state after the first and after the last iteration
    """
    found = {}
    for factor in times:
        words = scratch.draw(task, "test", rows, length * factor, (TESTS, factor))
        for depth in depths if arm.config.stream and factor == times[0] else (1,):
            guesses = np.asarray(_guess(arm.config, arm.judge, depth, params, words.symbols))
            right, asked = statetrack.right(words, guesses), words.asked.sum(-1)
            final = words.asked.shape[1] - 1 - words.asked[:, ::-1].argmax(1)
            found[f"share {factor}/{depth}"] = right.sum(-1) / asked
            found[f"last {factor}/{depth}"] = np.take_along_axis(right, final[None, :, None], 2)[..., 0]
            if factor == times[0] and max(depths) > 1 and isinstance(task, Automaton):
                again = statetrack.right(statetrack.reread(task, words, depth), guesses)
                found[f"reread {factor}/{depth}"] = again.sum(-1) / asked
    if arm.config.stream and max(depths) > 1:
        words = scratch.draw(task, "test", min(rows, OVERLAPS), length, (TESTS, 1))
        found["overlap"] = np.asarray(_overlaps(arm.config, max(depths), params, words.symbols))
    return found


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _guess(config: ModelConfig, forward: str, depth: int, params: Params, symbols: jax.Array) -> jax.Array:
    def one(params: Params) -> jax.Array:
        return rules.logits(config, params, symbols, forward=forward, depth=depth).argmax(-1)

    return jax.lax.map(one, params)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _overlaps(config: ModelConfig, depth: int, params: Params, symbols: jax.Array) -> jax.Array:
    def one(params: Params) -> jax.Array:
        memory = rules.states(config, params, symbols, depth=depth)  # [L, B, T, I, D]
        unit = memory / jnp.linalg.norm(memory, axis=-1, keepdims=True)
        return jnp.einsum("lbtd,lbtd->lbt", unit[..., 0, :], unit[..., -1, :])

    return jax.lax.map(one, params)


def change(before: np.ndarray, after: np.ndarray) -> Json:
    """Return what changes from one model's correct words [seeds, rows] to another's.

    The difference in accuracy has a bootstrap interval over words (of the seeds' means) and Student's over seeds; each
    seed has the exact McNemar test.
    """
    difference = after.astype(float) - before.astype(float)
    seeds = []
    for one, other in zip(before, after, strict=True):
        broken, mended = int((one & ~other).sum()), int((other & ~one).sum())
        seeds.append({"broken": broken, "mended": mended, "p": mcnemar(broken, mended)})
    return {
        "difference": float(difference.mean()),
        "over_words": finite(bootstrap_mean(difference.mean(0))),
        "over_seeds": finite(t_mean(difference.mean(1))),
        "seeds": seeds,
    }


def cell(shares: np.ndarray) -> Json:
    """Return the mean of shares [seeds, rows], with an interval over words, and each seed's."""
    return {**finite(bootstrap_mean(shares.mean(0))), "seeds": shares.mean(1).tolist()}


def summarise(outcomes: dict[str, dict[str, np.ndarray]], times: Sequence[int], length: int) -> Json:
    """Return accuracies of every arm, what sets `stream` apart from each, and what more depth does to each."""
    result: Json = {"arms": {}, "reread": {}, "stream_against": {}, "deeper": [], "trained_deeper": []}
    for name, found in outcomes.items():
        shares, reread = (
            {key.split()[1]: value for key, value in found.items() if key.startswith(kind)}
            for kind in ("share", "reread")
        )
        result["arms"][name] = {key: cell(value) for key, value in shares.items()}
        if reread:
            result["reread"][name] = {key: cell(value) for key, value in reread.items()}
        for key in shares:
            factor, depth = key.split("/")
            if depth != "1":
                moved = change(found[f"last {factor}/1"], found[f"last {key}"])
                result["deeper"].append({"arm": name, "length": length * int(factor), "depth": int(depth), **moved})
            if name in scratch.CONTINUED:
                moved = change(outcomes["stream"][f"last {key}"], found[f"last {key}"])
                own = {"arm": name, "length": length * int(factor), "depth": int(depth)}
                result["trained_deeper"].append({**own, **moved})
    if "stream" in outcomes:
        for name in (arm for arm in outcomes if arm != "stream"):
            result["stream_against"][name] = {
                str(length * factor): change(outcomes[name][f"last {factor}/1"], outcomes["stream"][f"last {factor}/1"])
                for factor in times
            }
    tests = [seed for record in result["deeper"] + result["trained_deeper"] for seed in record["seeds"]]
    for seed, adjusted in zip(tests, holm([seed["p"] for seed in tests]), strict=True):
        seed["p_holm"] = adjusted
    return result


def report(result: Json, study: Study) -> None:
    """Print the tables of the summary."""
    lengths = [study.length * factor for factor in study.times]
    print(
        f"\n{study.task.name}, trained at length {study.length}; accuracy on {study.rows} new words a length, "
        f"seeds: {study.schedule.seeds} (mean) [95% over words]; chance {study.task.chance:.2f}"
    )
    print(f"{'arm':10}" + "".join(f"{f'length {length}':>24}" for length in lengths) + "    each seed, longest")
    for name, cells in result["arms"].items():
        row = [_cell(cells[f"{factor}/1"]) for factor in study.times]
        seeds = " ".join(f"{value:.3f}" for value in cells[f"{study.times[-1]}/1"]["seeds"])
        print(f"{name:10}" + "".join(f"{cell:>24}" for cell in row) + f"    {seeds}")
    for title, cells in (("at depth", result["arms"]), ("rereading", result["reread"])):
        if len(study.depths) > 1 and cells:
            print(f"\n{title:10}" + "".join(f"{depth:>24}" for depth in study.depths))
            for name in cells:
                if study.arms[name].config.stream:
                    row = [_cell(cells[name][f"{study.times[0]}/{depth}"]) for depth in study.depths]
                    print(f"{name:10}" + "".join(f"{text:>24}" for text in row))
    for title, key in (("from depth 1 to", "deeper"), ("from stream to", "trained_deeper")):
        for record in result[key]:
            if record["length"] == lengths[0]:
                where = f"depth {record['depth']}" + f" of {record['arm']}"
                counts = ", ".join(f"{seed['broken']} / {seed['mended']}" for seed in record["seeds"])
                worst = max(seed["p_holm"] for seed in record["seeds"])
                print(f"{title} {where}: regressions / fixes (words) {counts}; largest Holm p {worst:.2g}")
    print(f"\nfigure: {result['figure']}")


def _cell(found: Json) -> str:
    return f"{found['value']:.3f} [{found['low']:.3f}, {found['high']:.3f}]"
