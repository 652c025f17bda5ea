"""Rows of one's own: files, folders and hub sets in any row format of `data/formats.py`, as training data.

A path is a file, a folder of files, or a hub id ("owner/name", "owner/name@revision"). In a folder with files of the
wanted split ("train.jsonl", "train-00000-of-00002.parquet", "my_train.csv") those are read, else all that can be.
"""

from __future__ import annotations

import dataclasses
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from sst_jax.console.progress import counted
from sst_jax.data.documents import Document, Problem, words
from sst_jax.data.formats import ROW_FORMATS, fields_of, read_row, recognise, shown
from sst_jax.data.records import READERS, Record, is_hub_id, read_file, read_hub
from sst_jax.errors import InputError

AUTO = "auto"
GSM8K = "gsm8k"  # what a row of questions and answers is, where its answer ends in "#### NUMBER"
TENTH = 10  # of one's own rows at most this part is held out by data.heldout


@dataclasses.dataclass(frozen=True)
class Rows:
    """Where rows are, and what they are.

    path     a file, a folder or a hub id
    format   a key of ROW_FORMATS; "auto": what the first row says, for all of them
    config   configuration of a hub set; "": the only one
    split    of a hub set, or of a folder
    columns  key of the format -> what it is called in the rows
    setting  the knob or flag that names the path, for messages
    """

    path: str
    format: str = AUTO
    config: str = ""
    split: str = "train"
    columns: Mapping[str, str] = dataclasses.field(default_factory=dict)
    setting: str = "data.path"

    def records(self) -> Iterator[Record]:
        """Yield the records, columns renamed.

        Raises: InputError naming the path, the file, the line or the column.
        """
        for record in self._records():
            yield self._renamed(record) if self.columns else record

    def read(self) -> Found:
        """Return the documents, and what was seen.

        Raises: InputError naming the file and line (or row) of the first row that is not of the format; a path that
        holds no rows.
        """
        first = next(self.records(), None)
        if first is None:
            raise InputError(f"{self.setting} {self.path}: holds no rows")
        name = recognise(first) if self.format == AUTO else self.format
        if self.format == AUTO and name == "question_answer":
            try:
                return self._read(GSM8K)
            except InputError:
                pass  # an answer that does not end in "#### NUMBER" is an answer all the same
        return self._read(name)

    def _read(self, name: str) -> Found:
        documents, empty = [], 0
        for record in self.records():
            document = read_row(ROW_FORMATS[name], record, Path(self.path).name).problem
            if isinstance(document, Problem) and not (document.question or document.result.strip()):
                empty += 1  # an empty line of a text
            else:
                documents.append(document)
        if not documents:
            raise InputError(f"{self.setting} {self.path}: all {empty:,} of its rows are empty")
        return Found(self.path, name, documents, empty)

    def _records(self) -> Iterator[Record]:
        path = Path(self.path).expanduser()
        if path.is_dir():
            for file in data_files(path, self.split, self.setting):
                yield from read_file(file)
        elif path.exists():
            yield from read_file(path)
        elif is_hub_id(self.path):
            advice = f"Or give {self.setting} a file, or a folder of files"
            yield from read_hub(self.path, self.config or None, self.split, advice)
        else:
            raise InputError(f"{self.path} ({self.setting}): no such file or folder, nor a hub id (owner/name)")

    def _renamed(self, record: Record) -> Record:
        fields = dict(fields_of(record))
        missing = [column for column in self.columns.values() if column not in fields]
        if missing:
            raise InputError(
                f"{record.where}: column {missing[0]!r} (data.columns) is missing; the row has {shown(fields)}"
            )
        named = {key: fields.pop(column) for key, column in self.columns.items()}
        return record._replace(value={**fields, **named})


@dataclasses.dataclass(frozen=True)
class Found:
    """What was read at a path: documents of one format, and how many rows were empty."""

    path: str
    format: str
    documents: list[Document]
    empty: int = 0

    def __str__(self) -> str:
        keys = ", ".join(ROW_FORMATS[self.format].keys)
        skipped = f", {self.empty:,} empty ones left out" if self.empty else ""
        return f"{self.path}: {counted(len(self.documents), 'row')} of {self.format} ({keys}){skipped}"


def data_files(folder: Path, split: str, setting: str) -> list[Path]:
    """Return the files of a folder that are read for a split, sorted.

    Raises: InputError where it holds none.
    """
    files = sorted(file for file in folder.iterdir() if file.is_file() and file.suffix.lower() in READERS)
    of_split = [file for file in files if re.search(rf"(^|[._-]){re.escape(split)}([._-]|$)", file.name)]
    if not files:
        raise InputError(f"{setting} {folder}: holds no file that is read ({', '.join(READERS)})")
    return of_split or files


def parse_columns(text: str) -> dict[str, str]:
    """Return data.columns, "prompt=ask,completion=reply", as {"prompt": "ask", "completion": "reply"}.

    Raises: InputError where it is not of that form, or names a key of no format.
    """
    known = sorted({key for format in ROW_FORMATS.values() for key in format.keys} | {"input"})
    found: dict[str, str] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        key, equals, column = (side.strip() for side in part.partition("="))
        if not equals or not column:
            raise InputError(f"data.columns={text!r}: {part!r} is not of the form KEY=COLUMN")
        if key not in known:
            raise InputError(f"data.columns={text!r}: {key!r} is a key of no format; these are {', '.join(known)}")
        found[key] = column
    return found


def parse_paths(text: str) -> list[str]:
    """Return the paths of data.path: one, or several separated by commas."""
    if "," not in text or Path(text).expanduser().exists():
        return [text]
    return [part.strip() for part in text.split(",") if part.strip()]


def hold_out(
    documents: Sequence[Document], count: int, share: float, seed: int
) -> tuple[list[Document], list[Document]]:
    """Return (training, held-out) documents, drawn apart by `seed`.

    Args:
        documents: of one source.
        count: how many are held out, where `share` is 0; at most a tenth of them, but one.
        share: which part of them is held out.
        seed: of the draw.

    Raises: InputError where none would be left on a side.
    """
    held = round(share * len(documents)) if share else min(count, max(len(documents) // TENTH, 1))
    if not 0 < held < len(documents):
        raise InputError(
            f"{counted(len(documents), 'row')}: too few to train on some and hold others out; add rows, or name a file "
            "of held-out ones with data.heldout_path"
        )
    shuffled = list(documents)
    random.Random(seed).shuffle(shuffled)
    return shuffled[held:], shuffled[:held]


def duplicates(documents: Sequence[Document]) -> int:
    """Return how many documents say what an earlier one says, word for word."""
    return len(documents) - len({words(document)[1:] for document in documents})
