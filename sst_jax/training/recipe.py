"""Recipes: every knob of a training run with its default, as a locked ConfigDict, and its way into dataclasses.

A file in `configs/` calls `defaults()`, sets what it is about and returns it; a misspelt knob is an error there and on
the command line. A section of a recipe is a frozen dataclass that checks itself: its docstring is the place where its
knobs are documented, its defaults are theirs. `Recipe` holds the sections and checks them against one another.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_dict, config_flags

from sst_jax.data import datasets
from sst_jax.data.prompts import FORMATS
from sst_jax.errors import InputError
from sst_jax.model import rules
from sst_jax.model.config import AdapterConfig, BackboneConfig, ModelConfig, StreamConfig, from_mapping
from sst_jax.model.quantization import storages
from sst_jax.model.sharding import MeshConfig
from sst_jax.training.optimizer import OptimizerConfig
from sst_jax.training.step import ForwardConfig, ForwardSchedule
from sst_jax.types import Json

DTYPES = ("float32", "bfloat16")

# Former name of a knob -> its name: recipe files, flags and run folders may still use the former one.
RENAMED: dict[str, str] = {"stream.prompt": "stream.iterate_prompt"}
# A knob that is no more -> the value that meant what happens without it.
RETIRED: Json = {}

PACKAGE = pathlib.Path(__file__).parents[1]


@dataclasses.dataclass(frozen=True)
class SourceConfig:
    """Section `model`: the frozen base.

    source     a folder, a hub id, a GGUF file, "package:NAME" or "random:PRESET"
    dtype      type of the base and of activations: "float32" or "bfloat16"
    quantize   storage of the base's linears: "none", "nf4" or "nf4_double"
    attention  kernel that attends over whole sequences: "auto", "xla", "cudnn" or "splash" (`model/kernels.py`)
    """

    source: str = ""
    dtype: str = "bfloat16"
    quantize: str = "none"
    attention: str = "auto"

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise InputError(f"model.dtype={self.dtype!r} is not one of {', '.join(map(repr, DTYPES))}")
        if self.quantize not in storages.kinds():
            raise InputError(f"model.quantize={self.quantize!r} is not one of {', '.join(storages.kinds())}")
        if not self.source:
            raise InputError("model.source is empty: set --config.model.source to a folder, a hub id or a GGUF file")


@dataclasses.dataclass(frozen=True)
class StreamSection:
    """Section `stream`, whose knobs stand side by side in a recipe: `on`, those of `StreamConfig`, those of
    `ForwardSchedule`.

    on        whether the model has a stream; without it the plain backbone trains its adapter
    state     the mechanism
    schedule  which forward trains it at which step
    """

    on: bool = True
    state: StreamConfig = dataclasses.field(default_factory=StreamConfig)
    schedule: ForwardSchedule = dataclasses.field(default_factory=ForwardSchedule)

    @classmethod
    def from_knobs(cls, knobs: Json) -> StreamSection:
        """Return the section of a recipe's knobs.

        Raises: InputError naming the knob.
        """
        scheduling = _defaults(ForwardSchedule)
        return cls(
            knobs["on"],
            from_mapping(StreamConfig, {key: value for key, value in knobs.items() if key not in ("on", *scheduling)}),
            from_mapping(ForwardSchedule, {key: knobs[key] for key in scheduling}),
        )

    def to_knobs(self) -> Json:
        """Return the knobs as `from_knobs` takes them."""
        return {**dataclasses.asdict(self.state), "on": self.on, **dataclasses.asdict(self.schedule)}

    @property
    def config(self) -> StreamConfig | None:
        """The mechanism, None where it is off."""
        return self.state if self.on else None

    def forward(self, remat: str, dtype: str = "float32", attention: str = "xla") -> ForwardConfig:
        """Return the forward that trains: the schedule's, "plain" without a stream; computed as ForwardConfig says."""
        schedule: Json = dataclasses.asdict(self.schedule) if self.on else {"forward": "plain"}
        return ForwardConfig(**schedule, remat=remat, dtype=dtype, attention=attention)


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Section `data`: what is learned, and how it is put into rows.

    name        a data set of `data/datasets.py` that has problems to train on, such as "gsm8k", "words" (the embedded
                word problems) or the stories "boxes:1-4"; or "auto" (gsm8k where a path is given, else words). With
                ":result" behind gsm8k, words and auto only the result is learned, without the steps.
    path        a folder with the data set's files, or a hub id
    length      positions of a row
    batch_size  rows of a batch
    pack        whether a row holds several documents
    format      "plain" or "chat"
    heldout     examples kept out of training by seed, for the loss before, during and after; of GSM8K they come from
                the training split, the test split is never read here
    limit       use at most so many training examples (0: all)
    overlong    what an example that does not fit a row is: an "error", or left out ("drop")
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
        dataset = datasets.find(self.dataset)
        if dataset is None or not dataset.source.trains:
            known = ", ".join(map(repr, ("auto", *datasets.names(lambda dataset: dataset.source.trains))))
            raise InputError(f"data.name={self.name!r} is not one of {known}")
        for field in ("length", "batch_size", "heldout"):
            if getattr(self, field) < 1:
                raise InputError(f"data.{field}={getattr(self, field)} must be at least 1")
        if self.limit < 0:
            raise InputError(f"data.limit={self.limit} must not be negative; 0 is all")
        if self.format not in FORMATS:
            raise InputError(f"data.format={self.format!r} is not one of {', '.join(map(repr, FORMATS))}")

    @property
    def dataset(self) -> str:
        """`name`, with "auto" decided."""
        kind, colon, part = self.name.partition(":")
        return ("gsm8k" if self.path else "words") + colon + part if kind == "auto" else self.name


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Section `train`: how long a run is, and what it measures and keeps on its way.

    steps          batches that are trained on
    seed           of the data's order, of fresh parameters, of dropout and of drawn forwards
    log_every      steps between two lines of metrics.jsonl
    eval_every     steps between two held-out losses
    eval_forward   forward that the held-out loss is evaluated with; without a stream it is "plain"
    save_every     steps between two checkpoints
    keep           checkpoints that stay
    remat          activations kept for the backward pass, see `decoder.REMAT`
    max_skipped    steps skipped one after another, for numbers that are not finite, that end the run
    sample_tokens  length of the answers written at the end
    """

    steps: int = 100
    seed: int = 0
    log_every: int = 1
    eval_every: int = 50
    eval_forward: str = "exact"
    save_every: int = 50
    keep: int = 2
    remat: str = "layer"
    max_skipped: int = 10
    sample_tokens: int = 64

    def __post_init__(self) -> None:
        for field in ("steps", "log_every", "eval_every", "save_every", "keep", "max_skipped", "sample_tokens"):
            if getattr(self, field) < 1:
                raise InputError(f"train.{field}={getattr(self, field)} must be at least 1")
        if self.seed < 0:
            raise InputError(f"train.seed={self.seed} must not be negative")
        if self.eval_forward not in rules.FORWARDS:
            raise InputError(f"train.eval_forward={self.eval_forward!r} is not one of {', '.join(rules.FORWARDS)}")


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
        _ = self.forward, self.heldout_forward  # their checks

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
        own = ForwardSchedule(**{name: getattr(schedule, name) for name in _defaults(ForwardSchedule)})
        return dataclasses.replace(self, stream=dataclasses.replace(self.stream, schedule=own))

    def model_config(self, backbone: BackboneConfig, bos_id: int | None = None) -> ModelConfig:
        """Return the config of the model that trains on this backbone, with its tokenizer's `bos_id`."""
        return ModelConfig(backbone, self.stream.config, self.adapter, bos_id, self.model.dtype)

    def to_json(self) -> Json:
        """Return the recipe as its run records it: without the mesh, as a run resumes on any number of devices."""
        sections = {
            "model": dataclasses.asdict(self.model),
            "stream": self.stream.to_knobs(),
            "adapter": dataclasses.asdict(self.adapter),
            "optimizer": dataclasses.asdict(self.optimizer),
            "data": dataclasses.asdict(self.data),
            "train": dataclasses.asdict(self.train),
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


def _defaults(section: type) -> Json:
    """Return a dataclass's fields with their defaults, unchecked: a recipe without a source is none yet."""
    return {field.name: field.default for field in dataclasses.fields(section)}


def _knobs(section: type) -> Json:
    """Return a section's knobs; those whose default is None get the type that a value would have."""
    optional = {"alpha": config_dict.placeholder(float), "layers": config_dict.placeholder(tuple)}
    return {name: optional[name] if value is None else value for name, value in _defaults(section).items()}


def default_record() -> Json:
    """Return all knobs with their defaults as a run would record them."""
    record = json.loads(defaults().to_json_best_effort())
    del record["mesh"]
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
    file = pathlib.Path(name)
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
    try:
        rest = values(command_line)
    except InputError:
        raise
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError) as error:
        # ConfigDict wraps its message in quotes of its own; one line is promised.
        text = str(error).replace("\\n", " ").replace("\\'", "'").strip("'\"")
        text = text.rpartition("ValueError: ")[2]  # a recipe's own words, behind the traceback that absl puts before
        raise InputError(f"recipe {path}: {' '.join(text.split()) or type(error).__name__}") from None
    if len(rest) > 1:
        raise InputError(f"unknown argument {rest[1]!r}; knobs are set with --config.KEY=VALUE")
    return values.config


def recorded(config: ConfigDict) -> Json:
    """Return knobs as a run records them: `Recipe.to_json`."""
    return resolve(config).to_json()
