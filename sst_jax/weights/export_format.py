"""What an export carries besides a backbone, written and read: the stream, LoRA factors, the PyTorch files for them.

Two ways of carrying a stream:

    sst              a transformers folder of our own model_type ("sst_gemma3_text"): options and version under the key
                     "sst" of config.json, parameters among the weights, PyTorch modelling files in the folder
    merged, adapter  a folder that transformers or PEFT loads without knowing of streams; stream.json (options and
                     version) and stream.safetensors (parameters) lie beside

Names of parameters: model.stream.theta and model.stream.gain, stacked over layers as in the tree "blend"; LoRA's
factors are named after their linear, KEY.lora_A.weight [rank, in] and KEY.lora_B.weight [out, rank], as in PEFT.
"""

from __future__ import annotations

import dataclasses
import importlib.resources
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from sst_jax.data.prompts import FORMATS
from sst_jax.errors import InputError
from sst_jax.families import registry
from sst_jax.files import read_json
from sst_jax.model import decoder
from sst_jax.model.backbone import GLOBAL
from sst_jax.model.config import AdapterConfig, BackboneConfig, ModelConfig, StreamConfig, from_mapping
from sst_jax.model.fields import written_fields
from sst_jax.types import HostArray, HostArrays, Json, Params
from sst_jax.weights import hub_config, huggingface, key_map
from sst_jax.weights.provenance import Provenance
from sst_jax.weights.source import Source, Tensor

FORMAT, STREAM_FORMAT, VERSION = "sst_jax.sst", "sst_jax.stream", 1
PREFIX = "sst_"  # of our model_types, before the backbone's
STREAM_CONFIG, STREAM_WEIGHTS = "stream.json", "stream.safetensors"
BLEND = "model.stream."
_FACTOR = re.compile(r"(?P<linear>.+)\.lora_(?P<side>[AB])\.weight")


class StreamBundle(NamedTuple):
    """What came with a backbone: its config with stream and adapter, and the trees "adapter" and "blend".

    prompt_format: how questions are to be put to it ("plain", "chat"), where that is recorded.
    """

    config: ModelConfig
    params: Params
    prompt_format: str | None = None


# ----------------------------------------------------------------------------------------------------------- out


def sst_config(config: ModelConfig, provenance: Provenance, keep_lora: bool) -> Json:
    """Return what config.json of an sst folder has besides or instead of the backbone's fields."""
    family = registry.family_of(config.backbone)
    module, prefix = family.torch.module.removesuffix(".py"), family.torch.prefix
    return {
        "model_type": PREFIX + family.config.model_type,
        "architectures": [f"{prefix}ForCausalLM"],
        "auto_map": {
            "AutoConfig": f"{module}.{prefix}Config",
            "AutoModelForCausalLM": f"{module}.{prefix}ForCausalLM",
        },
        "sst": {
            "format": FORMAT,
            "version": VERSION,
            "forward": "exact",
            "stream": written_fields(config.stream),
            "adapter": dataclasses.asdict(config.adapter) if keep_lora and config.adapter.rank else None,
            "prompts": provenance.prompt_format,
            "base": provenance.export_record(),
            **({} if (windows := config.backbone.attention_window) is None else {"attention_window": list(windows)}),
        },
    }


def torch_files(backbone: BackboneConfig) -> dict[str, bytes]:
    """Return the PyTorch files of an sst folder. They are read here as text; nothing in this package imports them."""
    folder = importlib.resources.files("sst_jax.weights") / "torch_sst"
    files = ("configuration_sst.py", "modeling_sst.py", registry.family_of(backbone).torch.module)
    return {name: (folder / name).read_bytes() for name in files}


def blend_tensors(blend: Params) -> HostArrays:
    """Return the stream's parameters as tensors of an sst folder."""
    return {f"{BLEND}{name}": np.asarray(value) for name, value in blend.items()}


def lora_tensors(backbone: BackboneConfig, adapter: Params, layout: str = "text") -> HostArrays:
    """Return LoRA's factors in PyTorch's orientation, by key; `layout` as in `key_map.LAYOUTS`."""
    found = {}
    for entry in key_map.expected(backbone).values():
        _, _, name = entry.row.path.removesuffix("/kernel").rpartition("/")
        if entry.row.path != f"layers/{name}/kernel" or name not in adapter:
            continue
        linear = key_map.relayout(entry.key, layout).removesuffix(".weight")
        for side in "AB":
            factor = np.asarray(adapter[name][f"lora_{side.lower()}"][entry.layer])
            found[f"{linear}.lora_{side}.weight"] = np.ascontiguousarray(factor.T)
    return found


