"""LoRA folded into its base: W + scale * A B."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sst_jax.model.config import AdapterConfig
from sst_jax.model.quantization import nf4


class MergedKernel:
    """A stack of kernels [L, in, out] with their adapter folded in, each computed in float32 when it is indexed."""

    def __init__(self, leaf: dict[str, Any], pair: dict[str, Any] | None, scale: float):
        self.leaf, self.pair, self.scale = leaf, pair, scale

    @property
    def shape(self) -> tuple[int, ...]:
        if not nf4.is_quantised(self.leaf):
            return tuple(self.leaf["kernel"].shape)
        layers, half, outputs = self.leaf["codes"].shape
        return layers, 2 * half, outputs

    def __getitem__(self, layer: int) -> np.ndarray:
        kernel = self.frozen(layer)
        if self.pair is None:
            return kernel
        a, b = (np.asarray(self.pair[name][layer], np.float32) for name in ("lora_a", "lora_b"))
        return kernel.astype(np.float32) + self.scale * (a @ b)

    def frozen(self, layer: int) -> np.ndarray:
        """The kernel without its adapter; of NF4 what it stands for, bfloat16 numbers in float32."""
        if not nf4.is_quantised(self.leaf):
            return np.asarray(self.leaf["kernel"][layer])
        return np.asarray(_kernel_of({name: part[layer] for name, part in self.leaf.items()}))


@jax.jit
def _kernel_of(leaf: dict[str, jax.Array]) -> jax.Array:
    return nf4.kernel_of(leaf, jnp.float32)


def merge(base: dict[str, Any], adapter: dict[str, Any], config: AdapterConfig) -> dict[str, Any]:
    """The base tree with every linear's kernel a `MergedKernel`: W + (alpha / rank) A B where it has an adapter."""
    layers = {}
    for name, leaf in base["layers"].items():
        linear = "kernel" in leaf or nf4.is_quantised(leaf)
        layers[name] = {"kernel": MergedKernel(leaf, adapter.get(name), config.scale)} if linear else leaf
    return {**base, "layers": layers}


def gap(base: dict[str, Any], other: dict[str, Any], config: AdapterConfig) -> dict[str, float]:
    """|W - W'| / |W| over all layers of each linear (Frobenius norms) of two bases, and over all linears as "all"."""
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
