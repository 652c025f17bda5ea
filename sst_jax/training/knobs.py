"""A recipe's knobs as a person reads them: values, where each comes from, and what it means."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from ml_collections import ConfigDict

from sst_jax.model.config import AdapterConfig, StreamConfig
from sst_jax.model.sharding import MeshConfig
from sst_jax.training import recipe
from sst_jax.training.optimizer import OptimizerConfig
from sst_jax.training.sections import DataConfig, SourceConfig, StreamSection, TrainConfig
from sst_jax.training.step import ForwardSchedule
from sst_jax.types import JsonValue

# The dataclasses whose docstrings say what a section's knobs mean.
SECTIONS: dict[str, tuple[type, ...]] = {
    "model": (SourceConfig,),
    "stream": (StreamSection, StreamConfig, ForwardSchedule),
    "adapter": (AdapterConfig,),
    "optimizer": (OptimizerConfig,),
    "data": (DataConfig,),
    "mesh": (MeshConfig,),
    "train": (TrainConfig,),
}
DEFAULT, FILE, COMMAND_LINE = "default", "recipe", "command line"


class Knob(NamedTuple):
    """A knob by its dotted name; `origin` is DEFAULT, FILE or COMMAND_LINE."""

    name: str
    value: JsonValue
    origin: str
    meaning: str


def read_knobs(path: str, overrides: Sequence[str]) -> list[Knob]:
    """Return every knob of a recipe.

    Args:
        path: as --config takes it.
        overrides: flags such as --config.train.steps=200.

    Raises: InputError naming the file, the knob or the value.
    """
    usual = dict(_leaves(recipe.defaults()))
    of_file = dict(_leaves(recipe.read(path)))
    config = recipe.read(path, overrides)
    if "kind" not in config:
        recipe.resolve(config)
    found = []
    for name, value in _leaves(config):
        origin = COMMAND_LINE if value != of_file[name] else FILE if value != usual.get(name) else DEFAULT
        found.append(Knob(name, value, origin, meaning(name)))
    return found


def meaning(name: str) -> str:
    """Return what a knob means, "" where nothing says so: from the docstring of its section."""
    section, _, knob = name.partition(".")
    for described in SECTIONS.get(section, ()):
        lines = re.sub(r"\n {6,}", " ", described.__doc__ or "").splitlines()
        for line in lines:
            found = re.match(r"    (\w+(?:, \w+)*):? +(.+)", line)
            if found and knob in found[1].split(", "):
                return found[2].strip()
    return ""


def _leaves(config: ConfigDict, prefix: str = "") -> Iterator[tuple[str, JsonValue]]:
    for key in config:
        value = config[key]
        if isinstance(value, ConfigDict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", list(value) if isinstance(value, tuple) else value
