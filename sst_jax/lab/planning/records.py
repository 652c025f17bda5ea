"""Plans as records: what a compile for described hardware says about memory and time, as JSON and as text."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

from sst_jax.errors import InputError
from sst_jax.inference.kv_cache import bytes_per_sequence
from sst_jax.lab.planning import compile as compiling
from sst_jax.lab.planning.compile import Plan
from sst_jax.lab.planning.targets import GIB, Target
from sst_jax.model.config import BackboneConfig
from sst_jax.training.recipe import Recipe
from sst_jax.types import Json

LARGEST = 1024  # batch size at which `search` gives up


class Decoding(NamedTuple):
    """A decode step to be planned: sequences decoded together, positions in their caches, iterations per token."""

    sequences: int
    capacity: int
    depth: int


def plan_record(
    recipe: Recipe, backbone: BackboneConfig, target: Target, efficiency: float, decoding: Decoding | None = None
) -> Json:
    """Return the plan of a recipe's train step, or of a decode step of its model, as a JSON-ready record.

    Args:
        recipe: what is trained, or how the model that decodes is stored.
        backbone: of the recipe's model.
        target: the described hardware.
        efficiency: assumed share of the peak FLOP/s that a step reaches, in (0, 1]; of bandwidth it is twice that.
        decoding: the decode step; None plans the train step.

    Returns:
        Bytes, seconds and FLOPs of one step. Where the compiler itself finds that the program does not fit, only
        "fits", false, and "compiler", its reason.
    """
    record: Json = {
        "target": target.name,
        "title": target.title,
        "chips": target.chips,
        "memory": target.memory,
        "reserve": target.reserve,
        "quantize": recipe.model.quantize,
        "dtype": recipe.model.dtype,
    }
    if decoding is not None:
        cache = bytes_per_sequence(recipe.model_config(backbone), decoding.capacity)
        record |= {"rows": decoding.sequences, "capacity": decoding.capacity, "depth": decoding.depth}
        record["cache_per_sequence"] = cache
        tokens = decoding.sequences
    else:
        record |= {"batch_size": recipe.data.batch_size, "length": recipe.data.length}
        record |= {"forward": recipe.forward.forward, "steps": recipe.train.steps}
        tokens = recipe.data.batch_size * recipe.data.length
    try:
        if decoding is not None:
            plan = compiling.plan_decoding(recipe, backbone, target, *decoding)
        else:
            plan = compiling.plan_training(recipe, backbone, target)
    except compiling.TooLarge as error:
        return record | {"fits": False, "compiler": str(error)}
    record |= _figures(plan, target, efficiency)
    record["tokens_per_second"] = tokens / record["assumed_seconds"]
    if decoding is None:
        record["hours"] = record["assumed_seconds"] * recipe.train.steps / 3600
    if target.chips > 1:
        record["sent_seconds"] = sum(plan.sent.values()) / target.link
    return record


def _figures(plan: Plan, target: Target, efficiency: float) -> Json:
    """Return a compiled step's memory and time on a target."""
    flops, bandwidth = target.flops * target.chips, target.bandwidth * target.chips
    return {
        "arguments": plan.arguments,
        "argument_kinds": plan.kinds,
        "temporaries": plan.temporaries,
        "peak": plan.peak,
        "fits": plan.peak + target.reserve <= target.memory,
        "margin": target.memory - plan.peak - target.reserve,
        "attention": plan.attention,
        "compile_seconds": plan.compile_seconds,
        "flops": plan.work.flops,
        "bytes": plan.work.bytes,
        "sent": plan.sent,
        "mesh": plan.mesh,
        "roofline_seconds": plan.work.seconds(flops, bandwidth),
        "assumed_efficiency": efficiency,
        "assumed_seconds": plan.work.seconds(efficiency * flops, min(2 * efficiency, 1.0) * bandwidth),
    }


