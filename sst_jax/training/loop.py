"""Training as a call: `fit` takes a run from its folder as it is to its last step.

    from sst_jax.training import fit
    fit("configs/tiny.py", "runs/tiny")

`check_inputs` (`inputs.py`) finds what is wrong before anything long is computed, `open_run` takes the folder and its
newest good checkpoint, `compile_programs` says what is compiled, the loop in `fit` trains, `after_step` measures, logs
and saves what is due, `finish` writes down what the run came to.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import grain
import jax
import numpy as np
import optax
from ml_collections import ConfigDict

from sst_jax.console.progress import bar, print_line
from sst_jax.errors import InputError, RunInterrupted
from sst_jax.files import writing
from sst_jax.inference.model import Model, count
from sst_jax.model import compiler, decoder, sharding
from sst_jax.model.decoder import Params
from sst_jax.model.scales import LayerScales, scalars
from sst_jax.model.state import alpha_summary
from sst_jax.training.distributed import initialize_distributed, is_primary, quiet_non_primary
from sst_jax.training.identity import data_record, date_record
from sst_jax.training.inputs import Inputs, check_inputs, heldout_batches
from sst_jax.training.optimizer import make_optimizer
from sst_jax.training.progress import Clock, Progress, StepLines
from sst_jax.training.recipe import Recipe, read_recipe, resolve
from sst_jax.training.report import RunResult, write_report, write_samples
from sst_jax.training.resume import restore_state
from sst_jax.training.run import RunFolder
from sst_jax.training.step import (
    Batch,
    ForwardConfig,
    TrainState,
    alpha_warmup_fraction_at,
    heldout_losses,
    init_state,
    train_step,
)
from sst_jax.training.watchdog import StallWatchdog, StopSignals, Watch
from sst_jax.types import DeviceArrays, HostArrays, Json, Losses, RandomKey
from sst_jax.weights.checkpoint import Checkpoints

DROPOUT_BRANCH = 2**31  # folded into the seed's key, which `init_params` splits: a branch that it does not take


@dataclasses.dataclass
class Run:
    """An open run: its folder, and what changes from step to step (`state`, `iterator`, `progress`)."""

    inputs: Inputs
    folder: RunFolder
    optimizer: optax.GradientTransformation
    state: TrainState
    iterator: grain.DatasetIterator
    progress: Progress
    checkpoints: Checkpoints
    stop: StopSignals
    stalls: StallWatchdog
    dropout_key: RandomKey

    @property
    def base(self) -> Params:
        return self.inputs.opened.params["base"]


StepFunction = Callable[[TrainState, Params, Batch, RandomKey], tuple[TrainState, DeviceArrays]]


class Programs(NamedTuple):
    """A run's compiled functions."""

    train_step: Callable[[ForwardConfig], StepFunction]  # one for each forward that is drawn
    heldout_losses: Callable[[Params, Params, Batch], tuple[Losses, LayerScales]]
    heldout_batches: list[Json]


def fit(
    recipe: Recipe | ConfigDict | str | Path,
    workdir: str | Path,
    *,
    watch: Watch | None = None,
    base: str | Path | None = None,
    allow_changed: bool = False,
) -> RunResult:
    """Train a recipe, or resume the run of it that the folder holds, to its last step.

    A run that is interrupted and resumed comes to the same numbers bit for bit. Signals are heeded while it trains, see
    `StopSignals`: it saves, then raises.

    Args:
        recipe: a `Recipe`, the knobs of one, or its file as --config takes it.
        workdir: the run folder: new, empty, or one that holds a run of the same recipe.
        watch: deadlines of a run while it trains; None: the defaults of `Watch`.
        base: where the base of a run that resumes lies now, by its digest the same; None: where the recipe says.
        allow_changed: whether to resume where base or data are not those that the run began with, and record it.

    Returns:
        What the run came to, as DIR/result.json holds it.

    Raises:
        InputError: bad input; nothing has been written.
        RunInterrupted: a signal, a full disk or numbers that stay not finite; the message says how to resume.
    """
    recipe, workdir = as_recipe(recipe), Path(workdir).expanduser()
    initialize_distributed(recipe.mesh)
    with jax.set_mesh(sharding.make_mesh(recipe.mesh)), quiet_non_primary():
        inputs = check_inputs(recipe, workdir, base)
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
                while progress.step < steps:
                    started, batch = time.monotonic(), next(run.iterator)
                    step = programs.train_step(forwards.at(progress.step, seed))
                    run.state, values = step(run.state, run.base, sharding.device_put_sharded(batch), run.dropout_key)
                    metrics = {name: float(value) for name, value in values.items()}
                    tokens = int(np.count_nonzero(batch["segment_ids"]))
                    metrics["tokens_per_second"] = tokens / (time.monotonic() - started)
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
            return finish(run)


