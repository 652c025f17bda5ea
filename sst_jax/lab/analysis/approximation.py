"""How far each forward is from `exact`: in states, logits, KL and gradients, over alpha, passes, depth and length.

Errors are relative norms against the exact recurrence on the same parameters and tokens: ||x - x_exact|| / ||x_exact||.
KL is the mean over positions of KL(exact || forward) in nats. Gradients are of the mean next-token loss with respect to
the adapter and to alpha's parameters. The fitted order p is the slope of log error against log alpha over the alphas up
to FIT_BELOW: an error that falls as alpha^p.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sst_jax.console.figure import new_figure
from sst_jax.errors import InputError
from sst_jax.model import rules as forwards
from sst_jax.model.config import AdapterConfig, ModelConfig, StreamConfig
from sst_jax.model.decoder import Params, abstract_params
from sst_jax.types import Tokens

FIT_BELOW = 0.05
MEASURES = ("states", "logits", "kl", "adapter_gradient", "blend_gradient")


@dataclasses.dataclass(frozen=True)
class Case:
    """One forward at one setting."""

    forward: str
    passes: int
    alpha: float
    depth: int
    length: int

    @property
    def name(self) -> str:
        return self.forward if self.forward in ("two_pass", "exact") else f"{self.forward} k={self.passes}"


def parse_forward(text: str) -> tuple[str, int]:
    """Return "two_pass" or "local:3" as (forward, passes).

    Raises: InputError naming what is not a forward.
    """
    name, _, passes = text.partition(":")
    if passes and not passes.isdigit():
        raise InputError(f"--forwards {text}: {passes!r} is not a number of passes")
    count = int(passes) if passes else 2
    forwards.check(name, count, 1)
    if name in ("plain", "exact"):
        raise InputError(f"--forwards {text}: measured are two_pass, k_pass:K and local:K, against exact")
    return name, count


def cases(
    names: Sequence[tuple[str, int]], alphas: Sequence[float], depths: Sequence[int], lengths: Sequence[int]
) -> Iterator[Case]:
    """Yield the full grid, ordered so that `exact` is computed once for all forwards at a setting."""
    for length in lengths:
        for depth in depths:
            for alpha in alphas:
                for name, passes in names:
                    yield Case(name, passes, alpha, depth, length)


def with_alpha(config: ModelConfig, alpha: float) -> tuple[ModelConfig, Params]:
    """Return the config with alpha learnable around one value everywhere, and the blend parameters that say so.

    Alpha must be a parameter for its gradient to be measured; the range is (0, 1), whatever the model's own is.
    """
    own = config.stream or StreamConfig()
    # alpha_init only matters for fresh parameters; held constant, one program serves all alphas.
    stream = dataclasses.replace(own, alpha=None, alpha_range=(0.0, 1.0), alpha_init=0.5)
    config = dataclasses.replace(config, stream=stream)
    shapes = abstract_params(config)["blend"]
    theta = float(np.log(alpha / (1.0 - alpha)))
    fill = {"theta": theta, "gain": stream.gain}
    return config, {name: jnp.full(leaf.shape, fill[name], leaf.dtype) for name, leaf in shapes.items()}


def with_adapter(config: ModelConfig, params: Params, rank: int = 4) -> tuple[ModelConfig, Params]:
    """Return the model with an adapter to measure gradients in: its own, or a small random one where it has none."""
    if config.adapter.rank:
        return config, params
    config = dataclasses.replace(config, adapter=AdapterConfig(rank=rank, alpha=float(rank)))
    shapes = abstract_params(config)["adapter"]
    rng = np.random.default_rng(0)
    draw = {"lora_a": 1.0, "lora_b": 0.02}
    adapter = {
        name: {
            part: jnp.asarray(rng.standard_normal(leaf.shape) * draw[part] * leaf.shape[1] ** -0.5, jnp.float32)
            for part, leaf in pair.items()
        }
        for name, pair in shapes.items()
    }
    return config, {**params, "adapter": adapter}


def measure(
    config: ModelConfig,
    params: Params,
    tokens: np.ndarray,
    todo: Sequence[Case],
    gradients: bool = True,
    progress: Any = None,
) -> list[dict[str, Any]]:
    """Return one record a case: its fields, the errors named in MEASURES, gradient cosines, and the effect of the
    stream.

    tokens [B, T] with T at least the longest length asked for.
    """
    if config.stream is None:
        config = dataclasses.replace(config, stream=StreamConfig())
    config, params = with_adapter(config, params)
    records: list[dict[str, Any]] = []
    reference: dict[str, Any] = {}
    setting = None
    for case in todo:
        here = (case.alpha, case.depth, case.length)
        if here != setting:
            setting = here
            config, blend = with_alpha(config, case.alpha)
            full = {**params, "blend": blend}
            piece = jnp.asarray(tokens[:, : case.length])
            reference = _look(config, full, piece, "exact", 2, case.depth, gradients)
            plain = forwards.logits(config, full, piece, forward="plain")
            effect = relative(plain, reference["logits"])
        found = _look(config, full, piece, case.forward, case.passes, case.depth, gradients)
        record = {**dataclasses.asdict(case), "name": case.name, "stream_effect": effect}
        record["states"] = relative(found["states"], reference["states"])
        record["logits"] = relative(found["logits"], reference["logits"])
        record["kl"] = kl(reference["logits"], found["logits"])
        if gradients:
            for part in ("adapter", "blend"):
                ours, exact = (_flat(side["gradient"][part]) for side in (found, reference))
                record[f"{part}_gradient"] = relative(ours, exact)
                record[f"{part}_cosine"] = float(ours @ exact / (np.linalg.norm(ours) * np.linalg.norm(exact)))
        records.append(record)
        if progress is not None:
            progress()
    return records


def _look(
    config: ModelConfig,
    params: Params,
    tokens: Tokens,
    forward: str,
    passes: int,
    depth: int,
    gradients: bool,
) -> dict[str, Any]:
    settings = {"forward": forward, "passes": passes, "depth": depth}
    seen = {
        "states": forwards.states(config, params, tokens, **settings),
        "logits": forwards.logits(config, params, tokens, **settings),
    }
    if gradients:
        trainable = {name: params[name] for name in ("adapter", "blend")}
        seen["gradient"] = _gradient(config, params["base"], trainable, tokens, tuple(sorted(settings.items())))
    return seen


@functools.partial(jax.jit, static_argnames=("config", "settings"))
def _gradient(config: ModelConfig, base: Params, trainable: Params, tokens: Tokens, settings: tuple) -> Params:
    """Return gradient of the mean next-token loss with respect to `trainable`."""

    def loss(trainable: Params) -> jax.Array:
        logits = forwards.logits(config, {"base": base, **trainable}, tokens, **dict(settings))
        log_p = jax.nn.log_softmax(logits[:, :-1], axis=-1)
        return -jnp.take_along_axis(log_p, tokens[:, 1:, None], axis=-1).mean()

    return jax.grad(loss)(trainable)


def _flat(tree: Any) -> np.ndarray:
    return np.concatenate([np.asarray(leaf, np.float64).ravel() for leaf in jax.tree.leaves(tree)])


def relative(got: Any, expected: Any) -> float:
    """Return ||got - expected|| / ||expected|| over all entries, in float64."""
    got, expected = np.asarray(got, np.float64), np.asarray(expected, np.float64)
    return float(np.linalg.norm(got - expected) / np.linalg.norm(expected))


def kl(expected: Any, got: Any) -> float:
    """Return mean KL(expected || got) over positions, in nats, from logits [B, T, V]."""
    p, q = (jax.nn.log_softmax(jnp.asarray(side), axis=-1) for side in (expected, got))
    return float(jnp.sum(jnp.exp(p) * (p - q), axis=-1).mean())


def order(alphas: Sequence[float], errors: Sequence[float]) -> float | None:
    """Return the least-squares slope of log error against log alpha; None with fewer than two usable points."""
    points = [(a, e) for a, e in zip(alphas, errors, strict=True) if a <= FIT_BELOW and e > 0]
    if len({a for a, _ in points}) < 2:
        return None
    x, y = np.log(np.array(points)).T
    return float(np.polyfit(x, y, 1)[0])


def orders(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return fitted orders of every measured error, one record for each forward, depth and length."""
    groups: dict[tuple, list[dict[str, Any]]] = {}
    for record in records:
        groups.setdefault((record["name"], record["depth"], record["length"]), []).append(record)
    fitted = []
    for (name, depth, length), members in groups.items():
        alphas = [member["alpha"] for member in members]
        slopes = {
            measure: order(alphas, [member[measure] for member in members])
            for measure in MEASURES
            if measure in members[0]
        }
        fitted.append({"name": name, "depth": depth, "length": length, **slopes})
    return fitted


def figure(records: Sequence[dict[str, Any]], path: Any, title: str) -> None:
    """Draw the error in the states against alpha, one line a forward, a panel for each depth and length; log-log."""
    panels = sorted({(record["depth"], record["length"]) for record in records})
    canvas = new_figure(5.2 * len(panels), 4.4)
    row = canvas.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axes, (depth, length) in zip(row, panels, strict=True):
        here = [record for record in records if (record["depth"], record["length"]) == (depth, length)]
        names = list(dict.fromkeys(record["name"] for record in here))
        for name in names:
            points = sorted((record["alpha"], record["logits"]) for record in here if record["name"] == name)
            axes.loglog(*zip(*points, strict=True), "o-", label=name, markersize=4)
        effect = sorted({(record["alpha"], record["stream_effect"]) for record in here})
        axes.loglog(*zip(*effect, strict=True), "k--", label="effect of the stream", linewidth=1)
        axes.set(xlabel="alpha", title=f"depth {depth}, {length} positions")
        axes.grid(alpha=0.3, which="both")
    row[0].set_ylabel("relative error of the logits against exact")
    row[0].legend(fontsize=8)
    canvas.suptitle(title)
    canvas.savefig(path, dpi=150)
