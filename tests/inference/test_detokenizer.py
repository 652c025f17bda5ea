"""Answers that grow: whatever the pieces, the text is the same, and nothing that was said is taken back."""

import itertools

import hypothesis.strategies as st
from hypothesis import given

from sst_jax.data.tokenizer import ByteTokenizer
from sst_jax.inference.detokenizer import IncrementalDetokenizer

TOKENIZER = ByteTokenizer()
CHARACTERS = st.text(st.sampled_from("ab-é漢🙂"), max_size=12)


def grow(pieces, stop, closing=()):
    """(concatenated pieces of text, answer) from lists of tokens that come one after another."""
    answer, said = IncrementalDetokenizer(TOKENIZER, stop), ""
    pieces = [*pieces, list(closing)]
    for number, piece in enumerate(pieces):
        if answer.ended:
            break
        said += answer.add(piece, [1] * len(piece), number == len(pieces) - 1)
    return said, answer


@given(text=CHARACTERS, cuts=st.lists(st.integers(0, 40)), stop=st.lists(st.text("ab-é", min_size=1, max_size=3)))
def test_text_does_not_depend_on_how_tokens_come(text, cuts, stop):
    tokens = TOKENIZER.encode_text(text)
    edges = sorted({min(cut, len(tokens)) for cut in cuts} | {0, len(tokens)})
    pieces = [tokens[a:b] for a, b in itertools.pairwise(edges)]
    said, answer = grow(pieces, stop)
    places = [place for place in (text.find(mark) for mark in stop) if place >= 0]
    # A stop string ends the answer where it is first complete, which is not always where the first one begins.
    if not places:
        assert said == answer.text == text
        assert answer.ended == "length"
        assert answer.tokens == tokens
    else:
        assert answer.ended == "stop"
        assert said == answer.text
        assert text.startswith(said)
        assert not any(mark in said for mark in stop)
        _, alone = grow([[token] for token in tokens], stop)
        assert (answer.text, answer.tokens, answer.depths) == (alone.text, alone.tokens, alone.depths)


def test_a_stop_token_is_kept_and_not_shown():
    said, answer = grow([TOKENIZER.encode_text("ab")], [], closing=[TOKENIZER.eos_id, -1, -1])
    assert answer.ended == "stop"
    assert said == "ab"
    assert answer.tokens[-1] == TOKENIZER.eos_id
    assert answer.text == "ab"
    assert len(answer.depths) == len(answer.tokens) == 3
