"""Which problems a run trains on and which it only measures."""

from __future__ import annotations

import random

from sst_jax.data.problems import Problem, load_gsm8k, word_problems
from sst_jax.errors import InputError
from sst_jax.training.recipe import DataConfig

WORDS = 4096  # embedded problems in training, unless data.limit says otherwise


def split_problems(data: DataConfig, seed: int) -> tuple[list[Problem], list[Problem]]:
    """(training, held-out) problems, drawn apart by `seed`.

    GSM8K's are both from its training split, so that the test split stays unseen until `evaluate`; the embedded
    problems' held-out ones come from other templates and numbers.

    Raises: InputError when the dataset is missing, empty or smaller than data.heldout.
    """
    if data.name == "words":
        return word_problems("train", data.limit or WORDS, seed), word_problems("test", data.heldout, seed)
    problems = list(load_gsm8k(data.path, "train"))
    if len(problems) <= data.heldout:
        raise InputError(
            f"{data.path} holds {len(problems)} training problems, too few to hold out data.heldout={data.heldout}"
        )
    random.Random(seed).shuffle(problems)
    heldout, training = problems[: data.heldout], problems[data.heldout :]
    return training[: data.limit or None], heldout
