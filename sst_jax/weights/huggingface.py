"""Hugging Face folders of safetensors, in and out. Needs no torch, and never opens a pickle."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jax.typing import DTypeLike
from safetensors import safe_open
from safetensors.numpy import save_file

from sst_jax.errors import InputError
from sst_jax.files import Progress, check_no_pointer, is_plain_name, read_json, staged_folder
from sst_jax.model.config import BackboneConfig
from sst_jax.types import HostArray, Json, LayerStack, Params
from sst_jax.weights import key_map, prequantised
from sst_jax.weights.hub_config import backbone_from_config, config_json
from sst_jax.weights.source import DTYPES, Source, Tensor, numpy_dtype, split_fused

INDEX = "model.safetensors.index.json"
ALLOW_PATTERNS = ["*.json", "*.safetensors", "tokenizer*", "chat_template.jinja"]

# RoPE's frequencies, which transformers saved before 4.32 and computes from config.json since.
_FREQUENCIES = re.compile(r"(^|\.)rotary_emb(_local)?\.(original_)?inv_freq$")
_TOKENIZERS = ("tokenizer.json", "tokenizer.model")  # large enough for Git LFS
_FLOATS = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}

# -------------------------------------------------------------------------------------------------------- reading


def _weight_files(folder: Path) -> tuple[list[Path], dict[str, str] | None]:
    """Return (safetensors files in order, the index's map from key to file name or None), chosen as transformers does.

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
    pickled = next((file for name in ("*.bin", "*.pt", "*.pth") for file in sorted(folder.glob(name))), None)
    if pickled is not None:
        raise InputError(
            f"{folder} has no safetensors weights, and {pickled.name} is a pickle, which can run any program "
            "(pickled .bin checkpoints are never opened): save it with transformers' save_pretrained, and open that"
        )
    raise InputError(f"{folder} has no safetensors weights (pickled .bin checkpoints are never opened)")


def _check_length(file: Path) -> dict[str, int]:
    """Return where each tensor begins, in bytes, by the header of a safetensors file.

    The header is compared with the size of its file, so that a cut-off download is called by its name.
    """
    check_no_pointer(file)
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or 8 + length > size:
            raise InputError(f"{file} is truncated or not a safetensors file: {size} bytes do not hold its header")
        header = json.loads(stream.read(length))
    end = max((entry["data_offsets"][1] for key, entry in header.items() if key != "__metadata__"), default=0)
    if 8 + length + end > size:
        raise InputError(f"{file} is truncated: its header promises {8 + length + end} bytes, the file has {size}")
    return {key: 8 + length + entry["data_offsets"][0] for key, entry in header.items() if key != "__metadata__"}


def _read(file: Path, name: str, dtype: str, shape: tuple[int, ...], start: int) -> HostArray:
    # Mapped anew for each tensor: the pages of a long-lived map would all count as this process's memory.
    try:
        kind = prequantised.DTYPES.get(dtype) or (np.dtype(_FLOATS[dtype]) if dtype in _FLOATS else None)
        if kind is not None and shape and 0 not in shape:  # a view of the file, where the library makes a copy
            return np.memmap(file, kind, "r", start, shape)
        with safe_open(file, framework="numpy") as reader:
            return reader.get_tensor(name)
    except Exception as error:
        raise InputError(f"{file}: cannot read {name}: {error}") from error


def headers(file: Path, more: Collection[str] = ()) -> list[Tensor]:
    """Return the tensors of one safetensors file, header only; `more` are types that do beside floats.

    Raises: InputError naming the file, whatever is wrong with it.
    """
    try:
        starts = _check_length(file)
        with safe_open(file, framework="numpy") as reader:
            tensors = []
            for name in reader.offset_keys():
                part = reader.get_slice(name)
                shape, dtype = tuple(part.get_shape()), part.get_dtype()
                read = functools.partial(_read, file, name, dtype, shape, starts[name])
                tensors.append(Tensor(name, shape, dtype, file, read))
    except InputError:
        raise
    except Exception as error:  # untrusted bytes: the parsers below may raise anything
        raise InputError(f"{file} is not a valid safetensors file: {error}") from error
    for tensor in tensors:
        if tensor.dtype not in (*_FLOATS, *more) and key_map.normalise(tensor.name)[0] is not None:
            raise InputError(f"{file}: key {tensor.name} has dtype {tensor.dtype}; readable are {', '.join(_FLOATS)}")
    return tensors


def open_folder(folder: str | Path, config: Json | None = None, ignore: Callable[[str], bool] | None = None) -> Source:
    """Open config.json and `model.safetensors`, an index with its shards, or the folder's only *.safetensors.

    Reads headers, no weights. `config` replaces what config.json says; `ignore` says of a key whether its tensor is no
    part of the backbone and to be left out.

    Raises: InputError naming the file, key or field at fault.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder")
    config_file = folder / "config.json"
    config = read_json(config_file) if config is None else config
    backbone = backbone_from_config(config, str(config_file))
    for name in _TOKENIZERS:
        if (folder / name).is_file():
            check_no_pointer(folder / name)
    files, weight_map = _weight_files(folder)
    stored = prequantised.kind_of(config.get("quantization_config"))
    by_file = {file.name: headers(file, prequantised.DTYPES if stored else ()) for file in files}
    held = {name: {tensor.name for tensor in tensors} for name, tensors in by_file.items()}
    for key, name in (weight_map or {}).items():
        if key not in held[name]:
            raise InputError(f"{folder / INDEX} says that {name} holds {key}, but it does not")
    found = [tensor for tensors in by_file.values() for tensor in tensors if not _FREQUENCIES.search(tensor.name)]
    found = [tensor for tensor in found if ignore is None or not ignore(tensor.name)]
    found = split_fused(prequantised.dequantised(found, stored) if stored else found, backbone)
    dtypes = {_FLOATS.get(tensor.dtype, "float32") for tensor in found if key_map.normalise(tensor.name)[0] is not None}
    return Source(
        kind="huggingface",
        path=folder,
        backbone=backbone,
        headers=tuple(found),
        layout=key_map.detect_layout(tensor.name for tensor in found),
        files=[config_file, *files],
        dtype=dtypes.pop() if len(dtypes) == 1 and dtypes <= set(DTYPES) else "float32",
        metadata=dict(config),
    )


def resolve_hub(repo_id: str, revision: str | None = None) -> Path:
    """Return the local snapshot of a hub repository, downloaded unless a complete one is already cached.

    Args:
        repo_id: "owner/name".
        revision: a branch, a tag or a commit; None: what "main" is.

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
        return folder if any((folder / name).is_file() for name in ("config.json", "adapter_config.json")) else None

    try:
        if (folder := cached(ALLOW_PATTERNS)) is not None:
            return folder
        return Path(snapshot_download(repo_id, revision=revision, allow_patterns=ALLOW_PATTERNS))
    except errors.HFValidationError as error:
        raise InputError(f"{repo_id!r} is neither a local folder nor a hub id (owner/name)") from error
    except Exception as error:  # the hub's client lets its transport's many exceptions through
        # A snapshot that some other program cached may lack, say, a processor's JSON; with its weights it will do.
        if (folder := cached(["config.json", "adapter_config.json", "*.safetensors", INDEX])) is not None:
            return folder
        if isinstance(error, errors.GatedRepoError):
            page = f"https://huggingface.co/{repo_id}"
            reason = f"is gated: accept its licence at {page} and run `hf auth login`"
        elif isinstance(error, errors.RepositoryNotFoundError | errors.RevisionNotFoundError):
            reason = f"(revision {revision or 'main'}) is missing or private: check the id, run `hf auth login`"
        else:
            first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
            at = "" if revision is None else f" (revision {revision})"
            reason = f"is not cached{at} and cannot be fetched ({first_line}): connect to the network"
        raise InputError(f"{repo_id} {reason}, or pass the path of a local folder") from error


# -------------------------------------------------------------------------------------------------------- writing


class PendingTensor(NamedTuple):
    """A tensor to be written: its key and bytes, and what makes it when its shard is written."""

    key: str
    size: int
    make: Callable[[], HostArray]


@dataclasses.dataclass(frozen=True)
class FolderExtras:
    """What goes into a folder beside the base.

    files    by name, such as the tokenizer's; one may replace generation_config.json
    tensors  by key
    config   fields of config.json
    """

    files: Mapping[str, bytes] = dataclasses.field(default_factory=dict)
    tensors: Mapping[str, HostArray] = dataclasses.field(default_factory=dict)
    config: Json = dataclasses.field(default_factory=dict)


def _base_tensors(backbone: BackboneConfig, base: Params, dtype: DTypeLike, layout: str) -> Iterator[PendingTensor]:
    """Yield every tensor to write, shapes checked and nothing copied yet."""

    def make(slot: LayerStack, entry: key_map.CheckpointKey) -> HostArray:
        value = np.asarray(slot if entry.layer is None else slot[entry.layer]).astype(dtype, copy=False)
        return np.ascontiguousarray(key_map.transform(entry.row, backbone, "huggingface")(value))

    for entry in key_map.expected(backbone).values():
        slot = key_map.get_param(base, entry.row.path)
        wanted = key_map.param_shape(entry.row, backbone)
        if tuple(slot.shape) != wanted:
            raise InputError(f"base slot {entry.row.path} has shape {list(slot.shape)}, expected {list(wanted)}")
        size = math.prod(entry.shape) * np.dtype(dtype).itemsize
        yield PendingTensor(key_map.relayout(entry.key, layout), size, functools.partial(make, slot, entry))


def _fused(backbone: BackboneConfig, tensors: Iterator[PendingTensor]) -> Iterator[PendingTensor]:
    """Yield tensors with the parts of those that hold several linears put together."""
    whole = {part.key: key for key, parts in key_map.fused_keys(backbone).items() for part in parts}
    left, held = Counter(whole.values()), defaultdict(list)
    for tensor in tensors:
        key = whole.get(tensor.key)
        if key is None:
            yield tensor
            continue
        held[key].append(tensor)
        if len(held[key]) == left[key]:
            parts = held.pop(key)
            yield PendingTensor(key, sum(part.size for part in parts), functools.partial(_together, parts))


def _together(parts: list[PendingTensor]) -> HostArray:
    return np.concatenate([part.make() for part in parts])


def _config_documents(config: Json, extra: Json) -> dict[str, Json]:
    """Return the JSON files of a folder that hold its config, by name; `extra` fields leave the dtype as it is."""
    types = ("dtype", "torch_dtype")
    named = {key: config[key] for key in types if key in config}
    whole = {**config, **{key: value for key, value in extra.items() if key not in types}, **named}
    text = whole.get("text_config", config)
    return {
        "config.json": whole,
        "generation_config.json": {key: text[key] for key in text if key.endswith("_token_id")},
    }


_NOTHING = FolderExtras()


def write_folder(
    path: str | Path,
    backbone: BackboneConfig,
    base: Params,
    dtype: str,
    layout: str = "text",
    shard_bytes: float = 2e9,
    extras: FolderExtras = _NOTHING,
    progress: Progress | None = None,
) -> Path:
    """Write a base tree as a folder that transformers loads: safetensors (sharded when large) and its configs.

    The tied output head is left out. At most one shard is in memory; the folder appears when it is complete.

    Args:
        path: a folder that is new or empty.
        backbone: of the base.
        base: its layers may be any `LayerStack`.
        dtype: of the weights, "float32" or "bfloat16".
        layout: spelling of the keys (`registry.LAYOUTS`); for what the multimodal ones mean without a vision tower
            see `config_json`.
        shard_bytes: the most in one file.
        extras: what goes in beside.
        progress: called with (bytes written, bytes in all).

    Raises: InputError when `path` is not empty, a slot is missing or misshapen, or an extra name is taken.
    """
    target, layout_config = numpy_dtype(dtype), config_json(backbone, dtype, layout)
    tensors = list(_fused(backbone, _base_tensors(backbone, base, target, layout)))
    for key, value in extras.tensors.items():
        if any(key == tensor.key for tensor in tensors):
            raise InputError(f"extra tensor {key} would replace one of the base")
        tensors.append(PendingTensor(key, value.nbytes, functools.partial(np.ascontiguousarray, value)))
    shards: list[list[PendingTensor]] = [[]]
    for tensor in tensors:
        if shards[-1] and sum(other.size for other in shards[-1]) + tensor.size > shard_bytes:
            shards.append([])
        shards[-1].append(tensor)
    total, done = sum(tensor.size for tensor in tensors), 0

    with staged_folder(path) as folder:
        weight_map: dict[str, str] = {}
        for number, shard in enumerate(shards, 1):
            name = f"model-{number:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else "model.safetensors"
            save_file({tensor.key: tensor.make() for tensor in shard}, folder / name, metadata={"format": "pt"})
            weight_map.update({tensor.key: name for tensor in shard})
            done += sum(tensor.size for tensor in shard)
            if progress is not None:
                progress(done, total)
        documents = _config_documents(layout_config, extras.config)
        if len(shards) > 1:
            documents[INDEX] = {"metadata": {"total_size": total}, "weight_map": weight_map}
        for name, document in documents.items():
            (folder / name).write_text(json.dumps(document, indent=2, sort_keys=True) + "\n")
        for name, content in extras.files.items():
            own = name in (INDEX, "config.json", "model.safetensors", *weight_map.values())
            if own or not is_plain_name(name):
                raise InputError(f"extra file {name!r} is not a plain file name, or is the export's own")
            (folder / name).write_bytes(content)
    return Path(path)
