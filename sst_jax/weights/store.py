"""Base folders: what `convert` and `save` write and everything else opens.

    DIR/sst_jax.json   format name and version, the model's config, facts about the source, shapes and dtypes of arrays
    DIR/params/        an Orbax checkpoint of the parameter trees (base, and where present adapter and blend)
    DIR/manifest.json  SHA-256 of every other file: Orbax itself restores a flipped byte in silence
    DIR/...            tokenizer files

An array's shape and dtype are always told to Orbax on restore, so a folder written on one topology opens on any other.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from sst_jax.errors import InputError
from sst_jax.files import Progress, is_plain_name, read_json, sha256, staged_folder
from sst_jax.model.quantization import storages
from sst_jax.weights import key_map
from sst_jax.weights.calibrate import Texts, calibrated
from sst_jax.weights.key_map import set_param
from sst_jax.weights.source import DTYPES, ConvertedTensor, Source, converted_tensors, numpy_dtype, param_shapes

FORMAT, VERSION = "sst_jax", 1
HEADER, MANIFEST, PARAMS = "sst_jax.json", "manifest.json", "params"
WRITERS = 2  # tensors that `stream_base` writes at once
VISION = "vision.safetensors"  # a multimodal source's vision tower, for exports

_STORED = {**DTYPES, "uint8": np.dtype(np.uint8), "int8": np.dtype(np.int8)}  # integers: quantised linears


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
        set_param(tree, slot, value)
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


def stream_base(
    directory: str | Path,
    source: Source,
    config: Mapping[str, Any],
    facts: Callable[[], Mapping[str, Any]],
    files: Mapping[str, bytes],
    dtype: str,
    quantize: str = "none",
    progress: Progress | None = None,
    texts: Texts | None = None,
) -> Path:
    """Writes a source of weights as a base folder, no more than WRITERS + 1 tensors in memory at a time.

    The arrays are put where Orbax looks for them, a file a layer, uncompressed, in a folder beside `directory` that
    gets its name when it is complete. Interrupted and called again with the same arguments it goes on where it was.
    `facts` is called at the end, so that the source may be hashed meanwhile. With `texts` linears are quantised for
    what these feed them.

    Raises: InputError as `converted_tensors` or `calibrated`, when `directory` is not empty, or holds the beginning of
    another conversion.
    """
    directory = Path(directory).absolute()
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise InputError(f"{directory} is not empty; choose another output folder, nothing is overwritten")
    stage = directory.with_name(f".{directory.name}.converting")
    shapes = {f"base/{slot}": spec for slot, spec in param_shapes(source.backbone, dtype, quantize).items()}
    arrays = {slot: {"shape": list(shape), "dtype": str(kind)} for slot, (shape, kind) in shapes.items()}
    stamps = {file.name: [file.stat().st_size, file.stat().st_mtime_ns] for file in source.files}
    begun = {"arrays": arrays, "source": stamps, "texts": texts.facts if texts else None}
    if (stage / _BEGUN).is_file():
        if read_json(stage / _BEGUN) != begun:
            raise InputError(f"{stage} is the beginning of another conversion: remove it, or choose another folder")
    else:
        shutil.rmtree(stage, ignore_errors=True)
        stage.mkdir(parents=True)
        _placeholders(stage / PARAMS, shapes)
        (stage / _BEGUN).write_text(json.dumps(begun))

    def written(slot: str, layer: int | None) -> bool:
        stored = slot if f"base/{slot}" in shapes else f"{slot.removesuffix('kernel')}scale_step"
        stored = stored if f"base/{stored}" in shapes else f"{slot.removesuffix('kernel')}scales"
        return _chunk(stage / PARAMS, f"base/{stored}", shapes, layer).is_file()  # the last file of a tensor

    bound = len(key_map.bind(source.tensors(), source.backbone, source.kind, source.path).tensors)
    if texts is None:
        found = converted_tensors(source, dtype, quantize, written)
    else:
        found = calibrated(source, dtype, quantize, texts, written)

    manifest = {}

    def write(piece: ConvertedTensor) -> None:
        for slot, value in piece.arrays.items():
            file = _chunk(stage / PARAMS, f"base/{slot}", shapes, piece.layer)
            manifest[file.relative_to(stage).as_posix()] = _write(file, value)

    with ThreadPoolExecutor(WRITERS) as pool:  # tensors are written and hashed while the next one is read
        pending: deque[Future] = deque()
        for number, piece in enumerate(found, 1):
            if piece is not None:
                if len(pending) == WRITERS:
                    pending.popleft().result()
                pending.append(pool.submit(write, piece))
            if progress is not None:
                progress(number, bound)
        for future in pending:
            future.result()
    for name, content in files.items():
        (stage / name).write_bytes(content)
    header = {"format": FORMAT, "version": VERSION, "config": config, "facts": facts(), "arrays": arrays}
    (stage / HEADER).write_text(json.dumps(header, indent=1) + "\n")
    (stage / _BEGUN).unlink()
    for file in _files(stage):  # what an earlier, interrupted call wrote, and the small ones
        name = file.relative_to(stage).as_posix()
        manifest[name] = manifest.get(name) or sha256(file)
    (stage / MANIFEST).write_text(json.dumps({"sha256": dict(sorted(manifest.items()))}, indent=1) + "\n")
    if directory.exists():
        directory.rmdir()
    stage.rename(directory)
    return directory


_BEGUN = "converting.json"


def _placeholders(folder: Path, shapes: Mapping[str, tuple[tuple[int, ...], np.dtype]]) -> None:
    """An Orbax checkpoint of those arrays without their numbers: one file an array and layer is still to be written."""
    import orbax.checkpoint as ocp

    tree: dict[str, Any] = {}
    for slot, (_, dtype) in shapes.items():
        set_param(tree, slot, np.zeros(1, dtype))
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)  # that there is nothing to merge without OCDBT, Orbax finds worth a warning
    try:
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=False)) as checkpointer:
            checkpointer.save(folder, tree)
    finally:
        logger.setLevel(level)
    for slot, (shape, _) in shapes.items():
        array = folder / slot.replace("/", ".")
        spec = json.loads((array / ".zarray").read_text())
        chunks = [1, *shape[1:]] if slot.startswith("base/layers/") else list(shape)
        spec |= {"shape": list(shape), "chunks": chunks, "compressor": None}
        (array / "0").unlink()
        (array / ".zarray").write_text(json.dumps(spec))


def _chunk(folder: Path, slot: str, shapes: Mapping[str, tuple[tuple[int, ...], np.dtype]], layer: int | None) -> Path:
    """The file of one layer (or, with None, of the whole) of an array, named by zarr's chunk index."""
    rest = len(shapes[slot][0]) - (layer is not None)
    index = ([] if layer is None else [layer]) + [0] * rest
    return folder / slot.replace("/", ".") / ".".join(map(str, index))


