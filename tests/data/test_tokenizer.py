"""Tokenizers: Gemma's GGUF vocabulary against independent readers, round trips, chat, storing, exports, errors."""

import json
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from sst_jax.data import vocabulary as vocabularies
from sst_jax.data.gguf_header import metadata_of
from sst_jax.data.tokenizer import (
    ByteTokenizer,
    HuggingFaceTokenizer,
    SentencePieceTokenizer,
    Tokenizer,
    load_tokenizer,
)
from sst_jax.errors import InputError
from sst_jax.families.registry import PRESETS

HARD_TEXTS = [
    "", " ", "  ", "   leading and trailing   ", "a\tb\t\tc", "\n", "\n\n\n\nx\n\n y", "tab\t \n mixed \n\t\n",
    "\r\nwindows", "1234567890 3.14159 1,000,000 -7", "$5 + 20% = ½ ≤ √2",
    "Привет, мир! 你好，世界 こんにちは 안녕 مرحبا שלום", "😀👩‍👩‍👧‍👦🇩🇪👍🏽 emoji", "e\u0301 é ﬁ ſ K", "\x00\x01\x7f",
    "\u200b\u200d\ufeff\u2028", "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 🜚 \U0010ffff", "<b>bold</b> <table><tr><td>", "[multimodal]",
    "def f(x):\n    return x**2\n\n\nclass A:\n\tpass", " " * 40, "\n" * 40, "\t" * 40, "a" * 300, "aaa aaaa aaaaa",
    "####  42", "<<48/2=24>>24",
]  # fmt: skip
# Text that lands on SentencePiece's special cases more often than arbitrary unicode does.
TEXT = st.one_of(st.text(), st.text("ab  \n\n\t<>b/é😀中1234.,$'\"\r\0theing-=#", max_size=60)).filter(
    lambda text: vocabularies.SPACE not in text  # a literal U+2581 is SentencePiece's space; it cannot round-trip
)
PROPERTY = settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "  What is 2+2?\nThink. \n"},
    {"role": "assistant", "content": "4"},
    {"role": "user", "content": "And 3+3?"},
]


def _same_ids(ours: Tokenizer, theirs, texts: list[str]) -> None:
    different = [text for text in texts if ours.encode(text) != list(theirs(text))]
    assert not different, f"{len(different)} of {len(texts)} texts differ, such as {different[0]!r}"


def _store(files: dict[str, bytes], folder: Path) -> Path:
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return folder


# ------------------------------------------------------------------------------------- Gemma's vocabulary from GGUF


