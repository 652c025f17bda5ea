"""A tokenizer without a vocabulary: bytes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from sst_jax.data import vocabulary as vocabularies
from sst_jax.data.chat_template import END_OF_TURN, START_OF_TURN
from sst_jax.data.tokenizer_base import Tokenizer
from sst_jax.data.tokenizer_files import MARKER, exported
from sst_jax.files import json_bytes
from sst_jax.types import JsonValue, TokenIds


class ByteTokenizer(Tokenizer):
    """UTF-8 bytes after six specials, in the order of Gemma's: what the tiny models and the tests use."""

    SPECIALS = ("<pad>", "<eos>", "<bos>", "<unk>", START_OF_TURN, END_OF_TURN)
    pad_id, _eos_id, bos_id = 0, 1, 2
    vocab_size = len(SPECIALS) + 256

    def _text_ids(self, text: str) -> list[int]:
        return [len(self.SPECIALS) + byte for byte in text.encode("utf-8")]

    def decode(self, ids: TokenIds) -> str:
        first = len(self.SPECIALS)
        return bytes(i - first for i in map(int, ids) if first <= i < self.vocab_size).decode("utf-8", errors="replace")

    def piece_id(self, piece: str) -> int | None:
        return self.SPECIALS.index(piece) if piece in self.SPECIALS else None

    def piece(self, index: int) -> str:
        return self.SPECIALS[index] if index < len(self.SPECIALS) else f"<0x{index - len(self.SPECIALS):02X}>"

    def _written_ids(self) -> Iterable[int]:
        return range(self.vocab_size)

    def ordinary_pieces(self) -> Mapping[str, int]:
        return {self.piece(index): index for index in range(len(self.SPECIALS), self.vocab_size)}

    def _named_specials(self) -> Mapping[str, JsonValue]:
        return {f"{name}_token": f"<{name}>" for name in ("pad", "eos", "bos", "unk")}

    @property
    def specials(self) -> Mapping[str, int]:
        return {piece: index for index, piece in enumerate(self.SPECIALS)}

    def files(self) -> dict[str, bytes]:
        return {MARKER: json_bytes({"kind": "byte"}), **self._template_files(), **self._generation_files()}

    def export_files(self) -> dict[str, bytes]:
        # A BPE with no merges falls back to bytes everywhere, which is what this tokenizer is.
        count = len(self.SPECIALS)
        types = [vocabularies.CONTROL] * count + [vocabularies.BYTE] * 256
        types[3] = vocabularies.UNKNOWN
        template = None if self.template is None else self.template.source
        pieces = [*self.SPECIALS, *(f"<0x{byte:02X}>" for byte in range(256))]
        return exported(vocabularies.Vocabulary(pieces, [0.0] * len(pieces), types, 3, 2, 1, 0), self.add_bos, template)
