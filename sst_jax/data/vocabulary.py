"""A SentencePiece BPE vocabulary in its three coats: GGUF metadata, a ModelProto, the tokenizers library's JSON.

The protobuf wire format is written and read by hand, because the generated module that `sentencepiece` ships refuses to
load under any older protobuf runtime, and a ModelProto needs only a dozen of its fields.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, no_type_check

from sst_jax.data.generation_config import SUPPRESSED, GenerationConfig
from sst_jax.errors import InputError
from sst_jax.families.registry import SPLITTINGS
from sst_jax.types import Json

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # the same numbers in GGUF and in a ModelProto
SPACE = "\u2581"  # how a piece writes a space


class Vocabulary(NamedTuple):
    """Pieces by id, with the score that orders merges and the type; special ids are None where there is none."""

    pieces: list[str]
    scores: list[float]
    types: list[int]
    unk_id: int
    bos_id: int | None
    eos_id: int | None
    pad_id: int | None
    add_dummy_prefix: bool = False


# ------------------------------------------------------------------------------------------------------------- GGUF


_LISTS: Mapping[str, tuple[type, ...]] = {
    "tokens": (str,), "merges": (str,), "scores": (int, float), "token_type": (int,),
    SUPPRESSED: (int,),
}  # fmt: skip
_NUMBERS = (
    "unknown_token_id", "bos_token_id", "eos_token_id", "padding_token_id", "eot_token_id", "eom_token_id",
    "add_bos_token", "add_space_prefix",
)  # fmt: skip


def check_facts(facts: Mapping[str, Any]) -> None:
    """Raise InputError naming the first of the `tokenizer.ggml.*` facts that is of another type than its key has."""
    named = {name: facts.get(f"tokenizer.ggml.{name}") for name in (*_LISTS, *_NUMBERS)}
    for name, kinds in _LISTS.items():
        value = named[name]
        if value is not None and not (isinstance(value, list) and all(isinstance(part, kinds) for part in value)):
            raise InputError(f"tokenizer.ggml.{name} is not a list of {kinds[-1].__name__}")
    for name in _NUMBERS:
        if not isinstance(named[name], int | None):
            raise InputError(f"tokenizer.ggml.{name}={named[name]!r} is no whole number")
    if not isinstance(facts.get("tokenizer.chat_template"), str | None):
        raise InputError("tokenizer.chat_template is no text")


def generation_from_gguf(facts: Mapping[str, Any], size: int) -> GenerationConfig:
    """Return what ends a turn or a message by `tokenizer.ggml.*`, beside EOS, and what is never chosen.

    `size` is the vocabulary's.

    Raises: InputError where such a token is none.
    """
    found = {name: facts.get(f"tokenizer.ggml.{name}_token_id") for name in ("eot", "eom")}
    for name, index in found.items():
        if index is not None and not 0 <= index < size:
            raise InputError(f"GGUF vocabulary of {size} has {name} {index}")
    suppressed = facts.get(f"tokenizer.ggml.{SUPPRESSED}")
    settings = {SUPPRESSED: suppressed} if suppressed else {}
    return GenerationConfig(settings, tuple(index for index in found.values() if index is not None))


def splitting_of(facts: Mapping[str, Any]) -> str | None:
    """Return the name of the way in which text is cut, of SPLITTINGS where it is known.

    The model "gemma4" has one way, whatever the file says, as in llama.cpp.
    """
    model, pre = facts.get("tokenizer.ggml.model"), facts.get("tokenizer.ggml.pre")
    return model if model == "gemma4" else pre if isinstance(pre, str) else None


def adds_bos(facts: Mapping[str, Any]) -> bool:
    """Return whether texts begin with BOS by the facts of a GGUF file; as in llama.cpp where they do not say."""
    said = facts.get("tokenizer.ggml.add_bos_token")
    if said is not None:
        return bool(said)
    if facts.get("tokenizer.ggml.model", "llama") == "llama":
        return True
    splitting = SPLITTINGS.get(splitting_of(facts) or "")
    return splitting is not None and splitting.add_bos


def vocabulary_from_gguf(
    tokens: Sequence[str], scores: Sequence[float], types: Sequence[int], facts: Mapping[str, Any]
) -> Vocabulary:
    """Return `tokenizer.ggml.{tokens,scores,token_type}` and the other `tokenizer.ggml.*` facts, by their full names.

    Where the facts are silent a space goes before every text, as in llama.cpp (Gemma's files say that none does).

    Raises: InputError when the vocabulary is not SentencePiece BPE ("llama"), or its parts disagree.
    """
    kind = facts.get("tokenizer.ggml.model", "llama")
    if kind != "llama":
        raise InputError(
            f"tokenizer.ggml.model is {kind!r}; only SentencePiece vocabularies ('llama') are rebuilt here"
        )
    if not len(tokens) == len(scores) == len(types) > 0:
        raise InputError(f"GGUF vocabulary has {len(tokens)} tokens, {len(scores)} scores and {len(types)} types")
    ids = {
        name: facts.get(f"tokenizer.ggml.{key}_token_id")
        for name, key in (("unk_id", "unknown"), ("bos_id", "bos"), ("eos_id", "eos"), ("pad_id", "padding"))
    }
    for name, index in ids.items():
        if index is not None and not 0 <= index < len(tokens):
            raise InputError(f"GGUF vocabulary of {len(tokens)} has {name} {index}")
    if ids["unk_id"] is None:
        raise InputError("GGUF vocabulary names no tokenizer.ggml.unknown_token_id")
    types = list(types)
    types[ids["unk_id"]] = UNKNOWN  # converters store it as one control token among others
    # A converter writes the spaces of user-defined pieces out; SentencePiece sees only escaped text.
    pieces = [
        piece.replace(" ", SPACE) if kind == USER_DEFINED else piece for piece, kind in zip(tokens, types, strict=True)
    ]
    return Vocabulary(
        pieces,
        list(scores),
        list(types),
        ids["unk_id"],
        ids["bos_id"],
        ids["eos_id"],
        ids["pad_id"],
        add_dummy_prefix=facts.get("tokenizer.ggml.add_space_prefix", True),
    )


# ------------------------------------------------------------------------------------- SentencePiece's ModelProto
# What runs for every piece of a vocabulary, millions of times, is not checked at run time.


@no_type_check
def _varint(number: int) -> bytes:
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes(out) + bytes([number])


@no_type_check
def _field(number: int, value: int | float | str | bytes) -> bytes:
    if isinstance(value, float):
        return _varint(number << 3 | 5) + struct.pack("<f", value)
    if isinstance(value, int):
        return _varint(number << 3) + _varint(value & (1 << 64) - 1)  # negative numbers in two's complement
    data = value.encode("utf-8") if isinstance(value, str) else value
    return _varint(number << 3 | 2) + _varint(len(data)) + data


@no_type_check
def _read_varint(data: bytes, at: int) -> tuple[int, int]:
    """Return the number that begins at a place, and the place behind it."""
    number = shift = 0
    while True:
        byte = data[at]
        at += 1
        number |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            return number, at
        if shift > 63:  # the format's limit, and without one the time grows with the square of the length
            raise InputError("not a SentencePiece model: a number has more than 64 bits")


@no_type_check
def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """Yield (field number, value) of one protobuf message: int, float, or the bytes of a submessage or string."""
    at = 0
    while at < len(data):
        tag, at = _read_varint(data, at)
        number, wire = divmod(tag, 8)
        if wire == 0:
            value, at = _read_varint(data, at)
            yield number, value - (1 << 64) if value >> 63 else value
            continue
        length = {1: 8, 5: 4}.get(wire)
        if length is None:
            length, at = _read_varint(data, at)
        chunk = data[at : at + length]
        at += length
        yield number, chunk if wire == 2 else struct.unpack("<f" if wire == 5 else "<d", chunk)[0]


def to_model_proto(vocabulary: Vocabulary) -> bytes:
    """Return a serialized ModelProto: BPE, byte fallback, identity normaliser. The field numbers are the format's."""
    special = {"unk": vocabulary.unk_id, "bos": vocabulary.bos_id, "eos": vocabulary.eos_id, "pad": vocabulary.pad_id}
    trainer = (
        _field(3, 2) + _field(4, len(vocabulary.pieces)) + _field(35, 1)
    )  # model_type BPE, vocab_size, byte_fallback
    for offset, index in enumerate(special.values()):
        trainer += _field(40 + offset, -1 if index is None else index)
        if index is not None:
            trainer += _field(45 + offset, vocabulary.pieces[index])
    # name, add_dummy_prefix, remove_extra_whitespaces, escape_whitespaces
    normalizer = _field(1, "identity") + _field(3, int(vocabulary.add_dummy_prefix)) + _field(4, 0) + _field(5, 1)
    pieces = (
        _field(1, _field(1, piece) + _field(2, float(score)) + _field(3, kind))
        for piece, score, kind in zip(vocabulary.pieces, vocabulary.scores, vocabulary.types, strict=True)
    )
    return b"".join(pieces) + _field(2, trainer) + _field(3, normalizer)


def from_model_proto(data: bytes) -> Vocabulary:
    """Read a ModelProto back; fields that a BPE vocabulary does not need are skipped.

    Raises: InputError when the bytes are not such a model, or it is not BPE with an identity normaliser.
    """
    pieces: list[str] = []
    scores: list[float] = []
    types: list[int] = []
    trainer: dict[int, Any] = {}
    normalizer: dict[int, Any] = {}
    try:
        for number, value in _fields(data):
            if number == 1:
                piece = {2: 0.0, 3: NORMAL, **dict(_fields(value))}
                pieces.append(piece[1].decode("utf-8"))
                scores.append(piece[2])
                types.append(piece[3])
            elif number in (2, 3):
                (trainer if number == 2 else normalizer).update(_fields(value))
    except (IndexError, KeyError, TypeError, AttributeError, struct.error, UnicodeDecodeError) as error:
        raise InputError("not a SentencePiece model") from error
    if not pieces:
        raise InputError("not a SentencePiece model: it holds no pieces")
    if trainer.get(3, 1) != 2 or normalizer.get(2):
        raise InputError("SentencePiece model is not BPE with an identity normaliser")
    # The format's own defaults: unk 0, bos 1, eos 2, no padding, and a dummy prefix.
    unk, bos, eos, pad = (trainer.get(40 + offset, default) for offset, default in enumerate((0, 1, 2, -1)))
    bos, eos, pad = (None if index < 0 else index for index in (bos, eos, pad))
    return Vocabulary(pieces, scores, types, unk, bos, eos, pad, bool(normalizer.get(3, 1)))


# ------------------------------------------------------------------------------- the tokenizers library's JSON


def bos_template(bos: str | None, bos_id: int | None) -> dict[str, Any]:
    """Return the post-processor that puts the BOS in front, where there is one."""
    first, second = {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}
    start = [] if bos is None else [{"SpecialToken": {"id": bos, "type_id": 0}}]
    return {
        "type": "TemplateProcessing",
        "single": [*start, first],
        "pair": [*start, first, second],
        "special_tokens": {} if bos is None else {bos: {"id": bos, "ids": [bos_id], "tokens": [bos]}},
    }


def added_token(index: int, piece: str, special: bool, normalized: bool = False) -> dict[str, Any]:
    """Return an entry of "added_tokens": a piece that is found in a text before it is cut."""
    return {
        "id": index, "content": piece, "single_word": False, "lstrip": False, "rstrip": False,
        "normalized": normalized, "special": special,
    }  # fmt: skip


def _escaping(prefix: bool) -> dict[str, Any]:
    """Return the normaliser that writes spaces as SPACE, and with `prefix` puts one before every text."""
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    return {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": SPACE}, spaces]} if prefix else spaces


def _normal(vocabulary: Vocabulary) -> set[str]:
    return {piece for piece, kind in zip(vocabulary.pieces, vocabulary.types, strict=True) if kind == NORMAL}


def _merges(vocabulary: Vocabulary) -> list[tuple[str, str]]:
    """Return every split of every piece into two other pieces, those of the best score first."""
    normal, scores = _normal(vocabulary), dict(zip(vocabulary.pieces, vocabulary.scores, strict=True))
    return [
        (piece[:cut], piece[cut:])
        for piece in sorted(normal, key=lambda piece: (-scores[piece], piece))
        for cut in range(1, len(piece))
        if piece[:cut] in normal and piece[cut:] in normal
    ]


def to_tokenizers_json(vocabulary: Vocabulary, add_bos: bool = True) -> bytes:
    """Return the same vocabulary as a `tokenizer.json`, which gives the same ids in the tokenizers library.

    SentencePiece joins the neighbours whose join scores highest; the library wants a ranked list of pairs, so every
    split of every piece into two other pieces is listed, best score first.

    Raises: InputError where no such file gives the same ids.
    """
    prefix, ids = vocabulary.add_dummy_prefix, {piece: index for index, piece in enumerate(vocabulary.pieces)}
    # The library would prefix a space to added tokens too, and find them behind spaces only: cut out before the model,
    # and taken whole by it, they are found where SentencePiece finds them.
    kinds = list(zip(vocabulary.pieces, vocabulary.types, strict=True))
    cut_out = [piece for piece, kind in kinds if kind == USER_DEFINED and prefix]
    added = [
        # Pieces with spaces match only after the normaliser has escaped those of the text.
        added_token(index, piece, special=kind != USER_DEFINED, normalized=kind == USER_DEFINED)
        for index, (piece, kind) in enumerate(kinds)
        if kind in (UNKNOWN, CONTROL) or (kind == USER_DEFINED and not prefix)
    ]
    escapes = SPACE in ids  # a vocabulary of bytes alone spells a space as its byte
    bos = None if vocabulary.bos_id is None or not add_bos else vocabulary.pieces[vocabulary.bos_id]
    tokenizer: dict[str, Any] = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": _escaping(prefix) if escapes else None,
        "pre_tokenizer": _cutting(cut_out) if cut_out else None,
        "post_processor": bos_template(bos, vocabulary.bos_id),
        "decoder": {
            "type": "Sequence",
            "decoders": [
                *([{"type": "Replace", "pattern": {"String": SPACE}, "content": " "}] if escapes else []),
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                *([{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefix else []),
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": vocabulary.pieces[vocabulary.unk_id],
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": ids,
            "merges": _merges(vocabulary),
        },
    }
    if cut_out:
        _check_joined(tokenizer["model"], _normal(vocabulary))
        tokenizer["model"]["ignore_merges"] = True
    return json.dumps(tokenizer, ensure_ascii=False).encode("utf-8")


def _cutting(pieces: Sequence[str]) -> Json:
    """Return the pre-tokenizer that cuts pieces out of a text, at each place the longest."""
    longest_first = "|".join(re.escape(piece) for piece in sorted(pieces, key=len, reverse=True))
    return {"type": "Split", "pattern": {"Regex": longest_first}, "behavior": "Isolated", "invert": False}


def _check_joined(model: Json, pieces: Iterable[str]) -> None:
    """Raise InputError where taking a piece whole is another thing than joining its characters."""
    from tokenizers import Tokenizer

    bare = Tokenizer.from_str(json.dumps({"version": "1.0", "added_tokens": [], "model": model}))
    ordered = sorted(pieces)
    for piece, found in zip(ordered, bare.encode_batch(ordered, add_special_tokens=False), strict=True):
        if len(found.ids) != 1:
            what = "a SentencePiece model that prefixes a space and has user-defined pieces"
            raise InputError(f"{what} cannot be a tokenizer.json: characters are not joined to the piece {piece!r}")
