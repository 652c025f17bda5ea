"""Plans as records: what a compile for described hardware says about memory and time, as JSON and as text."""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

from sst_jax.console.progress import counted
from sst_jax.errors import InputError
from sst_jax.inference.kv_cache import bytes_per_sequence
from sst_jax.lab.planning import compile as compiling
from sst_jax.lab.planning.compile import Plan
from sst_jax.lab.planning.count import Work
from sst_jax.lab.planning.programs import EXAMPLE, heldout_rows
from sst_jax.lab.planning.targets import GIB, Target
from sst_jax.lab.planning.traffic import Traffic
from sst_jax.model.config import BackboneConfig
from sst_jax.training.recipe import Recipe
from sst_jax.types import Json

LARGEST = 1024  # batch size at which `search` gives up


LAUNCH = 2.5e-6  # seconds of a kernel's launch on a GPU. An assumption


class Decoding(NamedTuple):
    """A decode step to be planned: sequences decoded together, positions in their caches, iterations per token."""

    sequences: int
    capacity: int
    depth: int


def plan_record(
    recipe: Recipe,
    backbone: BackboneConfig,
    target: Target,
    efficiency: float,
    decoding: Decoding | None = None,
    *,
    phases: bool = True,
) -> Json:
    """Return the plan of a recipe's train step, or of a decode step of its model, as a JSON-ready record.

    Args:
        recipe: what is trained, or how the model that decodes is stored.
        backbone: of the recipe's model.
        target: the described hardware.
        efficiency: assumed share of the peak FLOP/s that a step reaches, in (0, 1]; of bandwidth it is twice that.
        decoding: the decode step; None plans the train step.
        phases: compile what runs beside the step too, held-out evaluation or prefill, for the time of the whole.

    Returns:
        Bytes, seconds and FLOPs of one step, and of each program under "programs". Where the compiler itself finds that
        the step does not fit, only "fits", false, and "compiler", its reason.
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
        tokens, name = decoding.sequences, "decode"
    else:
        record |= {"batch_size": recipe.data.batch_size, "length": recipe.data.length}
        record |= {"forward": recipe.forward.forward, "steps": recipe.train.steps}
        tokens, name = recipe.data.batch_size * recipe.data.length, "train_step"
    try:
        if decoding is not None:
            plan = compiling.plan_decoding(recipe, backbone, target, *decoding)
        else:
            plan = compiling.plan_training(recipe, backbone, target)
    except compiling.TooLarge as error:
        return record | {"fits": False, "compiler": str(error)}
    step = _figures(plan, target, efficiency)
    record |= {**step, "programs": {name: step}}
    record["tokens_per_second"] = tokens / record["assumed_seconds"]
    if target.chips > 1:
        record["sent_seconds"] = sum(plan.sent.values()) / target.link
    if decoding is None:
        record["hours"] = record["assumed_seconds"] * recipe.train.steps / 3600
    if not phases:
        return record
    beside, make = (
        ("evaluation", lambda: compiling.plan_evaluation(recipe, backbone, target))
        if decoding is None
        else ("prefill", lambda: compiling.plan_prefill(recipe, backbone, target, decoding.capacity))
    )
    try:
        record["programs"][beside] = _figures(make(), target, efficiency)
    except compiling.TooLarge as error:
        record["programs"][beside] = {"fits": False, "compiler": str(error)}
    if decoding is None:
        record["phases"] = _phases(recipe, record["programs"], target.chips)
    return record


def _phases(recipe: Recipe, programs: Json, devices: int) -> Json:
    """Return the seconds of a recipe's phases, and their sum; compiling is what it took here."""
    train, rows = recipe.train, devices // recipe.mesh.tensor if recipe.mesh.tensor > 0 else devices
    _, batches = heldout_rows(recipe, max(rows, 1))
    times = 1 + math.ceil(train.steps / train.eval_every)  # before the first step, and behind the last one
    phases = {
        "training": train.steps * programs["train_step"]["seconds"],
        "evaluation": times * batches * programs["evaluation"].get("seconds", math.nan),
        "compile": sum(one.get("compile_seconds", 0.0) for one in programs.values()),
    }
    phases = {name: None if math.isnan(value) else value for name, value in phases.items()}
    return {**phases, "sum": sum(value or 0.0 for value in phases.values()), "evaluations": times, "batches": batches}


def _figures(plan: Plan, target: Target, efficiency: float) -> Json:
    """Return a compiled program's memory and time on a target.

    Where the compiler's text does not say what is moved, products' operands stand for it.
    """
    flops, bandwidth = target.flops * target.chips, target.bandwidth * target.chips
    reached = min(2 * efficiency, 1.0)
    seconds = plan.work.seconds(efficiency * flops, reached * bandwidth)
    if plan.traffic is not None:
        seconds = step_seconds(plan.work, plan.traffic, target, efficiency)
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
        "bytes_moved": None if plan.traffic is None else plan.traffic.bytes,
        "kernels": None if plan.traffic is None else plan.traffic.kernels,
        "seconds": seconds,
        "sent": plan.sent,
        "mesh": plan.mesh,
        "roofline_seconds": plan.work.seconds(flops, bandwidth),
        "assumed_efficiency": efficiency,
        "assumed_seconds": seconds,
    }


