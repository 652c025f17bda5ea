"""What MODEL may be and where its weights lie, one class each: what stands by itself, without another model as base.

A `Reference` knows type and backbone from headers, and opens the model. `loading.resolve` finds the one that a name
means, and has those that stand on others: adapters, runs, and repositories of the hub.
"""

from __future__ import annotations

import abc
import contextlib
import dataclasses
import functools
import hashlib
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
from sst_jax.families.registry import PRESETS, family_of
from sst_jax.files import Progress, digest, sha256
from sst_jax.model import decoder, sharding
from sst_jax.model.config import BackboneConfig, ModelConfig, canonical_text
from sst_jax.model.quantization import storages
from sst_jax.types import Embedding, HostArrays, Json, Params
from sst_jax.weights import export_format, gguf, key_map, store
from sst_jax.weights.provenance import Origin, Provenance
from sst_jax.weights.source import DTYPES, Source, fill_base, lazy_base

# What transformers needs of a multimodal folder beside the tokenizer's files: how pictures become its input.
PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")


class VisionTower(NamedTuple):
    """What a multimodal model has beside its text part; all of it is empty where there is none.

    tensors  untouched, by key
    config   config.json without the text part
    files    PROCESSOR_FILES, those that there are
    """

    tensors: HostArrays
    config: Json
    files: dict[str, bytes]


NO_TOWER = VisionTower({}, {}, {})


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
      revision: of a repository of the hub, the commit whose files these are; None of what has none.
    """

    revision: str | None = None

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
        return NO_TOWER

    def tokenizer(self) -> Tokenizer:
        """Return the tokenizer alone, without reading the layers where the format allows it."""
        return self.open(self.dtype, lazy=True).tokenizer

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
        opened.tokenizer.set_rows(opened.config.backbone.vocab_size)
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

    def tokenizer(self) -> Tokenizer:
        return load_tokenizer(self.source.path)  # of a split file the first part, which has the keys

    def read(self, dtype: str, quantize: str, lazy: bool) -> LoadedModel:
        return _from_source(self.source, dtype, self.location, quantize, lazy)


class HuggingFaceFolder(Reference):
    """A folder that transformers loads: a plain checkpoint, or an export of ours with its stream and adapter."""

    def __init__(self, path: Path, location: str | None = None, revision: str | None = None):
        super().__init__(location or str(path.resolve()))
        self.path = path
        self.revision = revision

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

    def tokenizer(self) -> Tokenizer:
        return load_tokenizer(self.path)

    def read(self, dtype: str, quantize: str, lazy: bool) -> LoadedModel:
        if not export_format.carries(self.path):
            return self._read_backbone(dtype, quantize, lazy)
        bundle = export_format.read_carried(self.weights)
        opened = self._read_backbone(dtype, quantize, lazy)
        provenance = dataclasses.replace(
            opened.provenance,
            carries="sst" if export_format.is_sst_folder(self.path) else "stream",
            prompt_format=bundle.prompt_format,
        )
        params = {**opened.params, **sharding.device_put_sharded(bundle.params)}
        return LoadedModel(bundle.config, params, opened.tokenizer, provenance)

    def _read_backbone(self, dtype: str, quantize: str, lazy: bool) -> LoadedModel:
        opened = _from_source(self.weights, dtype, self.location, quantize, lazy)
        return opened._replace(provenance=dataclasses.replace(opened.provenance, revision=self.revision))


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
            return NO_TOWER
        facts = Provenance.from_json(store.read_header(self.path)["facts"], str(self.path / store.HEADER))
        return VisionTower(load_file(file), facts.vision_config or {}, processor_files(self.path))

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
            source=Origin(converted.kind, converted.path, converted.digest, converted.revision),
            revision=None,
            stored=None,
        )
        return LoadedModel(ModelConfig.from_dict(config), params, load_tokenizer(self.path), provenance)


def default_dtype() -> str:
    """Return bfloat16 on accelerators, float32 on CPUs, where bfloat16 decodes several times slower."""
    return "float32" if jax.default_backend() == "cpu" else "bfloat16"


@contextlib.contextmanager
def _progress(description: str) -> Iterator[Progress]:
    """Yield a function of (bytes done, bytes in all) that moves a bar."""
    with bar(None, description, unit="B", unit_scale=True) as meter:

        def update(done: int, total: int) -> None:
            meter.total = total
            meter.update(done - meter.n)

        yield update


def _from_source(source: Source, dtype: str, location: str, quantize: str, lazy: bool) -> LoadedModel:
    tokenizer = load_tokenizer(source.path, required=False)
    if lazy and quantize == "none":
        base = lazy_base(source)
    else:
        with _progress("reading weights") as update:
            base = sharding.device_put_sharded(fill_base(source, dtype, update, quantize))
    with _progress("hashing weights") as update:
        identity = digest(source.files, update)
    provenance = Provenance(source.kind, location, identity, dtype, source.layout)
    return LoadedModel(ModelConfig(source.backbone), {"base": base, "adapter": {}, "blend": {}}, tokenizer, provenance)


def vision_tensors(source: Source) -> VisionTower:
    """Return the vision tower of a source; empty where there is none."""
    if source.kind != "huggingface":
        return NO_TOWER
    towers = [tensor for tensor in source.tensors() if key_map.normalise(tensor.name)[0] is None]
    if not towers:
        return NO_TOWER
    config = {key: value for key, value in source.metadata.items() if key not in ("text_config", "quantization_config")}
    return VisionTower({tensor.name: tensor.read() for tensor in towers}, config, processor_files(source.path))


def processor_files(folder: Path) -> dict[str, bytes]:
    """Return those of PROCESSOR_FILES that a folder holds, by name."""
    return {name: (folder / name).read_bytes() for name in PROCESSOR_FILES if (folder / name).is_file()}
