"""Text to ids and back: one interface over SentencePiece, a Hugging Face folder, and plain bytes.

Text never yields control tokens: "<end_of_turn>" in a prompt is its characters, whichever the tokenizer. Turns are
built by `Tokenizer.chat`.
"""

from __future__ import annotations

import json
from pathlib import Path

from sst_jax.data import vocabulary as vocabularies
from sst_jax.data.byte_tokenizer import ByteTokenizer
from sst_jax.data.chat_template import CHAT_TEMPLATE, END_OF_TURN, START_OF_TURN, read_template
from sst_jax.data.generation_config import read_generation_config
from sst_jax.data.gguf_header import metadata_of
from sst_jax.data.huggingface_tokenizer import HuggingFaceTokenizer
from sst_jax.data.sentencepiece_tokenizer import SentencePieceTokenizer
from sst_jax.data.tokenizer_base import Tokenizer
from sst_jax.data.tokenizer_files import MARKER
from sst_jax.errors import InputError

__all__ = [
    "CHAT_TEMPLATE",
    "END_OF_TURN",
    "MARKER",
    "START_OF_TURN",
    "ByteTokenizer",
    "HuggingFaceTokenizer",
    "SentencePieceTokenizer",
    "Tokenizer",
    "load_tokenizer",
]


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Return the tokenizer of a folder (ours by its marker, else Hugging Face's files, else a `tokenizer.model`) or
    GGUF file.

    Raises: InputError naming the folder when it holds none, or a broken one.
    """
    path = Path(path)
    if path.suffix == ".gguf":
        return _gguf(path)
    if not path.is_dir():
        raise InputError(f"{path}: no such folder to read a tokenizer from")
    found = _folder(path)
    found.generation = read_generation_config(path)
    return found


def _folder(path: Path) -> Tokenizer:
    if (path / MARKER).is_file():
        try:
            marker = json.loads((path / MARKER).read_bytes())
            kind, add_bos = marker["kind"], marker.get("add_bos", True)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise InputError(f"{path / MARKER}: not a tokenizer marker") from error
        if not isinstance(add_bos, bool):
            raise InputError(f"{path / MARKER}: add_bos={add_bos!r} must be true or false")
        if kind == "byte":
            return ByteTokenizer()
        if kind != "sentencepiece":
            raise InputError(f"{path / MARKER}: unknown kind {kind!r}")
        return _sentencepiece(path, add_bos)
    if (path / "tokenizer.json").is_file():
        return HuggingFaceTokenizer(path)
    if (path / "tokenizer.model").is_file():
        return _sentencepiece(path, True)
    raise InputError(f"{path}: holds no tokenizer (none of {MARKER}, tokenizer.json, tokenizer.model)")


def _gguf(path: Path) -> Tokenizer:
    facts = metadata_of(path)
    try:
        vocabularies.check_facts(facts)
        if facts.get("tokenizer.ggml.model") == "gpt2":
            return HuggingFaceTokenizer.from_gguf_facts(facts)
        tokens, scores, types = (facts[f"tokenizer.ggml.{key}"] for key in ("tokens", "scores", "token_type"))
        return SentencePieceTokenizer.from_gguf_vocabulary(tokens, scores, types, facts)
    except KeyError as error:
        raise InputError(f"{path}: its metadata lacks {error}") from error
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


def _sentencepiece(folder: Path, add_bos: bool) -> SentencePieceTokenizer:
    file = folder / "tokenizer.model"
    if not file.is_file():
        raise InputError(f"{folder}: {MARKER} promises a tokenizer.model, which is missing")
    try:
        return SentencePieceTokenizer(file.read_bytes(), add_bos, read_template(folder))
    except InputError as error:
        raise InputError(f"{file}: {error}") from error
