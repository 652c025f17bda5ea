"""Which problems train and which are held out, by the name of the data."""

import pytest

from sst_jax.data.datasets import TRAINED
from sst_jax.errors import InputError
from sst_jax.training.problems import split_problems
from sst_jax.training.recipe import DataConfig


def data(name, **fields):
    return DataConfig(**{"name": name, "path": "", "heldout": 20, **fields})


@pytest.mark.parametrize("name", ["boxes", "rooms:8", "lamp:5-9"])
def test_stories_train_and_are_held_out_apart(name):
    found = split_problems(data(name, heldout=200), seed=1)
    (training,), heldout = found.training, found.heldout
    assert (len(training), len(heldout)) == (TRAINED, 200)
    asked = {problem.question for problem in heldout}
    assert not asked & {training[index].question for index in range(2000)}
    assert list(heldout) == list(split_problems(data(name, heldout=200), seed=1).heldout)
    assert list(heldout) != list(split_problems(data(name, heldout=200), seed=2).heldout)
    assert len(split_problems(data(name, limit=7), seed=0).training[0]) == 7


@pytest.mark.parametrize("name", ["words", "auto"])
def test_hidden_steps_change_the_answer_alone(name):
    whole, hidden = (split_problems(data(f"{name}{part}", limit=30), seed=0) for part in ("", ":result"))
    for problems, results in ((whole.training[0], hidden.training[0]), (whole.heldout, hidden.heldout)):
        assert [problem._replace(answer="") for problem in problems] == list(results)
        assert all(problem.answer for problem in problems)


def test_auto_becomes_what_it_stands_for_and_is_recorded_as_it_was_written():
    assert data("auto").dataset == "words"
    assert data("auto:result").dataset == "words:result"
    assert data("auto:result", path="somewhere").dataset == "gsm8k:result"
    assert data("auto:result", path="somewhere").name == "auto:result"


@pytest.mark.parametrize("name", ["", "gsm8k:steps", "word", "words:", "boxes:none", "boxes:4-1"])
def test_bad_names_are_refused(name):
    with pytest.raises(InputError, match="boxes"):
        data(name)
