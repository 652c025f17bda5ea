"""Extract a final answer from generated text, by GSM8K's own rule."""

from __future__ import annotations

import re
from decimal import Decimal

# A sign glued to a digit or letter is a minus between two terms ("10-12"), not a negative number.
_NUMBER = r"(?:(?<![\w.)])-)?\$?(?:(?<=\$)-)?(?:\d[\d,]*(?:\.\d+)?|\.\d+)"
_STRICT = re.compile(rf"####\s*(?:\$\s)?({_NUMBER})")
_FLEXIBLE = re.compile(_NUMBER)


def canonical(number: str) -> str:
    """Return a number without commas, dollar signs and trailing zeros: "$1,200.50" is "1200.5", "18.0" is "18".

    Raises: ValueError when it is not a number.
    """
    text = re.sub(r"[\s,$]", "", number)
    try:
        value = Decimal(text)
        plain = f"{value:f}"
    except (ArithmeticError, ValueError) as error:
        raise ValueError(f"not a number: {number!r}") from error
    if not value.is_finite():
        raise ValueError(f"not a number: {number!r}")
    if "." in plain:
        plain = plain.rstrip("0").rstrip(".")
    return "0" if plain in ("-0", "") else plain


def extract_result(text: str, strict: bool) -> str | None:
    """Return the final answer in its canonical form, or None when there is none.

    strict: the number after the first "####" (openai/grade-school-math, `extract_answer`), allowing for a dollar sign
    and a unit after it. Not strict: the last number anywhere.
    """
    found = _STRICT.findall(text)[:1] if strict else _FLEXIBLE.findall(text)[-1:]
    return canonical(found[0]) if found else None
