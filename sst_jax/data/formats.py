"""What one row of a file is: one registry of row formats, for training, evaluation and calibration.

messages           messages: a list of {"role", "content"}, contents as text or text parts
sharegpt           conversations: a list of {"from", "value"}
prompt_completion  prompt, completion: texts, or lists of messages
instruction        instruction, output, and an input that may be missing or empty
question_answer    question, answer
text               text
gsm8k              question, answer: a worked solution, then "####" and the result
math               problem, answer: a formula
gpqa               Question, Correct Answer, Incorrect Answer 1, 2 and 3
arc                question, choices (the lists text and label), answerKey

The first five are the conventions of TRL, Axolotl and the hub. A format is the keys that its rows have and a function
that makes an item of a row. A new one is that function and an entry of `ROW_FORMATS`; keys beyond those it wants are
ignored. See docs/adding-a-dataset.md.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from sst_jax.data.documents import Conversation, Item, Message, Pair, Problem
from sst_jax.data.records import Record
from sst_jax.errors import InputError

LETTERS = "ABCDEFGHIJ"
ROLES = ("system", "developer", "user", "assistant", "tool")
SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "model": "assistant", "function_response": "tool"}
SHOWN = 12  # keys of a row that a message names


class Row(NamedTuple):
    """A row's fields; `where` names its place in words, `source` and `place` (from 0) make its id."""

    fields: Mapping[str, object]
    where: str
    source: str
    place: int

    def id(self, key: str | None = None) -> str:
        """Return the row's id: with the value of `key` where the row has one, else with its place."""
        return f"{self.source}/{(self.fields.get(key) if key else None) or self.place}"

    def string(self, key: str) -> str:
        """Return a field as it stands. Raises: InputError where it is not text."""
        value = self.fields.get(key)
        if not isinstance(value, str):
            raise InputError(f"{self.where}: field {key!r} is not text")
        return value

    def text(self, key: str) -> str:
        """Return a field without spaces around it. Raises: InputError where it is not text, or empty."""
        value = self.string(key).strip()
        if not value:
            raise InputError(f"{self.where}: field {key!r} is empty")
        return value


class Format(NamedTuple):
    """How rows are written: the keys that every row has, and the item that a row becomes."""

    keys: tuple[str, ...]
    item: Callable[[Row], Item]


def read_row(format: Format, record: Record, source: str) -> Item:
    """Return the item of a record; `source` begins its id.

    Raises: InputError naming the file, the line and the field; where a key is missing, the keys seen and those wanted.
    """
    fields = fields_of(record)
    missing = [key for key in format.keys if key not in fields]
    if missing:
        raise InputError(
            f"{record.where}: field {missing[0]!r} is missing; the row has {shown(fields)}, and needs "
            f"{shown(format.keys)}"
        )
    return format.item(Row(fields, record.where, source, record.place))


def recognise(record: Record) -> str:
    """Return the first format of ROW_FORMATS whose keys a record has, by its name.

    Raises: InputError naming the file, the line, the keys seen and those of every format.
    """
    fields = fields_of(record)
    for name, format in ROW_FORMATS.items():
        if all(key in fields for key in format.keys):
            return name
    known = "; or ".join(dict.fromkeys(shown(format.keys) for format in ROW_FORMATS.values()))
    raise InputError(f"{record.where}: the row has {shown(fields)}, and needs {known}")


def fields_of(record: Record) -> Mapping[str, object]:
    """Return a record's fields. Raises: InputError where it is not a JSON object."""
    if not isinstance(record.value, Mapping):
        raise InputError(f"{record.where}: not a JSON object")
    return record.value


def shown(keys: Mapping[str, object] | Sequence[str]) -> str:
    """Return keys for a message: in quotes, the first twelve of them, long ones cut."""
    names = [repr(key if len(key) <= 40 else f"{key[:40]}...") for key in keys]
    return ", ".join(names[:SHOWN]) + f" and {len(names) - SHOWN} more" * (len(names) > SHOWN) if names else "no keys"