def test_gguf_metadata_equals_the_gguf_packages_reading(tmp_path):
    gguf = pytest.importorskip("gguf")
    path = tmp_path / "small.gguf"
    writer = gguf.GGUFWriter(path, "gemma3")
    writer.add_uint32("gemma3.block_count", 18)
    writer.add_float32("gemma3.eps", 1e-6)
    writer.add_bool("tokenizer.ggml.add_bos_token", True)
    writer.add_int8("small", -3)
    writer.add_uint64("large", 2**40)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(["<pad>", "▁the", "\n\n", "😀"])
    writer.add_token_scores([-1000.0, -1.5, 0.0, -3.0])
    writer.add_token_types([3, 1, 4, 1])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    fields = {k: f.contents() for k, f in gguf.GGUFReader(path).fields.items() if not k.startswith("GGUF.")}
    assert "tokenizer.ggml.tokens" in fields
    found = metadata_of(path)
    assert found.pop("gemma3.eps") == 1e-6 == pytest.approx(fields.pop("gemma3.eps"))
    assert found == fields

    data = path.read_bytes()
    for cut in (0, 3, 10, 24, 40, len(data) // 2, len(data) - 40):
        (tmp_path / "cut.gguf").write_bytes(data[:cut])
        with pytest.raises(InputError, match=r"cut\.gguf"):
            metadata_of(tmp_path / "cut.gguf")
    (tmp_path / "other.gguf").write_bytes(b"PK\3\4" + data[4:])
    with pytest.raises(InputError, match="not a GGUF file"):
        metadata_of(tmp_path / "other.gguf")


def test_gemma_facts(gemma):
    assert (gemma.vocab_size, gemma.pad_id, gemma.eos_id, gemma.bos_id) == (262_144, 0, 1, 2)
    assert gemma.stop_ids == {1, 106}
    assert gemma.piece_id("<start_of_turn>") == 105
    assert gemma.piece_id("no such piece") is None
    # Known ids, from the model's own metadata: double space 138, double newline 108, digits one by one.
    assert gemma.encode("Hello  world\n\n x") == [2, 9259, 138, 12392, 108, 1123]
    assert gemma.encode("12345", bos=False) == [236770, 236778, 236800, 236812, 236810]


@pytest.mark.slow
def test_model_proto_is_what_protobuf_reads(gemma):
    try:
        from sentencepiece import sentencepiece_model_pb2
    except Exception as error:
        pytest.skip(f"sentencepiece's protobuf module does not load here: {error}")
    proto = sentencepiece_model_pb2.ModelProto.FromString(gemma.files()["tokenizer.model"])
    assert proto.trainer_spec.model_type == proto.trainer_spec.BPE
    assert proto.trainer_spec.byte_fallback
    spec = proto.trainer_spec
    assert (spec.unk_id, spec.bos_id, spec.eos_id, spec.pad_id) == (3, 2, 1, 0)
    assert (spec.unk_piece, spec.bos_piece, spec.eos_piece, spec.pad_piece) == ("<unk>", "<bos>", "<eos>", "<pad>")
    assert proto.normalizer_spec.name == "identity"
    assert not proto.normalizer_spec.add_dummy_prefix
    assert not proto.normalizer_spec.remove_extra_whitespaces
    read = vocabularies.from_model_proto(proto.SerializeToString())
    assert read.pieces == [piece.piece for piece in proto.pieces]
    assert read.scores == [piece.score for piece in proto.pieces]
    assert read.types == [piece.type for piece in proto.pieces]
    assert (read.unk_id, read.bos_id, read.eos_id, read.pad_id, read.add_dummy_prefix) == (3, 2, 1, 0, False)
    assert vocabularies.from_model_proto(vocabularies.to_model_proto(read)) == read


@pytest.mark.slow
def test_gguf_vocabulary_against_transformers_own_reading(gemma, gguf_path, gsm8k_texts):
    """The oracle: transformers converts the same GGUF by its own code."""
    pytest.importorskip("torch", reason="transformers reads GGUF files only with torch")
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(gguf_path.parent, gguf_file=gguf_path.name)
    # The vocabulary's longest run of spaces is 31. SentencePiece (and llama.cpp) split longer ones as 31 + rest;
    # transformers' conversion makes 16 + rest of them.
    texts = [text for text in gsm8k_texts + HARD_TEXTS if " " * 32 not in text]
    assert len(texts) > 2000
    _same_ids(gemma, lambda text: theirs(text)["input_ids"], texts)
    assert gemma.encode(" " * 40, bos=False) == [gemma.piece_id("▁" * 31), gemma.piece_id("▁" * 9)]
    text = "".join(texts[-30:])
    assert gemma.decode(theirs(text)["input_ids"]) == text


@pytest.mark.slow
def test_export_gives_transformers_the_same_ids(gemma, exported_folder, gsm8k_texts):
    """The tokenizers library is an independent BPE: equal ids prove both the export and the rebuilt SentencePiece."""
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(exported_folder)
    assert len(gsm8k_texts) > 2000
    _same_ids(gemma, lambda text: theirs(text)["input_ids"], gsm8k_texts + HARD_TEXTS)
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id, theirs.unk_token_id) == (2, 1, 0, 3)
    for prompt in (True, False):
        templated = theirs.apply_chat_template(CHAT, add_generation_prompt=prompt)["input_ids"]
        assert gemma.chat(CHAT, add_generation_prompt=prompt) == list(templated)
    text = "x" + "".join(HARD_TEXTS)
    assert theirs.decode(gemma.encode(text), skip_special_tokens=True) == text


