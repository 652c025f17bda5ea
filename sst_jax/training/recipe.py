"""Recipes: every knob of a training run with its default, as a locked ConfigDict, and its way into dataclasses.

A file in `configs/` calls `defaults()`, sets what it is about and returns it; a misspelt knob is an error there and on
the command line. `Recipe` holds the sections (`sections.py`, and those of the model, the optimizer and the mesh) and
checks them against one another.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import re
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_dict, config_flags

from sst_jax.errors import InputError
from sst_jax.model.config import AdapterConfig, BackboneConfig, ModelConfig, StreamConfig, from_mapping
from sst_jax.model.rules import bind, check_links
from sst_jax.model.sharding import MeshConfig
from sst_jax.training.optimizer import OptimizerConfig
from sst_jax.training.sections import DataConfig, SourceConfig, StreamSection, TrainConfig, field_defaults
from sst_jax.training.step import ForwardConfig, ForwardSchedule
from sst_jax.types import Json

# Former name of a knob -> its name: recipe files, flags and run folders may still use the former one.
RENAMED: dict[str, str] = {"stream.prompt": "stream.iterate_prompt"}
# A knob that is no more -> the value that meant what happens without it.
RETIRED: Json = {}
QUOTES = "'\""

PACKAGE = pathlib.Path(__file__).parents[1]


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A run, section by section; see the sections for their knobs."""

    model: SourceConfig
    stream: StreamSection
    adapter: AdapterConfig
    optimizer: OptimizerConfig
    data: DataConfig
    mesh: MeshConfig
    train: TrainConfig

    def __post_init__(self) -> None:
        steps, accumulate, stream = self.train.steps, self.optimizer.accumulate, self.stream.config
        if steps % accumulate:
            raise InputError(
                f"train.steps={steps} must be a multiple of optimizer.accumulate={accumulate}: the "
                "micro-batches left over would change nothing"
            )
        if stream is not None and stream.layers == ():
            raise InputError("stream.layers is empty: a stream needs a layer that carries it")
        if self.adapter.rank and not self.adapter.targets:
            raise InputError(f"adapter.rank={self.adapter.rank} needs linears: adapter.targets is empty")
        if stream is not None and stream.alpha is not None and stream.alpha_warmup:
            raise InputError(f"stream.alpha_warmup={stream.alpha_warmup} is for a learned alpha; stream.alpha fixes it")
        for forward in (self.forward, self.heldout_forward):
            check_links(stream, bind(forward.forward, forward.passes, forward.depth))

    @property
    def forward(self) -> ForwardConfig:
        """The forward that trains."""
        return self.stream.forward(self.train.remat, self.model.dtype, self.model.attention)

    @property
    def heldout_forward(self) -> ForwardConfig:
        """The forward that held-out losses are evaluated with."""
        name, forward = self.train.eval_forward if self.stream.on else "plain", self.forward
        # With the passes of training where the same forward trains, else with the forward's own.
        passes = forward.passes if name == forward.forward else ForwardSchedule.passes
        return ForwardConfig(name, passes=passes, remat="none", dtype=self.model.dtype, attention=self.model.attention)

    def with_schedule(self, schedule: ForwardSchedule) -> Recipe:
        """Return the recipe that trains by this schedule."""
        own = ForwardSchedule(**{name: getattr(schedule, name) for name in field_defaults(ForwardSchedule)})
        return dataclasses.replace(self, stream=dataclasses.replace(self.stream, schedule=own))

    def model_config(self, backbone: BackboneConfig, bos_id: int | None = None) -> ModelConfig:
        """Return the config of the model that trains on this backbone, with its tokenizer's `bos_id`."""
        if self.model.attention_window:
            try:
                backbone = dataclasses.replace(backbone, attention_window=self.model.attention_window)
            except InputError as error:
                raise InputError(f"model.{error}") from None
        return ModelConfig(backbone, self.stream.config, self.adapter, bos_id, self.model.dtype)

    def to_json(self) -> Json:
        """Return the recipe as its run records it: without the mesh and the loggers, which may change on the way."""
        sections = {
            "model": dataclasses.asdict(self.model),
            "stream": self.stream.to_knobs(),
            "adapter": dataclasses.asdict(self.adapter),
            "optimizer": dataclasses.asdict(self.optimizer),
            "data": dataclasses.asdict(self.data),
            "train": {key: value for key, value in dataclasses.asdict(self.train).items() if key != "loggers"},
        }
        return json.loads(json.dumps(sections))


def with_attention_kernel(recipe: Recipe, pick: Callable[[str, str], str]) -> Recipe:
    """Return the recipe with attention="auto" decided by `pick(attention, dtype)`."""
    model = recipe.model
    return dataclasses.replace(recipe, model=dataclasses.replace(model, attention=pick(model.attention, model.dtype)))


class Section(ConfigDict):
    """The knobs of a section, which are found by their former names too."""

    def __init__(self, knobs: Json | None = None, name: str = ""):
        object.__setattr__(self, "_name", name)
        super().__init__(knobs)

    def __setitem__(self, key: str, value: object) -> None:
        super().__setitem__(self._current(key), value)

    def __getitem__(self, key: str) -> Any:
        return super().__getitem__(self._current(key))

    def _current(self, key: str) -> str:
        return current_name(f"{self._name}.{key}").removeprefix(f"{self._name}.")


def current_name(key: str) -> str:
    """Return the name of a knob, "section.knob", given it or a former one; a former one brings a warning."""
    if key in RENAMED:
        warnings.warn(f"the knob {key} is {RENAMED[key]} now", FutureWarning, stacklevel=2)
    return RENAMED.get(key, key)