# ---------------------------------------------------------------------------------------------------------- Formats


def text(row: Row) -> Item:
    """Read running text: nothing is asked."""
    return Item(Problem(row.id(), "", "", row.string("text")))


def question_answer(row: Row) -> Item:
    """Read a question and its answer, which is not looked into."""
    return Item(Problem(row.id(), row.text("question"), "", row.text("answer")))


def instruction(row: Row) -> Item:
    """Read an instruction (Alpaca's form): with the input below it, where there is one, it is asked as one text."""
    asked = row.text("instruction")
    if row.fields.get("input") is not None:
        asked = f"{asked}\n\n{row.string('input').strip()}".strip()
    return Item(Problem(row.id(), asked, "", row.text("output")))


def prompt_completion(row: Row) -> Item:
    """Read a prompt and its completion, word for word; where both are messages, the start and the end of a talk."""
    prompt, completion = row.fields["prompt"], row.fields["completion"]
    if isinstance(prompt, str) or isinstance(completion, str):
        if not row.string("completion"):
            raise InputError(f"{row.where}: field 'completion' is empty")
        return Item(Pair(row.id(), row.string("prompt"), row.string("completion")))
    asked, answered = read_messages(row, "prompt"), read_messages(row, "completion")
    return Item(_conversation(row, (*asked, *answered), len(asked)))


def messages(row: Row) -> Item:
    """Read a conversation; all of its answers are there to be learned."""
    return Item(_conversation(row, read_messages(row, "messages"), 0))


def sharegpt(row: Row) -> Item:
    """Read a conversation in ShareGPT's form."""
    turns = row.fields["conversations"]
    if not isinstance(turns, Sequence) or not all(isinstance(turn, Mapping) for turn in turns):
        raise InputError(f"{row.where}: field 'conversations' is not a list of objects")
    spoken = [
        {"role": SHAREGPT_ROLES.get(str(turn.get("from")), turn.get("from")), "content": turn.get("value")}
        if "from" in turn
        else turn
        for turn in turns
    ]
    renamed = row._replace(fields={"conversations": spoken})
    return Item(_conversation(row, read_messages(renamed, "conversations"), 0))


def read_messages(row: Row, key: str) -> tuple[Message, ...]:
    """Return the messages of a field, their contents as text: text parts are put together.

    Raises: InputError naming the message where it is none, or holds something other than text.
    """
    value = row.fields[key]
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        raise InputError(f"{row.where}: field {key!r} is not a list of messages")
    return tuple(_message(message, f"{row.where}: {key}[{at}]") for at, message in enumerate(value))


def _message(message: object, where: str) -> Message:
    if not isinstance(message, Mapping):
        raise InputError(f"{where} is not an object with 'role' and 'content'")
    if message.get("role") not in ROLES:
        raise InputError(f"{where} has the role {str(message.get('role'))[:40]!r}, which is none of {', '.join(ROLES)}")
    content = message.get("content")
    if isinstance(content, Sequence) and not isinstance(content, str):
        parts = [part.get("text") if isinstance(part, Mapping) else part for part in content]
        if not all(isinstance(part, str) for part in parts):
            raise InputError(f"{where} has a part that is not text")
        content = "".join(str(part) for part in parts)
    if content is None and message.get("tool_calls"):
        content = ""
    if not isinstance(content, str):
        raise InputError(f"{where} has no text as its 'content'")
    # Parquet gives every message the fields of all, with None where it has none.
    return {**{field: value for field, value in message.items() if value is not None}, "content": content}


def _conversation(row: Row, messages: tuple[Message, ...], given: int) -> Conversation:
    answers = [message for message in messages[given:] if message["role"] == "assistant"]
    if not answers:
        raise InputError(f"{row.where}: no message {'of the completion ' if given else ''}is from 'assistant'")
    if row.fields.get("tools"):
        raise InputError(f"{row.where}: field 'tools' is not supported: write them into a system message")
    return Conversation(row.id(), messages, given, str(answers[-1]["content"]))


