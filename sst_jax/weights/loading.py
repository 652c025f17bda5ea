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
import hashlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file

from sst_jax.console.progress import bar
from sst_jax.data.tokenizer import ByteTokenizer, Tokenizer, load_tokenizer
from sst_jax.errors import InputError
from sst_jax.families.registry import HUB_NAMES, PRESETS, family_of
from sst_jax.files import Progress, digest, read_json, sha256
from sst_jax.model import decoder, sharding
from sst_jax.model.config import BackboneConfig, ModelConfig, canonical_text
from sst_jax.model.quantization import storages
from sst_jax.types import Embedding, Json, Params
from sst_jax.weights import export_format, gguf, huggingface, key_map, peft, store
from sst_jax.weights.checkpoint import newest_good, restore_trainable
from sst_jax.weights.provenance import BaseRecord, Origin, Provenance
from sst_jax.weights.source import DTYPES, Source, fill_base, lazy_base

RUN_FILES = ("config.json", "base.json")

VisionTower = tuple[dict[str, np.ndarray], Json]  # its tensors, untouched, and config.json without the text part


class LoadedModel(NamedTuple):
    """A model in memory."""

    config: ModelConfig
    params: Params
    tokenizer: Tokenizer
    provenance: Provenance


class Reference(abc.ABC):
    """What a name refers to.

    Attributes:
      location: how others may refer to the same: an absolute path, or a name that means the same everywhere.
    """

    def __init__(self, location: str):
        self.location = location

    @property
    def dtype(self) -> str:
        """The type in which reading loses nothing, from headers alone."""
        return "float32"  # GGUF is dequantised into float32, random weights are made in it

    @property
    @abc.abstractmethod
    def backbone(self) -> BackboneConfig:
        """The backbone, from headers alone."""

    @property
    def source(self) -> Source | None:
        """The source of weights where this is a plain checkpoint of a foreign format."""
        return None

    def vision(self) -> VisionTower:
        """Return the vision tower; empty where there is none."""
        return {}, {}

    @abc.abstractmethod
    def read(self, dtype: str, quantize: str, lazy: bool) -> LoadedModel:
        """Return the model as `open` does, quantised where that can be done while reading."""

    def open(self, dtype: str | None = None, quantize: str = "none", *, lazy: bool = False) -> LoadedModel:
        """Return the model.

        Args:
          dtype: type of the base, "float32" or "bfloat16"; None: `default_dtype()`.
          quantize: the storage of the linears (`model/quantization`); "none" leaves them as they are.
          lazy: where the format allows it, read the base's layers from disk whenever they are indexed, as they are
            there (`dtype` is not applied): for exports, which look at every layer once.

        Raises: InputError naming what is missing, damaged or not supported.
        """
        storage, dtype = storages.get(quantize), dtype or default_dtype()
        opened = self.read(dtype, quantize, lazy)
        config = dataclasses.replace(opened.config, bos_id=opened.tokenizer.bos_id, dtype=dtype)
        opened = opened._replace(config=config)
        base, provenance = opened.params["base"], opened.provenance
        family_of(opened.config.backbone)  # a folder of ours may be of a family that this version does not know
        held = storages.kind_of(base)
        if quantize in ("none", held):
            provenance = dataclasses.replace(provenance, stored=provenance.stored or held, quantize=held)
            return opened._replace(provenance=provenance)
        if held != "none":
            raise InputError(
                f"{self.location} is stored as {held} and cannot become {quantize}: convert its source again"
            )
        # One linear at a time, so that old and new exist side by side for one only.
        layers, quantise = dict(base["layers"]), jax.jit(storage.quantise)
        for key in [key for key, leaf in layers.items() if storages.storage_of(leaf) is not None]:
            leaf = dict(layers.pop(key))
            layers[key] = {**jax.lax.map(quantise, leaf.pop("kernel")), **leaf}
        base["layers"] = sharding.device_put_sharded(layers)
        return opened._replace(provenance=dataclasses.replace(provenance, quantize=quantize, stored="none"))


