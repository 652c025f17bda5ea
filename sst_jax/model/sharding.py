"""Where arrays lie on a mesh of devices: a table from logical axes to mesh axes, and the logical axes of every array.

    data     rows of the batch; parameters are repeated
    fsdp     rows of the batch too; parameters are spread, and gathered a layer at a time (quantised as they are stored)
    tensor   heads, feed-forward width, vocabulary; activations are summed over it twice a layer

A single device is a mesh of one. The mesh is the one that `jax.set_mesh` has set: `device_put_sharded` puts arrays on
it, `constrain` and `gather` are sharding constraints inside a jitted function. Without a mesh they change nothing.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from sst_jax.errors import InputError
from sst_jax.model.backbone import GLOBAL, BackboneConfig
from sst_jax.model.quantization import storages
from sst_jax.types import AnyArray

Tree = TypeVar("Tree")  # of arrays

AXES = ("data", "fsdp", "tensor")

# Logical axis -> mesh axes, the last of which are left out where they do not divide a dimension.
RULES = (
    ("rows", ("data", "fsdp")),  # of a batch
    ("sequence", ("tensor",)),  # of the residual stream between layers
    ("scored", ("data",)),  # positions whose losses are computed together
    ("vocab", ("tensor", "fsdp")),
    ("width", ("tensor", "fsdp")),  # heads x head dim, or d_ff
    ("summed", ("tensor",)),  # the same where a kernel contracts it: blocks of quantised kernels are not cut further
    ("heads", ("tensor",)),
    ("model", ("fsdp",)),  # d_model, where no kernel contracts it
)
_RULES = dict(RULES)

AnyMesh = Mesh | AbstractMesh  # of devices, or of their number alone
Axes = tuple[str | None, ...]

# Linears [L, inputs, outputs], in any storage, and their LoRA factors A [L, inputs, R] and B [L, R, outputs].
_WIDEN = {
    "kernel": (None, None, "width"),
    "bias": (None, "width"),
    "lora_a": (None, "model", None),
    "lora_b": (None, None, "width"),
}
_NARROW = {
    "kernel": (None, "summed", "model"),
    "bias": (None, "model"),
    "lora_a": (None, "width", None),
    "lora_b": (None, None, "model"),
}
_LINEARS = {**dict.fromkeys(("q", "k", "v", "gate", "up"), _WIDEN), **dict.fromkeys(("o", "down"), _NARROW)}
_LINEARS |= {f"{GLOBAL}{name}": leaf for name, leaf in _LINEARS.items()}
_CACHE = (None, "rows", None, "heads", None)  # [layers, B, S, K, H]
_OTHERS: dict[str, Axes] = {
    "embedding": ("vocab", None),
    **dict.fromkeys(("local_k", "local_v", "global_k", "global_v"), _CACHE),
    "state": (None, "rows", None),
    **dict.fromkeys(("has_state", "length"), ("rows",)),
    **dict.fromkeys(("tokens", "segment_ids", "positions", "answer_mask"), ("rows", None)),
}


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each axis; -1, on one axis at most, is all that the others leave.

    Where no cluster tells (SLURM, Open MPI, Kubernetes and TPU pods do), the last three say where the processes are.

    data         devices over which rows are divided
    fsdp         devices over which rows and parameters are divided
    tensor       devices over which heads and feed-forward units are divided
    coordinator  HOST:PORT of process 0
    processes    how many processes there are
    process      which one this is, from 0
    """

    data: int = 1
    fsdp: int = -1
    tensor: int = 1
    coordinator: str = ""
    processes: int = 1
    process: int = 0

    def __post_init__(self) -> None:
        sizes = [getattr(self, name) for name in AXES]
        if any(size < 1 and size != -1 for size in sizes) or sizes.count(-1) > 1:
            shown = ", ".join(f"{name}={size}" for name, size in zip(AXES, sizes, strict=True))
            raise InputError(f"mesh ({shown}): each axis must be at least 1, or one of them -1 for all the rest")
        if not 0 <= self.process < self.processes:
            raise InputError(f"mesh.process={self.process} must be in [0, mesh.processes={self.processes})")
        if (self.processes > 1) != bool(self.coordinator):
            raise InputError("mesh.coordinator=HOST:PORT and mesh.processes=N above 1 go together")


