"""The task score of a run on its way: answers to questions, graded as `evaluate` grades them.

Greedy, at one depth policy, in batches of one shape, so that every score of a run uses the same compiled programs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

from scipy import stats

from sst_jax.data import datasets, grading, tasks
from sst_jax.data.documents import Document, Item, Problem
from sst_jax.data.grading import Grading
from sst_jax.data.prompts import asked_with_room
from sst_jax.data.tokenizer import Tokenizer
from sst_jax.errors import InputError
from sst_jax.inference.model import Model
from sst_jax.inference.policies import parse
from sst_jax.inference.session import check_policy
from sst_jax.model.config import ModelConfig
from sst_jax.training.sections import HELDOUT_TASK, TrainConfig

BATCH = 32  # questions answered together
CONFIDENCE = 0.95


class Score(NamedTuple):
    """How many of a task's questions were answered right."""

    right: int
    asked: int

    @property
    def accuracy(self) -> float:
        return self.right / self.asked

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's score interval at `CONFIDENCE` (Wilson 1927)."""
        found = stats.binomtest(self.right, self.asked).proportion_ci(CONFIDENCE, method="wilson")
        return float(found.low), float(found.high)

    def __str__(self) -> str:
        low, high = self.interval
        return f"{self.accuracy:.1%} [{low:.0%}, {high:.0%}] of {self.asked}"


@dataclasses.dataclass(frozen=True)
class TrainTask:
    """The questions that a run is scored on.

    name            as `train.eval_task` spells it
    items           with references in the form that `grading` extracts
    grading         how answers are read
    max_new_tokens  room for an answer
    policy          of depth
    prompts         the questions as tokens, after `asked`
    """

    name: str
    items: Sequence[Item]
    grading: Grading
    max_new_tokens: int
    policy: str
    prompts: Sequence[list[int]] = ()

    def asked(self, tokenizer: Tokenizer, format: str, config: ModelConfig) -> TrainTask:
        """Return the task with its questions as tokens.

        Raises: InputError where one leaves no room for an answer, or the policy needs a stream that the model lacks.
        """
        try:
            check_policy(config, parse(self.policy))
        except InputError as error:
            raise InputError(f"train.eval_{error}") from None
        room, most = self.max_new_tokens, config.backbone.position_limit
        try:
            found = asked_with_room(self.items, tokenizer, format, room, most, f"{room} of an answer")
        except InputError as error:
            raise InputError(f"train.eval_task={self.name}: {error}") from None
        return dataclasses.replace(self, prompts=found)


def read_task(train: TrainConfig, data_name: str, heldout: Sequence[Document]) -> TrainTask | None:
    """Return the questions that a run is scored on; None where the recipe asks for no score.

    Args:
        train: section of the recipe.
        data_name: the data set that is trained on, or its row format.
        heldout: documents that are not trained on, asked where train.eval_task is "heldout".

    Raises: InputError naming the knob.
    """
    name, count = train.eval_task, train.eval_items
    if not name:
        return None
    if name == HELDOUT_TASK:
        return _heldout_task(train, data_name, heldout)
    if ":python:" in name:
        raise InputError(f"train.eval_task={name}: graded by code, which `evaluate --allow-code` alone runs")
    try:
        task = tasks.find(name)
        items = task.read(None)
    except InputError as error:
        raise InputError(f"train.eval_task={name}: {error}") from None
    return TrainTask(name, items[:count], task.grading, task.max_new_tokens, train.eval_depth)


def _heldout_task(train: TrainConfig, data_name: str, heldout: Sequence[Document]) -> TrainTask:
    dataset = datasets.find(data_name)
    if any(isinstance(document, Problem) and not document.question for document in heldout):
        raise InputError(f"train.eval_task={train.eval_task}: nothing is asked in rows of {data_name}")
    if dataset is not None and dataset.grading is None:
        raise InputError(f"train.eval_task={train.eval_task}: nothing says which answers to {data_name} are right")
    graded = dataset.grading if dataset is not None and dataset.grading is not None else grading.EXACT
    room = tasks.OWN_TOKENS if dataset is None else dataset.max_new_tokens
    # By index: generated problems are made on access.
    chosen = [heldout[index] for index in range(min(train.eval_items, len(heldout)))]
    items = [Item(document._replace(result=graded.canonical(document.result))) for document in chosen]
    return TrainTask(train.eval_task, items, graded, room, train.eval_depth)


def score(model: Model, task: TrainTask, format: str, go_on: Callable[[int], bool]) -> Score | None:
    """Return how many questions a model answers right.

    Args:
        model: that is asked.
        task: what it is asked, as tokens.
        format: of the prompts.
        go_on: called after each batch with its size; False: stop.

    Returns:
        The score; None where it was stopped.
    """
    right, policy = 0, parse(task.policy)
    for start in range(0, len(task.items), BATCH):
        items, asked = task.items[start : start + BATCH], list(task.prompts[start : start + BATCH])
        full = asked + asked[:1] * (BATCH - len(asked) if start else 0)  # the last batch in the shape of the others
        answers = model.generate(full, depth=policy, max_new_tokens=task.max_new_tokens, stop=tasks.stops(format))
        for item, answer in zip(items, answers, strict=False):
            right += task.grading.is_right(task.grading.extract(answer.text, True), item, answer.text)
        if not go_on(len(items)):
            return None
    return Score(right, len(task.items))
