"""What all tokenizers share: text to ids and back, conversations, and the ids that end an answer."""

from __future__ import annotations

import abc
import functools
import hashlib
import re
from collections.abc import Mapping, Sequence

from sst_jax.data import chat_template
from sst_jax.data.chat_template import END_OF_TURN, MARK, START_OF_TURN, ChatTemplate, Message
from sst_jax.data.generation_config import GENERATION_CONFIG, GenerationConfig
from sst_jax.errors import InputError
from sst_jax.families.registry import TEXT_ENDS, TURN_ENDS
from sst_jax.files import json_bytes
from sst_jax.types import Json, JsonValue

NOTHING_SAID = GenerationConfig()


class Tokenizer(abc.ABC):
    """Ids are ints below `vocab_size`.

    bos_id is None where the vocabulary has no BOS; add_bos is False there.
    template is the chat template that came with the vocabulary; None: there was none.
    generation is what the folder says of answers: which tokens end them beside eos, and how to sample.
    """

    vocab_size: int
    bos_id: int | None
    eos_id: int
    pad_id: int
    add_bos: bool = True
    template: ChatTemplate | None = None
    generation: GenerationConfig = NOTHING_SAID

    @abc.abstractmethod
    def encode_text(self, text: str) -> list[int]:
        """Return ids of the text alone: no BOS, no control tokens."""

    @abc.abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """Return the text; special tokens and ids beyond the vocabulary are dropped, broken UTF-8 becomes U+FFFD."""

    @abc.abstractmethod
    def piece_id(self, piece: str) -> int | None:
        """Return the id of a whole piece such as "<start_of_turn>", or None."""

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

    def encode(self, text: str, bos: bool = True) -> list[int]:
        """Return ids of the text, after BOS if `bos` and the model is one that wants it."""
        first = [self.bos_id] if bos and self.add_bos and self.bos_id is not None else []
        return first + self.encode_text(text)

    @property
    def turn_end_id(self) -> int:
        """What ends a turn of a chat: a piece made for it, or what ends a text."""
        return next((index for piece in TURN_ENDS if (index := self.piece_id(piece)) is not None), self.eos_id)

    @property
    def stop_ids(self) -> frozenset[int]:
        """What ends an answer: eos, what the folder's configs name, and of TURN_ENDS and TEXT_ENDS what there is."""
        return self._own_stop_ids | frozenset(self.generation.eos_ids)

    @property
    def _own_stop_ids(self) -> frozenset[int]:
        ends = (self.piece_id(piece) for piece in (*TURN_ENDS, *TEXT_ENDS))
        return frozenset({self.eos_id, *(index for index in ends if index is not None)})

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
        total, files = hashlib.sha256(), self.files()
        files.pop(GENERATION_CONFIG, None)
        if self.stop_ids != self._own_stop_ids:
            files["stop_ids"] = json_bytes(sorted(self.stop_ids))
        for name, data in sorted(files.items()):
            total.update(f"{name}\0{len(data)}\0".encode() + data)
        return total.hexdigest()

    # ------------------------------------------------------------------------------------------------ conversations

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
        conversation = chat_template.checked_messages(messages)
        if self.template is None:
            chat_template.check_alternating(conversation)
        pattern = self._special_pattern
        marked = chat_template.mark(conversation, pattern)
        return template.render(
            marked, add_generation_prompt, chat_template.mark(dict(variables or {}), pattern), continue_final
        )

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
        for found in self._written_pattern.finditer(text):
            ids += [*self._encode_between(text[end : found.start()], end), self._special_id(found[0])]
            end = found.end()
        return ids + self._encode_between(text[end:], end)

    @property
    def _written_pattern(self) -> re.Pattern[str]:
        """What finds control tokens in a conversation, with the spaces that belong to them."""
        return self._special_pattern

    def _special_id(self, found: str) -> int:
        return self.specials[found]

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
