"""File helpers: JSON with errors that name the file, streamed hashes, folders that are written whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

from sst_jax.errors import InputError, RunInterrupted
from sst_jax.types import Json, JsonValue

Progress = Callable[[int, int], None]  # (bytes done, bytes in all), called now and then

_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, errno.EACCES, errno.EPERM)
_POINTER = b"version https://git-lfs.github.com/spec/"  # begins what git has in place of a large file
_CHUNK = 1 << 18  # stays in the cache, between being read and being hashed


def read_json(path: Path) -> Json:
    """Return the JSON object in a UTF-8 file.

    Raises: InputError, naming the file, when it is missing, malformed or not an object.
    """
    try:
        data = path.read_bytes()
        check_no_pointer(path, data)
        content = json.loads(data)
    except FileNotFoundError:
        raise InputError(f"{path} is missing") from None
    except InputError:
        raise
    except (OSError, ValueError, RecursionError) as error:  # ValueError: bad JSON, bad UTF-8
        raise InputError(f"{path} is not readable JSON: {error}") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} must hold a JSON object, not a {type(content).__name__}")
    return content


def check_no_pointer(path: Path, data: bytes | None = None) -> None:
    """Raise InputError where a file, of which `data` are the first bytes, is a Git LFS pointer to what is meant."""
    if data is None:
        with path.open("rb") as stream:
            data = stream.read(len(_POINTER))
    if data.startswith(_POINTER):
        raise InputError(
            f"{path} is a Git LFS pointer, not the file itself: run `git lfs pull` in its repository, or download it "
            "with `hf download`"
        )


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


def contents_digest(files: Mapping[str, bytes]) -> str:
    """Return the hex SHA-256 over contents by file name, which name and length delimit."""
    state = hashlib.sha256()
    for name, content in sorted(files.items()):
        state.update(f"{name}\0{len(content)}\0".encode() + content)
    return state.hexdigest()


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


def disk_error(error: BaseException) -> str | None:
    """Return what a disk said that did not take a file, in its own few words; None of any other error.

    Libraries wrap it: TensorStore in a ValueError, safetensors in its own; NumPy has no number for a short write.
    """
    if isinstance(error, OSError) and error.errno in _DISK_ERRORS:
        return os.strerror(error.errno)
    text = str(error)
    found = [os.strerror(number) for number in _DISK_ERRORS if os.strerror(number) in text]
    if isinstance(error, OSError) and "requested and" in text:
        found.append(os.strerror(errno.ENOSPC))
    return found[0] if found else None


@contextlib.contextmanager
def writing(path: Path, advice: str) -> Iterator[None]:
    """Turn what a disk says while `path` is written into one line, with what to do about it.

    Raises: RunInterrupted in place of an error of the disk; others pass.
    """
    try:
        yield
    except (InputError, RunInterrupted):
        raise
    except Exception as error:
        reason = disk_error(error)
        if reason is None:
            raise
        raise RunInterrupted(f"{path} cannot be written: {reason}; {advice}") from error


@contextlib.contextmanager
def quiet_orbax() -> Iterator[None]:
    """Keep Orbax from logging, over many lines and from its threads, what it raises as well."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


def _refuse_non_empty(path: Path) -> None:
    if path.is_symlink() or (path.exists() and not path.is_dir()):
        raise InputError(f"{path} exists and is not a folder; choose another output folder")
    if path.is_dir() and any(path.iterdir()):
        raise InputError(f"{path} is not empty; choose another output folder, nothing is overwritten")


@contextlib.contextmanager
def staged_folder(path: str | Path) -> Iterator[Path]:
    """Yield a temporary sibling of `path` that becomes `path` when the block ends well and disappears otherwise.

    Raises: InputError when `path` exists and is not an empty folder, or cannot be made; RunInterrupted when the disk
    is full.
    """
    path = Path(path).expanduser().absolute()
    _refuse_non_empty(path)
    stage = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        stage.mkdir(parents=True)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}") from error
    try:
        with writing(path, "nothing is left of it, make room or choose another folder"):
            yield stage
        _refuse_non_empty(path)  # another process may have filled it meanwhile
        if path.exists():
            path.rmdir()
        stage.rename(path)
    except BaseException:
        _remove(stage)
        raise


def _remove(folder: Path) -> None:
    """Remove a folder for good: for a while a library's threads, which nobody waits for, may write into it again."""
    missing = 0
    for _ in range(100):  # two seconds at most
        missing = 0 if folder.exists() else missing + 1
        if missing == 5:
            return
        shutil.rmtree(folder, ignore_errors=True)
        time.sleep(0.02)


def diff(old: object, new: object, path: str = "") -> list[tuple[str, object, object]]:
    """Return (key, old, new) wherever two JSON values differ, keys written with dots."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = sorted(set(old) | set(new))
        return [found for key in keys for found in diff(old.get(key), new.get(key), f"{path}.{key}" if path else key)]
    return [] if old == new else [(path, old, new)]
