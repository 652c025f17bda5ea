"""Text that is no valid Unicode: half a surrogate pair, which JSON can spell and no tokenizer takes."""

from __future__ import annotations

from sst_jax.errors import InputError
from sst_jax.types import JsonValue


def check_unicode(value: JsonValue, what: str = "the text") -> None:
    """Check text, or whatever JSON holds of it.

    Raises: InputError, beginning with `what`, where half a surrogate pair stands in it.
    """
    if isinstance(value, str):
        if not value.isascii() and (place := _first_half(value)) is not None:
            raise InputError(
                f"{what} is no valid Unicode: character {place}, {value[place]!a}, is half a surrogate pair, as an "
                "emoji that was cut in two leaves"
            )
    elif isinstance(value, dict):
        for key, part in value.items():
            check_unicode(key, what)
            check_unicode(part, what)
    elif isinstance(value, list):
        for part in value:
            check_unicode(part, what)


def _first_half(text: str) -> int | None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        return error.start
    return None
