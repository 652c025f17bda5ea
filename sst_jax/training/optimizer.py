"""The optimizer: AdamW on the adapter, AdamW without weight decay on the blend, one clip over both."""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from sst_jax.errors import InputError
from sst_jax.types import Params

SCHEDULES = ("cosine", "linear", "constant")


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """Section `optimizer`. Learning rates rise linearly, then follow `schedule`.

    learning_rate        peak rate of the adapter
    blend_learning_rate  peak rate of the blend
    warmup_steps         updates over which the rates rise
    schedule             of the rates after that: "cosine" or "linear", down to `final_factor`, or "constant"
    final_factor         what the rates fall to, as a factor of their peaks
    weight_decay         of the adapter, decoupled (arXiv 1711.05101); the blend has none. An update decays by the rate
                         times this, so it falls with the rate
    decay_schedule       of the weight decay itself, over all updates: "constant", or "cosine" or "linear", to
                         `decay_final`
    decay_final          what the weight decay comes to, as a factor of `weight_decay`; above 1 it rises
    clip                 global norm of the gradient of both, to which a larger one is scaled down
    b1, b2               decay rates of Adam's moments
    accumulate           micro-batches of an update, whose gradient is the mean over the answer tokens of all of them
    """

    learning_rate: float = 2e-4
    blend_learning_rate: float = 2e-2
    warmup_steps: int = 10
    schedule: str = "cosine"
    final_factor: float = 0.1
    weight_decay: float = 0.01
    decay_schedule: str = "constant"
    decay_final: float = 1.0
    clip: float = 1.0
    b1: float = 0.9
    b2: float = 0.99
    accumulate: int = 1

    def __post_init__(self) -> None:
        for field in ("learning_rate", "blend_learning_rate", "clip"):
            if not getattr(self, field) > 0:
                raise InputError(f"optimizer.{field}={getattr(self, field)} must be positive")
        for field in ("b1", "b2"):
            if not 0 <= getattr(self, field) < 1:
                raise InputError(f"optimizer.{field}={getattr(self, field)} must be in [0, 1)")
        if not self.weight_decay >= 0:
            raise InputError(f"optimizer.weight_decay={self.weight_decay} must not be negative")
        for field in ("schedule", "decay_schedule"):
            if getattr(self, field) not in SCHEDULES:
                known = ", ".join(map(repr, SCHEDULES))
                raise InputError(f"optimizer.{field}={getattr(self, field)!r} is not one of {known}")
        if not 0 <= self.decay_final < math.inf:
            raise InputError(f"optimizer.decay_final={self.decay_final} must be a number from 0 on")
        if self.decay_schedule == "constant" and self.decay_final != 1.0:
            raise InputError(
                f"optimizer.decay_final={self.decay_final} has no effect with optimizer.decay_schedule='constant'"
            )
        if not 0 <= self.final_factor <= 1:
            raise InputError(f"optimizer.final_factor={self.final_factor} must be in [0, 1]")
        if self.warmup_steps < 0 or self.accumulate < 1:
            raise InputError("optimizer.warmup_steps must be >= 0 and optimizer.accumulate >= 1")


def schedule(config: OptimizerConfig, peak: float, steps: int) -> optax.Schedule:
    """Return the learning rate at each update of a run of `steps` steps."""
    updates = max(steps // config.accumulate, 1)
    warmup = min(config.warmup_steps, updates - 1)
    if config.schedule == "cosine":
        return optax.warmup_cosine_decay_schedule(
            0.0 if warmup else peak, peak, warmup, updates, peak * config.final_factor
        )
    after = falling(config.schedule, peak, config.final_factor, updates - warmup)
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), after], [warmup]) if warmup else after