def make_mesh(config: MeshConfig, devices: list[Any] | None = None) -> Mesh:
    """Return the mesh of a config over the given devices; None: all devices of JAX.

    Raises: InputError where they are too few, or where some would stay unused that must not.
    """
    devices = jax.devices() if devices is None else devices
    sizes = {name: getattr(config, name) for name in AXES}
    fixed = math.prod(size for size in sizes.values() if size != -1)
    sizes = {name: len(devices) // fixed if size == -1 else size for name, size in sizes.items()}
    count = math.prod(sizes.values())
    whole = jax.process_count() > 1 or -1 in (config.data, config.fsdp, config.tensor)  # all must be in use
    if not 0 < count <= len(devices) or (whole and count != len(devices)):
        asked = ", ".join(f"mesh.{name}={getattr(config, name)}" for name in AXES)
        raise InputError(f"{asked} does not fit {len(devices)} device(s): the product must be their number")
    types = (jax.sharding.AxisType.Auto,) * len(AXES)
    return jax.make_mesh(tuple(sizes.values()), AXES, axis_types=types, devices=devices[:count])


def rows(mesh: AnyMesh) -> int:
    """Return the number of parts that a mesh divides a batch's rows into."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def check(
    mesh: AnyMesh,
    backbone: BackboneConfig | None = None,
    batch_size: int | None = None,
    knob: str = "data.batch_size",
) -> None:
    """Raise InputError naming a dimension of a model or batch (of the recipe's `knob`) that a mesh does not divide."""
    if batch_size is not None and batch_size % rows(mesh):
        raise InputError(f"{knob}={batch_size} does not divide by mesh.data x mesh.fsdp = {rows(mesh)}")
    dimensions = (("fsdp", ("d_model",)), ("tensor", ("num_kv_heads", "global_num_kv_heads", "d_ff")))
    for axis, names in () if backbone is None else dimensions:
        for name in names:
            size = getattr(backbone, name)
            if size is not None and size % mesh.shape[axis]:
                raise InputError(f"mesh.{axis}={mesh.shape[axis]} does not divide the model's {name} of {size}")


def axes_of(path: tuple[Any, ...], rank: int) -> Axes:
    """Return the logical axes of an array by its path in a tree: parameters, gradients, moments, caches, batches."""
    names = [str(getattr(part, "key", getattr(part, "name", part))) for part in path]
    linear = _LINEARS.get(names[-2]) if len(names) > 1 else None
    if linear is None:
        axes = _OTHERS.get(names[-1])
    else:
        axes = linear.get(names[-1]) or _stored_axes(names[-1], linear["kernel"])
    return (None,) * rank if axes is None else axes[len(axes) - rank :]


def _stored_axes(name: str, kernel: Axes) -> Axes:
    """Return logical axes of an array of a linear's leaf, by those of its kernel [L, inputs, outputs]."""
    *stack, inputs, outputs = kernel
    along = {"inputs": inputs, "outputs": outputs}
    return (*stack, *(along[axis] for axis in storages.axes_of(name) or along))


def spec(mesh: AnyMesh, axes: Axes, shape: tuple[int, ...], without: str | None = None) -> PartitionSpec:
    """Return the mesh axes of every dimension of a shape.

    Args:
      mesh: concrete, or the abstract one of a traced function.
      axes: the logical axis of each dimension; None: it is not cut.
      shape: mesh axes that do not divide a dimension are left out there.
      without: a mesh axis that cuts no dimension; None: all may.
    """
    parts = []
    for axis, size in zip(axes, shape, strict=True):
        names = [name for name in _RULES.get(axis or "", ()) if name != without and mesh.shape[name] > 1]
        while names and size % math.prod(mesh.shape[name] for name in names):
            names.pop()
        parts.append(tuple(names) or None)
    return PartitionSpec(*parts)


def shardings(mesh: AnyMesh, tree: object) -> Any:
    """Return a NamedSharding for every array (or shape) of a tree, by its path."""

    def one(path: tuple, leaf: AnyArray | jax.ShapeDtypeStruct) -> NamedSharding:
        return NamedSharding(mesh, spec(mesh, axes_of(path, len(leaf.shape)), leaf.shape))

    return jax.tree_util.tree_map_with_path(one, tree)


def sharding_of(path: tuple[Any, ...], shape: tuple[int, ...]) -> jax.sharding.Sharding:
    """Return the sharding of an array by its path and shape: on the mesh that is set, else on the first device."""
    mesh = jax.sharding.get_mesh()
    if mesh.empty:
        return jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return NamedSharding(mesh, spec(mesh, axes_of(path, len(shape)), shape))


def device_put_sharded(tree: Tree) -> Tree:
    """Return a tree of arrays put on the mesh that is set.

    The arrays are numpy's or of one device, and equal in every process. In a traced function it is `constrain_tree`.
    """
    if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(tree)):
        return constrain_tree(tree)
    mesh = jax.sharding.get_mesh()
    if mesh.empty:
        return jax.tree.map(jnp.asarray, tree)
    return jax.tree.map(_put, tree, shardings(mesh, tree))


def _put(leaf: AnyArray, sharding: NamedSharding) -> jax.Array:
    if sharding.is_fully_addressable or (isinstance(leaf, jax.Array) and not leaf.is_fully_addressable):
        return jax.device_put(leaf, sharding)
    host = np.asarray(leaf)  # each process copies the parts of its own devices
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])


