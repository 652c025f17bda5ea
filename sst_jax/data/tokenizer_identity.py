"""Digests of the tokenizer and the chat template that a run is trained with, compared when it resumes or opens."""

from __future__ import annotations

import hashlib
import json

from sst_jax.data.chat_template import TEMPLATE_FILE
from sst_jax.data.generation_config import GENERATION_CONFIG
from sst_jax.data.tokenizer_base import Tokenizer
from sst_jax.files import contents_digest
from sst_jax.types import Json

TOKENIZER_CONFIG = "tokenizer_config.json"


def tokenizer_record(tokenizer: Tokenizer, format: str) -> Json:
    """Return what a run's config.json says of its tokenizer under "data".

    Args:
        tokenizer: that its examples are made with.
        format: "plain" or "chat", which alone takes the template.
    """
    whole, template = tokenizer_digests(tokenizer)
    return {
        "tokenizer": {"sha256": whole},
        "chat template": {"sha256": template if format == "chat" else None},
    }


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


def changes(recorded: Json, now: Json) -> list[str]:
    """Return what differs of two records, each in words; a name that either lacks is not compared."""
    differing = [name for name in now if name in recorded and recorded[name] != now[name]]
    return [f"{name} ({_shown(recorded[name])} there, {_shown(now[name])} now)" for name in differing]


def _shown(record: object) -> str:
    """Return a record of `data_record` in a few words."""
    if not isinstance(record, dict):
        return str(record)
    count, digest = record.get("count"), str(record.get("sha256"))[:12]
    return digest if count is None else f"{count:,}, {digest}"
