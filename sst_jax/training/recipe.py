"""Recipes: every knob of a training run with its default, as a locked ConfigDict, and its way into dataclasses.

A file in `configs/` calls `defaults()`, sets what it is about and returns it; a misspelt knob is an error there and on
the command line. Nothing below the commands sees a ConfigDict: `resolve` turns one into frozen, validated dataclasses.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import ml_collections
from absl import flags
from ml_collections import config_dict, config_flags

from sst_jax.data import tracking
from sst_jax.data.problems import RESULT
from sst_jax.data.prompts import FORMATS
from sst_jax.errors import InputError
from sst_jax.model import rules
from sst_jax.model.config import AdapterConfig, StreamConfig, from_mapping
from sst_jax.model.quantization import nf4
from sst_jax.model.sharding import MeshConfig
from sst_jax.training.optimizer import OptimizerConfig
from sst_jax.training.step import ForwardConfig


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """name: "gsm8k", "words" (the embedded word problems) or "auto" (gsm8k where a path is given, else words); with
    ":result" behind it only the result is learned, without the steps. Or a story of `data/tracking.py`, as "boxes:1-4".

    path: a folder with GSM8K's JSONL files, or a hub id.

    heldout: examples kept out of training by seed, for the loss before, during and after; of GSM8K they come from the
    training split, the test split is never read here. limit: use at most so many training examples (0: all).
    format: "plain" or "chat". overlong: what an example that does not fit a row is, an "error" or "drop".
    """

    name: str = "gsm8k"
    path: str = "openai/gsm8k"
    length: int = 512
    batch_size: int = 8
    pack: bool = True
    format: str = "chat"
    heldout: int = 894
    limit: int = 0
    overlong: str = "error"

    def __post_init__(self) -> None:
        kind, colon, part = self.name.partition(":")
        if tracking.parse(self.name) is None and (kind not in ("gsm8k", "words", "auto") or (colon and part != RESULT)):
            known = ", ".join(map(repr, ("gsm8k", "words", "auto", *tracking.STORIES)))
            raise InputError(f"data.name={self.name!r} is not one of {known}, nor one of the first with :{RESULT}")
        if kind == "auto":
            object.__setattr__(self, "name", ("gsm8k" if self.path else "words") + colon + part)
        for field in ("length", "batch_size", "heldout"):
            if getattr(self, field) < 1:
                raise InputError(f"data.{field}={getattr(self, field)} must be at least 1")
        if self.limit < 0:
            raise InputError(f"data.limit={self.limit} must not be negative; 0 is all")
        if self.format not in FORMATS:
            raise InputError(f"data.format={self.format!r} is not one of {', '.join(map(repr, FORMATS))}")


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A resolved run."""

    model: str
    dtype: str
    quantize: str
    stream: StreamConfig | None
    adapter: AdapterConfig
    forward: ForwardConfig
    heldout_forward: ForwardConfig
    optimizer: OptimizerConfig
    data: DataConfig
    mesh: MeshConfig
    steps: int
    seed: int
    log_every: int
    eval_every: int
    save_every: int
    keep: int
    max_skipped: int
    sample_tokens: int


def with_attention_kernel(recipe: Recipe, pick: Callable[[str, str], str]) -> Recipe:
    """The recipe with its forwards' attention="auto" decided by `pick(attention, dtype)`."""
    forwards = {
        name: dataclasses.replace(part, attention=pick(part.attention, part.dtype))
        for name, part in (("forward", recipe.forward), ("heldout_forward", recipe.heldout_forward))
    }
    return dataclasses.replace(recipe, **forwards)


def defaults() -> ml_collections.ConfigDict:
    """All knobs. Sections mirror the dataclasses; their docstrings say what a field means."""
    config = ml_collections.ConfigDict()
    config.model = ml_collections.ConfigDict(
        {"source": "", "dtype": "bfloat16", "quantize": "none", "attention": "auto"}
    )
    config.stream = stream_knobs()
    config.adapter = ml_collections.ConfigDict(_fields(AdapterConfig))
    config.optimizer = ml_collections.ConfigDict(_fields(OptimizerConfig))
    config.data = ml_collections.ConfigDict(_fields(DataConfig))
    config.mesh = ml_collections.ConfigDict(_fields(MeshConfig))
    config.train = ml_collections.ConfigDict(
        {
            "steps": 100,
            "seed": 0,
            "log_every": 1,
            "eval_every": 50,
            "eval_forward": "exact",
            "save_every": 50,
            "keep": 2,
            "remat": "layer",
            "max_skipped": 10,
            "sample_tokens": 64,
        }
    )
    return config.lock()


def stream_knobs() -> ml_collections.ConfigDict:
    """The section `stream`: whether it is on, its own fields, and the forward that trains it."""
    drawn = {"forward": "two_pass", "passes": 2, "mix_share": 0.0, "mix_passes": 3, "depths": (1,)}
    return ml_collections.ConfigDict({**_fields(StreamConfig), "on": True, **drawn})


