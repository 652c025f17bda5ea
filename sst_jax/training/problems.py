"""The split of a dataset into problems that a run trains on and those held out."""

from __future__ import annotations

from collections.abc import Sequence

from sst_jax.data import datasets
from sst_jax.data.problems import Problem
from sst_jax.training.recipe import DataConfig


def split_problems(data: DataConfig, seed: int) -> tuple[Sequence[Problem], Sequence[Problem]]:
    """Return (training, held-out) problems, drawn apart by `seed`.

    Those of files are both from the training split, so that the test split stays unseen until `evaluate`; the embedded
    problems' held-out ones come from other templates and numbers, and those of stories from their validation split.

    Raises: InputError when the dataset is missing, empty or smaller than data.heldout.
    """
    dataset = datasets.find(data.dataset)
    assert dataset is not None  # a DataConfig has checked its name
    return dataset.source.training(data.path, data.heldout, data.limit, seed)
