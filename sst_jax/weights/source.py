"""A source of weights: something that lists named tensors without reading them, and the one loop that fills a base.

`huggingface.open_folder` and `gguf.open_file` make sources; everything after them is the same.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import ml_dtypes
import numpy as np

from sst_jax.errors import InputError
from sst_jax.files import Progress, digest
from sst_jax.model.config import BackboneConfig
from sst_jax.model.quantization import storages
from sst_jax.types import DeviceArrays, HostArray, HostArrays, Json, Kernel, Params
from sst_jax.weights import key_map

__all__ = [
    "DTYPES",
    "ConvertedTensor",
    "Source",
    "Tensor",
    "converted_tensors",
    "digest",
    "fill_base",
    "lazy_base",
    "numpy_dtype",
    "param_shapes",
    "split_fused",
]

DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}


def numpy_dtype(dtype: str) -> np.dtype:
    """Return the numpy dtype of "float32" or "bfloat16".

    Raises: InputError for any other name.
    """
    if dtype not in DTYPES:
        raise InputError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}")
    return DTYPES[dtype]


class Tensor(NamedTuple):
    """A tensor on disk: what its header says, and how to read it."""

    name: str
    shape: tuple[int, ...]
    dtype: str  # as the format names it: "BF16", "Q4_K"
    file: Path
    read: Callable[[], HostArray]


@dataclasses.dataclass(frozen=True)
class Source:
    """A checkpoint whose headers have been read and whose weights have not.

    kind      "huggingface" or "gguf"
    layout    spelling of the keys (`names.LAYOUTS`), kept so that an export can mirror it; None for GGUF
    files     what `digest` identifies the checkpoint by
    dtype     the widest float dtype of the tensors, "float32" for anything quantised: reading in it loses nothing
    metadata  config.json, or the GGUF's key-value pairs
    """

    kind: str
    path: Path
    backbone: BackboneConfig
    headers: tuple[Tensor, ...]
    layout: str | None
    files: list[Path]
    dtype: str
    metadata: Json

    def tensors(self) -> Iterator[Tensor]:
        """Return the tensors in the order they lie on disk; nothing is read until `Tensor.read`."""
        return iter(self.headers)


def split_fused(tensors: list[Tensor], backbone: BackboneConfig, kind: str = "huggingface") -> list[Tensor]:
    """Return tensors with those that hold several linears replaced by their parts.

    Raises: InputError naming the key that has another shape than its parts together.
    """
    whole, found = key_map.fused_keys(backbone, kind), []
    for tensor in tensors:
        parts = whole.get(tensor.name)
        if parts is None:
            found.append(tensor)
            continue
        rows = [part.shape[0] for part in parts]
        expected = (sum(rows), parts[0].shape[1])
        if tensor.shape != expected:
            raise InputError(
                f"{tensor.file}: key {tensor.name} has shape {list(tensor.shape)}, expected {list(expected)} of this "
                "config"
            )
        ends = np.cumsum(rows).tolist()
        for part, end in zip(parts, ends, strict=True):
            read = functools.partial(_rows, tensor.read, end - part.shape[0], end)
            found.append(tensor._replace(name=part.key, shape=part.shape, read=read))
    return found


def _rows(read: Callable[[], HostArray], start: int, end: int) -> HostArray:
    return read()[start:end]


def param_shapes(
    backbone: BackboneConfig, dtype: str, quantize: str = "none"
) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """Return (shape, dtype) of every array of a base tree, by path: "layers/q/kernel", or a storage's names.

    Raises: InputError for an unknown dtype, or linears that the storage cannot hold.
    """
    float_type, storage, found = numpy_dtype(dtype), storages.get(quantize), {}
    for row in key_map.table(backbone):
        shape = key_map.param_shape(row, backbone)
        if not row.path.endswith("/kernel"):
            found[row.path] = (shape, float_type)
            continue
        leaf = storage.abstract(shape, float_type)
        found |= {f"{row.path.removesuffix('kernel')}{name}": (part.shape, part.dtype) for name, part in leaf.items()}
    return found


class ConvertedTensor(NamedTuple):
    """What one tensor of a source becomes.

    path: of its parameter in the base tree, unquantised, such as "layers/q/kernel".
    layer: None where the parameter has no layers.
    arrays: the arrays (or views) by path that it becomes, several where it is quantised.
    """

    path: str
    layer: int | None
    arrays: HostArrays


def converted_tensors(
    source: Source, dtype: str, quantize: str = "none", done: Callable[[str, int | None], bool] | None = None
):
    """Yield the `ConvertedTensor` of every tensor of a source, one at a time, in the order they lie on disk.

    Linears are quantised from the source's own numbers in float32. All names and shapes are checked before any weight
    is read. `done(path, layer)` says which tensors to pass over; they are yielded as None.

    Raises: InputError naming key and file, as `names.bind`; when a tied output head differs from the embedding.
    """
    target = numpy_dtype(dtype)
    bound = key_map.bind(source.tensors(), source.backbone, source.kind, source.path)
    for tensor, entry in bound.tensors:
        path, layer = entry.row.path, entry.layer
        if done is not None and done(path, layer):
            yield None
            continue
        value = tensor.read()
        if value.shape != entry.shape:
            raise InputError(f"{tensor.file}: key {tensor.name} changed while it was being read")
        if bound.head is not None and path == "embed/embedding" and not np.array_equal(bound.head.read(), value):
            raise InputError(
                f"{bound.head.file}: {bound.head.name} differs from {tensor.name}, but the model's config ties them "
                "(tie_word_embeddings)"
            )
        value = key_map.transform(entry.row, source.backbone, source.kind)(value)
        if quantize != "none" and path.endswith("/kernel"):
            leaf = _quantised(value.T, quantize)
            yield ConvertedTensor(
                path, layer, {f"{path.removesuffix('kernel')}{name}": part for name, part in leaf.items()}
            )
        else:
            yield ConvertedTensor(path, layer, {path: value.astype(target, copy=False)})


_ROWS = 1 << 24  # weights quantised at once: the float32 copies then take a few hundred MB, whatever the tensor


@functools.partial(jax.jit, static_argnums=1)
def _quantise(part: Kernel, kind: str) -> DeviceArrays:
    return storages.get(kind).quantise(part.T)


def _quantised(value: HostArray, kind: str) -> HostArrays:
    """Return the leaf of one linear, [out, in] as on disk, computed in strips of outputs, which share nothing."""
    group = storages.get(kind).group
    strip = max(_ROWS // value.shape[1] // group, 1) * group
    strips = [value[at : at + strip] for at in range(0, len(value), strip)]
    leaves = [jax.tree.map(np.asarray, _quantise(part, kind)) for part in strips]
    return leaves[0] if len(leaves) == 1 else jax.tree.map(lambda *parts: np.concatenate(parts, axis=-1), *leaves)


def fill_base(source: Source, dtype: str, progress: Progress | None = None, quantize: str = "none") -> Params:
    """Read a source into a base tree of numpy arrays, kernels [L, in, out], in "float32" or "bfloat16", or quantised.

    Memory: the base itself plus one tensor.

    Raises: InputError as `converted_tensors`.
    """
    key_map.bind(source.tensors(), source.backbone, source.kind, source.path)  # no memory for shapes that no file has
    base: Params = {}
    for path, (shape, param_dtype) in param_shapes(source.backbone, dtype, quantize).items():
        key_map.set_param(base, path, np.empty(shape, param_dtype))
    done, total = 0, sum(leaf.nbytes for leaf in jax.tree.leaves(base))
    for tensor in converted_tensors(source, dtype, quantize):
        for path, value in tensor.arrays.items():
            key_map.get_param(base, path)[... if tensor.layer is None else tensor.layer] = value
            done += value.nbytes
        if progress is not None:
            progress(done, total)
    return base


class SourceStack:
    """The stacked arrays [L, ...] of one parameter of a source, each read and transformed when it is indexed."""

    def __init__(self, shape: tuple[int, ...], reads: list[Callable[[], HostArray]], transform: Callable):
        self.shape, self.reads, self.transform = shape, reads, transform

    def __getitem__(self, layer: int) -> HostArray:
        return self.transform(self.reads[layer]())


def lazy_base(source: Source) -> Params:
    """Return the base tree of a source with its layers as `SourceStack`, in the source's own types.

    Raises: InputError as `converted_tensors`, but for the head, which is not compared.
    """
    bound = key_map.bind(source.tensors(), source.backbone, source.kind, source.path)
    base: Params = {}
    reads: dict[str, dict[int | None, Callable[[], HostArray]]] = {}
    for tensor, entry in bound.tensors:
        reads.setdefault(entry.row.path, {})[entry.layer] = tensor.read
    for row in key_map.table(source.backbone):
        found = reads[row.path]
        transform = key_map.transform(row, source.backbone, source.kind)
        if None in found:
            key_map.set_param(base, row.path, transform(found[None]()))
        else:
            layers = [found[layer] for layer in range(len(found))]
            key_map.set_param(base, row.path, SourceStack(key_map.param_shape(row, source.backbone), layers, transform))
    return base
