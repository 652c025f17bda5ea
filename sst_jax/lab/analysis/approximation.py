"""How far each forward is from `exact`: in states, logits, KL and gradients, over alpha, passes, depth and length.

Errors are relative norms against the exact recurrence on the same parameters and tokens: ||x - x_exact|| / ||x_exact||.
KL is the mean over positions of KL(exact || forward) in nats. Gradients are of the mean next-token loss with respect to
the adapter and to alpha's parameters. The fitted order p is the slope of log error against log alpha over the alphas up
to FIT_BELOW: an error that falls as alpha^p.

result = run(sst_jax.load(MODEL, "float32"), ApproximationConfig(), Path("runs/approximation"))
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sst_jax.console.command import write_json
from sst_jax.console.figure import new_figure
from sst_jax.console.progress import bar
from sst_jax.errors import InputError
from sst_jax.inference.model import Model
from sst_jax.lab.analysis.texts import running_text
from sst_jax.model import rules as forwards
from sst_jax.model.config import AdapterConfig, ModelConfig, StreamConfig
from sst_jax.model.decoder import MARKS, abstract_params
from sst_jax.model.quantization import storages
from sst_jax.types import AnyArray, Fraction, HostFloats, Json, Logits, Params, Tokens

FIT_BELOW = 0.05
RESULT, FIGURE = "result.json", "approximation.png"
MEASURES = ("states", "logits", "kl", "adapter_gradient", "blend_gradient")


@dataclasses.dataclass(frozen=True)
class ApproximationConfig:
    """What is swept.

    forwards    against `exact`, as `parse_forward` reads them
    alphas      in (0, 1);  depths  iterations per token;  lengths  positions, at least 2
    text        file of the text to measure on; None: the embedded word problems
    batch       sequences of it
    stream      fields of `StreamConfig` to measure with instead of the model's own
    gradients   measure these too;  dtype  "float32" or "float64"

    Raises: InputError naming the setting, by the flag of `analyze approximation` that sets it.
    """

    forwards: tuple[str, ...] = ("two_pass", "k_pass:3", "k_pass:4", "local:2", "local:3")
    alphas: tuple[float, ...] = (0.003, 0.01, 0.03, 0.1, 0.3)
    depths: tuple[int, ...] = (1,)
    lengths: tuple[int, ...] = (128,)
    text: str | None = None
    batch: int = 2
    stream: Json = dataclasses.field(default_factory=dict)
    gradients: bool = True
    dtype: str = "float32"

    def __post_init__(self) -> None:
        if max(self.alphas) >= 1:
            raise InputError(f"--alphas {','.join(map(str, self.alphas))}: must be below 1")
        if min(self.lengths) < 2:
            raise InputError(
                f"--lengths {','.join(map(str, self.lengths))}: at a single position no state has come from anywhere; "
                "2 at least"
            )
        self.cases()

    def cases(self) -> list[Case]:
        """Return the full grid."""
        return list(cases([parse_forward(text) for text in self.forwards], self.alphas, self.depths, self.lengths))


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
        return f"{self.forward} k={self.passes}" if self.forward in ("k_pass", "local") else self.forward


def parse_forward(text: str) -> tuple[str, int]:
    """Return "two_pass" or "local:3" as (forward, passes); other options stay in the spelling.

    Raises: InputError naming what is not a forward.
    """
    try:
        bound = forwards.bind(text)
    except InputError as error:
        raise InputError(f"--forwards {text}: {error}") from None
    if bound.name in ("plain", "exact"):
        raise InputError(f"--forwards {text}: measured are two_pass, k_pass:K and local:K, against exact")
    return (bound.name, bound.options.passes) if isinstance(bound.options, forwards.Passes) else (text, 2)


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
    stream = dataclasses.replace(own, alpha=None, alpha_range=(0.0, 1.0), alpha_init=0.5, gate="range")
    config = dataclasses.replace(config, stream=stream)
    shapes = abstract_params(config)["blend"]
    theta = float(np.log(alpha / (1.0 - alpha)))
    fill = {"theta": theta, "gain": stream.gain, MARKS: 0.0}
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


def run(model: Model, config: ApproximationConfig, out: Path, title: str = "") -> Json:
    """Measure a model into a folder.

    Args:
        model: its stream's options are kept but for `config.stream`, its alpha is swept.
        config: what is swept.
        out: result.json and the figure go here.
        title: of the figure, before what a state is.

    Returns:
        What DIR/result.json holds: `records` of `measure` and `orders` of `orders`, with the settings.

    Raises: InputError as `running_text`.
    """
    todo = config.cases()
    tokens = running_text(model.tokenizer, config.text, config.batch, max(config.lengths))
    stream = dataclasses.replace(model.config.stream or StreamConfig(), **config.stream)
    for case in todo:
        forwards.check_links(stream, forwards.bind(case.forward, case.passes))
    swept = dataclasses.replace(model.config, stream=stream, dtype=config.dtype)
    params = storages.cast(model.params, config.dtype)
    with bar(len(todo), "measuring", "case") as meter:
        records = measure(swept, params, tokens, todo, config.gradients, meter.update)
    figure(records, out / FIGURE, f"{title}, state={stream.state}")
    result = {
        "model": model.provenance.to_json(),
        "stream": dataclasses.asdict(stream),
        "dtype": config.dtype,
        "batch": config.batch,
        "records": records,
        "orders": orders(records),
    }
    write_json(out / RESULT, result)
    return result


def measure(
    config: ModelConfig,
    params: Params,
    tokens: Tokens,
    todo: Sequence[Case],
    gradients: bool = True,
    progress: Callable[[], object] | None = None,
) -> list[Json]:
    """Measure forwards against `exact`, case by case.

    Args:
        config: of the model; without a stream it is given the default one.
        params: the three trees.
        tokens: [B, T], T at least the longest length asked for.
        todo: the cases, those at one setting one after another.
        gradients: measure these too.
        progress: called after every case.

    Returns:
        One record a case: its fields, the errors named in MEASURES, gradient cosines, and the effect of the stream.
    """
    if config.stream is None:
        config = dataclasses.replace(config, stream=StreamConfig())
    config, params = with_adapter(config, params)
    records: list[Json] = []
    setting = None
    for case in todo:
        if (case.alpha, case.depth, case.length) != setting:
            setting = (case.alpha, case.depth, case.length)
            config, blend = with_alpha(config, case.alpha)
            full = {**params, "blend": blend}
            piece = jnp.asarray(tokens[:, : case.length])
            oracle = dataclasses.replace(case, forward="exact", passes=2)
            reference = _observe(config, full, piece, oracle, gradients)
            plain = forwards.logits(config, full, piece, forward="plain")
            effect = relative(plain, reference.logits)
        found = _observe(config, full, piece, case, gradients)
        record = {**dataclasses.asdict(case), "name": case.name, "stream_effect": effect}
        record["states"] = relative(found.states, reference.states)
        record["logits"] = relative(found.logits, reference.logits)
        record["kl"] = kl(reference.logits, found.logits)
        if gradients:
            for part in ("adapter", "blend"):
                ours, exact = (_flat(side.gradient[part]) for side in (found, reference))
                record[f"{part}_gradient"] = relative(ours, exact)
                record[f"{part}_cosine"] = float(ours @ exact / (np.linalg.norm(ours) * np.linalg.norm(exact)))
        records.append(record)
        if progress is not None:
            progress()
    return records


class Observation(NamedTuple):
    """What one forward gives: states [L, B, T*I, D], logits, and the gradients of the two trained trees, or {}."""

    states: AnyArray
    logits: Logits
    gradient: Params


def _observe(config: ModelConfig, params: Params, tokens: Tokens, case: Case, gradients: bool) -> Observation:
    settings = {"forward": case.forward, "passes": case.passes, "depth": case.depth}
    states = forwards.states(config, params, tokens, **settings)
    logits = forwards.logits(config, params, tokens, **settings)
    gradient: Params = {}
    if gradients:
        trainable = {name: params[name] for name in ("adapter", "blend")}
        gradient = _gradient(config, params["base"], trainable, tokens, tuple(sorted(settings.items())))
    return Observation(states, logits, gradient)


@functools.partial(jax.jit, static_argnames=("config", "settings"))
def _gradient(config: ModelConfig, base: Params, trainable: Params, tokens: Tokens, settings: tuple) -> Params:
    """Return gradient of the mean next-token loss with respect to `trainable`."""

    def loss(trainable: Params) -> Fraction:
        logits = forwards.logits(config, {"base": base, **trainable}, tokens, **dict(settings))
        log_p = jax.nn.log_softmax(logits[:, :-1], axis=-1)
        return -jnp.take_along_axis(log_p, tokens[:, 1:, None], axis=-1).mean()

    return jax.grad(loss)(trainable)


def _flat(tree: Params) -> HostFloats:
    return np.concatenate([np.asarray(leaf, np.float64).ravel() for leaf in jax.tree.leaves(tree)])


def relative(got: AnyArray, expected: AnyArray) -> float:
    """Return ||got - expected|| / ||expected|| over all entries, in float64."""
    got, expected = np.asarray(got, np.float64), np.asarray(expected, np.float64)
    return float(np.linalg.norm(got - expected) / np.linalg.norm(expected))


def kl(expected: AnyArray, got: AnyArray) -> float:
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


def orders(records: Sequence[Json]) -> list[Json]:
    """Return fitted orders of every measured error, one record for each forward, depth and length."""
    groups: dict[tuple, list[Json]] = {}
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


def figure(records: Sequence[Json], path: Path, title: str) -> None:
    """Draw the error in the states against alpha, one line a forward, a panel for each depth and length; log-log."""
    panels = sorted({(record["depth"], record["length"]) for record in records})
    canvas = new_figure(5.2 * len(panels), 4.4)
    row = canvas.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axes, (depth, length) in zip(row, panels, strict=True):
        here = [record for record in records if (record["depth"], record["length"]) == (depth, length)]
        names = list(dict.fromkeys(record["name"] for record in here))
        for name in names:
            points = sorted((record["alpha"], record["logits"]) for record in here if record["name"] == name)
            axes.loglog(*zip(*points, strict=True), "o-", color=_colour(name, names), label=name, markersize=4)
        effect = sorted({(record["alpha"], record["stream_effect"]) for record in here})
        axes.loglog(*zip(*effect, strict=True), "k--", label="effect of the stream", linewidth=1)
        if len(panels) > 1:
            axes.set_title(f"depth {depth}, {length} positions")
        axes.set(xlabel="alpha")
        axes.grid(alpha=0.3, which="both")
    row[0].set_ylabel("relative error of the logits against exact")
    row[0].legend(fontsize=8)
    alone = f"\ndepth {panels[0][0]}, {panels[0][1]} positions" if len(panels) == 1 else ""
    canvas.suptitle(title + alone, fontsize="medium")
    canvas.savefig(path, dpi=150)


# The same in every figure, whichever forwards it has; others take the colours after these.
COLOURS = {"two_pass": "C0", "k_pass:3": "C1", "k_pass:4": "C4", "local:2": "C2", "local:3": "C3"}


def _colour(name: str, names: Sequence[str]) -> str:
    spelled = name.replace(" k=", ":")
    return COLOURS.get(spelled) or f"C{5 + [each for each in names if each not in COLOURS].index(name) % 5}"


def print_orders(result: Json) -> None:
    """Print the table of a result: errors at each alpha, and the fitted order."""
    records, fitted = result["records"], result["orders"]
    alphas = sorted({record["alpha"] for record in records}, reverse=True)
    for depth, length in sorted({(record["depth"], record["length"]) for record in records}):
        here = [record for record in records if (record["depth"], record["length"]) == (depth, length)]
        print(f"\nrelative error of the logits against exact, depth {depth}, {length} positions")
        print(f"{'':14}" + "".join(f"{f'alpha {alpha:g}':>12}" for alpha in alphas) + f"{'order':>8}")
        effect = {record["alpha"]: record["stream_effect"] for record in here}
        print(f"{'stream effect':14}" + "".join(f"{effect[alpha]:12.1e}" for alpha in alphas))
        for line in fitted:
            if (line["depth"], line["length"]) != (depth, length):
                continue
            errors = {record["alpha"]: record["logits"] for record in here if record["name"] == line["name"]}
            slope = f"{line['logits']:8.2f}" if line["logits"] is not None else f"{'-':>8}"
            print(f"{line['name']:14}" + "".join(f"{errors[alpha]:12.1e}" for alpha in alphas) + slope)
        if "adapter_gradient" in here[0]:
            print_gradients(here, min(alphas, key=lambda alpha: abs(alpha - 0.03)))


def print_gradients(records: Sequence[Json], alpha: float) -> None:
    """Print the gradients' errors at one alpha, one line a forward."""
    print(f"gradients at alpha {alpha:g}: error (cosine), adapter and alpha's parameters")
    for record in records:
        if record["alpha"] == alpha:
            parts = (
                f"{record[f'{part}_gradient']:.1e} ({record[f'{part}_cosine']:.6f})" for part in ("adapter", "blend")
            )
            print(f"{record['name']:14}  " + "   ".join(parts))
