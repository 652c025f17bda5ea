"""math-verify's second opinion."""

import pytest

from sst_jax.lab.evaluation import second_opinion


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
    assert second_opinion.second_opinion(text, reference) is right


def test_who_gives_second_opinions(monkeypatch):
    pytest.importorskip("math_verify", reason="the extra eval is not installed")
    assert second_opinion.second_opinion_by().startswith("math-verify ")

    def missing(name):
        raise second_opinion.importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(second_opinion.importlib.metadata, "version", missing)
    assert second_opinion.second_opinion_by() is None
