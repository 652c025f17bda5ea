"""A dry run: all that a run does before its first step, and the memory that a step will take; nothing is written."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import jax

from sst_jax.console.progress import counted
from sst_jax.inference.model import count
from sst_jax.model import compiler, decoder, sharding
from sst_jax.training.data_report import spelled
from sst_jax.training.distributed import initialize_distributed
from sst_jax.training.inputs import Inputs, check_inputs, heldout_batches
from sst_jax.training.optimizer import make_optimizer
from sst_jax.training.progress import in_millions
from sst_jax.training.recipe import Recipe
from sst_jax.training.step import ForwardConfig, init_state, train_step
from sst_jax.training.telemetry import GIB
from sst_jax.types import HostArrays, Json

SHOWN = 400  # characters of the first row


def dry_run(recipe: Recipe, workdir: Path, base: str | Path | None = None) -> Json:
    """Check a run, lay out its first batch and compile its step on the devices at hand; write nothing.

    Args: as those of `fit`.

    Returns:
        "model", "training" and "heldout" in numbers; "batch", shapes and contents of the first; "memory" by device, the
        step's, in bytes, as its compiler plans it; "describe", the same for a person.

    Raises: InputError as `fit` does before it trains.
    """
    initialize_distributed(recipe.mesh)
    with jax.set_mesh(sharding.make_mesh(recipe.mesh)):
        inputs = check_inputs(recipe, workdir, base)
        batch = next(inputs.rows())
        found: Json = {
            "model": {
                "source": recipe.model.source,
                "layers": inputs.config.backbone.num_layers,
                "frozen": inputs.config.backbone.num_params,
                **{name: count(tree) for name, tree in _abstract_trainable(inputs).items()},
                "reach": inputs.config.backbone.reach_text,
            },
            "training": {"name": inputs.split.name, "examples": [len(source) for source in inputs.sources]},
            "heldout": {
                "examples": len(inputs.heldout),
                "batches": len(heldout_batches(inputs)),
                "task": None if inputs.task is None else f"{inputs.task.name}, {len(inputs.task.items)} questions",
            },
            "batch": _first_batch(inputs, batch),
            "memory": _planned_memory(inputs, batch),
        }
    return {**found, "describe": describe(found, recipe, workdir)}


def _abstract_trainable(inputs: Inputs) -> dict[str, Any]:
    shapes = decoder.abstract_params(inputs.config)
    return {"adapter": shapes["adapter"], "blend": shapes["blend"]}


def _first_batch(inputs: Inputs, batch: HostArrays) -> Json:
    real = batch["segment_ids"] > 0
    return {
        "shapes": {name: [*value.shape] for name, value in batch.items()},
        "documents": int(batch["segment_ids"].max(axis=1).sum()),
        "tokens": int(real.sum()),
        "learned_tokens": int(batch["answer_mask"].sum()),
        "first_row": spelled(batch["tokens"][0][real[0]].tolist(), inputs.opened.tokenizer),
    }


def _planned_memory(inputs: Inputs, batch: HostArrays) -> Json:
    """Return what the costliest step that the recipe draws takes on a device, in bytes, as its compiler says."""
    recipe, config = inputs.recipe, inputs.config
    optimizer = make_optimizer(recipe.optimizer, recipe.train.steps)
    trainable = _abstract_trainable(inputs)
    state = jax.eval_shape(functools.partial(init_state, optimizer=optimizer), trainable)
    options = compiler.compiler_options(compiler.platform()) or None

    def planned(forward: ForwardConfig) -> Json:
        step = jax.jit(
            functools.partial(train_step, config, forward, optimizer), donate_argnums=(0,), compiler_options=options
        )
        rows = sharding.device_put_sharded(batch)
        compiled = step.lower(state, inputs.opened.params["base"], rows, jax.random.key(0)).compile()
        stats = compiled.memory_analysis()
        if stats is None:  # not every backend says
            return {"arguments": 0, "temporaries": 0, "step": 0}
        arguments, temporaries = stats.argument_size_in_bytes, stats.temp_size_in_bytes
        fresh = stats.output_size_in_bytes - stats.alias_size_in_bytes
        return {"arguments": arguments, "temporaries": temporaries, "step": arguments + temporaries + max(fresh, 0)}

    return max((planned(forward) for _, forward in recipe.forward.draws()), key=lambda plan: plan["step"])


def describe(found: Json, recipe: Recipe, workdir: Path) -> str:
    """Return a dry run in words."""
    model, batch, memory = found["model"], found["batch"], found["memory"]
    shapes = ", ".join(f"{name} {shape}" for name, shape in batch["shapes"].items())
    row = batch["first_row"]
    lines = [
        f"{model['source']}: {in_millions(model['frozen'])} frozen parameters in {model['layers']} layers; "
        f"{model['adapter']:,} of LoRA and {model['blend']:,} of the stream are trained, by {recipe.forward.forward}"
        + f"; {model['reach']}"
        * bool(model["reach"]),
        f"{' + '.join(f'{size:,}' for size in found['training']['examples'])} examples of {found['training']['name']}; "
        f"{found['heldout']['examples']} held out, in {found['heldout']['batches']} batches"
        + (f"; scored on {found['heldout']['task']}" if found["heldout"]["task"] else ""),
        f"first batch: {shapes}; {batch['documents']} documents, {batch['tokens']:,} tokens, of which "
        f"{batch['learned_tokens']:,} are learned",
        f"its first row: {row[:SHOWN]}{' ...' if len(row) > SHOWN else ''}",
        f"memory of a step, planned by the compiler for {jax.devices()[0].device_kind}: {memory['step'] / GIB:.2f} GiB "
        f"({memory['arguments'] / GIB:.2f} of parameters, optimizer and batch, {memory['temporaries'] / GIB:.2f} of "
        "temporaries)",
        f"{counted(recipe.train.steps, 'step')} would be trained in {workdir}; nothing has been written",
    ]
    return "\n".join(lines)
