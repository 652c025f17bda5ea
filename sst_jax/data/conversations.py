"""Conversations as a model's chat template writes them, with a mask of what an assistant is to learn.

Learned is what the model itself has to write: of an assistant's turn all from where generation begins up to the token
that ends the turn, so that generation stops. What the template writes around it, the names of roles and the line break
after a turn, is not.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

from sst_jax.data.chat_template import Message, shared_length
from sst_jax.data.documents import Conversation
from sst_jax.data.tokenizer import Tokenizer
from sst_jax.errors import InputError

ASKED: tuple[Message, ...] = ({"role": "user", "content": "a"},)


def asked(document: Conversation, tokenizer: Tokenizer) -> list[int]:
    """Return the ids after which the last answer is generated."""
    return tokenizer.chat(document.asked)


def render(document: Conversation, tokenizer: Tokenizer, *, last: bool = False) -> tuple[list[int], list[bool]]:
    """Return the ids of a conversation and which of them are learned.

    Args:
        document: the conversation.
        tokenizer: of the model.
        last: learn the last answer alone.

    Raises: InputError naming the document, where the template does not take the messages, or writes them so that no
    turn of the assistant can be told from what stands before it.
    """
    answers = [at for at, message in enumerate(document.messages) if message["role"] == "assistant"]
    learned = [at for at in answers if at >= document.given][-1 if last else 0 :]
    with _naming(document):
        ids = tokenizer.chat(document.messages, add_generation_prompt=False)
        starts = {at: _start(document.messages, at, ids, tokenizer) for at in learned}
    if None in starts.values():
        headers = _occurrences(_header(tokenizer), ids)
        if len(headers) != len(answers):
            return _without_joined_space(document, tokenizer, last=last)
        starts = {at: headers[answers.index(at)] for at in learned}
    (end, _), mask = tokenizer.turn_end, [False] * len(ids)
    bounds = [*list(starts.values())[1:], len(ids)]
    for (at, start), bound in zip(starts.items(), bounds, strict=True):
        assert start is not None
        assert bound is not None
        with _naming(document):
            stop = start + _stop(document.messages[: at + 1], ids[start:bound], start, tokenizer)
        mask[start:stop] = [True] * (stop - start)
    if learned[-1] == len(document.messages) - 1 and not _ends_turns(tokenizer):
        ids, mask = [*ids, *end], [*mask, *(True for _ in end)]
    return ids, mask


@contextlib.contextmanager
def _naming(document: Conversation) -> Iterator[None]:
    """Put a document's id in front of what is wrong with it."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{document.id}: {error}") from None


def _ends_turns(tokenizer: Tokenizer) -> bool:
    """Whether the template writes something behind an answer that can stop a generation."""
    return not tokenizer.special_ids.isdisjoint(tokenizer.turn_tail)


def _header(tokenizer: Tokenizer) -> list[int]:
    """Return what the template writes in front of an assistant's words."""
    before, asking = tokenizer.chat(ASKED, add_generation_prompt=False), tokenizer.chat(ASKED)
    return asking[shared_length(before, asking) :]


def _start(messages: Sequence[Message], at: int, ids: Sequence[int], tokenizer: Tokenizer) -> int | None:
    """Return where generation of message `at` would begin; None where the ids do not begin as it would be asked.

    Some templates open a generation with more than they keep of an answer, "<think>" say: what they keep is learned.
    """
    if at == 0:  # few templates ask for an answer to nothing
        return next(iter(_occurrences(_header(tokenizer), ids)), None)
    asking = tokenizer.chat(messages[:at])
    same = shared_length(asking, ids)
    if same == len(asking):
        return same
    opened = same > shared_length(asking, tokenizer.chat(messages[:at], add_generation_prompt=False))
    return same if opened and tokenizer.decode(asking[same:]).strip() else None


def _stop(messages: Sequence[Message], turn: Sequence[int], start: int, tokenizer: Tokenizer) -> int:
    """Return the length of the last message's turn: up to what ends turns, else to where its words end.

    Args:
        messages: up to the answer.
        turn: what is written from its beginning on.
        start: where that stands.
        tokenizer: of the model.

    Raises: InputError where no end can be told.
    """
    (end, _), special = tokenizer.turn_end, tokenizer.special_ids
    found = _occurrences(end, turn)
    if found and _ends_turns(tokenizer):
        return found[0]
    alone = tokenizer.chat(messages, add_generation_prompt=False)[start:]
    same = shared_length(alone, turn)
    if not _ends_turns(tokenizer):
        same = min(same, len(alone) - len(tokenizer.turn_tail))
    elif 0 < same < len(turn) and turn[same] in special and turn[same - 1] not in special:
        same += 1  # what ends a turn in the middle of a conversation is another token than at its end
    if not same:
        raise InputError("the chat template rewrites earlier turns, so that it is not clear where an answer ends")
    return same


def _occurrences(part: Sequence[int], ids: Sequence[int]) -> list[int]:
    """Return where `part` ends, each time that it occurs in `ids`."""
    size = len(part)
    return [at + size for at in range(len(ids) - size + 1) if size and list(ids[at : at + size]) == list(part)]


def _without_joined_space(document: Conversation, tokenizer: Tokenizer, *, last: bool) -> tuple[list[int], list[bool]]:
    """Return `render` of answers without the white space that they begin with.

    Some tokenizers make one token of it and of the template's last line break, where no generation could begin.

    Raises: InputError where they begin with none.
    """
    stripped = tuple(
        {**message, "content": str(message["content"]).lstrip()} if message["role"] == "assistant" else message
        for message in document.messages
    )
    if stripped == document.messages:
        raise InputError(
            f"{document.id}: the chat template rewrites earlier turns, so that it is not clear what is learned: set "
            "data.learn=last, or give every answer a row of its own"
        )
    return render(document._replace(messages=stripped), tokenizer, last=last)
