"""What training keeps of a layer until its backward pass, and what it computes again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import jax
from jax.ad_checkpoint import checkpoint_name

# What training keeps of a layer until its backward pass, in this order: everything that a gradient reads; the layer's
# inputs and the results of its products with weights; its inputs and what is named KEPT; its inputs alone; its inputs,
# in the host's memory.
REMAT = ("none", "products", "memories", "layer", "offload")
# States at the borders of `exact`'s chunks: 6% of the layers' inputs, which spare it one of four scans.
KEPT = "kept"
RESIDUALS = "residuals"
Carry = TypeVar("Carry")


def recomputed(body: Callable[..., Any], remat: str) -> Callable[..., Any]:
    """Return a layer whose backward pass recomputes what `remat` does not keep of its forward pass."""
    if remat == "none":
        return body
    policies = jax.checkpoint_policies
    policy = {
        "layer": None,
        "memories": policies.save_only_these_names(KEPT),
        "products": policies.save_from_both_policies(
            policies.dots_with_no_batch_dims_saveable, policies.save_only_these_names(KEPT)
        ),
        "offload": policies.save_and_offload_only_these_names(
            names_which_can_be_saved=[KEPT], names_which_can_be_offloaded=[RESIDUALS], offload_src="device",
            offload_dst="pinned_host",
        ),
    }[remat]  # fmt: skip

    def named(residuals: Carry, slices: tuple) -> tuple[Carry, Any]:
        return body(checkpoint_name(residuals, RESIDUALS), slices)

    # The scan already keeps XLA from undoing the recomputation, so the costly barrier is not needed.
    return jax.checkpoint(named, prevent_cse=False, policy=policy)
