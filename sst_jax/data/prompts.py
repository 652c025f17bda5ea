"""Render a document as an example: tokens, with a mask of those that are learned.

Prompt and answer of a problem are tokenised apart, so that training sees exactly the prompt that generation is given.
A pair is tokenised as one text where that begins with the tokens of its prompt, and a conversation by the model's chat
template (`conversations.py`), as the field does.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sst_jax.data import conversations
from sst_jax.data.documents import Conversation, Document, Item, Pair, Problem
from sst_jax.data.formats import shown
from sst_jax.data.records import READERS, is_object, read_file
from sst_jax.data.tokenizer import Tokenizer
from sst_jax.errors import InputError

FORMATS = ("plain", "chat")
LEARN = ("assistant", "last", "all")


class Example(NamedTuple):
    """tokens int32 [T], BOS first; answer_mask bool [T].

    answer_mask[t] says that tokens[t] itself is learned (aligned with targets): a loss over logits[t - 1] scores it.
    The end token is part of an answer, the prompt is not.
    """

    tokens: np.ndarray
    answer_mask: np.ndarray
    id: str


def prompt_tokens(question: str, tokenizer: Tokenizer, format: str = "plain") -> list[int]:
    """Return the ids of a problem's prompt, BOS first.

    plain: "Question: ...\\nAnswer:", without a space after it: SentencePiece keeps a space with the word that follows.
    chat: the question as a user turn of the tokenizer's template, then the opening of the model's turn.
    Raises: InputError for another format.
    """
    if format == "plain":
        return tokenizer.encode(f"Question: {question.strip()}\nAnswer:")
    if format == "chat":
        return tokenizer.chat([{"role": "user", "content": question}])
    raise InputError(f"data.format={format!r} is not one of {', '.join(map(repr, FORMATS))}")


def asked_tokens(document: Document, tokenizer: Tokenizer, format: str = "plain") -> list[int]:
    """Return the ids after which a document's (last) answer is generated.

    Raises: InputError for another format, and for a conversation that is to be asked without a chat template.
    """
    match document:
        case Problem():
            return prompt_tokens(document.question, tokenizer, format)
        case Pair():
            plain = format == "plain"
            return tokenizer.encode(document.prompt) if plain else prompt_tokens(document.prompt, tokenizer, format)
        case Conversation():
            _check_chat(document, format)
            return conversations.asked(document, tokenizer)


def asked_with_room(
    items: Sequence[Item], tokenizer: Tokenizer, format: str, room: int, positions: int, room_name: str
) -> list[list[int]]:
    """Return the prompt of each item, as `asked_tokens` does.

    Args:
      items: that are asked.
      tokenizer: of the model.
      format: "plain" or "chat".
      room: tokens that an answer may have.
      positions: that the model computes.
      room_name: what `room` is called in messages.

    Raises: InputError as `asked_tokens`, and where the longest prompt leaves less than `room` positions to answer in.
    """
    found = [asked_tokens(item.problem, tokenizer, format) for item in items]
    longest = max(range(len(found)), key=lambda row: len(found[row]))
    if len(found[longest]) + room > positions:
        raise InputError(
            f"{items[longest].id} has {len(found[longest])} tokens, which with {room_name} exceed the model's "
            f"{positions} positions"
        )
    return found


def answer_text(problem: Problem) -> str:
    """Return the worked solution with GSM8K's result line, or the result alone where there is no solution."""
    return f"{problem.answer}\n#### {problem.result}" if problem.answer else problem.result


def whole_text(document: Document) -> str:
    """Return a document as running text: question and answer as the plain format puts them, a pair word for word, what
    is said in a conversation line by line, or the bare text where nothing is asked.
    """
    match document:
        case Pair():
            return document.prompt + document.result
        case Conversation():
            return "\n".join(str(message["content"]) for message in document.messages)
        case _:
            answer = answer_text(document)
            return f"Question: {document.question}\nAnswer: {answer}" if document.question else answer


