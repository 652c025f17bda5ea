"""From what a user calls a model to a config, parameters and a tokenizer.

`resolve` turns a name into a `Reference`, one class for each thing that MODEL may be: a Hugging Face folder, a hub id,
a GGUF file, a base folder (`convert`, `Model.save`), a run folder (`train`), whatever `export` wrote, `package:NAME`
(weights that a Python package carries) or `random:PRESET` (random weights from a fixed seed). A reference knows type
and backbone from headers, and opens the model.
"""

from __future__ import annotations

import abc
import contextlib
import dataclasses
import functools
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from sst_jax.data.records import is_hub_id, split_revision
from sst_jax.data.tokenizer import adapter_tokenizer
from sst_jax.errors import InputError
from sst_jax.families.registry import HUB_NAMES
from sst_jax.files import check_no_pointer, read_json
from sst_jax.model import decoder, sharding
from sst_jax.model.config import BackboneConfig, ModelConfig
from sst_jax.types import Json
from sst_jax.weights import export_format, gguf, huggingface, peft, store
from sst_jax.weights.checkpoint import chosen_step, restore_trainable
from sst_jax.weights.provenance import BaseRecord, Provenance
from sst_jax.weights.references import (
    BaseFolder,
    GgufFile,
    HuggingFaceFolder,
    LoadedModel,
    RandomPreset,
    Reference,
    VisionTower,
)
from sst_jax.weights.run_tokenizer import run_tokenizer
from sst_jax.weights.source import Source

RUN_FILES = ("config.json", "base.json")


class HubId(Reference):
    """A repository of the Hugging Face hub, "owner/name" or "owner/name@revision"; it is fetched when more is asked
    than its name tells.

    base: as `resolve` takes it.
    """

    def __init__(self, name: str, base: str | Path | None = None):
        repository, self.asked = split_revision(name)
        super().__init__(repository)
        self.name, self.base_name = name, base

    @functools.cached_property
    def folder(self) -> Reference:
        """The folder of its snapshot, which is downloaded unless it is cached.

        Raises: InputError as `huggingface.resolve_hub`; a mistyped path may look like an id, so the error says that
        there is no such folder.
        """
        try:
            path = huggingface.resolve_hub(self.location, self.asked)
        except InputError as error:
            raise InputError(f"there is no folder {self.name} here, and as a hub id {error}") from error
        # A snapshot lies in a folder named after its commit.
        return _foreign_folder(path, self.location, path.name, self.base_name)

    @property
    def revision(self) -> str | None:  # type: ignore[override]  # read-only here
        return self.folder.revision

    @property
    def dtype(self) -> str:
        return self.folder.dtype

    @property
    def backbone(self) -> BackboneConfig:
        """The backbone by the size in the name; nothing is fetched for it."""
        name = self.location.lower()
        other = "(?!-(?:mini|multimodal))"  # Phi-4-mini is no Phi-4
        named = [preset for part, preset in HUB_NAMES.items() if re.search(rf"\b{re.escape(part)}\b{other}", name)]
        if not named:
            raise InputError(
                f"{self.location} does not exist here, and its name does not tell its size (gemma-3-1b and the like do)"
            )
        return named[0]

    @property
    def source(self) -> Source | None:
        return self.folder.source

    def vision(self) -> VisionTower:
        return self.folder.vision()

    def read(self, dtype: str, quantize: str, lazy: bool) -> LoadedModel:
        return self.folder.read(dtype, quantize, lazy)


class OnABase(Reference):
    """What stands on a base that lies elsewhere: an adapter, a training run.

    Attributes:
      path: its folder.
      elsewhere: MODEL that is taken for the base; None: what the folder records.
    """

    what = ""  # it is, in messages
    record_file = ""  # that says which base

    def __init__(self, path: Path, base: str | Path | None = None):
        super().__init__(str(path.resolve()))
        self.path, self.elsewhere = path, base

    @property
    @abc.abstractmethod
    def records(self) -> list[BaseRecord]:
        """What the folder says of its base: a record for each name that it has, the first one the best.

        Raises: InputError where it says nothing.
        """

    @functools.cached_property
    def base(self) -> tuple[Reference, BaseRecord]:
        """The base, found under the first name that is there, and the record with this name; no weights are read.

        Raises: InputError where none is.
        """
        records = self.records
        if self.elsewhere is not None:
            records = [records[0]._replace(path=str(self.elsewhere), revision=None)]
        try:
            return find_recorded(records)
        except InputError as error:
            first = records[0].path
            shown = f"{first} (from {self.record_file})" if self.record_file == "base.json" else first
            advice = "" if self.elsewhere else "; --base names another place of it"
            raise InputError(
                f"the base of {self.what} {self.path}, {shown}, cannot be opened: {error}{advice}"
            ) from None

    def open_base(self, dtype: str, quantize: str, lazy: bool) -> LoadedModel:
        """Return the base.

        Args:
          dtype: as `Reference.open` takes it.
          quantize: the storage of its linears, where the folder records none.
          lazy: as `Reference.open` takes it.

        Raises: InputError where it cannot be opened, or has another digest than the folder records.
        """
        reference, recorded = self.base
        if isinstance(reference, RandomPreset):
            reference = reference.recorded_as(recorded.digest)
        with _naming(f"the base of {self.what} {self.path}, {recorded.path},"):
            opened = reference.open(dtype, recorded.quantize or quantize, lazy=lazy)
        if recorded.digest is not None:
            check_base(self.path, self.record_file, recorded, opened.provenance)
        return opened


