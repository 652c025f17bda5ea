"""Answers that grow: whatever the pieces, the text is the same, and nothing that was said is taken back."""

import itertools

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from sst_jax.data.tokenizer import ByteTokenizer, SentencePieceTokenizer, load_tokenizer
from sst_jax.inference.detokenizer import IncrementalDetokenizer
from tests.data.test_tokenizer import _small_vocabulary
from tests.support.template_folders import write_metaspace

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


@settings(deadline=None)
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


# ------------------------------------------------------------------------------------- vocabularies that drop a space

TEXTS = ["the capital of France is very nice", "x", "a  b ", "é漢🙂 ok", "one\ntwo  three", ""]


@pytest.fixture(scope="module", params=["first", "legacy", "gguf"])
def spaced(request, tmp_path_factory):
    """Llama-2-style: spaces are "▁", one goes before a text, and decoding takes it off again."""
    if request.param == "gguf":
        tokens, scores, types, facts = _small_vocabulary()
        facts["tokenizer.ggml.add_space_prefix"] = True
        return SentencePieceTokenizer.from_gguf_vocabulary(tokens, scores, types, facts)
    folder = tmp_path_factory.mktemp("spaced")
    write_metaspace(folder, None, legacy=request.param == "legacy")
    return load_tokenizer(folder)


@pytest.mark.parametrize("text", TEXTS)
def test_prompt_and_answer_are_the_whole_text_wherever_it_is_cut(spaced, text):
    tokenizer = spaced
    tokens = tokenizer.encode(text)
    whole = tokenizer.decode(tokens)
    assert whole == text
    for cut in range(len(tokens) + 1):
        prompt, rest = tokens[:cut], tokens[cut:]
        if "\ufffd" in tokenizer.decode(prompt):
            continue  # half a character is in either part none
        answer, said = IncrementalDetokenizer(tokenizer, prompt=prompt), ""
        for place, token in enumerate(rest):
            said += answer.add([token], [1], place == len(rest) - 1)
        assert tokenizer.decode(prompt) + said == whole, (cut, said)
        assert said == answer.text
        assert tokenizer.decode_next(rest, tokenizer.has_text(prompt)) == said


def test_special_tokens_are_no_text(spaced):
    for tokenizer in (spaced, TOKENIZER):
        assert not tokenizer.has_text([])
        assert not tokenizer.has_text([tokenizer.bos_id, tokenizer.eos_id])
        assert tokenizer.has_text([*tokenizer.encode("b"), tokenizer.eos_id])
    # Behind BOS alone an answer is the beginning of a text.
    answer, tokens = IncrementalDetokenizer(spaced, prompt=[spaced.bos_id]), spaced.encode_text("ab")
    assert answer.add(tokens, [1] * len(tokens), True) == "ab"


def test_a_stop_string_may_begin_with_the_space(spaced):
    tokens = spaced.encode_text("b no")
    answer = IncrementalDetokenizer(spaced, [" no"], spaced.encode("a"))
    assert "".join(answer.add([token], [1], False) for token in tokens) == " b"
    assert answer.ended == "stop"