def _write(file: Path, value: np.ndarray) -> str:
    """Writes an array's bytes under a name that appears when they are all there; returns their SHA-256."""
    partial = file.with_name(f".{file.name}.partial")
    content = _contiguous(value).view(np.uint8)
    content.tofile(partial)
    partial.rename(file)
    return hashlib.sha256(content).hexdigest()


def _contiguous(value: np.ndarray) -> np.ndarray:
    """The same bytes, row by row; a large transpose in strips that stay in the cache, which is five times as fast."""
    if value.ndim != 2 or value.flags.c_contiguous:
        return np.ascontiguousarray(value)
    value = value.view(f"u{value.itemsize}")  # which NumPy moves faster than a bfloat16
    found = np.empty(value.shape, value.dtype)
    for at in range(0, value.shape[1], 32):
        found[:, at : at + 32] = value[:, at : at + 32]
    return found


class StoredStack:
    """A stack of arrays [L, ...] in a folder of `stream_base`, read a layer at a time when it is indexed."""

    def __init__(self, folder: Path, slot: str, shape: tuple[int, ...], dtype: np.dtype):
        self.folder, self.slot, self.shape, self.dtype = folder, slot, shape, dtype

    def __getitem__(self, layer: int) -> np.ndarray:
        file = _chunk(self.folder, self.slot, {self.slot: (self.shape, self.dtype)}, layer)
        return np.fromfile(file, self.dtype).reshape(self.shape[1:])


def open_stacks(directory: str | Path) -> dict[str, Any] | None:
    """The tree "base" of a folder written by `stream_base`, layers as `StoredStack`; None for any other base folder.

    Raises: InputError as `load_base`.
    """
    folder = Path(directory).absolute()
    header = read_header(folder)
    first = folder / PARAMS / "base.layers.pre_attn_norm.scale" / "0.0"
    if not first.is_file() or any(not slot.startswith("base/") for slot in header["arrays"]):
        return None
    verify(folder)
    tree: dict[str, Any] = {}
    for slot, spec in header["arrays"].items():
        shape, dtype = tuple(spec["shape"]), _STORED[spec["dtype"]]
        stack = StoredStack(folder / PARAMS, slot, shape, dtype)
        if not slot.startswith("base/layers/"):
            file = _chunk(folder / PARAMS, slot, {slot: (shape, dtype)}, None)
            stack = np.memmap(file, dtype, "r", shape=shape)
        set_param(tree, slot, stack)
    return tree["base"]


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
    for slot, spec in header["arrays"].items():
        shape = spec.get("shape") if isinstance(spec, dict) else None
        sizes = isinstance(shape, list) and all(isinstance(size, int) and 0 <= size < 2**40 for size in shape)
        if not sizes or spec.get("dtype") not in list(_STORED):
            raise InputError(f"{file}: arrays.{slot} is malformed")
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

    `dtype` ("float32", "bfloat16") converts the floats of the tree "base" as they are read; adapter, blend and
    quantised linears keep theirs. Arrays come as numpy unless `sharding` is given: a jax Sharding for all, or a
    function of an array's path ("base/layers/q/kernel") and shape. `check=False` skips hashing the files.

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
        shape, stored = tuple(spec["shape"]), _STORED[spec["dtype"]]
        converted = (
            dtype is not None and slot.startswith("base/") and not storages.is_quantised_array(slot.rpartition("/")[2])
        )
        wanted = numpy_dtype(dtype) if converted else stored
        if sharding is None:
            # A numpy leaf asks for numpy back; broadcasting gives it its shape without its memory.
            leaf: Any = np.broadcast_to(np.zeros((), wanted), shape)
        else:
            placed = sharding(slot, shape) if callable(sharding) else sharding
            leaf = jax.ShapeDtypeStruct(shape, wanted, sharding=placed)
        set_param(target, slot, leaf)
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            params = checkpointer.restore(folder / PARAMS, target)
    except Exception as error:  # TensorStore and Orbax raise anything, over many lines
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"{folder / PARAMS} cannot be restored: {first_line}") from error
    return header["config"], params, header["facts"]
