"""Products with NF4 linears that read four bits a weight, on NVIDIA's cards: of few rows, which memory bounds.

    1 row            one multiply-and-reduce, into which XLA fuses the unpacking
    2 to 64 rows     a kernel in Pallas; XLA takes no table lookup into a product, and unpacks to memory before it
    more, or wider   the kernel unpacked once, then multiplied: not here

Both read one layer of the whole stack, [L, in/2, out] and its scales, by an index: of a stack that a scan has sliced,
codes would be copied before a kernel of ours. Both take several linears of one input side by side, each where it lies,
as if they were one: queries, keys and values are one launch.

W is frozen, so that the backward pass is dx = dy W^T alone.

The kernel is lowered through Triton, which compiles for capability 8.0 and up. Pallas announces the end of that route
(jax 0.11, without a date): the way out is jax-triton, which JAX names, or Mosaic GPU for capabilities 9.0 and 12.0.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jax.typing import DTypeLike

from sst_jax.types import LinearInputs, LinearOutputs

MOST = 64  # rows: of more, unpacking once costs less than unpacking in every program
BLOCK = 64  # inputs under one scale
GROUP = 256  # outputs whose scales share a range, under double quantisation
PROGRAMS = 512  # wanted at once, so that the widest cards are busy
REDUCED = 2**14  # partial sums of one row; of fewer XLA makes no fusion, but writes all products to memory
LEAST = 16  # rows of a tensor core's tile

Stack = tuple[jax.Array, ...]  # codes, then either scales or scale codes, lows and steps; all [L, ., .]
Stacks = tuple[Stack, ...]  # of linears that share their inputs
Ref = Any


def columns(*outputs: int) -> int | None:
    """Return the outputs of a program's tile, in linears that are multiplied together; None where no tile fits."""
    return next((size for size in (128, 64) if all(each % size == 0 for each in outputs)), None)


