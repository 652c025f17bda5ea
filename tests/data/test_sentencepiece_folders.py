"""SentencePiece models in folders: exported with a prefixed space, and found without tokenizer.json."""

import json
import random

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from sst_jax.data import vocabulary as vocabularies
from sst_jax.data.tokenizer import SentencePieceTokenizer, load_tokenizer
from sst_jax.errors import InputError
from tests.data.test_tokenizer import PROPERTY, _small_vocabulary, _store


@PROPERTY
@given(text=st.text("ab \u00e9<e>/.", max_size=12))
@example(text="")
@example(text=" ab  b")
@example(text="<e>/a b.  <e>")
@example(text="  a  b")
def test_a_model_that_prefixes_a_space_is_exported(prefixing, text):
    """transformers gives the same ids and text, and so does the export when it is read here."""
    ours, theirs, again = prefixing
    ids = ours.encode(text)
    assert theirs(text, split_special_tokens=True)["input_ids"] == again.encode(text) == ids
    assert theirs.decode(ids, skip_special_tokens=True) == again.decode(ids) == ours.decode(ids)
    messages = [{"role": "user", "content": text}, {"role": "assistant", "content": "b"}]
    assert again.chat(messages) == ours.chat(messages)


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "user-defined"])
def prefixing(request, tmp_path_factory):
    """(ours, transformers', ours of the export)."""
    transformers = pytest.importorskip("transformers")
    tokens, scores, types, facts = _small_vocabulary()
    facts |= {
        "tokenizer.ggml.add_space_prefix": True,
        "tokenizer.chat_template": "{% for m in messages %}{{ bos_token }}{{ m.content }}{{ eos_token }}{% endfor %}",
    }
    if request.param:  # pieces that are cut out of a text, spaces and a full stop among them
        tokens += ["<e>", "<e>/", "a b", "."]
        scores, types = scores + [0.0] * 4, types + [vocabularies.USER_DEFINED] * 4
    else:
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


def test_a_model_that_no_tokenizer_json_can_be_is_refused():
    """Cut out before the model, pieces would be taken whole, and so would "abc", which joining never makes."""
    tokens, scores, types, facts = _small_vocabulary()
    facts |= {"tokenizer.ggml.add_space_prefix": True}
    made = SentencePieceTokenizer.from_gguf_vocabulary([*tokens, "bb\u00e9"], [*scores, -3.0], [*types, 1], facts)
    with pytest.raises(InputError, match="not joined to the piece 'bb\u00e9'"):
        made.export_files()


def test_the_llama_2_way_with_user_defined_pieces_is_sentencepieces_own(tmp_path):
    """A trained model with pieces of the user's own, whose export transformers reads."""
    sentencepiece, transformers = pytest.importorskip("sentencepiece"), pytest.importorskip("transformers")
    (tmp_path / "corpus.txt").write_text("the cat sat on the mat and went to Paris\n" * 50)
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "corpus.txt"), model_prefix=str(tmp_path / "spm"), vocab_size=300, model_type="bpe",
        byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False, minloglevel=2,
        user_defined_symbols=["<|user|>", "<tool>", "  ", "at"],
    )  # fmt: skip
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "spm.model"))
    ours = SentencePieceTokenizer((tmp_path / "spm.model").read_bytes())
    (tmp_path / "export").mkdir()
    folder = _store(ours.export_files(), tmp_path / "export")
    read = transformers.AutoTokenizer.from_pretrained(folder)
    words = ["the", " cat", "<|user|>", "<tool>", "  ", " ", "mat", "\u00e9", "<tool", "\n", "at", "<|user|><tool>"]
    rng = random.Random(0)
    texts = ["", *words, *("".join(rng.choices(words, k=rng.randrange(2, 9))) for _ in range(300))]
    for text in texts:
        expected = theirs.encode(text, add_bos=True)
        assert read(text, split_special_tokens=True)["input_ids"] == ours.encode(text) == expected, text
        assert read.decode(expected, skip_special_tokens=True) == theirs.decode(expected) == ours.decode(expected), text
