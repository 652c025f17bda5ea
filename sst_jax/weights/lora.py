"""LoRA folded into its base: W + scale * A B."""

from __future__ import annotations

from typing import Any

import numpy as np

from sst_jax.model.config import AdapterConfig


def merge(base: dict[str, Any], adapter: dict[str, Any], config: AdapterConfig) -> dict[str, Any]:
    """The base tree with every adapted kernel [L, in, out] replaced by W + (alpha / rank) A B, in the base's type.

    Computed a layer at a time in float32; kernels without an adapter are shared, not copied.
    """
    layers = dict(base["layers"])
    for name, pair in adapter.items():
        kernel = np.array(layers[name]["kernel"])
        for layer in range(kernel.shape[0]):
            delta = np.asarray(pair["lora_a"][layer], np.float32) @ np.asarray(pair["lora_b"][layer], np.float32)
            kernel[layer] = (kernel[layer].astype(np.float32) + config.scale * delta).astype(kernel.dtype)
        layers[name] = {"kernel": kernel}
    return {**base, "layers": layers}