def as_recipe(recipe: Recipe | ConfigDict | str | Path) -> Recipe:
    """Return the recipe that this is, or names."""
    if isinstance(recipe, Recipe):
        return recipe
    return resolve(recipe) if isinstance(recipe, ConfigDict) else read_recipe(str(recipe))


@contextlib.contextmanager
def open_run(inputs: Inputs, workdir: Path, watch: Watch, allow_changed: bool = False) -> Iterator[Run]:
    """Take the run folder, and make the state of the newest good checkpoint there, or a fresh one.

    Raises: InputError as `RunFolder`.
    """
    recipe, config = inputs.recipe, inputs.config
    base_record = inputs.opened.provenance.base_record()
    data = data_record(inputs.sources, inputs.heldout, inputs.opened.tokenizer, recipe.data.format)
    date = date_record(inputs.opened.tokenizer, recipe.data.format)
    run_config = {"recipe": inputs.record, "model_config": config.to_dict(), "data": data, **date}
    folder = RunFolder(workdir, run_config, base_record, writes=is_primary(), allow_changed=allow_changed)
    try:
        key = jax.random.key(recipe.train.seed)
        fresh = jax.jit(lambda key: {k: v for k, v in decoder.init_params(config, key).items() if k != "base"})(key)
        optimizer = make_optimizer(recipe.optimizer, recipe.train.steps)
        # Placed as a restored state is, or a resumed run would compile its step anew.
        state = sharding.device_put_sharded(init_state(fresh, optimizer))
        iterator = inputs.rows()
        checkpoints, progress = Checkpoints(workdir, recipe.train.keep), Progress()
        if step := checkpoints.latest_good() or 0:
            state, saved = restore_state(checkpoints, step, state, iterator, recipe.optimizer.accumulate)
            progress = Progress.from_json(step, saved)
        folder.start_log(step + 1 if step and progress.pending is None else step)
        yield Run(
            inputs,
            folder,
            optimizer,
            state,
            iterator,
            progress,
            checkpoints,
            StopSignals(watch.stop_within),
            StallWatchdog(workdir, watch.stall_minutes),
            jax.random.fold_in(key, DROPOUT_BRANCH),
        )
    finally:
        folder.close()


def compile_programs(run: Run) -> Programs:
    """Return the functions of a run, each compiled at its first call: the step and the held-out losses."""
    config, recipe = run.inputs.config, run.inputs.recipe
    shardings = sharding.shardings(jax.sharding.get_mesh(), run.state)
    options = compiler.compiler_options(compiler.platform()) or None

    @functools.cache
    def step(forward: ForwardConfig) -> StepFunction:
        function = functools.partial(train_step, config, forward, run.optimizer)
        return jax.jit(function, donate_argnums=(0,), out_shardings=(shardings, None), compiler_options=options)

    losses = functools.partial(heldout_losses, config, recipe.heldout_forward)
    evaluate = jax.jit(losses, compiler_options=options)
    return Programs(step, evaluate, heldout_batches(run.inputs))


