"""The registry of storages of linears, and operations on whole trees of parameters."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TypeVar

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from sst_jax.errors import InputError
from sst_jax.model.quantization import nf4
from sst_jax.model.quantization.base import AsItIs, LinearStorage, StackedLinear, StoredLinear
from sst_jax.model.quantization.nf4_product import LowRank
from sst_jax.types import (
    DeviceArrays,
    EachKernel,
    EachOutputs,
    Kernel,
    Leaf,
    LinearInputs,
    LinearOutputs,
    Params,
    ScalarInt,
)

AS_IT_IS = AsItIs()
STORAGES: dict[str, LinearStorage] = {
    storage.name: storage for storage in (AS_IT_IS, nf4.NF4("nf4"), nf4.NF4("nf4_double"))
}

# Names that other arrays of the parameter trees have.
_TAKEN = {"scale", "embedding", "bias", "lora_a", "lora_b", "theta", "gain", "iteration"}

Tree = TypeVar("Tree")


def kinds() -> tuple[str, ...]:
    """Return the names of all storages, "none" first."""
    return tuple(STORAGES)


def get(name: str) -> LinearStorage:
    """Return the storage of a name.

    Raises: InputError for an unknown one.
    """
    if name not in STORAGES:
        raise InputError(f"quantize={name!r} is not one of {', '.join(kinds())}")
    return STORAGES[name]


def register(storage: LinearStorage) -> LinearStorage:
    """Add a storage.

    Raises: ValueError where its name is taken, or the name of one of its arrays with other axes.
    """
    for name, axes in storage.axes.items():
        if name in _TAKEN or axes_of(name) not in (None, axes):
            raise ValueError(f"storage {storage.name}: the array name {name!r} is taken")
    if storage.name in STORAGES:
        raise ValueError(f"storage {storage.name!r} is registered already")
    return STORAGES.setdefault(storage.name, storage)


def axes_of(name: str) -> tuple[str, ...] | None:
    """Return the axes of a kernel that an array of this name follows; None where no storage has such an array."""
    return next((storage.axes[name] for storage in STORAGES.values() if name in storage.axes), None)


def is_quantised_array(name: str) -> bool:
    """Return whether an array of this name holds a linear in another storage than "none"."""
    return axes_of(name) is not None and name not in AS_IT_IS.axes


def storage_of(leaf: object) -> LinearStorage | None:
    """Return the storage of a node of a base tree; None where it is no linear."""
    if not isinstance(leaf, Mapping):
        return None
    return next((storage for storage in STORAGES.values() if storage.axes.keys() <= leaf.keys()), None)


def is_quantised(leaf: object) -> bool:
    """Return whether a node of a base tree is a linear in another storage than "none"."""
    return storage_of(leaf) not in (None, AS_IT_IS)


def kind_of(base: Params) -> str:
    """Return the name of the storage of a base tree's linears."""
    storages = [storage for leaf in base["layers"].values() if (storage := storage_of(leaf)) is not None]
    return next((storage.name for storage in storages if storage is not AS_IT_IS), AS_IT_IS.name)


def quantise_layers(layers: Params, kind: str = "nf4") -> Params:
    """Return layers with every kernel in the storage `kind`; norms, biases and quantised linears stay as they are.

    Raises: InputError as `get` and `LinearStorage.quantise`.
    """
    storage = get(kind)
    return {
        name: {**_others(leaf, AS_IT_IS), **storage.quantise(leaf["kernel"])} if storage_of(leaf) is AS_IT_IS else leaf
        for name, leaf in layers.items()
    }


def dequantise(layers: Params, dtype: DTypeLike = jnp.bfloat16) -> Params:
    """Return a layer (or a stack of layers) with every quantised linear turned back into a kernel of `dtype`."""
    return {
        name: {**_others(leaf, storage), "kernel": storage.kernel(leaf, dtype)}
        if (storage := storage_of(leaf)) not in (None, AS_IT_IS)
        else leaf
        for name, leaf in layers.items()
    }


def split_stacks(layers: Params, platform: str) -> tuple[Params, Params]:
    """Return the linears of a stack of layers whose products read the whole stack on a platform, and all the rest."""
    stacks, rest = {}, {}
    for name, leaf in layers.items():
        storage = storage_of(leaf)
        if storage is None or not storage.reads_stack(platform):
            rest[name] = leaf
            continue
        stacks[name] = {part: leaf[part] for part in storage.axes}
        rest[name] = _others(leaf, storage)
    return stacks, rest


