"""Final answers read out of text: numbers by GSM8K's strict rule or anywhere, words, letters, formulas."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sst_jax.data.grading import canonical, extract_result, first_number, formula, letter, plain_formula, word
from tests.support.problems import load_gsm8k


@pytest.mark.parametrize(
    ("text", "strict", "flexible"),
    [
        ("So it is 7.\n#### 72", "72", "72"),
        ("#### 1,234,567", "1234567", "1234567"),
        ("#### $18", "18", "18"),
        ("#### $ 18", "18", "18"),
        ("#### 18 dollars", "18", "18"),
        ("####18.", "18", "18"),
        ("#### -5", "-5", "-5"),
        ("#### -$5", "-5", "-5"),
        ("#### $-5", "-5", "-5"),
        ("#### 18.00", "18", "18"),
        ("#### $1,200.50", "1200.5", "1200.5"),
        ("#### 0.50", "0.5", "0.5"),
        ("#### .5", "0.5", "0.5"),
        ("#### 100", "100", "100"),
        ("#### -0", "0", "0"),
        ("#### 1000,", "1000", "1000"),
        # The first result line counts, so that what a model rambles on to say does not.
        ("#### 3\nQuestion: And 4?\nAnswer: #### 9", "3", "9"),
        ("The answer is 42.", None, "42"),
        ("48-12=36 clips", None, "36"),
        ("between 10-12", None, "12"),
        ("x-5", None, "5"),
        ("it fell to -12", None, "-12"),
        ("48 - 12", None, "12"),
        ("#### x = 5", None, "5"),
        ("## 5", None, "5"),
        ("no number", None, None),
        ("####", None, None),
        ("", None, None),
    ],
)
def test_extract(text, strict, flexible):
    assert extract_result(text, strict=True) == strict
    assert extract_result(text, strict=False) == flexible


@pytest.mark.parametrize("bad", ["", "x", "nan", "inf", "1.2.3", "-"])
def test_canonical_refuses(bad):
    with pytest.raises(ValueError, match="not a number"):
        canonical(bad)


@given(st.decimals(allow_nan=False, allow_infinity=False, places=3, min_value=-(10**9), max_value=10**9))
def test_written_numbers_are_read_back(number):
    expected = canonical(f"{number}")
    assert float(expected) == float(number)
    assert extract_result(f"Thus.\n#### {number:,.3f} apples", strict=True) == expected
    assert extract_result(f"12 and 7, thus {number:,.3f} apples", strict=False) == expected


@given(st.text("0123456789,.-$# \nab", max_size=40))
def test_any_text_gives_a_number_or_none(text):
    for strict in (True, False):
        found = extract_result(text, strict)
        assert found is None or re.fullmatch(r"-?\d+(\.\d+)?", found)


def test_agrees_with_gsm8ks_own_rule_on_its_own_answers(gsm8k_folder):
    own = re.compile(r"#### (\-?[0-9\.\,]+)")  # openai/grade-school-math, dataset.py
    for problem in load_gsm8k(str(gsm8k_folder), "test"):
        text = f"{problem.answer}\n#### {problem.result}"
        assert extract_result(text, strict=True) == own.search(text).group(1).replace(",", "")


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
    assert word(text, True) == strict
    assert word(text, False) == flexible


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
    assert first_number(text, True) == strict
    assert first_number(text, False) == flexible


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
    assert letter(text, True) == strict
    assert letter(text, False) == flexible


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
    assert formula(text, True) == strict
    assert formula(text, False) == flexible


def test_layout_does_not_eat_names():
    assert plain_formula(r"\leftarrow") == r"\leftarrow"
    assert plain_formula(r"\left[ 1 \right]. ") == "[1]"
    assert plain_formula(r"3\,x + 1\!2") == "3x+12"
    assert plain_formula(r"2\pi r") == plain_formula(r"2 \pi\,r") == r"2\pi r"
    assert plain_formula(r"2 \pi + 1") == r"2\pi+1"


@given(st.text("()ABC answer is:.\n", max_size=60))
def test_what_strict_finds_flexible_finds_too(text):
    found = letter(text, True)
    assert found is None or found == letter(text, False)