def stream_files(config: ModelConfig, blend: Params, provenance: Provenance) -> dict[str, bytes]:
    """Return stream.json and stream.safetensors, to lie beside a folder that knows nothing of streams."""
    stream = None if config.stream is None else written_fields(config.stream)
    record = {
        "format": STREAM_FORMAT,
        "version": VERSION,
        "stream": stream,
        "prompts": provenance.prompt_format,
        "base": provenance.export_record(),
    }
    arrays = {name: np.asarray(value) for name, value in blend.items()}
    return {
        STREAM_CONFIG: (json.dumps(record, indent=2) + "\n").encode(),
        STREAM_WEIGHTS: save(arrays, metadata={"format": "pt"}),
    }


# ------------------------------------------------------------------------------------------------------------ in


def is_sst_folder(folder: Path) -> bool:
    """Return whether config.json is of one of our own model_types (of any version)."""
    file = folder / "config.json"
    return file.is_file() and str(read_json(file).get("model_type")).startswith(PREFIX)


def carries(folder: Path) -> bool:
    """Return whether a Hugging Face folder has more to it than a backbone."""
    return is_sst_folder(folder) or (folder / STREAM_CONFIG).is_file()


def open_folder(folder: Path) -> Source:
    """Open the backbone of a Hugging Face folder, be it plain, merged with a stream beside, or one of ours.

    Raises: InputError as `huggingface.open_folder`, and on a model_type or version of ours that is not known.
    """
    if not is_sst_folder(folder):
        return huggingface.open_folder(folder)
    return huggingface.open_folder(folder, _plain_config(folder), ignore=_is_ours)


def backbone_of(folder: Path) -> BackboneConfig:
    """Return `open_folder(folder).backbone` without looking for weights."""
    config = _plain_config(folder) if is_sst_folder(folder) else read_json(folder / "config.json")
    return hub_config.backbone_from_config(config, str(folder / "config.json"))


def _plain_config(folder: Path) -> Json:
    """Return config.json of an sst folder with the model_type of its backbone."""
    where = folder / "config.json"
    config = read_json(where)
    _check(config.get("sst"), FORMAT, f"{where}: sst")
    model_type = config["model_type"].removeprefix(PREFIX)
    if model_type not in registry.BY_MODEL_TYPE:
        known = ", ".join(repr(PREFIX + name) for name in registry.BY_MODEL_TYPE)
        raise InputError(f"{where}: model_type={config['model_type']!r} is unsupported; known are {known}")
    return {**config, "model_type": model_type}


def read_carried(source: Source) -> StreamBundle:
    """Read what the folder of a source has besides its backbone; to be asked where `carries`.

    Raises: InputError naming the file and the option, key or version at fault.
    """
    folder, backbone = source.path, source.backbone
    if not is_sst_folder(folder):
        stream, blend, prompts = read_stream(folder, backbone)
        return StreamBundle(ModelConfig(backbone, stream), {"adapter": {}, "blend": blend}, prompts)
    where, options = f"{folder / 'config.json'}: sst", source.metadata["sst"]
    if (windows := options.get("attention_window")) is not None:
        windows = tuple(windows) if isinstance(windows, list) else (windows,)
        backbone = dataclasses.replace(backbone, attention_window=windows)
    stream = from_mapping(StreamConfig, _options(options, "stream", where))
    adapter = AdapterConfig(rank=0)
    if options.get("adapter") is not None:
        adapter = from_mapping(AdapterConfig, _options(options, "adapter", where))
    weights = [file for file in source.files if file.suffix == ".safetensors"]
    ours = [part for file in weights for part in huggingface.headers(file) if _is_ours(part.name)]
    found = ModelConfig(backbone, stream, adapter)
    blend = {part.name.removeprefix(BLEND): part.read() for part in ours if part.name.startswith(BLEND)}
    factors = {part.name: part for part in ours if not part.name.startswith(BLEND)}
    params = {"adapter": read_lora(factors, found, folder), "blend": blend}
    _check_shapes(params, found, folder)
    return StreamBundle(found, params, _prompts(options, where))


def read_stream(folder: Path, backbone: BackboneConfig) -> tuple[StreamConfig | None, Params, str | None]:
    """Return (options, parameters, format of prompts) of stream.json and stream.safetensors.

    Raises: InputError naming the file and the option, key or version at fault.
    """
    where, file = folder / STREAM_CONFIG, folder / STREAM_WEIGHTS
    record = read_json(where)
    _check(record, STREAM_FORMAT, str(where))
    prompts = _prompts(record, str(where))
    if record.get("stream") is None:
        return None, {}, prompts
    stream = from_mapping(StreamConfig, _options(record, "stream", str(where)))
    try:
        blend = dict(load_file(file))
    except (OSError, SafetensorError) as error:
        raise InputError(f"{file} cannot be read: {error}") from error
    _check_shapes({"adapter": {}, "blend": blend}, ModelConfig(backbone, stream), file)
    return stream, blend, prompts


