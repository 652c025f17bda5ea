"""LoRA folded into its base, W + scale * A B, and factors of several scales brought to one."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from sst_jax.errors import InputError
from sst_jax.model.config import AdapterConfig
from sst_jax.model.quantization import storages
from sst_jax.types import DeviceArrays, HostArray, Json, Kernel, Params
from sst_jax.weights.source import Tensor

# A pattern of module names from a file: what could make matching it take forever is left out.
_PLAIN_PATTERN = re.compile(r"(?!.*\)[*+?{])(?!(?:.*[*+{]){3}).{1,300}")


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


@dataclasses.dataclass(frozen=True)
class Scales:
    """Ranks and alphas of an adapter whose linears differ in them, as PEFT reads its adapter_config.json.

    rank, alpha          of linears that no pattern names
    ranks, alphas        by pattern of a module's name, of which the end must match
    square_root          scales are alpha / sqrt(rank) (rsLoRA, arXiv 2312.03732), not alpha / rank
    """

    rank: int
    alpha: float
    ranks: Mapping[str, int]
    alphas: Mapping[str, float]
    square_root: bool

    @classmethod
    def from_config(cls, adapter: AdapterConfig, config: Json, where: str) -> Scales:
        """Read use_rslora, rank_pattern and alpha_pattern of adapter_config.json beside what `adapter` says already.

        Raises: InputError, beginning with `where`, for a pattern or a number that is none.
        """
        patterns = {}
        for name, kinds, least in (("rank_pattern", int, 1), ("alpha_pattern", (int, float), 0)):
            patterns[name] = config.get(name) or {}
            if not isinstance(patterns[name], Mapping):
                raise InputError(f"{where}: {name}={patterns[name]!r} must map names of modules to numbers")
            for pattern, value in patterns[name].items():
                right = isinstance(value, kinds) and not isinstance(value, bool) and least <= value < 2**20
                if not right or not _PLAIN_PATTERN.fullmatch(pattern) or not _compiles(pattern):
                    raise InputError(f"{where}: {name} has {pattern!r}: {value!r}, which is malformed")
        if adapter.rank < 1:
            raise InputError(f"{where}: r={adapter.rank} must be at least 1")
        return cls(
            adapter.rank,
            adapter.alpha,
            patterns["rank_pattern"],
            patterns["alpha_pattern"],
            bool(config.get("use_rslora")),
        )

    def of(self, module: str) -> tuple[int, float]:
        """Return (rank, scale) of a module by its name, such as "model.layers.0.self_attn.q_proj"."""
        rank, alpha = int(_match(self.ranks, module, self.rank)), _match(self.alphas, module, self.alpha)
        return rank, alpha / (math.sqrt(rank) if self.square_root else rank)


def _compiles(pattern: str) -> bool:
    try:
        re.compile(pattern)
    except re.error:
        return False
    return True


def _match(patterns: Mapping[str, float], module: str, otherwise: float) -> float:
    return next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", module)), otherwise)


def at_one_scale(
    factors: Mapping[str, Tensor], scales: Scales, adapter: AdapterConfig
) -> tuple[AdapterConfig, dict[str, Tensor]]:
    """Return an adapter of one rank and one scale that computes the same: A and B padded with zeros, B rescaled.

    Args:
        factors: by key, KEY.lora_A.weight [rank, in] and KEY.lora_B.weight [out, rank].
        scales: of their linears.
        adapter: its rank and alpha are replaced.

    Raises: InputError for factors of another rank than their config's.
    """
    wanted = {key: scales.of(key.rpartition(".lora_")[0]) for key in factors}
    rank, scale = max(rank for rank, _ in wanted.values()), max(scale for _, scale in wanted.values()) or 1.0
    fitted = {}
    for key, tensor in factors.items():
        own_rank, own_scale = wanted[key]
        side = 1 if ".lora_B." in key else 0
        if len(tensor.shape) != 2 or tensor.shape[side] != own_rank:
            raise InputError(
                f"{tensor.file}: key {tensor.name} has shape {list(tensor.shape)}; its config says rank {own_rank}"
            )

        def read(tensor: Tensor = tensor, side: int = side, ratio: float = own_scale / scale) -> HostArray:
            value = tensor.read().astype(np.float32)
            padded = np.pad(value, [(0, rank - size if axis == side else 0) for axis, size in enumerate(value.shape)])
            return padded * np.float32(ratio) if side else padded

        shape = tuple(rank if axis == side else size for axis, size in enumerate(tensor.shape))
        fitted[key] = tensor._replace(shape=shape, read=read)
    return dataclasses.replace(adapter, rank=rank, alpha=scale * rank), fitted
