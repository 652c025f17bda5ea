"""From what a user calls a model to a config, parameters and a tokenizer.

MODEL is a Hugging Face folder, a hub id, a GGUF file, a base folder (`convert`, `Model.save`), a run folder (`train`),
anything that `export` wrote, `package:NAME` (weights that a Python package carries) or `random:PRESET` (random weights
from a fixed seed).
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file

from sst_jax.console.progress import bar
from sst_jax.data.tokenizer import ByteTokenizer, Tokenizer, load_tokenizer
from sst_jax.errors import InputError
from sst_jax.families.registry import HUB_NAMES, PRESETS, family_of
from sst_jax.files import digest, read_json, sha256
from sst_jax.model import decoder, sharding
from sst_jax.model.config import BackboneConfig, ModelConfig, canonical_text
from sst_jax.model.quantization import storages
from sst_jax.weights import export_format, gguf, huggingface, key_map, peft, store
from sst_jax.weights.checkpoint import newest_good, restore_trainable
from sst_jax.weights.source import Source, fill_base, lazy_base

RUN_FILES = ("config.json", "base.json")


class LoadedModel(NamedTuple):
    """A model in memory. `facts` is JSON-ready: kind, path, digest, dtype, layout of the source's keys.

    Where it was trained here, "prompts" is how its questions are to be put ("plain", "chat").
    """

    config: ModelConfig
    params: decoder.Params
    tokenizer: Tokenizer
    provenance: dict[str, Any]


def default_dtype() -> str:
    """bfloat16 on accelerators, float32 on CPUs, where bfloat16 decodes several times slower."""
    return "float32" if jax.default_backend() == "cpu" else "bfloat16"


def source_dtype(model: str | Path) -> str:
    """The type in which reading MODEL loses nothing; raises InputError as `open_model` does."""
    name, path = str(model), Path(model).expanduser()
    if path.is_dir() and store.is_base_folder(path):
        arrays = store.read_header(path)["arrays"]
        if "base/embed/embedding" not in arrays:
            raise InputError(f"{path / store.HEADER}: arrays lacks base/embed/embedding")
        return arrays["base/embed/embedding"]["dtype"]
    if path.is_dir() and is_run_folder(path):
        return source_dtype(_recorded_base(path)["path"])
    if path.is_dir() and peft.is_adapter_folder(path):
        return source_dtype(peft.base_of(path)["path"])
    if path.is_dir() and (path / "config.json").is_file():
        return export_format.open_folder(path).dtype
    if is_hub_id(name) and not path.exists():
        return source_dtype(_fetched(name))
    return "float32"  # GGUF is dequantised into float32, random weights are made in it


def backbone_of(model: str | Path) -> BackboneConfig:
    """The backbone of MODEL from headers alone; of a hub id that is not on this disk, from the size in its name.

    Raises: InputError as `open_model`, and where neither tells.
    """
    name, path = str(model), Path(model).expanduser()
    kind, _, rest = name.partition(":")
    if kind == "random" and rest in PRESETS:
        return PRESETS[rest]
    if kind == "package" and rest:
        return gguf.open_file(gguf.package(rest.replace("-", "_"))).backbone
    if path.is_file() and path.suffix == ".gguf":
        return gguf.open_file(path).backbone
    if path.is_dir() and store.is_base_folder(path):
        return ModelConfig.from_dict(store.read_header(path)["config"]).backbone
    if path.is_dir() and is_run_folder(path):
        return ModelConfig.from_dict(read_json(path / "config.json").get("model_config", {})).backbone
    if peft.is_adapter_folder(path):
        return backbone_of(peft.base_of(path)["path"])
    if (path / "config.json").is_file():
        return export_format.backbone_of(path)
    named = [preset for part, preset in HUB_NAMES.items() if re.search(rf"\b{re.escape(part)}\b", name.lower())]
    if not path.exists() and is_hub_id(name) and named:
        return named[0]
    raise InputError(f"{name} does not exist here, and its name does not tell its size (gemma-3-1b and the like do)")


def source_of(model: str | Path) -> tuple[Source, str] | None:
    """(source, its name) where MODEL is a plain checkpoint of a foreign format: a Hugging Face folder or id, a GGUF.

    Raises: InputError as `open_model`.
    """
    name, path = str(model), Path(model).expanduser()
    kind, _, rest = name.partition(":")
    if kind == "package" and rest:
        return gguf.open_file(gguf.package(rest.replace("-", "_"))), name
    if path.is_file() and path.suffix == ".gguf":
        return gguf.open_file(path), str(path.resolve())
    if path.is_dir():
        foreign = not store.is_base_folder(path) and not is_run_folder(path) and (path / "config.json").is_file()
        plain = foreign and not export_format.carries(path)
        return (huggingface.open_folder(path), str(path.resolve())) if plain else None
    if kind != "random" and is_hub_id(name) and not path.exists():
        found = source_of(_fetched(name))
        return None if found is None else (found[0], name)
    return None


def is_hub_id(name: str) -> bool:
    return re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name) is not None


def _fetched(name: str) -> Path:
    """The folder of a hub id. A mistyped path may look like one, so errors say that there is no such folder."""
    try:
        return huggingface.resolve_hub(name)
    except InputError as error:
        raise InputError(f"there is no folder {name} here, and as a hub id {error}") from error


def is_run_folder(path: Path) -> bool:
    return all((path / name).is_file() for name in RUN_FILES)


def open_model(
    model: str | Path, dtype: str | None = None, quantize: str = "none", *, lazy: bool = False
) -> LoadedModel:
    """Opens anything that MODEL may be; `dtype` ("float32", "bfloat16") is the base's, None: `default_dtype()`.

    quantize: "nf4" or "nf4_double" stores the linears so (`model/quantization`), "none" leaves them as they are.
    lazy: where the format allows it, the base's layers are read from disk whenever they are indexed, as they are there
    (`dtype` is not applied): for exports, which look at every layer once.

    Raises: InputError naming what is missing, damaged or not supported.
    """
    storage, dtype = storages.get(quantize), dtype or default_dtype()
    config, params, tokenizer, facts = _open(model, dtype, quantize, lazy)
    family_of(config.backbone)  # what a folder of ours records may be of a family that this version does not know
    config = dataclasses.replace(config, bos_id=tokenizer.bos_id, dtype=dtype)
    stored = storages.kind_of(params["base"])
    if quantize == "none" or stored == quantize:
        return LoadedModel(config, params, tokenizer, {"stored": stored, **facts, "quantize": stored})
    if stored != "none":
        raise InputError(f"{model} is stored as {stored} and cannot become {quantize}: convert its source again")
    # One linear at a time, so that old and new exist side by side for one only.
    layers, quantised = dict(params["base"]["layers"]), jax.jit(storage.quantise)
    for key in [key for key, leaf in layers.items() if storages.storage_of(leaf) is not None]:
        leaf = dict(layers.pop(key))
        layers[key] = {**jax.lax.map(quantised, leaf.pop("kernel")), **leaf}
    params["base"]["layers"] = sharding.device_put_sharded(layers)
    return LoadedModel(config, params, tokenizer, {**facts, "quantize": quantize, "stored": "none"})


def _open(model: str | Path, dtype: str, quantize: str, lazy: bool) -> LoadedModel:
    name = str(model)
    kind, _, rest = name.partition(":")
    if kind == "package" and rest:
        return _from_source(gguf.open_file(gguf.package(rest.replace("-", "_"))), dtype, name, quantize, lazy)
    if kind == "random" and rest:
        return _random(rest, dtype)
    path = Path(name).expanduser()
    if path.is_file():
        if path.suffix == ".gguf":
            return _from_source(gguf.open_file(path), dtype, str(path.resolve()), quantize, lazy)
        raise InputError(f"{path} is a file, but not a .gguf: give the folder that holds it")
    if path.is_dir():
        if store.is_base_folder(path):
            return _from_store(path, dtype, lazy)
        if is_run_folder(path):
            return _from_run(path, dtype, lazy)
        return _from_folder(path, dtype, str(path.resolve()), quantize, lazy)
    if is_hub_id(name):
        return _from_folder(_fetched(name), dtype, name, quantize, lazy)
    raise InputError(f"{name} does not exist: give a folder, a .gguf file, a run folder or a hub id (owner/name)")


def _progress(description: str) -> tuple[Any, Callable[[int, int], None]]:
    meter = bar(None, description, unit="B", unit_scale=True)

    def update(done: int, total: int) -> None:
        meter.total = total
        meter.update(done - meter.n)

    return meter, update


def _from_source(source: Source, dtype: str, name: str, quantize: str, lazy: bool) -> LoadedModel:
    tokenizer = load_tokenizer(source.path)
    if lazy and quantize == "none":
        base = lazy_base(source)
    else:
        meter, update = _progress("reading weights")
        with meter:
            base = sharding.device_put_sharded(fill_base(source, dtype, update, quantize))
    meter, update = _progress("hashing weights")
    with meter:
        identity = digest(source.files, update)
    facts = {"kind": source.kind, "path": name, "digest": identity, "dtype": dtype, "layout": source.layout}
    params = {"base": base, "adapter": {}, "blend": {}}
    return LoadedModel(ModelConfig(source.backbone), params, tokenizer, facts)


def _from_folder(path: Path, dtype: str, name: str, quantize: str, lazy: bool) -> LoadedModel:
    """A folder of the hub's formats: a plain checkpoint, or one of our exports with its stream and adapter."""
    if peft.is_adapter_folder(path):
        return _from_adapter(path, dtype, quantize, lazy)
    if not (path / "config.json").is_file():
        raise InputError(
            f"{path} is neither a Hugging Face folder (config.json), an adapter ({peft.CONFIG}), a converted folder "
            f"({store.HEADER}) nor a training run (base.json)"
        )
    source = export_format.open_folder(path)
    carried = export_format.read_carried(source) if export_format.carries(path) else None
    opened = _from_source(source, dtype, name, quantize, lazy)
    if carried is None:
        return opened
    facts = {
        **opened.provenance,
        "carries": "sst" if export_format.is_sst_folder(path) else "stream",
        "prompts": carried.prompts,
    }
    return LoadedModel(carried.config, {**opened.params, **_on_device(carried.params)}, opened.tokenizer, facts)


