"""Byte pairs of text, with bytes for what they lack: Gemma 4's GGUF vocabularies, against transformers' tokenizer."""

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from sst_jax.data.tokenizer import HuggingFaceTokenizer, load_tokenizer
from sst_jax.errors import InputError
from tests.support.tiny_files import gemma4

TEXT = st.one_of(st.text(), st.text("abc  \n\t<>▁é😀", max_size=40))
QUICK = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def facts(**changes):
    return {f"tokenizer.ggml.{key}": value for key, value in gemma4(**changes).items() if value is not None}


@pytest.fixture(scope="module")
def ours():
    return HuggingFaceTokenizer.from_gguf_facts(facts())


@pytest.fixture(scope="module")
def theirs():
    transformers = pytest.importorskip("transformers")
    vocabulary = gemma4()
    return transformers.GemmaTokenizer(
        vocab={token: index for index, token in enumerate(vocabulary["tokens"])},
        merges=[tuple(merge.split(" ")) for merge in vocabulary["merges"]],
    )


@QUICK
@given(text=TEXT)
@example(text="ab ab\n\n\nab\n \n aab  abab")
@example(text=" Zwölf 😀\n\tBoxkämpfer")
@example(text="\n" * 5)
def test_ids_are_those_of_transformers(ours, theirs, text):
    ids = ours.encode(text)
    assert ids[0] == 2
    assert ids[1:] == theirs(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    assert ours.decode(ids) == text.replace("▁", " ")


def test_a_copy_of_its_files_is_the_same_tokenizer(ours, tmp_path):
    for name, data in ours.files().items():
        (tmp_path / name).write_bytes(data)
    again, text = load_tokenizer(tmp_path), "a ab\n\nZwölf"
    assert again.encode(text) == ours.encode(text)
    assert (again.bos_id, again.eos_id, again.pad_id, again.add_bos) == (2, 1, 0, True)


def test_texts_begin_with_bos_unless_the_file_denies_it():
    silent, without = (HuggingFaceTokenizer.from_gguf_facts(facts(add_bos_token=said)) for said in (None, False))
    assert silent.encode("a")[0] == 2
    assert without.encode("a") == silent.encode("a")[1:]


def test_merges_must_be_of_pieces():
    with pytest.raises(InputError, match="the merge 'a z', which is not of two of its tokens"):
        HuggingFaceTokenizer.from_gguf_facts(facts(merges=["a z"]))
