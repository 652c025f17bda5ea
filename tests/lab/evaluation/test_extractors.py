"""Letters and formulas read out of text, and math-verify's second opinion."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sst_jax.lab.evaluation import extractors


@pytest.mark.parametrize(
    ("text", "strict", "flexible"),
    [
        (" key", "key", "key"),
        (" Key.\nQuestion: What", "key", "key"),
        (" the key", "the", "key"),
        (" in the Red box", "in", "red"),
        ("**on**", "on", "on"),
        (" on and bright", "on", "on"),
        (" on the shelf", "on", "shelf"),
        (" in Paris", "in", "paris"),
        ("", None, None),
        (" ...", None, None),
    ],
)
def test_word(text, strict, flexible):
    assert extractors.word(text, True) == strict
    assert extractors.word(text, False) == flexible


@pytest.mark.parametrize(
    ("text", "strict", "flexible"),
    [
        (" 18", "18", "18"),
        ("$1,200.50 in all", "1200.5", "1200.5"),
        ("-3", "-3", "-3"),
        (" 18 because 9 + 9 = 19", "18", "19"),
        ("He has 18", None, "18"),
        ("none", None, None),
    ],
)
def test_first_number(text, strict, flexible):
    assert extractors.first_number(text, True) == strict
    assert extractors.first_number(text, False) == flexible


@pytest.mark.parametrize(
    ("text", "strict", "flexible"),
    [
        ("So it is B.\nThe answer is (C)", "C", "C"),
        ("The answer is (A). No, wait: the answer is (D).", "D", "D"),
        ("the answer is c", "C", "C"),
        ("The answer is: **(B)**", "B", "B"),
        ("Therefore (A) is wrong, so (B).", None, "B"),
        ("B. because of gravity", None, "B"),
        ("I think\n C \n", None, "C"),
        ("A dog barks at the answer", None, None),
        ("The answer is unclear", None, None),
        ("The answer is Apples", None, None),
        ("The answer is (C). I think the answer is a bit surprising.", "C", "C"),
        ("The answer is a mixture of esters", None, None),
        ("the answer is I think (B)", None, "B"),
        ("The answer is I’d say (B)", None, "B"),
        ("the answer is (b).", "B", "B"),
        ("The answer is A because of it", "A", "A"),
        ("the answer is a.", "A", "A"),
        ("", None, None),
    ],
)
def test_letter(text, strict, flexible):
    assert extractors.letter(text, True) == strict
    assert extractors.letter(text, False) == flexible


@pytest.mark.parametrize(
    ("text", "strict", "flexible"),
    [
        (r"so \boxed{12}", "12", "12"),
        (r"\boxed{1} and then \boxed{\frac{1}{2}}", r"\frac{1}{2}", r"\frac{1}{2}"),
        (r"\boxed{\left( 3, \dfrac{\pi}{2} \right)}", r"(3,\frac{\pi}{2})", r"(3,\frac{\pi}{2})"),
        (r"it is $x = 3$.", None, "x=3"),
        (r"never closed \boxed{12", None, None),
        ("nothing", None, None),
    ],
)
def test_formula(text, strict, flexible):
    assert extractors.formula(text, True) == strict
    assert extractors.formula(text, False) == flexible


def test_layout_does_not_eat_names():
    assert extractors.plain_formula(r"\leftarrow") == r"\leftarrow"
    assert extractors.plain_formula(r"\left[ 1 \right]. ") == "[1]"
    assert extractors.plain_formula(r"3\,x + 1\!2") == "3x+12"
    assert extractors.plain_formula(r"2\pi r") == extractors.plain_formula(r"2 \pi\,r") == r"2\pi r"
    assert extractors.plain_formula(r"2 \pi + 1") == r"2\pi+1"


@given(st.text("()ABC answer is:.\n", max_size=60))
def test_what_strict_finds_flexible_finds_too(text):
    found = extractors.letter(text, True)
    assert found is None or found == extractors.letter(text, False)


@pytest.mark.parametrize(
    ("text", "reference", "right"),
    [
        ("It is 18.\n#### 18", "18", True),
        ("#### 18.0", "18", True),
        ("#### 1,200", "1200", True),
        ("#### 18\nQuestion: and 19?", "18", True),
        ("#### 17\nand not 18", "18", False),
        (r"so \boxed{\frac{1}{2}}", "0.5", True),
        (r"\boxed{\dfrac12}", r"\frac{1}{2}", True),
        ("no idea", "18", False),
    ],
)
def test_second_opinion(text, reference, right):
    pytest.importorskip("math_verify", reason="the extra eval is not installed")
    assert extractors.second_opinion(text, reference) is right


def test_who_gives_second_opinions(monkeypatch):
    pytest.importorskip("math_verify", reason="the extra eval is not installed")
    assert extractors.second_opinion_by().startswith("math-verify ")

    def missing(name):
        raise extractors.importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(extractors.importlib.metadata, "version", missing)
    assert extractors.second_opinion_by() is None
