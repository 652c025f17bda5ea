"""The texts that an analysis runs: prompts of a file, or questions of a task, and what is given to follow them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from sst_jax.data import tasks
from sst_jax.data.documents import Document
from sst_jax.data.problems import word_problems
from sst_jax.data.prompts import asked_tokens, read_prompts, render
from sst_jax.data.tokenizer import Tokenizer
from sst_jax.errors import InputError
from sst_jax.inference.model import Model
from sst_jax.lab.analysis.collect import Text
from sst_jax.types import Tokens


class Question(NamedTuple):
    """A prompt before it is tokenised.

    prompt   as written, of a file; None: a task's question, in the format that the model was trained with
    follows  text after the prompt, as written; None: it is generated, or the problem's worked answer
    """

    id: str
    prompt: str | None
    follows: str | None = None
    problem: Document | None = None


def from_file(path: str) -> list[Question]:
    """Return the prompts of a file, one a line, or .jsonl with `prompt` and optionally `id` and `text`.

    Raises: InputError as `read_prompts`, and where some prompts have a text and others none.
    """
    records = read_prompts(path)
    given = [isinstance(record.get("text"), str) for record in records]
    if any("text" in record for record in records) and not all(given):
        raise InputError(
            f"--prompts {path}, prompt {given.index(False) + 1}, has no text under the key text; give one "
            "to every prompt or to none"
        )
    return [
        Question(str(record.get("id", f"prompt {number}")), record["prompt"], record.get("text"))
        for number, record in enumerate(records, 1)
    ]


def from_task(name: str, data: str | None, worked: bool) -> list[Question]:
    """Return the questions of a task of `evaluate`; `data`: the folder with its file, None: from the hub.

    Raises: InputError where the task is unknown or cannot be read, or has no worked answers where they are wanted.
    """
    task = tasks.find(name)
    if worked and not task.worked:
        raise InputError(f"--text worked needs worked answers, which {task.name} has none of")
    return [Question(item.id, None, problem=item.problem) for item in task.read(data)]


def tokenised(questions: Sequence[Question], model: Model, format: str | None, worked: bool) -> list[Text]:
    """Return prompts, and what is given to follow them, as tokens.

    Args:
        questions: of a file or a task.
        model: whose tokenizer and, for `format` None, whose training format is used.
        format: of a task's prompts, "plain" or "chat".
        worked: follow a task's questions with the worked answers.
    """
    tokenizer, format = model.tokenizer, format or model.prompt_format
    texts = []
    for question in questions:
        given = None
        if question.problem is not None:
            prompt = asked_tokens(question.problem, tokenizer, format)
            if worked:
                given = render(question.problem, tokenizer, format).tokens[len(prompt) :].tolist()
        else:
            prompt = tokenizer.encode(question.prompt or "")
            if question.follows is not None:
                given = tokenizer.encode_text(question.follows)
        texts.append(Text(question.id, prompt, given))
    return texts


def running_text(tokenizer: Tokenizer, file: str | None, batch: int, length: int) -> Tokens:
    """Return `batch` sequences of `length` tokens, each beginning with BOS where the model's texts do.

    Args:
        tokenizer: of the model.
        file: UTF-8 text; None: the embedded word problems.
        batch: B.
        length: T.

    Raises: InputError on a file that cannot be read or is too short.
    """
    if file is None:
        problems = word_problems("validation", 40 * batch, 0)
        text = "\n\n".join(f"Question: {problem.question}\nAnswer: {problem.answer}" for problem in problems)
    else:
        try:
            text = Path(file).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"--text {file} cannot be read: {error}") from None
    ids, begins = tokenizer.encode_text(text), [tokenizer.bos_id] if tokenizer.add_bos else []
    width = length - len(begins)
    if len(ids) < batch * width:
        raise InputError(
            f"--text {file or '(embedded)'} has {len(ids)} tokens; {batch} sequences of {length} need {batch * width}"
        )
    body = np.asarray(ids[: batch * width], np.int32).reshape(batch, width)
    return np.concatenate([np.tile(np.array(begins, np.int32), (batch, 1)), body], axis=1)
