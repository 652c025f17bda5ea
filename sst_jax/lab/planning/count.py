"""Counting a program's arithmetic from its jaxpr: the compilers report none for CUDA, and scan bodies once on TPU.

Only matrix products count; everything else is assumed to be fused into them. A branch counts as its costlier side, so
the blocks of the loss that hold no answer count too, and masked attention counts in full. A product with an NF4 linear
reads the bfloat16 kernel that is unpacked for it; the unpacking itself is not counted.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from jax.core import ShapedArray
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn


class Product(NamedTuple):
    """A matrix product: FLOPs, bytes of operands and result, and how often it runs."""

    flops: float
    bytes: float
    times: float


class Work(NamedTuple):
    """What a program does."""

    products: list[Product]

    @property
    def flops(self) -> float:
        return sum(product.flops * product.times for product in self.products)

    @property
    def bytes(self) -> float:
        return sum(product.bytes * product.times for product in self.products)

    def seconds(self, flops: float, bandwidth: float) -> float:
        """Time when each product is bound by arithmetic (FLOP/s) or by memory (bytes/s), whichever is slower."""
        return sum(max(p.flops / flops, p.bytes / bandwidth) * p.times for p in self.products)


def count(jaxpr: Jaxpr | ClosedJaxpr, trips: int = 1, flash: bool = True) -> Work:
    """Return the work of a program.

    trips: how often each `while` loop runs, which no jaxpr says.
    flash: attention keeps its scores on the chip. Not of a decode step, whose caches are larger than its scores.
    """
    return Work(list(_products(jaxpr.jaxpr if isinstance(jaxpr, ClosedJaxpr) else jaxpr, 1.0, trips, flash)))


def _products(jaxpr: Jaxpr, times: float, trips: int, flash: bool) -> Iterator[Product]:
    for equation in jaxpr.eqns:
        name, params = equation.primitive.name, equation.params
        if name in ("dot_general", "ragged_dot"):
            yield _product(equation, times, flash)
        elif name == "scan":
            yield from _products(params["jaxpr"].jaxpr, times * params["length"], trips, flash)
        elif name == "while":
            yield from _products(params["body_jaxpr"].jaxpr, times * trips, trips, flash)
        elif name == "cond":
            sides = [list(_products(branch.jaxpr, times, trips, flash)) for branch in params["branches"]]
            yield from max(sides, key=lambda side: Work(side).flops)
        else:
            for value in params.values():
                for part in value if isinstance(value, list | tuple) else (value,):
                    inner = getattr(part, "jaxpr", part)
                    if isinstance(inner, Jaxpr):
                        yield from _products(inner, times, trips, flash)


def _product(equation: JaxprEqn, times: float, flash: bool) -> Product:
    arrays = [
        aval for variable in (*equation.invars[:2], *equation.outvars) if isinstance(aval := variable.aval, ShapedArray)
    ]
    (contracted, _), (batched, _) = equation.params["dimension_numbers"]
    depth = math.prod(arrays[0].shape[axis] for axis in contracted)
    sizes = [array.size * np.dtype(array.dtype).itemsize for array in arrays]
    # Batched products are attention's, whose largest array is the scores.
    moved = sum(sizes) - (max(sizes) if batched and flash else 0)
    return Product(2.0 * arrays[2].size * depth, float(moved), times)
