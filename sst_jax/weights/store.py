"""Base folders: what `convert` and `save` write and everything else opens.

    DIR/sst_jax.json   format name and version, the model's config, facts about the source, shapes and dtypes of arrays
    DIR/params/        an Orbax checkpoint of the parameter trees (base, and where present adapter and blend)
    DIR/manifest.json  SHA-256 of every other file: Orbax itself restores a flipped byte in silence
    DIR/...            tokenizer files

An array's shape and dtype are always told to Orbax on restore, so a folder written on one topology opens on any other.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sst_jax.errors import InputError
from sst_jax.weights.files import is_plain_name, read_json, sha256, staged_folder
from sst_jax.weights.names import set_slot
from sst_jax.weights.source import DTYPES, numpy_dtype

FORMAT, VERSION = "sst_jax", 1
HEADER, MANIFEST, PARAMS = "sst_jax.json", "manifest.json", "params"

_STORED = {**DTYPES, "uint8": np.dtype(np.uint8)}  # uint8: packed NF4 codes


def _leaves(tree: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if not isinstance(key, str) or not key or "/" in key:
            raise InputError(f"parameter key {key!r} under {path or 'the top'} must be text without a slash")
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{path}{key}/")
        elif hasattr(value, "shape") and str(value.dtype) in _STORED:
            yield f"{path}{key}", value
        else:
            raise InputError(f"parameter {path}{key} is not an array of {', '.join(_STORED)}")


def is_base_folder(directory: str | Path) -> bool:
    """Whether a folder was written by `save_base` (of any version)."""
    return (Path(directory) / HEADER).is_file()


def save_base(
    directory: str | Path,
    config: Mapping[str, Any],
    params: Mapping[str, Any],
    facts: Mapping[str, Any],
    files: Mapping[str, bytes] | None = None,
) -> Path:
    """Writes parameter trees (nested dicts of arrays, {"base": ..., "adapter": ..., "blend": ...}) as a base folder.

    `config` (a ModelConfig's `to_dict`) and `facts` must be JSON-ready; `files` are put beside by name. Empty dicts are
    dropped. The folder appears when it is complete. Meant for one process.

    Raises: InputError when `directory` is not empty, or a file or parameter cannot be stored.
    """
    import orbax.checkpoint as ocp

    tree: dict[str, Any] = {}
    arrays = {}
    for slot, value in _leaves(params):
        set_slot(tree, slot, value)
        arrays[slot] = {"shape": list(value.shape), "dtype": str(value.dtype)}
    if not arrays:
        raise InputError("there are no parameters to store")
    header = {"format": FORMAT, "version": VERSION, "config": config, "facts": facts, "arrays": arrays}
    with staged_folder(directory) as folder:
        for name, content in (files or {}).items():
            if not is_plain_name(name) or name in (HEADER, MANIFEST, PARAMS):
                raise InputError(f"file {name!r} is not a plain file name, or is the format's own")
            (folder / name).write_bytes(content)
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(folder / PARAMS, tree)
        (folder / HEADER).write_text(json.dumps(header, indent=1) + "\n")
        manifest = {file.relative_to(folder).as_posix(): sha256(file) for file in _files(folder)}
        (folder / MANIFEST).write_text(json.dumps({"sha256": manifest}, indent=1) + "\n")
    return Path(directory)


def _files(folder: Path) -> list[Path]:
    return sorted(file for file in folder.rglob("*") if file.is_file() and file != folder / MANIFEST)


def read_header(directory: str | Path) -> dict[str, Any]:
    """The header of a base folder, {"config", "facts", "arrays", ...}, without touching its weights.

    Raises: InputError naming the file, for a folder of another kind or of a version this program does not know.
    """
    file = Path(directory) / HEADER
    header = read_json(file)
    if header.get("format") != FORMAT:
        raise InputError(f"{file}: format {header.get('format')!r} is not {FORMAT!r}")
    if header.get("version") != VERSION:
        raise InputError(
            f"{file}: format version {header.get('version')!r} is unknown (this program reads {VERSION}): "
            "update sst-jax, or convert the model again"
        )
    for name in ("config", "facts", "arrays"):
        if not isinstance(header.get(name), dict):
            raise InputError(f"{file}: {name} is missing or not an object")
    return header


def verify(directory: str | Path) -> None:
    """Hashes every file of a base folder against its manifest.

    Raises: InputError naming the first file that is missing, changed or unlisted under params/.
    """
    folder = Path(directory)
    listed = read_json(folder / MANIFEST).get("sha256")
    if not isinstance(listed, dict) or HEADER not in listed:
        raise InputError(f"{folder / MANIFEST} does not list {HEADER}")
    for name, expected in listed.items():
        if not all(is_plain_name(part) for part in name.split("/")):
            raise InputError(f"{folder / MANIFEST} lists {name!r}, which is not a path inside the folder")
        file = folder / name
        if not file.is_file():
            raise InputError(f"{file} is missing: the folder is incomplete, copy or convert it again")
        if sha256(file) != expected:
            raise InputError(f"{file} is damaged: its SHA-256 is not the one in {MANIFEST}, copy or convert it again")
    for file in _files(folder / PARAMS):
        if file.relative_to(folder).as_posix() not in listed:
            raise InputError(f"{file} is not listed in {MANIFEST}")


def load_base(
    directory: str | Path,
    dtype: str | None = None,
    *,
    sharding: Any | Callable[[str, tuple[int, ...]], Any] | None = None,
    check: bool = True,
) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """(config, params, facts) of a base folder.

    `dtype` ("float32", "bfloat16") converts the floats of the tree "base" as they are read; adapter and blend keep
    theirs. Arrays come as numpy unless `sharding` is given: a jax Sharding for all, or a function of an array's path
    ("base/layers/q/kernel") and shape. `check=False` skips hashing the files.

    Raises: InputError naming the file that is missing, damaged or of an unknown format version.
    """
    import jax
    import orbax.checkpoint as ocp

    folder = Path(directory).absolute()
    header = read_header(folder)
    if check:
        verify(folder)
    target: dict[str, Any] = {}
    for slot, spec in header["arrays"].items():
        try:
            shape, stored = tuple(int(size) for size in spec["shape"]), _STORED[spec["dtype"]]
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"{folder / HEADER}: arrays.{slot} is malformed") from error
        converted = dtype is not None and slot.startswith("base/") and spec["dtype"] in DTYPES
        wanted = numpy_dtype(dtype) if converted else stored
        if sharding is None:
            # A numpy leaf asks for numpy back; broadcasting gives it its shape without its memory.
            leaf: Any = np.broadcast_to(np.zeros((), wanted), shape)
        else:
            placed = sharding(slot, shape) if callable(sharding) else sharding
            leaf = jax.ShapeDtypeStruct(shape, wanted, sharding=placed)
        set_slot(target, slot, leaf)
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            params = checkpointer.restore(folder / PARAMS, target)
    except (ValueError, KeyError, OSError) as error:
        raise InputError(f"{folder / PARAMS} cannot be restored: {error}") from error
    return header["config"], params, header["facts"]
