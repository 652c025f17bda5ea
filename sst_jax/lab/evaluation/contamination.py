"""Whether a run was trained on what it is tested on."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Sequence

from sst_jax.data.documents import Document, Item
from sst_jax.errors import InputError
from sst_jax.model.config import from_mapping
from sst_jax.training.problems import split_problems
from sst_jax.training.recipe import DataConfig
from sst_jax.types import Json
from sst_jax.weights.provenance import Provenance

NGRAM = 13  # words, as in GPT-3's contamination study (arXiv 2005.14165, appendix C)


def overlap(training: Iterable[Document], items: Sequence[Item]) -> Json:
    """Test questions that training holds word for word, and those that share a run of NGRAM words with it."""
    whole, runs, count = set(), set(), 0
    for problem in training:
        words = _words(problem.question)
        whole.add(" ".join(words))
        runs.update(_runs(words))
        count += 1
    asked = {item.id: _words(item.problem.question) for item in items}
    return {
        "training_examples": count,
        "items": len(items),
        "same_question": [name for name, words in asked.items() if " ".join(words) in whole],
        f"shares_{NGRAM}_words": [name for name, words in asked.items() if not runs.isdisjoint(_runs(words))],
    }


def _words(text: str) -> list[str]:
    return re.findall(r"[a-z0-9]+", text.lower())


def _runs(words: Sequence[str]) -> set[str]:
    return {" ".join(words[start : start + NGRAM]) for start in range(len(words) - NGRAM + 1)}


def recipes_of(provenance: Provenance) -> list[Json]:
    """Return the recipes that a model was trained by, one run after another, the newest first."""
    found, at = [provenance.recipe], provenance.started_from
    while at:
        found.append(at.get("recipe"))
        at = at.get("started_from")
    return [recipe for recipe in found if recipe]


def check(recipes: Sequence[Json], items: Sequence[Item], allow: bool) -> Json:
    """Return the overlap of what a model was trained on with the test, or why there is none to report.

    Raises: InputError when a test question was trained on, unless `allow`.
    """
    if not recipes:
        return {"checked": False, "reason": "not a training run: nothing says what it was trained on"}
    training: list[Document] = []
    for recipe in recipes:
        data = from_mapping(DataConfig, recipe["data"])
        try:
            training += itertools.chain(*split_problems(data, recipe["train"]["seed"]).training)
        except InputError as error:
            return {"checked": False, "reason": f"the training data cannot be read any more: {error}"}
    found = {"checked": True, **overlap(training, items)}
    same = found["same_question"]
    if same and not allow:
        names = ", ".join(dict.fromkeys(recipe["data"]["path"] or recipe["data"]["name"] for recipe in recipes))
        raise InputError(
            f"{len(same)} of {len(items)} test questions are in the training data of this run "
            f"({names}), such as {same[0]}: its score would say nothing. "
            f"--allow-overlap evaluates all the same and records it"
        )
    return found