def gsm8k(row: Row) -> Item:
    """Read GSM8K (arXiv 2110.14168): calculator marks are taken out of the solution, commas out of the result."""
    question, answer = row.text("question"), row.text("answer")
    solution, mark, result = answer.rpartition("####")
    result = result.strip().replace(",", "")
    if not mark:
        raise InputError(f"{row.where}: the answer lacks its '####' line")
    if not re.fullmatch(r"-?\d+(\.\d+)?", result):
        raise InputError(f"{row.where}: {result!r} after '####' is not a number")
    return Item(Problem(row.id(), question, re.sub(r"<<[^<>\n]*>>", "", solution).strip(), result))


def math(row: Row) -> Item:
    """Read MATH (arXiv 2103.03874): the answer is asked for in a box."""
    asked = f"{row.text('problem')}\nEnd with the final answer in \\boxed{{}}."
    return Item(Problem(row.id(), asked, str(row.fields.get("solution", "")), row.text("answer")))


def gpqa(row: Row) -> Item:
    """Read GPQA (arXiv 2311.12022): the choices are shown in `frozen_order`."""
    question = row.text("Question")
    choices = [row.text(name) for name in ("Correct Answer", *(f"Incorrect Answer {i}" for i in (1, 2, 3)))]
    order = frozen_order(question, choices)
    return multiple_choice(row.id("Record ID"), question, [choices[i] for i in order], order.index(0), order)


def arc(row: Row) -> Item:
    """Read ARC (arXiv 1803.05457): the choices keep the order of the data."""
    question, key, choices = (row.fields[name] for name in ("question", "answerKey", "choices"))
    texts, labels = (choices.get(name) if isinstance(choices, Mapping) else None for name in ("text", "label"))
    if not isinstance(texts, list) or not isinstance(labels, list) or not all(isinstance(text, str) for text in texts):
        raise InputError(f"{row.where}: field 'choices' must hold the lists 'text' (of texts) and 'label'")
    if not isinstance(question, str) or key not in labels or len(texts) != len(labels) or len(texts) > len(LETTERS):
        raise InputError(f"{row.where}: needs a question, as many labels as choices, and an answerKey among the labels")
    return multiple_choice(row.id("id"), question, texts, labels.index(key), tuple(range(len(texts))))


def frozen_order(question: str, choices: Sequence[str]) -> tuple[int, ...]:
    """Return the order in which choices are shown: by a hash of question and choice, so the same in every run."""
    keys = [hashlib.sha256(f"{question}\0{choice}".encode()).hexdigest() for choice in choices]
    return tuple(sorted(range(len(choices)), key=lambda index: (keys[index], index)))


def multiple_choice(identity: str, question: str, choices: Sequence[str], right: int, order: tuple[int, ...]) -> Item:
    """Return the item of a question whose choices are shown by letter.

    Args:
        identity: of the item.
        question: what is asked.
        choices: as they are shown.
        right: place of the right one.
        order: the place in the data that each shown choice comes from.
    """
    lines = [f"({name}) {choice.strip()}" for name, choice in zip(LETTERS, choices, strict=False)]
    asked = (
        "\n".join([question.strip(), *lines])
        + '\nThink step by step, then end with "The answer is (X)", X being the letter of the right choice.'
    )
    return Item(Problem(identity, asked, "", LETTERS[right]), order)


# Where rows may be of any format, the first whose keys they have is taken.
ROW_FORMATS = {
    "messages": Format(("messages",), messages),
    "sharegpt": Format(("conversations",), sharegpt),
    "prompt_completion": Format(("prompt", "completion"), prompt_completion),
    "instruction": Format(("instruction", "output"), instruction),
    "question_answer": Format(("question", "answer"), question_answer),
    "text": Format(("text",), text),
    "gsm8k": Format(("question", "answer"), gsm8k),
    "math": Format(("problem", "answer"), math),
    "gpqa": Format(
        ("Question", "Correct Answer", "Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3"), gpqa
    ),
    "arc": Format(("question", "choices", "answerKey"), arc),
}
