"""Render a problem as an example: prompt and answer as tokens, with a mask of the answer.

Prompt and answer are tokenised apart, so that training sees exactly the prompt that generation is given.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sst_jax.data.formats import shown
from sst_jax.data.problems import Problem
from sst_jax.data.records import read_jsonl
from sst_jax.data.tokenizer import Tokenizer
from sst_jax.data.unicode import check_unicode
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
    """Return the ids of the prompt, BOS first.

    plain: "Question: ...\\nAnswer:", without a space after it: SentencePiece keeps a space with the word that follows.
    chat: the question as a user turn of the tokenizer's template, then the opening of the model's turn.
    Raises: InputError for another format.
    """
    if format == "plain":
        return tokenizer.encode(f"Question: {question.strip()}\nAnswer:")
    if format == "chat":
        return tokenizer.chat([{"role": "user", "content": question}])
    raise InputError(f"data.format={format!r} is not one of {', '.join(map(repr, FORMATS))}")


def answer_text(problem: Problem) -> str:
    """Return the worked solution with GSM8K's result line, or the result alone where there is no solution."""
    return f"{problem.answer}\n#### {problem.result}" if problem.answer else problem.result


def whole_text(problem: Problem) -> str:
    """Return question and answer as the plain format puts them, or the bare text where nothing is asked."""
    answer = answer_text(problem)
    return f"Question: {problem.question}\nAnswer: {answer}" if problem.question else answer


def render(problem: Problem, tokenizer: Tokenizer, format: str = "plain") -> Example:
    """Return the whole example.

    It begins with `prompt_tokens(problem.question, ...)`; the answer ends with EOS (plain), or with the end of the turn
    and a newline that is not scored (chat). Raises: InputError for another format.
    """
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


def read_prompts(path: str) -> list[dict[str, Any]]:
    """Return records with the text `prompt`: one for each line of a text file, or the objects of a JSON one.

    Raises: InputError naming the file and the line.
    """
    file = Path(path)
    if not file.is_file():
        raise InputError(f"--prompts {path} cannot be read: no such file")
    if file.suffix.lower() in (".jsonl", ".ndjson", ".json"):
        found = [(where, record) for _, where, record in read_jsonl(file)]
    else:
        try:
            lines = file.read_text(encoding="utf-8-sig").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"--prompts {path} cannot be read: {error}") from None
        found = [(f"{path}, line {number}", {"prompt": line}) for number, line in enumerate(lines, 1) if line.strip()]
        if found and all(_is_object(record["prompt"]) for _, record in found):
            raise InputError(f"--prompts {path} holds JSON, an object a line: name it {file.stem}.jsonl")
    if not found:
        raise InputError(f"--prompts {path} holds no prompt")
    for where, record in found:
        if not isinstance(record, dict):
            raise InputError(f"--prompts {where}: not a JSON object")
        if not isinstance(record.get("prompt"), str):
            raise InputError(f"--prompts {where}: the row has {shown(record)}, and needs text under 'prompt'")
        check_unicode(record, f"--prompts {where}: 'prompt'")
    return [record for _, record in found]


def _is_object(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False
