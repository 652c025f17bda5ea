"""Tasks: the data sets of `data/datasets.py` that have a test. Which answer is correct, and how it is read."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence

from sst_jax.data import datasets, own_task
from sst_jax.data.datasets import Source
from sst_jax.data.documents import Item, words
from sst_jax.data.grading import Grading
from sst_jax.errors import InputError

OWN_TOKENS = 256  # room for an answer to a question of one's own, unless told otherwise


@dataclasses.dataclass(frozen=True)
class Task:
    """The test of a data set; the fields are those of `Dataset`."""

    name: str
    source: Source
    grading: Grading
    max_new_tokens: int
    worked: bool

    def read(self, path: str | None) -> list[Item]:
        """Return the items, with references in the form that `grading.extract` gives.

        path: the flag --data; None: from the hub, or generated.

        Raises: InputError as `Source.test`.
        """
        return [
            item._replace(problem=item.problem._replace(result=self.grading.canonical(item.problem.result)))
            for item in self.source.test(path)
        ]


def find(name: str, allow_code: bool = False) -> Task:
    """Return the task of that name, or of a file of one's own, "FILE:GRADE" (`data/own_task.py`).

    Raises: InputError with the known names; for a file, as `own_task.find`.
    """
    if own := own_task.find(name, allow_code):
        return Task(own.name, own, own.grading, OWN_TOKENS, worked=own.grade != "choice")
    found = datasets.find(name)
    if found is None or found.grading is None:
        known = ", ".join(datasets.names(lambda dataset: dataset.grading is not None))
        raise InputError(
            f"--task {name} is unknown; tasks are {known}, or a file of one's own; --tasks takes the harness's"
        )
    return Task(found.name, found.source, found.grading, found.max_new_tokens, found.worked)


def items_digest(items: Sequence[Item]) -> str:
    """Return the SHA-256 over all items as they are asked; it identifies the test."""
    total = hashlib.sha256()
    for item in items:
        total.update("\0".join((*words(item.problem), repr(item.order), "")).encode())
    return total.hexdigest()


def stops(format: str) -> list[str]:
    """Return the strings that end an answer: in plain prompts a base model goes on with the next question.

    lm-evaluation-harness ends GSM8K's answers at the same word.
    """
    return ["Question:"] if format == "plain" else []