def _from_adapter(path: Path, dtype: str, quantize: str, lazy: bool) -> LoadedModel:
    base = peft.base_of(path)
    try:
        opened = open_model(base["path"], dtype, base["quantize"] or quantize, lazy=lazy)
    except InputError as error:
        raise InputError(f"the base of adapter {path}, {base['path']}, cannot be opened: {error}") from None
    if base["digest"] is not None:
        check_base(path, export_format.STREAM_CONFIG, base, opened.provenance)
    carried = peft.read_folder(path, opened.config.backbone)
    params = {"base": opened.params["base"], **_on_device(carried.params)}
    facts = {**opened.provenance, "adapter": str(path.resolve()), "prompts": carried.prompts}
    return LoadedModel(carried.config, params, opened.tokenizer, facts)


def _on_device(params: dict[str, Any]) -> dict[str, Any]:
    return sharding.device_put_sharded(params)


def _random(preset: str, dtype: str) -> LoadedModel:
    if preset not in PRESETS:
        raise InputError(f"random:{preset} is unknown; presets are {', '.join(PRESETS)}")
    config = ModelConfig(PRESETS[preset])
    params = decoder.init_params(config, jax.random.key(0), jnp.dtype(dtype))
    corner = np.asarray(params["base"]["embed"]["embedding"][:4].astype(jnp.float32)).tobytes()
    identity = hashlib.sha256(corner + canonical_text(config).encode()).hexdigest()
    facts = {"kind": "random", "path": f"random:{preset}", "digest": identity, "dtype": dtype, "layout": None}
    return LoadedModel(config, sharding.device_put_sharded(params), ByteTokenizer(), facts)


