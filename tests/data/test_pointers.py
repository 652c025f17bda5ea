"""Pointers followed k times: answers by walking, splits that share nothing, and no answer without the table."""

import numpy as np
import pytest

from sst_jax.data import pointers
from sst_jax.errors import InputError

TASK = pointers.TASKS["pointers"]


def test_answers_are_where_the_arrows_lead():
    words = TASK.draw("train", 30, 20, (3,))
    for symbols, answers, asked in zip(*words, strict=True):
        table = dict(divmod(int(symbol), TASK.nodes) for symbol in symbols[: TASK.nodes])
        assert sorted(table) == sorted(table.values()) == list(range(TASK.nodes))
        assert asked.tolist() == [False] * TASK.nodes + [True] * (20 - TASK.nodes)
        for symbol, answer in zip(symbols[TASK.nodes :], answers[TASK.nodes :], strict=True):
            node, hops = divmod(int(symbol) - TASK.nodes**2, TASK.hops)
            for _ in range(hops + 1):
                node = table[node]
            assert node == answer


def test_splits_share_no_word_and_draws_repeat():
    one, two, other = (TASK.draw(split, 200, 12, (0,)) for split in ("train", "train", "test"))
    assert all((a == b).all() for a, b in zip(one, two, strict=True))
    assert not {tuple(word) for word in one.symbols} & {tuple(word) for word in other.symbols}
    assert one.symbols.max() < TASK.vocabulary


def test_a_query_alone_says_nothing():
    words = TASK.draw("test", 4000, 12, (1,))
    first, answers = words.symbols[:, TASK.nodes], words.states[:, TASK.nodes]
    shares = [np.bincount(answers[first == symbol], minlength=TASK.nodes).max() / (first == symbol).sum()
              for symbol in np.unique(first)]  # fmt: skip
    # A cycle comes back, so that its own node is the likeliest answer: 1/8 for one arrow, 4/8 for six.
    assert max(shares) < 0.75


def test_what_cannot_be_drawn_is_refused():
    with pytest.raises(InputError, match="needs more than its 8 arrows"):
        TASK.draw("train", 1, 8, (0,))
    with pytest.raises(InputError, match="no split 'dev'"):
        TASK.draw("dev", 1, 12, (0,))
