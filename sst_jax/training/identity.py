"""What a run learns from, as digests: recorded when it begins, compared when it resumes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from datetime import datetime
from pathlib import Path

import numpy as np

from sst_jax.data.prompts import Example
from sst_jax.data.template_date import date_of, fix_date, parse_date, reads_date
from sst_jax.data.tokenizer import Tokenizer
from sst_jax.data.tokenizer_identity import tokenizer_record
from sst_jax.errors import InputError
from sst_jax.files import read_json
from sst_jax.training.sections import DataConfig
from sst_jax.types import Json
from sst_jax.weights.run_tokenizer import recorded_date


def data_record(
    sources: Sequence[Sequence[Example]], heldout: Sequence[Example], tokenizer: Tokenizer, format: str
) -> Json:
    """Return what a run's config.json says of its data.

    Args:
        sources: examples that are trained on, in their order.
        heldout: that are kept out.
        tokenizer: that made them.
        format: "plain" or "chat", which alone takes the template.
    """
    return {
        "training examples": {"count": sum(map(len, sources)), "sha256": sources_digest(sources)},
        "held-out examples": {"count": len(heldout), "sha256": examples_digest(heldout)},
        **tokenizer_record(tokenizer, format),
    }


def examples_digest(examples: Iterable[Example]) -> str:
    """Return the hex SHA-256 over tokens and masks of examples, in their order; their ids do not count."""
    state = hashlib.sha256()
    for example in examples:
        # The length delimits each example, so that tokens cannot move from one to the next unseen.
        state.update(len(example.tokens).to_bytes(8, "little"))
        state.update(np.asarray(example.tokens, "<i4").tobytes())
        state.update(np.packbits(np.asarray(example.answer_mask, bool)).tobytes())
    return state.hexdigest()


def sources_digest(sources: Sequence[Sequence[Example]]) -> str:
    """Return the hex SHA-256 of sources that are drawn from by weights; of one alone that of its examples."""
    digests = [examples_digest(source) for source in sources]
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()


def fix_run_date(tokenizer: Tokenizer, data: DataConfig, workdir: Path) -> None:
    """Have a chat template write the date of a run, on whichever day it resumes.

    That is the date that the run folder records, else the recipe's, else the present. A run of version 0.1.0 recorded
    none, and its template goes on writing the present.
    """
    file = workdir / "config.json"
    if file.is_file():
        date = recorded_date(read_json(file), file)
    else:
        date = parse_date(data.date, "data.date") if data.date else datetime.now()
    fix_date(tokenizer, date)


def date_record(tokenizer: Tokenizer, format: str) -> Json:
    """Return what config.json says of the date that examples were made with; nothing where none is in them."""
    return {"date": date_of(tokenizer)} if format == "chat" and reads_date(tokenizer) else {}


def check_changes(where: str, differing: Sequence[str]) -> None:
    """Raise InputError where anything differs from what a run recorded of its inputs."""
    if differing:
        raise InputError(
            f"{where} began with other inputs: {'; '.join(differing)}. Put them back, or train in another --workdir; "
            "--allow-changed resumes with the new ones and records it"
        )
