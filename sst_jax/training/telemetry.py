"""What a run costs: seconds of compiling, peak memory. Metrics of the machine, which differ from run to run."""

from __future__ import annotations

import resource
import sys

import jax

COMPILED = "/jax/core/compile/backend_compile_duration"  # JAX's event: XLA has compiled, or read its cache
GIB = 2.0**30

# Metrics that say nothing of what is learned: a run that is repeated has others.
OF_THE_MACHINE = (
    "tokens_per_second",
    "step_seconds",
    "compile_seconds",
    "peak_device_memory_gib",
    "peak_host_memory_gib",
)


class CompileClock:
    """Within `with`, counts the seconds that XLA compiles in this process."""

    def __init__(self) -> None:
        self.total = 0.0
        self._taken = 0.0

    def __enter__(self) -> CompileClock:
        jax.monitoring.register_event_duration_secs_listener(self._note)
        return self

    def __exit__(self, *_: object) -> None:
        jax.monitoring.unregister_event_duration_listener(self._note)

    def take(self) -> float:
        """Return the seconds since the last call."""
        new, self._taken = self.total - self._taken, self.total
        return new

    def _note(self, event: str, duration_secs: float, **kwargs: str | int) -> None:
        if event == COMPILED:
            self.total += duration_secs


def peak_memory() -> dict[str, float]:
    """Return the peaks so far in GiB: of the first device here, where it says, and of this process."""
    stats = jax.local_devices()[0].memory_stats() or {}
    found = {}
    if "peak_bytes_in_use" in stats:
        found["peak_device_memory_gib"] = stats["peak_bytes_in_use"] / GIB
    unit = 1 if sys.platform == "darwin" else 1024  # getrusage(2): kilobytes on Linux
    found["peak_host_memory_gib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / GIB
    return found
