"""Overlap of training and test."""

import pytest

from sst_jax.data.documents import Item, Problem
from sst_jax.data.tasks import find
from sst_jax.errors import InputError
from sst_jax.lab.evaluation import contamination
from sst_jax.training.recipe import defaults
from tests.support.problems import gsm8k_lines, write_lines

LONG = "a baker bakes one two three four five six seven eight nine ten eleven rolls and sells none"


def items(*questions):
    return [Item(Problem(str(number), question, "", "1")) for number, question in enumerate(questions)]


def recipe(path, name="gsm8k", heldout=2):
    config = defaults()
    config.data.name, config.data.path, config.data.heldout = name, str(path), heldout
    return config.to_dict()


def test_same_words_are_the_same_question():
    training = [Problem("t", "How MANY, rolls?", "", "1"), Problem("u", LONG, "", "1")]
    found = contamination.overlap(training, items("how many rolls", "How few rolls?", "So: " + LONG[20:] + "!"))
    assert found["same_question"] == ["0"]
    assert found["shares_13_words"] == ["2"]
    assert (found["training_examples"], found["items"]) == (2, 3)


def test_a_clean_run_is_reported_clean(gsm8k):
    found = contamination.check([recipe(gsm8k)], find("gsm8k").read(str(gsm8k)), allow=False)
    assert found["checked"]
    assert found["training_examples"] == 38
    assert found["same_question"] == []


def test_training_on_the_test_file_is_refused(gsm8k, tmp_path):
    write_lines(tmp_path / "train.jsonl", [*gsm8k_lines("train", 20), *gsm8k_lines("test", 7)])
    tested = find("gsm8k").read(str(gsm8k))
    with pytest.raises(InputError, match=r"of 7 test questions are in the training data .*--allow-overlap"):
        contamination.check([recipe(tmp_path, heldout=1)], tested, allow=False)
    found = contamination.check([recipe(tmp_path, heldout=1)], tested, allow=True)
    assert len(found["same_question"]) in (6, 7)  # one problem is held out


def test_what_cannot_be_checked_is_said(tmp_path):
    assert contamination.check([], items("x"), allow=False)["checked"] is False
    found = contamination.check([recipe(tmp_path / "gone")], items("x"), allow=False)
    assert found["checked"] is False
    assert "gone" in found["reason"]


def test_the_embedded_problems_are_apart():
    found = contamination.check([recipe("", name="words")], find("words").read(None)[:100], allow=False)
    assert found["same_question"] == []
    assert found["shares_13_words"] == []
