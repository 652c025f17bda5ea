"""Extraction of final answers: GSM8K's strict rule, and the last number anywhere."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sst_jax.data.grading import canonical, extract_result
from sst_jax.data.problems import load_gsm8k


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