def unpack(layer: Params, dtype: DTypeLike, stacks: Params | None = None, at: ScalarInt | None = None) -> Params:
    """Return one layer ready to multiply.

    Args:
      layer: its slices.
      dtype: of kernels.
      stacks: linears whose arrays are not sliced, as `split_stacks` parts them; None: there are none.
      at: the layer's number, where there are.

    Returns:
      The layer with every linear a kernel, of a fused storage a `StoredLinear`, of a stack a `StackedLinear`.
    """
    unpacked = {}
    for name, leaf in layer.items():
        storage = storage_of(leaf)
        if stacks and name in stacks:
            whole = storage_of(stacks[name])
            assert whole is not None
            assert at is not None
            one = {
                part: jax.lax.dynamic_index_in_dim(array, at, keepdims=False) for part, array in stacks[name].items()
            }
            linear = StackedLinear(stacks[name], at, whole.kernel(one, dtype), whole)
            unpacked[name] = {**leaf, "kernel": linear}
        elif storage is not None and storage.fused:
            stored = StoredLinear({part: leaf[part] for part in storage.axes}, storage)
            unpacked[name] = {**_others(leaf, storage), "kernel": stored}
        else:
            unpacked |= dequantise({name: leaf}, dtype)
    return unpacked


def product(x: LinearInputs, kernel: Kernel | StoredLinear | StackedLinear) -> LinearOutputs:
    """Return x [..., in] times a kernel [in, out] of any type or storage, [..., out] in x's type."""
    return products(x, [kernel])[0]


def products(x: LinearInputs, kernels: Sequence[EachKernel | StoredLinear | StackedLinear]) -> tuple[EachOutputs, ...]:
    """Return `product` of one x with each of several kernels, by one product where their storage has one."""
    stacked = [kernel for kernel in kernels if isinstance(kernel, StackedLinear)]
    if len(stacked) == len(kernels) and len({kernel.storage.name for kernel in stacked}) == 1:
        return stacked[0].storage.stack_products(x, stacked)
    plain = [kernel for kernel in kernels if not isinstance(kernel, StackedLinear | StoredLinear)]
    if len(plain) == len(kernels):
        return AS_IT_IS.products(x, plain)
    return tuple(
        kernel.storage.product(x, kernel.leaf) if isinstance(kernel, StoredLinear) else product(x, kernel)
        for kernel in kernels
    )


def takes_low_rank(
    shape: tuple[int, ...], kernels: Sequence[EachKernel | StoredLinear | StackedLinear], dtype: DTypeLike
) -> bool:
    """Return whether `adapted_products` multiplies inputs of a shape by several kernels."""
    stacked = [kernel for kernel in kernels if isinstance(kernel, StackedLinear)]
    if len(stacked) < len(kernels) or len({kernel.storage.name for kernel in stacked}) > 1:
        return False
    return stacked[0].storage.takes_low_rank(shape, [kernel.kernel.shape[-1] for kernel in stacked], dtype)


def unpacks(
    shape: tuple[int, ...], kernels: Sequence[EachKernel | StoredLinear | StackedLinear], dtype: DTypeLike
) -> list[EachKernel] | None:
    """Return the kernels that `products` unpacks for inputs of a shape; None where it multiplies what is stored."""
    stacked = [kernel for kernel in kernels if isinstance(kernel, StackedLinear)]
    if len(stacked) < len(kernels) or math.prod(shape[:-1]) == 1 or takes_low_rank(shape, kernels, dtype):
        return None
    return [kernel.kernel for kernel in stacked]


def adapted_products(x: LinearInputs, kernels: Sequence[StackedLinear], factors: LowRank) -> LinearOutputs:
    """Return `products` side by side, those of LoRA factors added; of these no gradient is computed."""
    return kernels[0].storage.adapted_products(x, kernels, factors)


def cast(tree: Tree, dtype: DTypeLike) -> Tree:
    """Return a tree of parameters in another dtype of floats; quantised linears stay as they are."""

    def one(leaf: Leaf | jax.Array) -> Leaf | jax.Array:
        if not isinstance(leaf, Mapping):
            return leaf.astype(dtype)
        storage = storage_of(leaf)
        if storage is None:
            raise ValueError(f"no storage holds {', '.join(leaf)}")
        return storage.cast(leaf, dtype)

    return jax.tree.map(one, tree, is_leaf=lambda leaf: storage_of(leaf) is not None)


def _others(leaf: Leaf, storage: LinearStorage) -> DeviceArrays:
    """Return the arrays of a leaf that are not its kernel's."""
    return {name: value for name, value in leaf.items() if name not in storage.axes}
