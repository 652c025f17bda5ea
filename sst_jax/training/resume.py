"""What a run resumes from: the state of a checkpoint, of this version or of an earlier one."""

from __future__ import annotations

from typing import cast

import grain
import jax.numpy as jnp
import optax

from sst_jax.console.progress import print_line
from sst_jax.model import sharding
from sst_jax.training.optimizer import AccumulatorState, as_multi_steps, from_multi_steps
from sst_jax.training.step import TrainState
from sst_jax.types import Json
from sst_jax.weights.checkpoint import Checkpoints


def restore_state(
    checkpoints: Checkpoints, step: int, fresh: TrainState, iterator: grain.DatasetIterator, accumulate: int
) -> tuple[TrainState, Json]:
    """Return (the state of a checkpoint, what it says beside its arrays), and set the iterator to its place.

    Args:
        checkpoints: of the run.
        step: a good one.
        fresh: a state of the run's shapes, placed as the restored one is to be.
        iterator: over the run's batches.
        accumulate: micro-batches of an update.
    """
    optimizer = fresh.optimizer
    if not isinstance(optimizer, AccumulatorState) or "acc_grads" not in checkpoints.optimizer_fields(step):
        trainable, state, saved = checkpoints.restore(step, fresh.trainable, optimizer, iterator)
    else:
        trainable, former, saved = checkpoints.restore(step, fresh.trainable, as_multi_steps(optimizer), iterator)
        state = from_multi_steps(cast(optax.MultiStepsState, former), step, accumulate)
        if step % accumulate:
            print_line(
                f"step {step} was saved by an earlier version, {step % accumulate} micro-batches into an update and "
                "without the answer tokens that weigh them: this update is made of the others"
            )
    return sharding.device_put_sharded(TrainState(jnp.int32(step), trainable, state)), saved