def stream_settings(knobs: dict[str, Any]) -> tuple[StreamConfig | None, dict[str, Any]]:
    """The stream of that section, None where it is off, and the fields of ForwardConfig that go with it.

    Raises: InputError naming the field.
    """
    knobs = dict(knobs)
    on = knobs.pop("on")
    drawn = {name: knobs.pop(name) for name in ("forward", "passes", "mix_share", "mix_passes", "depths")}
    return (from_mapping(StreamConfig, knobs), drawn) if on else (None, {"forward": "plain"})


def _fields(cls: type) -> dict[str, Any]:
    optional = {"alpha": config_dict.placeholder(float), "layers": config_dict.placeholder(tuple)}
    values = dataclasses.asdict(cls())
    return {name: optional[name] if value is None else value for name, value in values.items()}


def read(path: str, overrides: Sequence[str]) -> ml_collections.ConfigDict:
    """The recipe at `path` (with an optional :argument) with `--config.key=value` overrides.

    A recipe is a Python file that the user names, the one place where code is run on request.

    Raises: InputError naming the file, the key or the value.
    """
    file = pathlib.Path(path.split(":", 1)[0])
    if not file.is_file():
        raise InputError(f"--config {file} does not exist; recipes that come with the project are in configs/")
    values = flags.FlagValues()
    command_line = ["train", f"--config={path}", *overrides]
    config_flags.DEFINE_config_file("config", flag_values=values, lock_config=True, sys_argv=command_line)
    try:
        rest = values(command_line)
    except InputError:
        raise
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError) as error:
        # ConfigDict wraps its message in quotes of its own; one line is promised.
        text = str(error).replace("\\n", " ").replace("\\'", "'").strip("'\"")
        raise InputError(f"recipe {path}: {' '.join(text.split()) or type(error).__name__}") from None
    if len(rest) > 1:
        raise InputError(f"unknown argument {rest[1]!r}; knobs are set with --config.KEY=VALUE")
    return values.config


def recorded(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """A recipe as its run records it, JSON-ready: without the mesh, as a run goes on on any number of devices."""
    values = json.loads(config.to_json_best_effort())
    del values["mesh"]
    return values


def resolve(config: ml_collections.ConfigDict) -> Recipe:
    """Checks a recipe and freezes it.

    Raises: InputError naming the field.
    """
    if "kind" in config:
        raise InputError(
            f"this recipe trains from scratch (kind={config.kind!r}): `python -m sst_jax.train` alone takes it"
        )
    (stream, drawn), train = stream_settings(config.stream.to_dict()), config.train.to_dict()
    dtype = config.model.dtype
    if dtype not in ("float32", "bfloat16"):
        raise InputError(f"model.dtype={dtype!r} is not one of 'float32', 'bfloat16'")
    if config.model.quantize not in nf4.KINDS:
        raise InputError(f"model.quantize={config.model.quantize!r} is not one of {', '.join(nf4.KINDS)}")
    if not config.model.source:
        raise InputError("model.source is empty: set --config.model.source to a folder, a hub id or a GGUF file")
    for key in ("steps", "log_every", "eval_every", "save_every", "keep", "max_skipped", "sample_tokens"):
        if train[key] < 1:
            raise InputError(f"train.{key}={train[key]} must be at least 1")
    if train["seed"] < 0:
        raise InputError(f"train.seed={train['seed']} must not be negative")
    optimizer = from_mapping(OptimizerConfig, config.optimizer.to_dict())
    if train["steps"] % optimizer.accumulate:
        raise InputError(
            f"train.steps={train['steps']} must be a multiple of optimizer.accumulate={optimizer.accumulate}: the "
            "micro-batches left over would change nothing"
        )
    if stream is not None and stream.layers == ():
        raise InputError("stream.layers is empty: a stream needs a layer that carries it")
    adapter = from_mapping(AdapterConfig, config.adapter.to_dict())
    if adapter.rank and not adapter.targets:
        raise InputError(f"adapter.rank={adapter.rank} needs linears: adapter.targets is empty")
    if stream is not None and stream.alpha is not None and stream.alpha_warmup:
        raise InputError(f"stream.alpha_warmup={stream.alpha_warmup} is for a learned alpha; stream.alpha fixes it")
    shared = {"dtype": dtype, "attention": config.model.attention}
    trains = ForwardConfig(remat=train.pop("remat"), **drawn, **shared)
    judge = train.pop("eval_forward")
    if judge not in rules.FORWARDS:
        raise InputError(f"train.eval_forward={judge!r} is not one of {', '.join(rules.FORWARDS)}")
    judges = ForwardConfig(judge, remat="none", **shared)
    if stream is None:
        judges = dataclasses.replace(judges, forward="plain")
    # Measured with the same number of passes where the same kind of forward measures, else with the forward's own.
    if judges.forward == trains.forward:
        judges = dataclasses.replace(judges, passes=trains.passes)
    return Recipe(
        model=config.model.source,
        dtype=dtype,
        quantize=config.model.quantize,
        stream=stream,
        adapter=adapter,
        forward=trains,
        heldout_forward=judges,
        optimizer=optimizer,
        data=from_mapping(DataConfig, config.data.to_dict()),
        mesh=from_mapping(MeshConfig, config.mesh.to_dict()),
        **train,
    )
