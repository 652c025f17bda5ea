"""A run's inputs: data and base, read and checked before anything long is computed or written."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import NamedTuple

import grain
import jax

from sst_jax.data import loader
from sst_jax.data.prompts import Example
from sst_jax.data.template_file import use_template_file
from sst_jax.errors import InputError
from sst_jax.model import decoder, kernels, sharding
from sst_jax.model.config import ModelConfig
from sst_jax.training.identity import fix_run_date
from sst_jax.training.loggers import check_loggers
from sst_jax.training.problems import Split, prepare_split, split_problems
from sst_jax.training.recipe import Recipe, with_attention_kernel
from sst_jax.training.run import check_recipe
from sst_jax.training.scoring import TrainTask, read_task
from sst_jax.training.start import Start, open_source, start_of
from sst_jax.types import Json
from sst_jax.weights.loading import LoadedModel


class Inputs(NamedTuple):
    """A run's inputs, read and checked."""

    recipe: Recipe  # attention="auto" is decided
    record: Json  # the recipe as it is recorded
    config: ModelConfig
    opened: LoadedModel
    sources: list[list[Example]]  # one, or as many as data.weights
    heldout: list[Example]
    split: Split  # without what is trained on
    task: TrainTask | None  # that the run is scored on
    start: Start | None  # what it begins with, where its source has been trained

    def rows(self) -> grain.DatasetIterator:
        """Return an iterator over the batches that are trained on."""
        seed, weights = self.recipe.train.seed, self.recipe.data.weights
        if weights:
            return loader.mixed_rows(self.sources, weights, layout(self), seed=seed)
        return loader.rows(self.sources[0], layout(self), seed=seed)


def check_inputs(recipe: Recipe, workdir: Path, base: str | Path | None = None, allow_changed: bool = False) -> Inputs:
    """Read the data and the base of a run, and check everything that can be wrong with them; nothing is written.

    Args: as those of `fit`.
    Raises: InputError naming the knob, the file or the folder.
    """
    mesh, data = jax.sharding.get_mesh(), recipe.data
    sharding.check(mesh, batch_size=data.batch_size)
    sharding.check(mesh, batch_size=data.eval_batch_size, knob="data.eval_batch_size")
    check_recipe(workdir, recipe.to_json(), allow_changed=allow_changed)
    if base is not None and not (workdir / "config.json").is_file():
        raise InputError(f"--base {base} is for a run that resumes, and {workdir} holds none: set model.source")
    check_loggers(recipe.train.logger_names)
    split = split_problems(data, recipe.train.seed)
    task = read_task(recipe.train, split.name, split.heldout)
    source = str(base or recipe.model.source)
    opened = open_source(recipe.model.source, recipe.model.dtype, recipe.model.quantize, base)
    backbone, tokenizer = opened.config.backbone, opened.tokenizer
    config = recipe.model_config(backbone, tokenizer.bos_id)
    start = start_of(opened, config, recipe.model.source)
    sharding.check(mesh, backbone)
    if not jax.tree.leaves({key: tree for key, tree in decoder.abstract_params(config).items() if key != "base"}):
        raise InputError("nothing to train: the stream is off or has a fixed alpha, and adapter.rank is 0")
    if config.stream is not None and config.stream.initial == "skip_bos" and tokenizer.bos_id is None:
        raise InputError(f"stream.initial='skip_bos': the vocabulary of {source} has no BOS")
    if data.chat_template:
        use_template_file(tokenizer, data.chat_template, "data.chat_template")
    fix_run_date(tokenizer, data, workdir)
    if task is not None:
        task = task.asked(tokenizer, data.format, config)
    return Inputs(
        with_attention_kernel(recipe, functools.partial(kernels.here, head_dim=backbone.head_dim)),
        recipe.to_json(),
        config,
        opened,
        *prepare_split(split, data, tokenizer),
        dataclasses.replace(split, training=()),  # the examples stay for the run's length, their documents need not
        task,
        start,
    )


def heldout_batches(inputs: Inputs) -> list[Json]:
    """Return the held-out examples in batches as even as the devices allow."""
    rows = sharding.rows(jax.sharding.get_mesh())
    most = -(-inputs.recipe.data.heldout_rows // rows) * rows
    batches = dataclasses.replace(layout(inputs), batch_size=most)
    return loader.fixed_batches(inputs.heldout, batches, even=rows)


def layout(inputs: Inputs) -> loader.Layout:
    """Return how the recipe lays documents into batches."""
    data = inputs.recipe.data
    return loader.Layout(data.length, data.batch_size, data.pack, inputs.opened.tokenizer.pad_id)