def step_seconds(work: Work, moved: Traffic, target: Target, efficiency: float) -> float:
    """Return the seconds of a step: arithmetic or memory traffic, whichever takes longer, and launches.

    Args:
        work: of all devices together.
        moved: by each of them.
        target: whose data sheet says what is reached at most.
        efficiency: share of its arithmetic that is reached; of its bandwidth it is twice that.
    """
    arithmetic = work.flops / (efficiency * target.flops * target.chips)
    return max(arithmetic, moved.bytes / (min(2 * efficiency, 1.0) * target.bandwidth)) + moved.kernels * LAUNCH


def search(recipe: Recipe, backbone: BackboneConfig, target: Target, efficiency: float) -> Json:
    """Return the record of the largest power-of-two batch that fits, or of the smallest one where none does."""
    batch, best = max(target.chips // recipe.mesh.tensor, 1), None
    while batch <= LARGEST:
        data = dataclasses.replace(recipe.data, batch_size=batch)
        record = plan_record(dataclasses.replace(recipe, data=data), backbone, target, efficiency, phases=False)
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
        if "prefill" in record.get("programs", {}):
            lines.append(_program_line("prefill", record["programs"]["prefill"]))
        kept = {name: size / 2**20 for name, size in record["cache_per_sequence"].items()}
        lines.append(
            f"  caches       {sum(kept.values()):8.1f} MiB a sequence: states {kept['state']:.2f} (constant), local "
            f"layers {kept['local']:.1f} (their window), global layers {kept['global']:.1f} (linear)"
        )
    else:
        lines += _phase_lines(record)
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


def _program_line(name: str, one: Json) -> str:
    """Return what a program beside the step moves and takes."""
    if "seconds" not in one:
        return f"  {name:12} does not fit: {one['compiler']}"
    return f"  {name:12} {one['seconds']:8.3f} s, peak {one['peak'] / GIB:.2f} GiB{_moved(one)}"


def _moved(one: Json) -> str:
    if one["bytes_moved"] is None:
        return ""
    return f", {one['bytes_moved'] / 1e9:,.1f} GB moved, {one['kernels']:,.0f} kernels"


def _phase_lines(record: Json) -> list[str]:
    """Return a line for each phase of a recipe, and their sum."""
    if "phases" not in record:
        steps = counted(record["steps"], "step")
        return [f"  recipe       {record['hours']:8.2f} h for {steps}, without held-out evaluation"]
    phases, programs = record["phases"], record["programs"]
    lines = [_program_line("evaluation", programs["evaluation"]) + ", a held-out batch"]
    lines.append(f"  training     {phases['training'] / 3600:8.2f} h for {counted(record['steps'], 'step')}")
    if phases["evaluation"] is not None:
        once = phases["evaluation"] / phases["evaluations"] / 60
        lines.append(
            f"  held-out     {phases['evaluation'] / 3600:8.2f} h for {phases['evaluations']} evaluations of "
            f"{phases['batches']} batches, {once:.1f} minutes each (of examples of {EXAMPLE} tokens)"
        )
    lines.append(f"  compiling    {phases['compile'] / 3600:8.2f} h, as here; a card's autotuning comes to it")
    return [*lines, f"  recipe       {phases['sum'] / 3600:8.2f} h together"]


def _time_lines(record: Json) -> list[str]:
    efficiency = record["assumed_efficiency"]
    lines = [
        f"  matmuls      {record['flops'] / 1e12:8.1f} TFLOP, {record['bytes'] / 1e9:.0f} GB read and written, counted "
        "from the jaxpr, attention unmasked",
        f"  roofline     {record['roofline_seconds']:8.3f} s a step at the data sheet's peaks",
        f"  assumed      {record['assumed_seconds']:8.3f} s at {efficiency:.0%} of peak arithmetic and "
        f"{min(2 * efficiency, 1):.0%} of bandwidth: {record['tokens_per_second']:,.0f} tokens/s",
    ]
    if record["bytes_moved"] is not None:
        moved = (
            f"  moved        {record['bytes_moved'] / 1e9:8.1f} GB by {record['kernels']:,.0f} kernels of the compiled "
            f"program, {LAUNCH * 1e6:.1f} us a launch"
        )
        lines.insert(1, moved)
    if record["chips"] > 1:
        kinds = ", ".join(f"{kind} {size / 1e9:.2f}" for kind, size in record["sent"].items())
        axes = ", ".join(f"{axis} {size}" for axis, size in record["mesh"].items() if size > 1)
        lines.append(
            f"  sent         {record['sent_seconds']:8.3f} s a step at the data sheet's peak; it may overlap with "
            f"arithmetic: GB from each chip {kinds or 'none'} (mesh {axes})"
        )
    return lines
