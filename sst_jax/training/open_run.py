"""An open run: its folder and its state, and the functions that it has compiled."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import grain
import jax
import optax

from sst_jax.model import compiler, decoder, sharding
from sst_jax.model.decoder import Params
from sst_jax.model.scales import LayerScales
from sst_jax.training.distributed import is_primary
from sst_jax.training.identity import data_record, date_record
from sst_jax.training.inputs import Inputs, heldout_batches
from sst_jax.training.optimizer import make_optimizer
from sst_jax.training.progress import Progress
from sst_jax.training.resume import restore_state
from sst_jax.training.run import RunFolder
from sst_jax.training.step import Batch, ForwardConfig, TrainState, heldout_losses, init_state, train_step
from sst_jax.training.telemetry import CompileClock
from sst_jax.training.watchdog import StallWatchdog, StopSignals, Watch
from sst_jax.types import DeviceArrays, Json, Losses, RandomKey
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
    compiling: CompileClock
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


@contextlib.contextmanager
def open_run(inputs: Inputs, workdir: Path, watch: Watch, allow_changed: bool = False) -> Iterator[Run]:
    """Take the run folder, and make the state of the newest good checkpoint there, or a fresh one.

    Raises: InputError as `RunFolder`.
    """
    recipe, config = inputs.recipe, inputs.config
    base_record = inputs.opened.provenance.base_record()
    data = data_record(inputs.sources, inputs.heldout, inputs.opened.tokenizer, recipe.data.format)
    date = date_record(inputs.opened.tokenizer, recipe.data.format)
    start = inputs.start
    started = {} if start is None else {"started_from": start.record}
    run_config = {"recipe": inputs.record, "model_config": config.to_dict(), "data": data, **date, **started}
    folder = RunFolder(workdir, run_config, base_record, writes=is_primary(), allow_changed=allow_changed)
    if recipe.data.chat_template and (template := inputs.opened.tokenizer.template) is not None:
        folder.keep_template(template.source)
    if start is not None and inputs.opened.tokenizer.is_replaced:
        folder.keep_tokenizer(inputs.opened.tokenizer.files())
    compiling = CompileClock()
    with compiling, contextlib.closing(folder):
        key = jax.random.key(recipe.train.seed)
        fresh = jax.jit(lambda key: {k: v for k, v in decoder.init_params(config, key).items() if k != "base"})(key)
        fresh |= {} if start is None else start.trained
        optimizer = make_optimizer(recipe.optimizer, recipe.train.steps)
        # Placed as a restored state is, or a resumed run would compile its step anew.
        state = sharding.device_put_sharded(init_state(fresh, optimizer))
        iterator = inputs.rows()
        checkpoints, progress = Checkpoints(workdir, recipe.train.keep), Progress()
        if step := checkpoints.latest_good() or 0:
            state, saved = restore_state(checkpoints, step, state, iterator, recipe.optimizer.accumulate)
            progress = Progress.from_json(step, saved)
        folder.start_log(step + 1 if step and progress.pending is None else step, recipe.train.logger_names)
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
            compiling,
            jax.random.fold_in(key, DROPOUT_BRANCH),
        )


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
