"""Tiny models trained from scratch on words whose answer is a state (`data/statetrack.py`): arms and their training.

Every weight trains, as against `sst_jax/train.py`'s LoRA on a frozen base; all seeds of an arm train in one program.
`configs/statetrack.py` has the knobs, `ARMS` what can be set side by side, `scratch_study.py` runs and measures it.

Seeds go through `jax.lax.map`, not `jax.vmap`: a CPU's products are no faster for being batched, and these are small.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
from safetensors.numpy import load_file, save_file

from sst_jax.console.progress import bar
from sst_jax.data import pointers, statetrack
from sst_jax.data.pointers import Pointers
from sst_jax.data.statetrack import Automaton
from sst_jax.errors import InputError
from sst_jax.model import decoder, rules
from sst_jax.model.config import BackboneConfig, ModelConfig
from sst_jax.training.recipe import StreamSection, stream_knobs
from sst_jax.training.step import ForwardConfig
from sst_jax.types import AnyArray, Fraction, Json, Params

KIND = "statetrack"
OWN = {
    "links": None, "timing": "both", "site": "ffn", "readout": "last", "state": "ffn", "gate": "range", "ramp": 0.0,
    "alpha_range": (0.0, 1.0), "alpha_init": 0.5, "forward": "exact",
}  # fmt: skip
PUBLISHED = {"alpha_range": (0.015, 0.10), "alpha_init": 0.027}

# By name, what is set otherwise than in the recipe's section `stream`.
ARMS: dict[str, Json] = {
    "stream": {},
    "plain": {"on": False},
    "range": PUBLISHED,
    "published": {**PUBLISHED, "forward": "two_pass"},
    "two_pass": {"forward": "two_pass"},
    # Beside a stream between layers: every layer's own state, alpha free; by `exact`, and as published.
    "own": OWN,
    "own_two_pass": {**OWN, "forward": "two_pass"},
    "depths": {"depths": (1, 2, 3, 4)},
    "marked": {"depths": (1, 2, 3, 4), "iteration_embedding": 4},
    "deep": {"depths": (4,)},
    # These continue from the weights of `stream`, with an optimizer of their own, for train.further_steps.
    "longer": {},
    "deepened": {"depths": (1, 2, 3, 4)},
    "mixed": {"depths": (1, 2, 3, 4), "mix_share": 0.25, "mix_passes": 3},
}
CONTINUED = ("longer", "deepened", "mixed")


def defaults() -> ml_collections.ConfigDict:
    """Return all knobs of such a recipe. `arms` names some of ARMS; `stream` is what its arm "stream" is."""
    config = ml_collections.ConfigDict({"kind": KIND, "arms": "stream,plain,range"})
    config.task = ml_collections.ConfigDict({"name": "s3", "length": 12})
    config.model = ml_collections.ConfigDict({"layers": 2, "d_model": 64, "d_ff": 128, "heads": 4})
    config.stream = ml_collections.ConfigDict(stream_knobs())
    config.train = ml_collections.ConfigDict(dataclasses.asdict(Schedule()))
    config.test = ml_collections.ConfigDict({"times": (1, 2, 4), "rows": 512, "depths": (1,)})
    return config.lock()


Task = Automaton | Pointers


def find(name: str) -> Task:
    """Return the task of that name. Raises: InputError with the known names."""
    known: dict[str, Task] = {**statetrack.TASKS, **pointers.TASKS}
    if name not in known:
        raise InputError(f"task.name={name!r} is not one of {', '.join(map(repr, known))}")
    return known[name]


def draw(task: Task, split: str, rows: int, length: int, seed: tuple[int, ...]) -> statetrack.Words:
    """Return random words of one split, the same for the same arguments."""
    if isinstance(task, Pointers):
        return task.draw(split, rows, length, seed)
    return statetrack.draw(task, split, rows, length, seed)


class Arm(NamedTuple):
    """What trains, and under which forward."""

    config: ModelConfig
    settings: ForwardConfig

    @property
    def judge(self) -> str:
        """The forward that an arm is tested with: what decoding computes."""
        return "plain" if self.config.stream is None else "exact"


@dataclasses.dataclass(frozen=True)
class Schedule:
    """How an arm trains, with Adam.

    steps          batches of batch_size words
    further_steps  the same, of an arm that continues another
    learning_rate  rising over warmup_steps and falling along a cosine
    seeds          models that train side by side
    lengths        of the words that are trained on, each for as many steps, the first one first; (): the task's alone
    """

    steps: int = 600
    batch_size: int = 128
    learning_rate: float = 3e-3
    warmup_steps: int = 100
    further_steps: int = 300
    seeds: int = 3
    lengths: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for field in ("steps", "batch_size", "further_steps", "seeds"):
            if getattr(self, field) < 1:
                raise InputError(f"train.{field}={getattr(self, field)} must be at least 1")
        fewest = min(self.steps, self.further_steps)
        if not 0 <= self.warmup_steps < fewest:
            raise InputError(f"train.warmup_steps={self.warmup_steps} must be below the number of steps, {fewest}")
        if not self.learning_rate > 0:
            raise InputError(f"train.learning_rate={self.learning_rate} must be positive")
        if any(type(length) is not int or length < statetrack.SHORTEST for length in self.lengths):
            raise InputError(f"train.lengths={self.lengths} must be whole numbers of at least {statetrack.SHORTEST}")

    def length_at(self, step: int, length: int) -> int:
        """Return the length of the words of a step; `length` is the task's."""
        return self.lengths[step * len(self.lengths) // self.steps] if self.lengths else length

    @property
    def optimizer(self) -> optax.GradientTransformation:
        rate = optax.warmup_cosine_decay_schedule(
            0.0, self.learning_rate, self.warmup_steps, self.steps, self.learning_rate / 30
        )
        return optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rate))


