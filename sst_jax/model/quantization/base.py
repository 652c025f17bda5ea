"""The interface between storages of frozen linears and the rest of the package.

A linear is a *leaf* of the base tree, a dict of arrays. As a checkpoint has it the leaf is {"kernel": [..., in, out]};
under another storage arrays of other names replace the kernel. A leaf may hold more than these, such as a bias, which
storages leave as it is. One storage is one file; `storages.py` registers them.
"""

from __future__ import annotations

import abc
import dataclasses
import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from sst_jax.errors import InputError
from sst_jax.model import compiler
from sst_jax.model.quantization.nf4_product import LowRank
from sst_jax.types import (
    DeviceArrays,
    EachKernel,
    EachOutputs,
    Gram,
    Kernel,
    LayerStack,
    Leaf,
    LinearInputs,
    LinearOutputs,
)

Shapes = dict[str, jax.ShapeDtypeStruct]

# The kernel's axes that an array of a leaf follows, in blocks or one by one, behind any leading axes.
BLOCKS, PER_OUTPUT = ("inputs", "outputs"), ("outputs",)


class LinearStorage(abc.ABC):
    """One way of storing a linear.

    Every array of a leaf ends in an axis along the outputs, so that strips of outputs can be quantised apart and laid
    side by side.

    Attributes:
      name: what recipes, flags and files call it.
      axes: for every array of a leaf, which of the kernel's axes it follows: BLOCKS or PER_OUTPUT. No two storages
        give one name different axes, as a mesh places an array by its name.
      group: outputs that are quantised together; strips are multiples of it.
      fused: whether `product` multiplies stored arrays without unpacking them. False: a layer's kernels are unpacked
        once, when the layer begins, and all passes share them.
    """

    name: str
    axes: Mapping[str, tuple[str, ...]]
    group: int = 1
    fused: bool = False

    @abc.abstractmethod
    def quantise(self, kernel: Kernel) -> DeviceArrays:
        """Return the leaf of a kernel [..., in, out]. Meant to be jitted.

        Raises: InputError for a kernel that this storage cannot hold.
        """

    @abc.abstractmethod
    def kernel(self, leaf: Leaf, dtype: DTypeLike) -> Kernel:
        """Return the kernel [..., in, out] of a leaf, in `dtype`."""

    def quantise_for(self, kernel: Kernel, factor: Gram) -> DeviceArrays:
        """Return the leaf of a kernel [in, out], fitted to its inputs by their `gptq.compensation` [in, in].

        Raises: InputError where this storage cannot be fitted.
        """
        raise InputError(f"{self.name} cannot be fitted to texts: leave --calibrate out")

    def product(self, x: LinearInputs, leaf: Leaf) -> LinearOutputs:
        """Return x [..., in] times the kernel, [..., out] in x's type."""
        return x @ self.kernel(leaf, x.dtype)

    def reads_stack(self, platform: str) -> bool:
        """Return whether `stack_products` may read one layer of the stack, on this `compiler.platform`."""
        return False

    def stack_products(self, x: LinearInputs, linears: Sequence[StackedLinear]) -> tuple[EachOutputs, ...]:
        """Return x [..., in] times every kernel, [..., out] in x's type, from the stacks or from unpacked kernels."""
        return tuple(x @ linear.kernel for linear in linears)

    def takes_low_rank(self, shape: tuple[int, ...], outputs: Sequence[int], dtype: DTypeLike) -> bool:
        """Return whether `adapted_products` multiplies inputs of a shape by linears of so many outputs."""
        return False

    def adapted_products(self, x: LinearInputs, linears: Sequence[StackedLinear], factors: LowRank) -> LinearOutputs:
        """Return `stack_products` side by side, those of LoRA factors added; of these no gradient is computed."""
        raise NotImplementedError(self.name)

    def cast(self, leaf: Leaf, dtype: DTypeLike) -> DeviceArrays:
        """Return a leaf in another dtype of floats; quantised arrays stay, as their values define the weights."""
        return dict(leaf)

    def abstract(self, shape: tuple[int, ...], dtype: DTypeLike = jnp.float32) -> Shapes:
        """Return the shapes and types of the leaf of a kernel [..., in, out] of `dtype`, without computing it.

        Raises: InputError as `quantise`.
        """
        return jax.eval_shape(self.quantise, jax.ShapeDtypeStruct(shape, dtype))

    def num_bytes(self, shape: tuple[int, ...], dtype: DTypeLike = jnp.float32) -> int:
        """Return the bytes of the leaf of a kernel [..., in, out] of `dtype`."""
        return sum(math.prod(part.shape) * part.dtype.itemsize for part in self.abstract(shape, dtype).values())

    def kernel_shape(self, leaf: Leaf) -> tuple[int, ...]:
        """Return the shape [..., in, out] of a leaf's kernel; of its arrays only shapes and dtypes are used."""
        shapes = {name: jax.ShapeDtypeStruct(leaf[name].shape, leaf[name].dtype) for name in self.axes}
        return jax.eval_shape(lambda leaf: self.kernel(leaf, jnp.dtype(jnp.float32)), shapes).shape


class AsItIs(LinearStorage):
    """A kernel in the type of its checkpoint, under the name "kernel"."""

    name = "none"
    axes = MappingProxyType({"kernel": BLOCKS})

    def quantise(self, kernel: Kernel) -> DeviceArrays:
        return {"kernel": kernel}

    def kernel(self, leaf: Leaf, dtype: DTypeLike) -> Kernel:
        return leaf["kernel"].astype(dtype)

    def product(self, x: LinearInputs, leaf: Leaf) -> LinearOutputs:
        return self.products(x, [leaf["kernel"]])[0]

    def products(self, x: LinearInputs, kernels: Sequence[EachKernel]) -> tuple[EachOutputs, ...]:
        """Return `product` with each of several kernels."""
        kernels = [kernel.astype(x.dtype) for kernel in kernels]
        rows = math.prod(x.shape[:-1])
        if rows > 2 or x.dtype != jnp.bfloat16 or compiler.platform() not in ("cuda", "interpreted"):
            return tuple(x @ kernel for kernel in kernels)
        # A kernel that a scan has sliced is copied before a product, and read where it lies by a multiply-and-reduce.
        flat = x.reshape(rows, -1).astype(jnp.float32)
        wide = jnp.concatenate([kernel.astype(jnp.float32) for kernel in kernels], axis=-1)
        sums = jnp.stack([(row[:, None] * wide).sum(0) for row in flat]).astype(x.dtype)
        cuts = np.cumsum([kernel.shape[-1] for kernel in kernels])[:-1]
        return tuple(part.reshape(*x.shape[:-1], -1) for part in jnp.split(sums, cuts, axis=-1))

    def kernel_shape(self, leaf: Mapping[str, LayerStack]) -> tuple[int, ...]:
        return leaf["kernel"].shape  # a checkpoint that is read a layer at a time has a shape and no dtype

    def cast(self, leaf: Leaf, dtype: DTypeLike) -> DeviceArrays:
        return {name: value.astype(dtype) for name, value in leaf.items()}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StackedLinear:
    """A linear whose products may read its stack, in the place of its kernel.

    stack    the arrays of all layers, [L, ...]
    at       the layer, int32 []
    kernel   unpacked: XLA leaves out what no product reads
    storage  of both
    """

    stack: DeviceArrays
    at: jax.Array
    kernel: Kernel
    storage: LinearStorage = dataclasses.field(metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StoredLinear:
    """A linear of a fused storage, in the place of its kernel."""

    leaf: DeviceArrays
    storage: LinearStorage = dataclasses.field(metadata={"static": True})
