"""What programs are compiled for, and with which options of XLA: the same wherever they are planned or run."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax

# Set where programs are compiled for hardware that is described and not here; JAX keeps apart what it traces under it.
compiled_for = jax.make_user_context(None)


def platform() -> str:
    """Return what the program at hand is compiled for: "cpu", "cuda", "tpu" or another platform of JAX's.

    "interpreted" is the CPU with NVIDIA's kernels in Pallas' interpreter, for tests.
    """
    if compiled_for.value is not None:
        return compiled_for.value
    device = jax.config.jax_default_device or jax.devices()[0]  # type: ignore[attr-defined]  # made at run time
    name = device if isinstance(device, str) else device.platform
    if name != "gpu":
        return name
    return "rocm" if "rocm" in jax.devices()[0].client.platform_version.lower() else "cuda"


def compiler_options(name: str) -> dict[str, int]:
    """Return XLA options of a program on a platform, as `platform` names it."""
    if name not in ("gpu", "cuda", "rocm"):
        return {}
    # XLA would merge x W and x A into x [W, A], and for that copy the frozen kernel W beside LoRA's A, every time.
    return {"xla_gpu_dot_merger_threshold_mb": 0}


class Program:
    """A function under `jax.jit`, with the compiler options of the platform that it is called on.

    They are looked up at the first call, as asking for the platform takes the devices. Inside another traced function
    it is `jax.jit` alone: there the outer one's options hold.
    """

    def __init__(self, function: Callable[..., Any], **settings: Any):
        functools.update_wrapper(self, function)
        self._plain = jax.jit(function, **settings)
        self._function, self._settings = function, settings

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves((args, kwargs))):
            return self._plain(*args, **kwargs)
        return self._top(*args, **kwargs)

    @functools.cached_property
    def _top(self) -> Callable[..., Any]:
        options = compiler_options(platform())
        return jax.jit(self._function, compiler_options=options, **self._settings) if options else self._plain

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_plain"], name)


def program(function: Callable[..., Any] | None = None, **settings: Any) -> Any:
    """Return a `Program`, as a decorator with or without `jax.jit`'s settings."""
    return functools.partial(Program, **settings) if function is None else Program(function, **settings)