class RandomPreset(Reference):
    """random:PRESET, the same weights every time.

    A draw in another type gives other numbers. `drawn` is the type of the draw, from which weights are cast to the one
    asked for; None is the one asked for.
    """

    def __init__(self, location: str, drawn: str | None = None):
        super().__init__(location)
        self.drawn = drawn
        self.preset = location.partition(":")[2]
        if self.preset not in PRESETS:
            raise InputError(f"random:{self.preset} is unknown; presets are {', '.join(PRESETS)}")

    @property
    def backbone(self) -> BackboneConfig:
        return PRESETS[self.preset]

    def read(self, dtype: str, quantize: str, lazy: bool) -> LoadedModel:
        config, drawn = ModelConfig(self.backbone), self.drawn or dtype
        params = decoder.init_params(config, jax.random.key(0), jnp.dtype(drawn))
        identity = self._digest(params["base"]["embed"]["embedding"])
        params["base"] = storages.cast(params["base"], dtype)
        provenance = Provenance("random", self.location, identity, dtype)
        return LoadedModel(config, sharding.device_put_sharded(params), ByteTokenizer(), provenance)

    def recorded_as(self, digest: str | None) -> RandomPreset:
        """Return the weights that a run or an adapter has on record: those of the draw with that digest."""
        key = jax.random.split(jax.random.key(0))[0]  # of the embedding, in `init_params`
        for drawn in DTYPES:
            if self._digest(decoder.init_embedding(self.backbone, key, jnp.dtype(drawn))) == digest:
                return RandomPreset(self.location, drawn)
        return self

    def _digest(self, embedding: Embedding) -> str:
        corner = np.asarray(embedding[:4].astype(jnp.float32)).tobytes()
        return hashlib.sha256(corner + canonical_text(ModelConfig(self.backbone)).encode()).hexdigest()


class GgufFile(Reference):
    """A GGUF file."""

    def __init__(self, file: Path, location: str | None = None):
        super().__init__(location or str(file.resolve()))
        self.file = file

    @functools.cached_property
    def source(self) -> Source:
        return gguf.open_file(self.file)

    @property
    def backbone(self) -> BackboneConfig:
        return self.source.backbone

    def read(self, dtype: str, quantize: str, lazy: bool) -> LoadedModel:
        return _from_source(self.source, dtype, self.location, quantize, lazy)


class HuggingFaceFolder(Reference):
    """A folder that transformers loads: a plain checkpoint, or an export of ours with its stream and adapter."""

    def __init__(self, path: Path, location: str | None = None):
        super().__init__(location or str(path.resolve()))
        self.path = path

    @functools.cached_property
    def weights(self) -> Source:
        """The backbone's weights, whatever else the folder carries."""
        return export_format.open_folder(self.path)

    @property
    def dtype(self) -> str:
        return self.weights.dtype

    @property
    def backbone(self) -> BackboneConfig:
        return export_format.backbone_of(self.path)

    @property
    def source(self) -> Source | None:
        return None if export_format.carries(self.path) else self.weights

    def vision(self) -> VisionTower:
        return vision_tensors(self.weights)

    def read(self, dtype: str, quantize: str, lazy: bool) -> LoadedModel:
        if not export_format.carries(self.path):
            return _from_source(self.weights, dtype, self.location, quantize, lazy)
        carried = export_format.read_carried(self.weights)
        opened = _from_source(self.weights, dtype, self.location, quantize, lazy)
        provenance = dataclasses.replace(
            opened.provenance,
            carries="sst" if export_format.is_sst_folder(self.path) else "stream",
            prompt_format=carried.prompt_format,
        )
        params = {**opened.params, **sharding.device_put_sharded(carried.params)}
        return LoadedModel(carried.config, params, opened.tokenizer, provenance)


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


