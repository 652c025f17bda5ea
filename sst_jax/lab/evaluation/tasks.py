"""Tasks: what is asked, what is right, and how an answer is read.

gsm8k          test.jsonl in a folder, or openai/gsm8k
gpqa_diamond   gpqa_diamond.csv or .jsonl in a folder, or Idavidrein/gpqa (gated)
arc_challenge  ARC-Challenge-Test.jsonl in a folder (the hub's fields), or allenai/ai2_arc
math_500       test.jsonl in a folder, or HuggingFaceH4/MATH-500
words          the embedded word problems, templates and numbers that training never uses
boxes, ...     the stories of `data/tracking.py`, their test split; "boxes:8" are those of eight steps

"gsm8k:result" and "words:result" are the same problems, asked of a model that writes the result and no steps to it.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sst_jax.data import tracking
from sst_jax.data.grading import canonical
from sst_jax.data.problems import RESULT, Problem, load_gsm8k, result_only, word_problems
from sst_jax.data.records import Record, read_csv, read_hub, read_jsonl
from sst_jax.errors import InputError
from sst_jax.lab.evaluation import extractors

GENERATED = 500
DRAWN = 10 * GENERATED  # stories drawn for as many different ones
SHORT = 12  # tokens for an answer that is a word or a number
HIDEABLE = ("gsm8k", "words")
LETTERS = "ABCDEFGHIJ"


class Item(NamedTuple):
    """A problem of a task. `order`: for choices, the place in the data that each shown choice comes from."""

    problem: Problem
    order: tuple[int, ...] = ()

    @property
    def id(self) -> str:
        return self.problem.id

    def chance(self, otherwise: float) -> float:
        """Return the chance that a random answer is right: 1 / choices, or `otherwise` where there are none."""
        return 1.0 / len(self.order) if self.order else otherwise


@dataclasses.dataclass(frozen=True)
class Task:
    """read       items from a folder, or from the hub for None
    extract    (text, strict) to an answer comparable with `Problem.result`, or None
    max_new_tokens  room for an answer unless told otherwise
    worked     what is to be written is known in full, so that its loss can be measured
    checkable  answers are numbers or formulas, on which math-verify can give a second opinion
    """

    name: str
    read: Callable[[str | None], list[Item]]
    extract: Callable[[str, bool], str | None]
    max_new_tokens: int
    worked: bool = False
    checkable: bool = False


def find(name: str) -> Task:
    """Return the task of that name. Raises: InputError with the known names."""
    if (spec := tracking.parse(name)) is not None:
        return Task(name, functools.partial(_read_stories, spec), extractors.word, SHORT, worked=True)
    kind, colon, part = name.partition(":")
    if kind in HIDEABLE and part == RESULT:
        read = functools.partial(_read_results, TASKS[kind].read)
        return Task(name, read, extractors.first_number, SHORT, worked=True, checkable=True)
    if kind not in TASKS or colon:
        known = (*TASKS, *(f"{kind}:{RESULT}" for kind in HIDEABLE), *tracking.STORIES)
        raise InputError(f"--task {name} is unknown; tasks are {', '.join(known)}, and --tasks takes the harness's")
    return TASKS[name]


def items_digest(items: Sequence[Item]) -> str:
    """Return the SHA-256 over all items as they are asked; it identifies the test."""
    total = hashlib.sha256()
    for item in items:
        total.update("\0".join((*item.problem, repr(item.order), "")).encode())
    return total.hexdigest()


# ----------------------------------------------------------------------------------------------------------- Reading


def _read_gsm8k(source: str | None) -> list[Item]:
    problems = load_gsm8k(source or "openai/gsm8k", "test", "--data")
    return [Item(problem._replace(result=canonical(problem.result))) for problem in problems]


def _read_words(source: str | None) -> list[Item]:
    if source is not None:
        raise InputError(f"--data {source}: the task words is embedded and takes no data")
    return [Item(problem) for problem in word_problems("test", GENERATED, 0)]


def _read_stories(spec: tracking.Spec, source: str | None) -> list[Item]:
    if source is not None:
        raise InputError(f"--data {source}: the task {spec.kind} is generated and takes no data")
    # No story twice: of short ones there are few, and intervals take items for independent.
    found: dict[str, Problem] = {}
    for problem in tracking.Stories(spec, "test", DRAWN):
        found.setdefault(problem.question, problem)
        if len(found) == GENERATED:
            break
    return [Item(problem) for problem in found.values()]


def _read_results(read: Callable[[str | None], list[Item]], source: str | None) -> list[Item]:
    return [Item(problem) for problem in result_only(item.problem for item in read(source))]


def _read_math(source: str | None) -> list[Item]:
    found = []
    for index, where, row in _records(source, ("test.jsonl",), ("HuggingFaceH4/MATH-500", "default", "test")):
        question, answer = (_text(row, field, where) for field in ("problem", "answer"))
        asked = f"{question}\nEnd with the final answer in \\boxed{{}}."
        problem = Problem(f"math_500/{index}", asked, str(row.get("solution", "")), extractors.plain_formula(answer))
        found.append(Item(problem))
    return _some(found, source)


def _read_gpqa(source: str | None) -> list[Item]:
    files = ("gpqa_diamond.csv", "gpqa_diamond.jsonl")
    found = []
    for index, where, row in _records(source, files, ("Idavidrein/gpqa", "gpqa_diamond", "train")):
        question = _text(row, "Question", where)
        choices = [
            _text(row, name, where) for name in ("Correct Answer", *(f"Incorrect Answer {i}" for i in (1, 2, 3)))
        ]
        order = frozen_order(question, choices)
        identity = f"gpqa_diamond/{row.get('Record ID') or index}"
        found.append(_multiple_choice(identity, question, [choices[i] for i in order], order.index(0), order))
    return _some(found, source)


def _read_arc(source: str | None) -> list[Item]:
    found = []
    hub = ("allenai/ai2_arc", "ARC-Challenge", "test")
    for index, where, row in _records(source, ("ARC-Challenge-Test.jsonl",), hub):
        question, key, choices = (row.get(name) for name in ("question", "answerKey", "choices"))
        if not isinstance(choices, Mapping) or not all(
            isinstance(choices.get(name), list) for name in ("text", "label")
        ):
            raise InputError(f"{where}: field 'choices' must hold the lists 'text' and 'label'")
        texts, labels = choices["text"], choices["label"]
        if not isinstance(question, str) or key not in labels or len(texts) != len(labels) or len(texts) > len(LETTERS):
            raise InputError(f"{where}: needs a question, as many labels as choices, and an answerKey among the labels")
        identity = f"arc_challenge/{row.get('id') or index}"
        found.append(_multiple_choice(identity, question, texts, labels.index(key), tuple(range(len(texts)))))
    return _some(found, source)


def frozen_order(question: str, choices: Sequence[str]) -> tuple[int, ...]:
    """Return the order in which choices are shown: by a hash of question and choice, so the same in every run."""
    keys = [hashlib.sha256(f"{question}\0{choice}".encode()).hexdigest() for choice in choices]
    return tuple(sorted(range(len(choices)), key=lambda index: (keys[index], index)))


def _multiple_choice(identity: str, question: str, shown: Sequence[str], right: int, order: tuple[int, ...]) -> Item:
    lines = [f"({name}) {choice.strip()}" for name, choice in zip(LETTERS, shown, strict=False)]
    asked = (
        "\n".join([question.strip(), *lines])
        + '\nThink step by step, then end with "The answer is (X)", X being the letter of the right choice.'
    )
    return Item(Problem(identity, asked, "", LETTERS[right]), order)


def _records(source: str | None, files: Sequence[str], hub: tuple[str, str, str]) -> Iterator[Record]:
    """Yield records from the one of `files` that a folder holds, from a file, or from the hub."""
    if source is None:
        advice = f"Or give --data a folder that holds {' or '.join(files)}"
        records = read_hub(*hub, advice)
    else:
        path = Path(source)
        file = path if path.is_file() else next((path / name for name in files if (path / name).is_file()), None)
        if file is None:
            raise InputError(f"--data {source} holds no {' or '.join(files)}")
        records = read_csv(file) if file.suffix == ".csv" else read_jsonl(file)
    for record in records:
        if not isinstance(record.value, Mapping):
            raise InputError(f"{record.where}: not a JSON object")
        yield record


def _text(row: Mapping[str, Any], field: str, where: str) -> str:
    value = row.get(field)
    if not isinstance(value, str) or not value.strip():
        raise InputError(f"{where}: field {field!r} is missing or not text")
    return value.strip()


def _some(items: list[Item], source: str | None) -> list[Item]:
    if not items:
        raise InputError(f"--data {source} holds no items")
    seen: set[str] = set()
    for item in items:
        if item.id in seen:
            raise InputError(f"--data {source} holds two items with the id {item.id}")
        seen.add(item.id)
    return items


TASKS = {
    task.name: task
    for task in (
        Task("gsm8k", _read_gsm8k, extractors.number, 512, worked=True, checkable=True),
        Task("gpqa_diamond", _read_gpqa, extractors.letter, 2048),
        Task("arc_challenge", _read_arc, extractors.letter, 512),
        Task("math_500", _read_math, extractors.formula, 2048, checkable=True),
        Task("words", _read_words, extractors.number, 256, worked=True, checkable=True),
    )
}
