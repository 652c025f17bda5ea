"""From what a user calls a model to a config, parameters and a tokenizer.

MODEL is a Hugging Face folder, a hub id, a GGUF file, a base folder (`convert`, `Model.save`), a run folder (`train`),
`package:NAME` (weights that a Python package carries) or `random:PRESET` (random weights from a fixed seed).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sst_jax.console.progress import bar
from sst_jax.data.tokenizer import ByteTokenizer, Tokenizer, load_tokenizer
from sst_jax.errors import InputError
from sst_jax.model import decoder
from sst_jax.model.config import PRESETS, ModelConfig
from sst_jax.weights import gguf, huggingface, store
from sst_jax.weights.checkpoint import newest_good, restore_trainable
from sst_jax.weights.files import digest, read_json, sha256
from sst_jax.weights.source import Source, fill_base

RUN_FILES = ("config.json", "base.json")


class Opened(NamedTuple):
    """A model in memory. `facts` is JSON-ready: kind, path, digest, dtype, layout of the source's keys."""

    config: ModelConfig
    params: decoder.Params
    tokenizer: Tokenizer
    facts: dict[str, Any]


def default_dtype() -> str:
    """bfloat16 on accelerators, float32 on CPUs, where bfloat16 decodes several times slower."""
    return "float32" if jax.default_backend() == "cpu" else "bfloat16"


def source_dtype(model: str | Path) -> str:
    """The type in which reading MODEL loses nothing; raises InputError as `open_model` does."""
    name, path = str(model), Path(model).expanduser()
    if path.is_dir() and store.is_base_folder(path):
        arrays = store.read_header(path)["arrays"]
        return arrays["base/embed/embedding"]["dtype"]
    if path.is_dir() and is_run_folder(path):
        return source_dtype(read_json(path / "base.json").get("path", ""))
    if path.is_dir() and (path / "config.json").is_file():
        return huggingface.open_folder(path).dtype
    if is_hub_id(name) and not path.exists():
        return huggingface.open_folder(huggingface.resolve_hub(name)).dtype
    return "float32"  # GGUF is dequantised into float32, random weights are made in it


def is_hub_id(name: str) -> bool:
    return re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name) is not None


def is_run_folder(path: Path) -> bool:
    return all((path / name).is_file() for name in RUN_FILES)


def open_model(model: str | Path, dtype: str | None = None) -> Opened:
    """Opens anything that MODEL may be; `dtype` ("float32", "bfloat16") is the base's, None: `default_dtype()`.

    Raises: InputError naming what is missing, damaged or not supported.
    """
    name, dtype = str(model), dtype or default_dtype()
    kind, _, rest = name.partition(":")
    if kind == "package" and rest:
        return _from_source(gguf.open_file(gguf.package(rest.replace("-", "_"))), dtype, name)
    if kind == "random" and rest:
        return _random(rest, dtype)
    path = Path(name).expanduser()
    if path.is_file():
        if path.suffix == ".gguf":
            return _from_source(gguf.open_file(path), dtype, str(path.resolve()))
        raise InputError(f"{path} is a file, but not a .gguf: give the folder that holds it")
    if path.is_dir():
        if store.is_base_folder(path):
            return _from_store(path, dtype)
        if is_run_folder(path):
            return _from_run(path, dtype)
        if (path / "config.json").is_file():
            return _from_source(huggingface.open_folder(path), dtype, str(path.resolve()))
        raise InputError(
            f"{path} is neither a Hugging Face folder (config.json), a converted folder ({store.HEADER}) nor a "
            "training run (base.json)"
        )
    if is_hub_id(name):
        folder = huggingface.resolve_hub(name)
        return _from_source(huggingface.open_folder(folder), dtype, name)
    raise InputError(f"{name} does not exist: give a folder, a .gguf file, a run folder or a hub id (owner/name)")


def _progress(description: str) -> tuple[Any, Callable[[int, int], None]]:
    meter = bar(None, description, unit="B", unit_scale=True)

    def update(done: int, total: int) -> None:
        meter.total = total
        meter.update(done - meter.n)

    return meter, update


def _from_source(source: Source, dtype: str, name: str) -> Opened:
    tokenizer = load_tokenizer(source.path)
    meter, update = _progress("reading weights")
    with meter:
        base = fill_base(source, dtype, update)
    meter, update = _progress("hashing weights")
    with meter:
        identity = digest(source.files, update)
    facts = {"kind": source.kind, "path": name, "digest": identity, "dtype": dtype, "layout": source.layout}
    params = {"base": jax.tree.map(jnp.asarray, base), "adapter": {}, "blend": {}}
    return Opened(ModelConfig(source.backbone), params, tokenizer, facts)


def _random(preset: str, dtype: str) -> Opened:
    if preset not in PRESETS:
        raise InputError(f"random:{preset} is unknown; presets are {', '.join(PRESETS)}")
    config = ModelConfig(PRESETS[preset])
    params = decoder.init_params(config, jax.random.key(0), jnp.dtype(dtype))
    corner = np.asarray(params["base"]["embed"]["embedding"][:4].astype(jnp.float32)).tobytes()
    identity = hashlib.sha256(corner + repr(config).encode()).hexdigest()
    facts = {"kind": "random", "path": f"random:{preset}", "digest": identity, "dtype": dtype, "layout": None}
    return Opened(config, params, ByteTokenizer(), facts)


def _from_store(path: Path, dtype: str) -> Opened:
    config, params, facts = store.load_base(path, dtype)
    params = jax.tree.map(jnp.asarray, {"adapter": {}, "blend": {}, **params})
    facts = {**facts, "kind": "base", "path": str(path.resolve()), "digest": sha256(path / store.MANIFEST)}
    return Opened(ModelConfig.from_dict(config), params, load_tokenizer(path), {**facts, "dtype": dtype})


def _from_run(path: Path, dtype: str) -> Opened:
    recorded, content = read_json(path / "base.json"), read_json(path / "config.json")
    for file, mapping, keys in (
        ("base.json", recorded, ("path", "digest")),
        ("config.json", content, ("model_config",)),
    ):
        for key in keys:
            if key not in mapping:
                raise InputError(f"{path / file} lacks the key {key}")
    step = newest_good(path)
    if step is None:
        raise InputError(f"{path}: no usable checkpoint under checkpoints/; train on, or restore a copy of the folder")
    try:
        opened = open_model(recorded["path"], dtype)
    except InputError as error:
        raise InputError(
            f"the base of run {path}, {recorded['path']} (from base.json), cannot be opened: {error}"
        ) from None
    check_base(path, recorded, opened.facts)
    config = ModelConfig.from_dict(content["model_config"])
    shapes = decoder.abstract_params(config)
    trainable = restore_trainable(path, step, {name: shapes[name] for name in ("adapter", "blend")})
    facts = {**opened.facts, "run": str(path.resolve()), "step": step, "recipe": content.get("recipe")}
    return Opened(config, {"base": opened.params["base"], **trainable}, opened.tokenizer, facts)


def check_base(run: Path, recorded: dict[str, Any], facts: dict[str, Any]) -> None:
    """Raises InputError where a base is not the one that a run was trained on."""
    if recorded["digest"] != facts["digest"]:
        raise InputError(
            f"{recorded['path']} is not the base that {run} was trained on: its digest is {facts['digest'][:12]}, "
            f"base.json records {recorded['digest'][:12]}"
        )
