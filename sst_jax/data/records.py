"""Read the records of a data set, each with its place: from JSON lines, JSON, CSV, Parquet, or the hub.

Files are read row by row, so one that is larger than the memory will do; a JSON array alone is read whole.
"""

from __future__ import annotations

import codecs
import csv
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from sst_jax.data.unicode import check_unicode
from sst_jax.errors import InputError

WRAPPERS = ("data", "rows", "examples", "instances")  # under which a JSON object holds its rows


def is_hub_id(name: str) -> bool:
    """Return whether a name has the form owner/name or owner/name@revision."""
    # No git revision has two dots in a row; a path that leads out of the cache would.
    return re.fullmatch(r"[\w-][\w.-]*/[\w.-]+(@(?!.*\.\.)\w[\w./+-]*)?", name) is not None


def split_revision(name: str) -> tuple[str, str | None]:
    """Return (hub id, revision) of "owner/name@revision"; None where a name has no revision."""
    repository, _, revision = name.partition("@")
    return repository, revision or None


class Record(NamedTuple):
    """A record; `place` counts lines or rows from 0, empty lines included, and `where` names the place in words."""

    place: int
    where: str
    value: Any


def read_file(file: Path) -> Iterator[Record]:
    """Yield every record of a file, read as its suffix says.

    Raises: InputError naming the file, and the line or row that is bad; for another suffix, those that are read.
    """
    if file.suffix.lower() not in READERS:
        advice = '; a plain text is given as rows, {"text": "..."} a line' if file.suffix.lower() == ".txt" else ""
        raise InputError(f"{file}: not one of the files that are read, {', '.join(READERS)}{advice}")
    return READERS[file.suffix.lower()](file)


def read_jsonl(file: Path) -> Iterator[Record]:
    """Yield every record of a file of JSON lines; empty lines are skipped.

    Raises: InputError naming the file, and the line that is not JSON.
    """
    check_text(file)
    with file.open("rb") as lines:  # bytes: a line ends at "\n" alone, and not at U+2028 in a string
        for number, line in enumerate(lines, start=1):
            line = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
            if line.strip():
                yield Record(number - 1, f"{file}, line {number}", _parsed(line, f"{file}, line {number}"))


def read_json(file: Path) -> Iterator[Record]:
    """Yield every element of a JSON array, of an array that a JSON object holds (WRAPPERS), or every JSON line.

    Raises: InputError naming the file, and the element or line that is bad.
    """
    check_text(file)
    content = file.read_bytes().removeprefix(codecs.BOM_UTF8)
    first, _, rest = content.strip().partition(b"\n")
    if rest and is_object(first):
        yield from read_jsonl(file)  # JSON lines under another name, as many sets of the hub have them
        return
    value = _parsed(content, str(file)) if content.strip() else []
    if isinstance(value, dict):
        value = next((value[key] for key in WRAPPERS if isinstance(value.get(key), list)), [value])
    if not isinstance(value, list):
        raise InputError(f"{file}: holds neither a JSON array nor JSON lines")
    for index, element in enumerate(value):
        yield Record(index, f"{file}, element {index + 1}", element)


def read_csv(file: Path) -> Iterator[Record]:
    """Yield every row of a CSV file with a header, as a dict.

    Raises: InputError naming the file, and the line whose cells are not those of the header.
    """
    check_text(file)
    csv.field_size_limit(sys.maxsize)  # cells hold whole documents
    # Not split by `str.splitlines`, for which more characters end a line than for CSV.
    with file.open(encoding="utf-8-sig", newline="") as text:
        reader = csv.DictReader(text, strict=True)
        try:
            for index, row in enumerate(reader):
                if None in row or None in row.values():
                    raise InputError(f"{file}, line {reader.line_num}: not as many cells as the header has")
                yield Record(index, f"{file}, line {reader.line_num}", row)
        except csv.Error as error:
            raise InputError(f"{file}, line {reader.line_num}: not CSV ({error})") from None
        except UnicodeDecodeError as error:
            raise InputError(f"{file}: not UTF-8 ({error})") from None


def read_parquet(file: Path) -> Iterator[Record]:
    """Yield every row of a Parquet file, as a dict.

    Raises: InputError naming the file where it is missing or not Parquet.
    """
    import pyarrow
    import pyarrow.parquet

    if not file.is_file():
        raise InputError(f"{file}: no such file")
    index = 0
    try:
        with pyarrow.parquet.ParquetFile(file) as table:
            for batch in table.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    yield Record(index, f"{file}, row {index + 1}", row)
                    index += 1
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise InputError(f"{file}: not readable Parquet ({' '.join(str(error).split())[:200]})") from None


def read_hub(name: str, config: str | None, split: str, advice: str) -> Iterator[Record]:
    """Yield every record of a split on the hub, or of the copy of it in the hub's cache.

    Args:
        name: "owner/name", or "owner/name@revision".
        config: the configuration; None where there is one alone.
        split: "train", or a part such as "train[:1000]".
        advice: ends the message where it cannot be reached.

    Raises: InputError with `advice`; on gated data it says how to be let in.
    """
    repository, revision = split_revision(name)
    try:
        rows = _load(repository, revision, config, split)
    except Exception as error:  # whatever the hub's client raises: offline, gated, missing, an unknown split
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        if "gated" in reason:
            page = f"https://huggingface.co/datasets/{repository}"
            advice = f"Accept its terms at {page} and run `hf auth login`. {advice}"
        raise InputError(f"cannot read {name} ({split}) from the hub: {reason}. {advice}") from error
    for index, row in enumerate(rows):
        yield Record(index, f"{name} ({split}), row {index}", row)


def _load(repository: str, revision: str | None, config: str | None, split: str) -> Any:
    """Return the rows, memory-mapped; without a network from the snapshot that the hub's cache holds."""
    import datasets
    from huggingface_hub import snapshot_download

    try:
        return datasets.load_dataset(repository, config, split=split, revision=revision)
    except Exception as error:
        try:
            folder = snapshot_download(repository, repo_type="dataset", revision=revision, local_files_only=True)
        except Exception:  # there is no snapshot either: the first reason is the one to tell
            raise error from None
        return datasets.load_dataset(folder, config, split=split)


def check_text(file: Path) -> None:
    """Raise InputError unless the file is there, and not in UTF-16."""
    if not file.is_file():
        raise InputError(f"{file}: {'is a folder' if file.is_dir() else 'no such file'}")
    with file.open("rb") as content:
        if content.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
            raise InputError(f"{file}: is UTF-16; save it as UTF-8")


def _parsed(text: bytes, where: str) -> Any:
    try:
        value = json.loads(text.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise InputError(f"{where}: not UTF-8 ({error})") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: not JSON ({error})") from error
    check_unicode(value, where)
    return value


def is_object(line: str | bytes) -> bool:
    """Return whether a line is a JSON object."""
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


READERS = {
    ".jsonl": read_jsonl,
    ".ndjson": read_jsonl,
    ".json": read_json,
    ".csv": read_csv,
    ".parquet": read_parquet,
}
