"""What answers became at two depths, read back from the folders of `evaluate`: what a probe learns from.

What is asked, and what routing does with the answer (a and b: the smaller and the larger depth):

    label     of which items                 positive             not positive, positive
    breaks    right at a                     wrong at b           b, a
    mends     wrong at a                     right at b           a, b
    differs   right at one of the two only   right at b           a, b
    changes   all                            another text at b    a, b
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from sst_jax.data.prompts import prompt_tokens
from sst_jax.data.records import read_jsonl
from sst_jax.data.tokenizer import Tokenizer
from sst_jax.errors import InputError
from sst_jax.files import read_json
from sst_jax.lab.evaluation.runner import HEADER, ITEMS, prompt_sha256, read_outcomes
from sst_jax.types import Json
from sst_jax.weights.provenance import Provenance

FEWEST, FEWEST_OF_A_CLASS = 12, 3


class Item(NamedTuple):
    """One item's outcomes at the two depths; `prompt` as tokens."""

    id: str
    prompt: list[int]
    right: tuple[bool, bool]
    output: tuple[str, str]


LABELS: dict[str, tuple[Callable[[Item], bool], Callable[[Item], bool], tuple[int, int]]] = {
    "breaks": (lambda item: item.right[0], lambda item: not item.right[1], (1, 0)),
    "mends": (lambda item: not item.right[0], lambda item: item.right[1], (0, 1)),
    "differs": (lambda item: item.right[0] != item.right[1], lambda item: item.right[1], (0, 1)),
    "changes": (lambda item: True, lambda item: item.output[0] != item.output[1], (0, 1)),
}


def read(folders: Sequence[str], depths: tuple[int, int]) -> list[Json]:
    """Return records with id, question and the two outcomes of every item that has both; an outcome says of which
    format, model and folder it is.

    Raises: InputError naming the folder that is no evaluation of answers, or the depth that none of them has.
    """
    found: dict[str, Json] = {}
    seen: set[str] = set()
    for folder in map(Path, folders):
        header = read_json(folder / HEADER)
        if header.get("measure") != "answers":
            raise InputError(f"--outcomes {folder} holds {header.get('measure')}, not answers")
        for record in read_jsonl(folder / ITEMS):
            item = found.setdefault(record.value["id"], {"outcomes": {}})
            item |= {"id": record.value["id"], "question": record.value["question"]}
        facts = {"format": header["format"], "model": header["model"], "folder": str(folder)}
        for outcome in read_outcomes(folder):
            found[outcome["id"]]["outcomes"][outcome["policy"]] = {**outcome, **facts}
            seen.add(outcome["policy"])
    for depth in depths:
        if str(depth) not in seen:
            raise InputError(
                f"--depths: no outcomes at depth {depth} in {', '.join(folders)}, which have {', '.join(sorted(seen))}"
            )
    return [item for item in found.values() if all(str(depth) in item["outcomes"] for depth in depths)]


def items(records: Sequence[Json], depths: tuple[int, int], tokenizer: Tokenizer, provenance: Provenance) -> list[Item]:
    """Return the items with their prompts as tokens; `provenance` is that of the model that the probe is for.

    Raises: InputError where outcomes are another model's, or a prompt is not the one that was answered.
    """
    result = []
    for record in records:
        pair = [record["outcomes"][str(depth)] for depth in depths]
        prompt = prompt_tokens(record["question"], tokenizer, pair[0]["format"])
        for outcome in pair:
            folder, model = outcome["folder"], outcome["model"]
            for key in ("digest", "run", "step"):
                if model.get(key) != getattr(provenance, key):
                    raise InputError(
                        f"{folder} has the outcomes of another model: its {key} is {model.get(key)}, --model's is "
                        f"{getattr(provenance, key)}"
                    )
            if prompt_sha256(prompt) != outcome["prompt_sha256"]:
                raise InputError(f"{folder}: the prompt of {record['id']} is not the one that was answered")
        right, output = (tuple(outcome[name] for outcome in pair) for name in ("correct", "output"))
        result.append(Item(record["id"], prompt, right, output))
    return result


def asked_about(items: Sequence[Item], label: str) -> tuple[np.ndarray, np.ndarray]:
    """Return which items a label applies to, bool [items], and their labels.

    Raises: InputError on too few of them, or too few of a class.
    """
    wanted, positive, _ = LABELS[label]
    asked = np.array([wanted(item) for item in items], bool)
    labels = np.array([positive(item) for item in items], bool)[asked]
    smaller = int(min(labels.sum(), len(labels) - labels.sum()))
    if len(labels) < FEWEST or smaller < FEWEST_OF_A_CLASS:
        raise InputError(
            f"--label {label}: of {len(items)} items {len(labels)} are in question and {int(labels.sum())} of these "
            f"are positive; a probe needs {FEWEST}, and {FEWEST_OF_A_CLASS} of either class: evaluate more items, or "
            "ask for another label"
        )
    return asked, labels


def digest(items: Sequence[Item]) -> str:
    """Return the SHA-256 over the items with their outcomes; it identifies the training set."""
    return hashlib.sha256(json.dumps(items).encode()).hexdigest()
