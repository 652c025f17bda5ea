"""What an adapter's folder brings of tokenizer and template comes before its base's; what does not fit is refused."""

import json
import shutil

import pytest

from sst_jax.data.tokenizer import ByteTokenizer, adapter_tokenizer, load_tokenizer
from sst_jax.errors import InputError
from tests.support.template_folders import SPECIALS, TEMPLATES, WORDS, write_byte_level

HI = [{"role": "user", "content": "hi"}]
ROWS = len(SPECIALS) + 256 + len(WORDS)


@pytest.fixture
def base(tmp_path):
    write_byte_level(tmp_path / "base", TEMPLATES["chatml"])
    found = load_tokenizer(tmp_path / "base")
    found.set_rows(ROWS)
    return found


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "adapter").mkdir()
    return tmp_path / "adapter"


def test_without_any_it_is_the_bases(base, folder):
    before = base.digest
    assert adapter_tokenizer(folder, base) is base
    assert base.digest == before


def test_a_template_alone_is_that_of_the_bases_vocabulary(base, folder, tmp_path):
    transformers = pytest.importorskip("transformers")
    (folder / "chat_template.jinja").write_text(TEMPLATES["llama3"])
    found = adapter_tokenizer(folder, base)
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path / "base")
    expected = theirs.apply_chat_template(HI, chat_template=TEMPLATES["llama3"], add_generation_prompt=True)
    assert found.chat(HI) == expected["input_ids"]
    # A model that is saved keeps it.
    (tmp_path / "saved").mkdir()
    for name, data in found.files().items():
        (tmp_path / "saved" / name).write_bytes(data)
    assert load_tokenizer(tmp_path / "saved").chat(HI) == found.chat(HI)
    byte = adapter_tokenizer(folder, ByteTokenizer())
    assert byte.chat(HI)[0] == byte.bos_id
    (tmp_path / "byte").mkdir()
    for name, data in byte.files().items():
        (tmp_path / "byte" / name).write_bytes(data)
    assert load_tokenizer(tmp_path / "byte").chat(HI) == byte.chat(HI)


def test_a_tokenizer_with_its_template_and_ends(base, folder):
    write_byte_level(folder, TEMPLATES["llama3"])
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 12}))
    found = adapter_tokenizer(folder, base)
    assert found.chat(HI) == load_tokenizer(folder).chat(HI) != base.chat(HI)
    assert found.stop_ids == base.stop_ids | {12}
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>", "bos_token": "<s>"}))
    assert adapter_tokenizer(folder, base).chat(HI) == base.chat(HI)  # the base's template, where it brings none


def test_words_that_were_added_fit_into_rows_that_are_there(base, folder):
    write_byte_level(folder, TEMPLATES["chatml"], more=["<|tool|>"])
    wider = load_tokenizer(folder)
    wider.set_rows(ROWS + 1)
    assert adapter_tokenizer(folder, wider).piece_id("<|tool|>") == ROWS
    write_byte_level(folder, TEMPLATES["chatml"] + "<|tool|>", more=["<|tool|>"])
    with pytest.raises(InputError, match=rf"adapter: its tokenizer does not fit: '<\|tool\|>' has the id {ROWS}, and"):
        adapter_tokenizer(folder, base)
    # What the base lacks a row for as well is no fault of the adapter.
    shutil.copytree(folder, folder.parent / "wide")
    lacking = load_tokenizer(folder.parent / "wide")
    lacking.set_rows(ROWS)
    assert adapter_tokenizer(folder, lacking).piece_id("<|tool|>") == ROWS


def test_another_vocabulary_is_refused(base, folder):
    write_byte_level(folder, TEMPLATES["chatml"])
    content = json.loads((folder / "tokenizer.json").read_text())
    ids = content["model"]["vocab"]
    ids["a"], ids["b"] = ids["b"], ids["a"]
    (folder / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match=r"adapter: its tokenizer does not fit: '[ab]' has the id \d+, and \d+ in the"):
        adapter_tokenizer(folder, base)
    for name, data in ByteTokenizer().export_files().items():
        (folder / name).write_bytes(data)
    with pytest.raises(InputError, match="no piece is the base's"):
        adapter_tokenizer(folder, base)
