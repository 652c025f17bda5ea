"""What a run measures on its way: held-out loss, task score, answers; and what follows from it."""

from __future__ import annotations

from typing import NamedTuple

from sst_jax.console.progress import bar
from sst_jax.inference.model import Model
from sst_jax.model import sharding
from sst_jax.model.scales import scalars
from sst_jax.training import optimizer, scoring
from sst_jax.training.open_run import Programs, Run
from sst_jax.training.progress import Progress
from sst_jax.training.report import Sample, write_samples
from sst_jax.training.scoring import Score
from sst_jax.training.sections import TrainConfig


class Evaluation(NamedTuple):
    """What an evaluation during training found.

    loss    held-out, in nats
    score   on the task; None where the recipe has none
    scales  RMS of residual stream and states, by metric
    """

    loss: float
    score: Score | None
    scales: dict[str, float]


def evaluate(run: Run, programs: Programs) -> Evaluation | None:
    """Return the held-out loss and the task score; None where a signal to stop comes first."""
    measured = heldout_loss(run, programs)
    if measured is None:
        return None
    found = task_score(run)
    return None if found is None and run.inputs.task is not None else Evaluation(measured[0], found, measured[1])


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


def task_score(run: Run) -> Score | None:
    """Return how many questions are answered right; None where there is no task, or a signal to stop comes first."""
    task, format = run.inputs.task, run.inputs.recipe.data.format
    if task is None:
        return None
    with bar(len(task.items), task.name, "question") as meter:

        def go_on(answered: int) -> bool:
            meter.update(answered)
            run.stalls.beat()
            return not run.stop.now()

        return scoring.score(model_of(run), task, format, go_on)


def sample(run: Run) -> list[Sample]:
    """Return answers to the first held-out question as the run stands."""
    inputs, train = run.inputs, run.inputs.recipe.train
    return write_samples(
        model_of(run), inputs.split.heldout[0], inputs.recipe.data.format, train.sample_tokens, run.progress.step
    )


def model_of(run: Run) -> Model:
    """Return the model as the run stands; its parameters are gone with the next step."""
    opened = run.inputs.opened
    return Model(run.inputs.config, {"base": run.base, **run.state.trainable}, opened.tokenizer, opened.provenance)


def learning_rates(run: Run) -> dict[str, float]:
    """Return the learning rates of the update that a run has made last, by metric."""
    recipe = run.inputs.recipe
    return optimizer.learning_rates(recipe.optimizer, run.state.optimizer, recipe.train.steps)


def best_step(progress: Progress, train: TrainConfig) -> int | None:
    """Return the step of the best evaluation, of equal ones the first; None before the first one of a trained model."""
    steps = [step for step in sorted(progress.heldout) if step]
    if train.keep_best == "task":
        return max(steps, key=lambda step: progress.scores[step][0], default=None)
    return min(steps, key=lambda step: progress.heldout[step], default=None)


def stops_early(progress: Progress, train: TrainConfig) -> bool:
    """Return whether train.patience evaluations have come, one after another, without a better one."""
    best = best_step(progress, train)
    return bool(train.patience) and best is not None and sum(step > best for step in progress.heldout) >= train.patience
