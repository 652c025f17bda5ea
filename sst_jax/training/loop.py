"""Training as a call: `fit` takes a run from its folder as it is to its last step.

    from sst_jax.training import fit
    fit("configs/tiny.py", "runs/tiny")

`check_inputs` (`inputs.py`) finds what is wrong before anything long is computed, `open_run` (`open_run.py`) takes the
folder and its newest good checkpoint, `compile_programs` says what is compiled, the loop in `fit` trains, `after_step`
measures (`evaluating.py`), logs and saves what is due, `finish` writes down what the run came to.
"""

from __future__ import annotations

import dataclasses
import math
import time
from pathlib import Path

import jax
import numpy as np
from ml_collections import ConfigDict

from sst_jax.console.progress import bar, print_line
from sst_jax.errors import InputError, RunInterrupted
from sst_jax.files import writing
from sst_jax.inference.model import count
from sst_jax.model import sharding
from sst_jax.model.state import alpha_summary
from sst_jax.training.distributed import initialize_distributed, is_primary, quiet_non_primary
from sst_jax.training.evaluating import (
    Evaluation,
    best_step,
    evaluate,
    learning_rates,
    model_of,
    sample,
    stops_early,
)
from sst_jax.training.inputs import check_inputs
from sst_jax.training.open_run import Programs, Run, compile_programs, open_run
from sst_jax.training.progress import Clock, Progress, StepLines, in_millions
from sst_jax.training.recipe import Recipe, read_recipe, resolve
from sst_jax.training.report import RunResult, write_report, write_samples
from sst_jax.training.scoring import Score
from sst_jax.training.step import alpha_warmup_fraction_at
from sst_jax.training.telemetry import peak_memory
from sst_jax.training.watchdog import Watch
from sst_jax.types import HostArrays, Json
from sst_jax.weights.checkpoint import restore_trainable


def fit(
    recipe: Recipe | ConfigDict | str | Path,
    workdir: str | Path,
    *,
    watch: Watch | None = None,
    base: str | Path | None = None,
    allow_changed: bool = False,
    brief: bool = False,
) -> RunResult:
    """Train a recipe, or resume the run of it that the folder holds, to its last step.

    A run that is interrupted and resumed comes to the same numbers bit for bit. Signals are heeded while it trains, see
    `StopSignals`: it saves, then raises.

    Args:
        recipe: a `Recipe`, the knobs of one, or its file as --config takes it.
        workdir: the run folder: new, empty, or one that holds a run of the same recipe.
        watch: deadlines of a run while it trains; None: the defaults of `Watch`.
        base: where the base of a run that resumes lies now, by its digest the same; None: where the recipe says.
        allow_changed: whether to resume with another base, data or length than the run began with, and record it.
        brief: whether the summary leaves out the answers and what to do next: for one of several runs.

    Returns:
        What the run came to, as DIR/result.json holds it.

    Raises:
        InputError: bad input; nothing has been written.
        RunInterrupted: a signal, a full disk or numbers that stay not finite; the message says how to resume.
    """
    recipe, workdir = as_recipe(recipe), Path(workdir).expanduser()
    initialize_distributed(recipe.mesh)
    with jax.set_mesh(sharding.make_mesh(recipe.mesh)), quiet_non_primary():
        inputs = check_inputs(recipe, workdir, base, allow_changed)
        full = writing(workdir, "make room, then the same command resumes")
        with full, open_run(inputs, workdir, watch or Watch(), allow_changed) as run:
            programs, progress = compile_programs(run), run.progress
            begin(run, programs)
            forwards, steps, seed = inputs.recipe.forward, recipe.train.steps, recipe.train.seed
            clock, lines = Clock(progress.seconds), StepLines(steps, progress.step)
            with run.stop, run.stalls.watching(), bar(steps, "training", "step", initial=progress.step) as meter:
                if progress.pending is not None:
                    pending, progress.pending = progress.pending, None
                    after_step(run, programs, pending, clock, saved=True)
                while progress.step < steps and not stops_early(progress, recipe.train):
                    started, batch = time.monotonic(), next(run.iterator)
                    step = programs.train_step(forwards.at(progress.step, seed))
                    run.state, values = step(run.state, run.base, sharding.device_put_sharded(batch), run.dropout_key)
                    metrics = {name: float(value) for name, value in values.items()}
                    metrics["step_seconds"] = time.monotonic() - started
                    metrics["tokens_per_second"] = np.count_nonzero(batch["segment_ids"]) / metrics["step_seconds"]
                    progress.step += 1
                    run.stalls.beat()
                    meter.update()
                    lines.tell(progress.step, metrics["loss"], metrics["tokens_per_second"])
                    meter.set_postfix(loss=f"{metrics['loss']:.3f}", tok_s=f"{metrics['tokens_per_second']:.0f}")
                    if metrics["skipped"]:
                        note_skip(run, batch)
                    else:
                        progress.consecutive_skips = 0
                    after_step(run, programs, metrics, clock)
            return finish(run, brief)


