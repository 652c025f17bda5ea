"""Base folders: what `convert` and `save` write and everything else opens.

    DIR/sst_jax.json   format name and version, the model's config, facts about the source, shapes and dtypes of arrays
    DIR/params/        an Orbax checkpoint of the parameter trees (base, and where present adapter and blend)
    DIR/manifest.json  SHA-256 of every other file: Orbax itself restores a flipped byte in silence
    DIR/...            tokenizer files

An array's shape and dtype are always told to Orbax on restore, so a folder written on one topology opens on any other.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import Sharding

from sst_jax.errors import InputError
from sst_jax.files import is_plain_name, quiet_orbax, read_json, sha256, staged_folder
from sst_jax.model.quantization import storages
from sst_jax.types import AnyArray, HostArray, Json, Params, ReadOnlyJson
from sst_jax.weights.key_map import set_param
from sst_jax.weights.source import DTYPES, numpy_dtype

FORMAT, VERSION = "sst_jax", 1
HEADER, MANIFEST, PARAMS = "sst_jax.json", "manifest.json", "params"
VISION = "vision.safetensors"  # a multimodal source's vision tower, for exports

_STORED = {**DTYPES, "uint8": np.dtype(np.uint8), "int8": np.dtype(np.int8)}  # integers: quantised linears


def _leaves(tree: ReadOnlyJson, path: str = "") -> Iterator[tuple[str, AnyArray]]:
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
    """Return whether a folder was written by `save_base` (of any version)."""
    return (Path(directory) / HEADER).is_file()


def save_base(
    directory: str | Path,
    config: Json,
    params: Params,
    facts: Json,
    files: Mapping[str, bytes] | None = None,
) -> Path:
    """Write parameter trees (nested dicts of arrays, {"base": ..., "adapter": ..., "blend": ...}) as a base folder.

    `config` (a ModelConfig's `to_dict`) and `facts` must be JSON-ready; `files` are put beside by name. Empty dicts are
    dropped. The folder appears when it is complete. Meant for one process.

    Raises: InputError when `directory` is not empty, or a file or parameter cannot be stored.
    """
    tree: Params = {}
    arrays = {}
    for name, value in _leaves(params):
        set_param(tree, name, value)
        arrays[name] = {"shape": list(value.shape), "dtype": str(value.dtype)}
    if not arrays:
        raise InputError("there are no parameters to store")
    with staged_folder(directory) as folder:
        for name, content in (files or {}).items():
            if not is_plain_name(name) or name in (HEADER, MANIFEST, PARAMS):
                raise InputError(f"file {name!r} is not a plain file name, or is the format's own")
            (folder / name).write_bytes(content)
        with quiet_orbax(), ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(folder / PARAMS, tree)
        write_header(folder, config, facts, arrays)
        write_manifest(folder, {})
    return Path(directory).expanduser()


def write_header(folder: Path, config: Json, facts: Json, arrays: Json) -> None:
    """Write the header of a base folder; `arrays` are shape and dtype by name."""
    header = {"format": FORMAT, "version": VERSION, "config": config, "facts": facts, "arrays": arrays}
    (folder / HEADER).write_text(json.dumps(header, indent=1) + "\n")


def write_manifest(folder: Path, known: Mapping[str, str], leave_out: Collection[str] = ()) -> None:
    """Write the manifest of a base folder's files; hashes that are `known` are not computed again."""
    names = {file.relative_to(folder).as_posix(): file for file in _files(folder)}
    hashes = {name: known.get(name) or sha256(file) for name, file in names.items() if name not in leave_out}
    (folder / MANIFEST).write_text(json.dumps({"sha256": hashes}, indent=1) + "\n")


def chunk_file(folder: Path, name: str, rank: int, layer: int | None) -> Path:
    """Return the file of one layer (None: the whole) of an array of `rank` axes, named by zarr's chunk index."""
    index = ([] if layer is None else [layer]) + [0] * (rank - (layer is not None))
    return folder / name.replace("/", ".") / ".".join(map(str, index))


class StoredStack:
    """A stack of arrays [L, ...] in a folder that a `Conversion` wrote, read a layer at a time when it is indexed."""

    def __init__(self, folder: Path, name: str, shape: tuple[int, ...], dtype: np.dtype):
        self.folder, self.name, self.shape, self.dtype = folder, name, shape, dtype

    def __getitem__(self, layer: int) -> HostArray:
        file = chunk_file(self.folder, self.name, len(self.shape), layer)
        return np.fromfile(file, self.dtype).reshape(self.shape[1:])


def open_stacks(directory: str | Path) -> Params | None:
    """Return the tree "base" of a folder that a `Conversion` wrote, layers as `StoredStack`; None for others.

    Raises: InputError as `load_base`.
    """
    folder = Path(directory).absolute()
    header = read_header(folder)
    names = list(header["arrays"])
    # Every layer has some norm; which ones is its family's.
    norm = next((name for name in names if name.startswith("base/layers/") and name.endswith("/scale")), None)
    if norm is None or not chunk_file(folder / PARAMS, norm, 2, 0).is_file():
        return None
    if any(not name.startswith("base/") for name in names):
        return None
    verify(folder)
    tree: Params = {}
    for name, spec in header["arrays"].items():
        shape, dtype = tuple(spec["shape"]), _STORED[spec["dtype"]]
        stack: StoredStack | np.ndarray = StoredStack(folder / PARAMS, name, shape, dtype)
        if not name.startswith("base/layers/"):
            file = chunk_file(folder / PARAMS, name, len(shape), None)
            stack = np.memmap(file, dtype, "r", shape=shape)
        set_param(tree, name, stack)
    return tree["base"]


def _files(folder: Path) -> list[Path]:
    return sorted(file for file in folder.rglob("*") if file.is_file() and file != folder / MANIFEST)


def read_header(directory: str | Path) -> Json:
    """Return the header of a base folder, {"config", "facts", "arrays", ...}, without touching its weights.

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
    for name, spec in header["arrays"].items():
        shape = spec.get("shape") if isinstance(spec, dict) else None
        sizes = isinstance(shape, list) and all(isinstance(size, int) and 0 <= size < 2**40 for size in shape)
        if not sizes or spec.get("dtype") not in list(_STORED):
            raise InputError(f"{file}: arrays.{name} is malformed")
    return header


def verify(directory: str | Path) -> None:
    """Hash every file of a base folder against its manifest.

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
    sharding: Sharding | Callable[[str, tuple[int, ...]], Sharding] | None = None,
    check: bool = True,
) -> tuple[Json, Params, Json]:
    """Return (config, params, facts) of a base folder.

    `dtype` ("float32", "bfloat16") converts the floats of the tree "base" as they are read; adapter, blend and
    quantised linears keep theirs. Arrays come as numpy unless `sharding` is given: a jax Sharding for all, or a
    function of an array's path ("base/layers/q/kernel") and shape. `check=False` skips hashing the files.

    Raises: InputError naming the file that is missing, damaged or of an unknown format version.
    """
    folder = Path(directory).absolute()
    header = read_header(folder)
    if check:
        verify(folder)
    target: Params = {}
    for name, spec in header["arrays"].items():
        shape, stored = tuple(spec["shape"]), _STORED[spec["dtype"]]
        kept = not name.startswith("base/") or storages.is_quantised_array(name.rpartition("/")[2])
        wanted = stored if dtype is None or kept else numpy_dtype(dtype)
        if sharding is None:
            # A numpy leaf asks for numpy back; broadcasting gives it its shape without its memory.
            leaf: jax.ShapeDtypeStruct | np.ndarray = np.broadcast_to(np.zeros((), wanted), shape)
        else:
            placed = sharding(name, shape) if callable(sharding) else sharding
            leaf = jax.ShapeDtypeStruct(shape, wanted, sharding=placed)
        set_param(target, name, leaf)
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            params = checkpointer.restore(folder / PARAMS, target)
    except Exception as error:  # TensorStore and Orbax raise anything, over many lines
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"{folder / PARAMS} cannot be restored: {first_line}") from error
    return header["config"], params, header["facts"]