class AdapterFolder(OnABase):
    """A PEFT folder with LoRA over a base that lies elsewhere, and possibly a stream beside."""

    what, record_file = "adapter", export_format.STREAM_CONFIG

    @functools.cached_property
    def records(self) -> list[BaseRecord]:
        return peft.bases_of(self.path)

    @property
    def dtype(self) -> str:
        return self.base[0].dtype

    @property
    def backbone(self) -> BackboneConfig:
        return self.base[0].backbone

    def read(self, dtype: str, quantize: str, lazy: bool) -> LoadedModel:
        opened = self.open_base(dtype, quantize, lazy)
        bundle = peft.read_folder(self.path, opened.config.backbone)
        params = {"base": opened.params["base"], **sharding.device_put_sharded(bundle.params)}
        provenance = dataclasses.replace(opened.provenance, adapter=self.location, prompt_format=bundle.prompt_format)
        return LoadedModel(bundle.config, params, adapter_tokenizer(self.path, opened.tokenizer), provenance)


class RunFolder(OnABase):
    """A training run: its latest good checkpoint over its base."""

    what, record_file = "run", "base.json"

    @functools.cached_property
    def records(self) -> list[BaseRecord]:
        file = self.path / "base.json"
        content = read_json(file)
        for key in ("path", "digest"):
            if content.get(key) is None:
                raise InputError(f"{file} lacks the key {key}")
        return [BaseRecord.from_json(content, str(file))]

    @property
    def dtype(self) -> str:
        return self.base[0].dtype

    @property
    def backbone(self) -> BackboneConfig:
        return ModelConfig.from_dict(read_json(self.path / "config.json").get("model_config", {})).backbone

    def read(self, dtype: str, quantize: str, lazy: bool) -> LoadedModel:
        path, content = self.path, read_json(self.path / "config.json")
        recipe, prompt_format = _recipe_of(content, path / "config.json")
        if recipe and "kind" in recipe:
            models = sorted(str(folder) for folder in path.glob("*/models/*"))
            advice = f"give one of them, such as {models[0]}" if models else "its result.json is what there is"
            raise InputError(f"{path} trained tiny models from scratch (kind={recipe['kind']!r}): {advice}")
        if "model_config" not in content:
            raise InputError(f"{path / 'config.json'} lacks the key model_config")
        step = chosen_step(path)
        if step is None:
            raise InputError(
                f"{path}: no usable checkpoint under checkpoints/; train on, or restore a copy of the folder"
            )
        opened = self.open_base(dtype, "none", lazy)
        tokenizer = run_tokenizer(path, opened.tokenizer, content, prompt_format)
        config = ModelConfig.from_dict(content["model_config"])
        own, there = (dataclasses.replace(each.backbone, attention_window=None) for each in (config, opened.config))
        if own != there:
            raise InputError(f"{path / 'config.json'}: its backbone is not that of the base, {self.base[1].path}")
        shapes = decoder.abstract_params(config)
        trainable = restore_trainable(path, step, {name: shapes[name] for name in ("adapter", "blend")})
        provenance = dataclasses.replace(
            opened.provenance,
            run=self.location,
            step=step,
            recipe=recipe,
            prompt_format=prompt_format,
            started_from=content.get("started_from"),
        )
        return LoadedModel(config, {"base": opened.params["base"], **trainable}, tokenizer, provenance)


def _recipe_of(content: Json, where: Path) -> tuple[Json | None, str | None]:
    """Return the recipe in a run's config.json, and how it puts questions to the model; None where it does not say."""
    recipe = content.get("recipe")
    data = recipe.get("data") if isinstance(recipe, dict) else None
    format = data.get("format") if isinstance(data, dict) else None
    for name, value, kind in (
        ("recipe", recipe, dict),
        ("recipe.data", data, dict),
        ("recipe.data.format", format, str),
    ):
        if not isinstance(value, kind | None):
            raise InputError(f"{where}: {name}={value!r} is malformed")
    return recipe, format


