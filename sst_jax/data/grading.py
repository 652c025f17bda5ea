"""Read final answers out of generated text: numbers, words, letters, formulas.

An extractor has two filters. `strict` takes the form that was asked for, not strict what a well-meaning reader would
accept. A `Grading` puts it together with the form that references are brought to.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from decimal import Decimal
from typing import NamedTuple, Protocol, runtime_checkable

from sst_jax.data.documents import Item

# A sign glued to a digit or letter is a minus between two terms ("10-12"), not a negative number.
_NUMBER = r"(?:(?<![\w.)])-)?\$?(?:(?<=\$)-)?(?:\d[\d,]*(?:\.\d+)?|\.\d+)"
_STRICT = re.compile(rf"####\s*(?:\$\s)?({_NUMBER})")
_FLEXIBLE = re.compile(_NUMBER)
# In brackets a letter of either case; bare, no "a" or "I" that begins a phrase: "the answer is a mixture".
_STATED = re.compile(r"(?i:answer\s+is):?\s*\**(?:\(([A-Za-z])\)|\(?([A-HJ-Z])\b|\(?([a-zI])\b(?![’']|[ \t]+\w))")
_BRACKETED = re.compile(r"\(([A-Z])\)")
_BEGINS = re.compile(r"\s*([-$]{0,2}\d[\d,]*(?:\.\d+)?)")
_ALONE = re.compile(r"^\W*([A-Z])\W*$|^\W*([A-Z])[).:]", re.MULTILINE)


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
    """Return the final number in its canonical form, or None when there is none, by GSM8K's rule.

    strict: the number after the first "####" (openai/grade-school-math, `extract_answer`), allowing for a dollar sign
    and a unit after it. Not strict: the last number anywhere.
    """
    found = _STRICT.findall(text)[:1] if strict else _FLEXIBLE.findall(text)[-1:]
    return canonical(found[0]) if found else None


def first_number(text: str, strict: bool) -> str | None:
    """Return the number that the text begins with; not strict: the last number anywhere."""
    if not strict:
        return extract_result(text, strict=False)
    found = _BEGINS.match(text)
    return canonical(found[1]) if found else None


def last_number(text: str, strict: bool) -> str | None:
    """Return the number after "####" or, where there is none, the last one; not strict: the last one anywhere."""
    found = extract_result(text, strict=True) if strict else None
    return extract_result(text, strict=False) if found is None else found


def exact(text: str, strict: bool) -> str | None:
    """Return the text without spaces around it; not strict: its first line, without a full stop behind it."""
    text = text.strip()
    return (text if strict else text.partition("\n")[0].strip().removesuffix(".")) or None


def by_pattern(pattern: re.Pattern[str]) -> Grading:
    """Return the grading by the last match of a pattern, its first group where it has one; not strict: in any case."""
    loose = re.compile(pattern.pattern, pattern.flags | re.IGNORECASE)

    def extract(text: str, strict: bool) -> str | None:
        found = list((pattern if strict else loose).finditer(text))
        return (found[-1][1] if pattern.groups else found[-1][0]) if found else None

    return Grading(extract)


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
    r"""Return what the last \boxed{...} holds, without spacing; not strict: else the text between the last $...$."""
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


@runtime_checkable
class Judge(Protocol):
    """Says of a text whether it answers an item, by the item's id."""

    rows: dict[str, Mapping[str, object]]  # what it judges by, by item id

    def __call__(self, text: str, identity: str) -> bool: ...


class Grading(NamedTuple):
    """How answers of a data set are read.

    extract    (text, strict) to an answer comparable with a reference, or None
    canonical  brings a reference to the form that `extract` gives
    checkable  answers are numbers or formulas, on which math-verify can give a second opinion
    judge      decides where it is given, in the place of a comparison
    """

    extract: Callable[[str, bool], str | None]
    canonical: Callable[[str], str] = str
    checkable: bool = False
    judge: Judge | None = None

    def is_right(self, found: str | None, item: Item, text: str) -> bool:
        """Whether what `extract` found in a text, an answer to `item`, is right."""
        return found == item.problem.result if self.judge is None else self.judge(text, item.id)


NUMBER = Grading(extract_result, canonical, checkable=True)
FIRST_NUMBER = Grading(first_number, canonical, checkable=True)
LAST_NUMBER = Grading(last_number, canonical, checkable=True)
EXACT = Grading(exact, str.strip)
WORD = Grading(word)
LETTER = Grading(letter)
FORMULA = Grading(formula, plain_formula, checkable=True)
