"""Byte-level BPE rebuilt from GGUF metadata: against a naive reading, against transformers, and its chat templates."""

import itertools
import json
import unicodedata
from pathlib import Path

import pytest
import regex
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from sst_jax.data.documents import Problem
from sst_jax.data.prompts import render
from sst_jax.data.tokenizer import HuggingFaceTokenizer, load_tokenizer
from sst_jax.data.vocabulary import SPLITTINGS
from sst_jax.errors import InputError

HARD_TEXTS = [
    "", " ", "   leading and trailing   ", "a\tb\t\tc", "\n\n\n\nx\n\n y", "tab\t \n mixed \n\t\n", "\r\nwindows\r\n",
    "1234567890 3.14159 1,000,000 -7", "####  42", "$5 + 20% = ½ ≤ √2 x² Ⅷ ٣٤", "it's I'LL they'Re 'tis 's",
    "Привет, мир! 你好，世界 こんにちは 안녕 مرحبا שלום", "😀👩‍👩‍👧‍👦🇩🇪👍🏽", "e\u0301 é ﬁ ſ K",
    "\x00\x01\x7f", "\u200b\ufeff\u2028",
    "def f(x):\n    return x**2\n\n\nclass A:\n\tpass", " " * 40, "\n" * 40, "<<48/2=24>>24", "<|im_start|>", "a" * 300,
]  # fmt: skip
TEXT = st.one_of(st.text(), st.text("the 12'sTL  \n\n\té😀中.,-½\u0301e\r<|>", max_size=60))
PROPERTY = settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

# ------------------------------------------------------------------------------------------------- a small vocabulary

_PRINTABLE = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
_OTHERS = [byte for byte in range(256) if byte not in _PRINTABLE]
SPELL = {byte: chr(byte) for byte in _PRINTABLE} | {byte: chr(256 + place) for place, byte in enumerate(_OTHERS)}
MERGES = [
    "t h", "Ġ t", "th e", "Ġt h", "Ġth e", "Ġ Ġ", "ĠĠ ĠĠ", "1 2", "Ġ 1", "12 3", "' s", "Ċ Ċ", "e Ì", "eÌ ģ", "Ã ©",
    "ĉ ĉ", "L L", ". .", "< |",
]  # fmt: skip
CONTROL = ["<|text|>", "<|start|>", "<|im_end|>"]
WHOLE = "ttt"  # a token that no merge makes
TEMPLATE = (
    "{{ '<|text|>' }}{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "{{ '<|start|>' + message['role'] + '\\n' + message['content'] | trim + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant\\n' }}{% endif %}"
)
PATTERNS = {
    "smollm": r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    "llama-bpe": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
    "qwen2": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+",
}
PATTERNS |= dict.fromkeys(("llama3", "llama-v3", "falcon3", "dbrx"), PATTERNS["llama-bpe"])
PATTERNS["refact"] = PATTERNS["smollm"]
# As the tokenizer.json of Mistral Nemo and of GPT-4o's vocabulary have them.
PATTERNS["tekken"] = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PATTERNS["gpt-4o"] = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
BYTE_LEVEL = [pre for pre, splitting in SPLITTINGS.items() if not splitting.byte_fallback]
WHOLE_FIRST = ("llama-bpe", "llama3", "llama-v3", "falcon3", "tekken")  # a word that is a token is that token
# llama.cpp's, each of which cuts what those before it left whole.
DEFAULT = (
    r"[\p{P}\$\+<=>\^~\|]+", r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)", r"\p{N}+",
    "[0-9][0-9][0-9]",
)  # fmt: skip


def words(text, pre):
    """Text cut as `pre` says."""
    if pre in ("smollm", "refact"):
        return [word for part in regex.findall(r"\p{N}|[^\p{N}]+", text) for word in regex.findall(PATTERNS[pre], part)]
    parts = [text]
    for pattern in DEFAULT if pre == "default" else [PATTERNS[pre]]:
        parts = [piece for part in parts for piece in regex.split(f"({pattern})", part, flags=regex.V0) if piece]
    return parts


def facts(pre="smollm", **changes):
    tokens = [*CONTROL, *SPELL.values(), *(merge.replace(" ", "") for merge in MERGES), WHOLE]
    found = {
        "model": "gpt2", "pre": pre, "tokens": tokens, "merges": MERGES, "bos_token_id": 0, "eos_token_id": 0,
        "token_type": [3 if token in CONTROL else 1 for token in tokens], "add_bos_token": False,
    }  # fmt: skip
    return {f"tokenizer.ggml.{key}": value for key, value in (found | changes).items() if value is not None} | {
        "tokenizer.chat_template": TEMPLATE
    }


@pytest.fixture(scope="module")
def small():
    return {pre: HuggingFaceTokenizer.from_gguf_facts(facts(pre)) for pre in BYTE_LEVEL}


def naive_ids(text, pre):
    """Words by the pattern that llama.cpp and the models' own files have, merged pair by pair in MERGES' order."""
    tokens = facts()["tokenizer.ggml.tokens"]
    text = unicodedata.normalize("NFC", text) if pre == "qwen2" else text
    ids = []
    for word in words(text, pre):
        pieces = [SPELL[byte] for byte in word.encode()]
        if pre in WHOLE_FIRST and "".join(pieces) in tokens[3:]:
            pieces = ["".join(pieces)]
        while len(pieces) > 1:
            rank, at = min(
                (MERGES.index(f"{a} {b}") if f"{a} {b}" in MERGES else len(MERGES), place)
                for place, (a, b) in enumerate(itertools.pairwise(pieces))
            )
            if rank == len(MERGES):
                break
            pieces[at : at + 2] = ["".join(pieces[at : at + 2])]
        ids += [tokens.index(piece) for piece in pieces]
    return ids


@pytest.mark.parametrize("pre", BYTE_LEVEL)
@PROPERTY
@given(text=TEXT)
@example(text="the  the 123 12½ it's THEY'LL\n\n\r\n  x\t\t ttt..<|")
@example(text="e\u0301 <|im_end|> <|start|>")
def test_ids_are_those_of_a_naive_reading(small, pre, text):
    tokenizer = small[pre]
    ids = tokenizer.encode(text)
    assert ids == naive_ids(text, pre)
    assert tokenizer.decode(ids) == (unicodedata.normalize("NFC", text) if pre == "qwen2" else text)


def test_facts_of_the_small_vocabulary(small, tmp_path):
    tokenizer = small["smollm"]
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, tokenizer.add_bos) == (0, 0, 0, False)
    assert (tokenizer.turn_end_id, tokenizer.stop_ids) == (2, {0, 2})
    assert tokenizer.vocab_size == len(facts()["tokenizer.ggml.tokens"])
    for name, data in tokenizer.files().items():
        (tmp_path / name).write_bytes(data)
    again = load_tokenizer(tmp_path)
    assert again.digest == tokenizer.digest
    assert again.encode("the 12") == tokenizer.encode("the 12")
    assert again.chat([{"role": "user", "content": "x"}]) == tokenizer.chat([{"role": "user", "content": "x"}])


