"""Ask math-verify for a second opinion on an answer; needs the extra `eval`."""

from __future__ import annotations

import importlib.metadata
import re

from sst_jax.console import extras


def second_opinion_by() -> str | None:
    """Return math-verify and its version, or None where the extra `eval` is not installed."""
    try:
        return f"math-verify {importlib.metadata.version('math-verify')}"
    except importlib.metadata.PackageNotFoundError:
        return None


def second_opinion(text: str, reference: str) -> bool:
    """Return whether math-verify finds the text's answer equal to `reference`; it reads the "####" line where there is
    one.
    """
    library = extras.require("math_verify", "eval", "a second opinion")
    line = re.search(r"####([^\n]*)", text)
    return bool(library.verify(library.parse(f"${reference}$"), library.parse(line[1] if line else text)))
