"""One train step and one evaluation step, as functions to be jitted once."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from sst_jax.errors import InputError
from sst_jax.model import forward
from sst_jax.model.config import ModelConfig
from sst_jax.model.decoder import Params, head_table
from sst_jax.training.loss import answer_losses

Batch = dict[str, jax.Array]  # tokens, segment_ids, positions int32 [B, T]; answer_mask bool [B, T]


@dataclasses.dataclass(frozen=True)
class ForwardConfig:
    """Which forward trains: its name, and `passes` for k_pass and local.

    mix_share of the steps, drawn by seed, run mix_passes passes instead: two_pass becomes k_pass for that step.
    """

    forward: str = "two_pass"
    passes: int = 2
    remat: bool = True
    dtype: str = "float32"
    mix_share: float = 0.0
    mix_passes: int = 3
    attention: str = "xla"

    def __post_init__(self) -> None:
        forward.check(self.forward, self.passes, depth=1)
        if not 0.0 <= self.mix_share <= 1.0:
            raise InputError(f"stream.mix_share={self.mix_share} must be in [0, 1]")
        if self.mix_share and self.forward not in ("two_pass", "k_pass", "local"):
            raise InputError(f"stream.mix_share needs a forward with passes, not {self.forward!r}")
        forward.check("k_pass", self.mix_passes, depth=1)

    def at(self, step: int, seed: int) -> ForwardConfig:
        """What runs at one step; the same on every resume, as it depends on seed and step alone."""
        plain = dataclasses.replace(self, mix_share=0.0)
        if np.random.default_rng((seed, step)).random() >= self.mix_share:
            return plain
        name = "k_pass" if self.forward == "two_pass" else self.forward
        return dataclasses.replace(plain, forward=name, passes=self.mix_passes)


class TrainState(NamedTuple):
    """What training changes, and what a checkpoint holds."""

    step: jax.Array  # int32 []
    trainable: Params  # {"adapter": ..., "blend": ...}, float32
    optimizer: Any


def init_state(trainable: Params, optimizer: optax.GradientTransformation) -> TrainState:
    return TrainState(jnp.zeros((), jnp.int32), trainable, optimizer.init(trainable))


def batch_losses(
    config: ModelConfig, settings: ForwardConfig, base: Params, trainable: Params, batch: Batch, *,
    bos_id: int | None, warmth: jax.Array | None = None, dropout_key: jax.Array | None = None,
) -> jax.Array:  # fmt: skip
    """Losses in nats, [B, T], of the batch's answer tokens; 0 elsewhere."""
    hidden = forward.hidden(
        config, {"base": base, **trainable}, batch["tokens"], forward=settings.forward, passes=settings.passes,
        segment_ids=batch["segment_ids"], positions=batch["positions"], bos_id=bos_id, warmth=warmth,
        dropout_key=dropout_key, dtype=settings.dtype, remat=settings.remat,
        attention=settings.attention,
    )  # fmt: skip
    return answer_losses(hidden, head_table(base), batch["tokens"], batch["answer_mask"])


def train_step(
    config: ModelConfig, settings: ForwardConfig, optimizer: optax.GradientTransformation, bos_id: int | None,
    state: TrainState, base: Params, batch: Batch, key: jax.Array,
) -> tuple[TrainState, dict[str, jax.Array]]:  # fmt: skip
    """One optimizer step on the mean loss over the batch's answer tokens. Only `state` changes; `base` is frozen."""
    stream, warmth = config.stream, None
    if stream is not None and stream.alpha_warmup:
        warmth = jnp.minimum(state.step / stream.alpha_warmup, 1.0)
    dropout_key = jax.random.fold_in(key, state.step) if config.adapter.dropout else None
    count = jnp.maximum(batch["answer_mask"].sum(), 1)

    def mean_loss(trainable: Params) -> jax.Array:
        losses = batch_losses(
            config, settings, base, trainable, batch, bos_id=bos_id, warmth=warmth, dropout_key=dropout_key
        )
        return losses.sum() / count

    loss, gradient = jax.value_and_grad(mean_loss)(state.trainable)
    updates, optimizer_state = optimizer.update(gradient, state.optimizer, state.trainable)
    trainable = optax.apply_updates(state.trainable, updates)
    metrics = {"loss": loss, "gradient_norm": optax.tree.norm(gradient), "answer_tokens": count}
    return TrainState(state.step + 1, trainable, optimizer_state), metrics
