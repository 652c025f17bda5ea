"""No id beyond the embedding: words that were added to a tokenizer beside a table that was not resized."""

import logging

import pytest

import sst_jax
from sst_jax.data.loader import prepare
from sst_jax.data.problems import Problem
from sst_jax.data.tokenizer import ByteTokenizer, SentencePieceTokenizer, load_tokenizer
from sst_jax.errors import InputError
from sst_jax.inference.model import Model
from tests.data.test_tokenizer import _small_vocabulary
from tests.support.template_folders import SPECIALS, TEMPLATES, WORDS, write_byte_level

ROWS = len(SPECIALS) + 256  # of a table that WORDS, "<think>" first, lie behind
REFUSED = rf"the token '<think>' has the id {ROWS}, and the model's embedding has {ROWS} rows"


@pytest.fixture
def extended(tmp_path):
    write_byte_level(tmp_path, TEMPLATES["chatml"])
    return load_tokenizer(tmp_path)


def warned(caplog, tokenizer, rows):
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        tokenizer.set_rows(rows)
    return [record.getMessage() for record in caplog.records]


def test_reading_warns_once_and_an_id_is_refused_when_it_is_made(extended, caplog):
    (message,) = warned(caplog, extended, ROWS)
    assert f"the embedding has {ROWS} rows, and {len(WORDS)} of the tokenizer's tokens" in message
    assert f"'<think>' ({ROWS}), '</think>' ({ROWS + 1})" in message
    assert not warned(caplog, extended, ROWS)
    assert extended.encode("a b")
    assert extended.chat([{"role": "user", "content": "a"}])
    for make in (
        lambda: extended.encode("a <think> b"),
        lambda: extended.encode_text("<think>"),
        lambda: extended.chat([{"role": "user", "content": "<think>"}]),
        lambda: extended.chat([{"role": "user", "content": "<think> </s>"}]),
        lambda: extended.encode_rendered("<|im_start|><think>"),
        lambda: prepare([Problem("x", "why", "<think> so", "5")], extended, 100),
    ):
        with pytest.raises(InputError, match=REFUSED):
            make()


def test_a_table_with_more_rows_is_no_trouble(extended, caplog):
    assert not warned(caplog, extended, ROWS + len(WORDS))
    assert max(extended.encode("</tool_response>")) == ROWS + len(WORDS) - 1


def test_a_templates_own_tokens_count_and_unused_ones_do_not(tmp_path, caplog):
    """Gemma's image token lies behind the table of its text models, and nothing but a picture would yield it."""
    write_byte_level(tmp_path, TEMPLATES["chatml"], more=["<|image|>", "<|think|>"])
    tokenizer = load_tokenizer(tmp_path)
    assert not warned(caplog, tokenizer, ROWS + len(WORDS))
    write_byte_level(tmp_path, TEMPLATES["chatml"] + "<|think|>", more=["<|image|>", "<|think|>"])
    tokenizer = load_tokenizer(tmp_path)
    (message,) = warned(caplog, tokenizer, ROWS + len(WORDS))
    assert "and 1 of the tokenizer's tokens" in message
    with pytest.raises(InputError, match=r"the token '<\|think\|>' has the id"):
        tokenizer.chat([{"role": "user", "content": "x"}])


def test_ends_beyond_the_table(extended, caplog):
    """A stop id that cannot be drawn is warned of; training would have to write it."""
    extended._eos_id = ROWS + 1
    extended.pad_id = ROWS
    extended.template = None
    (message,) = warned(caplog, extended, ROWS)
    assert "'</think>'" in message
    assert extended.pad_id < ROWS  # it fills rows up, where no weight may be not a number
    assert ROWS + 1 in extended.stop_ids
    with pytest.raises(InputError, match="the token '</think>' has the id"):
        prepare([Problem("x", "why", "so", "5")], extended, 100)


def test_other_vocabularies():
    byte = ByteTokenizer()
    byte.set_rows(200)
    assert byte.encode("a")
    with pytest.raises(InputError, match="the token '<0xC3>' has the id 201"):
        byte.encode("\u00e9")
    without = ByteTokenizer()
    without.set_rows(2)
    with pytest.raises(InputError, match="the token '<bos>' has the id 2"):
        without.encode("")
    pieces = SentencePieceTokenizer.from_gguf_vocabulary(*_small_vocabulary())
    pieces.set_rows(265)
    with pytest.raises(InputError, match="the token '▁ab' has the id 265"):
        pieces.encode(" ab")


def test_models_refuse_and_the_rest_is_answered(tmp_path, caplog):
    tiny = sst_jax.load("random:tiny")
    write_byte_level(tmp_path / "tokenizer", TEMPLATES["chatml"])
    rows = tiny.config.backbone.vocab_size
    model = Model(tiny.config, tiny.params, load_tokenizer(tmp_path / "tokenizer"))
    with pytest.raises(InputError, match=rf"tokens must be in \[0, {rows}\)"):
        model.generate(["\u2028 <think>"], max_new_tokens=1)
    with caplog.at_level(logging.WARNING):
        opened = sst_jax.load(model.save(tmp_path / "base"))
    assert f"the embedding has {rows} rows" in caplog.text
    with pytest.raises(InputError, match="the token '<think>' has the id"):
        opened.generate(["a <think>"], max_new_tokens=1)
    with pytest.raises(InputError, match="the token '<think>' has the id"):
        opened.generate(["a <think>"], max_new_tokens=1, chat=True)
    assert len(opened.generate(["a"], max_new_tokens=2)[0].tokens) == 2
