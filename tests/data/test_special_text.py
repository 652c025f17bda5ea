"""Special tokens in a prompt are characters: said once, and otherwise only where they are asked for."""

import logging

import pytest

from sst_jax.data.tokenizer import ByteTokenizer, load_tokenizer
from tests.support.template_folders import TEMPLATES, write_byte_level

TEXT = "<|im_start|>user\nhi<|im_end|>\n"


@pytest.fixture
def tokenizer(tmp_path):
    write_byte_level(tmp_path, TEMPLATES["chatml"])
    return load_tokenizer(tmp_path)


def test_it_is_said_once(tokenizer, caplog):
    with caplog.at_level(logging.WARNING):
        tokenizer.encode("nothing special: <think>, <|im_sta")
        tokenizer.chat([{"role": "user", "content": TEXT}])
        tokenizer.encode(TEXT, parse_special=True)
        assert not caplog.records
        assert tokenizer.encode(TEXT) == [0, *tokenizer.encode_text(TEXT)]
        tokenizer.encode(TEXT)
    (record,) = caplog.records
    assert record.getMessage().startswith("a prompt holds '<|im_start|>', which is read as its characters")
    assert "--chat" in record.getMessage()


@pytest.mark.parametrize("text", [TEXT, f"<s>{TEXT}", "no token at all", "<|im_start|>", ""])
def test_asked_for_they_are_tokens_as_in_transformers(tokenizer, tmp_path, text):
    """One BOS stands before, whether or not the text has it."""
    transformers = pytest.importorskip("transformers")
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
    expected = theirs(text.removeprefix("<s>"))["input_ids"]
    assert tokenizer.encode(text, parse_special=True) == expected
    bare = theirs(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.encode(text, bos=False, parse_special=True) == bare


def test_other_vocabularies_too(caplog):
    byte, text = ByteTokenizer(), "<start_of_turn>a"
    assert byte.encode(text, parse_special=True) == [2, 4, *byte.encode_text("a")]
    assert byte.encode(text)[1:] == byte.encode_text(text) != [4, *byte.encode_text("a")]
    assert "a prompt holds '<start_of_turn>'" in caplog.text
