"""Products with NF4 linears that read four bits a weight, on NVIDIA's cards: of few rows, which memory bounds.

    1 row            one multiply-and-reduce, into which XLA fuses the unpacking
    2 to 64 rows     a kernel in Pallas; XLA takes no table lookup into a product, and unpacks to memory before it
    more, or wider   the kernel unpacked once, then multiplied: not here

Both read one layer of the whole stack, [L, in/2, out] and its scales, by an index: of a stack that a scan has sliced,
codes would be copied before a kernel of ours. Both take several linears of one input side by side, each where it lies,
as if they were one: queries, keys and values are one launch.

W is frozen, so that the backward pass is dx = dy W^T alone. LoRA's second product goes into the kernel where its
factors are laid side by side: x A into a tile's sums, dy B^T into those of the backward pass.

The kernel is lowered through Triton, which compiles for capability 8.0 and up. Pallas announces the end of that route
(jax 0.11, without a date): the way out is jax-triton, which JAX names, or Mosaic GPU for capabilities 9.0 and 12.0.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

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
FEW = 16  # rows; of more, partial sums are a tenth of the bytes, and half as many programs are wanted
REDUCED = 2**14  # partial sums of one row; of fewer XLA makes no fusion, but writes all products to memory
LEAST = 16  # rows of a tensor core's tile

Stack = tuple[jax.Array, ...]  # codes, then either scales or scale codes, lows and steps; all [L, ., .]
Stacks = tuple[Stack, ...]  # of linears that share their inputs
Ref = Any


class LowRank(NamedTuple):
    """LoRA of linears of one input, side by side, bfloat16; R is a power of two, LEAST or more, filled with zeros.

    down   A of each, [in, linears * R]
    up     B of each times its scale, [R, all outputs]
    """

    down: jax.Array
    up: jax.Array


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


def _rows(ref: Ref, columns: Any, lines: int, *lead: int) -> jax.Array:
    """Return columns of [*lead, M, .], filled up to so many lines with the last one, whose results are not written."""
    rows = ref.shape[-2]
    if rows == lines:
        return ref[*lead, :, columns]
    line, place = (jax.lax.broadcasted_iota(jnp.int32, (lines, columns.size), axis) for axis in (0, 1))
    return ref[*lead, jnp.minimum(line, rows - 1), columns.start + columns.stride * place]


def _store(out: Ref, index: tuple, values: jax.Array, rows: int) -> None:
    """Write the rows that are no padding."""
    triton.store(
        out.at[index], values.astype(out.dtype), mask=jax.lax.broadcasted_iota(jnp.int32, values.shape, 0) < rows
    )


def _inputs(block: jax.Array, parity: int) -> Any:
    """Return where the even (0) or the odd (1) inputs of a block are."""
    return pl.ds(block * BLOCK + parity, BLOCK // 2, stride=2)


def _parts(arrays: Sequence[Ref], linears: int, rank: int) -> tuple[list[Sequence[Ref]], Sequence[Ref]]:
    """Return the arrays of each linear's stack, and LoRA's two; without a rank something in their place."""
    more = 2 if rank else 0
    each = (len(arrays) - more) // linears
    return [arrays[first : first + each] for first in range(0, each * linears, each)], arrays[-2:]


def _of_tile(tiles: Sequence[int], number: jax.Array, make: Callable[[int, jax.Array], Any]) -> Any:
    """Return `make` (linear, tile in it) of tile `number` of linears of so many tiles each; one alone is computed."""
    if len(tiles) == 1:
        return make(0, number)
    earlier = tiles[:-1]
    before = sum(earlier)
    return jax.lax.cond(
        number < before, lambda: _of_tile(earlier, number, make), lambda: make(len(earlier), number - before)
    )


def _forward(at: Ref, levels: Ref, x: Ref, *rest: Ref, steps: int, tile: int, tiles: Sequence[int], rank: int) -> None:
    """Multiply a tile of outputs by a share of the blocks; x is [M, in]. With a rank the first share adds LoRA's."""
    *arrays, out = rest
    stacks, (low, up) = _parts(arrays, len(tiles), rank)
    number, share, lines = pl.program_id(0), pl.program_id(1), out.shape[1]

    def product(linear: int, place: jax.Array) -> jax.Array:
        def step(i: jax.Array, sums: jax.Array) -> jax.Array:
            block = share * steps + i
            even, odd = _block(stacks[linear], levels, at[0], block, place * tile, tile)
            first, second = (_rows(x, _inputs(block, parity), lines) for parity in (0, 1))
            return sums + _dot(first, even, (1, 0)) + _dot(second, odd, (1, 0))

        def added() -> jax.Array:
            return _dot(_rows(low, pl.ds(linear * rank, rank), lines), up[:, pl.ds(number * tile, tile)], (1, 0))

        zeros = jnp.zeros((lines, tile), jnp.float32)
        return jax.lax.fori_loop(0, steps, step, _by_first(share, added, zeros) if rank else zeros)

    _store(out, (share, slice(None), pl.ds(number * tile, tile)), _of_tile(tiles, number, product), x.shape[0])


