"""NF4, the 4-bit NormalFloat of QLoRA (arXiv 2305.14314), as a storage of frozen linears.

A linear's leaf {"kernel": [..., in, out]} becomes

    codes         uint8    [..., in/2, out]          two codes a byte, the even row in the low half
    scales        bfloat16 [..., in/64, out]         the largest magnitude of each block of 64 inputs of one output

and with double quantisation, where 256 outputs' scales share a range, instead of scales

    scale_codes   uint8    [..., in/64, out]
    scale_low     float32  [..., in/64, out/256 rounded up]
    scale_step    float32  the same

Blocks lie along the contraction axis, as in qwix, whose codes and scales are the same bit for bit. bitsandbytes cuts
flat blocks of PyTorch's [out, in]: wherever `in` is a multiple of 64 those are the same blocks, with the same codes but
at exact ties. It stores them transposed, the first of two in the high half, and scales in float32.

A weight takes 4.25 bits, 4.13 with double quantisation. Its value is by definition a bfloat16 number, LEVELS[code] *
scale rounded once, whatever dtype a program then computes in.

`quantise` takes for every weight the nearest value. `quantise_for` is given second moments of the linear's inputs, and
later weights compensate the errors of earlier ones (GPTQ, arXiv 2210.17323); storage and reading are the same.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from sst_jax.errors import InputError
from sst_jax.model import compiler
from sst_jax.model.quantization import nf4_product
from sst_jax.model.quantization.base import BLOCKS, LinearStorage, StackedLinear
from sst_jax.model.quantization.nf4_product import LowRank
from sst_jax.types import (
    BlockScales,
    Codes,
    DeviceArrays,
    EachOutputs,
    Gram,
    Kernel,
    Leaf,
    LinearInputs,
    LinearOutputs,
    PackedCodes,
    ScalarInt,
    UnitCodes,
    UnitWeights,
    WeightBlocks,
)

KINDS = ("nf4", "nf4_double")
BLOCK = 64
GROUP = 256  # scales that share a range under double quantisation

# Appendix E of the paper: quantiles of the normal distribution with an exact zero, scaled to [-1, 1].
LEVELS = np.array(
    [
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ],
    np.float32,
)


def _last_below(lower: np.float32, upper: np.float32) -> np.float32:
    """Return the largest float32 that is no nearer to `upper` than to `lower`, distances rounded to float32."""
    x = np.float32((lower + upper) / 2)

    def below(x: np.float32) -> bool:
        return bool(np.float32(x - lower) <= np.float32(upper - x))

    while not below(x):
        x = np.nextafter(x, np.float32(-2))
    while below(following := np.nextafter(x, np.float32(2))):
        x = following
    return x


# Counting the thresholds below a number gives the code of its nearest level, ties to the lower one.
THRESHOLDS = np.array([_last_below(a, b) for a, b in itertools.pairwise(LEVELS)], np.float32)


def quantise(kernel: Kernel, kind: str = "nf4") -> DeviceArrays:
    """Return the NF4 leaf of a kernel [..., in, out], computed in float32. Meant to be jitted.

    Raises: InputError when `in` is not a multiple of 64 or `kind` is not "nf4" or "nf4_double".
    """
    *lead, inputs, outputs = kernel.shape
    if inputs % BLOCK:
        raise InputError(f"NF4 cuts blocks of {BLOCK} inputs; a linear with {inputs} inputs cannot be quantised")
    if kind not in KINDS:
        raise InputError(f"quantize={kind!r} is not one of {', '.join(KINDS)}")
    blocks = kernel.astype(jnp.float32).reshape(*lead, inputs // BLOCK, BLOCK, outputs)
    scales = _largest(blocks)
    codes = _codes(blocks / scales[..., None, :])
    return {"codes": _packed(codes.reshape(*lead, inputs, outputs)), **_stored_scales(scales, kind)}


def _largest(blocks: WeightBlocks) -> BlockScales:
    """Return the scales [..., out] of blocks [..., 64, out]: their largest magnitudes."""
    scales = jnp.max(jnp.abs(blocks), axis=-2)
    # Of a block of zeros, or of numbers so small that their squares underflow, only the signs are kept.
    return jnp.where(scales < np.sqrt(np.finfo(np.float32).tiny), 1.0, scales)


def _codes(unit: UnitWeights) -> UnitCodes:
    """Return the codes of weights divided by their block's scale."""
    return sum((unit > threshold).astype(jnp.uint8) for threshold in THRESHOLDS)