def make_arm(backbone: BackboneConfig, knobs: Json) -> Arm:
    """Return an arm from the knobs of a section `stream`. Raises: InputError naming the knob."""
    section = StreamSection.from_knobs(knobs)
    stream = section.config
    if stream is not None and stream.alpha_warmup:
        raise InputError(f"stream.alpha_warmup={stream.alpha_warmup} is for a backbone that a fresh stream disturbs")
    if stream is not None and stream.initial == "skip_bos":
        raise InputError("stream.initial='skip_bos': the words of these tasks have no BOS")
    return Arm(ModelConfig(backbone, stream), section.forward(remat="none"))


def make_backbone(task: Task, layers: int, d_model: int, d_ff: int, heads: int) -> BackboneConfig:
    """Return a small Gemma 3 backbone with global attention in every layer."""
    if heads < 1 or d_model < 1 or d_model % (2 * heads):
        raise InputError(f"model.d_model={d_model} must be an even number for each of model.heads={heads}")
    return BackboneConfig(
        num_layers=layers,
        d_model=d_model,
        d_ff=d_ff,
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=d_model // heads,
        vocab_size=task.vocabulary,
        window=64,
        query_pre_attn_scalar=d_model / heads,
        layer_types=("global",) * layers,
    )


# ---------------------------------------------------------------------------------------------------------- Training


def fit(
    arm: Arm, task: Task, length: int, schedule: Schedule, start: Params | None = None, title: str = "training"
) -> tuple[Params, np.ndarray]:
    """Return weights of all seeds, [seeds, ...], and losses [steps, seeds]. `start`: initial weights."""
    if continued := start is not None:
        schedule = dataclasses.replace(schedule, steps=schedule.further_steps)
    seeds, optimizer = np.arange(schedule.seeds), schedule.optimizer
    if start is None:
        start = jax.jit(jax.vmap(lambda seed: decoder.init_params(arm.config, jax.random.key(seed))))(seeds)
    state = start, jax.vmap(optimizer.init)(start)

    @functools.cache
    def compiled(settings: ForwardConfig) -> Callable[[SeedState, statetrack.Words], tuple[SeedState, AnyArray]]:
        step = functools.partial(_step, arm.config, settings, optimizer)
        return jax.jit(lambda *seeds: jax.lax.map(lambda one: step(*one), seeds), donate_argnums=(0,))

    losses = []
    with bar(schedule.steps, title, "step") as meter:
        for step in range(schedule.steps):
            now = schedule.length_at(step, length)
            words = [
                draw(task, "train", schedule.batch_size, now, (0, int(continued), int(seed), step)) for seed in seeds
            ]
            state, loss = compiled(arm.settings.at(step, seed=0))(
                state, jax.tree.map(lambda *parts: np.stack(parts), *words)
            )
            losses.append(loss)
            meter.update()
    return state[0], np.array(losses)


SeedState = tuple[Params, optax.OptState]  # of one seed, or of all, [seeds, ...]


def _step(
    config: ModelConfig,
    settings: ForwardConfig,
    optimizer: optax.GradientTransformation,
    state: SeedState,
    words: statetrack.Words,
) -> tuple[SeedState, Fraction]:
    """Return one step of one seed: its state, and the mean loss over the places where the word's state is asked."""
    symbols, states, asked = words

    def mean_loss(params: Params) -> Fraction:
        logits = rules.logits(
            config, params, symbols, forward=settings.forward, passes=settings.passes, depth=settings.depth
        )
        losses = optax.losses.softmax_cross_entropy_with_integer_labels(logits, states)
        return jnp.sum(losses * asked) / asked.sum()

    params, optimizer_state = state
    loss, gradient = jax.value_and_grad(mean_loss)(params)
    updates, optimizer_state = optimizer.update(gradient, optimizer_state, params)
    return (optax.apply_updates(params, updates), optimizer_state), loss


def save_params(folder: Path, params: Params) -> None:
    """Write params.safetensors, whose names are the tree's keys joined by slashes."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    save_file({_name(path): np.asarray(leaf) for path, leaf in leaves}, folder / "params.safetensors")


def load_params(folder: Path, config: ModelConfig) -> Params:
    """Return weights as `save_params` wrote them."""
    arrays = load_file(folder / "params.safetensors")
    return jax.tree_util.tree_map_with_path(
        lambda path, _: jnp.asarray(arrays[_name(path)]), decoder.abstract_params(config)
    )


def _name(path: Sequence[jax.tree_util.DictKey]) -> str:
    return "/".join(part.key for part in path)