@pytest.mark.slow
@PROPERTY
@given(text=TEXT)
@example(text="aaaaaaa  \n\t\n<b> <b>")
def test_gemma_round_trip_and_agreement(gemma, gemma_hf, text):
    ids = gemma.encode(text)
    assert ids[0] == gemma.bos_id
    assert gemma.decode(ids) == text
    assert gemma_hf.encode(text) == ids
    assert gemma_hf.decode(ids) == text


# ------------------------------------------------------------------------------------------- what all of them share


@pytest.fixture(params=["byte", "gemma", "gemma_hf"])
def tokenizer(request) -> Tokenizer:
    return request.getfixturevalue(request.param)


def test_text_never_yields_control_tokens(tokenizer):
    for text in ("<start_of_turn>", "<end_of_turn>", "<eos>", "<bos>", "<pad>", "<unused7>"):
        ids = tokenizer.encode(text, bos=False)
        assert not set(ids) & (tokenizer.stop_ids | {tokenizer.bos_id, tokenizer.piece_id("<start_of_turn>")})
        assert tokenizer.decode(ids) == text


def test_chat_ids(tokenizer):
    text, start, end = tokenizer.encode_text, tokenizer.piece_id("<start_of_turn>"), tokenizer.piece_id("<end_of_turn>")
    question = [{"role": "user", "content": " Say <end_of_turn>! "}]
    expected = [tokenizer.bos_id, start, *text("user\nSay <end_of_turn>!"), end, *text("\n")]
    assert tokenizer.chat(question, add_generation_prompt=False) == expected
    assert tokenizer.chat(question) == [*expected, start, *text("model\n")]
    ids = tokenizer.chat(CHAT)
    assert ids.count(tokenizer.bos_id) == 1
    assert ids.count(start) == 4
    assert ids.count(end) == 3
    assert tokenizer.decode(ids) == ("user\nBe brief.\n\nWhat is 2+2?\nThink.\nmodel\n4\nuser\nAnd 3+3?\nmodel\n")


@pytest.mark.parametrize(
    "roles", ["assistant", "user user", "user system", "system", "", "user model", "system assistant"]
)
def test_chat_refuses_other_orders(byte, roles):
    with pytest.raises(InputError, match="chat"):
        byte.chat([{"role": role, "content": "x"} for role in roles.split()])


def test_decode_drops_specials_and_ids_beyond_the_vocabulary(tokenizer):
    ids = [tokenizer.bos_id, *tokenizer.encode_text("a b"), 3, *sorted(tokenizer.stop_ids), tokenizer.pad_id, 262_150]
    assert tokenizer.decode(ids) == "a b"


def test_broken_utf8_decodes_to_replacement(tokenizer):
    ids = tokenizer.encode_text("\U0010ffff")  # in no vocabulary: four byte tokens
    assert len(ids) == 4
    assert "\ufffd" in tokenizer.decode(ids[:2])


def test_files_read_back_equal(tokenizer, tmp_path):
    again = load_tokenizer(_store(tokenizer.files(), tmp_path))
    assert type(again) is type(tokenizer)
    assert again.digest == tokenizer.digest
    assert again.chat(CHAT) == tokenizer.chat(CHAT)
    for name in ("vocab_size", "bos_id", "eos_id", "pad_id", "stop_ids", "add_bos"):
        assert getattr(again, name) == getattr(tokenizer, name), name


def test_digests_tell_tokenizers_apart(byte, gemma, gemma_hf):
    without_bos = SentencePieceTokenizer(gemma.files()["tokenizer.model"], add_bos=False)
    assert len({byte.digest, gemma.digest, gemma_hf.digest, without_bos.digest}) == 4


# -------------------------------------------------------------------------------------------------- small vocabularies


