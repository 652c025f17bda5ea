"""All that is measured on a collection, as one JSON-ready record, and what figures need besides."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from sst_jax.console.progress import counted
from sst_jax.inference.model import Model
from sst_jax.lab.analysis import basins, controls
from sst_jax.lab.analysis.basins import MixtureFit, TextMetrics
from sst_jax.lab.analysis.collect import Settings
from sst_jax.lab.analysis.collection import Collection
from sst_jax.lab.analysis.noise import noise_floor
from sst_jax.lab.statistics import clustered_mean, finite, holm
from sst_jax.types import Json

EXAMPLES, SHOWN, CONTEXT = 6, 5, 12  # positions in the table of tokens, tokens of each, tokens that lead up to it


class AnalysisResult(NamedTuple):
    """result  what result.json holds;  the rest is what it was made of: mixture and masks [T] at the headline layer."""

    result: Json
    measured: list[TextMetrics]
    mixture: MixtureFit
    masks: list[np.ndarray]
    alpha: np.ndarray  # [L, D] or [L, 1]


def measure(
    model: Model,
    collection: Collection,
    settings: Settings,
    layer: int,
    advance: Callable[[int], object] = lambda _: None,
) -> AnalysisResult:
    """Measure a collection, problem by problem; shifts are looked for at `layer`.

    Raises: InputError as `Collection.read` and `basins.fit_mixture`.
    """
    measured = []
    for problem in collection:
        measured.append(basins.measure(problem))
        advance(1)
    layers = measured[0].cosine_distance.shape[-1]

    def mixture(number: int, refits: int) -> MixtureFit:
        return basins.fit_mixture([each.cosine_distance[-1, :, number] for each in measured], refits=refits)

    by_layer = [mixture(number, 0) for number in range(layers)]
    found = mixture(layer, basins.REFITS)
    masks, cut, how = basins.shifted(measured, layer, found)
    alpha = alphas(model)
    result = {
        "problems": len(measured),
        "positions": int(sum(each.cosine_distance.shape[1] for each in measured)),
        "layer": layer,
        "by_depth": [
            {
                "depth": depth,
                "moved": finite(clustered_mean([each.cosine_distance[number, :, layer] for each in measured])),
                "lowest_overlap": float(1.0 - max(each.cosine_distance[number, :, layer].max() for each in measured)),
                "changed": finite(clustered_mean([each.winner[number] != each.winner[0] for each in measured])),
                "replaced": finite(clustered_mean([each.replaced[number] for each in measured])),
            }
            for number, depth in enumerate(settings.depths)
        ],
        "modes": as_record(found),
        "modes_by_layer": [
            {**as_record(each), "dip_p_holm": p, "quartiles_moved": quartiles(measured, number)}
            for number, (each, p) in enumerate(zip(by_layer, holm([each.dip_p for each in by_layer]), strict=True))
        ],
        "shifted_are": how,
        "tokens": basins.tokens_at(measured, masks),
        "order_of_events": basins.order_of_events(measured, layer, cut),
        "position_zero": basins.position_zero(measured, layer, masks),
        "downstream": basins.downstream(measured, layer, masks),
        "noise_floor": noise_floor(measured) if settings.rounding else None,
        "controls": controls.summarise([each.controls for each in measured if each.controls]),
        "alpha": {"mean": float(alpha.mean()), "by_layer": np.quantile(alpha, [0.05, 0.5, 0.95], axis=1).T.tolist()},
        "examples": examples(model, collection, measured, layer),
    }
    return AnalysisResult(result, measured, found, masks, alpha)


def as_record(found: MixtureFit) -> Json:
    intervals = {name: getattr(found, name) for name in ("threshold", "share")}
    return {**found._asdict(), **{name: part and finite(part) for name, part in intervals.items()}}


def quartiles(measured: Sequence[TextMetrics], layer: int) -> list[float]:
    values = np.concatenate([each.cosine_distance[-1, :, layer] for each in measured])
    return np.quantile(values, [0.25, 0.5, 0.75]).tolist()


def alphas(model: Model) -> np.ndarray:
    """How strongly each dimension of each layer blends its state in, [L, D], or [L, 1] where all do alike."""
    stream, layers = model.config.stream, model.config.backbone.num_layers
    if stream is None:
        raise ValueError("the model has no stream")
    if stream.alpha is not None:
        return np.full((layers, 1), stream.alpha)
    theta = np.asarray(model.params["blend"]["theta"], float)
    lo, hi = stream.alpha_range
    return np.broadcast_to(lo + (hi - lo) / (1.0 + np.exp(-theta)), (layers, theta.shape[-1]))


def examples(model: Model, collection: Collection, measured: Sequence[TextMetrics], layer: int) -> list[Json]:
    """The positions that moved most, at most one a problem: the top tokens before and after."""
    at = [int(each.cosine_distance[-1, :, layer].argmax()) for each in measured]
    most = [each.cosine_distance[-1, place, layer] for each, place in zip(measured, at, strict=True)]
    found = []
    for number in np.argsort(most)[::-1][:EXAMPLES]:
        problem, place = collection.read(int(number)), at[number]
        read = [*problem.prefix, *problem.inputs[: place + 1]]
        found.append(
            {
                "id": problem.id,
                "position": place,
                "overlap": float(1.0 - most[number]),
                "context": model.tokenizer.decode(read[-CONTEXT:]),
                "before": tokens(model, problem.top_ids[0, place], problem.top_logits[0, place]),
                "after": tokens(model, problem.top_ids[-1, place], problem.top_logits[-1, place]),
            }
        )
    return found


def tokens(model: Model, ids: np.ndarray, logits: np.ndarray) -> list[Json]:
    """Return the top tokens as text, with their shares of what the top tokens have together."""
    weights = np.exp(logits - logits.max())
    weights /= weights.sum()
    return [
        {"token": model.tokenizer.decode_next([int(each)], preceded=True), "share": float(weight)}
        for each, weight in zip(ids[:SHOWN], weights[:SHOWN], strict=True)
    ]


def summary(result: Json) -> str:
    """The lines that a person reads in the terminal."""
    found, last = result["modes"], result["by_depth"][-1]
    lines = [
        f"{counted(result['problems'], 'problem')}, {counted(result['positions'], 'position')}, layer "
        f"{result['layer']}: mean cosine similarity between depths {result['by_depth'][0]['depth']} and "
        f"{last['depth']} is {1 - last['moved']['value']:.4f}",
    ]
    if found["bimodal"]:
        share, threshold = number(found["share"], ".1%"), number(found["threshold"], ".4f")
        lines.append(
            f"two kinds of position: {share} shifted below a cosine similarity of {threshold} "
            f"(dip p = {found['dip_p']:.3g})"
        )
    else:
        lines.append(f"one kind of position: no basin shifts to be seen (dip p = {found['dip_p']:.3g})")
    bimodal = sum(each["bimodal"] and each["dip_p_holm"] < basins.LEVEL for each in result["modes_by_layer"])
    lines.append(f"layers with two kinds of position, Holm-adjusted: {bimodal} of {len(result['modes_by_layer'])}")
    shifted, stable = (result["tokens"][name] for name in ("shifted", "stable"))
    lines.append(
        f"another top-1 token at {number(shifted['changed'], '.1%')} of {result['shifted_are']}, and at "
        f"{number(stable['changed'], '.1%')} of the others"
    )
    floor = result["noise_floor"]
    if floor and "everywhere" in floor:
        ratio = number(floor["everywhere"]["ratio"], ".2f")
        lines.append(f"depth moves the states {ratio} times as far as bfloat16 does")
    return "\n".join(lines)


def number(interval: Json | None, spec: str) -> str:
    """A value and its interval where it has one; a dash for none."""
    if interval is None or interval["value"] is None:
        return "–"
    ends = "" if interval["low"] is None else f" [{interval['low']:{spec}}, {interval['high']:{spec}}]"
    return f"{interval['value']:{spec}}{ends}"
