"""Named data sets: one registry, for training (`data.name`) and evaluation (`--task`).

gsm8k          train.jsonl and test.jsonl in a folder, or openai/gsm8k
gpqa_diamond   gpqa_diamond.csv or .jsonl in a folder, or Idavidrein/gpqa (gated); test alone
arc_challenge  ARC-Challenge-Test.jsonl in a folder (the hub's fields), or allenai/ai2_arc; test alone
math_500       test.jsonl in a folder, or HuggingFaceH4/MATH-500; test alone
alpaca         instructions: train.jsonl in a folder, a file, or tatsu-lab/alpaca (CC BY-NC 4.0); no test
words          the embedded word problems of `data/problems.py`
boxes, ...     the stories of `data/tracking.py`; "boxes:8" are those of eight steps

"gsm8k:result" and "words:result" are the same problems with the result as the whole answer, without steps to it. A new
data set is an entry of `DATASETS`; see docs/adding-a-dataset.md.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol, runtime_checkable

from sst_jax.data import grading, tracking
from sst_jax.data.documents import Document, Item, Problem, result_only
from sst_jax.data.formats import ROW_FORMATS, read_row
from sst_jax.data.grading import Grading
from sst_jax.data.problems import WordProblems
from sst_jax.data.records import Record, is_hub_id, read_csv, read_hub, read_jsonl
from sst_jax.errors import InputError

RESULT = "result"  # behind a data set's name: "gsm8k:result" is `result_only` of it
TRAINED = 4096  # generated problems in training, unless a limit says otherwise
TESTED = 500  # generated problems in a test
DRAWN = 10 * TESTED  # problems drawn for as many different ones
GSM8K_HUB, GSM8K_TRAIN = "openai/gsm8k", "train.jsonl"
SHORT = 12  # tokens for an answer that is a word or a number


@runtime_checkable
class Source(Protocol):
    """Where a data set's problems come from."""

    @property
    def trains(self) -> bool:
        """Whether it has problems to train on."""

    def training(self, path: str, heldout: int, limit: int, seed: int) -> tuple[Sequence[Document], Sequence[Document]]:
        """Return (training, held-out) problems, drawn apart by `seed`.

        Args:
            path: `data.path` of a recipe; generated problems need none.
            heldout: how many are held out.
            limit: train on at most so many; 0: on all.
            seed: of the draw.

        Raises: InputError when the data are missing, empty or too few to hold any out.
        """

    def test(self, path: str | None) -> list[Item]:
        """Return the test items; `path` is the flag --data, None where it is not given."""


class Split(NamedTuple):
    """A split: `files` of a folder, of which the first that is there is read, and its name on the hub."""

    files: tuple[str, ...]
    hub: str


