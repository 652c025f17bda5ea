"""A recipe's programs run on the device at hand, beside what a plan says: time, memory, and numerics of kernels.

Weights are random and of the real shapes: nothing is downloaded, and no number here is about what a model can do.
"""

from __future__ import annotations

import dataclasses
import datetime
import re
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sst_jax.console.progress import counted
from sst_jax.inference.decode_state import DecodeState
from sst_jax.lab.planning import programs
from sst_jax.lab.planning.count import count
from sst_jax.lab.planning.programs import Program
from sst_jax.lab.planning.records import step_seconds
from sst_jax.lab.planning.targets import GIB, TARGETS, Target
from sst_jax.lab.planning.traffic import Traffic, traffic
from sst_jax.model import compiler, kernels
from sst_jax.model.attention import Visible, attention
from sst_jax.model.config import BackboneConfig, ModelConfig
from sst_jax.model.quantization import nf4, nf4_product, storages
from sst_jax.model.quantization.base import StackedLinear
from sst_jax.training.recipe import Recipe, with_attention_kernel
from sst_jax.types import AnyArray, Json, Params

EFFICIENCY = 0.4  # of arithmetic, as `plan` assumes; of bandwidth twice that


class Sizes(NamedTuple):
    """What is measured."""

    layers: int  # of the backbone's
    rows: tuple[int, ...]  # sequences decoded together
    depths: tuple[int, ...]  # iterations per token
    capacity: int  # positions of a cache
    prompt: int  # positions that are prefilled
    repeats: int


