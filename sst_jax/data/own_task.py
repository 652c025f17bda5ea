"""A task of one's own: a file of questions and answers, and how answers are graded.

A row has `prompt` (asked as it stands, in a chat as the user's turn), `messages` (put into words by the chat template),
or `question`; `answer`, a text or a number; and for the grade "choice" `choices`, a list of texts, where `answer` is
one of them, its letter, or its place from 0.
"""

from __future__ import annotations

import os
import re
import types
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

from sst_jax.data import grading
from sst_jax.data.documents import Conversation, Document, Item, Pair, Problem
from sst_jax.data.formats import LETTERS, Row, fields_of, multiple_choice, read_messages, shown
from sst_jax.data.grading import Grading
from sst_jax.data.own import Rows
from sst_jax.errors import InputError

GRADES = {
    "exact": grading.EXACT,
    "number": grading.LAST_NUMBER,
    "choice": grading.LETTER,
    "math": grading.FORMULA,
}
REGEX, PYTHON = "regex:", "python:"
SPELLINGS = f"{', '.join(GRADES)}, {REGEX}PATTERN or {PYTHON}FILE"
ASKED = ("prompt", "messages", "question")  # one of these a row has

Grade = Callable[[str, Mapping[str, object]], object]  # (text, row) -> whether the answer is right


class OwnTask(NamedTuple):
    """The questions of a file, as a `datasets.Source`, and how their answers are graded."""

    file: str
    grade: str
    grading: Grading
    trains: bool = False

    @property
    def name(self) -> str:
        """What the task is called: file and grade."""
        return f"{Path(self.file).name}:{self.grade}"

    def training(self, path: str, heldout: int, limit: int, seed: int) -> tuple[list[Document], list[Document]]:
        raise InputError(f"{self.file} is a test: train on rows with data.path")

    def test(self, path: str | None) -> list[Item]:
        """Return the items.

        Raises: InputError naming the file and line of a row that cannot be asked or graded; with --data.
        """
        if path is not None:
            raise InputError(f"--data {path}: the task {self.file} is its own data")
        items = []
        for record in Rows(self.file, setting="--task").records():
            row = Row(fields_of(record), record.where, Path(self.file).name, record.place)
            items.append(read_item(row, self.grade))
            if self.grading.judge is not None:
                self.grading.judge.rows[items[-1].id] = row.fields
        if not items:
            raise InputError(f"--task {self.file}: holds no rows")
        return items


def find(spelling: str, allow_code: bool = False) -> OwnTask | None:
    """Return the task that "FILE:GRADE" means; None where it begins with no file.

    Raises: InputError where the grade is missing or unknown; where it is code, unless `allow_code`.
    """
    ends = [*(place.start() for place in re.finditer(":", spelling)), len(spelling)]
    end = next((end for end in ends if os.path.isfile(os.path.expanduser(spelling[:end]))), None)
    if end is None:
        return None
    file, grade = spelling[:end], spelling[end + 1 :]
    if not grade:
        raise InputError(f"--task {file} is a file: say with --grade how its answers are graded ({SPELLINGS})")
    return OwnTask(file, grade, find_grading(grade, allow_code))


def find_grading(grade: str, allow_code: bool) -> Grading:
    """Return how answers are graded.

    Raises: InputError where the grade is unknown, or its pattern or function is none; where it is code, unless
    `allow_code`.
    """
    if grade in GRADES:
        return GRADES[grade]
    if grade.startswith(REGEX):
        try:
            return grading.by_pattern(re.compile(grade.removeprefix(REGEX)))
        except re.error as error:
            raise InputError(f"--grade {grade}: not a regular expression ({error})") from None
    if grade.startswith(PYTHON):
        if not allow_code:
            raise InputError(f"--grade {grade} runs code: read it, then add --allow-code")
        return Grading(lambda text, strict: text.strip(), judge=Judge(_function(Path(grade.removeprefix(PYTHON)))))
    raise InputError(f"--grade {grade} is not one of {SPELLINGS}")


