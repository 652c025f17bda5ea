"""Compiling the real train or decode step for hardware that is not here, on arrays that do not exist."""

from __future__ import annotations

import contextlib
import functools
import math
import time
from collections.abc import Iterator
from typing import NamedTuple

import jax
from jax._src.cudnn import fused_attention_stablehlo
from jax.experimental import topologies

from sst_jax.errors import InputError
from sst_jax.inference import prefill
from sst_jax.lab.planning import programs
from sst_jax.lab.planning.collectives import sent
from sst_jax.lab.planning.count import Work, count
from sst_jax.lab.planning.programs import Program, training_step
from sst_jax.lab.planning.targets import Target, config_text
from sst_jax.lab.planning.traffic import Traffic, traffic
from sst_jax.model import compiler, kernels, sharding
from sst_jax.model.config import BackboneConfig
from sst_jax.model.sharding import MeshConfig
from sst_jax.training.recipe import Recipe, with_attention_kernel
from sst_jax.types import Json


class Plan(NamedTuple):
    """What a compiled program needs, bytes of one device; `work` is that of all devices together.

    `kinds` are the arguments' parts by name (padding, which only the compiler knows of, is in none of them).
    `traffic` is what a device moves and launches in one step, from the optimised HLO; None where that does not say.
    `sent` are the bytes that each device sends to others, by kind of collective; `mesh` the devices along each axis.
    """

    arguments: int
    kinds: dict[str, int]
    temporaries: int
    peak: int
    work: Work
    attention: str
    compile_seconds: float
    sent: dict[str, float]
    mesh: dict[str, int]
    traffic: Traffic | None = None


class TooLarge(RuntimeError):
    """The compiler itself found that the program does not fit (TPU compilers do)."""


