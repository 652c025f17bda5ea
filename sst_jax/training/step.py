"""The train step and the losses of a batch, as functions to be jitted once for each forward."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax

from sst_jax.errors import InputError
from sst_jax.model import rules
from sst_jax.model.config import ModelConfig
from sst_jax.model.decoder import Params, head_table
from sst_jax.model.remat import REMAT
from sst_jax.model.scales import LayerScales
from sst_jax.training.loss import answer_losses
from sst_jax.training.optimizer import AccumulatorState, all_finite
from sst_jax.types import DeviceArrays, Fraction, Hidden, Json, Losses, RandomKey

Tree = TypeVar("Tree")
# tokens, segment_ids, positions int32 [B, T]; answer_mask bool [B, T]
Batch = dict[str, jax.Array] | dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class ForwardSchedule:
    """Which forward trains, and what it draws: the knobs of a recipe's section `stream` that are about training.

    forward     a forward, as `rules.bind` reads it
    passes      passes of k_pass and local
    mix_share   share of the steps, drawn by seed, that run mix_passes passes instead: forwards other than k_pass and
                local become k_pass there
    mix_passes  passes of those steps
    depths      every step runs one of these iteration depths, drawn by seed, at all positions
    """

    forward: str = "two_pass"
    passes: int = 2
    mix_share: float = 0.0
    mix_passes: int = 3
    depths: tuple[int, ...] = (1,)

    def __post_init__(self) -> None:
        if not self.depths or not all(isinstance(depth, int) for depth in self.depths):
            raise InputError(f"stream.depths={self.depths} must be iteration depths, such as (1, 2, 3, 4)")
        for depth in self.depths:
            bound = rules.bind(self.forward, self.passes, depth)
        if not 0.0 <= self.mix_share <= 1.0:
            raise InputError(f"stream.mix_share={self.mix_share} must be in [0, 1]")
        if self.mix_share and not bound.forward.has_state:
            raise InputError("stream.mix_share needs a forward with a stream, not 'plain'")
        rules.bind("k_pass", self.mix_passes)
        # Passes that are spelled out, "k_pass:3", are those of the field.
        if isinstance(bound.options, rules.Passes):
            object.__setattr__(self, "forward", bound.name)
            object.__setattr__(self, "passes", bound.options.passes)


@dataclasses.dataclass(frozen=True)
class ForwardConfig(ForwardSchedule):
    """A schedule, and how its forwards are computed.

    remat      activations kept for the backward pass, see `remat.REMAT`
    dtype      of activations: "float32" or "bfloat16"
    attention  kernel that attends over whole sequences
    """

    remat: str = "layer"
    dtype: str = "float32"
    attention: str = "xla"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.remat not in REMAT:
            raise InputError(f"train.remat={self.remat!r} is not one of {', '.join(map(repr, REMAT))}")

    def at(self, step: int, seed: int) -> ForwardConfig:
        """Return the forward of one step, at one depth; it depends on seed and step alone, so on every resume too."""
        rng = np.random.default_rng((seed, step))
        mixed = rng.random() < self.mix_share
        return self._drawn(int(rng.choice(self.depths)), mixed)

    def draws(self) -> list[tuple[float, ForwardConfig]]:
        """Return everything that `at` may draw, with its probability."""
        drawn = []
        for mixed, share in ((False, 1.0 - self.mix_share), (True, self.mix_share)):
            for depth in dict.fromkeys(self.depths) if share else ():
                drawn.append((share * self.depths.count(depth) / len(self.depths), self._drawn(depth, mixed)))
        return drawn

    def _drawn(self, depth: int, mixed: bool) -> ForwardConfig:
        """Return the forward of one depth, with mix_passes passes where they are mixed in."""
        one = dataclasses.replace(self, mix_share=0.0, depths=(depth,))
        if not mixed:
            return one
        name = self.forward if self.forward in ("k_pass", "local") else "k_pass"
        return dataclasses.replace(one, forward=name, passes=self.mix_passes)

    @property
    def depth(self) -> int:
        """The iteration depth of what `at` has drawn."""
        return self.depths[0]


class TrainState(NamedTuple):
    """What training changes, and what a checkpoint holds."""

    step: jax.Array  # int32 []
    trainable: Params  # {"adapter": ..., "blend": ...}, float32
    optimizer: optax.OptState


def init_state(trainable: Params, optimizer: optax.GradientTransformation) -> TrainState:
    """Return the state before the first step."""
    return TrainState(jnp.zeros((), jnp.int32), trainable, optimizer.init(trainable))


def batch_losses(
    config: ModelConfig,
    settings: ForwardConfig,
    base: Params,
    trainable: Params,
    batch: Batch,
    *,
    alpha_warmup_fraction: Fraction | None = None,
    dropout_key: RandomKey | None = None,
) -> Losses:
    """Return the losses of a batch's answer tokens.

    Args:
        config: of the model.
        settings: the forward, and how it is computed.
        base: frozen parameters.
        trainable: {"adapter": ..., "blend": ...}.
        batch: rows of documents.
        alpha_warmup_fraction: how far alpha has been warmed up, in [0, 1]; None: all the way.
        dropout_key: of LoRA's dropout; None: no dropout.

    Returns:
        Nats, [B, T]; 0 where nothing is learned.
    """
    hidden = rules.hidden(
        *_arguments(config, settings, base, trainable, batch),
        **_forward_settings(settings, batch),
        alpha_warmup_fraction=alpha_warmup_fraction,
        dropout_key=dropout_key,
    )
    return _losses(config, hidden, base, batch)


def heldout_losses(
    config: ModelConfig, settings: ForwardConfig, base: Params, trainable: Params, batch: Batch
) -> tuple[Losses, LayerScales]:
    """Return `batch_losses` without dropout or warmup, and the scale of residual stream and states."""
    hidden, scales = rules.hidden_and_scales(
        *_arguments(config, settings, base, trainable, batch), **_forward_settings(settings, batch)
    )
    return _losses(config, hidden, base, batch), scales


def _arguments(
    config: ModelConfig, settings: ForwardConfig, base: Params, trainable: Params, batch: Batch
) -> tuple[ModelConfig, Params, jax.Array]:
    config = dataclasses.replace(config, dtype=settings.dtype)
    return config, {"base": base, **trainable}, jnp.asarray(batch["tokens"])


def _forward_settings(settings: ForwardConfig, batch: Batch) -> Json:
    return {
        "forward": settings.forward,
        "passes": settings.passes,
        "depth": settings.depth,
        "segment_ids": jnp.asarray(batch["segment_ids"]),
        "positions": jnp.asarray(batch["positions"]),
        "remat": settings.remat,
        "attention": settings.attention,
    }


def _losses(config: ModelConfig, hidden: Hidden, base: Params, batch: Batch) -> Losses:
    tokens, answers = jnp.asarray(batch["tokens"]), jnp.asarray(batch["answer_mask"])
    with jax.named_scope("loss"):
        return answer_losses(hidden, head_table(base), tokens, answers, config.backbone.logit_cap)


def alpha_warmup_fraction_at(config: ModelConfig, state: TrainState) -> Fraction | None:
    """Return how far alpha has been warmed up, in [0, 1], counted in updates; None where the config has no warmup."""
    if config.stream is None or not config.stream.alpha_warmup:
        return None
    updates = state.optimizer.updates if isinstance(state.optimizer, AccumulatorState) else state.step
    return jnp.minimum(updates / config.stream.alpha_warmup, 1.0)


def train_step(
    config: ModelConfig,
    settings: ForwardConfig,
    optimizer: optax.GradientTransformation,
    state: TrainState,
    base: Params,
    batch: Batch,
    key: RandomKey,
) -> tuple[TrainState, DeviceArrays]:
    """Take an optimizer step on the mean loss over the batch's answer tokens.

    Where loss, gradient or update is not finite the step is skipped: nothing changes but the count of steps, and
    metrics["skipped"] is 1. Of a window of micro-batches the finite ones make the update.

    Args:
        config: of the model.
        settings: the forward that trains, at one depth, as `ForwardConfig.at` draws it.
        optimizer: over the trainable parameters alone.
        state: before the step.
        base: frozen parameters.
        batch: rows of documents.
        key: of dropout, which folds the step in.

    Returns:
        The state after the step, and its metrics, scalars: loss (nats), gradient_norm, answer_tokens, skipped.
    """
    alpha_warmup_fraction = alpha_warmup_fraction_at(config, state)
    dropout_key = jax.random.fold_in(key, state.step) if config.adapter.dropout else None
    answer_tokens = batch["answer_mask"].sum()
    count = jnp.maximum(answer_tokens, 1)

    def mean_loss(trainable: Params) -> Fraction:
        losses = batch_losses(
            config,
            settings,
            base,
            trainable,
            batch,
            alpha_warmup_fraction=alpha_warmup_fraction,
            dropout_key=dropout_key,
        )
        return losses.sum() / count

    loss, gradient = jax.value_and_grad(mean_loss)(state.trainable)
    norm = optax.tree.norm(gradient)
    # Not optax.apply_if_finite, which looks at the gradient alone, and lets it in after some failures in a row.
    good = jnp.isfinite(loss) & jnp.isfinite(norm)
    with jax.named_scope("optimizer"):
        if isinstance(state.optimizer, AccumulatorState):
            updates, optimizer_state = optax.with_extra_args_support(optimizer).update(
                gradient, state.optimizer, state.trainable, finite=good, answer_tokens=answer_tokens
            )
            taken = all_finite(updates)
            good &= taken
        else:
            updates, optimizer_state = optimizer.update(gradient, state.optimizer, state.trainable)
            taken = good = good & all_finite(updates)
            optimizer_state = _where(taken, optimizer_state, state.optimizer)
        trainable = _where(taken, optax.apply_updates(state.trainable, updates), state.trainable)
    metrics = {"loss": loss, "gradient_norm": norm, "answer_tokens": count, "skipped": ~good}
    return TrainState(state.step + 1, trainable, optimizer_state), metrics


def _where(condition: jax.Array, new: Tree, old: Tree) -> Tree:
    """Return the one tree or the other."""
    return jax.tree.map(lambda new, old: jnp.where(condition, new, old), new, old)
