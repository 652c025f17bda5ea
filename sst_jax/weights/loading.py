"""From what a user calls a model to a config, parameters and a tokenizer.

`resolve` turns a name into a `Reference`, one class for each thing that MODEL may be: a Hugging Face folder, a hub id,
a GGUF file, a base folder (`convert`, `Model.save`), a run folder (`train`), whatever `export` wrote, `package:NAME`
(weights that a Python package carries) or `random:PRESET` (random weights from a fixed seed). A reference knows type
and backbone from headers, and opens the model.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import re
from collections.abc import Iterator
from pathlib import Path

from sst_jax.errors import InputError
from sst_jax.families.registry import HUB_NAMES
from sst_jax.files import read_json
from sst_jax.model import decoder, sharding
from sst_jax.model.config import BackboneConfig, ModelConfig
from sst_jax.types import Json
from sst_jax.weights import export_format, gguf, huggingface, peft, store
from sst_jax.weights.checkpoint import newest_good, restore_trainable
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
from sst_jax.weights.source import Source

RUN_FILES = ("config.json", "base.json")


class HubId(Reference):
    """A repository of the Hugging Face hub; it is fetched when more is asked than its name tells."""

    @functools.cached_property
    def folder(self) -> Reference:
        """The folder of its snapshot, which is downloaded unless it is cached.

        Raises: InputError as `huggingface.resolve_hub`; a mistyped path may look like an id, so the error says that
        there is no such folder.
        """
        try:
            path = huggingface.resolve_hub(self.location)
        except InputError as error:
            raise InputError(f"there is no folder {self.location} here, and as a hub id {error}") from error
        return _foreign_folder(path, self.location)

    @property
    def dtype(self) -> str:
        return self.folder.dtype

    @property
    def backbone(self) -> BackboneConfig:
        """The backbone by the size in the name; nothing is fetched for it."""
        name = self.location.lower()
        named = [preset for part, preset in HUB_NAMES.items() if re.search(rf"\b{re.escape(part)}\b", name)]
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


class AdapterFolder(Reference):
    """A PEFT folder with LoRA over a base that lies elsewhere, and possibly a stream beside."""

    def __init__(self, path: Path):
        super().__init__(str(path.resolve()))
        self.path = path

    @property
    def base(self) -> Reference:
        with _naming(f"the base of adapter {self.path}, {peft.base_of(self.path).path},"):
            return resolve(peft.base_of(self.path).path)

    @property
    def dtype(self) -> str:
        return self.base.dtype

    @property
    def backbone(self) -> BackboneConfig:
        return self.base.backbone

    def read(self, dtype: str, quantize: str, lazy: bool) -> LoadedModel:
        recorded = peft.base_of(self.path)
        with _naming(f"the base of adapter {self.path}, {recorded.path},"):
            opened = _resolve_recorded(recorded).open(dtype, recorded.quantize or quantize, lazy=lazy)
        if recorded.digest is not None:
            check_base(self.path, export_format.STREAM_CONFIG, recorded, opened.provenance)
        bundle = peft.read_folder(self.path, opened.config.backbone)
        params = {"base": opened.params["base"], **sharding.device_put_sharded(bundle.params)}
        provenance = dataclasses.replace(opened.provenance, adapter=self.location, prompt_format=bundle.prompt_format)
        return LoadedModel(bundle.config, params, opened.tokenizer, provenance)


class RunFolder(Reference):
    """A training run: its latest good checkpoint over its base."""

    def __init__(self, path: Path):
        super().__init__(str(path.resolve()))
        self.path = path

    @property
    def recorded(self) -> BaseRecord:
        """base.json; raises InputError unless it names a path and a digest."""
        file = self.path / "base.json"
        content = read_json(file)
        for key in ("path", "digest"):
            if content.get(key) is None:
                raise InputError(f"{file} lacks the key {key}")
        return BaseRecord.from_json(content, str(file))

    @property
    def dtype(self) -> str:
        with _naming(f"the base of run {self.path}, {self.recorded.path} (from base.json),"):
            return resolve(self.recorded.path).dtype

    @property
    def backbone(self) -> BackboneConfig:
        return ModelConfig.from_dict(read_json(self.path / "config.json").get("model_config", {})).backbone

    def read(self, dtype: str, quantize: str, lazy: bool) -> LoadedModel:
        path, recorded, content = self.path, self.recorded, read_json(self.path / "config.json")
        recipe, prompt_format = _recipe_of(content, path / "config.json")
        if recipe and "kind" in recipe:
            raise InputError(
                f"{path} trained tiny models from scratch (kind={recipe['kind']!r}), which are not kept: its "
                "result.json is what there is"
            )
        if "model_config" not in content:
            raise InputError(f"{path / 'config.json'} lacks the key model_config")
        step = newest_good(path)
        if step is None:
            raise InputError(
                f"{path}: no usable checkpoint under checkpoints/; train on, or restore a copy of the folder"
            )
        with _naming(f"the base of run {path}, {recorded.path} (from base.json),"):
            opened = _resolve_recorded(recorded).open(dtype, recorded.quantize or "none", lazy=lazy)
        check_base(path, "base.json", recorded, opened.provenance)
        config = ModelConfig.from_dict(content["model_config"])
        if config.backbone != opened.config.backbone:
            raise InputError(f"{path / 'config.json'}: its backbone is not that of the base, {recorded.path}")
        shapes = decoder.abstract_params(config)
        trainable = restore_trainable(path, step, {name: shapes[name] for name in ("adapter", "blend")})
        provenance = dataclasses.replace(
            opened.provenance,
            run=self.location,
            step=step,
            recipe=recipe,
            prompt_format=prompt_format,
        )
        return LoadedModel(config, {"base": opened.params["base"], **trainable}, opened.tokenizer, provenance)


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


def resolve(model: str | Path) -> Reference:
    """Return what MODEL refers to, without reading weights.

    Raises: InputError where it is none of the things that MODEL may be.
    """
    name = str(model)
    kind, _, rest = name.partition(":")
    if kind == "package" and rest:
        return GgufFile(gguf.package(rest.replace("-", "_")), name)
    if kind == "random" and rest:
        return RandomPreset(name)
    path = Path(name).expanduser()
    if path.is_file():
        if path.suffix == ".gguf":
            return GgufFile(path)
        raise InputError(f"{path} is a file, but not a .gguf: give the folder that holds it")
    if path.is_dir():
        if store.is_base_folder(path):
            return BaseFolder(path)
        if is_run_folder(path):
            return RunFolder(path)
        return _foreign_folder(path)
    if is_hub_id(name):
        return HubId(name)
    raise InputError(f"{name} does not exist: give a folder, a .gguf file, a run folder or a hub id (owner/name)")


def _foreign_folder(path: Path, location: str | None = None) -> Reference:
    if peft.is_adapter_folder(path):
        return AdapterFolder(path)
    if (path / "config.json").is_file():
        return HuggingFaceFolder(path, location)
    raise InputError(
        f"{path} is neither a Hugging Face folder (config.json), an adapter ({peft.CONFIG}), a converted folder "
        f"({store.HEADER}) nor a training run (base.json)"
    )


def _resolve_recorded(recorded: BaseRecord) -> Reference:
    """Return the base that a record means, whichever type it is opened in."""
    base = resolve(recorded.path)
    return base.recorded_as(recorded.digest) if isinstance(base, RandomPreset) else base


def open_model(
    model: str | Path, dtype: str | None = None, quantize: str = "none", *, lazy: bool = False
) -> LoadedModel:
    """Open whatever MODEL refers to; the arguments are those of `Reference.open`."""
    return resolve(model).open(dtype, quantize, lazy=lazy)


def is_hub_id(name: str) -> bool:
    """Return whether a name has the form owner/name."""
    return re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name) is not None


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


def open_original(provenance: Provenance, dtype: str, *, lazy: bool = False) -> LoadedModel:
    """Return the unquantised weights that a quantised base was made from.

    Raises: InputError when they are gone, or are other ones.
    """
    origin, advice = provenance.unquantised, "or choose --merge-base dequantized"
    if not origin.path:
        raise InputError(f"{provenance.path} does not say what it was quantised from: {advice.removeprefix('or ')}")
    try:
        recorded = BaseRecord(origin.path, origin.digest, None)
        opened = _resolve_recorded(recorded).open(dtype, lazy=lazy)
    except InputError as error:
        raise InputError(f"the original weights of {provenance.path} cannot be opened: {error}; {advice}") from None
    if origin.digest != opened.provenance.digest:
        raise InputError(f"{origin.path} is not what {provenance.path} was quantised from: put it back, {advice}")
    if opened.provenance.quantize != "none":  # a copy of another quantised base
        return open_original(opened.provenance, dtype, lazy=lazy)
    return opened


def vision_of(provenance: Provenance) -> VisionTower:
    """Return the vision tower beside a base; empty where there is none.

    Raises: InputError where the base cannot be opened.
    """
    if provenance.path is None or provenance.kind not in ("base", "huggingface"):
        return {}, {}
    return resolve(provenance.path).vision()


def check_base(path: Path, file: str, recorded: BaseRecord, base: Provenance) -> None:
    """Raise InputError where a base is not the one that a run or adapter, by its `file`, was trained on."""
    if recorded.digest != base.digest:
        raise InputError(
            f"{recorded.path} is not the base that {path} was trained on: its digest is {str(base.digest)[:12]}, "
            f"{file} records {str(recorded.digest)[:12]}"
        )