def _tile(levels: Ref, codes: jax.Array, scale: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return the weights of a block's even and odd inputs, bfloat16 [32, n], bit for bit `nf4.kernel_of`'s."""
    codes = codes.astype(jnp.int32)

    def weights(code: jax.Array) -> jax.Array:
        return (levels[code].astype(jnp.float32) * scale[None, :]).astype(jnp.bfloat16)

    return weights(codes & 15), weights(codes >> 4)


def _block(stack: Sequence[Ref], levels: Ref, layer: jax.Array, block: jax.Array, start: jax.Array, tile: int):
    """Return `_tile` of block number `block` of the outputs from `start`."""
    codes, *scales = stack
    outputs = pl.ds(start, tile)
    if len(scales) == 1:
        scale = scales[0][layer, block, outputs].astype(jnp.float32)
    else:
        stored, low, step = scales
        group = start // GROUP
        scale = low[layer, block, group] + step[layer, block, group] * stored[layer, block, outputs].astype(jnp.float32)
        scale = scale.astype(jnp.bfloat16).astype(jnp.float32)
    return _tile(levels, codes[layer, pl.ds(block * (BLOCK // 2), BLOCK // 2), outputs], scale)


def _dot(a: jax.Array, b: jax.Array, contracted: tuple[int, int]) -> jax.Array:
    return jax.lax.dot_general(
        a, b, (((contracted[0],), (contracted[1],)), ((), ())), preferred_element_type=jnp.float32
    )


def _store(out: Ref, index: tuple, values: jax.Array, rows: int) -> None:
    """Write the rows that are no padding."""
    triton.store(out.at[index], values, mask=jax.lax.broadcasted_iota(jnp.int32, values.shape, 0) < rows)


def _inputs(block: jax.Array, parity: int) -> Any:
    """Return where the even (0) or the odd (1) inputs of a block are."""
    return pl.ds(block * BLOCK + parity, BLOCK // 2, stride=2)


def _side_by_side(arrays: Sequence[Ref], linears: int) -> list[Sequence[Ref]]:
    """Return the arrays of each linear."""
    each = len(arrays) // linears
    return [arrays[first : first + each] for first in range(0, len(arrays), each)]


def _of_tile(tiles: Sequence[int], number: jax.Array, make: Callable[[int, jax.Array], Any]) -> Any:
    """Return `make` (linear, tile in it) of tile `number` of linears of so many tiles each; one alone is computed."""
    if len(tiles) == 1:
        return make(0, number)
    earlier = tiles[:-1]
    before = sum(earlier)
    return jax.lax.cond(
        number < before, lambda: _of_tile(earlier, number, make), lambda: make(len(earlier), number - before)
    )


def _forward(at: Ref, levels: Ref, x: Ref, *rest: Ref, steps: int, rows: int, tile: int, tiles: Sequence[int]) -> None:
    """Multiply a tile of outputs by a share of the blocks; x is [M, in]."""
    *arrays, out = rest
    stacks, number, share = _side_by_side(arrays, len(tiles)), pl.program_id(0), pl.program_id(1)

    def product(linear: int, place: jax.Array) -> jax.Array:
        def step(i: jax.Array, sums: jax.Array) -> jax.Array:
            block = share * steps + i
            even, odd = _block(stacks[linear], levels, at[0], block, place * tile, tile)
            return sums + _dot(x[:, _inputs(block, 0)], even, (1, 0)) + _dot(x[:, _inputs(block, 1)], odd, (1, 0))

        return jax.lax.fori_loop(0, steps, step, jnp.zeros((x.shape[0], tile), jnp.float32))

    _store(out, (share, slice(None), pl.ds(number * tile, tile)), _of_tile(tiles, number, product), rows)


def _backward(
    at: Ref, levels: Ref, dy: Ref, *rest: Ref, steps: int, rows: int, tile: int, tiles: Sequence[int]
) -> None:
    """Multiply a block of inputs by a share of the outputs; the result is [2, M, in/2], even inputs and odd ones."""
    *arrays, out = rest
    stacks, block, share = _side_by_side(arrays, len(tiles)), pl.program_id(0), pl.program_id(1)

    def step(i: jax.Array, sums: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        number = share * steps + i
        even, odd = _of_tile(
            tiles, number, lambda linear, place: _block(stacks[linear], levels, at[0], block, place * tile, tile)
        )
        part = dy[:, pl.ds(number * tile, tile)]
        return sums[0] + _dot(part, even, (1, 1)), sums[1] + _dot(part, odd, (1, 1))

    zeros = jnp.zeros((dy.shape[0], BLOCK // 2), jnp.float32)
    for parity, values in enumerate(jax.lax.fori_loop(0, steps, step, (zeros, zeros))):
        inputs = pl.ds(block * (BLOCK // 2), BLOCK // 2)
        _store(out, (2 * share + parity, slice(None), inputs), values, rows)


def _shares(units: int, programs: int, wanted: int = PROGRAMS) -> int:
    """Return into how many shares work is cut: the fewest that divide it and make as many programs as are wanted."""
    return next((n for n in range(1, units + 1) if units % n == 0 and programs * n >= wanted), units)


def _call(
    kernel: Callable[..., None],
    grid: tuple[int, int],
    shape: tuple[int, ...],
    x: jax.Array,
    stacks: Stacks,
    at: jax.Array,
    levels,
    run: str,
) -> jax.Array:
    interpret = run == "interpreted"
    arguments = (at.reshape(1), levels, x, *itertools.chain(*stacks))
    return pl.pallas_call(
        kernel,
        grid=grid,
        out_shape=jax.ShapeDtypeStruct(shape, jnp.float32),
        in_specs=[pl.BlockSpec()] * len(arguments),
        out_specs=pl.BlockSpec(),
        interpret=interpret,
        name="nf4_product",
        compiler_params=None if interpret else triton.CompilerParams(num_warps=4, num_stages=3),
    )(*arguments)


def _padded(x: jax.Array) -> jax.Array:
    """Return rows filled up to a power of two that a tensor core takes."""
    rows = x.shape[0]
    return jnp.pad(x, ((0, max(LEAST, 1 << (rows - 1).bit_length()) - rows), (0, 0)))


def _tiles(stacks: Stacks) -> tuple[int, tuple[int, ...]]:
    """Return the outputs of a tile, and the tiles of each linear."""
    outputs = [stack[0].shape[-1] for stack in stacks]
    tile = columns(*outputs)
    assert tile is not None
    return tile, tuple(each // tile for each in outputs)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def kernel_product(x: LinearInputs, stacks: Stacks, at: jax.Array, levels: jax.Array, run: str) -> LinearOutputs:
    """Return x [..., in] times layer `at` of linears side by side, by the kernel; partial sums are added behind it.

    Args:
      x: bfloat16, of at most MOST rows.
      stacks: of linears whose outputs `columns` cuts.
      at: int32 [].
      levels: bfloat16 [16].
      run: "cuda", or "interpreted" for Pallas' interpreter.
    """
    *lead, inputs = x.shape
    flat = x.reshape(-1, inputs)
    rows, padded, (tile, tiles) = len(flat), _padded(flat), _tiles(stacks)
    blocks, count = inputs // BLOCK, sum(tiles)
    shares = _shares(blocks, count)
    kernel = functools.partial(_forward, steps=blocks // shares, rows=rows, tile=tile, tiles=tiles)
    sums = _call(kernel, (count, shares), (shares, len(padded), count * tile), padded, stacks, at, levels, run)
    return sums[:, :rows].sum(0).astype(x.dtype).reshape(*lead, count * tile)


def _kernel_product_forward(x: LinearInputs, stacks: Stacks, at: jax.Array, levels: jax.Array, run: str) -> tuple:
    return kernel_product(x, stacks, at, levels, run), (stacks, at, levels)


def _kernel_product_backward(run: str, saved: tuple, dy: LinearOutputs) -> tuple:
    stacks, at, levels = saved
    *lead, outputs = dy.shape
    inputs, (tile, tiles) = 2 * stacks[0][0].shape[-2], _tiles(stacks)
    flat = dy.reshape(-1, outputs)
    rows, padded = len(flat), _padded(flat)
    blocks, count = inputs // BLOCK, sum(tiles)
    shares = _shares(count, blocks)
    kernel = functools.partial(_backward, steps=count // shares, rows=rows, tile=tile, tiles=tiles)
    sums = _call(kernel, (blocks, shares), (2 * shares, len(padded), inputs // 2), padded, stacks, at, levels, run)
    dx = sums[:, :rows].reshape(shares, 2, rows, inputs // 2).sum(0)
    return dx.transpose(1, 2, 0).reshape(*lead, inputs).astype(dy.dtype), None, None, None


kernel_product.defvjp(_kernel_product_forward, _kernel_product_backward)


def fits(shape: tuple[int, ...], outputs: Sequence[int], dtype: DTypeLike) -> bool:
    """Return whether inputs [..., in] are multiplied here by linears of so many outputs; else by kernels unpacked."""
    rows = math.prod(shape[:-1])
    return rows == 1 or (rows <= MOST and dtype == jnp.bfloat16 and columns(*outputs) is not None)


def reduce_product(x: LinearInputs, even: jax.Array, odd: jax.Array) -> LinearOutputs:
    """Return one row x [..., in] times a kernel given as its even and its odd inputs, float32 [in/2, out]."""
    half, outputs = even.shape
    pairs = x.astype(jnp.float32).reshape(half, 2)
    shares = _shares(2 * half // BLOCK, outputs, REDUCED)
    parts = (pairs[:, :1] * even + pairs[:, 1:] * odd).reshape(shares, half // shares, outputs).sum(1)
    if shares > 1:
        parts = jax.lax.optimization_barrier(parts)  # or XLA makes one sum of both
    return parts.sum(0).astype(x.dtype).reshape(*x.shape[:-1], outputs)
