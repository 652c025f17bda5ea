"""The arms of a matched comparison: a recipe with a stream, and the recipes that it is to be measured against.

    stream       the recipe as it is
    baseline     the stream off, and nothing else
    compute      the baseline with as many more steps as the stream's passes cost, counted in FLOPs
    parameters   the baseline with a larger LoRA rank: at least as many more parameters as the stream has
    memoryless   the stream's parameters in their place, and no memory: gain 0 blends every state in as zero

All have the recipe's data, order, optimizer and seed. Rates are scheduled over an arm's own steps.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from sst_jax.errors import InputError
from sst_jax.inference.model import count
from sst_jax.lab.planning.compile import training_work
from sst_jax.model.config import AdapterConfig, BackboneConfig, ModelConfig, StreamConfig
from sst_jax.model.decoder import MARKS, abstract_params
from sst_jax.model.state import carriers
from sst_jax.training.recipe import Recipe
from sst_jax.types import Params

OFF = "--config.stream.on=False"
ARMS = ("stream", "baseline", "compute", "parameters", "memoryless")
DEFAULT = ARMS[:4]


@dataclasses.dataclass(frozen=True)
class Costs:
    """What the stream adds to a recipe: FLOPs of a train step with and without it, and trained parameters."""

    stream_flops: float
    baseline_flops: float
    blend_parameters: int
    parameters_a_rank: int

    @property
    def ratio(self) -> float:
        return self.stream_flops / self.baseline_flops


def costs(stream: Recipe, baseline: Recipe, backbone: BackboneConfig) -> Costs:
    """Count costs from the two recipes' train steps and shapes; nothing is computed."""

    def trained(adapter: AdapterConfig, stream: StreamConfig | None) -> Params:
        return abstract_params(ModelConfig(backbone, stream, adapter))

    def blend() -> Params:
        """Return what the stream learns: parameters of layers that carry no state are there, and do nothing."""
        whole = trained(stream.adapter, stream.stream.config)["blend"]
        return jax.eval_shape(
            lambda: {
                name: jnp.zeros(x.shape) if name == MARKS else carriers(stream.stream.state, jnp.zeros(x.shape))
                for name, x in whole.items()
            }
        )

    one = trained(dataclasses.replace(baseline.adapter, rank=1), None)
    return Costs(
        training_work(stream, backbone).flops,
        training_work(baseline, backbone).flops,
        count(blend()),
        count(one["adapter"]),
    )


def overrides(arm: str, recipe: Recipe, found: Costs) -> list[str]:
    """Return what sets an arm of ARMS apart from the recipe, as arguments of `train`.

    Raises: InputError where there is nothing to match.
    """
    if arm == "stream":
        return []
    if arm == "baseline":
        return [OFF]
    if arm == "compute":
        every = recipe.optimizer.accumulate  # whole updates only
        return [OFF, f"--config.train.steps={max(round(recipe.train.steps * found.ratio / every), 1) * every}"]
    if arm == "parameters":
        if not found.blend_parameters:
            raise InputError("the arm parameters has nothing to match: this recipe's stream has no learned parameters")
        adapter = recipe.adapter
        rank = adapter.rank + math.ceil(found.blend_parameters / found.parameters_a_rank)
        # alpha grows with the rank, so that alpha / rank, the scale of the product, stays what it was.
        return [OFF, f"--config.adapter.rank={rank}", f"--config.adapter.alpha={adapter.scale * rank}"]
    return ["--config.stream.gain=0.0", "--config.stream.learn_gain=False"]  # memoryless


def check(arms: Sequence[str], recipe: Recipe) -> None:
    """Raise InputError unless `arms` are distinct arms with "stream" among them, and the recipe has one."""
    for number, arm in enumerate(arms):
        if arm not in ARMS:
            raise InputError(f"--arms {arm} is unknown; arms are {', '.join(ARMS)}")
        if arm in arms[:number]:
            raise InputError(f"--arms names {arm} twice")
    if "stream" not in arms or len(arms) < 2:
        raise InputError(f"--arms {','.join(arms)}: needs stream, and something to compare it with")
    if not recipe.stream.on:
        raise InputError("the recipe has its stream off: give the one that has it on, its baseline follows from it")
    if not recipe.adapter.rank:
        raise InputError("adapter.rank=0: a baseline without stream and adapter has nothing to train")
