"""Training: `fit` and its recipe, the loss, the step, the optimizer, metrics and the run folder."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sst_jax.training.loop import fit
    from sst_jax.training.recipe import read_recipe

__all__ = ["fit", "read_recipe"]


_HOMES = {"fit": "sst_jax.training.loop", "read_recipe": "sst_jax.training.recipe"}


def __getattr__(name: str) -> Any:
    """Import on demand: a recipe file needs `training.recipe` alone, and commands start fast."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
