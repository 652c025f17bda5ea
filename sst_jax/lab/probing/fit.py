"""Fitting the halting probe: can the first position's memory tell what further iterations will do to an answer?

A two-layer perceptron on the `inputs` dimensions of one layer's memory that differ most between the classes, each
behind a gate that an L1 penalty can close. There are far more dimensions than items, so everything that looks at labels
(the choice of dimensions, of the penalty, the fit) is done anew without the item that it is then tried on: nested
leave-one-out. Every number that is reported comes from such scores, beside the same procedure on shuffled labels.

What is asked, and what routing does with the answer (a and b: the smaller and the larger depth):

    label     of which items                 positive             not positive, positive
    breaks    right at a                     wrong at b           b, a
    mends     wrong at a                     right at b           a, b
    differs   right at one of the two only   right at b           a, b
    changes   all                            another text at b    a, b
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from safetensors.numpy import save_file
from scipy import stats

from sst_jax.errors import InputError
from sst_jax.inference.halting_probe import FORMAT, fingerprint, probabilities
from sst_jax.inference.model import Model
from sst_jax.inference.policies import Policy
from sst_jax.inference.session import Request, generate_tokens, prompt_mode
from sst_jax.lab.statistics import bootstrap_mean, finite, wilson

FEWEST, FEWEST_OF_A_CLASS = 12, 3
INNER = 4  # folds in which the penalty is chosen
AT_ONCE = 6000  # fits that are trained side by side


class Item(NamedTuple):
    """One item's outcomes at the two depths; `prompt` as tokens."""

    id: str
    prompt: list[int]
    right: tuple[bool, bool]
    output: tuple[str, str]


LABELS: dict[str, tuple[Callable[[Item], bool], Callable[[Item], bool], tuple[int, int]]] = {
    "breaks": (lambda item: item.right[0], lambda item: not item.right[1], (1, 0)),
    "mends": (lambda item: not item.right[0], lambda item: item.right[1], (0, 1)),
    "differs": (lambda item: item.right[0] != item.right[1], lambda item: item.right[1], (0, 1)),
    "changes": (lambda item: True, lambda item: item.output[0] != item.output[1], (0, 1)),
}


@dataclasses.dataclass(frozen=True)
class Settings:
    """inputs     dimensions of the state that a probe looks at;  hidden  units of its first layer
    strengths  of the L1 penalty on the gates; several: chosen inside each fold
    decay      L2 penalty on the weights;  steps, rate  of Adam over all items at once
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


# ------------------------------------------------------------------------------------------------------------- Fitting


def fit(
    x: np.ndarray, labels: np.ndarray, used: np.ndarray, strengths: np.ndarray, settings: Settings
) -> tuple[dict[str, np.ndarray], np.ndarray]:
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
        hidden=settings.hidden,
        decay=settings.decay,
        steps=settings.steps,
        rate=settings.rate,
        seed=settings.seed,
    )
    weights = {"chosen": chosen.astype(np.int32), "mean": mean, "scale": scale}
    weights |= {name: np.asarray(part) for name, part in trained.items() if name != "p"}
    return weights, np.asarray(trained["p"])


@functools.partial(jax.jit, static_argnames=("hidden", "decay", "steps", "rate", "seed"))
def train(
    inputs: jax.Array,
    labels: jax.Array,
    share: jax.Array,
    strengths: jax.Array,
    *,
    hidden: int,
    decay: float,
    steps: int,
    rate: float,
    seed: int,
) -> dict[str, jax.Array]:
    """Return weights [F, ...] and probabilities "p" [F, n]; share [F, n] is each item's part in the loss."""
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


def log_odds(labels: np.ndarray) -> np.ndarray:
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


# ------------------------------------------------------------------------------------------------------------- Judging