def render(document: Document, tokenizer: Tokenizer, format: str = "plain", learn: str = "assistant") -> Example:
    """Return the whole example.

    That of a problem begins with `prompt_tokens`; the answer ends with EOS (plain), or with what ends a turn of the
    chat template and with what the template writes after it, which is not learned.

    Args:
        document: what is rendered.
        tokenizer: of the model.
        format: "plain" or "chat".
        learn: "assistant" (every answer), "last" (the last one of a conversation) or "all" tokens.

    Raises: InputError for another format, for a conversation that is to be rendered without a chat template, and where
    the template does not take it.
    """
    match document:
        case Conversation():
            _check_chat(document, format)
            tokens, mask = conversations.render(document, tokenizer, last=learn == "last")
        case Pair() if format == "plain":
            tokens, mask = _render_pair(document, tokenizer)
        case Problem() if not document.question:
            tokens = [*tokenizer.encode(document.result), tokenizer.eos_id]
            mask = [True] * len(tokens)
        case _:
            tokens, mask = _render_answer(document, tokenizer, format)
    learned = np.asarray(mask, bool) | (learn == "all")
    learned[:1] = False  # nothing stands before it from which it could be predicted
    return Example(np.asarray(tokens, np.int32), learned, document.id)


def _render_answer(document: Problem | Pair, tokenizer: Tokenizer, format: str) -> tuple[list[int], list[bool]]:
    """Return tokens and mask of a question and its answer."""
    prompt = prompt_tokens(document.question, tokenizer, format)
    text = answer_text(document) if isinstance(document, Problem) else document.result.strip()
    end, rest = ([tokenizer.eos_id], []) if format == "plain" else tokenizer.turn_end
    answer = [*tokenizer.encode_text(f" {text}" if format == "plain" else text), *end]
    return prompt + answer + rest, [False] * len(prompt) + [True] * len(answer) + [False] * len(rest)


def _render_pair(pair: Pair, tokenizer: Tokenizer) -> tuple[list[int], list[bool]]:
    """Return tokens and mask of a prompt and its completion, word for word."""
    prompt, whole = tokenizer.encode(pair.prompt), tokenizer.encode(pair.prompt + pair.result)
    if whole[: len(prompt)] != prompt:  # a token across the border: generation never sees it
        whole = prompt + tokenizer.encode_text(pair.result)
    return [*whole, tokenizer.eos_id], [False] * len(prompt) + [True] * (len(whole) + 1 - len(prompt))


def _check_chat(document: Conversation, format: str) -> None:
    if format != "chat":
        raise InputError(f"{document.id}: messages are put into words by a chat template: set data.format=chat")


def read_prompts(path: str) -> list[dict[str, Any]]:
    """Return records with the text `prompt`: one for each line of a text file, or the rows of a data file.

    Raises: InputError naming the file and the line.
    """
    file = Path(path)
    if not file.is_file():
        raise InputError(f"--prompts {path} cannot be read: no such file")
    if file.suffix.lower() in READERS:
        found = [(where, record) for _, where, record in read_file(file)]
    else:
        try:
            lines = file.read_text(encoding="utf-8-sig").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"--prompts {path} cannot be read: {error}") from None
        found = [(f"{path}, line {number}", {"prompt": line}) for number, line in enumerate(lines, 1) if line.strip()]
        if found and all(is_object(record["prompt"]) for _, record in found):
            raise InputError(f"--prompts {path} holds JSON, an object a line: name it {file.stem}.jsonl")
    if not found:
        raise InputError(f"--prompts {path} holds no prompt")
    for where, record in found:
        if not isinstance(record, dict):
            raise InputError(f"--prompts {where}: not a JSON object")
        if not isinstance(record.get("prompt"), str):
            raise InputError(f"--prompts {where}: the row has {shown(record)}, and needs text under 'prompt'")
    return [record for _, record in found]
