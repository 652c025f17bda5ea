"""Several processes as one run: how they find one another, and which of them prints and writes."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping

import jax

from sst_jax.errors import InputError
from sst_jax.model.sharding import MeshConfig


def initialize_distributed(config: MeshConfig) -> None:
    """Connect to the run's other processes, named by the recipe or found in the environment, if there are any.

    To be called before anything else touches a device; a second call does nothing. On CPUs processes talk by Gloo.

    Raises: InputError where the others cannot be reached.
    """
    if jax.distributed.is_initialized() or (not config.coordinator and not in_cluster(os.environ)):
        return
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    given = (config.coordinator, config.processes, config.process) if config.coordinator else ()
    try:
        jax.distributed.initialize(*given)
    except (RuntimeError, ValueError) as error:
        raise InputError(f"the other processes of this run cannot be reached: {str(error).splitlines()[0]}") from None


def in_cluster(environment: Mapping[str, str]) -> bool:
    """Return whether a launcher has started several processes that `jax.distributed` knows how to bring together.

    SLURM (a step of srun), Open MPI, a TPU pod, or an indexed Kubernetes job (with jax[k8s]).
    """

    def number(name: str) -> int:
        value = environment.get(name, "")
        return int(value) if value.isdigit() else 0

    return (
        number("SLURM_STEP_NUM_TASKS") > 1
        or number("OMPI_COMM_WORLD_SIZE") > 1
        or "," in environment.get("TPU_WORKER_HOSTNAMES", "")
        or ("KUBERNETES_SERVICE_HOST" in environment and "JOB_COMPLETION_INDEX" in environment)
    )


def is_primary() -> bool:
    """Return whether this process is the one that prints, logs and draws."""
    return jax.process_index() == 0


@contextlib.contextmanager
def quiet_non_primary() -> Iterator[None]:
    """Let only the primary process print within this block; every process keeps its errors and warnings."""
    if is_primary():
        yield
        return
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        yield