def falling(shape: str, start: float, factor: float, updates: int) -> optax.Schedule:
    """Return a schedule from `start` to `start * factor`, after which it stays, by its name in `SCHEDULES`."""
    match shape:
        case "cosine" if factor <= 1:
            return optax.cosine_decay_schedule(start, updates, factor)
        case "cosine":  # rising: the same curve from its end
            down = optax.cosine_decay_schedule(1.0, updates)
            return lambda count: start * (factor - (factor - 1) * down(count))
        case "linear":
            return optax.linear_schedule(start, start * factor, updates)
        case _:
            return optax.constant_schedule(start)


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """Return the optimizer of {"adapter": ..., "blend": ...}; frozen parameters would count in the clip's norm."""

    def adamw(peak: float, weight_decay: float | optax.Schedule) -> optax.GradientTransformation:
        return optax.adamw(schedule(config, peak, steps), config.b1, config.b2, weight_decay=weight_decay)

    decay: float | optax.Schedule = config.weight_decay
    if config.decay_schedule != "constant":  # a number keeps no count, as checkpoints of 0.1.0 have none
        updates = max(steps // config.accumulate, 1)
        decay = falling(config.decay_schedule, config.weight_decay, config.decay_final, updates)
    transforms = {
        "adapter": adamw(config.learning_rate, decay),
        "blend": adamw(config.blend_learning_rate, 0.0),
    }
    optimizer = optax.chain(
        optax.clip_by_global_norm(config.clip),
        optax.partition(transforms, lambda tree: {name: name for name in tree}),
    )
    return optimizer if config.accumulate == 1 else accumulate_by_tokens(optimizer, config.accumulate)


def learning_rates(config: OptimizerConfig, state: optax.OptState, steps: int) -> dict[str, float]:
    """Return the learning rates of the newest update, by metric: updates are counted in the state, skipped ones not."""

    def counts(leaf: object) -> bool:
        return isinstance(leaf, optax.ScaleByScheduleState)

    found = [leaf.count for leaf in jax.tree.leaves(state, is_leaf=counts) if counts(leaf)]
    update = max(int(found[0]) - 1, 0)
    peaks = {"learning_rate": config.learning_rate, "blend_learning_rate": config.blend_learning_rate}
    return {name: float(schedule(config, peak, steps)(update)) for name, peak in peaks.items()}


class AccumulatorState(NamedTuple):
    """What `accumulate_by_tokens` keeps between micro-batches."""

    micro_step: jax.Array  # int32 [], micro-batches of the window so far, skipped ones too
    updates: jax.Array  # int32 [], windows that are over
    answer_tokens: jax.Array  # float32 [], of the micro-batches in `gradient_sum`
    gradient_sum: Params  # over answer tokens
    inner: optax.OptState


def accumulate_by_tokens(inner: optax.GradientTransformation, every: int) -> optax.GradientTransformationExtraArgs:
    """Return an optimizer that updates once in `every` micro-batches, by the mean over all their answer tokens.

    optax.MultiSteps gives each micro-batch the same weight: of rows of unequal length that is another gradient than
    their batch's. Here an update is the same whole or in pieces. A micro-batch that is not finite leaves a hole in its
    window and moves no other; a window of nothing but holes makes no update.

    Args:
        inner: takes the mean gradients.
        every: micro-batches of a window.

    Returns:
        An optimizer whose `update` also takes finite, bool [], whether the micro-batch counts, and answer_tokens, int32
        [], over which its gradient is the mean. Its updates are 0 until the window is over; the state stays finite
        where they are not.
    """

    def init(params: Params) -> AccumulatorState:
        return AccumulatorState(
            jnp.int32(0), jnp.int32(0), jnp.float32(0), optax.tree.zeros_like(params), inner.init(params)
        )

    def update(
        gradient: Params,
        state: AccumulatorState,
        params: Params | None = None,
        *,
        finite: jax.Array,
        answer_tokens: jax.Array,
        **_: object,
    ) -> tuple[Params, AccumulatorState]:
        total = state.answer_tokens + jnp.where(finite, answer_tokens, 0)
        summed = jax.tree.map(
            lambda so_far, new: so_far + jnp.where(finite, new * answer_tokens, 0.0), state.gradient_sum, gradient
        )
        mean = jax.tree.map(lambda tree: tree / jnp.maximum(total, 1), summed)
        updates, after = inner.update(mean, state.inner, params)
        over = state.micro_step == every - 1
        due = over & (total > 0)
        updates = jax.tree.map(lambda new: jnp.where(due, new, 0.0), updates)
        taken = due & all_finite(updates)
        return updates, AccumulatorState(
            (state.micro_step + 1) % every,
            state.updates + over,
            jnp.where(over, 0.0, total),
            jax.tree.map(lambda tree: jnp.where(over, 0.0, tree), summed),
            jax.tree.map(lambda new, old: jnp.where(taken, new, old), after, state.inner),
        )

    return optax.GradientTransformationExtraArgs(init, update)


def all_finite(tree: Params) -> jax.Array:
    """Return whether every number of a tree is finite, bool []."""
    return jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)]).all()


def as_multi_steps(state: AccumulatorState) -> optax.MultiStepsState:
    """Return the state that version 0.1.0 kept in place of this one."""
    return optax.MultiStepsState(state.micro_step, state.updates, state.inner, state.gradient_sum)


def from_multi_steps(saved: optax.MultiStepsState, step: int, every: int) -> AccumulatorState:
    """Return the state of a run at `step` from what version 0.1.0 saved of it.

    Over how many answer tokens its means are was not saved: in the middle of a window they are left out, as skipped
    micro-batches are.
    """
    empty = jax.tree.map(jnp.zeros_like, saved.acc_grads)
    return AccumulatorState(
        jnp.int32(step % every), jnp.int32(saved.gradient_step), jnp.float32(0), empty, saved.inner_opt_state
    )
