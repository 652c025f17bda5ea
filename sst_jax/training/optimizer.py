"""The optimizer: AdamW on the adapter, AdamW without weight decay on the blend, one clip over both."""

from __future__ import annotations

import dataclasses

import optax

from sst_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """Section `optimizer`. Learning rates rise linearly, then fall along a cosine.

    learning_rate        peak rate of the adapter
    blend_learning_rate  peak rate of the blend
    warmup_steps         updates over which the rates rise
    final_factor         what the rates fall to, as a factor of their peaks
    weight_decay         of the adapter, decoupled (arXiv 1711.05101); the blend has none
    clip                 global norm of the gradient of both, to which a larger one is scaled down
    b1, b2               decay rates of Adam's moments
    accumulate           micro-batches averaged before an update (optax.MultiSteps)
    """

    learning_rate: float = 2e-4
    blend_learning_rate: float = 2e-2
    warmup_steps: int = 10
    final_factor: float = 0.1
    weight_decay: float = 0.01
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
        if not 0 <= self.final_factor <= 1:
            raise InputError(f"optimizer.final_factor={self.final_factor} must be in [0, 1]")
        if self.warmup_steps < 0 or self.accumulate < 1:
            raise InputError("optimizer.warmup_steps must be >= 0 and optimizer.accumulate >= 1")


def schedule(config: OptimizerConfig, peak: float, steps: int) -> optax.Schedule:
    """Return the learning rate at each update of a run of `steps` steps."""
    updates = max(steps // config.accumulate, 1)
    warmup = min(config.warmup_steps, updates - 1)
    return optax.warmup_cosine_decay_schedule(
        0.0 if warmup else peak, peak, warmup, updates, peak * config.final_factor
    )


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """Return the optimizer of {"adapter": ..., "blend": ...}; frozen parameters would count in the clip's norm."""

    def adamw(peak: float, weight_decay: float) -> optax.GradientTransformation:
        return optax.adamw(schedule(config, peak, steps), config.b1, config.b2, weight_decay=weight_decay)

    transforms = {
        "adapter": adamw(config.learning_rate, config.weight_decay),
        "blend": adamw(config.blend_learning_rate, 0.0),
    }
    optimizer = optax.chain(
        optax.clip_by_global_norm(config.clip),
        optax.partition(transforms, lambda tree: {name: name for name in tree}),
    )
    if config.accumulate == 1:
        return optimizer
    return optax.MultiSteps(optimizer, config.accumulate).gradient_transformation()