def read_lora(factors: Mapping[str, Tensor], config: ModelConfig, where: Path, *, sparse: bool = False) -> Params:
    """Return the tree "adapter", stacked over layers, from LoRA's factors by key (KEY.lora_A.weight, in any layout).

    Args:
        factors: in PyTorch's orientation.
        config: with the adapter's rank and linears.
        where: that errors name.
        sparse: whether a layer may lack both factors of a linear, which are then zeros.

    Raises: InputError naming a key that is unknown, missing or of another shape than the config's.
    """
    places, wanted = key_map.expected(config.backbone), _adapted(config)

    def empty(name: str) -> dict[str, list[HostArray | None]]:
        return {side: [None] * len(config.backbone.stack_layers(name)) for side in ("lora_a", "lora_b")}

    found = {name: empty(name) for name in wanted} if sparse else {}
    for key, tensor in factors.items():
        match = _FACTOR.fullmatch(key)
        linear = None if match is None else key_map.normalise(f"{match['linear']}.weight")[0]
        entry = None if linear is None else places.get(linear)
        if match is None or entry is None or entry.layer is None:
            raise InputError(f"{tensor.file}: unknown key {tensor.name}")
        name = entry.row.path.split("/")[1]
        if name not in wanted:
            raise InputError(f"{tensor.file}: unknown key {tensor.name}")
        found.setdefault(name, empty(name))[f"lora_{match['side'].lower()}"][entry.layer] = (
            tensor.read().astype(np.float32, copy=False).T
        )
    for name, sides in found.items() if sparse else ():
        inputs, outputs = config.backbone.linear_shapes[name]
        for layer in range(len(sides["lora_a"])):
            if sides["lora_a"][layer] is None and sides["lora_b"][layer] is None:
                sides["lora_a"][layer] = np.zeros((inputs, config.adapter.rank), np.float32)
                sides["lora_b"][layer] = np.zeros((config.adapter.rank, outputs), np.float32)
    missing = [name for name in wanted if name not in found]
    missing += [name for name, sides in found.items() for stack in sides.values() if any(x is None for x in stack)]
    if missing:
        raise InputError(f"{where}: LoRA factors of {missing[0]} are missing, in some layers or all")
    whole = {
        (name, side): [x for x in stack if x is not None]
        for name, sides in found.items()
        for side, stack in sides.items()
    }
    for name in found:
        inputs, outputs = config.backbone.linear_shapes[name]
        for side, shape in (("lora_a", (inputs, config.adapter.rank)), ("lora_b", (config.adapter.rank, outputs))):
            wrong = [part.shape for part in whole[name, side] if part.shape != shape]
            if wrong:
                raise InputError(f"{where}: {side} of {name} has shape {wrong[0]}, not {shape} as its config says")
    return {name: {side: np.stack(whole[name, side]) for side in sides} for name, sides in found.items()}


def _adapted(config: ModelConfig) -> tuple[str, ...]:
    """Return the names of the stacks of linears that an adapter is on."""
    adapter = config.adapter
    stacks = config.backbone.linear_shapes if adapter.rank else ()
    return tuple(name for target in adapter.targets for name in stacks if name.removeprefix(GLOBAL) == target)


def _is_ours(key: str) -> bool:
    return key.startswith(BLEND) or _FACTOR.fullmatch(key) is not None


def _check(record: object, expected: str, where: str) -> None:
    """Raise InputError unless a record is of a format and version that this program reads."""
    record = record if isinstance(record, Mapping) else {}
    if record.get("format") != expected:
        raise InputError(f"{where}: format {record.get('format')!r} is not {expected!r}")
    if record.get("version") != VERSION:
        raise InputError(
            f"{where}: format version {record.get('version')!r} is unknown (this program reads {VERSION}): "
            "update sst-jax, or export the model again"
        )


def _options(record: Json, name: str, where: str) -> Json:
    if not isinstance(record.get(name), Mapping):
        raise InputError(f"{where}: {name} is missing or not an object")
    return record[name]


def _prompts(record: Json, where: str) -> str | None:
    """Return the format of prompts that a record names; None where it names none."""
    value = record.get("prompts")
    if value not in (None, *FORMATS):
        raise InputError(f"{where}: prompts={value!r} is not one of {', '.join(FORMATS)}")
    return value


def _check_shapes(params: Params, config: ModelConfig, where: Path) -> None:
    """Raise InputError unless the stream's parameters are those that the config asks for, in shape and type."""
    wanted = decoder.abstract_params(config)["blend"]
    differing: Iterable[str] = sorted(set(wanted) ^ set(params["blend"]))
    for name in differing:
        raise InputError(f"{where}: the stream's parameter {name} is {'missing' if name in wanted else 'unknown'}")
    for name, leaf in wanted.items():
        value = params["blend"][name]
        if value.shape != leaf.shape or value.dtype != leaf.dtype:
            raise InputError(
                f"{where}: the stream's parameter {name} is {value.dtype} {list(value.shape)}; its options ask for "
                f"{leaf.dtype} {list(leaf.shape)}"
            )