def search(recipe: Recipe, backbone: BackboneConfig, target: Target, efficiency: float) -> Json:
    """Return the record of the largest power-of-two batch that fits, or of the smallest one where none does."""
    batch, best = max(target.chips // recipe.mesh.tensor, 1), None
    while batch <= LARGEST:
        data = dataclasses.replace(recipe.data, batch_size=batch)
        record = plan_record(dataclasses.replace(recipe, data=data), backbone, target, efficiency)
        if not record["fits"]:
            return best or record
        best, batch = record, 2 * batch
    if best is None:
        raise InputError(f"--search: {target.name} alone needs a batch above {LARGEST}")
    return best


def describe(record: Json) -> str:
    """Return a record as text."""
    decoding = "rows" in record
    what = (
        f"decoding {record['rows']} sequences, {record['capacity']} positions, depth {record['depth']}"
        if decoding
        else f"{record['forward']}, {record['batch_size']} x {record['length']}"
    )
    base = record["dtype"] if record["quantize"] == "none" else record["quantize"]
    several = f"{record['chips']} x " if record["chips"] > 1 else ""
    lines = [
        f"{several}{record['title']}: {what}, base {base}   (estimates: compiled for a description, nothing was run)"
    ]
    if "peak" not in record:
        return "\n".join([*lines, f"  does not fit: {record['compiler']}", ""])
    lines += [*_memory_lines(record, decoding), *_time_lines(record)]
    if decoding:
        kept = {name: size / 2**20 for name, size in record["cache_per_sequence"].items()}
        lines.append(
            f"  caches       {sum(kept.values()):8.1f} MiB a sequence: states {kept['state']:.2f} (constant), local "
            f"layers {kept['local']:.1f} (their window), global layers {kept['global']:.1f} (linear)"
        )
    else:
        lines.append(
            f"  recipe       {record['hours']:8.2f} h for {record['steps']} steps, without held-out evaluation"
        )
    lines.append(f"  compiled in {record['compile_seconds']:.0f} s, attention by {record['attention']}\n")
    return "\n".join(lines)


def _memory_lines(record: Json, decoding: bool) -> list[str]:
    gib = {name: record[name] / GIB for name in ("arguments", "temporaries", "peak", "memory", "reserve", "margin")}
    verdict = (
        f"fits, {gib['margin']:.1f} to spare" if record["fits"] else f"does NOT fit, {-gib['margin']:.1f} too much"
    )
    held = "parameters and caches" if decoding else "parameters and optimizer"
    per_chip = " on each chip" if record["chips"] > 1 else ""
    kinds = ", ".join(f"{name} {size / GIB:.2f}" for name, size in record["argument_kinds"].items())
    return [
        f"  held         {gib['arguments']:8.2f} GiB{per_chip}, {held}: {kinds}",
        f"  temporaries  {gib['temporaries']:8.2f} GiB",
        f"  peak         {gib['peak']:8.2f} GiB of {gib['memory']:.1f}, reserve {gib['reserve']:.1f}: {verdict}",
    ]


def _time_lines(record: Json) -> list[str]:
    efficiency = record["assumed_efficiency"]
    lines = [
        f"  matmuls      {record['flops'] / 1e12:8.1f} TFLOP, {record['bytes'] / 1e9:.0f} GB read and written, counted "
        "from the jaxpr, attention unmasked",
        f"  roofline     {record['roofline_seconds']:8.3f} s a step at the data sheet's peaks",
        f"  assumed      {record['assumed_seconds']:8.3f} s at {efficiency:.0%} of peak arithmetic and "
        f"{min(2 * efficiency, 1):.0%} of bandwidth: {record['tokens_per_second']:,.0f} tokens/s",
    ]
    if record["chips"] > 1:
        kinds = ", ".join(f"{kind} {size / 1e9:.2f}" for kind, size in record["sent"].items())
        axes = ", ".join(f"{axis} {size}" for axis, size in record["mesh"].items() if size > 1)
        lines.append(
            f"  sent         {record['sent_seconds']:8.3f} s a step at the data sheet's peak; it may overlap with "
            f"arithmetic: GB from each chip {kinds or 'none'} (mesh {axes})"
        )
    return lines
