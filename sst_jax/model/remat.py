"""What training keeps of a layer until its backward pass, and what it computes again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import jax
from jax.ad_checkpoint import checkpoint_name

# Set while a walk from position to position is traced; JAX keeps apart what it traces under it.
walking = jax.make_user_context(False)

# What training keeps of a layer until its backward pass, in this order: everything that a gradient reads; the layer's
# inputs and the results of its products with weights; its inputs and what is named KEPT; its inputs alone; its inputs,
# in the host's memory.
REMAT = ("none", "products", "memories", "layer", "offload")
# States at the borders of `exact`'s chunks: 6% of the layers' inputs, which spare it one of four scans.
KEPT = "kept"
RESIDUALS = "residuals"
Carry = TypeVar("Carry")


def inputs_kept(function: Callable[..., Any], **settings: Any) -> Callable[..., Any]:
    """Return a function under `jax.checkpoint`: of what it computes only its inputs are kept for gradients.

    In a walk without the barrier around it: there the gradient is another loop's, which nothing can undo, and XLA
    would make kernels of their own of a mask's slice, of a norm and of an activation at every position.

    Args:
      function: of arrays, and of static arguments.
      settings: of `jax.checkpoint`.
    """
    return jax.checkpoint(function, prevent_cse=not walking.value, **settings)


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
