"""Words whose answer is a state: their truth by other means, splits that share nothing, and no way around the work."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sst_jax.data import statetrack
from sst_jax.data.problems import SPLITS
from sst_jax.errors import InputError

names = st.sampled_from(sorted(statetrack.TASKS))


def matrices(size):
    """Permutations as matrices, in the order of their numbers."""
    return np.array([np.eye(size, dtype=int)[list(p)] for p in itertools.permutations(range(size))])


def by_matrices(size, word):
    product, all_matrices, found = np.eye(size, dtype=int), matrices(size), []
    for symbol in word:
        product = product @ all_matrices[symbol]
        found.append(int((all_matrices == product).all(axis=(1, 2)).argmax()))
    return found


def by_calculating(word):
    value, found = 0, []
    for symbol in word:
        value = value + symbol + 1 if symbol < 9 else value * {9: 3, 10: 7, 11: 9, 12: 1}[int(symbol)]
        found.append(int(value) % 10)  # the whole number grows; only its last digit is looked at
    return found


REFERENCES = {
    "s3": lambda word: by_matrices(3, word),
    "s5": lambda word: by_matrices(5, word),
    "parity": lambda word: [sum(word[: end + 1]) % 2 for end in range(len(word))],
    "mod5": lambda word: [sum(word[: end + 1]) % 5 for end in range(len(word))],
    "sums": lambda word: [sum(word[: end + 1]) % 7 for end in range(len(word))],
    "arithmetic": lambda word: by_calculating([int(symbol) for symbol in word]),
}


@pytest.mark.parametrize("name", REFERENCES)
def test_states_are_what_another_way_of_computing_finds(name):
    words = statetrack.draw(statetrack.find(name), "train", 20, 15, (3,))
    for symbols, states in zip(words.symbols, words.states, strict=True):
        assert REFERENCES[name](symbols) == states.tolist()


@settings(max_examples=40, deadline=None)
@given(names, st.sampled_from(sorted(SPLITS)), st.integers(1, 60), st.integers(8, 40), st.integers(0, 2**32))
def test_a_draw_is_reproducible_and_well_formed(name, split, rows, length, seed):
    task = statetrack.find(name)
    words = statetrack.draw(task, split, rows, length, (seed,))
    again = statetrack.draw(task, split, rows, length, (seed,))
    assert all((one == other).all() for one, other in zip(words, again, strict=True))
    assert words.symbols.shape == words.states.shape == words.asked.shape == (rows, length)
    assert words.symbols.min() >= 0
    assert words.symbols.max() < task.table.shape[1] <= task.vocabulary
    assert words.states.max() < len(task.table) <= task.vocabulary
    assert words.asked[:, -1].all()
    assert set(statetrack.residues(words.symbols)) <= set(SPLITS[split])


@pytest.mark.parametrize("name", ["parity", "s3"])
def test_splits_share_no_word_even_where_there_are_few(name):
    found = {
        split: {tuple(word) for word in statetrack.draw(statetrack.find(name), split, 3000, 8, (0,)).symbols}
        for split in SPLITS
    }
    for one, other in itertools.combinations(found.values(), 2):
        assert not one & other
    if name == "parity":  # every word is in one of them
        assert len(set.union(*found.values())) == 2**8


def test_seeds_give_other_words():
    draws = [statetrack.draw(statetrack.find("s5"), "train", 50, 12, (seed,)).symbols for seed in (0, 1)]
    assert not {tuple(word) for word in draws[0]} & {tuple(word) for word in draws[1]}


@pytest.mark.parametrize("name", ["s3", "parity", "sums", "arithmetic"])
@pytest.mark.parametrize("split", ["train", "test"])
def test_answers_are_even_and_the_last_symbol_does_not_tell_them(name, split):
    task, rows = statetrack.find(name), 12_000
    words = statetrack.draw(task, split, rows, 24, (1,))  # of length 12 there are too few words of parity
    states = len(task.table)

    def off(answers):  # the largest deviation from evenness, in standard errors
        share = np.bincount(answers, minlength=states) / len(answers)
        return np.abs(share - 1 / states).max() / np.sqrt((1 / states) * (1 - 1 / states) / len(answers))

    assert off(words.states[:, -1]) < 4.5
    before = words.symbols[:, -2] if task.query else words.symbols[:, -1]
    for symbol in range(task.table.shape[1]):
        assert off(words.states[before == symbol, -1]) < 4.5, symbol


def test_arithmetic_asks_only_at_its_equals_signs():
    words = statetrack.draw(statetrack.find("arithmetic"), "train", 500, 12, (0,))
    assert (words.asked == (words.symbols == 12)).all()
    assert not words.asked[:, 0].any()
    assert abs(words.asked[:, 1:-1].mean() - statetrack.QUERIES) < 0.03


def test_right_marks_asked_places_with_the_true_state_alone():
    words = statetrack.draw(statetrack.find("arithmetic"), "train", 6, 12, (0,))
    assert (statetrack.right(words, words.states) == words.asked).all()
    assert not statetrack.right(words, words.states + 1).any()


def test_bad_requests_name_the_culprit():
    with pytest.raises(InputError, match=r"task\.name='s4'.*'parity'"):
        statetrack.find("s4")
    with pytest.raises(InputError, match="no split 'dev'"):
        statetrack.draw(statetrack.find("s3"), "dev", 1, 12, (0,))
    with pytest.raises(InputError, match="length 7"):
        statetrack.draw(statetrack.find("s3"), "train", 1, 7, (0,))