class Judge:
    """A function of the user's that says of a text whether it answers a row; `rows` are by item id."""

    def __init__(self, function: Grade):
        self.function = function
        self.rows: dict[str, Mapping[str, object]] = {}

    def __call__(self, text: str, identity: str) -> bool:
        """Return what the function says. Raises: InputError where it fails, or says neither True nor False."""
        try:
            found = self.function(text, self.rows[identity])
        except Exception as error:  # the user's code may fail in any way
            raise InputError(f"grade() failed on {identity}: {type(error).__name__}: {error}") from error
        if not isinstance(found, bool):
            raise InputError(f"grade() returned {found!r} for {identity}, which is neither True nor False")
        return found


def read_item(row: Row, grade: str) -> Item:
    """Return the item of a row.

    Raises: InputError naming file, line and field.
    """
    asked = [key for key in ASKED if key in row.fields]
    if not asked:
        raise InputError(f"{row.where}: the row has {shown(row.fields)}, and needs 'prompt', 'messages' or 'question'")
    if grade == "choice":
        return _choice(row, asked[0])
    answer = "" if grade.startswith(PYTHON) and "answer" not in row.fields else _answer(row)
    if grade == "number":
        try:
            grading.canonical(answer)
        except ValueError:
            raise InputError(f"{row.where}: answer {answer[:40]!r} is not a number, as --grade number needs") from None
    match asked[0]:
        case "messages":
            messages = read_messages(row, "messages")
            if messages[-1]["role"] == "assistant":
                raise InputError(f"{row.where}: the last message is the assistant's: nothing is asked")
            answered = (*messages, {"role": "assistant", "content": answer})
            return Item(Conversation(row.id("id"), answered, len(messages), answer))
        case "prompt":
            return Item(Pair(row.id("id"), row.string("prompt"), answer))
        case _:
            return Item(Problem(row.id("id"), row.text("question"), "", answer))


def _answer(row: Row) -> str:
    answer = row.fields.get("answer")
    if isinstance(answer, int | float) and not isinstance(answer, bool):
        return str(answer)
    return row.text("answer")


def _choice(row: Row, key: str) -> Item:
    choices, answer = row.fields.get("choices"), row.fields.get("answer")
    if not isinstance(choices, list) or not all(isinstance(choice, str) for choice in choices):
        raise InputError(f"{row.where}: field 'choices' is not a list of texts")
    if not 2 <= len(choices) <= len(LETTERS):
        raise InputError(f"{row.where}: field 'choices' has {len(choices)} texts; 2 to {len(LETTERS)} can be asked")
    if key == "messages":
        raise InputError(f"{row.where}: choices are put behind a 'prompt' or a 'question', not behind 'messages'")
    letters = LETTERS[: len(choices)]
    if isinstance(answer, str) and answer in choices:
        right = choices.index(answer)
    elif isinstance(answer, str) and len(answer) == 1 and answer.upper() in letters:
        right = letters.index(answer.upper())
    elif isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer < len(choices):
        right = answer
    else:
        raise InputError(f"{row.where}: answer {answer!r} is none of the choices, nor a letter or place of one")
    return multiple_choice(row.id("id"), row.text(key), choices, right, tuple(range(len(choices))))


def _function(file: Path) -> Grade:
    if not file.is_file() or file.suffix != ".py":
        raise InputError(f"--grade {PYTHON}{file}: no such Python file")
    module = types.ModuleType("sst_jax_own_grade")
    module.__file__ = str(file)
    try:
        # Not by the import system: of a file that was edited within a second it may run what it compiled before, and it
        # leaves __pycache__ beside it.
        exec(compile(file.read_bytes(), str(file), "exec"), vars(module))
    except Exception as error:  # the user's code may fail in any way
        raise InputError(f"--grade {PYTHON}{file}: {type(error).__name__}: {error}") from error
    function = getattr(module, "grade", None)
    if not callable(function):
        raise InputError(f"--grade {PYTHON}{file}: defines no function grade(text, row)")
    return function