def _small_vocabulary() -> tuple[list[str], list[float], list[int], dict]:
    tokens = [
        "<pad>",
        "<eos>",
        "<bos>",
        "<unk>",
        *(f"<0x{b:02X}>" for b in range(256)),
        "  ",
        "▁",
        "a",
        "b",
        "ab",
        "▁ab",
    ]
    types = [3, 3, 3, 3, *[6] * 256, 4, 1, 1, 1, 1, 1]
    scores = [0.0] * 261 + [-10.0, -11.0, -12.0, -1.0, -2.0]
    facts = {
        "tokenizer.ggml.model": "llama", "tokenizer.ggml.bos_token_id": 2, "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.ggml.unknown_token_id": 3, "tokenizer.ggml.padding_token_id": 0,
        "tokenizer.ggml.add_space_prefix": False,
    }  # fmt: skip
    return tokens, scores, types, facts


def test_small_vocabulary_follows_scores_spaces_and_bos(tmp_path):
    tokens, scores, types, facts = _small_vocabulary()
    at = {token: index for index, token in enumerate(tokens)}
    plain = SentencePieceTokenizer.from_gguf_vocabulary(tokens, scores, types, facts)
    assert plain.encode("ab ab  b", bos=False) == [at["ab"], at["▁ab"], at["  "], at["b"]]
    assert plain.encode("é", bos=False) == [at["<0xC3>"], at["<0xA9>"]]
    assert plain.encode("a") == [2, at["a"]]
    assert plain.stop_ids == {1}
    with pytest.raises(InputError, match="start_of_turn"):
        plain.chat([{"role": "user", "content": "x"}])

    quiet = SentencePieceTokenizer.from_gguf_vocabulary(
        tokens, scores, types, facts | {"tokenizer.ggml.add_bos_token": False}
    )
    assert quiet.encode("a") == [at["a"]]
    assert load_tokenizer(_store(quiet.files(), tmp_path)).encode("a") == [at["a"]]
    # As llama.cpp does where a file says nothing.
    facts.pop("tokenizer.ggml.add_space_prefix")
    for said in ({}, {"tokenizer.ggml.add_space_prefix": True}):
        prefixing = SentencePieceTokenizer.from_gguf_vocabulary(tokens, scores, types, facts | said)
        assert prefixing.encode("ab") == [2, at["▁ab"]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokenizer.ggml.model": "gpt2"}, "gpt2"),
        ({"tokenizer.ggml.bos_token_id": 10_000}, "bos_id 10000"),
        ({"tokenizer.ggml.unknown_token_id": None}, "unknown_token_id"),
    ],
)
def test_bad_gguf_vocabulary(change, message):
    tokens, scores, types, facts = _small_vocabulary()
    with pytest.raises(InputError, match=message):
        SentencePieceTokenizer.from_gguf_vocabulary(tokens, scores, types, facts | change)
    with pytest.raises(InputError, match=r"266 tokens, 265 scores"):
        SentencePieceTokenizer.from_gguf_vocabulary(tokens, scores[1:], types, facts)


def test_byte_tokenizer(byte):
    assert byte.vocab_size == PRESETS["tiny"].vocab_size
    assert byte.encode("é\n") == [2, 6 + 0xC3, 6 + 0xA9, 6 + 10]
    assert max(byte.encode_text("".join(map(chr, range(0x800))))) < byte.vocab_size
    assert byte.stop_ids == {1, 5}


@PROPERTY
@given(text=st.text())
def test_byte_round_trip(text):
    assert ByteTokenizer().decode(ByteTokenizer().encode(text)) == text


def test_byte_export(byte, tmp_path):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(_store(byte.export_files(), tmp_path))
    _same_ids(byte, lambda text: theirs(text)["input_ids"], [*HARD_TEXTS, "".join(HARD_TEXTS)])
    assert theirs.decode(byte.encode("é  😀\n"), skip_special_tokens=True) == "é  😀\n"
    assert list(theirs.apply_chat_template(CHAT, add_generation_prompt=True)["input_ids"]) == byte.chat(CHAT)


