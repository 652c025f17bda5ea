"""What a run would learn: counts, lengths, duplicates, and documents with their learned tokens marked."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np

from sst_jax.data import own
from sst_jax.data.documents import Document, words
from sst_jax.data.prompts import Example, render
from sst_jax.data.tokenizer import Tokenizer
from sst_jax.errors import InputError
from sst_jax.training.problems import Split
from sst_jax.training.sections import DataConfig
from sst_jax.types import Json

LEARNED, GIVEN = "\033[1;32m", "\033[0m"  # green on a terminal, and back
MARKS = "«", "»"  # elsewhere


def report(split: Split, data: DataConfig, tokenizer: Tokenizer, show: int) -> Json:
    """Return what a run with these data would learn from.

    Args:
        split: the documents.
        data: the section of the recipe.
        tokenizer: of the model.
        show: how many documents are shown, the first ones of each source.

    Returns:
        "seen", the paths in words; "training", a list with the counts of each source; "heldout", the counts; "overlap",
        how many held-out documents are trained on too; "examples", the shown ones.

    Raises: InputError where a document cannot be put into words.
    """
    trained = {words(document)[1:] for documents in split.training for document in documents}
    return {
        "name": split.name,
        "format": data.format,
        "learn": data.learn,
        "length": data.length,
        "seen": list(split.seen),
        "training": [counts(documents, data, tokenizer) for documents in split.training],
        "heldout": counts(split.heldout, data, tokenizer),
        "overlap": sum(words(document)[1:] in trained for document in split.heldout),
        "examples": [
            shown(render(document, tokenizer, data.format, data.learn), tokenizer)
            for documents in split.training
            for document in itertools.islice(documents, show)
        ],
    }


def counts(documents: Sequence[Document], data: DataConfig, tokenizer: Tokenizer) -> Json:
    """Return the counts of documents: how many, how long in tokens, how many tokens are learned, what does not fit."""
    examples = [render(document, tokenizer, data.format, data.learn) for document in documents]
    if not examples:
        raise InputError("the data are empty")
    lengths = np.array([len(example.tokens) for example in examples])
    fits = lengths <= data.length
    learned = np.array([int(example.answer_mask.sum()) for example in examples])
    shortest, middle, longest = (int(value) for value in np.quantile(lengths, (0, 0.5, 1), method="nearest"))
    return {
        "documents": len(examples),
        "too_long": int((~fits).sum()),
        "duplicates": own.duplicates(documents),
        "tokens": int(lengths[fits].sum()),
        "learned_tokens": int(learned[fits].sum()),
        "lengths": {"shortest": shortest, "median": middle, "longest": longest},
    }


def shown(example: Example, tokenizer: Tokenizer) -> Json:
    """Return an example with its text in runs of learned and of given tokens; control tokens are named."""
    runs: list[Json] = []
    for learned, group in itertools.groupby(
        zip(example.tokens, example.answer_mask, strict=True), lambda pair: pair[1]
    ):
        ids = [int(index) for index, _ in group]
        runs.append({"learned": bool(learned), "text": spelled(ids, tokenizer), "tokens": ids})
    return {"id": example.id, "tokens": len(example.tokens), "runs": runs}


def spelled(ids: Sequence[int], tokenizer: Tokenizer) -> str:
    """Return tokens as text, control tokens by their names."""
    names, text = {index: piece for piece, index in tokenizer.specials.items()}, ""
    for special, group in itertools.groupby(ids, lambda index: index in names):
        part = list(group)
        text += "".join(names[index] for index in part) if special else tokenizer.decode(part)
    return text


def describe(found: Json, *, colour: bool) -> str:
    """Return a report for a person; `colour`: for a terminal."""
    lines = list(found["seen"])
    parts = [("training", part) for part in found["training"]] + [("held out", found["heldout"])]
    for name, part in parts:
        size = part["lengths"]
        lines.append(
            f"{name}: {part['documents']:,} documents of {found['name']}, {size['shortest']} to {size['longest']} "
            f"tokens (median {size['median']}); {part['learned_tokens']:,} of {part['tokens']:,} tokens learned"
            + f"; {part['too_long']:,} longer than data.length={found['length']}" * bool(part["too_long"])
            + f"; {part['duplicates']:,} say what another one says" * bool(part["duplicates"])
        )
    if found["overlap"]:
        lines.append(f"{found['overlap']:,} held-out documents are trained on too: the held-out loss will flatter")
    begin, end = (LEARNED, GIVEN) if colour else MARKS
    for example in found["examples"]:
        text = "".join(f"{begin}{run['text']}{end}" if run["learned"] else run["text"] for run in example["runs"])
        lines.append(f"\n--- {example['id']}, {example['tokens']} tokens; learned: {begin}marked{end}\n{text}")
    return "\n".join(lines)
