"""Fitting the halting probe: can the first position's memory tell what further iterations will do to an answer?

A two-layer perceptron on the `inputs` dimensions of one layer's memory that differ most between the classes, each
behind a gate that an L1 penalty can close. There are far more dimensions than items, so everything that looks at labels
(the choice of dimensions, of the penalty, the fit) is done anew without the item that it is then tried on: nested
leave-one-out. Every number that is reported comes from such scores, beside the same procedure on shuffled labels.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from sst_jax.types import AnyArray, HostArrays

INNER = 4  # folds in which the penalty is chosen
AT_ONCE = 6000  # fits that are trained side by side


class Training(NamedTuple):
    """How the weights are trained, which a program is compiled for: see `Settings`."""

    hidden: int
    decay: float
    steps: int
    rate: float
    seed: int


@dataclasses.dataclass(frozen=True)
class Settings:
    """How a probe is fitted.

    inputs     dimensions of the state that a probe looks at;  hidden  units of its first layer
    strengths  of the L1 penalty on the gates; several: chosen inside each fold
    decay      L2 penalty on the weights;  steps, rate  of Adam over all items at once
    permutations  of the labels, for the null distribution;  seed  of the weights and the permutations
    """

    inputs: int = 16
    hidden: int = 4
    strengths: tuple[float, ...] = (0.3, 1.0)
    decay: float = 0.02
    steps: int = 150
    rate: float = 0.03
    permutations: int = 200
    seed: int = 0

    @property
    def parameters(self) -> int:
        return self.inputs * (1 + self.hidden) + 2 * self.hidden + 1

    @property
    def training(self) -> Training:
        return Training(self.hidden, self.decay, self.steps, self.rate, self.seed)


# ------------------------------------------------------------------------------------------------------------- Fitting


def fit(
    x: np.ndarray, labels: np.ndarray, used: np.ndarray, strengths: np.ndarray, settings: Settings
) -> tuple[HostArrays, np.ndarray]:
    """Fit F probes together, each on its own items and labels.

    x [n, D]; labels, used [F, n], 0 or 1: what is learned, and from which items alone; strengths [F].
    Returns weights as `inference/halting_probe.py` names them, [F, ...], and every item's probability [F, n].

    Both classes weigh the same. A fold that knew how common they are among its own items would rank those that are left
    out by their class, positives last, and so take chance for less than chance; see `with_odds`.
    """
    labels, used = np.asarray(labels, np.float32), np.asarray(used, np.float32)
    sums, squares, total = used @ x, used @ np.square(x), used.sum(-1, keepdims=True)
    mean = sums / total
    scale = np.sqrt(np.maximum(squares / total - np.square(mean), 1e-12))
    positive = (used * labels).sum(-1, keepdims=True)
    difference = (used * labels) @ x / np.maximum(positive, 1) - (used * (1 - labels)) @ x / np.maximum(
        total - positive, 1
    )
    count = min(settings.inputs, x.shape[1])
    chosen = np.sort(np.argpartition(-np.abs(difference) / scale, count - 1, axis=-1)[:, :count], axis=-1)
    mean, scale = (np.take_along_axis(part, chosen, axis=-1) for part in (mean, scale))
    inputs = (x.T[chosen] - mean[:, :, None]) / scale[:, :, None]  # [F, k, n]
    share = 0.5 * used * np.where(labels, 1 / np.maximum(positive, 1), 1 / np.maximum(total - positive, 1))
    trained = train(
        np.float32(inputs),
        labels,
        np.float32(share),
        np.float32(strengths),
        settings.training,
    )
    weights = {"chosen": chosen.astype(np.int32), "mean": mean, "scale": scale}
    weights |= {name: np.asarray(part) for name, part in trained.items() if name != "p"}
    return weights, np.asarray(trained["p"])


@functools.partial(jax.jit, static_argnames=("training",))
def train(
    inputs: AnyArray, labels: AnyArray, share: AnyArray, strengths: AnyArray, training: Training
) -> dict[str, jax.Array]:
    """Train F probes side by side.

    Args:
        inputs: [F, k, n], the standardised values of each probe's dimensions.
        labels: [F, n], 0 or 1.
        share: [F, n], each item's part in the loss.
        strengths: [F], of the L1 penalty.
        training: what all probes have in common.

    Returns:
        Weights [F, ...], and probabilities [F, n] as "p".
    """
    hidden, decay, steps, rate, seed = training
    count, wide, _ = inputs.shape
    first, second = jax.random.split(jax.random.key(seed))
    weights = {  # the same start for all
        "gate": jnp.ones((count, wide)),
        "hidden": jnp.tile(jax.random.normal(first, (1, wide, hidden)) * wide**-0.5, (count, 1, 1)),
        "hidden_bias": jnp.zeros((count, hidden)),
        "out": jnp.tile(jax.random.normal(second, (1, hidden)) * hidden**-0.5, (count, 1)),
        "out_bias": jnp.zeros((count, 1)),
    }

    def logits(weights: dict[str, jax.Array]) -> jax.Array:
        gated = weights["gate"][:, :, None] * weights["hidden"]
        units = jnp.tanh(jnp.einsum("fkn,fkh->fnh", inputs, gated) + weights["hidden_bias"][:, None])
        return jnp.einsum("fnh,fh->fn", units, weights["out"]) + weights["out_bias"]

    def loss(weights: dict[str, jax.Array]) -> jax.Array:
        fits = jnp.sum(share * optax.losses.sigmoid_binary_cross_entropy(logits(weights), labels))
        return fits + decay * sum(jnp.sum(jnp.square(weights[name])) for name in ("hidden", "out"))

    adam = optax.adam(rate)

    def step(carry: tuple, _: None) -> tuple[tuple, None]:
        weights, state = carry
        updates, state = adam.update(jax.grad(loss)(weights), state)
        weights = optax.apply_updates(weights, updates)
        # The proximal step of the L1 penalty: gates that are not worth it are closed, exactly.
        gate = jnp.sign(weights["gate"]) * jnp.maximum(jnp.abs(weights["gate"]) - rate * strengths[:, None], 0.0)
        return (weights | {"gate": gate}, state), None

    (weights, _), _ = jax.lax.scan(step, (weights, adam.init(weights)), None, length=steps)
    return weights | {"p": jax.nn.sigmoid(logits(weights))}


def with_odds(p: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return probabilities [..., n] of fits in which both classes weighed the same, at the odds that labels [..., n]
    have.

    One constant for all items of a label vector, which ranks none of them before another.
    """
    odds = np.exp(log_odds(labels))[..., None]
    return p * odds / (p * odds + 1 - p)


