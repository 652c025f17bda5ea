"""Probing as a call: from a model and its outcomes to a probe's file, and a probe's decisions on prompts.

from sst_jax.lab.probing.probing import ProbeConfig, run
result = run(sst_jax.load("runs/27b"), ProbeConfig(("runs/27b/gsm8k",), depths=(1, 4)), Path("runs/27b/probe"))
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from safetensors.numpy import save_file

from sst_jax.console.command import write_json
from sst_jax.errors import InputError
from sst_jax.inference.halting_probe import FORMAT, Probe, fingerprint, probabilities
from sst_jax.inference.model import Model
from sst_jax.inference.policies import Policy
from sst_jax.inference.session import Request, generate_tokens, prompt_mode
from sst_jax.lab.analysis import figures
from sst_jax.lab.probing import probe_dataset
from sst_jax.lab.probing.fit import Settings, choose_strengths, fit, log_odds
from sst_jax.lab.probing.judge import judge, routing, sweep
from sst_jax.lab.probing.probe_dataset import LABELS, Item
from sst_jax.types import HostArrays, Json

RESULT, PROBE = "result.json", "probe.safetensors"


@dataclasses.dataclass(frozen=True)
class ProbeConfig:
    """What a probe is asked, and how it is fitted.

    outcomes  folders of `evaluate` with answers at both depths
    depths    to choose between, the smaller first
    label     a key of `probe_dataset.LABELS`
    layer     whose state is read; None: the middle one
    first     iterations at the first position, before the probe reads
    sweep     score every layer too

    Raises: InputError naming the setting, by the flag of `probe fit` that sets it.
    """

    outcomes: tuple[str, ...]
    depths: tuple[int, ...] = (1, 4)
    label: str = "breaks"
    layer: int | None = None
    first: int = 1
    settings: Settings = dataclasses.field(default_factory=Settings)
    sweep: bool = False

    def __post_init__(self) -> None:
        counts = {"first": self.first} | {
            name: getattr(self.settings, name) for name in ("inputs", "hidden", "permutations")
        }
        for name, value in counts.items():
            if value < 1:
                raise InputError(f"--{name} {value} must be at least 1")
        if len(self.depths) != 2 or not 1 <= self.depths[0] < self.depths[1]:
            spelled = ",".join(map(str, self.depths))
            raise InputError(f"--depths {spelled}: give two depths, the smaller first, such as 1,4")

    @property
    def pair(self) -> tuple[int, int]:
        """The smaller and the larger depth."""
        return self.depths[0], self.depths[1]

    def layer_of(self, model: Model) -> int:
        """Return the layer of a model that is read. Raises: InputError where it has none such, or no stream."""
        layers = model.config.backbone.num_layers
        layer = layers // 2 if self.layer is None else self.layer
        if model.config.stream is None:
            name = model.provenance.path or "of these parameters"
            raise InputError(f"--model {name} has no stream, and so no state to read")
        if not 0 <= layer < layers:
            raise InputError(f"--layer {layer}: the model has layers 0 to {layers - 1}")
        return layer


class FittedProbe(NamedTuple):
    """A probe fitted on all items of its label, with its provenance and scores."""

    weights: HostArrays
    facts: Json


def run(model: Model, config: ProbeConfig, out: Path, outcomes: Sequence[Json] | None = None) -> Json:
    """Fit a probe into a folder.

    Args:
        model: the one that the outcomes are of.
        config: what the probe is asked.
        out: a folder for result.json, the probe's file and its figure.
        outcomes: those of `config.outcomes`, where `probe_dataset.read` has read them already; None: read here.

    Returns:
        What DIR/result.json holds: the probe's provenance and scores, and the items.

    Raises: InputError as `probe_dataset.read`, `probe_dataset.items` and `fit_probe`.
    """
    layer = config.layer_of(model)
    records = probe_dataset.read(config.outcomes, config.pair) if outcomes is None else outcomes
    items = probe_dataset.items(records, config.pair, model.tokenizer, model.provenance)
    probe_dataset.asked_about(items, config.label)  # before the states are computed
    states = first_states(model, [item.prompt for item in items], config.first)
    fitted = fit_probe(model, items, states, dataclasses.replace(config, layer=layer))
    save(fitted, out / PROBE)
    scores = fitted.facts["scores"]
    figures.save(figures.roc(scores["roc"], scores["auc"]["value"]), out)
    result = {**fitted.facts, "outcomes": list(config.outcomes), "items": [item.id for item in items]}
    write_json(out / RESULT, result)
    return result


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


def fit_probe(model: Model, items: Sequence[Item], states: np.ndarray, config: ProbeConfig) -> FittedProbe:
    """Fit the probe of one layer; items that are not asked about are routed by the whole fit.

    Args:
        model: the one that the states are of.
        items: with their outcomes at both depths.
        states: [items, L, D], as `first_states` gives them.
        config: what the probe is asked, and how it is fitted.

    Raises: InputError as `asked_about` and `judge`.
    """
    settings, layer = config.settings, config.layer_of(model)
    asked, labels = probe_dataset.asked_about(items, config.label)
    places = LABELS[config.label][2]
    x = states[:, layer].astype(np.float64)
    scores, p = judge(x[asked], labels, settings)
    strength = choose_strengths(x[asked], labels[None], np.ones((1, len(labels))), settings)
    every, _ = fit(x[asked], labels[None], np.ones((1, len(labels))), strength, settings)
    weights = {name: np.ascontiguousarray(part[0]) for name, part in every.items()}
    weights["out_bias"] = weights["out_bias"] + log_odds(labels)
    judged = probabilities(weights, x[:, weights["chosen"]])
    judged[asked] = p
    scores |= routing(items, np.asarray(places)[(judged > 0.5).astype(int)] == 1, config.pair)
    scores["capacity"]["open_gates"] = int(np.count_nonzero(weights["gate"]))
    scores["sweep"] = sweep(states[asked], labels, settings) if config.sweep else None
    scores["summary"] = summary(config.label, layer, scores)
    facts = {
        "model": fingerprint(model),
        "layer": layer,
        "layers": states.shape[1],
        "d_model": states.shape[2],
        "first": config.first,
        "depths": [config.depths[place] for place in places],
        "prompt": prompt_mode(model.config),
        "label": config.label,
        "compared": list(config.depths),
        "strength": float(strength[0]),
        "settings": dataclasses.asdict(settings),
        "items_sha256": probe_dataset.digest(items),
        "scores": scores,
    }
    return FittedProbe(weights, facts)


def summary(label: str, layer: int, scores: Json) -> str:
    """Return the scores in one line."""
    area, capacity = scores["auc"], scores["capacity"]
    accuracy = scores["right"] / scores["items"]
    return (
        f"{label}: {scores['positive']} of {scores['items']} items positive; layer {layer}, nested leave-one-out: "
        f"AUROC {area['value']:.3f} (shuffled labels {area['null'][0]:.3f} to {area['null'][1]:.3f}, p = "
        f"{area['p_permutation']:.3g}), accuracy {accuracy:.1%} ({scores['right']} of "
        f"{scores['items']}) against {scores['majority']:.1%} by always saying the larger class (binomial p = "
        f"{scores['p_binomial']:.3g}); {capacity['parameters']} parameters on {capacity['items']} items"
    )


def save(fitted: FittedProbe, path: Path) -> None:
    """Write the file that `inference/halting_probe.py` reads, whole or not at all."""
    partial = path.with_suffix(".partial")
    arrays = {
        name: part if name == "chosen" else part.astype(np.float32) for name, part in sorted(fitted.weights.items())
    }
    save_file(arrays, partial, metadata={"format": FORMAT, "probe": json.dumps(fitted.facts)})
    partial.replace(path)


def decide(model: Model, probe: Probe, prompts: Sequence[str]) -> list[Json]:
    """Return a probe's probability and depth for each prompt.

    Raises: InputError where the probe was fitted on another model.
    """
    probe.check(model)
    states = first_states(model, [model.tokenizer.encode(prompt) for prompt in prompts], probe.facts["first"])
    return [
        {"prompt": prompt, "probability": probe.probability(state), "depth": probe(state)}
        for prompt, state in zip(prompts, states, strict=True)
    ]


# ------------------------------------------------------------------------------------------------------ For a terminal


def print_scores(scores: Json) -> None:
    """Print the summary of a fit."""
    print(scores["summary"])
    capacity = scores["capacity"]
    print(
        f"accuracy on the items that it was fitted to {capacity['fitted_accuracy']:.1%}, on shuffled labels "
        f"{capacity['fitted_accuracy_shuffled']:.1%}: what a probe of this size can memorise"
    )
    print(f"\n{'policy':10}{'correct':>9}{'regressions':>13}{'fixes':>7}{'mean depth':>12}")
    for name, found in scores["routing"].items():
        print(f"{name:10}{found['right']:9}{found['broken']:13}{found['mended']:7}{found['depth']:12.2f}")
    if scores["harm"]:
        harm = scores["harm"]
        print(
            f"regressions by routing, of correct answers: {harm['value']:.1%} [{harm['low']:.1%}, {harm['high']:.1%}]"
        )
    for record in scores["sweep"] or ():
        low, high = record["null"]
        print(
            f"layer {record['layer']:3}: AUROC {record['auc']:.3f}, shuffled labels {low:.3f} to {high:.3f}; against "
            f"the best layer of each shuffle p = {record['p_of_the_largest']:.3g}"
        )


def print_decisions(label: str, decisions: Sequence[Json]) -> None:
    """Print the probability of a label and the chosen depth, one prompt a line."""
    print(f"{'p(' + label + ')':>12}{'depth':>7}  prompt")
    for found in decisions:
        print(f"{found['probability']:12.3f}{found['depth']:7}  {found['prompt'][:80]}")
