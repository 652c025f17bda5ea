"""What a run learns from, as digests: recorded when it begins, compared when it resumes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from datetime import datetime
from pathlib import Path

import numpy as np

from sst_jax.data.chat_template import TEMPLATE_FILE
from sst_jax.data.generation_config import GENERATION_CONFIG
from sst_jax.data.prompts import Example
from sst_jax.data.template_date import date_of, fix_date, parse_date, reads_date
from sst_jax.data.tokenizer import Tokenizer
from sst_jax.errors import InputError
from sst_jax.files import contents_digest, read_json
from sst_jax.training.sections import DataConfig
from sst_jax.types import Json
from sst_jax.weights.loading import recorded_date

TOKENIZER_CONFIG = "tokenizer_config.json"


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
    whole, template = tokenizer_digests(tokenizer)
    return {
        "training examples": {"count": sum(map(len, sources)), "sha256": sources_digest(sources)},
        "held-out examples": {"count": len(heldout), "sha256": examples_digest(heldout)},
        "tokenizer": {"sha256": whole},
        "chat template": {"sha256": template if format == "chat" else None},
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


def tokenizer_digests(tokenizer: Tokenizer) -> tuple[str, str]:
    """Return the hex SHA-256 of a tokenizer's files without its chat template, and of the template."""
    files = tokenizer.files()
    files.pop(GENERATION_CONFIG, None)  # which tokens end an answer, examples and masks say
    template = files.pop(TEMPLATE_FILE, b"")  # beside tokenizer_config.json, which may hold the template itself
    if TOKENIZER_CONFIG in files:
        config = json.loads(files[TOKENIZER_CONFIG])
        template += json.dumps(config.pop("chat_template", None), sort_keys=True).encode()
        files[TOKENIZER_CONFIG] = json.dumps(config, sort_keys=True).encode()
    return contents_digest(files), hashlib.sha256(template).hexdigest()


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


def changes(recorded: Json, now: Json) -> list[str]:
    """Return what differs of two records, each in words; a name that either lacks is not compared."""
    differing = [name for name in now if name in recorded and recorded[name] != now[name]]
    return [f"{name} ({_shown(recorded[name])} there, {_shown(now[name])} now)" for name in differing]


def check_changes(where: str, differing: Sequence[str]) -> None:
    """Raise InputError where anything differs from what a run recorded of its inputs."""
    if differing:
        raise InputError(
            f"{where} began with other inputs: {'; '.join(differing)}. Put them back, or train in another --workdir; "
            "--allow-changed goes on with the new ones and records it"
        )


def _shown(record: object) -> str:
    """Return a record of `data_record` in a few words."""
    if not isinstance(record, dict):
        return str(record)
    count, digest = record.get("count"), str(record.get("sha256"))[:12]
    return digest if count is None else f"{count:,}, {digest}"
