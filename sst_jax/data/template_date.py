"""The date that chat templates write (`strftime_now`, as Llama 3.2's): fixed where work resumes on another day."""

from __future__ import annotations

from datetime import datetime

from sst_jax.data.tokenizer import Tokenizer
from sst_jax.errors import InputError


def reads_date(tokenizer: Tokenizer) -> bool:
    """Return whether a tokenizer's chat template writes the date."""
    return tokenizer.template is not None and "strftime_now" in tokenizer.template.source


def parse_date(text: str, where: str) -> datetime:
    """Return the date that a text spells, "2026-11-30" or with a time behind it.

    Raises: InputError beginning with `where`.
    """
    try:
        return datetime.fromisoformat(text)
    except ValueError:
        raise InputError(f"{where}={text!r} is no date: write it as 2026-11-30") from None


def fix_date(tokenizer: Tokenizer, date: datetime | None) -> None:
    """Have a tokenizer's chat template write this date; None: the present, whenever it is filled in."""
    if tokenizer.template is not None and reads_date(tokenizer):
        tokenizer.template.now = date


def date_of(tokenizer: Tokenizer) -> str:
    """Return the date that a tokenizer's chat template writes, as it is recorded."""
    fixed = None if tokenizer.template is None else tokenizer.template.now
    return (fixed or datetime.now()).isoformat(timespec="seconds")