class BaseFolder(Reference):
    """A base folder of ours, with or without a stream and an adapter."""

    def __init__(self, path: Path):
        super().__init__(str(path.resolve()))
        self.path = path

    @property
    def dtype(self) -> str:
        arrays = store.read_header(self.path)["arrays"]
        if "base/embed/embedding" not in arrays:
            raise InputError(f"{self.path / store.HEADER}: arrays lacks base/embed/embedding")
        return arrays["base/embed/embedding"]["dtype"]

    @property
    def backbone(self) -> BackboneConfig:
        return ModelConfig.from_dict(store.read_header(self.path)["config"]).backbone

    def vision(self) -> VisionTower:
        file = self.path / store.VISION
        if not file.is_file():
            return {}, {}
        facts = Provenance.from_json(store.read_header(self.path)["facts"], str(self.path / store.HEADER))
        return load_file(file), facts.vision_config or {}

    def read(self, dtype: str, quantize: str, lazy: bool) -> LoadedModel:
        stacks = store.open_stacks(self.path) if lazy else None
        params: Params = {"adapter": {}, "blend": {}}
        if stacks is not None:
            header = store.read_header(self.path)
            config, facts = header["config"], header["facts"]
            params["base"] = stacks
        else:
            # Where it belongs at once: no second copy on the host, and of a mesh each process reads its own parts.
            where = lambda name, shape: sharding.sharding_of(tuple(name.split("/")), shape)  # noqa: E731
            config, held, facts = store.load_base(self.path, dtype, sharding=where)
            params |= held
        converted = Provenance.from_json(facts, str(self.path / store.HEADER))  # speaks of what it was made from
        provenance = dataclasses.replace(
            converted,
            kind="base",
            path=self.location,
            digest=sha256(self.path / store.MANIFEST),
            dtype=dtype,
            source=Origin(converted.kind, converted.path, converted.digest),
            stored=None,
        )
        return LoadedModel(ModelConfig.from_dict(config), params, load_tokenizer(self.path), provenance)


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
        carried = peft.read_folder(self.path, opened.config.backbone)
        params = {"base": opened.params["base"], **sharding.device_put_sharded(carried.params)}
        provenance = dataclasses.replace(opened.provenance, adapter=self.location, prompt_format=carried.prompt_format)
        return LoadedModel(carried.config, params, opened.tokenizer, provenance)


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


def default_dtype() -> str:
    """Return bfloat16 on accelerators, float32 on CPUs, where bfloat16 decodes several times slower."""
    return "float32" if jax.default_backend() == "cpu" else "bfloat16"


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


@contextlib.contextmanager
def _progress(description: str) -> Iterator[Progress]:
    """Yield a function of (bytes done, bytes in all) that moves a bar."""
    with bar(None, description, unit="B", unit_scale=True) as meter:

        def update(done: int, total: int) -> None:
            meter.total = total
            meter.update(done - meter.n)

        yield update


def _from_source(source: Source, dtype: str, location: str, quantize: str, lazy: bool) -> LoadedModel:
    tokenizer = load_tokenizer(source.path)
    if lazy and quantize == "none":
        base = lazy_base(source)
    else:
        with _progress("reading weights") as update:
            base = sharding.device_put_sharded(fill_base(source, dtype, update, quantize))
    with _progress("hashing weights") as update:
        identity = digest(source.files, update)
    provenance = Provenance(source.kind, location, identity, dtype, source.layout)
    return LoadedModel(ModelConfig(source.backbone), {"base": base, "adapter": {}, "blend": {}}, tokenizer, provenance)


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


def vision_tensors(source: Source) -> VisionTower:
    """Return the vision tower of a source; empty where there is none."""
    if source.kind != "huggingface":
        return {}, {}
    towers = [tensor for tensor in source.tensors() if key_map.normalise(tensor.name)[0] is None]
    config = {key: value for key, value in source.metadata.items() if key != "text_config"}
    return {tensor.name: tensor.read() for tensor in towers}, config if towers else {}


def check_base(path: Path, file: str, recorded: BaseRecord, base: Provenance) -> None:
    """Raise InputError where a base is not the one that a run or adapter, by its `file`, was trained on."""
    if recorded.digest != base.digest:
        raise InputError(
            f"{recorded.path} is not the base that {path} was trained on: its digest is {str(base.digest)[:12]}, "
            f"{file} records {str(recorded.digest)[:12]}"
        )