def devices_of(target: Target) -> list[jax.Device]:
    """Return the described devices.

    Raises: InputError naming the extra, when the wheels with the target's compiler are not installed.
    """
    try:
        if target.platform == "cuda":
            found = topologies.get_topology_desc(
                platform="cuda", topology_name="", target_config=config_text(target), topology=f"1x1x{target.chips}"
            )
        else:
            found = topologies.get_topology_desc(platform="tpu", topology_name=target.topology)
    except (NotImplementedError, RuntimeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(
            f"planning for {target.name} needs the compiler in JAX's {target.extra} wheels (no device, no driver): "
            f"pip install 'sst-jax[{target.extra}]' ({reason})"
        ) from None
    return list(found.devices)


@contextlib.contextmanager
def described(target: Target) -> Iterator[None]:
    """Let what asks for the device ask for the described one: our choices, and JAX's check of cuDNN's head dims."""
    name = "check_compute_capability"
    original = getattr(fused_attention_stablehlo, name, None)
    if target.platform != "cuda" or original is None:
        with compiler.compiled_for(target.platform):
            yield
        return
    allowed = lambda wanted: target.capability >= tuple(int(part) for part in wanted.split("."))  # noqa: E731
    setattr(fused_attention_stablehlo, name, allowed)
    try:
        with compiler.compiled_for(target.platform):
            yield
    finally:
        setattr(fused_attention_stablehlo, name, original)


def attention_of(target: Target, attention: str, dtype: str, head_dim: int) -> str:
    """Return the attention kernel on a target."""
    backend = "tpu" if target.platform == "tpu" else "gpu"
    return kernels.pick(attention, head_dim, dtype, backend, target.capability)


def plan_training(recipe: Recipe, backbone: BackboneConfig, target: Target) -> Plan:
    """Compile the train step of a recipe: of one that draws passes or depths the costliest, and count the average.

    Raises: InputError as `mesh_on` and `sharding.check`; TooLarge.
    """
    if len(recipe.forward.draws()) > 1:
        draws = _draws(recipe, backbone)
        costliest = max(draws, key=lambda one: one[2].flops)[1]
        return plan_training(costliest, backbone, target)._replace(work=_average(draws))
    mesh = mesh_on(target, recipe.mesh)
    sharding.check(mesh, backbone, recipe.data.batch_size)
    return plan_step(target, mesh, programs.training(_with_kernel(recipe, backbone, target), backbone))


def mesh_on(target: Target, config: MeshConfig) -> jax.sharding.Mesh:
    """Return the mesh of a config over a target's devices.

    Raises: InputError as `devices_of`, and where the mesh does not fit them.
    """
    return sharding.make_mesh(config, devices_of(target)[: target.chips])


def training_work(recipe: Recipe, backbone: BackboneConfig) -> Work:
    """Return what a train step of a recipe computes on average, whatever it runs on; nothing is compiled."""
    return _average(_draws(recipe, backbone))


def _draws(recipe: Recipe, backbone: BackboneConfig) -> list[tuple[float, Recipe, Work]]:
    """Return the kinds of step that a recipe draws: probability, a recipe of such steps alone, and work of one."""
    found = []
    for share, drawn in recipe.forward.draws():
        one = recipe.with_schedule(drawn)
        step, arguments = training_step(with_attention_kernel(one, lambda *_: "xla"), backbone)
        found.append((share, one, count(jax.make_jaxpr(step)(*jax.eval_shape(arguments)))))
    return found


def _average(draws: list[tuple[float, Recipe, Work]]) -> Work:
    return Work([part._replace(times=share * part.times) for share, _, work in draws for part in work.products])


def plan_evaluation(recipe: Recipe, backbone: BackboneConfig, target: Target) -> Plan:
    """Compile the losses of a recipe's held-out batch. Raises: as `plan_training`."""
    mesh = mesh_on(target, recipe.mesh)
    rows, _ = programs.heldout_rows(recipe, sharding.rows(mesh))
    return plan_step(target, mesh, programs.evaluation(_with_kernel(recipe, backbone, target), backbone, rows))


def plan_decoding(
    recipe: Recipe, backbone: BackboneConfig, target: Target, rows: int, capacity: int, depth: int
) -> Plan:
    """Compile the decoding of `rows` sequences with caches of `capacity` positions: a plan of one token at `depth`.

    Raises: as `plan_training`.
    """
    mesh = mesh_on(target, recipe.mesh)
    sharding.check(mesh, backbone)
    return plan_step(target, mesh, programs.decoding(recipe, backbone, rows, capacity, depth))


def plan_prefill(recipe: Recipe, backbone: BackboneConfig, target: Target, capacity: int) -> Plan:
    """Compile the first chunk of a prompt. Raises: as `plan_training`."""
    mesh = mesh_on(target, recipe.mesh)
    sharding.check(mesh, backbone)
    return plan_step(target, mesh, programs.prefilling(recipe, backbone, min(prefill.CHUNK, capacity), capacity))


def _with_kernel(recipe: Recipe, backbone: BackboneConfig, target: Target) -> Recipe:
    """Return the recipe with its attention kernel on a target chosen."""
    pick = functools.partial(attention_of, target, head_dim=backbone.head_dim)
    return with_attention_kernel(recipe, lambda attention, dtype: pick(attention, dtype=dtype))


def plan_step(target: Target, mesh: jax.sharding.Mesh, program: Program) -> Plan:
    """Compile a program for a mesh of a target's devices, and count what it does. Raises: TooLarge."""
    shapes = jax.eval_shape(program.arguments)
    work = count(jax.make_jaxpr(program.counted)(*shapes), program.trips, program.flash)
    places = sharding.shardings(mesh, shapes)
    abstract = jax.tree.map(_placed, shapes, places)
    options: Json = {"donate_argnums": 0, "out_shardings": (places[0], None)} if program.donated else {}
    started = time.monotonic()
    try:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh), described(target):
            lowered = jax.jit(program.step, **options).trace(*abstract).lower()
            compiled = lowered.compile(compiler_options=compiler.compiler_options(target.platform))
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" in str(error):
            raise TooLarge(str(error).splitlines()[0]) from None
        raise
    memory, text = compiled.memory_analysis(), compiled.as_text()
    moved = None
    if target.platform == "cuda":  # a TPU's compiler writes other instructions
        moved = Traffic(*(part / program.turns for part in traffic(text, program.assumed)))
    parts = {name: sum(map(_bytes, jax.tree.leaves(part))) for name, part in program.parts(*abstract).items()}
    return Plan(
        memory.argument_size_in_bytes,
        parts,
        memory.temp_size_in_bytes,
        memory.peak_memory_in_bytes,
        work,
        program.attention,
        time.monotonic() - started,
        sent(text, mesh.size),
        dict(mesh.shape),
        moved,
    )


def _bytes(shape: jax.ShapeDtypeStruct) -> int:
    """Return the bytes of an array's part on one device."""
    return math.prod(shape.sharding.shard_shape(shape.shape)) * shape.dtype.itemsize


def _placed(shape: jax.ShapeDtypeStruct, place: jax.sharding.NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=place)