def _by_first(share: jax.Array, added: Callable[[], jax.Array], zeros: jax.Array) -> jax.Array:
    """Return what the first share begins its sums with; the others begin with zeros."""
    return jax.lax.cond(share == 0, added, lambda: zeros)


def _backward(
    at: Ref, levels: Ref, dy: Ref, *rest: Ref, steps: int, tile: int, tiles: Sequence[int], rank: int
) -> None:
    """Multiply a block of inputs by a share of the outputs. With a rank the first share adds LoRA's."""
    *arrays, out = rest
    stacks, (low, down) = _parts(arrays, len(tiles), rank)
    block, share, lines = pl.program_id(0), pl.program_id(1), out.shape[1]

    def step(i: jax.Array, sums: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        number = share * steps + i
        even, odd = _of_tile(
            tiles, number, lambda linear, place: _block(stacks[linear], levels, at[0], block, place * tile, tile)
        )
        part = _rows(dy, pl.ds(number * tile, tile), lines)
        return sums[0] + _dot(part, even, (1, 1)), sums[1] + _dot(part, odd, (1, 1))

    zeros = jnp.zeros((lines, BLOCK // 2), jnp.float32)

    def begun(parity: int) -> jax.Array:
        if not rank:
            return zeros
        inputs = _inputs(block, parity)

        def added() -> jax.Array:
            sums = zeros
            for linear in range(len(tiles)):
                mine = _rows(low, pl.ds(0, rank), lines, linear)
                sums += _dot(mine, down[inputs, pl.ds(linear * rank, rank)], (1, 1))
            return sums

        return _by_first(share, added, zeros)

    even_and_odd = jax.lax.fori_loop(0, steps, step, (begun(0), begun(1)))
    values = jnp.stack(even_and_odd, axis=-1).reshape(lines, BLOCK)
    _store(out, (share, slice(None), pl.ds(block * BLOCK, BLOCK)), values, dy.shape[0])


def _shares(units: int, programs: int, wanted: int = PROGRAMS) -> int:
    """Return into how many shares work is cut: the fewest that divide it and make as many programs as are wanted."""
    return next((n for n in range(1, units + 1) if units % n == 0 and programs * n >= wanted), units)


def _call(
    kernel: Callable[..., None],
    grid: tuple[int, int],
    outputs: int,
    x: jax.Array,
    arrays: Sequence[jax.Array],
    run: str,
) -> jax.Array:
    """Return what a kernel makes of x [M, .], its shares added up, [M, outputs] in x's type."""
    interpret, shares, rows = run == "interpreted", grid[1], len(x)
    lines = max(LEAST, 1 << (rows - 1).bit_length())  # a power of two that a tensor core takes
    at, *others = arrays
    arguments = (at.reshape(1), others[0], x, *others[1:])
    sums = pl.pallas_call(
        kernel,
        grid=grid,
        out_shape=jax.ShapeDtypeStruct((shares, lines, outputs), jnp.float32 if shares > 1 else x.dtype),
        in_specs=[pl.BlockSpec()] * len(arguments),
        out_specs=pl.BlockSpec(),
        interpret=interpret,
        name="nf4_product",
        compiler_params=None if interpret else triton.CompilerParams(num_warps=4, num_stages=3),
    )(*arguments)
    return sums[:, :rows].sum(0).astype(x.dtype) if shares > 1 else sums[0, :rows]


def _tiles(stacks: Stacks) -> tuple[int, tuple[int, ...]]:
    """Return the outputs of a tile, and the tiles of each linear."""
    outputs = [stack[0].shape[-1] for stack in stacks]
    tile = columns(*outputs)
    assert tile is not None
    return tile, tuple(each // tile for each in outputs)


def _wanted(rows: int) -> int:
    return PROGRAMS if rows <= FEW else PROGRAMS // 2


def _times(
    x: LinearInputs,
    stacks: Stacks,
    at: jax.Array,
    levels: jax.Array,
    run: str,
    low_rank: tuple[jax.Array, jax.Array] | None = None,
) -> LinearOutputs:
    """Return x W, plus the product of `low_rank`: x A [..., linears * R], and B of `LowRank`."""
    *lead, inputs = x.shape
    flat = x.reshape(-1, inputs)
    rows, (tile, tiles) = len(flat), _tiles(stacks)
    blocks, count = inputs // BLOCK, sum(tiles)
    shares = _shares(blocks, count, _wanted(rows))
    rank = 0 if low_rank is None else low_rank[1].shape[0]
    added = () if low_rank is None else (low_rank[0].reshape(rows, -1), low_rank[1])
    kernel = functools.partial(_forward, steps=blocks // shares, tile=tile, tiles=tiles, rank=rank)
    arrays = (at, levels, *itertools.chain(*stacks), *added)
    y = _call(kernel, (count, shares), count * tile, flat, arrays, run)
    return y.reshape(*lead, count * tile)


def _times_transposed(
    dy: LinearOutputs,
    stacks: Stacks,
    at: jax.Array,
    levels: jax.Array,
    run: str,
    low_rank: tuple[jax.Array, jax.Array] | None = None,
) -> LinearInputs:
    """Return dy W^T, plus the product of `low_rank`: dy B^T as `up_transposed` returns it, and A of `LowRank`."""
    *lead, outputs = dy.shape
    inputs, (tile, tiles) = 2 * stacks[0][0].shape[-2], _tiles(stacks)
    flat = dy.reshape(-1, outputs)
    rows, blocks, count = len(flat), inputs // BLOCK, sum(tiles)
    shares = _shares(count, blocks, _wanted(rows))
    rank = 0 if low_rank is None else low_rank[0].shape[-1]
    added = () if low_rank is None else (low_rank[0].reshape(len(tiles), rows, -1), low_rank[1])
    kernel = functools.partial(_backward, steps=count // shares, tile=tile, tiles=tiles, rank=rank)
    arrays = (at, levels, *itertools.chain(*stacks), *added)
    return _call(kernel, (blocks, shares), inputs, flat, arrays, run).reshape(*lead, inputs)


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
    return _times(x, stacks, at, levels, run)


def _kernel_product_forward(x: LinearInputs, stacks: Stacks, at: jax.Array, levels: jax.Array, run: str) -> tuple:
    return kernel_product(x, stacks, at, levels, run), (stacks, at, levels)


def _kernel_product_backward(run: str, saved: tuple, dy: LinearOutputs) -> tuple:
    stacks, at, levels = saved
    return _times_transposed(dy, stacks, at, levels, run), None, None, None


kernel_product.defvjp(_kernel_product_forward, _kernel_product_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def adapted_product(
    x: LinearInputs, stacks: Stacks, at: jax.Array, levels: jax.Array, factors: LowRank, run: str
) -> LinearOutputs:
    """Return `kernel_product` of linears with LoRA, x W + x A B. The factors are constants: they get no gradient."""
    return _times(x, stacks, at, levels, run, (x @ factors.down, factors.up))


def _adapted_product_forward(
    x: LinearInputs, stacks: Stacks, at: jax.Array, levels: jax.Array, factors: LowRank, run: str
) -> tuple:
    return adapted_product(x, stacks, at, levels, factors, run), (stacks, at, levels, factors)


def _adapted_product_backward(run: str, saved: tuple, dy: LinearOutputs) -> tuple:
    stacks, at, levels, factors = saved
    low = up_transposed(dy, factors.up, [stack[0].shape[-1] for stack in stacks])
    return _times_transposed(dy, stacks, at, levels, run, (low, factors.down)), None, None, None, None


adapted_product.defvjp(_adapted_product_forward, _adapted_product_backward)


def up_transposed(dy: LinearOutputs, up: jax.Array, outputs: Sequence[int]) -> jax.Array:
    """Return dy B^T of linears side by side, each of them apart: [linears, ..., R]."""
    if len(set(outputs)) == 1:  # one product, and no part of dy is copied
        apart = dy.reshape(*dy.shape[:-1], len(outputs), -1)
        return jnp.einsum("...gn,rgn->g...r", apart, up.reshape(len(up), len(outputs), -1))
    cuts = list(itertools.accumulate(outputs))[:-1]
    parts = zip(jnp.split(dy, cuts, axis=-1), jnp.split(up, cuts, axis=-1), strict=True)
    return jnp.stack([part @ factor.T for part, factor in parts])


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
