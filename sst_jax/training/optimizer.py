"""The optimizer: AdamW on the adapter, AdamW without weight decay on the blend, one clip over both."""

from __future__ import annotations

import dataclasses

import optax

from sst_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """Learning rates rise linearly over warmup_steps and fall along a cosine to final_factor of their peak.

    accumulate: micro-batches to average before an update (optax.MultiSteps over the trainables only).
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
    """The learning rate at each update of a run of `steps` steps."""
    updates = max(steps // config.accumulate, 1)
    warmup = min(config.warmup_steps, updates - 1)
    return optax.warmup_cosine_decay_schedule(
        0.0 if warmup else peak, peak, warmup, updates, peak * config.final_factor
    )


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """For trees {"adapter": ..., "blend": ...}; hand it nothing frozen, or that would count in the clip's norm."""

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
    return optax.MultiSteps(optimizer, config.accumulate) if config.accumulate > 1 else optimizer
