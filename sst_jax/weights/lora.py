"""LoRA folded into its base: W + scale * A B."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from sst_jax.model.config import AdapterConfig
from sst_jax.model.quantization import storages
from sst_jax.types import DeviceArrays, HostArray, Kernel, Params


class MergedKernel:
    """A stack of kernels [L, in, out] with their adapter folded in, each computed in float32 when it is indexed."""

    def __init__(self, leaf: Params, pair: Params | None, scale: float):
        self.leaf, self.pair, self.scale = leaf, pair, scale

    @property
    def shape(self) -> tuple[int, ...]:
        storage = storages.storage_of(self.leaf)
        assert storage is not None  # the leaf is a linear
        return storage.kernel_shape(self.leaf)

    def __getitem__(self, layer: int) -> HostArray:
        kernel = self.frozen(layer)
        if self.pair is None:
            return kernel
        a, b = (np.asarray(self.pair[name][layer], np.float32) for name in ("lora_a", "lora_b"))
        return kernel.astype(np.float32) + self.scale * (a @ b)

    def frozen(self, layer: int) -> HostArray:
        """Return the kernel without its adapter: as it is stored, or where it is quantised in float32."""
        if not storages.is_quantised(self.leaf):
            return np.asarray(self.leaf["kernel"][layer])
        return np.asarray(_kernel_of({name: part[layer] for name, part in self.leaf.items()}))


@jax.jit
def _kernel_of(leaf: DeviceArrays) -> Kernel:
    return storages.dequantise({"linear": leaf}, jnp.float32)["linear"]["kernel"]


def merge(base: Params, adapter: Params, config: AdapterConfig) -> Params:
    """Return the base tree with every linear's kernel a `MergedKernel`: W + (alpha / rank) A B where adapted."""
    layers = {}
    for name, leaf in base["layers"].items():
        storage = storages.storage_of(leaf)
        if storage is None:
            layers[name] = leaf
        else:
            others = {part: value for part, value in leaf.items() if part not in storage.axes}
            layers[name] = {**others, "kernel": MergedKernel(leaf, adapter.get(name), config.scale)}
    return {**base, "layers": layers}


def gap(base: Params, other: Params, config: AdapterConfig) -> dict[str, float]:
    """Return |W - W'| / |W| over all layers of each linear (Frobenius norms) of two bases, of all as "all"."""
    ours, theirs = (merge(tree, {}, config)["layers"] for tree in (base, other))
    found, total = {}, np.zeros(2)
    for name in ours:
        if "kernel" not in ours[name]:
            continue
        pair, sums = (ours[name]["kernel"], theirs[name]["kernel"]), np.zeros(2)
        for layer in range(pair[0].shape[0]):
            one, two = (stack.frozen(layer).astype(np.float32) for stack in pair)
            sums += np.square(one - two).sum(dtype=np.float64), np.square(one).sum(dtype=np.float64)
        found[name], total = float(np.sqrt(sums[0] / sums[1])), total + sums
    return {**found, "all": float(np.sqrt(total[0] / total[1]))}
