"""File helpers: JSON with errors that name the file, streamed hashes, folders that are written whole or not at all."""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from sst_jax.errors import InputError
from sst_jax.types import Json, JsonValue

Progress = Callable[[int, int], None]  # (bytes done, bytes in all), called now and then

_CHUNK = 1 << 18  # stays in the cache, between being read and being hashed


def read_json(path: Path) -> Json:
    """Return the JSON object in a UTF-8 file.

    Raises: InputError, naming the file, when it is missing, malformed or not an object.
    """
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise InputError(f"{path} is missing") from None
    except (OSError, ValueError, RecursionError) as error:  # ValueError: bad JSON, bad UTF-8
        raise InputError(f"{path} is not readable JSON: {error}") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} must hold a JSON object, not a {type(content).__name__}")
    return content


def json_bytes(value: JsonValue) -> bytes:
    """Return what a JSON file holds."""
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode("utf-8")


def is_plain_name(name: object) -> bool:
    """Return whether a name from a file may be joined to a folder: a single component that cannot leave it."""
    return isinstance(name, str) and 0 < len(name) < 256 and name not in (".", "..") and not set(name) & set("/\\\0")


def sha256(path: Path) -> str:
    """Return the hex SHA-256 of one file's bytes."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def digest(files: Iterable[Path], progress: Progress | None = None) -> str:
    """Return the hex SHA-256 over names and contents of files, sorted by name; it identifies a base.

    Folders do not count, so a copy of a checkpoint elsewhere has the same digest.
    """
    ordered = sorted((Path(file) for file in files), key=lambda file: file.name)
    sizes = [file.stat().st_size for file in ordered]
    total, done, state = sum(sizes), 0, hashlib.sha256()
    buffer = memoryview(bytearray(_CHUNK))
    for file, size in zip(ordered, sizes, strict=True):
        # Name and length delimit each file, so that bytes cannot move from one to the next unseen.
        state.update(f"{file.name}\0{size}\0".encode())
        with file.open("rb", buffering=0) as stream:
            while count := stream.readinto(buffer):
                state.update(buffer[:count])
                done += count
                if progress is not None:
                    progress(done, total)
    return state.hexdigest()


def _refuse_non_empty(path: Path) -> None:
    if path.is_symlink() or (path.exists() and not path.is_dir()):
        raise InputError(f"{path} exists and is not a folder; choose another output folder")
    if path.is_dir() and any(path.iterdir()):
        raise InputError(f"{path} is not empty; choose another output folder, nothing is overwritten")


@contextlib.contextmanager
def staged_folder(path: str | Path) -> Iterator[Path]:
    """Yield a temporary sibling of `path` that becomes `path` when the block ends well and disappears otherwise.

    Raises: InputError when `path` exists and is not an empty folder, or cannot be made.
    """
    path = Path(path).absolute()
    _refuse_non_empty(path)
    stage = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        stage.mkdir(parents=True)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error}") from error
    try:
        yield stage
        _refuse_non_empty(path)  # another process may have filled it meanwhile
        if path.exists():
            path.rmdir()
        stage.rename(path)
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def diff(old: object, new: object, path: str = "") -> list[tuple[str, object, object]]:
    """Return (key, old, new) wherever two JSON values differ, keys written with dots."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = sorted(set(old) | set(new))
        return [found for key in keys for found in diff(old.get(key), new.get(key), f"{path}.{key}" if path else key)]
    return [] if old == new else [(path, old, new)]