def random_parameters(config: ModelConfig, dtype: str, quantize: str) -> tuple[Params, Params]:
    """Return parameters of the shapes of `programs.abstract_parameters`, of random bits and numbers."""
    shapes = jax.eval_shape(lambda: programs.abstract_parameters(config, dtype, quantize))
    leaves, structure = jax.tree.flatten(shapes)

    def one(number: int, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        key = jax.random.key(number)
        if jnp.issubdtype(leaf.dtype, jnp.integer):
            return jax.random.bits(key, leaf.shape, jnp.uint8).astype(leaf.dtype)
        return (jax.random.normal(key, leaf.shape, leaf.dtype) * 0.02).astype(leaf.dtype)

    make = jax.jit(one, static_argnums=(0, 1))
    return jax.tree.unflatten(structure, [make(number, leaf) for number, leaf in enumerate(leaves)])


def measure(recipe: Recipe, backbone: BackboneConfig, sizes: Sizes, trace: Path | None = None) -> Json:
    """Return what a recipe's programs take on the device at hand, and how its kernels round.

    Args:
        recipe: what is trained, and how the model is stored.
        backbone: of the recipe's model; its first `sizes.layers` layers are run.
        sizes: what is measured.
        trace: a folder that a profile of every program is written to; None: none.
    """
    device, whole = jax.devices()[0], backbone.num_layers
    backbone = dataclasses.replace(
        backbone,
        num_layers=sizes.layers,
        layer_types=tuple(backbone.layer_types[: sizes.layers]),
        attention_window=backbone.attention_window and backbone.attention_window[: sizes.layers],
    )
    recipe = with_attention_kernel(recipe, lambda name, dtype: kernels.here(name, dtype, backbone.head_dim))
    target = target_of(device.device_kind)
    record: Json = {
        "measured": True,
        "date": datetime.date.today().isoformat(),
        "device": device.device_kind,
        "platform": compiler.platform(),
        "driver": device.client.platform_version.replace("\n", " "),
        "jax": jax.__version__,
        "target": None if target is None else target.name,
        "model": recipe.model.source,
        "quantize": recipe.model.quantize,
        "dtype": recipe.model.dtype,
        "attention": recipe.model.attention,
        "layers": sizes.layers,
        "layers_of_the_model": whole,
        "numerics": [*attention_numerics(recipe, backbone), *product_numerics(backbone)],
        "programs": [],
    }
    for name, program in _programs(recipe, backbone, sizes):
        decodes = name.startswith("decode")
        place = None if trace is None else trace / re.sub(r"\W+", "-", name)
        for one in run_program(program, target, sizes.repeats, sizes.depths if decodes else (1,), place):
            label = f"{name}, depth {one['depth']}" if decodes else name
            record["programs"].append({"name": label, **one, "scaled_seconds": one["seconds"] * whole / sizes.layers})
    return record


def _programs(recipe: Recipe, backbone: BackboneConfig, sizes: Sizes) -> Iterator[tuple[str, Program]]:
    """Yield the programs by name; each is forgotten before the next is made."""
    data, forward = recipe.data, recipe.forward.forward
    yield (
        f"train step, {forward}, {data.batch_size} x {data.length}",
        programs.training(recipe, backbone, random_parameters),
    )
    rows, _ = programs.heldout_rows(recipe)
    name = f"evaluation, {recipe.heldout_forward.forward}, {rows} x {data.length}"
    yield name, programs.evaluation(recipe, backbone, rows, random_parameters)
    yield (
        f"prefill of {sizes.prompt}",
        programs.prefilling(recipe, backbone, sizes.prompt, sizes.capacity, random_parameters),
    )
    for rows in sizes.rows:
        program = programs.decoding(recipe, backbone, rows, sizes.capacity, 1, random_parameters)
        yield f"decode a token, {counted(rows, 'row')}", program


def run_program(
    program: Program, target: Target | None, repeats: int, depths: Sequence[int] = (1,), trace: Path | None = None
) -> list[Json]:
    """Return for each depth the seconds of one step of a program, its compile time and memory, and what a plan says.

    Args:
        program: whose arguments are real arrays.
        target: the data sheet of this device; None: nothing is planned.
        repeats: runs, of which the median counts; one more goes before.
        depths: iterations per token, of decoding.
        trace: where a profile of one run goes; None: nowhere.
    """
    arguments = list(program.arguments())
    options = compiler.compiler_options(compiler.platform()) or None
    donated = (0,) if program.donated else ()
    started = time.monotonic()
    compiled = jax.jit(program.step, donate_argnums=donated, compiler_options=options).lower(*arguments).compile()
    compile_seconds, found = time.monotonic() - started, []
    for depth in depths:
        if isinstance(arguments[0], DecodeState):
            now = jnp.full_like(arguments[0].token, depth)
            budget = arguments[0].depth_budget._replace(now=now, rest=jnp.copy(now))  # donated, so not the same array
            arguments[0] = arguments[0]._replace(depth_budget=budget)
        seconds = []
        for _ in range(repeats + 1):
            started = time.monotonic()
            result = jax.block_until_ready(compiled(*arguments))
            seconds.append((time.monotonic() - started) / program.turns)
            if program.donated:
                arguments[0] = result[0]
        memory, stats = compiled.memory_analysis(), jax.devices()[0].memory_stats() or {}
        found.append({
            "depth": depth,
            "seconds": float(np.median(seconds[1:])),
            "compile_seconds": compile_seconds,
            "temporaries": None if memory is None else memory.temp_size_in_bytes,
            "device_peak": stats.get("peak_bytes_in_use"),
            **_planned(program, compiled.as_text() or "", arguments, target, depth),
        })  # fmt: skip
        if found[-1]["planned_seconds"] is not None:
            found[-1]["ratio"] = found[-1]["seconds"] / found[-1]["planned_seconds"]
    if trace is not None:
        with jax.profiler.trace(str(trace)):
            jax.block_until_ready(compiled(*arguments))
    return found


def _planned(program: Program, text: str, arguments: list, target: Target | None, depth: int) -> Json:
    """Return what `plan` says of the very program that runs: bytes, kernels and seconds of a step."""
    if target is None:
        return {"bytes_moved": None, "kernels": None, "planned_seconds": None, "ratio": None}
    assumed = program.assumed
    if isinstance(arguments[0], DecodeState):
        assumed = dataclasses.replace(assumed, trips=(*assumed.trips[:-1], float(depth)))
    moved = Traffic(*(part / program.turns for part in traffic(text, assumed)))
    shapes = jax.eval_shape(lambda *arguments: arguments, *arguments)
    work = count(jax.make_jaxpr(program.counted)(*shapes), program.trips * depth, program.flash)
    seconds = step_seconds(work, moved, target, EFFICIENCY)
    return {"bytes_moved": moved.bytes, "kernels": moved.kernels, "planned_seconds": seconds}


def target_of(kind: str) -> Target | None:
    """Return the data sheet of a device by the name that its driver gives it; None where there is none."""
    words = kind.lower().replace("-", " ").split()
    fits = [
        target
        for name, target in TARGETS.items()
        if target.platform == "cuda"
        and target.chips == 1
        # Whole words, as an L40 is no L4; 80g is the driver's 80GB.
        and all(part in words or f"{part}b" in words for part in name.split("-"))
    ]
    return max(fits, key=lambda target: len(target.name), default=None)


def relative(ours: AnyArray, exact: AnyArray) -> float:
    """Return ||ours - exact|| / ||exact||."""
    wide = np.asarray(exact, np.float64)
    return float(np.linalg.norm(np.asarray(ours, np.float64) - wide) / np.linalg.norm(wide))


def attention_numerics(recipe: Recipe, backbone: BackboneConfig, length: int = 256) -> list[Json]:
    """Return how far each attention kernel that runs here is from XLA's in float32, its gradients included."""
    keys = jax.random.split(jax.random.key(0), 4)
    heads = (backbone.num_heads, backbone.num_kv_heads, backbone.num_kv_heads)
    wide = [
        jax.random.normal(key, (2, length, each, backbone.head_dim)) for key, each in zip(keys, heads, strict=False)
    ]
    weight = jax.random.normal(keys[3], wide[0].shape)
    segments = jnp.asarray(np.repeat([[1, 2], [1, 1]], length // 2, axis=1), jnp.int32)
    scale, found = backbone.query_pre_attn_scalar**-0.5, []

    def xla(
        q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array, scale: float, window: int | None
    ) -> jax.Array:
        return attention(q, Visible(k, v, kernels.same_document(segments), is_causal=True, window=window), scale)

    def both(kernel: Callable, qkv: list[jax.Array], window: int | None) -> list[jax.Array]:
        def total(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
            out = kernel(q, k, v, segments, scale, window)
            return (out.astype(jnp.float32) * weight).sum(), out

        gradients, out = jax.jit(jax.grad(total, (0, 1, 2), has_aux=True))(*qkv)
        return [out, *gradients]

    narrow = [part.astype(recipe.model.dtype) for part in wide]
    for name in ("xla", *kernels.runnable(recipe.model.dtype, backbone.head_dim)):
        kernel = kernels.KERNELS.get(name, xla)
        for window in (None, length // 4):
            errors = [
                relative(ours, exact)
                for ours, exact in zip(both(kernel, narrow, window), both(xla, wide, window), strict=True)
            ]
            what = f"attention by {name}, {'global' if window is None else 'window'}, {recipe.model.dtype}"
            found.append({"name": what, "forward": errors[0], "backward": max(errors[1:])})
    return found


def product_numerics(backbone: BackboneConfig) -> list[Json]:
    """Return how far the NF4 product is from one in float32 of the same weights; off NVIDIA in Pallas' interpreter."""
    real = compiler.platform() == "cuda"
    inputs, outputs = backbone.linear_shapes["down"] if real else (256, 128)
    if inputs % nf4_product.BLOCK or nf4_product.columns(outputs) is None:
        return []
    found = []
    for kind, rows in ((kind, rows) for kind in nf4.KINDS for rows in ((1, 8, 64) if real else (1, 8))):
        keys = jax.random.split(jax.random.key(rows), 3)
        storage = storages.get(kind)
        stack = jax.jit(storage.quantise)(jax.random.normal(keys[0], (2, inputs, outputs)) * 0.02)
        x, dy = (
            jax.random.normal(key, (rows, size)).astype(jnp.bfloat16)
            for key, size in zip(keys[1:], (inputs, outputs), strict=True)
        )

        @jax.jit
        def both(x: jax.Array, dy: jax.Array, stack: Params, storage: storages.LinearStorage = storage) -> tuple:
            one = {name: part[1] for name, part in stack.items()}
            linear = StackedLinear(stack, jnp.int32(1), storage.kernel(one, jnp.bfloat16), storage)
            y, pull = jax.vjp(lambda x: storages.product(x, linear), x)
            return y, pull(dy)[0], storage.kernel(one, jnp.float32)

        with compiler.compiled_for(compiler.platform() if real else "interpreted"):
            y, dx, weights = both(x, dy, stack)
        exact = np.asarray(weights, np.float64)
        errors = relative(y, np.asarray(x, np.float64) @ exact), relative(dx, np.asarray(dy, np.float64) @ exact.T)
        found.append({"name": f"product {kind}, {counted(rows, 'row')}", "forward": errors[0], "backward": errors[1]})
    return found


def describe(record: Json) -> str:
    """Return a record as one block of text, to be pasted into a report."""
    base = record["dtype"] if record["quantize"] == "none" else record["quantize"]
    scaled = record["layers"] < record["layers_of_the_model"]
    lines = [
        f"sst-jax measure, {record['date']}: {record['device']} ({record['platform']}), jax {record['jax']}, "
        f"{record['driver']}",
        f"{record['model']}, base {base}, attention by {record['attention']}, random weights, "
        f"{record['layers']} of {record['layers_of_the_model']} layers",
        "",
        f"{'numerics, from float32':44} {'forward':>9} {'backward':>9}",
    ]
    lines += [f"{one['name']:44} {one['forward']:9.1e} {one['backward']:9.1e}" for one in record["numerics"]]
    header = f"{'':44} {'planned s':>10} {'measured s':>10} {'ratio':>6} {'compile s':>9} {'peak GiB':>8}"
    lines += ["", header + (f" {'all layers':>10}" if scaled else "")]
    for one in record["programs"]:
        planned = "" if one["planned_seconds"] is None else f"{one['planned_seconds']:.4f}"
        ratio = "" if one["ratio"] is None else f"{one['ratio']:.2f}"
        peak = "" if one["device_peak"] is None else f"{one['device_peak'] / GIB:.2f}"
        line = (
            f"{one['name']:44} {planned:>10} {one['seconds']:10.4f} {ratio:>6} {one['compile_seconds']:9.1f} {peak:>8}"
        )
        lines.append(line + (f" {one['scaled_seconds']:10.4f}" if scaled else ""))
    if scaled:
        lines.append(
            "all layers: the measured seconds times all layers over those that ran, embedding and head included"
        )
    if record["target"] is None:
        lines.append(
            "planned: nothing, as there is no data sheet of this device (`sst-jax plan --help` lists those there are)"
        )
    lines.append("peak: of the process so far, as the device counts it")
    return "\n".join(lines)