def _from_store(path: Path, dtype: str, lazy: bool) -> LoadedModel:
    stacks = store.open_stacks(path) if lazy else None
    if stacks is not None:
        header = store.read_header(path)
        config, params, facts = header["config"], {"base": stacks, "adapter": {}, "blend": {}}, header["facts"]
    else:
        # Where it belongs at once: no second copy on the host, and of a mesh each process reads its own parts.
        where = lambda slot, shape: sharding.sharding_of(tuple(slot.split("/")), shape)  # noqa: E731
        config, params, facts = store.load_base(path, dtype, sharding=where)
        params = {"adapter": {}, "blend": {}, **params}
    source = {name: facts.get(name) for name in ("kind", "path", "digest")}  # what it was converted from
    facts = {**facts, "kind": "base", "path": str(path.resolve()), "digest": sha256(path / store.MANIFEST)}
    facts["source"] = source
    return LoadedModel(ModelConfig.from_dict(config), params, load_tokenizer(path), {**facts, "dtype": dtype})


def _from_run(path: Path, dtype: str, lazy: bool) -> LoadedModel:
    recorded, content = _recorded_base(path), read_json(path / "config.json")
    recipe = content.get("recipe")
    known = recipe or {}
    if "kind" in known:
        raise InputError(
            f"{path} trained tiny models from scratch (kind={known['kind']!r}), which are not kept: its result.json is "
            "what there is"
        )
    if "model_config" not in content:
        raise InputError(f"{path / 'config.json'} lacks the key model_config")
    step = newest_good(path)
    if step is None:
        raise InputError(f"{path}: no usable checkpoint under checkpoints/; train on, or restore a copy of the folder")
    try:
        opened = open_model(recorded["path"], dtype, recorded.get("quantize", "none"), lazy=lazy)
    except InputError as error:
        raise InputError(
            f"the base of run {path}, {recorded['path']} (from base.json), cannot be opened: {error}"
        ) from None
    check_base(path, "base.json", recorded, opened.provenance)
    config = ModelConfig.from_dict(content["model_config"])
    if config.backbone != opened.config.backbone:
        raise InputError(f"{path / 'config.json'}: its backbone is not that of the base, {recorded['path']}")
    shapes = decoder.abstract_params(config)
    trainable = restore_trainable(path, step, {name: shapes[name] for name in ("adapter", "blend")})
    prompts = known.get("data", {}).get("format")
    facts = {**opened.provenance, "run": str(path.resolve()), "step": step, "recipe": recipe, "prompts": prompts}
    return LoadedModel(config, {"base": opened.params["base"], **trainable}, opened.tokenizer, facts)