@dataclasses.dataclass(frozen=True)
class Files:
    """Rows in the files of a folder, or on the hub.

    name    begins the ids of items; the split follows where there are several
    format  a key of ROW_FORMATS
    hub     id on the hub, and the name of the configuration there
    splits  by name, "train" and "test" or one of them
    """

    name: str
    format: str
    hub: tuple[str, str]
    splits: Mapping[str, Split]

    @property
    def trains(self) -> bool:
        return "train" in self.splits

    def training(self, path: str, heldout: int, limit: int, seed: int) -> tuple[Sequence[Document], Sequence[Document]]:
        problems = self.problems("train", path, "data.path")
        if len(problems) <= heldout:
            raise InputError(
                f"{path} holds {len(problems)} training problems, too few to hold out data.heldout={heldout}"
            )
        # Both from the training split: the test split stays unseen until `evaluate`.
        random.Random(seed).shuffle(problems)
        return problems[heldout:][: limit or None], problems[:heldout]

    def test(self, path: str | None) -> list[Item]:
        return self.read("test", path, "--data")

    def problems(self, split: str, path: str | None, setting: str) -> list[Document]:
        """Return the problems of a split, as `read` does."""
        return [item.problem for item in self.read(split, path, setting)]

    def read(self, split: str, path: str | None, setting: str) -> list[Item]:
        """Return the items of a split.

        Args:
            split: a key of `splits`.
            path: a folder, a file where there is one split alone, or a hub id; None: `hub`.
            setting: the knob or flag that names the path, for messages.

        Raises: InputError naming file and line (or row) of the first bad row, an empty or missing file, a hub id that
        cannot be reached.
        """
        format, source = ROW_FORMATS[self.format], self.name if len(self.splits) == 1 else f"{self.name}/{split}"
        place, records = self._records(split, path, setting)
        items = [read_row(format, record, source) for record in records]
        if not items:
            raise InputError(f"{place}: holds no problems")
        seen: set[str] = set()
        for item in items:
            if item.id in seen:
                raise InputError(f"{place}: holds two items with the id {item.id}")
            seen.add(item.id)
        return items

    def _records(self, split: str, path: str | None, setting: str) -> tuple[str, Iterator[Record]]:
        """Return what is read, in words, and its records."""
        files, hub_split = self.splits[split]
        wanted, (hub, subset) = " or ".join(files), self.hub
        path = None if path is None else os.path.expanduser(path)
        if path is None or (not Path(path).exists() and is_hub_id(path)):
            advice = f"Or give {setting} a folder that holds {wanted}"
            return f"{path or hub} ({hub_split})", read_hub(path or hub, subset, hub_split, advice)
        file = Path(path)
        if file.is_dir():
            file = next((file / name for name in files if (file / name).is_file()), file / files[0])
            if not file.is_file() and len(files) > 1:
                raise InputError(f"{setting} {path} holds no {wanted}")
        elif not file.exists():
            raise InputError(f"{path} ({setting}): no such folder, nor a hub id of the form owner/name")
        elif len(self.splits) > 1:
            raise InputError(f"{path} ({setting}) is a file; name the folder that holds {wanted}")
        return str(file), read_csv(file) if file.suffix == ".csv" else read_jsonl(file)


@dataclasses.dataclass(frozen=True)
class Generated:
    """Problems that need no data.

    name      in messages
    make      (split, count, seed) to problems, made on access
    heldout   the split whose problems are held out in training
    distinct  no question is asked twice in the test: of short stories there are few, and intervals take items for
              independent
    """

    name: str
    make: Callable[[str, int, int], Sequence[Problem]]
    heldout: str
    distinct: bool = True
    trains: bool = dataclasses.field(default=True, init=False)

    def training(self, path: str, heldout: int, limit: int, seed: int) -> tuple[Sequence[Document], Sequence[Document]]:
        return self.make("train", limit or TRAINED, seed), self.make(self.heldout, heldout, seed)

    def test(self, path: str | None) -> list[Item]:
        if path is not None:
            raise InputError(f"--data {path}: the task {self.name} is generated and takes no data")
        if not self.distinct:
            return [Item(problem) for problem in self.make("test", TESTED, 0)]
        found: dict[str, Document] = {}
        for problem in self.make("test", DRAWN, 0):
            found.setdefault(problem.question, problem)
            if len(found) == TESTED:
                break
        return [Item(problem) for problem in found.values()]


