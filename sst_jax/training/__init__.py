"""Training: `fit` and its recipe, the loss, the step, the optimizer, metrics and the run folder."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sst_jax.training.loop import fit
    from sst_jax.training.recipe import read_recipe

__all__ = ["fit", "read_recipe"]


def __getattr__(name: str) -> Any:
    """Import on demand: a recipe file needs `training.recipe` alone, and commands start fast."""
    if name == "fit":
        from sst_jax.training.loop import fit

        return fit
    if name == "read_recipe":
        from sst_jax.training.recipe import read_recipe

        return read_recipe
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
