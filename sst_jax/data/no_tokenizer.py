"""What stands for the tokenizer of a model that came without one: tokens are all that can be given and had."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from sst_jax.data.tokenizer_base import Tokenizer
from sst_jax.data.tokenizer_files import MARKER
from sst_jax.errors import InputError
from sst_jax.files import json_bytes
from sst_jax.types import JsonValue, TokenIds


class NoTokenizer(Tokenizer):
    """Logits, conversion and generation from tokens go; text is refused, and answers have none.

    where  the folder that holds no tokenizer, for messages
    """

    vocab_size, bos_id, pad_id, add_bos = 0, None, 0, False
    _eos_id = -1  # no token: only what the folder's configs name ends an answer

    def __init__(self, where: str):
        self.where = where

    def _refusal(self) -> InputError:
        return InputError(
            f"{self.where} holds no tokenizer, so it takes tokens and no text: put tokenizer.json or tokenizer.model "
            "beside its weights"
        )

    def _text_ids(self, text: str) -> list[int]:
        raise self._refusal()

    def encode(self, text: str, bos: bool = True, parse_special: bool = False) -> list[int]:
        raise self._refusal()

    def render_chat(
        self,
        messages: Sequence[Mapping[str, JsonValue]],
        add_generation_prompt: bool = True,
        variables: Mapping[str, JsonValue] | None = None,
        continue_final: bool = False,
    ) -> str:
        raise self._refusal()

    def decode(self, ids: TokenIds) -> str:
        return ""

    def piece_id(self, piece: str) -> int | None:
        return None

    def piece(self, index: int) -> str:
        return str(index)

    def _written_ids(self) -> Iterable[int]:
        return ()

    def ordinary_pieces(self) -> Mapping[str, int]:
        return {}

    def _named_specials(self) -> Mapping[str, JsonValue]:
        return {}

    @property
    def specials(self) -> Mapping[str, int]:
        return {}

    @property
    def _own_stop_ids(self) -> frozenset[int]:
        return frozenset()

    def files(self) -> dict[str, bytes]:
        return {MARKER: json_bytes({"kind": "none"}), **self._generation_files()}

    def export_files(self) -> dict[str, bytes]:
        return {}