def auc(scores: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return the area under the ROC curve (AUROC) along the last axis, [...] from [..., n]."""
    ranks, positive = stats.rankdata(scores, axis=-1), labels.sum(-1)
    pairs = positive * (labels.shape[-1] - positive)
    return (np.sum(ranks * labels, axis=-1) - positive * (positive + 1) / 2) / pairs


def roc(scores: np.ndarray, labels: np.ndarray) -> list[list[float]]:
    """Return points (false positives, true positives) as shares, from the highest threshold to the lowest."""
    points = [[0.0, 0.0]]
    for cut in np.unique(scores)[::-1]:
        above = scores >= cut
        points.append([float(above[~labels].mean()), float(above[labels].mean())])
    return points


def shuffles(labels: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Return [count, n]: the labels in random orders."""
    rng = np.random.default_rng(seed)
    return np.array([rng.permutation(labels) for _ in range(count)]).reshape(count, len(labels))


def exceeded(null: np.ndarray, value: float) -> float:
    """Return the p-value of a permutation test."""
    return float((1 + np.sum(null >= value)) / (1 + len(null)))


def middle(null: np.ndarray) -> list[float]:
    """Return the ends of the central 95% of shuffles.

    Values well below 1/2 are usual: leaving an item out pulls its class's mean away.
    """
    return np.quantile(null, [0.025, 0.975]).tolist()


def judge(x: np.ndarray, labels: np.ndarray, settings: Settings) -> tuple[dict[str, Any], np.ndarray]:
    """Return the scores of the nested procedure on x [n, D] and labels bool [n], and the out-of-fold p [n].

    auc with its permutation p; accuracy with a binomial test against always saying the larger class; capacity: what
    the same probe reaches on the very items it was fitted to, and there on shuffled labels, which it can only memorise.

    Raises: InputError where a state is not a number.
    """
    if not np.isfinite(x).all():
        raise InputError(f"the first state of item number {int(np.argwhere(~np.isfinite(x))[0, 0])} is not a number")
    null = shuffles(labels, settings.permutations, settings.seed + 1)
    every = out_of_fold(x, np.concatenate([labels[None], null]), settings)
    areas = auc(every, np.concatenate([labels[None], null]))
    right = (every[0] > 0.5) == labels
    majority = max(labels.mean(), 1 - labels.mean())
    each_class = [float(right[labels == kind].mean()) for kind in (True, False)]
    fitted = np.concatenate([labels[None], null[:20]])
    strengths = choose_strengths(x, fitted, np.ones(fitted.shape), settings)
    _, memorised = fit(x, fitted, np.ones(fitted.shape), strengths, settings)
    inside = ((memorised > 0.5) == fitted).mean(-1)
    return {
        "items": len(labels),
        "positive": int(labels.sum()),
        "auc": {"value": float(areas[0]), "p_permutation": exceeded(areas[1:], areas[0]), "null": middle(areas[1:])},
        "accuracy": wilson(int(right.sum()), len(labels))._asdict(),
        "right": int(right.sum()),
        "balanced_accuracy": float(np.mean(each_class)),
        "majority": float(majority),
        "p_binomial": float(stats.binomtest(int(right.sum()), len(labels), majority, "greater").pvalue),
        "capacity": {"parameters": settings.parameters, "items": len(labels), "fitted_accuracy": float(inside[0]),
                     "fitted_accuracy_shuffled": float(inside[1:].mean())},
        "permutations": settings.permutations,
        "roc": roc(every[0], labels),
    }, every[0]  # fmt: skip


def asked_about(items: Sequence[Item], label: str) -> tuple[np.ndarray, np.ndarray]:
    """Return which items a label applies to, bool [items], and their labels.

    Raises: InputError on too few of them, or too few of a class.
    """
    wanted, positive, _ = LABELS[label]
    asked = np.array([wanted(item) for item in items], bool)
    labels = np.array([positive(item) for item in items], bool)[asked]
    smaller = int(min(labels.sum(), len(labels) - labels.sum()))
    if len(labels) < FEWEST or smaller < FEWEST_OF_A_CLASS:
        raise InputError(
            f"--label {label}: of {len(items)} items {len(labels)} are in question and {int(labels.sum())} of these "
            f"are positive; a probe needs {FEWEST}, and {FEWEST_OF_A_CLASS} of either class: evaluate more items, or "
            "ask for another label"
        )
    return asked, labels


def sweep(states: np.ndarray, labels: np.ndarray, settings: Settings) -> list[dict[str, Any]]:
    """Score every layer of states [n, L, D] by itself: nested AUROC, and its p against the best layer of each shuffle.

    Looking at all layers and keeping the best is what the largest of them under shuffling accounts for. The penalty is
    the first of `strengths` everywhere.
    """
    settings = dataclasses.replace(settings, strengths=settings.strengths[:1])
    every = np.concatenate([labels[None], shuffles(labels, settings.permutations, settings.seed + 2)])
    layers = range(states.shape[1])
    areas = np.stack(  # [L, 1 + P]; variances of large states vanish in float32
        [auc(out_of_fold(states[:, layer].astype(np.float64), every, settings), every) for layer in layers]
    )
    best = areas[:, 1:].max(axis=0)
    return [
        {
            "layer": layer,
            "auc": float(areas[layer, 0]),
            "null": middle(areas[layer, 1:]),
            "p_of_the_largest": exceeded(best, areas[layer, 0]),
        }
        for layer in layers
    ]


def routing(items: Sequence[Item], go_deep: np.ndarray, depths: tuple[int, int]) -> dict[str, Any]:
    """Return each policy's right answers, regressions and fixes against the smaller depth, and its mean depth.

    go_deep bool [items]: the larger depth is taken. harm: the share of what was right that routing breaks.
    """
    right = np.array([item.right for item in items])
    taken = {f"depth {depth}": np.full(len(items), number) for number, depth in enumerate(depths)}
    taken["routed"] = go_deep.astype(int)
    found = {}
    for name, which in taken.items():
        now = right[np.arange(len(items)), which]
        found[name] = {
            "right": int(now.sum()), "of": len(items), "broken": int((right[:, 0] & ~now).sum()),
            "mended": int((~right[:, 0] & now).sum()), "depth": float(np.asarray(depths)[which].mean()),
        }  # fmt: skip
    before = int(right[:, 0].sum())
    harm = finite(wilson(int(found["routed"]["broken"]), before)) if before else None
    change = right[np.arange(len(items)), taken["routed"]].astype(float) - right[:, 0]
    return {"routing": found, "harm": harm, "gain": finite(bootstrap_mean(change))}


# ------------------------------------------------------------------------------------------------------- From a model


def first_states(model: Model, prompts: Sequence[Sequence[int]], first: int, batch: int = 8) -> np.ndarray:
    """Return states [n, L, D] at the first position after `first` iterations: as a probe reads them when it routes."""
    found: dict[int, np.ndarray] = {}

    def looking(number: int) -> Policy:
        def keep(states: np.ndarray) -> int:
            found[number] = np.array(states, np.float32)
            return 1

        return Policy("look", first, 1, select_depth=keep)

    for start in range(0, len(prompts), batch):
        part = prompts[start : start + batch]
        requests = [Request(tuple(prompt), 2, looking(start + row)) for row, prompt in enumerate(part)]
        for _ in generate_tokens(model.config, model.params, requests, pad_id=model.tokenizer.pad_id):
            pass
    return np.stack([found[number] for number in range(len(prompts))])


class Fitted(NamedTuple):
    """A probe fitted on all items of its label, with its provenance and scores."""

    weights: dict[str, np.ndarray]
    facts: dict[str, Any]


def fit_probe(
    model: Model,
    items: Sequence[Item],
    states: np.ndarray,
    depths: tuple[int, int],
    label: str,
    layer: int,
    first: int,
    settings: Settings,
    every_layer: bool,
) -> Fitted:
    """Return the probe of one layer of `states` [items, L, D]; items that are not asked about are routed by the whole
    fit.

    Raises: InputError as `asked_about` and `judge`.
    """
    asked, labels = asked_about(items, label)
    places = LABELS[label][2]
    x = states[:, layer].astype(np.float64)
    scores, p = judge(x[asked], labels, settings)
    strength = choose_strengths(x[asked], labels[None], np.ones((1, len(labels))), settings)
    every, _ = fit(x[asked], labels[None], np.ones((1, len(labels))), strength, settings)
    weights = {name: np.ascontiguousarray(part[0]) for name, part in every.items()}
    weights["out_bias"] = weights["out_bias"] + log_odds(labels)
    judged = probabilities(weights, x[:, weights["chosen"]])
    judged[asked] = p
    scores |= routing(items, np.asarray(places)[(judged > 0.5).astype(int)] == 1, depths)
    scores["capacity"]["open_gates"] = int(np.count_nonzero(weights["gate"]))
    scores["sweep"] = sweep(states[asked], labels, settings) if every_layer else None
    scores["summary"] = summary(label, layer, scores)
    facts = {
        "model": fingerprint(model), "layer": layer, "layers": states.shape[1], "d_model": states.shape[2],
        "first": first, "depths": [depths[place] for place in places], "prompt": prompt_mode(model.config),
        "label": label, "compared": list(depths), "strength": float(strength[0]),
        "settings": dataclasses.asdict(settings), "items_sha256": digest(items), "scores": scores,
    }  # fmt: skip
    return Fitted(weights, facts)


def summary(label: str, layer: int, scores: dict[str, Any]) -> str:
    area, capacity = scores["auc"], scores["capacity"]
    return (
        f"{label}: {scores['positive']} of {scores['items']} items positive; layer {layer}, nested leave-one-out: "
        f"AUROC {area['value']:.3f} (shuffled labels {area['null'][0]:.3f} to {area['null'][1]:.3f}, p = "
        f"{area['p_permutation']:.3g}), {scores['right']} of "
        f"{scores['items']} right against {scores['majority']:.1%} by always saying the larger class (binomial p = "
        f"{scores['p_binomial']:.3g}); {capacity['parameters']} parameters on {capacity['items']} items"
    )


def digest(items: Sequence[Item]) -> str:
    """Return the SHA-256 over the items with their outcomes; it identifies the training set."""
    return hashlib.sha256(json.dumps(items).encode()).hexdigest()


def save(fitted: Fitted, path: Path) -> None:
    """Write the file that `inference/halting_probe.py` reads, whole or not at all."""
    partial = path.with_suffix(".partial")
    arrays = {
        name: part if name == "chosen" else part.astype(np.float32) for name, part in sorted(fitted.weights.items())
    }
    save_file(arrays, partial, metadata={"format": FORMAT, "probe": json.dumps(fitted.facts)})
    partial.replace(path)