def log_odds(labels: np.ndarray) -> np.ndarray | np.floating:
    return np.log(labels.sum(-1) / (labels.shape[-1] - labels.sum(-1)))


def choose_strengths(x: np.ndarray, labels: np.ndarray, used: np.ndarray, settings: Settings) -> np.ndarray:
    """Return for each of F fits the penalty [F] with the least held-out loss, in INNER folds of its own items."""
    count, items = labels.shape
    grid = len(settings.strengths)
    if grid == 1:
        return np.full(count, settings.strengths[0])
    # Folds within each class, so that none is without one; what is not used does not shift the others' by its label.
    fold = np.zeros((count, items), int)
    for row, label in enumerate(labels):
        for kind in (False, True):
            members = (label == kind) & (used[row] > 0)
            fold[row, members] = np.arange(members.sum()) % INNER
    inside = used[:, None] * (fold[:, None] != np.arange(INNER)[None, :, None])  # [F, INNER, n]
    outside = used[:, None] * (1 - inside)
    flat = np.repeat(labels, INNER * grid, axis=0), np.repeat(inside.reshape(-1, items), grid, axis=0)
    _, p = fit(x, *flat, np.tile(settings.strengths, count * INNER), settings)
    p = np.clip(p.reshape(count, INNER, grid, items), 1e-6, 1 - 1e-6)
    losses = -np.where(labels[:, None, None], np.log(p), np.log(1 - p))
    return np.asarray(settings.strengths)[(losses * outside[:, :, None]).sum((1, 3)).argmin(-1)]


def out_of_fold(x: np.ndarray, labels: np.ndarray, settings: Settings) -> np.ndarray:
    """Return probabilities [P, n] of every item from fits without it, for each of P label vectors [P, n]; x [n, D]."""
    items = len(x)
    left = 1.0 - np.eye(items)
    inner = INNER * len(settings.strengths) if len(settings.strengths) > 1 else 1
    together = max(1, AT_ONCE // (items * inner))
    found = []
    for start in range(0, len(labels), together):
        part = np.asarray(labels[start : start + together], bool)
        # Always as many, so that one program serves all.
        padded = np.concatenate([part, np.repeat(part[:1], min(together, len(labels)) - len(part), axis=0)])
        every, used = np.repeat(padded, items, axis=0), np.tile(left, (len(padded), 1))
        _, p = fit(x, every, used, choose_strengths(x, every, used, settings), settings)
        left_out = np.diagonal(p.reshape(len(padded), items, items), axis1=1, axis2=2)[: len(part)]
        found.append(with_odds(left_out, part))
    return np.concatenate(found)
