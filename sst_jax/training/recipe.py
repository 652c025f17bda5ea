"""Recipes: every knob of a training run with its default, as a locked ConfigDict, and its way into dataclasses.

A file in `configs/` calls `defaults()`, sets what it is about and returns it; a misspelt knob is an error there and on
the command line. Nothing below the commands sees a ConfigDict: `resolve` turns one into frozen, validated dataclasses.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import ml_collections
from absl import flags
from ml_collections import config_dict, config_flags

from sst_jax.errors import InputError
from sst_jax.model import nf4
from sst_jax.model.config import AdapterConfig, StreamConfig, from_mapping
from sst_jax.training.optimizer import OptimizerConfig
from sst_jax.training.step import ForwardConfig


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """name: "gsm8k", "words" (the embedded word problems) or "auto" (gsm8k where a path is given, else words).

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
        if self.name not in ("gsm8k", "words", "auto"):
            raise InputError(f"data.name={self.name!r} is not one of 'gsm8k', 'words', 'auto'")
        if self.name == "auto":
            object.__setattr__(self, "name", "gsm8k" if self.path else "words")
        for field in ("length", "batch_size", "heldout"):
            if getattr(self, field) < 1:
                raise InputError(f"data.{field}={getattr(self, field)} must be at least 1")


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
    steps: int
    seed: int
    log_every: int
    eval_every: int
    save_every: int
    keep: int
    sample_tokens: int


def placed(recipe: Recipe, pick: Callable[[str, str], str]) -> Recipe:
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
    config.stream = ml_collections.ConfigDict(_fields(StreamConfig))
    config.stream.on = True
    config.stream.forward = "two_pass"
    config.stream.passes = 2
    config.stream.mix_share = 0.0
    config.stream.mix_passes = 3
    config.adapter = ml_collections.ConfigDict(_fields(AdapterConfig))
    config.optimizer = ml_collections.ConfigDict(_fields(OptimizerConfig))
    config.data = ml_collections.ConfigDict(_fields(DataConfig))
    config.train = ml_collections.ConfigDict(
        {
            "steps": 100, "seed": 0, "log_every": 1, "eval_every": 50, "eval_forward": "exact", "save_every": 50,
            "keep": 2, "remat": True, "sample_tokens": 64,
        }
    )  # fmt: skip
    return config.lock()


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


def resolve(config: ml_collections.ConfigDict) -> Recipe:
    """Checks a recipe and freezes it.

    Raises: InputError naming the field.
    """
    stream, train = config.stream.to_dict(), config.train.to_dict()
    on, name, passes = (stream.pop(key) for key in ("on", "forward", "passes"))
    mix = {key: stream.pop(key) for key in ("mix_share", "mix_passes")}
    dtype = config.model.dtype
    if dtype not in ("float32", "bfloat16"):
        raise InputError(f"model.dtype={dtype!r} is not one of 'float32', 'bfloat16'")
    if config.model.quantize not in nf4.KINDS:
        raise InputError(f"model.quantize={config.model.quantize!r} is not one of {', '.join(nf4.KINDS)}")
    if not config.model.source:
        raise InputError("model.source is empty: set --config.model.source to a folder, a hub id or a GGUF file")
    for key in ("steps", "log_every", "eval_every", "save_every", "keep"):
        if train[key] < 1:
            raise InputError(f"train.{key}={train[key]} must be at least 1")
    attention = {"attention": config.model.attention}
    trains = ForwardConfig(name, passes, train.pop("remat"), dtype, **mix, **attention)
    # Measured with the same number of passes where the same kind of forward measures, else with the forward's own.
    judges = ForwardConfig(train.pop("eval_forward"), 2, remat=False, dtype=dtype, **attention)
    if judges.forward == trains.forward:
        judges = dataclasses.replace(judges, passes=passes)
    if not on:
        off = {"forward": "plain", "passes": 2, "mix_share": 0.0}
        trains, judges = (dataclasses.replace(part, **off) for part in (trains, judges))
    return Recipe(
        model=config.model.source,
        dtype=dtype,
        quantize=config.model.quantize,
        stream=from_mapping(StreamConfig, stream) if on else None,
        adapter=from_mapping(AdapterConfig, config.adapter.to_dict()),
        forward=trains,
        heldout_forward=judges,
        optimizer=from_mapping(OptimizerConfig, config.optimizer.to_dict()),
        data=from_mapping(DataConfig, config.data.to_dict()),
        **train,
    )
