"""Hardware that we describe to the compiler instead of having it.

Figures are the vendors': NVIDIA's architecture whitepapers and product datasheets (Turing, A100, GA102, H100, H200, DGX
B200, Ada, L4 and L40S, RTX Blackwell), its CUDA programming guide's table of limits per compute capability, and Google
Cloud's TPU pages. Throughput is dense bfloat16 with float32 accumulation, without sparsity.
"""

from __future__ import annotations

import dataclasses
import re
from typing import NamedTuple

from sst_jax.errors import InputError

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Target:
    """A GPU, several in one machine, or a slice of TPU chips: `chips` devices; figures are those of one.

    memory     bytes that programs can have: what the driver or the runtime reports, before its own share
    flops      peak dense bfloat16, FLOP/s
    bandwidth  peak of device memory, bytes/s
    link       what a device sends to others in its machine or slice, bytes/s, all links together
    """

    name: str
    title: str
    platform: str  # "cuda" or "tpu"
    memory: float
    flops: float
    bandwidth: float
    capability: tuple[int, int] = (0, 0)
    cores: int = 0  # streaming multiprocessors
    clock: float = 0.0  # GHz, boost
    cache: int = 0  # L2, bytes
    topology: str = ""  # TPU: the compiler's name of the slice
    chips: int = 1
    link: float = 0.0

    @property
    def extra(self) -> str:
        """The extra of this package whose wheels bring the compiler."""
        return "cuda" if self.platform == "cuda" else "tpu"

    @property
    def reserve(self) -> float:
        """Bytes kept free for what no plan sees: context, kernels' workspaces, fragmentation. An assumption."""
        return 1.0 * GIB if self.platform == "cuda" else 0.5 * GIB


class Gpu(NamedTuple):
    """A GPU's data sheet, in the units that such sheets use."""

    name: str
    title: str
    gib: float
    teraflops: float
    gigabytes_per_second: float
    capability: tuple[int, int]
    cores: int
    clock: float
    cache_mib: int
    link: float  # GB/s sent over NVLink, else PCIe

    def target(self) -> Target:
        return Target(
            self.name,
            self.title,
            "cuda",
            self.gib * GIB,
            self.teraflops * 1e12,
            self.gigabytes_per_second * 1e9,
            self.capability,
            self.cores,
            self.clock,
            self.cache_mib * 2**20,
            link=self.link * 1e9,
        )


class Slice(NamedTuple):
    """A TPU slice's data sheet; figures are those of one chip."""

    name: str
    title: str
    gigabytes: float
    teraflops: float
    gigabytes_per_second: float
    topology: str  # the compiler's name
    chips: int
    link: float  # GB/s sent

    def target(self) -> Target:
        return Target(
            self.name,
            self.title,
            "tpu",
            self.gigabytes * 1e9,
            self.teraflops * 1e12,
            self.gigabytes_per_second * 1e9,
            topology=self.topology,
            chips=self.chips,
            link=self.link * 1e9,
        )


_ALL: tuple[Gpu | Slice, ...] = (
    # name, title, GiB, TFLOP/s, GB/s, compute capability, SMs, GHz, MiB of L2, GB/s sent (NVLink, else PCIe)
    Gpu("rtx-pro-6000", "NVIDIA RTX PRO 6000 Blackwell", 95.6, 503.8, 1792, (12, 0), 188, 2.617, 128, 64),
    Gpu("h100", "NVIDIA H100 SXM 80 GB", 79.1, 989.4, 3352, (9, 0), 132, 1.98, 50, 450),
    Gpu("h200", "NVIDIA H200 SXM 141 GB", 139.8, 989.4, 4800, (9, 0), 132, 1.98, 50, 450),
    Gpu("b200", "NVIDIA B200 180 GB", 178.3, 2250.0, 7700, (10, 0), 148, 1.965, 126, 900),
    Gpu("rtx-5090", "NVIDIA GeForce RTX 5090", 31.8, 209.5, 1792, (12, 0), 170, 2.407, 96, 64),
    Gpu("rtx-4090", "NVIDIA GeForce RTX 4090", 23.6, 165.2, 1008, (8, 9), 128, 2.52, 72, 32),
    Gpu("a100-80g", "NVIDIA A100 SXM 80 GB", 79.1, 311.9, 2039, (8, 0), 108, 1.41, 40, 300),
    Gpu("a100-40g", "NVIDIA A100 SXM 40 GB", 39.4, 311.9, 1555, (8, 0), 108, 1.41, 40, 300),
    Gpu("l40s", "NVIDIA L40S", 44.4, 362.0, 864, (8, 9), 142, 2.52, 96, 32),
    Gpu("a6000", "NVIDIA RTX A6000", 47.4, 154.8, 768, (8, 6), 84, 1.8, 6, 32),
    Gpu("rtx-3090", "NVIDIA GeForce RTX 3090", 23.6, 71.2, 936, (8, 6), 82, 1.695, 6, 32),
    Gpu("l4", "NVIDIA L4", 22.0, 121.0, 300, (8, 9), 58, 2.04, 48, 32),
    # Turing's tensor cores have no bfloat16: its products run in float32, at that rate.
    Gpu("t4", "NVIDIA T4", 14.7, 8.1, 320, (7, 5), 40, 1.59, 4, 16),
    # name, title, GB, TFLOP/s, GB/s, the compiler's topology, chips, GB/s sent. Google numbers v5p by its two cores.
    Slice("v5e-8", "TPU v5e", 16, 197, 819, "v5e:2x4", 8, 200),
    Slice("v5p-8", "TPU v5p", 95, 459, 2765, "v5p:2x2x1", 4, 600),
    Slice("v5p-16", "TPU v5p", 95, 459, 2765, "v5p:2x2x2", 8, 600),
    Slice("v6e-8", "TPU v6e", 32, 918, 1640, "v6e:2x4", 8, 400),
)
TARGETS = {sheet.name: sheet.target() for sheet in _ALL}

