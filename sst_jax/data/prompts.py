"""From a problem to an example: prompt and answer as tokens, and which of them are the answer.

Prompt and answer are tokenised apart, so that training sees exactly the prompt that generation is given.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from sst_jax.data.problems import Problem
from sst_jax.data.tokenizer import Tokenizer
from sst_jax.errors import InputError

FORMATS = ("plain", "chat")


class Example(NamedTuple):
    """tokens int32 [T], BOS first; answer_mask bool [T].

    answer_mask[t] says that tokens[t] itself belongs to the answer (aligned with targets): a loss over logits[t - 1]
    scores it. The end token is part of the answer, the prompt is not.
    """

    tokens: np.ndarray
    answer_mask: np.ndarray
    id: str


def prompt_tokens(question: str, tokenizer: Tokenizer, format: str = "plain") -> list[int]:
    """Ids of the prompt, BOS first.

    plain: "Question: ...\\nAnswer:", without a space behind it: SentencePiece keeps a space with the word that follows.
    chat: the question as a user turn of the tokenizer's template, then the opening of the model's turn.
    Raises: InputError for another format.
    """
    if format == "plain":
        return tokenizer.encode(f"Question: {question.strip()}\nAnswer:")
    if format == "chat":
        return tokenizer.chat([{"role": "user", "content": question}])
    raise InputError(f"data.format={format!r} is not one of {', '.join(map(repr, FORMATS))}")


def answer_text(problem: Problem) -> str:
    """The worked solution and GSM8K's result line."""
    return f"{problem.answer}\n#### {problem.result}"


def render(problem: Problem, tokenizer: Tokenizer, format: str = "plain") -> Example:
    """The whole example; it begins with `prompt_tokens(problem.question, ...)` and ends the answer with eos (plain) or
    the end of the turn and a newline, which is not scored (chat). Raises: InputError for another format."""
    prompt = prompt_tokens(problem.question, tokenizer, format)
    if format == "plain":
        answer, rest = [*tokenizer.encode_text(" " + answer_text(problem)), tokenizer.eos_id], []
    else:
        answer = [*tokenizer.encode_text(answer_text(problem)), tokenizer.turn_end_id]
        rest = tokenizer.encode_text("\n")
    tokens = np.asarray(prompt + answer + rest, np.int32)
    mask = np.zeros(tokens.shape, bool)
    mask[len(prompt) : len(prompt) + len(answer)] = True
    return Example(tokens, mask, problem.id)