def resolve(model: str | Path, base: str | Path | None = None) -> Reference:
    """Return what MODEL refers to, without reading weights.

    Args:
        model: the name.
        base: MODEL that a run or an adapter is opened on, in place of the one that it records; its digest must be the
            recorded one. None: as recorded.

    Raises: InputError where it is none of the things that MODEL may be, or stands on no base that `base` could replace.
    """
    reference = _resolve(str(model), base)
    if base is not None and not isinstance(reference, OnABase | HubId):
        raise _stands_alone(str(model), base)
    return reference


def _stands_alone(model: str, base: str | Path) -> InputError:
    return InputError(f"--base {base}: {model} is no run and no adapter, and stands on no other base")


def _resolve(name: str, base: str | Path | None) -> Reference:
    kind, _, rest = name.partition(":")
    if kind == "package" and rest:
        return GgufFile(gguf.package(rest.replace("-", "_")), name)
    if kind == "random" and rest:
        return RandomPreset(name)
    path = Path(name).expanduser()
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: of a name with a null character
        pass
    except OSError as error:  # a name that is too long, a folder that may not be read
        raise InputError(f"{name[:80]}{'...' * (len(name) > 80)}: {error.strerror}") from None
    if path.is_file():
        check_no_pointer(path)
        if gguf.is_gguf(path):
            return GgufFile(path)
        if path.suffix in (".safetensors", ".json"):
            raise InputError(f"{path} is one file of a model: give the folder that holds it, {path.parent}")
        raise InputError(f"{path} is a file, but not a GGUF file: give a .gguf file, or a folder with config.json")
    if path.is_dir():
        if store.is_base_folder(path):
            return BaseFolder(path)
        if is_run_folder(path):
            return RunFolder(path, base)
        return _foreign_folder(path, base=base)
    if is_hub_id(name):
        return HubId(name, base)
    raise InputError(f"{name} does not exist: give a folder, a .gguf file, a run folder or a hub id (owner/name)")


def _foreign_folder(
    path: Path, location: str | None = None, revision: str | None = None, base: str | Path | None = None
) -> Reference:
    if peft.is_adapter_folder(path):
        return AdapterFolder(path, base)
    if base is not None:
        raise _stands_alone(location or str(path), base)
    if (path / "config.json").is_file():
        return HuggingFaceFolder(path, location, revision)
    if files := sorted(file.name for file in path.iterdir() if file.suffix.lower() == ".gguf"):
        raise InputError(f"{path} holds GGUF files: give the file, such as {path / files[0]}")
    raise InputError(
        f"{path} is neither a Hugging Face folder (config.json), an adapter ({peft.CONFIG}), a converted folder "
        f"({store.HEADER}) nor a training run (base.json)"
    )


def names_of(record: BaseRecord) -> list[str]:
    """Return the names of a recorded base: a hub id at its revision, and where a digest guards it at any."""
    if record.revision is None or "@" in record.path or not is_hub_id(record.path) or os.path.isdir(record.path):
        return [record.path]
    return [f"{record.path}@{record.revision}", *([record.path] if record.digest is not None else [])]


def find_recorded(records: Sequence[BaseRecord]) -> tuple[Reference, BaseRecord]:
    """Return what records refer to, under the first of their names that is there, and the record with that name.

    Raises: InputError of the first name, where none is there.
    """
    failures: list[InputError] = []
    for record in records:
        for name in names_of(record):
            try:
                return find(name), record
            except InputError as error:
                failures.append(error)
    raise failures[0]


def find(name: str) -> Reference:
    """Return what a name refers to; of a hub id once its files are there."""
    reference = resolve(name)
    return reference.folder if isinstance(reference, HubId) else reference


def open_model(
    model: str | Path,
    dtype: str | None = None,
    quantize: str = "none",
    *,
    lazy: bool = False,
    base: str | Path | None = None,
) -> LoadedModel:
    """Open whatever MODEL refers to; the arguments are those of `resolve` and `Reference.open`."""
    return resolve(model, base).open(dtype, quantize, lazy=lazy)


def is_run_folder(path: Path) -> bool:
    """Return whether a folder holds a training run."""
    return all((path / name).is_file() for name in RUN_FILES)


@contextlib.contextmanager
def _naming(what: str) -> Iterator[None]:
    """Let errors say what could not be opened."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{what} cannot be opened: {error}") from None


def check_base(path: Path, file: str, recorded: BaseRecord, base: Provenance) -> None:
    """Raise InputError where a base is not the one that a run or adapter, by its `file`, was trained on."""
    if recorded.digest != base.digest:
        raise InputError(
            f"{recorded.path} is not the base that {path} was trained on: its digest is {str(base.digest)[:12]}, "
            f"{file} records {str(recorded.digest)[:12]}"
        )