def _recorded_base(run: Path) -> dict[str, Any]:
    """base.json of a run folder; raises InputError unless it names a path and a digest."""
    recorded = read_json(run / "base.json")
    for key in ("path", "digest"):
        if key not in recorded:
            raise InputError(f"{run / 'base.json'} lacks the key {key}")
        if not isinstance(recorded[key], str):
            raise InputError(f"{run / 'base.json'}: {key}={recorded[key]!r} is not text")
    return recorded


def quantised_from(facts: dict[str, Any]) -> dict[str, Any]:
    """Of a model's facts, kind, path and digest of the weights before quantisation; of one without it, its own."""
    return facts["source"] if facts["kind"] == "base" and facts.get("stored") != "none" else facts


def open_original(facts: dict[str, Any], dtype: str, *, lazy: bool = False) -> LoadedModel:
    """The unquantised weights that a base in NF4 was made from, by its facts.

    Raises: InputError when they are gone, or are other ones.
    """
    source = quantised_from(facts)
    advice = "or choose --merge-base dequantized"
    if not source.get("path"):
        raise InputError(f"{facts['path']} does not say what it was quantised from: {advice.removeprefix('or ')}")
    try:
        opened = open_model(source["path"], dtype, lazy=lazy)
    except InputError as error:
        raise InputError(f"the original weights of {facts['path']} cannot be opened: {error}; {advice}") from None
    if source["digest"] != opened.provenance["digest"]:
        raise InputError(f"{source['path']} is not what {facts['path']} was quantised from: put it back, {advice}")
    if opened.provenance["quantize"] != "none":  # a copy of another base in NF4
        return open_original(opened.provenance, dtype, lazy=lazy)
    return opened


def vision_of(facts: dict[str, Any]) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The vision tower beside a base, untouched, and its source's config.json without the text part; empty if none.

    Raises: InputError where the source cannot be opened.
    """
    if facts["kind"] == "base":
        file = Path(facts["path"]) / store.VISION
        if not file.is_file():
            return {}, {}
        return load_file(file), facts["vision_config"]
    if facts["kind"] != "huggingface":
        return {}, {}
    path = Path(facts["path"])
    return vision_tensors(export_format.open_folder(path if path.is_dir() else _fetched(facts["path"])))


def vision_tensors(source: Source) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """As `vision_of`, of a source."""
    if source.kind != "huggingface":
        return {}, {}
    towers = [tensor for tensor in source.tensors() if key_map.normalise(tensor.name)[0] is None]
    config = {key: value for key, value in source.metadata.items() if key != "text_config"}
    return {tensor.name: tensor.read() for tensor in towers}, config if towers else {}


def check_base(path: Path, file: str, recorded: dict[str, Any], facts: dict[str, Any]) -> None:
    """Raises InputError where a base is not the one that a run or adapter, by its `file`, was trained on."""
    if recorded["digest"] != facts["digest"]:
        raise InputError(
            f"{recorded['path']} is not the base that {path} was trained on: its digest is {facts['digest'][:12]}, "
            f"{file} records {str(recorded['digest'])[:12]}"
        )
