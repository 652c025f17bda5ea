"""What answers became at two depths, read back from the folders of `evaluate`: what a probe learns from."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sst_jax.data.prompts import prompt_tokens
from sst_jax.data.records import read_jsonl
from sst_jax.data.tokenizer import Tokenizer
from sst_jax.errors import InputError
from sst_jax.files import read_json
from sst_jax.lab.evaluation.runner import HEADER, ITEMS, prompt_sha256, read_outcomes
from sst_jax.lab.probing.fit import Item
from sst_jax.weights.provenance import Provenance


def read(folders: Sequence[str], depths: tuple[int, int]) -> list[dict[str, Any]]:
    """Return records with id, question and the two outcomes of every item that has both; an outcome says of which
    format, model and folder it is.

    Raises: InputError naming the folder that is no evaluation of answers, or the depth that none of them has.
    """
    found: dict[str, dict[str, Any]] = {}
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


def items(
    records: Sequence[dict[str, Any]], depths: tuple[int, int], tokenizer: Tokenizer, provenance: Provenance
) -> list[Item]:
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
