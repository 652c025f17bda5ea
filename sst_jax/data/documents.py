"""Documents: what training learns from and evaluation asks, before it is tokenised.

Problem       a question in words of ours around it (`prompts.py`), worked steps, a result; or a bare text
Pair          a prompt and its completion, word for word
Conversation  messages, which the model's chat template puts into words
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import NamedTuple

from sst_jax.data.chat_template import Message


class Problem(NamedTuple):
    """`question` is "" where nothing is asked; `answer` the worked solution without calculator marks and result line,
    or "" where only the result is to be written; `result` the number, without commas, the word, or the whole answer.
    """

    id: str
    question: str
    answer: str
    result: str


class Pair(NamedTuple):
    """`prompt` is asked and `result` is answered as they stand."""

    id: str
    prompt: str
    result: str

    @property
    def question(self) -> str:
        """What is asked."""
        return self.prompt


class Conversation(NamedTuple):
    """Messages in their order.

    given   how many of the first ones are a prompt: they are asked, whoever speaks, and never learned
    result  the last answer, in words
    """

    id: str
    messages: tuple[Message, ...]
    given: int
    result: str

    @property
    def question(self) -> str:
        """The last thing that a user says."""
        asked = (message["content"] for message in reversed(self.messages) if message["role"] == "user")
        return str(next(asked, ""))

    @property
    def asked(self) -> tuple[Message, ...]:
        """The messages before the last answer, or all of them where none has been given."""
        last = max((at for at, message in enumerate(self.messages) if message["role"] == "assistant"), default=None)
        return self.messages if last is None or last < self.given else self.messages[:last]


Document = Problem | Pair | Conversation


class Item(NamedTuple):
    """A document as it is asked. `order`: for choices, the place in the data that each shown choice comes from."""

    problem: Document
    order: tuple[int, ...] = ()

    @property
    def id(self) -> str:
        return self.problem.id

    def chance(self, otherwise: float) -> float:
        """Return the chance that a random answer is right: 1 / choices, or `otherwise` where there are none."""
        return 1.0 / len(self.order) if self.order else otherwise


def result_only(problems: Iterable[Document]) -> list[Document]:
    """Return the same documents; problems without their intermediate steps."""
    return [problem._replace(answer="") if isinstance(problem, Problem) else problem for problem in problems]


def words(document: Document) -> tuple[str, ...]:
    """Return all that a document is, as texts: documents with equal ones are equal."""
    return tuple(part if isinstance(part, str) else json.dumps(part, sort_keys=True) for part in document)
