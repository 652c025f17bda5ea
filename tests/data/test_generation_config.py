"""Stop ids: the union of what the tokenizer, generation_config.json and config.json say, kept wherever a model goes."""

import json

import pytest

from sst_jax.data.generation_config import GenerationConfig, read_generation_config
from sst_jax.data.tokenizer import ByteTokenizer, HuggingFaceTokenizer, SentencePieceTokenizer, load_tokenizer
from sst_jax.data.vocabulary import check_facts
from sst_jax.errors import InputError
from tests.data.test_byte_level import facts as byte_level_facts
from tests.data.test_tokenizer import _small_vocabulary
from tests.support.template_folders import TEMPLATES, write_byte_level


def write(folder, **documents):
    for name, content in documents.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize(
    ("documents", "ids"),
    [
        ({}, ()),
        ({"generation_config": {"eos_token_id": 7}}, (7,)),
        ({"generation_config": {"eos_token_id": [7, 3]}}, (7, 3)),
        ({"config": {"eos_token_id": 9}, "generation_config": {"eos_token_id": [7, 9]}}, (7, 9)),
        ({"config": {"eos_token_id": [9, 8]}}, (9, 8)),
        ({"config": {"text_config": {"eos_token_id": 5}, "eos_token_id": None}}, (5,)),
        ({"config": {"eos_token_id": -1}, "generation_config": {}}, ()),
    ],
)
def test_every_file_of_a_folder_has_a_say(tmp_path, documents, ids):
    assert read_generation_config(write(tmp_path, **documents)).eos_ids == ids
    write_byte_level(tmp_path, TEMPLATES["chatml"])
    # Beside the tokenizer's own "</s>", and the ends of turns and texts that are known by name.
    named = {4, 7, 9, 14, 17}
    assert load_tokenizer(tmp_path).stop_ids == {1, *named, *ids}


@pytest.mark.parametrize("file", ["generation_config", "config"])
@pytest.mark.parametrize("value", ["</s>", [1, "2"], True, 1.5, 2**31, {"a": 1}])
def test_what_is_no_token_is_named(tmp_path, file, value):
    with pytest.raises(InputError, match=rf"{file}\.json: eos_token_id=.*must be a token id"):
        read_generation_config(write(tmp_path, **{file: {"eos_token_id": value}}))
    (tmp_path / f"{file}.json").write_text("[")
    with pytest.raises(InputError, match=rf"{file}\.json"):
        read_generation_config(tmp_path)


@pytest.mark.parametrize("kind", ["byte", "sentencepiece", "huggingface"])
def test_stop_ids_and_sampling_go_into_base_folders_and_exports(tmp_path, kind):
    if kind == "byte":
        tokenizer = ByteTokenizer()
    elif kind == "sentencepiece":
        tokenizer = SentencePieceTokenizer.from_gguf_vocabulary(*_small_vocabulary())
    else:
        write_byte_level(tmp_path, TEMPLATES["chatml"])
        tokenizer = load_tokenizer(tmp_path)
    own, before = tokenizer.stop_ids, tokenizer.digest
    tokenizer.generation = GenerationConfig({"temperature": 0.6, "eos_token_id": 60, "pad_token_id": 3}, (60, 61))
    assert tokenizer.stop_ids == own | {60, 61}
    assert tokenizer.digest != before
    (tmp_path / "base").mkdir()
    for name, data in tokenizer.files().items():
        (tmp_path / "base" / name).write_bytes(data)
    again = load_tokenizer(tmp_path / "base")
    assert (again.stop_ids, again.digest) == (tokenizer.stop_ids, tokenizer.digest)
    for each in (tokenizer, again):
        found = each.generation_config()
        assert found.pop("eos_token_id") == [60, 61, *sorted(own)]
        assert found == {"temperature": 0.6, "pad_token_id": 3, "bos_token_id": tokenizer.bos_id}


def test_settings_that_change_no_ends_leave_the_digest(tmp_path):
    """So that what was begun before they were read is still the same."""
    write_byte_level(tmp_path, TEMPLATES["chatml"])
    before = load_tokenizer(tmp_path).digest
    write(tmp_path, generation_config={"eos_token_id": [1, 4], "temperature": 0.6}, config={"eos_token_id": 1})
    assert load_tokenizer(tmp_path).digest == before


def test_ggufs_name_ends_of_turns_and_messages():
    for key in ("eot", "eom"):
        made = HuggingFaceTokenizer.from_gguf_facts(byte_level_facts(**{f"{key}_token_id": 30}))
        assert made.stop_ids == {0, 2, 30}
        tokens, scores, types, facts = _small_vocabulary()
        facts[f"tokenizer.ggml.{key}_token_id"] = 30
        assert SentencePieceTokenizer.from_gguf_vocabulary(tokens, scores, types, facts).stop_ids == {1, 30}
        with pytest.raises(InputError, match=f"has {key} 9999"):
            HuggingFaceTokenizer.from_gguf_facts(byte_level_facts(**{f"{key}_token_id": 9999}))


def test_ggufs_name_what_is_never_chosen():
    made = HuggingFaceTokenizer.from_gguf_facts(byte_level_facts(suppress_tokens=[30, 31]))
    assert made.generation.suppressed == (30, 31)
    assert made.generation_config()["suppress_tokens"] == [30, 31]
    tokens, scores, types, facts = _small_vocabulary()
    assert SentencePieceTokenizer.from_gguf_vocabulary(tokens, scores, types, facts).generation.suppressed == ()
    facts["tokenizer.ggml.suppress_tokens"] = [5]
    assert SentencePieceTokenizer.from_gguf_vocabulary(tokens, scores, types, facts).generation.suppressed == (5,)
    with pytest.raises(InputError, match=r"tokenizer\.ggml\.suppress_tokens is not a list of int"):
        check_facts(byte_level_facts(suppress_tokens="30"))
