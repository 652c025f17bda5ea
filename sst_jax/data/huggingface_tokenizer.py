"""Tokenizers of Hugging Face folders, and the byte-level vocabularies of GGUF files."""

from __future__ import annotations

import functools
import importlib
import json
import os
import tempfile
import threading
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from sst_jax.data import byte_pairs
from sst_jax.data import vocabulary as vocabularies
from sst_jax.data.chat_template import MARK, TEMPLATE_FILE, ChatTemplate, read_template
from sst_jax.data.tokenizer_base import Tokenizer
from sst_jax.data.tokenizer_files import NAMED, tokenizer_config
from sst_jax.errors import InputError
from sst_jax.types import Json, JsonValue, TokenIds

if TYPE_CHECKING:
    import tokenizers

HF_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    TEMPLATE_FILE,
    "chat_template.json",
)


def _transformers() -> ModuleType:
    """Import transformers without its advice to install PyTorch, which nothing here needs."""
    quiet = "TRANSFORMERS_NO_ADVISORY_WARNINGS"
    before = os.environ.get(quiet)
    os.environ[quiet] = before or "1"
    try:
        return importlib.import_module("transformers")
    finally:
        if before is None:
            del os.environ[quiet]


class HuggingFaceTokenizer(Tokenizer):
    """Over transformers, from a local folder's `tokenizer.json` as it stands; code in the folder is never run."""

    def __init__(self, folder: str | Path):
        transformers = _transformers()
        folder = Path(folder)
        if not (folder / "tokenizer.json").is_file():
            raise InputError(f"{folder}: holds no tokenizer.json")
        self._files = {name: (folder / name).read_bytes() for name in HF_FILES if (folder / name).is_file()}
        try:
            # Not AutoTokenizer: importing it imports torch where torch is installed.
            self._tokenizer = hf = transformers.PreTrainedTokenizerFast.from_pretrained(
                str(folder), local_files_only=True, trust_remote_code=False
            )
            first, bare = hf("a")["input_ids"][0], hf("a", add_special_tokens=False)["input_ids"][0]
        except BaseException as error:  # the tokenizers library raises bare Exception for a broken file, or panics
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                raise
            raise InputError(f"{folder}: transformers cannot read its tokenizer: {error}") from error
        if hf.eos_token_id is None or (hf.bos_token_id is None and first != bare):
            raise InputError(f"{folder}: its tokenizer names no eos_token, or puts one in front that is no bos_token")
        self.bos_id, self._eos_id = hf.bos_token_id, hf.eos_token_id
        self.pad_id = self._eos_id if hf.pad_token_id is None else hf.pad_token_id
        # Of the tokens added behind the vocabulary only those that are used (Llama's): Gemma's image token is one, and
        # text models have no row for it.
        self.vocab_size = max(hf.vocab_size, 1 + max(self._eos_id, self.pad_id, self.bos_id or 0))
        self.add_bos = first != bare and first == self.bos_id
        self._lock = threading.Lock()
        self._added = hf.added_tokens_decoder
        self._specials = {str(token): index for index, token in self._added.items() if token.special}
        if (template := read_template(folder)) is not None:
            self.template = ChatTemplate(template, self._named_specials())

    @classmethod
    def from_gguf_facts(cls, facts: Mapping[str, Any]) -> HuggingFaceTokenizer:
        """Build the tokenizer from the `tokenizer.*` metadata of a GGUF whose model is one of `byte_pairs.MODELS`.

        Raises: InputError as `byte_pairs.to_tokenizers_json`; KeyError for a key that is missing.
        """
        tokens = facts["tokenizer.ggml.tokens"]
        ids = {name: facts.get(f"tokenizer.ggml.{key}_token_id") for name, key in NAMED.items()}
        for name, index in ids.items():
            if index is not None and not 0 <= index < len(tokens):
                raise InputError(f"GGUF vocabulary of {len(tokens)} has {name} {index}")
        named = {name: tokens[index] for name, index in ids.items() if index is not None}
        config = tokenizer_config(named, vocabularies.adds_bos(facts), facts.get("tokenizer.chat_template"))
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "tokenizer.json").write_bytes(byte_pairs.to_tokenizers_json(facts))
            (Path(folder) / "tokenizer_config.json").write_bytes(config)
            made = cls(folder)
        made.generation = vocabularies.generation_from_gguf(facts, len(tokens))
        return made

    def ordinary_pieces(self) -> Mapping[str, int]:
        added = self._added
        return {piece: index for piece, index in self._tokenizer.get_vocab().items() if index not in added}

    def _named_specials(self) -> Mapping[str, JsonValue]:
        return self._tokenizer.special_tokens_map

    def use_template(self, source: str) -> None:
        super().use_template(source)
        self._files |= self._template_files()

    @property
    def specials(self) -> Mapping[str, int]:
        return self._specials

    def piece(self, index: int) -> str:
        return self._tokenizer.convert_ids_to_tokens(index) or f"<{index}>"

    def _written_ids(self) -> Iterable[int]:
        template = "" if self.template is None else self.template.source
        added = self._added
        # Gemma's image token lies behind the table of its text models: nothing but a picture would yield it.
        written = (index for index, token in added.items() if not token.special or token.content in template)
        return (*(index for index in range(self._tokenizer.vocab_size) if index not in added), *written)

    def _text_ids(self, text: str) -> list[int]:
        return self._ids(text, split_special_tokens=True)

    def _ids(self, text: str, **options: bool) -> list[int]:
        with self._lock:  # the options are kept in the library's object, which threads share
            return self._tokenizer(text, add_special_tokens=False, **options)["input_ids"]

    def encode_rendered(self, text: str) -> list[int]:
        # As transformers does, where it cannot take a message's text for a control token.
        return super().encode_rendered(text) if MARK in text else self.check_ids(self._ids(text))

    def _strips(self, piece: str) -> tuple[bool, bool]:
        token = self._added[self._specials[piece]]
        return token.lstrip, token.rstrip

    def _encode_between(self, text: str, start: int) -> list[int]:
        if not start or self._continuing is None:
            return super()._encode_between(text, start)
        return self._continuing.encode(self._unmarked(text), add_special_tokens=False).ids

    @functools.cached_property
    def _continuing(self) -> tokenizers.Tokenizer | None:
        """The tokenizer of text behind a control token, where a space goes before the first text alone; else None."""
        import tokenizers

        described = self._tokenizer.backend_tokenizer.to_str()
        never = json.loads(described, object_hook=_without_prefix)
        if never == json.loads(described):
            return None
        made = tokenizers.Tokenizer.from_str(json.dumps(never))
        made.encode_special_tokens = True
        return made

    def decode(self, ids: TokenIds) -> str:
        known = [i for i in map(int, ids) if i < len(self._tokenizer)]
        return self._tokenizer.decode(known, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def piece_id(self, piece: str) -> int | None:
        index = self._tokenizer.convert_tokens_to_ids(piece)
        return index if index is not None and self._tokenizer.convert_ids_to_tokens(index) == piece else None

    def files(self) -> dict[str, bytes]:
        return self._files | self._generation_files()

    def export_files(self) -> dict[str, bytes]:
        return dict(self._files)


def _without_prefix(described: Json) -> Json:
    """Return a pre-tokenizer's description, such that no space goes before the first word."""
    first = described.get("type") == "Metaspace" and described.get("prepend_scheme") == "first"
    return {**described, "prepend_scheme": "never"} if first else described