def defaults() -> ConfigDict:
    """Return all knobs with their defaults, locked; a recipe file sets those that it is about."""
    sections = {
        "model": _knobs(SourceConfig),
        "stream": stream_knobs(),
        "adapter": _knobs(AdapterConfig),
        "optimizer": _knobs(OptimizerConfig),
        "data": _knobs(DataConfig),
        "mesh": _knobs(MeshConfig),
        "train": _knobs(TrainConfig),
    }
    return ConfigDict({name: Section(knobs, name) for name, knobs in sections.items()}).lock()


def stream_knobs() -> Json:
    """Return the knobs of the section `stream` with their defaults."""
    return {**_knobs(StreamConfig), "on": True, **_knobs(ForwardSchedule)}


def _knobs(section: type) -> Json:
    """Return a section's knobs; those whose default is None get the type that a value would have."""
    optional = {"alpha": config_dict.placeholder(float), "layers": config_dict.placeholder(tuple)}
    optional["links"] = config_dict.placeholder(tuple)
    return {name: optional[name] if value is None else value for name, value in field_defaults(section).items()}


def default_record() -> Json:
    """Return all knobs with their defaults as a run would record them."""
    record = json.loads(defaults().to_json_best_effort())
    del record["mesh"], record["train"]["loggers"]
    return record


def resolve(config: ConfigDict) -> Recipe:
    """Check a recipe's knobs and freeze them.

    Raises: InputError naming the knob.
    """
    if "kind" in config:
        raise InputError(
            f"this recipe trains from scratch (kind={config.kind!r}): `python -m sst_jax.train` alone takes it"
        )
    knobs: dict[str, Json] = config.to_dict()
    return Recipe(
        model=from_mapping(SourceConfig, knobs["model"]),
        stream=StreamSection.from_knobs(knobs["stream"]),
        adapter=from_mapping(AdapterConfig, knobs["adapter"]),
        optimizer=from_mapping(OptimizerConfig, knobs["optimizer"]),
        data=from_mapping(DataConfig, knobs["data"]),
        mesh=from_mapping(MeshConfig, knobs["mesh"]),
        train=from_mapping(TrainConfig, knobs["train"]),
    )


def recipe_folder() -> pathlib.Path:
    """Return the folder of the recipes that come with the package: `configs/` of a checkout, its copy in a wheel."""
    folder = PACKAGE / "recipes"
    return folder if folder.is_dir() else PACKAGE.parent / "configs"


def recipe_names() -> list[str]:
    """Return the names of the recipes that come with the package."""
    return sorted(file.stem for file in recipe_folder().glob("*.py") if file.stem != "__init__")


def find_file(name: str) -> pathlib.Path:
    """Return the file of a recipe: one that exists, or, as NAME or configs/NAME.py, one that the package carries.

    Raises: InputError with the names of those.
    """
    file = pathlib.Path(name).expanduser()
    if file.is_file():
        return file
    if name.removeprefix("configs/").removesuffix(".py") in recipe_names():
        return recipe_folder() / f"{file.stem}.py"
    raise InputError(
        f"--config {name} does not exist; the recipes that come with sst_jax are {', '.join(recipe_names())}"
    )


def _renamed(override: str) -> str:
    """Return an override under the name that its knob has now."""
    key, equals, value = override.removeprefix("--config.").partition("=")
    return f"--config.{current_name(key)}{equals}{value}"


def read_recipe(path: str, overrides: Json | Sequence[str] = ()) -> Recipe:
    """Return the recipe at `path`, checked: `read`, then `resolve`.

    Args:
        path: a recipe file, with an optional :argument, as --config takes it.
        overrides: knobs by their dotted names, {"train.steps": 200}, or flags as --config.train.steps=200.

    Raises: InputError naming the file, the knob or the value.
    """
    if isinstance(overrides, Mapping):
        overrides = [f"--config.{key}={value}" for key, value in overrides.items()]
    return resolve(read(path, overrides))


def read(path: str, overrides: Sequence[str] = ()) -> ConfigDict:
    """Return the knobs of the recipe at `path` (with an optional :argument) with `--config.key=value` overrides.

    A recipe is a Python file that the user names, the one place where code is run on request.

    Raises: InputError naming the file, the knob or the value.
    """
    name, colon, argument = path.partition(":")
    values = flags.FlagValues()
    command_line = ["train", f"--config={find_file(name)}{colon}{argument}", *map(_renamed, overrides)]
    config_flags.DEFINE_config_file("config", flag_values=values, lock_config=True, sys_argv=command_line)
    kept, sys.dont_write_bytecode = sys.dont_write_bytecode, True  # or a file edited within a second may run as before
    try:
        rest = values(command_line)
    except InputError:
        raise
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError) as error:
        # ConfigDict wraps its message in quotes of its own; one line is promised.
        text = str(error).replace("\\n", " ").replace("\\'", "'")
        if whole := re.fullmatch(r"(['\"])(.*)\1", text, flags=re.DOTALL):  # the message's repr
            text = whole[2] if " " in whole[2] else f"there is no knob {whole[2].strip(QUOTES)}"
        text = text.rpartition("ValueError: ")[2]  # a recipe's own words, behind the traceback that absl puts before
        raise InputError(f"recipe {path}: {' '.join(text.split()) or type(error).__name__}") from None
    finally:
        sys.dont_write_bytecode = kept
    if len(rest) > 1:
        raise InputError(f"unknown argument {rest[1]!r}; knobs are set with --config.KEY=VALUE")
    return values.config


def recorded(config: ConfigDict) -> Json:
    """Return knobs as a run records them: `Recipe.to_json`."""
    return resolve(config).to_json()