def _packed(codes: Codes) -> PackedCodes:
    """Return two codes in each byte, the even row in the low half."""
    *lead, inputs, outputs = codes.shape
    pairs = codes.reshape(*lead, inputs // 2, 2, outputs)
    return pairs[..., 0, :] | pairs[..., 1, :] << 4


def _stored_scales(scales: BlockScales, kind: str) -> DeviceArrays:
    """Return the arrays of a leaf that hold its scales [..., in/64, out]."""
    if kind == "nf4":
        return {"scales": scales.astype(jnp.bfloat16)}
    *lead, outputs = scales.shape
    groups = -(-outputs // GROUP)
    padding = [(0, 0)] * len(lead) + [(0, groups * GROUP - outputs)]
    grouped = jnp.pad(scales, padding, mode="edge").reshape(*lead, groups, GROUP)
    low = grouped.min(axis=-1)
    step = (grouped.max(axis=-1) - low) / 255
    codes = jnp.round((grouped - low[..., None]) / jnp.where(step > 0, step, 1.0)[..., None]).astype(jnp.uint8)
    return {"scale_codes": codes.reshape(*lead, -1)[..., :outputs], "scale_low": low, "scale_step": step}


def _scales(leaf: Leaf) -> BlockScales:
    """Return the scales of a leaf [..., in/64, out], bfloat16 numbers in float32."""
    if "scales" in leaf:
        return leaf["scales"].astype(jnp.float32)
    outputs = leaf["scale_codes"].shape[-1]
    low, step = (jnp.repeat(leaf[name], GROUP, axis=-1)[..., :outputs] for name in ("scale_low", "scale_step"))
    return jax.lax.reduce_precision(low + step * leaf["scale_codes"].astype(jnp.float32), 8, 7)


@functools.partial(jax.jit, static_argnames="kind")
def quantise_for(kernel: Kernel, factor: Gram, kind: str = "nf4") -> DeviceArrays:
    """Return the NF4 leaf of a kernel [in, out], fitted to inputs by their `gptq.compensation` (float32).

    Inputs are taken in order; the weights of each get their nearest values, and the error is compensated by the weights
    of later inputs. With a diagonal factor, of uncorrelated inputs, the result is `quantise`'s.
    """
    inputs, outputs = kernel.shape
    levels, order = jnp.asarray(LEVELS).astype(jnp.bfloat16).astype(jnp.float32), jnp.arange(inputs)

    def block(kernel: jax.Array, start: jax.Array) -> tuple[jax.Array, tuple[jax.Array, dict[str, jax.Array]]]:
        rows = jax.lax.dynamic_slice_in_dim(kernel, start, BLOCK)
        right = jax.lax.dynamic_slice_in_dim(factor, start, BLOCK)
        own = jax.lax.dynamic_slice_in_dim(right, start, BLOCK, axis=1)
        scales = _largest(rows)
        stored = _stored_scales(scales[None], kind)
        read = _scales(stored)[0]

        def one(j: jax.Array, state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            rows, codes, errors = state
            code = _codes(rows[j] / scales)
            value = jax.lax.reduce_precision(levels[code] * read, 8, 7)  # as `kernel_of` reads it
            error = (rows[j] - value) / own[j, j]
            return rows - own[j][:, None] * error, codes.at[j].set(code), errors.at[j].set(error)

        empty = jnp.zeros((BLOCK, outputs), jnp.uint8), jnp.zeros((BLOCK, outputs))
        _, codes, errors = jax.lax.fori_loop(0, BLOCK, one, (rows, *empty))
        later = jnp.where(order >= start + BLOCK, right, 0.0)
        return kernel - later.T @ errors, (codes, jax.tree.map(lambda part: part[0], stored))

    starts = jnp.arange(0, inputs, BLOCK)
    _, (codes, scales) = jax.lax.scan(block, kernel.astype(jnp.float32), starts)
    return {"codes": _packed(codes.reshape(inputs, outputs)), **scales}


def kernel_of(leaf: Leaf, dtype: DTypeLike = jnp.bfloat16) -> Kernel:
    """Return the kernel [..., in, out] of an NF4 leaf."""
    codes = leaf["codes"]
    *lead, half, outputs = codes.shape
    # Shifts by a broadcast (0, 4), as XLA would write a concatenation of two halves to memory.
    halves = (codes[..., None, :] >> np.array([[0], [4]], np.uint8)) & 15
    halves = halves.reshape(*lead, 2 * half // BLOCK, BLOCK, outputs)
    levels = jnp.asarray(LEVELS).astype(jnp.bfloat16).astype(jnp.float32)
    value = levels.at[halves].get(mode="promise_in_bounds") * _scales(leaf)[..., None, :]
    # XLA may skip a detour through bfloat16, but not this rounding; the product of two bfloat16 in float32 is exact.
    return jax.lax.reduce_precision(value, 8, 7).astype(dtype).reshape(*lead, 2 * half, outputs)


def _even_and_odd(stack: Leaf, at: ScalarInt) -> tuple[jax.Array, jax.Array]:
    """Return `kernel_of` layer `at` of a stack [L, in/2, out], its even and its odd inputs apart, float32 [in/2, out].

    Scales are repeated before the layer is cut out. The other way round, XLA takes a scale that is read 32 times of a
    stack for the whole stack read, and copies the layer's scales for every product.
    """
    codes = jax.lax.dynamic_index_in_dim(stack["codes"], at, keepdims=False)
    if "scales" in stack:
        whole = jnp.repeat(stack["scales"], BLOCK // 2, axis=1)
        scales = jax.lax.dynamic_index_in_dim(whole, at, keepdims=False).astype(jnp.float32)
    else:
        one = {name: jax.lax.dynamic_index_in_dim(stack[name], at, keepdims=False) for name in stack if name != "codes"}
        scales = jnp.repeat(_scales(one), BLOCK // 2, axis=0)
    levels = jnp.asarray(LEVELS).astype(jnp.bfloat16).astype(jnp.float32)

    def weights(code: jax.Array) -> jax.Array:
        return jax.lax.reduce_precision(levels.at[code].get(mode="promise_in_bounds") * scales, 8, 7)

    return weights(codes & 15), weights(codes >> 4)


class NF4(LinearStorage):
    """NF4, with plain ("nf4") or doubly quantised ("nf4_double") scales."""

    group = GROUP

    def __init__(self, name: str):
        self.name = name
        scales = ("scales",) if name == "nf4" else ("scale_codes", "scale_low", "scale_step")
        self.axes = dict.fromkeys(("codes", *scales), BLOCKS)

    def quantise(self, kernel: Kernel) -> DeviceArrays:
        return quantise(kernel, self.name)

    def quantise_for(self, kernel: Kernel, factor: Gram) -> DeviceArrays:
        return quantise_for(kernel, factor, self.name)

    def kernel(self, leaf: Leaf, dtype: DTypeLike) -> Kernel:
        return kernel_of(leaf, dtype)

    def reads_stack(self, platform: str) -> bool:
        return platform in ("cuda", "interpreted")

    def stack_products(self, x: LinearInputs, linears: Sequence[StackedLinear]) -> tuple[EachOutputs, ...]:
        outputs = [linear.kernel.shape[-1] for linear in linears]
        if not nf4_product.fits(x.shape, outputs, x.dtype):
            return super().stack_products(x, linears)
        if x.size == x.shape[-1]:
            halves = zip(*(_even_and_odd(linear.stack, linear.at) for linear in linears), strict=True)
            y = nf4_product.reduce_product(x, *(jnp.concatenate(half, axis=-1) for half in halves))
        else:
            y = nf4_product.kernel_product(x, *self._stored(linears), compiler.platform())
        return tuple(jnp.split(y, np.cumsum(outputs)[:-1], axis=-1))

    def takes_low_rank(self, shape: tuple[int, ...], outputs: Sequence[int], dtype: DTypeLike) -> bool:
        return math.prod(shape[:-1]) > 1 and nf4_product.fits(shape, outputs, dtype)

    def adapted_products(self, x: LinearInputs, linears: Sequence[StackedLinear], factors: LowRank) -> LinearOutputs:
        return nf4_product.adapted_product(x, *self._stored(linears), factors, compiler.platform())

    def _stored(self, linears: Sequence[StackedLinear]) -> tuple[nf4_product.Stacks, jax.Array, jax.Array]:
        """Return what the kernels read of linears: their stacks, the layer, and the levels."""
        stacks = tuple(tuple(linear.stack[name] for name in self.axes) for linear in linears)
        # A constant already cast: XLA leaves a cast of one as a kernel, at every position of a walk.
        return stacks, linears[0].at, jnp.asarray(LEVELS.astype(jnp.bfloat16))
