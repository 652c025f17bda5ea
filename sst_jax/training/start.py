"""What a run starts from where its source has been trained already: a run, an adapter or an export with a stream.

Its LoRA and its stream are where training begins; the base under them stays the base. The optimizer begins anew, and so
does the data's order. A run records the chain of runs before it.
"""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from sst_jax.errors import InputError
from sst_jax.files import diff
from sst_jax.model import decoder
from sst_jax.model.config import ModelConfig
from sst_jax.types import Json, Params
from sst_jax.weights.loading import LoadedModel, OnABase, open_model, resolve
from sst_jax.weights.provenance import Provenance

# Options of training alone, which a further run may choose anew.
FREE = {"adapter": ("dropout",), "stream": ("alpha_init", "alpha_warmup")}


class Start(NamedTuple):
    """Trained parameters to begin with ("adapter", "blend" or both), and what config.json says of them."""

    trained: Params
    record: Json


def open_source(source: str, dtype: str, quantize: str, base: str | Path | None) -> LoadedModel:
    """Return the model that a run starts from.

    Args:
        source: `model.source`.
        dtype: `model.dtype`.
        quantize: `model.quantize`.
        base: where the base of a run that resumes lies now, if elsewhere.

    Raises: InputError as `open_model`.
    """
    if base is None:
        return open_model(source, dtype, quantize)
    try:
        on_a_base = isinstance(resolve(source), OnABase)
    except InputError:
        on_a_base = False  # it is gone, and `base` stands for it
    return open_model(source, dtype, quantize, base=base) if on_a_base else open_model(base, dtype, quantize)


def start_of(opened: LoadedModel, config: ModelConfig, source: str) -> Start | None:
    """Return what a run begins with that its source has been trained to; None where the source is a plain base.

    Args:
        opened: the source.
        config: of the model that is to be trained.
        source: `model.source`, for messages.

    Raises: InputError where the recipe's adapter or stream is another than the source's.
    """
    trained: Params = {}
    if opened.config.adapter.rank:
        _check_same("adapter", opened.config.adapter, config.adapter, source)
        trained["adapter"] = opened.params["adapter"]
    if opened.config.stream is not None:
        if config.stream is None:
            raise InputError(f"model.source={source} has a stream, and stream.on=False would lose it")
        _check_same("stream", opened.config.stream, config.stream, source)
        trained["blend"] = opened.params["blend"]
    if not trained:
        return None
    shapes = decoder.abstract_params(config)
    for name, tree in trained.items():
        there, here = (jax.tree.map(lambda leaf: leaf.shape, each) for each in (tree, shapes[name]))
        if there != here:
            raise InputError(f"model.source={source}: its {name} has other shapes than the recipe's")
    return Start(trained, _record(opened.provenance, trained, source))


def _check_same(section: str, there: object, here: object, source: str) -> None:
    """Raise InputError with the knobs that bring a recipe's section to what the source has."""
    records = [dataclasses.asdict(config) for config in (there, here)]  # type: ignore[call-overload]
    differing = [found for found in diff(*records) if found[0] not in FREE[section]]
    if differing:
        knobs = " ".join(f'"--config.{section}.{key}={value}"' for key, value, _ in differing)
        raise InputError(f"model.source={source} has been trained with another {section}: set {knobs}")


def _record(provenance: Provenance, trained: Params, source: str) -> Json:
    known = {
        "model": source,
        "run": provenance.run,
        "step": provenance.step,
        "recipe": provenance.recipe,
        "started_from": provenance.started_from,
    }
    return {**{key: value for key, value in known.items() if value is not None}, "sha256": trained_digest(trained)}


def trained_digest(trained: Params) -> str:
    """Return the hex SHA-256 over the names and values of trained parameters."""
    total = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(trained):
        total.update(jax.tree_util.keystr(path).encode())
        total.update(np.ascontiguousarray(np.asarray(leaf, np.float32)).tobytes())
    return total.hexdigest()
