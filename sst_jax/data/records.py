"""Read the records of a data set, each with its place: from JSON lines, CSV, or the hub."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from sst_jax.errors import InputError


class Record(NamedTuple):
    """A record; `place` counts lines or rows from 0, empty lines included, and `where` names the place in words."""

    place: int
    where: str
    value: Any


def read_jsonl(file: Path) -> Iterator[Record]:
    """Yield every record of a file of JSON lines; empty lines are skipped.

    Raises: InputError naming the file, and the line that is not JSON.
    """
    for number, line in enumerate(_content(file).split(b"\n"), start=1):
        if line.strip():
            try:
                yield Record(number - 1, f"{file}, line {number}", json.loads(line))
            except (ValueError, RecursionError) as error:
                raise InputError(f"{file}, line {number}: not JSON ({error})") from error


def read_csv(file: Path) -> Iterator[Record]:
    """Yield every row of a CSV file with a header, as a dict.

    Raises: InputError naming the file, and the line whose cells are not those of the header.
    """
    try:
        text = _content(file).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{file}: not UTF-8 ({error})") from None
    # Not split by `str.splitlines`, for which more characters end a line than for CSV.
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        for index, row in enumerate(reader):
            if None in row or None in row.values():
                raise InputError(f"{file}, line {reader.line_num}: not as many cells as the header has")
            yield Record(index, f"{file}, line {reader.line_num}", row)
    except csv.Error as error:
        raise InputError(f"{file}, line {reader.line_num}: not CSV ({error})") from None


def _content(file: Path) -> bytes:
    if not file.is_file():
        raise InputError(f"{file}: no such file")
    return file.read_bytes()


def read_hub(name: str, subset: str, split: str, advice: str) -> Iterator[Record]:
    """Yield every record of a split on the hub.

    Raises: InputError with `advice` when it cannot be reached; on gated data it says how to be let in.
    """
    try:
        import datasets

        rows = datasets.load_dataset(name, subset, split=split)
    except Exception as error:  # whatever the hub's client raises: offline, gated, missing, an unknown split
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        if "gated" in reason:
            advice = f"Accept its terms at https://huggingface.co/datasets/{name} and run `hf auth login`. {advice}"
        raise InputError(f"cannot read {name} ({split}) from the hub: {reason}. {advice}") from error
    for index, row in enumerate(rows):
        yield Record(index, f"{name} ({split}), row {index}", row)
