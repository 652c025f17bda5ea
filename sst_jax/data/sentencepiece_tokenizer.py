"""Tokenizers of SentencePiece models: `tokenizer.model` files, and the vocabularies of GGUF files."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from sst_jax.data import vocabulary as vocabularies
from sst_jax.data.tokenizer_base import Tokenizer
from sst_jax.data.tokenizer_files import MARKER, exported
from sst_jax.errors import InputError
from sst_jax.files import json_bytes
from sst_jax.types import JsonValue, TokenIds


class SentencePieceTokenizer(Tokenizer):
    """Over `sentencepiece`, from the bytes of a ModelProto (a `tokenizer.model` file)."""

    def __init__(self, model: bytes, add_bos: bool = True, template: str | None = None):
        import sentencepiece

        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        except (RuntimeError, OSError, UnicodeDecodeError) as error:  # the last: its own message quotes the bytes
            raise InputError(f"not a SentencePiece model: {error}") from error
        sp = self._processor
        self._model, self.add_bos = model, add_bos
        self.vocab_size = sp.get_piece_size()
        self.bos_id, self._eos_id = sp.bos_id(), sp.eos_id()
        if self.bos_id < 0 or self._eos_id < 0:
            raise InputError("SentencePiece model names no BOS or no EOS piece")
        self.pad_id = max(sp.pad_id(), 0)
        if template is not None:
            self.use_template(template)

    @classmethod
    def from_gguf_vocabulary(
        cls, tokens: Sequence[str], scores: Sequence[float], types: Sequence[int], facts: Mapping[str, Any]
    ) -> SentencePieceTokenizer:
        """Build the tokenizer from a GGUF's vocabulary.

        `facts` is its metadata by full key ("tokenizer.ggml.bos_token_id", ...).

        Raises: InputError when the vocabulary is not SentencePiece, or its parts disagree.
        """
        vocabulary = vocabularies.vocabulary_from_gguf(tokens, scores, types, facts)
        add_bos, template = vocabularies.adds_bos(facts), facts.get("tokenizer.chat_template")
        made = cls(vocabularies.to_model_proto(vocabulary), add_bos, template)
        made.generation = vocabularies.generation_from_gguf(facts, len(tokens))
        return made

    def _text_ids(self, text: str) -> list[int]:
        return self._processor.encode(text)

    def decode(self, ids: TokenIds) -> str:
        sp = self._processor
        return sp.decode(
            [i for i in map(int, ids) if i < self.vocab_size and not (sp.is_control(i) or sp.is_unknown(i))]
        )

    def piece_id(self, piece: str) -> int | None:
        index = self._processor.piece_to_id(piece)
        return index if self._processor.id_to_piece(index) == piece else None

    def piece(self, index: int) -> str:
        return self._processor.id_to_piece(index) if index < self.vocab_size else f"<{index}>"

    def _written_ids(self) -> Iterable[int]:
        return range(self.vocab_size)

    def ordinary_pieces(self) -> Mapping[str, int]:
        sp = self._processor
        return {
            sp.id_to_piece(index): index
            for index in range(self.vocab_size)
            if not (sp.is_control(index) or sp.is_unknown(index))
        }

    def _named_specials(self) -> Mapping[str, JsonValue]:
        sp = self._processor
        named = {"bos": sp.bos_id(), "eos": sp.eos_id(), "unk": sp.unk_id(), "pad": sp.pad_id()}
        return {f"{name}_token": sp.id_to_piece(index) for name, index in named.items() if index >= 0}

    @functools.cached_property
    def specials(self) -> Mapping[str, int]:
        sp = self._processor
        return {sp.id_to_piece(index): index for index in range(self.vocab_size) if sp.is_control(index)}

    def files(self) -> dict[str, bytes]:
        kind = json_bytes({"kind": "sentencepiece", "add_bos": self.add_bos})
        return {"tokenizer.model": self._model, MARKER: kind, **self._template_files(), **self._generation_files()}

    def export_files(self) -> dict[str, bytes]:
        vocabulary = vocabularies.from_model_proto(self._model)
        template = None if self.template is None else self.template.source
        return {"tokenizer.model": self._model} | exported(vocabulary, self.add_bos, template)
