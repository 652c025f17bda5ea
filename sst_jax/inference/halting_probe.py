"""The halting probe at work: reads the memory at the first generated position and chooses the depth of the rest.

A probe is a safetensors file that `python -m sst_jax.probe fit` writes (`lab/probing/fit.py`): a two-layer perceptron
on some dimensions of one layer's memory, with its provenance as JSON in the file's metadata.

    p = sigmoid(out . tanh(hidden^T (gate * (state[chosen] - mean) / scale) + hidden_bias) + out_bias)

`depths` names the depth taken where p is at most 1/2, and the one taken above.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from pathlib import Path

import jax
import numpy as np
from safetensors import SafetensorError, safe_open

from sst_jax.errors import InputError
from sst_jax.files import sha256
from sst_jax.inference.model import Model
from sst_jax.inference.policies import FILES, Policy
from sst_jax.types import HostArrays, HostFloats, Json, LayerStates

FORMAT = "sst_jax.probe.1"
SHAPES = {
    "chosen": "k",
    "mean": "k",
    "scale": "k",
    "gate": "k",
    "hidden": "kh",
    "hidden_bias": "h",
    "out": "h",
    "out_bias": "1",
}
FACTS = ("model", "layer", "layers", "d_model", "first", "depths", "prompt", "label", "scores")


@dataclasses.dataclass(frozen=True)
class Probe:
    """weights  by the names of SHAPES;  facts  at least FACTS, JSON-ready;  path, digest  of its file."""

    weights: HostArrays
    facts: Json
    path: str
    digest: str

    def probability(self, states: LayerStates) -> float:
        """Return the probability of the positive label, given the states [L, D] at the first position.

        Raises: InputError where they are of another shape, or not numbers.
        """
        expected = (self.facts["layers"], self.facts["d_model"])
        if states.shape != expected:
            raise InputError(f"{self.path} reads states {list(expected)}, the model has {list(states.shape)}")
        state = states[self.facts["layer"], self.weights["chosen"]].astype(np.float64)
        if not np.isfinite(state).all():
            raise InputError(f"{self.path}: the state at the first position is not a number")
        return float(probabilities(self.weights, state[None])[0])

    def __call__(self, states: LayerStates) -> int:
        return self.facts["depths"][int(self.probability(states) > 0.5)]

    @property
    def policy(self) -> Policy:
        """Spelled with a piece of the file's digest, so that outcomes say which probe routed them."""
        deepest = max(self.facts["depths"])
        return Policy(f"probe:{self.path}#{self.digest[:8]}", self.facts["first"], deepest, select_depth=self)

    def check(self, model: Model) -> None:
        """Raise InputError where the probe was fitted on another model."""
        stream = model.config.stream
        if stream is None:
            raise InputError(f"{self.path} needs a model with a stream")
        if self.facts["model"] != fingerprint(model):
            raise InputError(
                f"{self.path} was fitted on another model: its fingerprint is {self.facts['model'][:12]}, this one's "
                f"{fingerprint(model)[:12]}; fit a probe on this one"
            )


def probabilities(weights: HostArrays, inputs: HostFloats) -> HostFloats:
    """Return [n] of the chosen dimensions' values [n, k]."""
    x = weights["gate"] * (inputs - weights["mean"]) / weights["scale"]
    logits = np.tanh(x @ weights["hidden"] + weights["hidden_bias"]) @ weights["out"] + weights["out_bias"][0]
    return 0.5 * (1.0 + np.tanh(0.5 * logits))


@functools.cache
def load(path: str) -> Probe:
    """Read a probe's file.

    Raises: InputError naming the file and what is missing, damaged or of another shape.
    """
    file = Path(path).expanduser()
    try:
        with safe_open(file, framework="numpy") as opened:
            metadata = opened.metadata() or {}
            weights = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - not a dict
    except (OSError, SafetensorError) as error:
        raise InputError(f"probe {path} cannot be read: {error}") from None
    if metadata.get("format") != FORMAT:
        raise InputError(f"{path} is no probe: python -m sst_jax.probe fit writes them")
    facts = json.loads(metadata["probe"])
    missing = [name for name in FACTS if name not in facts] + [name for name in SHAPES if name not in weights]
    if missing:
        raise InputError(f"probe {path} lacks {missing[0]}")
    sizes = {"k": weights["chosen"].size, "h": weights["hidden_bias"].size, "1": 1}
    for name, axes in SHAPES.items():
        expected = tuple(sizes[axis] for axis in axes)
        if weights[name].shape != expected or not np.isfinite(weights[name]).all():
            raise InputError(f"probe {path}: {name} should be finite numbers of shape {list(expected)}")
    if not 0 <= weights["chosen"].min() <= weights["chosen"].max() < facts["d_model"]:
        raise InputError(f"probe {path}: chosen names dimensions that a state of {facts['d_model']} does not have")
    return Probe(weights, facts, path, sha256(file))


def fingerprint(model: Model) -> str:
    """Return the hex SHA-256 of what a model computes with.

    It covers the base's digest, the config, and the values of stream and adapter.

    The type of the arithmetic is not part of it.
    """
    facts = {name: getattr(model.provenance, name) for name in ("digest", "quantize")}
    total = hashlib.sha256(json.dumps([facts, model.config.to_dict()], sort_keys=True).encode())
    for name in ("adapter", "blend"):
        for path, leaf in jax.tree_util.tree_leaves_with_path(model.params[name]):
            total.update(f"{name}{jax.tree_util.keystr(path)}{leaf.shape}".encode())
            total.update(np.asarray(leaf).tobytes())
    return total.hexdigest()


def read_policy(path: str) -> Policy:
    """Return the policy of the probe in a file: what "probe:FILE" spells. Raises: InputError as `load`."""
    return load(path).policy


FILES["probe"] = read_policy
