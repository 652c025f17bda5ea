"""Log-probabilities of known texts against the model's own logits."""

import numpy as np
import pytest

from sst_jax.lab.evaluation import scoring


def expected(model, rows, starts, depth):
    """(log-probabilities, likeliest or not) of each row, from the logits of all rows together."""
    tokens = np.zeros((len(rows), max(map(len, rows))), int)
    for place, row in enumerate(rows):
        tokens[place, : len(row)] = row
    real = np.arange(tokens.shape[1]) < np.array([[len(row)] for row in rows])
    logits = np.asarray(model.logits(tokens, depth=depth, segment_ids=real.astype(int)), np.float64)
    logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    for place, (row, start) in enumerate(zip(rows, starts, strict=True)):
        before, targets = logprobs[place, start - 1 : len(row) - 1], np.array(row[start:], int)
        yield before[np.arange(len(targets)), targets], before.argmax(1) == targets


@pytest.mark.fast_cases(1)
@pytest.mark.parametrize("depth", [1, 3])
def test_scores_are_those_of_the_logits(streaming, depth):
    rng = np.random.default_rng(0)
    rows = [[2, *rng.integers(6, 262, size).tolist()] for size in (30, 7, 64, 1)]
    # One row continues greedily, so that some likeliest tokens are met.
    rows[1] += streaming.generate([rows[1]], max_new_tokens=5, depth=1)[0].tokens
    starts = [3, 8, 60, 1]
    found = scoring.score(streaming, rows, starts, depth)
    for scored, (logprobs, greedy) in zip(found, expected(streaming, rows, starts, depth), strict=True):
        np.testing.assert_allclose(scored.logprobs, logprobs, atol=2e-4)
        np.testing.assert_array_equal(scored.greedy, greedy)


def test_greedy_text_scores_as_greedy(plain):
    prompt = plain.tokenizer.encode("12 + 30 =")
    tokens = plain.generate([prompt], max_new_tokens=8)[0].tokens
    (scored,) = scoring.score(plain, [prompt + tokens], [len(prompt)])
    assert scored.greedy.all()
    assert len(scored.logprobs) == len(tokens)


def test_rows_do_not_see_each_other(streaming):
    rows = [list(range(6, 40)), list(range(90, 100))]
    together = scoring.score(streaming, rows, [5, 5])
    alone = [scoring.score(streaming, [row], [5])[0] for row in rows]
    for one, other in zip(together, alone, strict=True):
        np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-4)


def test_rows_of_one_shape_share_one_program(plain):
    rows = [list(range(6, 30))] * 2
    scoring.score(plain, rows, [4, 9])
    before = scoring._score._cache_size()
    scoring.score(plain, [list(range(6, 50))] * 2, [40, 41])
    assert scoring._score._cache_size() == before