def test_bos_goes_in_front_where_the_file_says_so():
    tokenizer = HuggingFaceTokenizer.from_gguf_facts(facts(add_bos_token=True))
    assert tokenizer.add_bos
    assert tokenizer.encode("the") == [0, *tokenizer.encode_text("the")]
    without = HuggingFaceTokenizer.from_gguf_facts(facts(bos_token_id=None))
    assert (without.bos_id, without.add_bos) == (None, False)
    assert without.encode("the") == tokenizer.encode_text("the")


@pytest.mark.parametrize(
    ("pre", "adds"),
    [
        ("llama-bpe", True),
        ("llama3", True),
        ("llama-v3", True),
        ("smollm", False),
        ("qwen2", False),
        ("default", False),
        ("tekken", True),
        ("gpt-4o", False),
        ("dbrx", False),
        ("refact", False),
    ],
)
def test_files_that_do_not_say_begin_with_bos_as_in_llama_cpp(pre, adds):
    """And what is written of it says so: the tokenizer's files, and an export's ids in transformers."""
    tokenizer = HuggingFaceTokenizer.from_gguf_facts(facts(pre, add_bos_token=None))
    assert tokenizer.add_bos is adds
    assert tokenizer.encode("the") == [0] * adds + tokenizer.encode_text("the")
    assert json.loads(tokenizer.export_files()["tokenizer_config.json"])["add_bos_token"] is adds
    assert HuggingFaceTokenizer.from_gguf_facts(facts(pre, add_bos_token=not adds)).add_bos is not adds


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pre": "deepseek-llm"}, "tokenizer.ggml.pre='deepseek-llm' is unsupported; known are 'smollm'"),
        ({"pre": None}, "tokenizer.ggml.pre=None"),
        ({"token_type": [1]}, "and 1 types"),
        ({"merges": ["t h e"]}, "merge 't h e', which is not of two"),
        ({"merges": ["q q"]}, "merge 'q q'"),
        ({"eos_token_id": 9999}, "has eos 9999"),
        ({"eos_token_id": None}, "names no eos_token"),
    ],
)
def test_what_cannot_be_rebuilt_is_named(changes, message):
    with pytest.raises(InputError, match=message):
        HuggingFaceTokenizer.from_gguf_facts(facts(**changes))
    doubled = facts()
    doubled["tokenizer.ggml.tokens"] = [*doubled["tokenizer.ggml.tokens"][:-1], "th"]
    with pytest.raises(InputError, match="different ones"):
        HuggingFaceTokenizer.from_gguf_facts(doubled)


# -------------------------------------------------------------------------------------------------------------- chat


@pytest.mark.parametrize("prompt", [True, False])
def test_chat_is_the_template_and_text_is_never_a_control_token(small, prompt):
    tokenizer = small["smollm"]
    ids = tokenizer.chat([{"role": "user", "content": " the <|im_end|>\n<|start|> \ue000 "}], prompt)
    text = tokenizer.encode_text
    turn = [0, 1, *text("user\nthe <|im_end|>\n<|start|> \ue000"), 2, *text("\n")]
    assert ids == turn + ([1, *text("assistant\n")] if prompt else [])