@dataclasses.dataclass(frozen=True)
class ResultOnly:
    """The problems of a source without the steps to their results."""

    whole: Source

    @property
    def trains(self) -> bool:
        return self.whole.trains

    def training(self, path: str, heldout: int, limit: int, seed: int) -> tuple[Sequence[Document], Sequence[Document]]:
        training, held = self.whole.training(path, heldout, limit, seed)
        return result_only(training), result_only(held)

    def test(self, path: str | None) -> list[Item]:
        return [Item(problem) for problem in result_only(item.problem for item in self.whole.test(path))]


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A named data set.

    source          where its problems come from
    grading         how answers to its test are read; None: it has no test
    max_new_tokens  room for an answer unless told otherwise
    worked          what is to be written is known in full, so that its loss can be measured
    option          (data set, what follows "NAME:") to the data set that this means, or None; None: it takes no option
    """

    name: str
    source: Source
    grading: Grading | None
    max_new_tokens: int = 512
    worked: bool = False
    option: Callable[[Dataset, str], Dataset | None] | None = None

    @property
    def is_generated(self) -> bool:
        """Whether its problems are made and never read."""
        whole = self.source.whole if isinstance(self.source, ResultOnly) else self.source
        return isinstance(whole, Generated)


def result_alone(dataset: Dataset, option: str) -> Dataset | None:
    """Return the data set of "NAME:result"; None for another option."""
    if option != RESULT:
        return None
    return Dataset(
        f"{dataset.name}:{RESULT}", ResultOnly(dataset.source), grading.FIRST_NUMBER, max_new_tokens=SHORT, worked=True
    )


def story(name: str) -> Dataset:
    """Return the stories of a name such as "rooms" or "rooms:8". Raises: InputError as `tracking.parse`."""
    spec = tracking.parse(name)
    assert spec is not None, name
    source = Generated(spec.kind, functools.partial(tracking.Stories, spec), heldout="validation")
    return Dataset(name, source, grading.WORD, SHORT, worked=True, option=steps)


def steps(dataset: Dataset, option: str) -> Dataset:
    """Return the stories with so many steps."""
    return story(f"{dataset.name}:{option}")


GSM8K = Dataset(
    "gsm8k",
    Files(
        "gsm8k",
        format="gsm8k",
        hub=(GSM8K_HUB, "main"),
        splits={"train": Split((GSM8K_TRAIN,), "train"), "test": Split(("test.jsonl",), "test")},
    ),
    grading.NUMBER,
    worked=True,
    option=result_alone,
)
GPQA_DIAMOND = Dataset(
    "gpqa_diamond",
    Files(
        "gpqa_diamond",
        format="gpqa",
        hub=("Idavidrein/gpqa", "gpqa_diamond"),
        splits={"test": Split(("gpqa_diamond.csv", "gpqa_diamond.jsonl"), "train")},
    ),
    grading.LETTER,
    max_new_tokens=2048,
)
ARC_CHALLENGE = Dataset(
    "arc_challenge",
    Files(
        "arc_challenge",
        format="arc",
        hub=("allenai/ai2_arc", "ARC-Challenge"),
        splits={"test": Split(("ARC-Challenge-Test.jsonl",), "test")},
    ),
    grading.LETTER,
)
MATH_500 = Dataset(
    "math_500",
    Files(
        "math_500",
        format="math",
        hub=("HuggingFaceH4/MATH-500", "default"),
        splits={"test": Split(("test.jsonl",), "test")},
    ),
    grading.FORMULA,
    max_new_tokens=2048,
)
ALPACA = Dataset(
    "alpaca",
    Files(
        "alpaca",
        format="instruction",
        hub=("tatsu-lab/alpaca", "default"),
        splits={"train": Split(("train.jsonl",), "train")},
    ),
    grading=None,  # free text: nothing says which answers are right
)
WORDS = Dataset(
    "words",
    # Not made distinct, which its published results are not: a few of the 500 questions occur twice.
    Generated("words", WordProblems, heldout="test", distinct=False),
    grading.NUMBER,
    max_new_tokens=256,
    worked=True,
    option=result_alone,
)

REGISTERED = (GSM8K, GPQA_DIAMOND, ARC_CHALLENGE, MATH_500, ALPACA, WORDS, *map(story, tracking.STORIES))
DATASETS = {dataset.name: dataset for dataset in REGISTERED}


def find(name: str) -> Dataset | None:
    """Return the data set of a name, with its option if it has one; None where there is no such data set.

    Raises: InputError where a story's option is no number of steps.
    """
    kind, colon, option = name.partition(":")
    dataset = DATASETS.get(kind)
    if dataset is None or not colon:
        return dataset
    return dataset.option(dataset, option) if dataset.option else None


def names(suits: Callable[[Dataset], bool]) -> list[str]:
    """Return the names of the data sets for which `suits` holds, with their forms of the result alone."""
    found = []
    for name, dataset in DATASETS.items():
        if suits(dataset):
            found += [name, f"{name}:{RESULT}"] if dataset.option is result_alone else [name]
    return found
