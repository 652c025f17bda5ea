"""Where compiled programs are kept between processes: compiling takes seconds to minutes, reading milliseconds.

The folder is ~/.cache/sst_jax/xla, `SST_JAX_CACHE` names another and, empty, none; JAX_COMPILATION_CACHE_DIR, JAX's own
setting, comes before both. Programs for a CPU lie in a folder of its instructions, as JAX's key for them says nothing
of these, and a home folder may be shared between machines.
"""

from __future__ import annotations

import hashlib
import os
import pathlib
import platform
import sys

VARIABLE, OWN = "SST_JAX_CACHE", "JAX_COMPILATION_CACHE_DIR"
MIN_SECONDS = 0.5  # of compiling, for a program to be kept


def folder() -> pathlib.Path | None:
    """Return the folder that programs are kept in; None where none are."""
    named = os.environ.get(VARIABLE)
    if named == "":
        return None
    place = pathlib.Path(named or "~/.cache/sst_jax/xla").expanduser()
    return place / _machine()


def _machine() -> str:
    """Return a name of this machine's kind of CPU."""
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:  # not Linux
        lines = [platform.processor()]
    told = sorted({line for line in lines if line.startswith(("flags", "Features", "model name"))}) or lines[:1]
    return f"{platform.machine()}-{hashlib.sha256(''.join(told).encode()).hexdigest()[:8]}"


def keep_programs() -> None:
    """Have JAX keep what it compiles; without a folder, or where JAX's own setting names one, nothing changes."""
    place = folder()
    if place is None or os.environ.get(OWN):
        return
    settings = {OWN: str(place), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": MIN_SECONDS}
    if "jax" not in sys.modules:  # which reads them when it is imported; subprocesses inherit them
        os.environ.update({name: str(value) for name, value in settings.items()})
        return
    import jax
    from jax.experimental.compilation_cache import compilation_cache

    if jax.config.jax_compilation_cache_dir is None:  # type: ignore[attr-defined]  # made at run time
        for name, value in settings.items():
            jax.config.update(name.lower(), value)
        compilation_cache.reset_cache()  # what has compiled before would have turned it off for good


def keep_none() -> None:
    """Have JAX keep nothing, here and in subprocesses."""
    os.environ[VARIABLE] = ""
    os.environ.pop(OWN, None)
    if "jax" in sys.modules:
        import jax

        jax.config.update(OWN.lower(), None)
