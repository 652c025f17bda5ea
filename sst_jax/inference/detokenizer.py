"""A growing answer: from tokens as they come to text that will not change any more."""

from __future__ import annotations

from collections.abc import Sequence

from sst_jax.data.tokenizer import Tokenizer
from sst_jax.types import PositionTokens


class IncrementalDetokenizer:
    """The tokens and text of one row so far; `ended` is None, then "stop" (a stop token or string) or "length".

    The text is what the tokens add to their prompt: "the" and "▁cat" are "the cat", though "▁cat" alone is "cat".
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = (), prompt: Sequence[int] = ()):
        self._tokenizer, self._stop = tokenizer, [mark for mark in stop if mark]
        self._stop_ids = tokenizer.stop_ids
        self._preceded = tokenizer.has_text(prompt)
        self.tokens: list[int] = []
        self.depths: list[int] = []  # iterations at the position that each token came from
        self.text = ""
        self.ended: str | None = None

    def add(self, tokens: Sequence[int] | PositionTokens, depths: Sequence[int] | PositionTokens, last: bool) -> str:
        """Take in new tokens, -1 being none, and return the text that they settle; `last`: no more will come.

        Tokens after the one that completes a stop string are dropped.
        """
        before = len(self.tokens)
        pairs = [(int(token), int(depth)) for token, depth in zip(tokens, depths, strict=True) if token >= 0]
        self.tokens += [token for token, _ in pairs]
        self.depths += [depth for _, depth in pairs]
        text = self._decode(len(self.tokens))
        if self._hit(text) is not None:
            # As if they had come one by one: what a step of decoding computes ahead does not show.
            size = before + 1
            while size < len(self.tokens) and self._hit(self._decode(size)) is None:
                size += 1
            del self.tokens[size:], self.depths[size:]
            text = self._decode(size)
            text, self.ended = text[: self._hit(text)], "stop"
        elif last:
            self.ended = "stop" if self.tokens and self.tokens[-1] in self._stop_ids else "length"
        else:
            text = self._settled(text)
        new = text[len(self.text) :]
        self.text += new
        return new

    def _decode(self, count: int) -> str:
        ids = [token for token in self.tokens[:count] if token not in self._stop_ids]
        return self._tokenizer.decode_next(ids, self._preceded)

    def _hit(self, text: str) -> int | None:
        """Return the position of the first stop string."""
        return min((place for place in map(text.find, self._stop) if place >= 0), default=None)

    def _settled(self, text: str) -> str:
        """Return the part that later tokens can no longer change: not half a character, not the beginning of a stop
        string.
        """
        text = text.rstrip("�")
        begun = (size for mark in self._stop for size in range(1, len(mark)) if text.endswith(mark[:size]))
        return text[: len(text) - max(begun, default=0)]
