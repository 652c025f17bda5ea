"""What all tokenizers share: text to ids and back, conversations, and the ids that end an answer."""

from __future__ import annotations

import abc
import functools
import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from sst_jax.data import chat_template
from sst_jax.data.chat_template import END_OF_TURN, MARK, START_OF_TURN, ChatTemplate, Message, shared_length
from sst_jax.data.generation_config import GENERATION_CONFIG, GenerationConfig
from sst_jax.data.unicode import check_unicode
from sst_jax.errors import InputError
from sst_jax.families.registry import TEXT_ENDS, TURN_ENDS
from sst_jax.files import contents_digest, json_bytes
from sst_jax.types import Json, JsonValue, TokenIds

NOTHING_SAID = GenerationConfig()
_SPACES = re.compile(r"\s*")


class Tokenizer(abc.ABC):
    """Ids are ints below `vocab_size`.

    bos_id is None where the vocabulary has no BOS; add_bos is False there.
    template is the chat template that came with the vocabulary; None: there was none.
    generation is what the folder says of answers: which tokens end them beside eos, and how to sample.
    rows are those of the embedding that the ids look up, once `set_rows` has been told; None: not known.
    is_replaced says that an adapter or a file brought it, or its template, and that the base below has another.
    """

    vocab_size: int
    bos_id: int | None
    pad_id: int
    _eos_id: int
    add_bos: bool = True
    template: ChatTemplate | None = None
    generation: GenerationConfig = NOTHING_SAID
    rows: int | None = None
    is_replaced = False
    _has_warned = False

    @abc.abstractmethod
    def _text_ids(self, text: str) -> list[int]:
        """Return ids of the text alone: no BOS, no control tokens."""

    @abc.abstractmethod
    def decode(self, ids: TokenIds) -> str:
        """Return the text; special tokens and ids beyond the vocabulary are dropped, broken UTF-8 becomes U+FFFD."""

    @abc.abstractmethod
    def piece_id(self, piece: str) -> int | None:
        """Return the id of a whole piece such as "<start_of_turn>", or None."""

    @abc.abstractmethod
    def piece(self, index: int) -> str:
        """Return the piece of an id."""

    @abc.abstractmethod
    def _written_ids(self) -> Iterable[int]:
        """Return the ids that text, a template or an end may yield; control tokens that nothing writes are left out."""

    @abc.abstractmethod
    def ordinary_pieces(self) -> Mapping[str, int]:
        """Return the vocabulary that text is made of, without tokens that were added to it, by piece."""

    @abc.abstractmethod
    def _named_specials(self) -> Mapping[str, JsonValue]:
        """Return the special tokens that templates write by name: {"bos_token": "<s>", ...}."""

    @property
    @abc.abstractmethod
    def specials(self) -> Mapping[str, int]:
        """The ids of the control tokens, which text never yields, by piece."""

    @abc.abstractmethod
    def files(self) -> dict[str, bytes]:
        """Return what to store beside the weights, by file name, so that `load_tokenizer` reads an equal tokenizer
        back.
        """

    @abc.abstractmethod
    def export_files(self) -> dict[str, bytes]:
        """Return files from which `transformers.AutoTokenizer.from_pretrained(folder)` gives the same ids."""

    @functools.cached_property
    def special_ids(self) -> frozenset[int]:
        """The ids of the control tokens."""
        return frozenset(self.specials.values())

    def encode(self, text: str, bos: bool = True, parse_special: bool = False) -> list[int]:
        """Return ids of the text, after BOS if `bos` and the model is one that wants it.

        parse_special: whether text of a control token, "<|im_start|>", is that token, and not its characters; BOS is
        not put before a text that begins with it.

        Raises: InputError as `encode_text`.
        """
        first = [self.bos_id] if bos and self.add_bos and self.bos_id is not None else []
        if parse_special:
            check_unicode(text)
            ids = self.encode_rendered(text)
            return ids if first and ids[:1] == first else self.check_ids(first) + ids
        if not self._has_warned and (found := self._special_pattern.search(text)):
            self._has_warned = True
            logging.getLogger(__name__).warning(
                "a prompt holds %r, which is read as its characters and not as the special token: --chat (chat=True, "
                "/v1/chat/completions) lays out turns, and --parse-special (parse_special) asks for the token",
                found[0],
            )
        return self.check_ids(first) + self.encode_text(text)

    def encode_text(self, text: str) -> list[int]:
        """Return ids of the text alone: no BOS, no control tokens.

        Raises: InputError as `check_ids`, and where the text is no valid Unicode.
        """
        check_unicode(text)
        return self.check_ids(self._text_ids(text))

    def check_ids(self, ids: list[int]) -> list[int]:
        """Return ids that are about to be looked up.

        Raises: InputError naming the token that the model's embedding has no row for.
        """
        if self.rows is not None and ids and (index := max(ids)) >= self.rows:
            raise InputError(
                f"the token {self.piece(index)!r} has the id {index}, and the model's embedding has {self.rows} rows: "
                "its tokenizer was extended and the embedding not; take the token out, or resize the embedding"
            )
        return ids

    def set_rows(self, rows: int) -> None:
        """Tell how many rows the embedding beside the tokenizer has, and warn where tokens lie beyond them."""
        if self.rows == rows:
            return
        self.rows = rows
        if beyond := self.ids_beyond(rows):
            named = ", ".join(f"{self.piece(index)!r} ({index})" for index in beyond[:3])
            logging.getLogger(__name__).warning(
                "the embedding has %d rows, and %d of the tokenizer's tokens lie beyond them (%s%s): what needs one is "
                "refused",
                rows,
                len(beyond),
                named,
                ", ..." if len(beyond) > 3 else "",
            )
        if self.pad_id >= rows:  # it fills rows up, and any token may
            self.pad_id = self._eos_id if self._eos_id < rows else 0

    def ids_beyond(self, rows: int) -> list[int]:
        """Return the ids behind an embedding of `rows`, of those that text, a template or an end may yield."""
        ends = self.stop_ids | {self._eos_id, self.pad_id, *([] if self.bos_id is None else [self.bos_id])}
        return sorted(index for index in {*self._written_ids(), *ends} if index >= rows)

    @property
    def eos_id(self) -> int:
        """What ends a text.

        Raises: InputError as `check_ids`.
        """
        return self.check_ids([self._eos_id])[0]

    @property
    def turn_end_id(self) -> int:
        """What ends a turn of a chat: what the template ends it with, else a piece made for it, else EOS.

        Raises: InputError as `check_ids`.
        """
        try:
            return self.turn_end[0][-1]
        except InputError:  # no template
            found = next((index for piece in TURN_ENDS if (index := self.piece_id(piece)) is not None), self._eos_id)
            return self.check_ids([found])[0]

    @property
    def turn_end(self) -> tuple[list[int], list[int]]:
        """What ends an assistant's turn, and what the template writes behind it.

        Where the template writes nothing that could stop a generation, EOS ends the turn.

        Raises: InputError as `chat`.
        """
        special, tail = self.special_ids, self.turn_tail
        # At the very end some templates write one more token, which no answer in the middle has.
        for part in (_turn_tail(self, self.template).every, tail):
            first = next((at for at, index in enumerate(part) if index in special), None)
            if first is not None:
                after = next((at for at in range(first, len(part)) if part[at] not in special), len(part))
                return tail[:after], tail[after:]
        return [self.eos_id], []

    @property
    def turn_tail(self) -> list[int]:
        """What the template writes behind an assistant's words."""
        return list(_turn_tail(self, self.template).last)

    def decode_next(self, ids: TokenIds, preceded: bool) -> str:
        """Return the text that ids add to one, with the space that `decode` takes off the first word of a text.

        preceded: whether any text stands before them, see `has_text`.
        """
        if not preceded:
            return self.decode(ids)
        before, text = self._some_text
        return self.decode([*before, *ids])[len(text) :]

    def has_text(self, ids: TokenIds) -> bool:
        """Return whether ids hold any text, not special tokens alone."""
        return any(self.decode([index]) for index in reversed(ids))

    @functools.cached_property
    def _some_text(self) -> tuple[list[int], str]:
        """Ids that are whole characters, and their text."""
        for text in "a0.-":
            ids = self._text_ids(text)
            if self.decode(ids) == text:
                return ids, text
        found = ((index, self.decode([index])) for index in self.ordinary_pieces().values())
        return next((([index], text) for index, text in found if text.strip("\ufffd")), ([], ""))

    @property
    def stop_ids(self) -> frozenset[int]:
        """What ends an answer: eos, what the folder's configs name, and of TURN_ENDS and TEXT_ENDS what there is."""
        return self._own_stop_ids | frozenset(self.generation.eos_ids)

    @property
    def _own_stop_ids(self) -> frozenset[int]:
        ends = (self.piece_id(piece) for piece in (*TURN_ENDS, *TEXT_ENDS))
        try:
            own = self.turn_end[0]
        except InputError:  # no template, or one of another vocabulary
            own = []
        return frozenset({self._eos_id, *own[-1:], *(index for index in ends if index is not None)})

    def generation_config(self) -> Json:
        """Return generation_config.json for an export: the folder's own, with all of `stop_ids`."""
        said = self.generation
        known = {"bos_token_id": self.bos_id, "pad_token_id": self.pad_id}
        stops = dict.fromkeys([*said.eos_ids, *sorted(self.stop_ids)])
        return {**known, **said.settings, "eos_token_id": list(stops)}

    def _generation_files(self) -> dict[str, bytes]:
        """Return the file that `generation` is read back from; none where it says nothing."""
        said = self.generation
        if not said.settings and not said.eos_ids:
            return {}
        return {GENERATION_CONFIG: json_bytes({**said.settings, "eos_token_id": list(said.eos_ids) or None})}

    @property
    def digest(self) -> str:
        """sha256 over `files()` and the stop ids: equal digests give equal ids and equal ends."""
        files = self.files()
        files.pop(GENERATION_CONFIG, None)
        if self.stop_ids != self._own_stop_ids:
            files["stop_ids"] = json_bytes(sorted(self.stop_ids))
        return contents_digest(files)

    # ------------------------------------------------------------------------------------------------ conversations

    def use_template(self, source: str) -> None:
        """Make a chat template the one of this vocabulary."""
        self.template = ChatTemplate(source, self._named_specials())

    def _template_files(self) -> dict[str, bytes]:
        """Return the file that `template` is read back from; none where there is none."""
        return {} if self.template is None else {chat_template.TEMPLATE_FILE: self.template.source.encode()}

    def chat(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool = True,
        variables: Mapping[str, JsonValue] | None = None,
    ) -> list[int]:
        """Return ids of a conversation in the turns of the template that came with the vocabulary, else in Gemma's.

        What looks like a control token inside a message is its characters.

        Args:
          messages: {"role": "user", "content": text}, or text parts [{"type": "text", "text": text}] as content; roles,
            their order and further fields are the template's affair. In Gemma's own turns at most one system message,
            first, which goes into the first user turn; then user and assistant alternate, as the model was trained.
          add_generation_prompt: whether the opening of the model's turn follows.
          variables: others that the template reads, such as {"enable_thinking": False}.

        Raises: InputError where a message is malformed, the template refuses the conversation or lacks a variable, and
            where there is none and the vocabulary has not Gemma's turn tokens.
        """
        return self.encode_rendered(self.render_chat(messages, add_generation_prompt, variables))

    def render_chat(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool = True,
        variables: Mapping[str, JsonValue] | None = None,
        continue_final: bool = False,
    ) -> str:
        """Return a conversation as text for `encode_rendered`; arguments and errors as for `chat`.

        continue_final: leave the last message open, so that the model continues it.
        """
        template = self.conversation_template
        self.check_variables(variables or {})
        conversation = chat_template.checked_messages(messages)
        check_unicode(conversation)
        if self.template is None:
            chat_template.check_alternating(conversation)
        pattern = self._special_pattern
        marked = chat_template.mark(conversation, pattern)
        return template.render(
            marked, add_generation_prompt, chat_template.mark(dict(variables or {}), pattern), continue_final
        )

    def check_variables(self, variables: Mapping[str, JsonValue]) -> None:
        """Check that the chat template reads the variables.

        Raises: InputError naming one that it does not, and those that it does.
        """
        if unknown := sorted(set(variables) - self.conversation_template.variables):
            known = ", ".join(sorted(self.conversation_template.variables)) or "none"
            raise InputError(f"the chat template has no variable {unknown[0]!r}; it has {known}")
        check_unicode(dict(variables), "a variable of the chat template")

    @property
    def conversation_template(self) -> ChatTemplate:
        """The template that came with the vocabulary, or Gemma's turns.

        Raises: InputError where there is none, and the vocabulary has not Gemma's turn tokens.
        """
        if self.template is not None:
            return self.template
        if self.bos_id is None or any(self.piece_id(piece) is None for piece in (START_OF_TURN, END_OF_TURN)):
            raise InputError(
                f"chat needs a template, and none came with this vocabulary; nor has it the tokens {START_OF_TURN} and "
                f"{END_OF_TURN}, whose turns are known"
            )
        return chat_template.gemma_turns(next(piece for piece, index in self.specials.items() if index == self.bos_id))

    def encode_rendered(self, text: str) -> list[int]:
        """Return ids of what `render_chat` wrote: control tokens where the template did, no BOS before it."""
        ids, end = [], 0
        for found in self._special_pattern.finditer(text):
            lstrip, rstrip = self._strips(found[0])
            between = text[end : found.start()]
            ids += [*self._encode_between(between.rstrip() if lstrip else between, end), self.specials[found[0]]]
            end = found.end()
            if rstrip and (spaces := _SPACES.match(text, end)):
                end = spaces.end()
        return self.check_ids(ids + self._encode_between(text[end:], end))

    def _strips(self, piece: str) -> tuple[bool, bool]:
        """Return whether a control token takes the spaces before it, and those behind it."""
        return False, False

    def _encode_between(self, text: str, start: int) -> list[int]:
        """Return ids of what stands between control tokens; `start` is its place in the whole."""
        return self.encode_text(self._unmarked(text)) if text else []

    def _unmarked(self, text: str) -> str:
        """Return text without what `chat_template.mark` put into it."""
        return self._marked_pattern.sub(lambda found: found[0].replace(MARK, ""), text) if MARK in text else text

    @functools.cached_property
    def _special_pattern(self) -> re.Pattern[str]:
        return chat_template.any_of(self.specials)

    @functools.cached_property
    def _marked_pattern(self) -> re.Pattern[str]:
        return chat_template.any_of(piece[0] + MARK + piece[1:] for piece in self.specials)


