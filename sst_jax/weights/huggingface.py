"""Hugging Face folders of safetensors, in and out. Needs no torch, and never opens a pickle."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

from sst_jax.errors import InputError
from sst_jax.model.config import BackboneConfig
from sst_jax.weights import names
from sst_jax.weights.files import Progress, is_plain_name, read_json, staged_folder
from sst_jax.weights.source import Source, Tensor, numpy_dtype

INDEX = "model.safetensors.index.json"
ALLOW_PATTERNS = ["*.json", "*.safetensors", "tokenizer*", "chat_template.jinja"]

_FLOATS = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
_KINDS = {"sliding_attention": "local", "full_attention": "global"}

# ---------------------------------------------------------------------------------------------------- config.json

# Fields of BackboneConfig that config.json spells otherwise, with Gemma3TextConfig's defaults (transformers 5.23): the
# hub's multimodal configs leave many to them. A float default means that the field may be a float.
_FIELDS: dict[str, tuple[str, int | float]] = {
    "num_layers": ("num_hidden_layers", 26),
    "d_model": ("hidden_size", 2304),
    "d_ff": ("intermediate_size", 9216),
    "num_heads": ("num_attention_heads", 8),
    "num_kv_heads": ("num_key_value_heads", 4),
    "head_dim": ("head_dim", 256),
    "vocab_size": ("vocab_size", 262_208),
    "window": ("sliding_window", 4096),
    "query_pre_attn_scalar": ("query_pre_attn_scalar", 256.0),
    "norm_eps": ("rms_norm_eps", 1e-6),
    "max_positions": ("max_position_embeddings", 131_072),
}

# What the block does not compute: the field must be absent or have one of these values.
_ONLY: dict[str, tuple[Any, ...]] = {
    "hidden_activation": ("gelu_pytorch_tanh",),
    "attention_bias": (False, None),
    "tie_word_embeddings": (True, None),
    "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
    "use_bidirectional_attention": (False, None),
    "quantization_config": (None,),
}


def _number(fields: Mapping[str, Any], name: str, default: int | float | None, where: str) -> Any:
    value = fields.get(name, default)
    kind = int if isinstance(default, int) else (int, float)
    # Fields reach array shapes and Python ranges: the bound keeps absurd claims out of both.
    if not isinstance(value, kind) or isinstance(value, bool) or not 0 < value < 2**40:
        raise InputError(f"{where}: {name}={value!r} must be a positive {'integer' if kind is int else 'number'}")
    return value if kind is int else float(value)


def _rope(fields: Mapping[str, Any], where: str) -> tuple[float, float, float]:
    """(theta of local layers, theta of global layers, linear scale of global layers), from either style of config."""
    given = fields.get("rope_parameters") or {}
    if not isinstance(given, Mapping) or set(given) - set(_KINDS):
        raise InputError(f"{where}: rope_parameters={given!r} must have one entry per layer type ({', '.join(_KINDS)})")
    theta, scale = {}, {}
    for kind, older, default in (
        ("sliding_attention", "rope_local_base_freq", 10_000.0),
        ("full_attention", "rope_theta", 1_000_000.0),
    ):
        # Scaling in the older style is added to the global layers' entry and wins, as in transformers.
        scaling = fields.get("rope_scaling") if kind == "full_attention" else None
        name = "rope_scaling" if scaling is not None else f"rope_parameters.{kind}"
        for part in (given.get(kind), scaling):
            if part is not None and not isinstance(part, Mapping):
                raise InputError(f"{where}: {name}={part!r} must be an object")
        rope = {**(given.get(kind) or {}), **(scaling or {})}
        rope_type = rope.get("rope_type", rope.get("type", "default"))
        unknown = sorted(set(rope) - {"rope_type", "type", "rope_theta", "factor"})
        if rope_type not in ("default", "linear") or unknown or (rope_type == "linear" and kind == "sliding_attention"):
            raise InputError(f"{where}: {name}={rope!r} is unsupported; known is linear scaling of full attention")
        if "rope_theta" in rope:
            theta[kind] = _number(rope, "rope_theta", default, f"{where}: {name}")
        else:
            theta[kind] = _number(fields, older, default, where)
        scale[kind] = _number(rope, "factor", None, f"{where}: {name}") if rope_type == "linear" else 1.0
    return theta["sliding_attention"], theta["full_attention"], scale["full_attention"]


def backbone_from_config(config: Mapping[str, Any], where: str = "config.json") -> BackboneConfig:
    """A config.json of Gemma-3 text ("gemma3_text") or multimodal ("gemma3") models, of transformers 4 or 5.

    Absent fields take Gemma3TextConfig's defaults, as they do in transformers.

    Raises: InputError naming the field that is unsupported, misshapen or out of range.
    """
    model_type, text, levels = config.get("model_type"), config, [(where, config)]
    if model_type == "gemma3":
        text, where = config.get("text_config"), f"{where}: text_config"
        if not isinstance(text, Mapping):
            raise InputError(f"{where} is missing or not an object")
        model_type = text.get("model_type", "gemma3_text")
        levels.append((where, text))
    if model_type != "gemma3_text":
        raise InputError(f"{where}: model_type={model_type!r} is unsupported; known are 'gemma3_text' and 'gemma3'")
    for place, level in levels:
        for name, allowed in _ONLY.items():
            if name in level and level[name] not in allowed:
                raise InputError(f"{place}: {name}={level[name]!r} is unsupported; it must be {allowed[0]!r}")

    fields = {name: _number(text, field, default, where) for name, (field, default) in _FIELDS.items()}
    layers = fields["num_layers"]
    if layers > names.MAX_LAYERS:
        raise InputError(f"{where}: num_hidden_layers={layers} is beyond {names.MAX_LAYERS}")
    layer_types = text.get("layer_types")
    if layer_types is None:
        pattern = _number(text, "sliding_window_pattern", 6, where)
        layer_types = ["sliding_attention" if (layer + 1) % pattern else "full_attention" for layer in range(layers)]
    if not isinstance(layer_types, list) or not all(kind in list(_KINDS) for kind in layer_types):
        raise InputError(f"{where}: layer_types must be a list of {' and '.join(_KINDS)}")
    fields["layer_types"] = tuple(_KINDS[kind] for kind in layer_types)
    fields["rope_theta_local"], fields["rope_theta_global"], fields["rope_scale_global"] = _rope(text, where)
    try:
        return BackboneConfig(**fields)
    except InputError as error:
        raise InputError(f"{where}: {error}") from error


def config_json(backbone: BackboneConfig, dtype: str, layout: str = "text") -> dict[str, Any]:
    """The config.json of an exported backbone.

    Fields are spelled as on the hub, which transformers 4 and 5 both read: transformers 4 would pass over
    `rope_parameters` in silence. For the multimodal layouts the same text config is wrapped as model_type "gemma3",
    the only one under which transformers looks for such keys (a Gemma3ForCausalLM finds none of them and stays random).
    It has the smallest possible vision tower, which is not in the checkpoint: AutoModelForCausalLM reports its weights
    as missing and computes text exactly; images mean nothing to such an export.
    """
    scalar, scale = backbone.query_pre_attn_scalar, backbone.rope_scale_global
    text = {
        **{field: getattr(backbone, name) for name, (field, _) in _FIELDS.items()},
        **{name: allowed[0] for name, allowed in _ONLY.items() if name != "quantization_config"},
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "layer_types": [{v: k for k, v in _KINDS.items()}[kind] for kind in backbone.layer_types],
        "query_pre_attn_scalar": int(scalar) if float(scalar).is_integer() else scalar,  # transformers insists on int
        "rope_local_base_freq": backbone.rope_theta_local,
        "rope_scaling": None if scale == 1.0 else {"factor": scale, "rope_type": "linear"},
        "rope_theta": backbone.rope_theta_global,
        "bos_token_id": 2,
        "eos_token_id": 1,
        "pad_token_id": 0,
        "dtype": dtype,
        "torch_dtype": dtype,
    }
    if layout == "text":
        return text
    del text["architectures"]
    vision = {
        "model_type": "siglip_vision_model", "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1,
        "num_attention_heads": 1, "image_size": 28, "patch_size": 14,
    }  # fmt: skip
    return {
        "architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3", "text_config": text,
        "vision_config": vision, "mm_tokens_per_image": 1, "tie_word_embeddings": True, "dtype": dtype,
        "torch_dtype": dtype,
    }  # fmt: skip


# -------------------------------------------------------------------------------------------------------- reading


def _weight_files(folder: Path) -> tuple[list[Path], dict[str, str] | None]:
    """(safetensors files in order, the index's map from key to file name or None), chosen as transformers does.

    Raises: InputError naming what is missing or leads out of the folder.
    """
    single, index = folder / "model.safetensors", folder / INDEX
    if single.is_file():
        return [single], None
    if index.is_file():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise InputError(f"{index}: weight_map is missing or empty")
        for key, name in weight_map.items():
            if not is_plain_name(name) or not name.endswith(".safetensors"):
                raise InputError(f"{index}: {key} points to {name!r}, not to a .safetensors file in its own folder")
            if not (folder / name).is_file():
                raise InputError(f"{index} names {name}, which is missing from {folder}")
        return [folder / name for name in sorted(set(weight_map.values()))], weight_map
    files = sorted(folder.glob("*.safetensors"))
    if len(files) == 1:
        return files, None
    if files:
        raise InputError(f"{folder} has {len(files)} safetensors files and no {INDEX} to say how they belong together")
    raise InputError(f"{folder} has no safetensors weights (pickled .bin checkpoints are never opened)")


def _check_length(file: Path) -> None:
    """Compares a safetensors header with the size of its file, so that a cut-off download is called by its name."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or 8 + length > size:
            raise InputError(f"{file} is truncated or not a safetensors file: {size} bytes do not hold its header")
        header = json.loads(stream.read(length))
    end = max((entry["data_offsets"][1] for key, entry in header.items() if key != "__metadata__"), default=0)
    if 8 + length + end > size:
        raise InputError(f"{file} is truncated: its header promises {8 + length + end} bytes, the file has {size}")


def _read(file: Path, name: str) -> np.ndarray:
    # Opened anew for each tensor: the pages of a long-lived map would all count as this process's memory.
    try:
        with safe_open(file, framework="numpy") as reader:
            return reader.get_tensor(name)
    except Exception as error:
        raise InputError(f"{file}: cannot read {name}: {error}") from error


def _headers(file: Path) -> list[Tensor]:
    """The tensors of one safetensors file, header only.

    Raises: InputError naming the file, whatever is wrong with it.
    """
    try:
        _check_length(file)
        with safe_open(file, framework="numpy") as reader:
            slices = [(name, reader.get_slice(name)) for name in reader.offset_keys()]
            tensors = [
                Tensor(name, tuple(part.get_shape()), part.get_dtype(), file, functools.partial(_read, file, name))
                for name, part in slices
            ]
    except InputError:
        raise
    except Exception as error:  # untrusted bytes: the parsers below may raise anything
        raise InputError(f"{file} is not a valid safetensors file: {error}") from error
    for tensor in tensors:
        if tensor.dtype not in _FLOATS and names.normalise(tensor.name)[0] is not None:
            raise InputError(f"{file}: key {tensor.name} has dtype {tensor.dtype}; readable are {', '.join(_FLOATS)}")
    return tensors


def open_folder(folder: str | Path) -> Source:
    """Opens config.json and `model.safetensors`, an index with its shards, or the folder's only *.safetensors.

    Reads headers, no weights.

    Raises: InputError naming the file, key or field at fault.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder")
    config_file = folder / "config.json"
    config = read_json(config_file)
    backbone = backbone_from_config(config, str(config_file))
    files, weight_map = _weight_files(folder)
    by_file = {file.name: _headers(file) for file in files}
    held = {name: {tensor.name for tensor in tensors} for name, tensors in by_file.items()}
    for key, name in (weight_map or {}).items():
        if key not in held[name]:
            raise InputError(f"{folder / INDEX} says that {name} holds {key}, but it does not")
    headers = [tensor for tensors in by_file.values() for tensor in tensors]
    dtypes = {_FLOATS[tensor.dtype] for tensor in headers if names.normalise(tensor.name)[0] is not None}
    return Source(
        kind="huggingface",
        path=folder,
        backbone=backbone,
        headers=tuple(headers),
        layout=names.detect_layout(tensor.name for tensor in headers),
        files=[config_file, *files],
        dtype=dtypes.pop() if len(dtypes) == 1 else "float32",
        metadata=config,
    )


def resolve_hub(repo_id: str, revision: str | None = None) -> Path:
    """The local snapshot of a hub repository, downloaded unless a complete one is already cached.

    A cached snapshot is used as it is, without a request, so that no token or network is needed twice.
    Only JSON, safetensors and tokenizer files are ever fetched.

    Raises: InputError for a malformed id, a gated or missing repository, or no network, saying how to mend it.
    """
    from huggingface_hub import errors, snapshot_download

    def cached(patterns: list[str]) -> Path | None:
        try:
            folder = Path(snapshot_download(repo_id, revision=revision, allow_patterns=patterns, local_files_only=True))
            _weight_files(folder)
        except (errors.LocalEntryNotFoundError, InputError):
            return None
        return folder if (folder / "config.json").is_file() else None

    try:
        if (folder := cached(ALLOW_PATTERNS)) is not None:
            return folder
        return Path(snapshot_download(repo_id, revision=revision, allow_patterns=ALLOW_PATTERNS))
    except errors.HFValidationError as error:
        raise InputError(f"{repo_id!r} is neither a local folder nor a hub id (owner/name)") from error
    except Exception as error:  # the hub's client lets its transport's many exceptions through
        # A snapshot that some other program cached may lack, say, a processor's JSON; with its weights it will do.
        if (folder := cached(["config.json", "*.safetensors", INDEX])) is not None:
            return folder
        if isinstance(error, errors.GatedRepoError):
            page = f"https://huggingface.co/{repo_id}"
            reason = f"is gated: accept its licence at {page} and run `hf auth login`"
        elif isinstance(error, errors.RepositoryNotFoundError | errors.RevisionNotFoundError):
            reason = f"(revision {revision or 'main'}) is missing or private: check the id, run `hf auth login`"
        else:
            first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
            reason = f"is not cached and cannot be fetched ({first_line}): connect to the network"
        raise InputError(f"{repo_id} {reason}, or pass the path of a local folder") from error


# -------------------------------------------------------------------------------------------------------- writing


def _base_tensors(
    backbone: BackboneConfig, base: Mapping[str, Any], dtype: np.dtype, layout: str
) -> Iterator[tuple[str, int, Any]]:
    """(key, bytes, function that makes the array) of every tensor to write, shapes checked and nothing copied yet."""

    def make(slot: Any, entry: names.Entry) -> np.ndarray:
        value = np.asarray(slot if entry.layer is None else slot[entry.layer]).astype(dtype, copy=False)
        return np.ascontiguousarray(names.TRANSFORMS["huggingface"][entry.row.transform](value))

    for entry in names.expected(backbone).values():
        slot = names.get_slot(base, entry.row.slot)
        wanted = names.slot_shape(entry.row, backbone)
        if tuple(slot.shape) != wanted:
            raise InputError(f"base slot {entry.row.slot} has shape {list(slot.shape)}, expected {list(wanted)}")
        size = math.prod(entry.shape) * dtype.itemsize
        yield names.relayout(entry.key, layout), size, functools.partial(make, slot, entry)


def write_folder(
    path: str | Path,
    backbone: BackboneConfig,
    base: Mapping[str, Any],
    dtype: str,
    layout: str = "text",
    shard_bytes: float = 2e9,
    extra_files: Mapping[str, bytes] | None = None,
    *,
    extra_tensors: Mapping[str, np.ndarray] | None = None,
    extra_config: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> Path:
    """Writes a base tree as a folder that transformers loads: safetensors (sharded when large) and its configs.

    The tied output head is left out. `layout` spells the keys (`names.LAYOUTS`); for what the multimodal ones mean
    without a vision tower see `config_json`. `extra_files` (tokenizer files; may replace generation_config.json),
    `extra_tensors` and `extra_config` go in beside. At most one shard is in memory; the folder appears when complete.

    Raises: InputError when `path` is not empty, a slot is missing or misshapen, or an extra name is taken.
    """
    target, layout_config = numpy_dtype(dtype), config_json(backbone, dtype, layout)
    tensors = list(_base_tensors(backbone, base, target, layout))
    for key, value in (extra_tensors or {}).items():
        if any(key == taken for taken, _, _ in tensors):
            raise InputError(f"extra tensor {key} would replace one of the base")
        tensors.append((key, value.nbytes, functools.partial(np.ascontiguousarray, value)))
    shards: list[list[tuple[str, int, Any]]] = [[]]
    for tensor in tensors:
        if shards[-1] and sum(size for _, size, _ in shards[-1]) + tensor[1] > shard_bytes:
            shards.append([])
        shards[-1].append(tensor)
    total, done = sum(size for _, size, _ in tensors), 0

    with staged_folder(path) as folder:
        weight_map = {}
        for number, shard in enumerate(shards, 1):
            name = f"model-{number:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else "model.safetensors"
            save_file({key: make() for key, _, make in shard}, folder / name, metadata={"format": "pt"})
            weight_map.update((key, name) for key, _, _ in shard)
            done += sum(size for _, size, _ in shard)
            if progress is not None:
                progress(done, total)
        documents = {"config.json": {**layout_config, **(extra_config or {})}}
        documents["generation_config.json"] = {"bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0}
        if len(shards) > 1:
            documents[INDEX] = {"metadata": {"total_size": total}, "weight_map": weight_map}
        for name, document in documents.items():
            (folder / name).write_text(json.dumps(document, indent=2, sort_keys=True) + "\n")
        for name, content in (extra_files or {}).items():
            own = name in (INDEX, "config.json", "model.safetensors", *weight_map.values())
            if own or not is_plain_name(name):
                raise InputError(f"extra file {name!r} is not a plain file name, or is the export's own")
            (folder / name).write_bytes(content)
    return Path(path)
