"""SentencePiece models in folders: exported with a prefixed space, and found without tokenizer.json."""

import json

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from sst_jax.data import vocabulary as vocabularies
from sst_jax.data.tokenizer import SentencePieceTokenizer, load_tokenizer
from sst_jax.errors import InputError
from tests.data.test_tokenizer import PROPERTY, _small_vocabulary, _store


@PROPERTY
@given(text=st.text("ab \u00e9<e>/", max_size=12))
@example(text="")
@example(text=" ab  b")
def test_a_model_that_prefixes_a_space_is_exported(prefixing, text):
    """transformers gives the same ids and text, and so does the export when it is read here."""
    ours, theirs, again = prefixing
    ids = ours.encode(text)
    assert theirs(text, split_special_tokens=True)["input_ids"] == again.encode(text) == ids
    assert theirs.decode(ids, skip_special_tokens=True) == again.decode(ids) == ours.decode(ids)
    messages = [{"role": "user", "content": text}, {"role": "assistant", "content": "b"}]
    assert again.chat(messages) == ours.chat(messages)


@pytest.fixture(scope="module")
def prefixing(tmp_path_factory):
    """(ours, transformers', ours of the export)."""
    transformers = pytest.importorskip("transformers")
    tokens, scores, types, facts = _small_vocabulary()
    facts |= {
        "tokenizer.ggml.add_space_prefix": True,
        "tokenizer.chat_template": "{% for m in messages %}{{ bos_token }}{{ m.content }}{{ eos_token }}{% endfor %}",
    }
    with pytest.raises(InputError, match="prefixes a space and has user-defined pieces cannot be"):
        SentencePieceTokenizer.from_gguf_vocabulary(tokens, scores, types, facts).export_files()
    types[types.index(vocabularies.USER_DEFINED)] = vocabularies.NORMAL
    tokens[tokens.index("  ")] = "▁b"
    ours = SentencePieceTokenizer.from_gguf_vocabulary(tokens, scores, types, facts)
    folder = _store(ours.export_files(), tmp_path_factory.mktemp("prefixing"))
    return ours, transformers.AutoTokenizer.from_pretrained(folder), load_tokenizer(folder)


def test_a_folder_with_tokenizer_model_alone(tmp_path):
    """transformers' other files say whether BOS goes in front, and must not name what the model lacks."""
    tokens, scores, types, facts = _small_vocabulary()
    made = SentencePieceTokenizer.from_gguf_vocabulary(tokens, scores, types, facts)
    folder = _store({"tokenizer.model": made.files()["tokenizer.model"]}, tmp_path)
    assert load_tokenizer(folder).encode("ab") == made.encode("ab")

    def saying(**config):
        (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": {"content": "<bos>"}, **config}))
        return load_tokenizer(folder)

    assert saying(eos_token="<eos>").add_bos
    assert not saying(add_bos_token=False).add_bos
    template = "{% for m in messages %}<|im_start|>{{ m.content }}{% endfor %}"
    padded = {"266": {"content": "[PAD]"}}  # which nothing writes
    assert saying(added_tokens_decoder=padded).encode("ab") == made.encode("ab")
    lacks = r"lacks tokenizer\.json, and its tokenizer\.model the token '<\|im_"
    for config in (
        {"eos_token": "<|im_end|>"},
        {"added_tokens_decoder": {"266": {"content": "<|im_start|>"}}, "chat_template": template},
    ):
        with pytest.raises(InputError, match=lacks):
            saying(**config)
    (folder / "added_tokens.json").write_text('{"<|im_start|>": 266}')
    with pytest.raises(InputError, match=lacks):
        saying(chat_template=template)
    with pytest.raises(InputError, match="add_bos_token='x' must be true or false"):
        saying(add_bos_token="x")