# Pallas finds a described card's capability by its name, and jax 0.12 knows of 12.0 the RTX PRO's alone.
_KNOWN_AS = {(12, 0): "NVIDIA RTX PRO 6000 Blackwell"}

# Per compute capability: threads a multiprocessor, its shared memory, and what of that one block may have (bytes).
_LIMITS = {
    (7, 5): (1024, 65_536, 65_536),
    (8, 0): (2048, 167_936, 166_912),
    (8, 6): (1536, 102_400, 101_376),
    (8, 9): (1536, 102_400, 101_376),
    (9, 0): (2048, 233_472, 232_448),
    (10, 0): (2048, 233_472, 232_448),
    (12, 0): (1536, 102_400, 101_376),
}


def find(name: str) -> Target:
    """Return the target of that name; of a GPU also several in one machine, as "h100x8".

    Raises: InputError listing the names there are.
    """
    several = re.fullmatch(r"(.+)x([1-9])", name)
    if several and several.group(1) in TARGETS and TARGETS[several.group(1)].platform == "cuda":
        return dataclasses.replace(TARGETS[several.group(1)], name=name, chips=int(several.group(2)))
    if name not in TARGETS:
        raise InputError(f"--target {name} is unknown; described are {', '.join(TARGETS)}, and GPUs as h100x8")
    return TARGETS[name]


def config_text(target: Target, cudnn: tuple[int, int, int] = (9, 10, 0)) -> str:
    """Return a CUDA target as XLA's GpuTargetConfigProto in text form."""
    threads, shared, shared_of_block = _LIMITS[target.capability]
    major, minor = target.capability
    device = {
        "threads_per_block_limit": 1024,
        "threads_per_warp": 32,
        "threads_per_core_limit": threads,
        "block_dim_limit_x": 2**31 - 1,
        "block_dim_limit_y": 65_535,
        "block_dim_limit_z": 65_535,
        "thread_dim_limit_x": 1024,
        "thread_dim_limit_y": 1024,
        "thread_dim_limit_z": 64,
        "shared_memory_per_block": 49_152,
        "shared_memory_per_core": shared,
        "shared_memory_per_block_optin": shared_of_block,
        "registers_per_core_limit": 65_536,
        "registers_per_block_limit": 65_536,
        "core_count": target.cores,
        "fpus_per_core": 64 if target.capability in ((7, 5), (8, 0)) else 128,
        "clock_rate_ghz": target.clock,
        "memory_bandwidth": int(target.bandwidth),
        "l2_cache_size": target.cache,
        "device_memory_size": int(target.memory),
    }
    # Hopper's and Blackwell's data-centre cards have instructions outside the common set.
    feature = " feature_extension: ACCELERATED_FEATURES" if target.capability in ((9, 0), (10, 0)) else ""
    lines = [f"  {field}: {value}" for field, value in device.items()]
    lines.append(f"  cuda_compute_capability {{ major: {major} minor: {minor}{feature} }}")
    version = "major: {} minor: {} patch: {}".format(*cudnn)
    return "\n".join(
        [
            "gpu_device_info {",
            *lines,
            "}",
            'platform_name: "CUDA"',
            f"dnn_version_info {{ {version} }}",
            f'device_description_str: "{_KNOWN_AS.get(target.capability, target.title)}"',
            "",
        ]
    )
