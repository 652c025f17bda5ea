"""Text to ids and back: one interface over SentencePiece, a Hugging Face folder, and plain bytes.

Text never yields control tokens: "<end_of_turn>" in a prompt is its characters, whichever the tokenizer. Turns are
built by `Tokenizer.chat`.
"""

from __future__ import annotations

import json
from pathlib import Path

from sst_jax.data import byte_pairs
from sst_jax.data import vocabulary as vocabularies
from sst_jax.data.byte_tokenizer import ByteTokenizer
from sst_jax.data.chat_template import CHAT_TEMPLATE, END_OF_TURN, START_OF_TURN, read_template
from sst_jax.data.generation_config import GenerationConfig, read_generation_config
from sst_jax.data.gguf_header import metadata_of
from sst_jax.data.huggingface_tokenizer import HuggingFaceTokenizer
from sst_jax.data.no_tokenizer import NoTokenizer
from sst_jax.data.sentencepiece_tokenizer import SentencePieceTokenizer
from sst_jax.data.tokenizer_base import Tokenizer
from sst_jax.data.tokenizer_files import MARKER
from sst_jax.errors import InputError
from sst_jax.files import read_json
from sst_jax.types import JsonValue

__all__ = [
    "CHAT_TEMPLATE",
    "END_OF_TURN",
    "MARKER",
    "START_OF_TURN",
    "ByteTokenizer",
    "HuggingFaceTokenizer",
    "NoTokenizer",
    "SentencePieceTokenizer",
    "Tokenizer",
    "adapter_tokenizer",
    "load_tokenizer",
]


def load_tokenizer(path: str | Path, *, required: bool = True) -> Tokenizer:
    """Return the tokenizer of a folder (ours by its marker, else Hugging Face's files, else a `tokenizer.model`) or
    GGUF file.

    required: whether a folder must hold one; else a `NoTokenizer` stands for what is not there.

    Raises: InputError naming the folder when it holds none, or a broken one.
    """
    path = Path(path)
    if path.suffix == ".gguf" or path.is_file():
        return _gguf(path)
    if not path.is_dir():
        raise InputError(f"{path}: no such folder to read a tokenizer from")
    found = NoTokenizer(str(path)) if not required and not holds_tokenizer(path) else _folder(path)
    found.generation = read_generation_config(path)
    return found


def holds_tokenizer(folder: Path) -> bool:
    """Return whether a folder holds a file of a tokenizer."""
    return any((folder / name).is_file() for name in (MARKER, "tokenizer.json", "tokenizer.model", "vocab.json"))


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
            made = ByteTokenizer()
            if (template := read_template(path)) is not None:
                made.use_template(template)
            return made
        if kind == "none":
            return NoTokenizer(str(path))
        if kind != "sentencepiece":
            raise InputError(f"{path / MARKER}: unknown kind {kind!r}")
        return _sentencepiece(path, add_bos)
    if (path / "tokenizer.json").is_file():
        return HuggingFaceTokenizer(path)
    if (path / "tokenizer.model").is_file():
        return _bare_sentencepiece(path)
    raise InputError(f"{path}: holds no tokenizer (none of {MARKER}, tokenizer.json, tokenizer.model)")


def adapter_tokenizer(folder: Path, base: Tokenizer) -> Tokenizer:
    """Return the tokenizer of an adapter: what its folder brings, tokenizer or template alone, comes before its base's.

    Args:
      folder: of the adapter.
      base: the base's, which is changed where the folder brings a template alone.

    Raises: InputError as `load_tokenizer`, and where the folder's vocabulary is not that of the base.
    """
    if not any((folder / name).is_file() for name in (MARKER, "tokenizer.json", "tokenizer.model")):
        if (template := read_template(folder)) is not None:
            base.use_template(template)
            base.is_replaced = True
        return base
    own = load_tokenizer(folder)
    advice = "an adapter's tokenizer must have its base's vocabulary: take it out of the folder to use the base's"
    if base.rows is not None and (beyond := set(own.ids_beyond(base.rows)) - set(base.ids_beyond(base.rows))):
        named = f"{own.piece(min(beyond))!r} has the id {min(beyond)}, and the base's embedding has {base.rows} rows"
        raise InputError(f"{folder}: its tokenizer does not fit: {named}; {advice}")
    pieces, known = own.ordinary_pieces(), base.ordinary_pieces()
    _, moved = min(
        ((index, piece) for piece, index in pieces.items() if known.get(piece, index) != index), default=(0, None)
    )
    if moved is not None or not pieces.keys() & known.keys():
        named = "no piece is the base's"
        if moved is not None:
            named = f"{moved!r} has the id {pieces[moved]}, and {known[moved]} in the base's"
        raise InputError(f"{folder}: its tokenizer does not fit: {named}; {advice}")
    own.is_replaced = True
    if own.template is None:
        own.template = base.template
    own.generation = GenerationConfig(
        {**base.generation.settings, **own.generation.settings},
        tuple(dict.fromkeys((*own.generation.eos_ids, *base.generation.eos_ids))),
    )
    return own


def _gguf(path: Path) -> Tokenizer:
    facts = metadata_of(path)
    try:
        vocabularies.check_facts(facts)
        if facts.get("tokenizer.ggml.model") in byte_pairs.MODELS:
            return HuggingFaceTokenizer.from_gguf_facts(facts)
        tokens, scores, types = (facts[f"tokenizer.ggml.{key}"] for key in ("tokens", "scores", "token_type"))
        return SentencePieceTokenizer.from_gguf_vocabulary(tokens, scores, types, facts)
    except KeyError as error:
        raise InputError(f"{path}: its metadata lacks {error}") from error
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


def _bare_sentencepiece(folder: Path) -> SentencePieceTokenizer:
    """Return the tokenizer of a folder of transformers that lacks tokenizer.json.

    Raises: InputError where what its other files add is needed and not in tokenizer.model.
    """
    file = folder / "tokenizer_config.json"
    config = read_json(file) if file.is_file() else {}
    add_bos = config.get("add_bos_token", True)
    if not isinstance(add_bos, bool | None):
        raise InputError(f"{file}: add_bos_token={add_bos!r} must be true or false")
    made = _sentencepiece(folder, add_bos is not False)
    named = [_content(config.get(f"{name}_token")) for name in ("bos", "eos")]
    added = config.get("added_tokens_decoder") or {}
    others = read_json(folder / "added_tokens.json") if (folder / "added_tokens.json").is_file() else {}
    template = "" if made.template is None else made.template.source
    contents = [_content(token) for token in (added.values() if isinstance(added, dict) else ())]
    for piece in (*named, *(piece for piece in (*contents, *others) if piece and piece in template)):
        if piece is not None and made.piece_id(piece) is None:
            raise InputError(
                f"{folder}: lacks tokenizer.json, and its tokenizer.model the token {piece!r} that it names: save it "
                "anew in transformers, AutoTokenizer.from_pretrained(folder).save_pretrained(folder)"
            )
    return made


def _content(token: JsonValue) -> str | None:
    """Return the text of a token as tokenizer_config.json has it; None where there is none."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) and text else None


def _sentencepiece(folder: Path, add_bos: bool) -> SentencePieceTokenizer:
    file = folder / "tokenizer.model"
    if not file.is_file():
        raise InputError(f"{folder}: {MARKER} promises a tokenizer.model, which is missing")
    try:
        return SentencePieceTokenizer(file.read_bytes(), add_bos, read_template(folder))
    except InputError as error:
        raise InputError(f"{file}: {error}") from error