def _mesh_inside() -> Any:
    """Return the mesh that a function is being traced for; None where it has one device or other axes than AXES."""
    mesh = jax.sharding.get_abstract_mesh()
    return mesh if mesh.axis_names == AXES and mesh.size > 1 else None


def on_a_mesh() -> bool:
    """Return whether a function is being traced for more than one device."""
    return _mesh_inside() is not None


def row_parts() -> int:
    """Return the number of parts that rows are divided into where a function is being traced."""
    mesh = _mesh_inside()
    return 1 if mesh is None else rows(mesh)


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Return x with a sharding constraint from the logical axes of its dimensions."""
    mesh = _mesh_inside()
    return x if mesh is None else jax.lax.with_sharding_constraint(x, spec(mesh, axes, x.shape))


def constrain_tree(tree: Tree) -> Tree:
    """Return a tree of arrays with sharding constraints from their paths."""
    mesh = _mesh_inside()
    return tree if mesh is None else jax.lax.with_sharding_constraint(tree, shardings(mesh, tree))


def gather(tree: Tree) -> Tree:
    """Return one layer's parameters gathered over `fsdp`, as they are stored; over `tensor` they stay sharded."""
    mesh = _mesh_inside()
    if mesh is None or mesh.shape["fsdp"] == 1:
        return tree

    def one(path: tuple, leaf: jax.Array) -> jax.Array:
        axes = axes_of(path, leaf.ndim)
        return jax.lax.with_sharding_constraint(leaf, spec(mesh, axes, leaf.shape, without="fsdp"))

    return jax.tree_util.tree_map_with_path(one, tree)


def on_parts(function: Callable[..., jax.Array], arrays: Sequence[jax.Array], axes: Sequence[Axes]) -> jax.Array:
    """Return function(*arrays), run on each device's own parts: for kernels that XLA cannot partition.

    Args:
      function: takes the arrays and returns an array that is sharded as the first.
      arrays: of any ranks.
      axes: the logical axes of each.
    """
    mesh = _mesh_inside()
    if mesh is None:
        return function(*arrays)
    specs = tuple(spec(mesh, each, array.shape) for each, array in zip(axes, arrays, strict=True))
    return jax.shard_map(function, in_specs=specs, out_specs=specs[0], check_vma=False)(*arrays)