def begin(run: Run, programs: Programs) -> None:
    """Say what trains, and measure the held-out loss before the first step.

    Raises: InputError where that is not finite.
    """
    recipe, config, progress = run.inputs.recipe, run.inputs.config, run.progress
    for seen in run.inputs.split.seen:
        print_line(seen)
    trainable = run.state.trainable
    print_line(
        f"{Path(recipe.model.source).name}: {config.backbone.num_params / 1e6:,.0f}M frozen parameters, training "
        f"{count(trainable['adapter']):,} of LoRA and {count(trainable['blend']):,} of the stream "
        f"({recipe.forward.forward}, {recipe.model.dtype}) on {sum(map(len, run.inputs.sources)):,} examples of "
        f"{run.inputs.split.name}; {len(run.inputs.heldout)} held out"
        + (f"; resuming at step {progress.step}" if progress.step else "")
    )
    if progress.step:
        return
    found = heldout_loss(run, programs)
    assert found is not None  # signals are noted from the first step on
    loss, scales = found
    if not math.isfinite(loss):
        raise InputError(
            f"model.source={recipe.model.source} has a held-out loss that is not finite before any training: its "
            f"weights are damaged, or overflow in model.dtype={recipe.model.dtype}"
        )
    progress.heldout[0] = loss
    run.folder.log(0, {"heldout_loss": loss, **scales})
    print_line(f"step 0: held-out loss {loss:.4f}")


def heldout_loss(run: Run, programs: Programs) -> tuple[float, dict[str, float]] | None:
    """Return the mean loss of held-out answer tokens in nats, and RMS of residual stream and states by layer and
    iteration over the first batch; None where a signal to stop comes first.
    """
    total, tokens = 0.0, 0
    scales: dict[str, float] = {}
    with bar(len(programs.heldout_batches), "held-out loss", "batch") as meter:
        for batch in programs.heldout_batches:
            arrays = sharding.device_put_sharded({name: value for name, value in batch.items() if name != "ids"})
            losses, measured = programs.heldout_losses(run.base, run.state.trainable, arrays)
            total += float(losses.sum())
            scales = scales or scalars(measured)
            tokens += int(batch["answer_mask"].sum())
            meter.update()
            run.stalls.beat()
            if run.stop.now():
                return None
    return total / tokens, scales


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
    last = step == recipe.steps
    due = last or step % recipe.eval_every == 0
    found = heldout_loss(run, programs) if due and not run.stop.now() else None
    if due and found is None:
        progress.pending = metrics  # for the run that resumes: now there is only time to save
    elif found is not None:
        loss, scales = found
        metrics |= scales
        if not math.isfinite(loss):
            raise RunInterrupted(f"step {step}: the held-out loss is not finite; {advice(run)}")
        metrics["heldout_loss"] = progress.heldout[step] = loss
        print_line(
            f"step {step}: loss {metrics['loss']:.4f}, held-out loss {loss:.4f}, "
            f"{metrics['tokens_per_second']:.0f} tokens/s"
        )
    stopping = run.stop.now()
    if progress.pending is None and (step % recipe.log_every == 0 or due):
        warmup = alpha_warmup_fraction_at(run.inputs.config, run.state)
        alphas = alpha_summary(run.inputs.config.stream, run.state.trainable["blend"], warmup)
        run.folder.log(step, metrics | alphas)
    if not saved and (step % recipe.save_every == 0 or last or stopping):
        progress.seconds = clock.seconds()
        run.folder.check_there()
        run.checkpoints.save(step, run.state.trainable, run.state.optimizer, run.iterator, progress.to_json())
    if stopping and not (last and progress.pending is None):
        raise RunInterrupted(f"stopped by {run.stop.requested} and saved at step {step}; the same command resumes")


def finish(run: Run) -> RunResult:
    """Answer a held-out problem, and write down and report what the run came to."""
    inputs, progress, recipe = run.inputs, run.progress, run.inputs.recipe
    model = Model(
        inputs.config, {"base": run.base, **run.state.trainable}, inputs.opened.tokenizer, inputs.opened.provenance
    )
    losses = progress.heldout
    result = RunResult(
        steps=progress.step,
        forward=recipe.forward.forward,
        heldout_forward=recipe.heldout_forward.forward,
        heldout_loss={step: losses[step] for step in sorted(losses)},
        heldout_before=losses[0],
        heldout_after=losses[progress.step],
        skipped=progress.skipped,
        seconds=progress.seconds,
        samples=write_samples(model, inputs.split.heldout[0], recipe.data.format, recipe.train.sample_tokens),
    )
    if is_primary():
        result = write_report(result, run.folder.path, inputs.config)
    return result