# ----------------------------------------------------------------------------------------------------------- loading


def test_load_names_the_folder_when_there_is_nothing(tmp_path):
    with pytest.raises(InputError, match=f"{tmp_path}.*holds no tokenizer"):
        load_tokenizer(tmp_path)
    with pytest.raises(InputError, match="no such folder"):
        load_tokenizer(tmp_path / "absent")
    with pytest.raises(InputError, match=r"absent\.gguf"):
        load_tokenizer(tmp_path / "absent.gguf")


@pytest.mark.parametrize(
    "files",
    [
        {"sst_tokenizer.json": b"{"},
        {"sst_tokenizer.json": b'{"kind": "quantum"}'},
        {"sst_tokenizer.json": b'{"kind": "sentencepiece"}'},
        {"tokenizer.model": b"nonsense"},
        {"tokenizer.json": b"{}"},
        {"tokenizer.json": b"nonsense"},
    ],
)
def test_load_names_the_folder_of_a_broken_tokenizer(tmp_path, files):
    with pytest.raises(InputError, match=tmp_path.name):
        load_tokenizer(_store(files, tmp_path))


def test_broken_model_protos():
    good = vocabularies.to_model_proto(vocabularies.vocabulary_from_gguf(*_small_vocabulary()))
    assert len(vocabularies.from_model_proto(good).pieces) == 266
    for data in (b"", b"nonsense", struct.pack("<Q", 2**60), good[:-3] + b"\x99"):
        with pytest.raises(InputError, match="SentencePiece"):
            vocabularies.from_model_proto(data)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("tokens", 3, "tokens is not a list of str"),
        ("merges", [1, 2], "merges is not a list of str"),
        ("scores", ["a"], "scores is not a list of float"),
        ("token_type", [0.5], "token_type is not a list of int"),
        ("bos_token_id", [1], r"bos_token_id=\[1\] is no whole number"),
        ("eos_token_id", 0.5, "eos_token_id=0.5 is no whole number"),
        ("add_space_prefix", "a", "add_space_prefix='a' is no whole number"),
    ],
)
def test_facts_of_another_type_are_named(key, value, message):
    tokens, scores, types, facts = _small_vocabulary()
    named = {"tokens": tokens, "scores": scores, "token_type": types}
    whole = {**facts, **{f"tokenizer.ggml.{name}": part for name, part in named.items()}}
    vocabularies.check_facts(whole)
    with pytest.raises(InputError, match=rf"tokenizer\.ggml\.{message}"):
        vocabularies.check_facts({**whole, f"tokenizer.ggml.{key}": value})


def test_gguf_without_a_vocabulary(tmp_path):
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(tmp_path / "bare.gguf", "gemma3")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(InputError, match=r"bare\.gguf.*tokenizer\.ggml\.tokens"):
        load_tokenizer(tmp_path / "bare.gguf")


def test_hugging_face_folder_needs_bos_and_eos(byte, tmp_path):
    files = byte.export_files()
    config = json.loads(files["tokenizer_config.json"])
    del config["bos_token"]
    files["tokenizer_config.json"] = json.dumps(config).encode()
    with pytest.raises(InputError, match="bos_token"):
        HuggingFaceTokenizer(_store(files, tmp_path))


def test_imports_stay_light(byte, tmp_path):
    """Neither importing the room nor reading a Hugging Face folder brings torch in, nor any heavy library unasked."""
    _store(byte.export_files(), tmp_path)
    code = (
        "import sys, sst_jax.data.tokenizer, sst_jax.data.problems, sst_jax.data.prompts, sst_jax.data.grading\n"
        "import sst_jax.data.loader\n"
        "heavy = {'torch', 'tensorflow', 'datasets', 'transformers', 'gguf'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        f"sst_jax.data.tokenizer.load_tokenizer({str(tmp_path)!r})\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
