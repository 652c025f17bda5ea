"""Reading answers out of text where they are words, letters or formulas; numbers are `data/grading.py`'s.

Two filters each. `strict` takes the form that was asked for, `flexible` what a well-meaning reader would accept.
"""

from __future__ import annotations

import importlib.metadata
import re

from sst_jax.data.grading import canonical, extract_result

# In brackets a letter of either case; bare, no "a" or "I" that begins a phrase: "the answer is a mixture".
_STATED = re.compile(r"(?i:answer\s+is):?\s*\**(?:\(([A-Za-z])\)|\(?([A-HJ-Z])\b|\(?([a-zI])\b(?![’']|[ \t]+\w))")
_BRACKETED = re.compile(r"\(([A-Z])\)")
_BEGINS = re.compile(r"\s*([-$]{0,2}\d[\d,]*(?:\.\d+)?)")
_ALONE = re.compile(r"^\W*([A-Z])\W*$|^\W*([A-Z])[).:]", re.MULTILINE)


def number(text: str, strict: bool) -> str | None:
    """Return the answer by GSM8K's rule: the number after "####", or (not strict) the last number anywhere."""
    return extract_result(text, strict)


def first_number(text: str, strict: bool) -> str | None:
    """Return the number that the text begins with; not strict: the last number anywhere."""
    if not strict:
        return extract_result(text, strict=False)
    found = _BEGINS.match(text)
    return canonical(found[1]) if found else None


def word(text: str, strict: bool) -> str | None:
    """Return the first word, in lower case; not strict: skipping "in", "on the", "the" or "a"."""
    # "on" alone may be the answer.
    lead = "" if strict else r"(?:in\s+|on\s+(?=(?:the|an?)\b))?(?:(?:the|an?)\s+)?"
    found = re.match(rf"\W*{lead}(\w+)", text.lower())
    return found[1] if found else None


def letter(text: str, strict: bool) -> str | None:
    """Return the last letter in "the answer is (X)"; not strict: else the last "(X)", else one that stands alone on a
    line.
    """
    found = _STATED.findall(text)
    if not strict:
        found = found or _BRACKETED.findall(text) or _ALONE.findall(text)
    return "".join(found[-1]).upper() if found else None


def formula(text: str, strict: bool) -> str | None:
    """Return what the last \boxed{...} holds, without spacing; not strict: else the text between the last $...$."""
    start = text.rfind("\\boxed{")
    if start >= 0:
        begin = start + len("\\boxed{")
        depth = 1
        for place in range(begin, len(text)):
            depth += {"{": 1, "}": -1}.get(text[place], 0)
            if depth == 0:
                return plain_formula(text[begin:place])
        return None
    found = [] if strict else re.findall(r"\$([^$]+)\$", text)
    return plain_formula(found[-1]) if found else None


def plain_formula(text: str) -> str:
    """Return a formula without differences of layout: spaces, sizes of brackets, dollar signs, a full stop."""
    text = re.sub(r"\\(?:(?:left|right|quad|displaystyle)(?![a-zA-Z])|[!,;:])|\$|\s", " ", text)
    # Only the space that ends a command's name says something: \pi r is not \pir.
    text = re.sub(r"(\\[a-zA-Z]+) +(?=[a-zA-Z])| ", lambda found: f"{found[1]} " if found[1] else "", text)
    return re.sub(r"\\[dt]frac", r"\\frac", text).rstrip(".")


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
    from math_verify import parse, verify

    line = re.search(r"####([^\n]*)", text)
    return bool(verify(parse(f"${reference}$"), parse(line[1] if line else text)))