def as_recipe(recipe: Recipe | ConfigDict | str | Path) -> Recipe:
    """Return the recipe that this is, or names."""
    if isinstance(recipe, Recipe):
        return recipe
    return resolve(recipe) if isinstance(recipe, ConfigDict) else read_recipe(str(recipe))


def begin(run: Run, programs: Programs) -> None:
    """Say what trains, and measure the held-out loss before the first step.

    Raises: InputError where that is not finite.
    """
    recipe, config, progress = run.inputs.recipe, run.inputs.config, run.progress
    for seen in run.inputs.split.seen:
        print_line(seen)
    trainable = run.state.trainable
    print_line(
        f"{Path(recipe.model.source).name}: {in_millions(config.backbone.num_params)} frozen parameters, training "
        f"{count(trainable['adapter']):,} of LoRA and {count(trainable['blend']):,} of the stream "
        f"({recipe.forward.forward}, {recipe.model.dtype}) on {sum(map(len, run.inputs.sources)):,} examples of "
        f"{run.inputs.split.name}; {len(run.inputs.heldout)} held out"
        + (f"; resuming at step {progress.step}" if progress.step else "")
    )
    if reach := config.backbone.reach_text:
        print_line(reach)
    if progress.step:
        best = best_step(progress, recipe.train) if recipe.train.keep_best else None
        run.checkpoints.best = best
        if best is not None:  # a kill may have come between the checkpoint and its record
            run.folder.write_best(best_record(progress, best))
        return
    found = evaluate(run, programs)
    assert found is not None  # signals are noted from the first step on
    if not math.isfinite(found.loss):
        raise InputError(
            f"model.source={recipe.model.source} has a held-out loss that is not finite before any training: its "
            f"weights are damaged, or overflow in model.dtype={recipe.model.dtype}"
        )
    run.folder.log(0, note(run, found))
    print_line(f"step 0: {told(found)}")
    if recipe.train.sample_every:
        run.folder.log_samples(0, [dataclasses.asdict(answer) for answer in sample(run)])


def note(run: Run, found: Evaluation) -> dict[str, float]:
    """Keep what an evaluation found; return it as metrics."""
    progress = run.progress
    progress.heldout[progress.step] = found.loss
    metrics = {"heldout_loss": found.loss, **found.scales}
    if found.score is not None:
        progress.scores[progress.step] = found.score
        metrics["task_accuracy"] = found.score.accuracy
    return metrics


def told(found: Evaluation) -> str:
    """Return an evaluation in words."""
    return f"held-out loss {found.loss:.4f}" + (f", accuracy {found.score}" if found.score is not None else "")


def note_skip(run: Run, batch: HostArrays) -> None:
    """Count a skipped step and keep its batch.

    Raises: RunInterrupted where it is the last one that is tolerated.
    """
    progress, most = run.progress, run.inputs.recipe.train.max_skipped
    progress.skipped += 1
    progress.consecutive_skips += 1
    kept = run.folder.keep_batch(progress.step, batch, most)
    what = f"step {progress.step}: loss, gradient or update is not finite; its batch is kept in {kept}"
    if progress.consecutive_skips == most:
        raise RunInterrupted(f"{what}. So were {most} in a row; {advice(run)}")
    print_line(f"{what}, and the step is skipped")


def advice(run: Run) -> str:
    """Return where a run that diverged stands, and what may help."""
    return (
        f"the newest good checkpoint is {run.checkpoints.latest_good() or 'the beginning'}. The same command would "
        "come here again: lower optimizer.learning_rate, or look at the data, in another --workdir"
    )