ANSWERED = ({"role": "user", "content": "a"}, {"role": "assistant", "content": "b"})
ASKED_AGAIN = (*ANSWERED, {"role": "user", "content": "a"})


class _Tail(NamedTuple):
    """What a template writes behind an assistant's words: behind the last ones, and what of it behind every."""

    last: tuple[int, ...]
    every: tuple[int, ...]


@functools.lru_cache(maxsize=16)
def _turn_tail(tokenizer: Tokenizer, template: ChatTemplate | None) -> _Tail:
    """Return the tail of a tokenizer's template, which may be exchanged."""
    whole, word = tokenizer.chat(ANSWERED, add_generation_prompt=False), tokenizer.encode_text("b")[-1]
    if word not in whole:
        return _Tail((), ())
    start = len(whole) - whole[::-1].index(word)
    try:
        longer = tokenizer.chat(ASKED_AGAIN, add_generation_prompt=False)
    except InputError:  # nothing can follow an answer
        longer = whole
    if word in longer:
        # Earlier answers may be written otherwise: what is behind their words is compared, not where they stand.
        follows = longer[len(longer) - longer[::-1].index(word) :]
        last = tuple(whole[start:])
        return _Tail(last, last[: shared_length(last, follows)])
    return _Tail(tuple(whole[start:]), ())
