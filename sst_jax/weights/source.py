"""A source of weights: something that lists named tensors without reading them, and the one loop that fills a base.

`huggingface.open_folder` and `gguf.open_file` make sources; everything after them is the same.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from sst_jax.errors import InputError
from sst_jax.model.config import BackboneConfig
from sst_jax.weights import names
from sst_jax.weights.files import Progress, digest

__all__ = ["DTYPES", "Source", "Tensor", "digest", "fill_base", "numpy_dtype"]

DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}


def numpy_dtype(dtype: str) -> np.dtype:
    """The numpy dtype of "float32" or "bfloat16".

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
    read: Callable[[], np.ndarray]


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
    metadata: dict[str, Any]

    def tensors(self) -> Iterator[Tensor]:
        """The tensors in the order they lie on disk; nothing is read until `Tensor.read`."""
        return iter(self.headers)


def fill_base(source: Source, dtype: str, progress: Progress | None = None) -> dict[str, Any]:
    """Reads a source into a base tree of numpy arrays, kernels [L, in, out], in "float32" or "bfloat16".

    All names and shapes are checked before any weight is read. Memory: the base itself plus one tensor.

    Raises: InputError naming key and file, as `names.bind`; when a tied output head differs from the embedding.
    """
    target = numpy_dtype(dtype)
    bound = names.bind(source.tensors(), source.backbone, source.kind, source.path)
    base: dict[str, Any] = {}
    for row in names.TABLES[source.backbone.family]:
        names.set_slot(base, row.slot, np.empty(names.slot_shape(row, source.backbone), target))
    transforms = names.TRANSFORMS[source.kind]
    done, total = 0, sum(math.prod(entry.shape) for _, entry in bound.tensors) * target.itemsize
    for tensor, entry in bound.tensors:
        value = tensor.read()
        if value.shape != entry.shape:
            raise InputError(f"{tensor.file}: key {tensor.name} changed while it was being read")
        if (
            bound.head is not None
            and entry.row.slot == "embed/embedding"
            and not np.array_equal(bound.head.read(), value)
        ):
            raise InputError(
                f"{bound.head.file}: {bound.head.name} differs from {tensor.name}; only output heads tied to the "
                "embedding are supported"
            )
        slot = names.get_slot(base, entry.row.slot)
        slot[... if entry.layer is None else entry.layer] = transforms[entry.row.transform](value)
        done += value.size * target.itemsize
        if progress is not None:
            progress(done, total)
    return base