def after_step(run: Run, programs: Programs, metrics: dict[str, float], clock: Clock, *, saved: bool = False) -> None:
    """Do what is due after a step: held-out loss, log, checkpoint.

    Args:
        metrics: of the step, to be logged.
        clock: of the run.
        saved: the step's checkpoint is there, and stays as it is: to write it again would put the newest good one at
            risk.

    Raises: RunInterrupted where the held-out loss is not finite, the disk is full, or a signal has come.
    """
    recipe, progress = run.inputs.recipe.train, run.progress
    step = progress.step
    due = step == recipe.steps or step % recipe.eval_every == 0
    found = evaluate(run, programs) if due and not run.stop.now() else None
    if due and found is None:
        progress.pending = metrics  # for the run that resumes: now there is only time to save
    elif found is not None:
        if not math.isfinite(found.loss):
            raise RunInterrupted(f"step {step}: the held-out loss is not finite; {advice(run)}")
        metrics |= note(run, found)
        print_line(f"step {step}: loss {metrics['loss']:.4f}, {told(found)}, {cost(run, metrics)}")
    last = step == recipe.steps or stops_early(progress, recipe)
    stopping = run.stop.now()
    if progress.pending is None and (step % recipe.log_every == 0 or due):
        warmup = alpha_warmup_fraction_at(run.inputs.config, run.state)
        alphas = alpha_summary(run.inputs.config.stream, run.state.trainable["blend"], warmup)
        compiled = {"compile_seconds": run.compiling.take()}
        run.folder.log(step, metrics | learning_rates(run) | alphas | compiled | peak_memory())
    if progress.pending is None and recipe.sample_every and (step % recipe.sample_every == 0 or last):
        run.folder.log_samples(step, [dataclasses.asdict(answer) for answer in sample(run)])
    best = best_step(progress, recipe) if recipe.keep_best else None
    run.checkpoints.best = best
    if not saved and (step % recipe.save_every == 0 or last or stopping or step == best):
        progress.seconds = clock.seconds()
        run.folder.check_there()
        run.checkpoints.save(step, run.state.trainable, run.state.optimizer, run.iterator, progress.to_json())
    if best is not None and (step == best or last):
        run.folder.write_best(best_record(progress, best))
    if stopping and not (last and progress.pending is None):
        raise RunInterrupted(f"stopped by {run.stop.requested} and saved at step {step}; the same command resumes")


def best_record(progress: Progress, step: int) -> Json:
    """Return what best.json says of a step."""
    score = {"task_accuracy": Score(*progress.scores[step]).accuracy} if step in progress.scores else {}
    return {"step": step, "heldout_loss": progress.heldout[step], **score}


def cost(run: Run, metrics: dict[str, float]) -> str:
    """Return in words what a run costs: its speed, its memory, what has been compiled."""
    memory = peak_memory()
    peak = memory.get("peak_device_memory_gib", memory["peak_host_memory_gib"])
    return f"{metrics['tokens_per_second']:.0f} tokens/s, {peak:.1f} GiB, {run.compiling.total:.0f} s of compiling"


def finish(run: Run, brief: bool = False) -> RunResult:
    """Answer a held-out problem, and write down and report what the run came to."""
    inputs, progress, recipe = run.inputs, run.progress, run.inputs.recipe
    losses, best = progress.heldout, best_step(progress, recipe.train)
    chosen = best if recipe.train.keep_best and best is not None else progress.step
    if chosen != progress.step:
        trainable = restore_trainable(run.folder.path, chosen, run.state.trainable)
        run.state = run.state._replace(trainable=sharding.device_put_sharded(trainable))
    answers = write_samples(
        model_of(run), inputs.split.heldout[0], recipe.data.format, recipe.train.sample_tokens, chosen
    )
    scores = {step: Score(*progress.scores[step]) for step in sorted(progress.scores)}
    result = RunResult(
        steps=progress.step,
        forward=recipe.forward.forward,
        heldout_forward=recipe.heldout_forward.forward,
        heldout_loss={step: losses[step] for step in sorted(losses)},
        heldout_before=losses[0],
        heldout_after=losses[progress.step],
        skipped=progress.skipped,
        seconds=progress.seconds,
        samples=answers,
        scores=scores,
        kept=chosen,
        stopped_early=progress.step < recipe.train.steps,
    )
    if is_primary():
        title = f"{Path(recipe.model.source).name}, {recipe.forward.forward}, {inputs.split.name}"
        result = write_report(result, run.folder, title, with_stream=inputs.config.stream is not None, brief=brief)
    return result
