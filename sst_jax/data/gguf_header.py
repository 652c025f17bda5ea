"""The header of a GGUF file, front to back: for the tokenizer in its metadata, and for the weights behind it.

Parsed here rather than with gguf.GGUFReader: every length is checked against the file before it is believed, and the
vocabulary's arrays take a tenth of a second instead of ten. Format: ggml-org/ggml, docs/gguf.md.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from sst_jax.errors import InputError

_SCALARS = {
    0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?", 10: "<u8", 11: "<i8", 12: "<f8",
}  # fmt: skip
_FLOAT32, _STRING, _ARRAY = 6, 8, 9


class Header:
    """Reads a header, never past the end of the file.

    `metadata` is read at once: arrays of numbers as numpy, of strings as lists; `tensors` is how many tensors are
    described behind it.

    Raises: InputError naming the file, for anything that is not a whole little-endian GGUF of version 2 or 3.
    """

    def __init__(self, stream: BinaryIO, file: Path):
        self.stream, self.file, self.size, self.position = stream, file, file.stat().st_size, 4
        if stream.read(4) != b"GGUF":
            raise InputError(f"{file} is not a GGUF file")
        version = self.scalar("<u4")
        if version not in (2, 3):
            raise InputError(f"{file}: GGUF version {version} is not supported (2 and 3, little-endian, are)")
        self.tensors, pairs = self.scalar("<u8"), self.scalar("<u8")
        self.metadata: dict[str, Any] = {}
        for _ in range(pairs):
            key = self.string()
            if key in self.metadata:
                raise InputError(f"{file}: metadata key {key} is a duplicate")
            self.metadata[key] = self._value(self.scalar("<u4"))

    def take(self, length: int) -> bytes:
        if length > self.size - self.position:
            raise InputError(f"{self.file} is truncated: its header needs bytes beyond the file's {self.size}")
        self.position += length
        return self.stream.read(length)

    def scalar(self, dtype: str) -> Any:
        return np.frombuffer(self.take(np.dtype(dtype).itemsize), dtype)[0].item()

    def string(self) -> str:
        try:
            return self.take(*struct.unpack("<Q", self.take(8))).decode("utf-8")
        except UnicodeDecodeError as error:
            raise InputError(f"{self.file}: its header holds a string that is not UTF-8") from error

    def _value(self, kind: int) -> Any:
        if kind in _SCALARS:
            value = self.scalar(_SCALARS[kind])
            # The shortest decimal of the float32, so that 1e-6 is 1e-6 again.
            return float(str(np.float32(value))) if kind == _FLOAT32 else value
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


def metadata_of(file: str | Path) -> dict[str, Any]:
    """Return the metadata of a GGUF file, see `Header`, as plain Python values.

    Raises: InputError as `Header`, and where there is no such file.
    """
    file = Path(file)
    if not file.is_file():
        raise InputError(f"{file}: no such GGUF file")
    with file.open("rb") as stream:
        found = Header(stream, file).metadata
    return {key: value.tolist() if isinstance(value, np.ndarray) else value for key, value in found.items()}
