"""The split of a dataset into problems that a run trains on and those held out."""

from __future__ import annotations

import dataclasses
import functools
import random
from collections.abc import Sequence

from sst_jax.data.problems import RESULT, Problem, load_gsm8k, result_only, word_problems
from sst_jax.data.tracking import Stories, parse
from sst_jax.errors import InputError
from sst_jax.training.recipe import DataConfig

GENERATED = 4096  # generated problems in training, unless data.limit says otherwise


def split_problems(data: DataConfig, seed: int) -> tuple[Sequence[Problem], Sequence[Problem]]:
    """Return (training, held-out) problems, drawn apart by `seed`.

    GSM8K's are both from its training split, so that the test split stays unseen until `evaluate`; the embedded
    problems' held-out ones come from other templates and numbers, and those of stories from their validation split.

    Raises: InputError when the dataset is missing, empty or smaller than data.heldout.
    """
    kind, _, part = data.dataset.partition(":")
    if part == RESULT:
        training, heldout = split_problems(dataclasses.replace(data, name=kind), seed)
        return result_only(training), result_only(heldout)
    if (spec := parse(data.name)) is not None:
        stories = functools.partial(Stories, spec, seed=seed)
        return stories("train", data.limit or GENERATED), stories("validation", data.heldout)
    if kind == "words":
        return word_problems("train", data.limit or GENERATED, seed), word_problems("test", data.heldout, seed)
    problems = list(load_gsm8k(data.path, "train"))
    if len(problems) <= data.heldout:
        raise InputError(
            f"{data.path} holds {len(problems)} training problems, too few to hold out data.heldout={data.heldout}"
        )
    random.Random(seed).shuffle(problems)
    heldout, training = problems[: data.heldout], problems[data.heldout :]
    return training[: data.limit or None], heldout
