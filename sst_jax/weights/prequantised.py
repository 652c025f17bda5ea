"""Checkpoints whose linears were quantised before, dequantised as they are read: bitsandbytes' NF4, and 8-bit floats.

What is read are the numbers that the checkpoint's own library computes with. A bitsandbytes folder that is quantised
here again (`--quantize nf4`) keeps its codes: both cut blocks of 64 inputs of one output, wherever a linear's inputs
are a multiple of 64. Activations that such a library rounds too stay as they are here.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from sst_jax.errors import InputError
from sst_jax.types import HostArray, HostFloats
from sst_jax.weights.source import Tensor

# Types of safetensors that such folders have, beside floats.
DTYPES = {"U8": np.dtype(np.uint8), "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn)}

NF4, FLOAT8 = "bitsandbytes nf4", "float8"
_STATE = ".quant_state.bitsandbytes__nf4"
_NF4_PARTS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
_SCALES = ("weight_scale_inv", "weight_scale")  # of 8-bit floats, both factors of the stored numbers
_ASIDE = ("input_scale", "activation_scale", "input_scale_ub")  # of activations, which are not rounded here
_BLOCKS = (128, 64, 32)  # sides of the squares that share a scale; checkpoints of 128 are published
_WIDEST = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16), "float16": np.dtype(np.float16)}


def kind_of(quantization: object) -> str | None:
    """Return how a config.json's quantization_config says that linears are stored, NF4 or FLOAT8; None: unreadable."""
    if not isinstance(quantization, Mapping):
        return None
    method = quantization.get("quant_method")
    if method == "bitsandbytes":
        four = quantization.get("load_in_4bit") and quantization.get("bnb_4bit_quant_type") == "nf4"
        return NF4 if four and quantization.get("bnb_4bit_quant_storage", "uint8") == "uint8" else None
    if method in ("fp8", "fbgemm_fp8"):
        return FLOAT8
    if method == "compressed-tensors" and quantization.get("format") == "float-quantized":
        return FLOAT8
    return None


def dequantised(tensors: Sequence[Tensor], kind: str) -> list[Tensor]:
    """Return tensors with every quantised linear and what belongs to it replaced by one that reads as float32.

    Args:
      tensors: of all files of the folder.
      kind: what `kind_of` said.

    Raises: InputError naming file and key of what is missing, or of a shape or type that does not fit.
    """
    by_name = {tensor.name: tensor for tensor in tensors}
    return _without_nf4(by_name) if kind == NF4 else _without_float8(by_name)


class _BlockState(NamedTuple):
    """What bitsandbytes stores of a linear as JSON."""

    shape: tuple[int, ...]
    block: int
    dtype: str
    nested_block: int | None
    nested_offset: float


def _without_nf4(by_name: dict[str, Tensor]) -> list[Tensor]:
    found, used = [], set()
    for name, tensor in by_name.items():
        if not name.endswith(_STATE):
            continue
        linear, state = name.removesuffix(_STATE), _block_state(tensor)
        nested = state.nested_block is not None
        names = [linear, *(f"{linear}.{part}" for part in (_NF4_PARTS if nested else _NF4_PARTS[:2]))]
        missing = [part for part in names if part not in by_name]
        if missing:
            raise InputError(f"{tensor.file}: key {missing[0]} is missing beside {name}")
        count = math.prod(state.shape)
        parts = {part.removeprefix(linear).lstrip(".") or "packed": by_name[part] for part in names}
        if math.prod(parts["packed"].shape) * 2 != count or math.prod(parts["absmax"].shape) * state.block != count:
            raise InputError(
                f"{tensor.file}: key {linear} has shape {list(parts['packed'].shape)}, which is not {state}"
            )
        used |= {name, *names}
        found.append(
            Tensor(linear, state.shape, "NF4", parts["packed"].file, functools.partial(_read_nf4, parts, state))
        )
    return [tensor for name, tensor in by_name.items() if name not in used] + found


def _block_state(tensor: Tensor) -> _BlockState:
    """Return a linear's state.

    Raises: InputError naming its key where it is none that is known.
    """
    try:
        state = json.loads(bytes(np.asarray(tensor.read(), np.uint8)))
        shape = tuple(int(size) for size in state["shape"])
        nested = state.get("nested_blocksize")
        known = _BlockState(
            shape,
            int(state["blocksize"]),
            str(state["dtype"]),
            None if nested is None else int(nested),
            float(state.get("nested_offset") or 0.0),
        )
        if state["quant_type"] != "nf4" or len(shape) != 2 or known.dtype not in _WIDEST or known.block < 2:
            raise ValueError(state)
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{tensor.file}: key {tensor.name} is no state of NF4 that is known: {error}") from error
    return known


def _read_nf4(parts: Mapping[str, Tensor], state: _BlockState) -> HostFloats:
    """Return a linear [out, in] in float32: levels times each block's scale, in the type that its library makes."""
    read: dict[str, Any] = {name: np.asarray(tensor.read()).reshape(-1) for name, tensor in parts.items()}
    scales = read["absmax"]
    if state.nested_block is not None:
        wide = np.repeat(read["nested_absmax"].astype(np.float32), state.nested_block)[: len(scales)]
        scales = read["nested_quant_map"][scales] * wide + np.float32(state.nested_offset)
    packed = read["packed"]
    codes = np.stack([packed >> 4, packed & 15], axis=-1)  # the first of two in the high half
    values = read["quant_map"].astype(np.float32)[codes].reshape(-1, state.block) * scales.astype(np.float32)[:, None]
    return values.astype(_WIDEST[state.dtype]).astype(np.float32).reshape(state.shape)


def _without_float8(by_name: dict[str, Tensor]) -> list[Tensor]:
    found = []
    for name, tensor in by_name.items():
        owner, _, last = name.rpartition(".")
        if last in (*_SCALES, *_ASIDE) and f"{owner}.weight" in by_name:
            continue
        if tensor.dtype != "F8_E4M3":
            found.append(tensor)
            continue
        scale = next((by_name[f"{owner}.{last}"] for last in _SCALES if f"{owner}.{last}" in by_name), None)
        if scale is None:
            raise InputError(f"{tensor.file}: key {name} is of 8-bit floats, and {owner}.{_SCALES[0]} is missing")
        found.append(tensor._replace(dtype="F8", read=functools.partial(_read_float8, tensor, scale)))
    return found


def _read_float8(tensor: Tensor, scale: Tensor) -> HostFloats:
    """Return a linear [out, in] in float32: its numbers times their tensor's, row's or square block's scale.

    Raises: InputError naming the key of scales that do not fit.
    """
    factors: HostArray = np.asarray(scale.read()).astype(np.float32)
    values: HostFloats = np.asarray(tensor.read()).astype(np.float32)
    if factors.size == 1:
        return values * factors.reshape(())
    if factors.shape in ((len(values),), (len(values), 1)):
        return values * factors.reshape(-1, 1)
    block = next((size for size in _BLOCKS if factors.shape == tuple(-(-n // size) for n in values.shape)), None)
    if block is None:
        shapes = f"{list(factors.shape)}, which is not of blocks of {list(values.shape)}"
        raise InputError(f"{scale.file}: key {scale.name} has shape {shapes}")
    for axis in (0, 1):
        factors = np.repeat(factors, block, axis=axis)
    return values * factors[: values.shape[0], : values.shape[1]]