@pytest.mark.parametrize(("roles", "message"), [("", "at least one message"), ("system user", "no sys")])
def test_chat_refuses_what_the_template_refuses(small, roles, message):
    with pytest.raises(InputError, match=message):
        small["smollm"].chat([{"role": role, "content": "x"} for role in roles.split()])


@pytest.mark.parametrize("roles", ["assistant", "user user", "developer tool user"])
def test_chat_takes_what_the_template_takes(small, roles):
    text = small["smollm"].encode_text
    turns = [[1, *text(f"{role}\nx"), 2, *text("\n")] for role in roles.split()]
    ids = small["smollm"].chat([{"role": role, "content": "x"} for role in roles.split()], False)
    assert ids == [0, *(index for turn in turns for index in turn)]


def test_chat_needs_a_template():
    bare = facts()
    del bare["tokenizer.chat_template"]
    with pytest.raises(InputError, match="chat needs a template"):
        HuggingFaceTokenizer.from_gguf_facts(bare).chat([{"role": "user", "content": "x"}])


def test_examples_for_training_end_their_turn(small):
    tokenizer = small["smollm"]
    example = render(Problem("p", "how many?", "two", "2"), tokenizer, "chat")
    answer = example.tokens[example.answer_mask].tolist()
    assert answer == [*tokenizer.encode_text("two\n#### 2"), tokenizer.turn_end_id]
    prompt = tokenizer.chat([{"role": "user", "content": "how many?"}])
    assert example.tokens[: len(prompt)].tolist() == prompt
    # A template that ends its turns with what ends a text has no piece of its own for it.
    shared = facts(eos_token_id=0)
    shared["tokenizer.ggml.tokens"] = [
        piece.replace("<|im_end|>", "<|end|>") for piece in facts()["tokenizer.ggml.tokens"]
    ]
    other = HuggingFaceTokenizer.from_gguf_facts(shared)
    assert other.turn_end_id == other.eos_id == 0
    example = render(Problem("p", "how many?", "two", "2"), other, "chat")
    assert example.tokens[example.answer_mask][-1] == 0


# ------------------------------------------------------------------------------------------------------ SmolLM2's own


@pytest.fixture(scope="module")
def theirs(smol_path):
    pytest.importorskip("torch", reason="transformers reads GGUF files only with torch")
    transformers = pytest.importorskip("transformers")
    return transformers.AutoTokenizer.from_pretrained(smol_path.parent, gguf_file=smol_path.name)


def test_smol_facts(smol):
    assert (smol.vocab_size, smol.bos_id, smol.eos_id, smol.pad_id, smol.add_bos) == (49_152, 1, 2, 2, False)
    assert smol.stop_ids == {0, 2}
    assert smol.encode("12345") == [33, 34, 35, 36, 37]  # digits one by one


def test_smol_ids_equal_transformers_reading_of_the_same_file(smol, theirs, gsm8k_texts):
    """transformers leaves out that SmolLM cuts numbers into characters first, so it is given the cut text."""

    def expected(text):
        parts = regex.findall(r"\p{N}|[^\p{N}]+", text)
        return [index for part in parts for index in theirs(part, add_special_tokens=False)["input_ids"]]

    texts = [*gsm8k_texts, *(text for text in HARD_TEXTS if "<|" not in text), "".join(gsm8k_texts[:30])]
    different = [text for text in texts if smol.encode(text) != expected(text)]
    assert len(texts) > 2000
    assert not different, f"{len(different)} of {len(texts)} texts differ, such as {different[0]!r}"


@PROPERTY
@given(text=TEXT)
def test_smol_round_trip(smol, text):
    """But for characters with one of the few bytes that this vocabulary lacks: they vanish, as in the original."""
    lacking = {byte for byte in range(256) if smol.piece_id(SPELL[byte]) is None}
    assert lacking <= {*range(0x01, 0x20), *range(0xF1, 0x100), 0xC0, 0xC1, 0x7F}
    text = "".join(character for character in text if not lacking & set(character.encode()))
    ids = smol.encode(text)
    assert smol.decode(ids) == text
    assert not set(ids) & {0, 1, 2}


@pytest.mark.slow
def test_smol_chat_equals_transformers(smol, theirs):
    for messages in (
        [{"role": "user", "content": "\n What is 2+2? "}],
        [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": "b 1"},
            {"role": "user", "content": "c"},
        ],
    ):
        for prompt in (True, False):
            templated = theirs.apply_chat_template(messages, add_generation_prompt=prompt)["input_ids"]
            assert smol.chat(messages, prompt) == list(templated)


def test_smol_export_is_read_by_transformers(smol, tmp_path: Path):
    transformers = pytest.importorskip("transformers")
    for name, data in smol.export_files().items():
        (tmp_path / name).write_bytes(data)
    read = transformers.AutoTokenizer.from_pretrained(tmp_path)
    text = " ".join(text for text in HARD_TEXTS if "<|" not in text)
    assert read(text)["input_ids"] == smol.encode(text)
    assert (read.bos_token_id, read.eos_token_id, read.pad_token_id) == (1, 2, 2)
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["chat_template"].startswith("{% for message")
