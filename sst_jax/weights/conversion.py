"""The conversion of a foreign checkpoint into a base folder, a tensor at a time."""

from __future__ import annotations

import hashlib
import json
import shutil
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import orbax.checkpoint as ocp

from sst_jax.errors import InputError
from sst_jax.files import Progress, quiet_orbax, read_json, sha256, writing
from sst_jax.model.config import ModelConfig
from sst_jax.types import HostArray, Json, Params
from sst_jax.weights import key_map, store
from sst_jax.weights.calibrate import Texts, calibrated
from sst_jax.weights.source import ConvertedTensor, Source, converted_tensors, param_shapes

WRITERS = 2  # tensors that are written at once
_BEGUN, _WRITTEN = "converting.json", "written.jsonl"


class Conversion:
    """A source of weights on its way into a base folder; no more than WRITERS + 1 tensors are in memory at a time.

    The arrays are put where Orbax looks for them, a file a layer, uncompressed, in a folder beside the target that gets
    its name when it is complete. There `written.jsonl` has a line for every tensor whose files are whole, with their
    hashes: an interrupted conversion that is begun again with the same arguments resumes behind them.
    """

    def __init__(
        self, directory: str | Path, source: Source, dtype: str, quantize: str = "none", texts: Texts | None = None
    ):
        """Begin a conversion, or find the beginning of one.

        Args:
          directory: the target, which must not exist or be empty.
          source: the checkpoint, of which only headers have been read.
          dtype: "float32" or "bfloat16", of all that is not quantised.
          quantize: the storage of the linears (`model/quantization`).
          texts: quantise the linears for what these feed them; None: for their own numbers.

        Raises: InputError when the target is not empty, or beside it lies the beginning of another conversion.
        """
        self.directory = Path(directory).expanduser().absolute()
        if self.directory.exists() and (not self.directory.is_dir() or any(self.directory.iterdir())):
            raise InputError(f"{self.directory} is not empty; choose another output folder, nothing is overwritten")
        self.source, self.dtype, self.quantize, self.texts = source, dtype, quantize, texts
        self.stage = self.directory.with_name(f".{self.directory.name}.converting")
        self.shapes = {f"base/{path}": spec for path, spec in param_shapes(source.backbone, dtype, quantize).items()}
        self.arrays = {name: {"shape": list(shape), "dtype": str(kind)} for name, (shape, kind) in self.shapes.items()}
        stamps = {file.name: [file.stat().st_size, file.stat().st_mtime_ns] for file in source.files}
        begun = {"arrays": self.arrays, "source": stamps, "texts": texts.facts if texts else None}
        if (self.stage / _BEGUN).is_file():
            if read_json(self.stage / _BEGUN) != begun:
                raise InputError(
                    f"{self.stage} is the beginning of another conversion: remove it, or choose another folder"
                )
        else:
            shutil.rmtree(self.stage, ignore_errors=True)
            try:
                self.stage.mkdir(parents=True)
            except OSError as error:
                raise InputError(f"cannot write {self.directory}: {error.strerror}") from error
            with writing(self.directory, "make room or choose another folder"):
                _placeholders(self.stage / store.PARAMS, self.shapes)
                (self.stage / _BEGUN).write_text(json.dumps(begun))
        self._lock = threading.Lock()
        self._written = _read_record(self.stage / _WRITTEN)

    def run(
        self, facts: Callable[[], Json], files: Mapping[str, bytes] | None = None, progress: Progress | None = None
    ) -> Path:
        """Convert what is not converted yet, and return the finished folder.

        Args:
          facts: gives what the folder's header says of the source; called at the end, so that the source may be hashed
            meanwhile.
          files: put beside by name, such as a tokenizer's.
          progress: called with (tensors done, tensors in all).

        Raises: InputError as `converted_tensors` or `calibrated`; RunInterrupted when the disk is full.
        """
        with writing(self.directory, "make room, and the same command resumes behind what is converted already"):
            return self._run(facts, files or {}, progress)

    def _run(self, facts: Callable[[], Json], files: Mapping[str, bytes], progress: Progress | None) -> Path:
        total = len(
            key_map.bind(self.source.tensors(), self.source.backbone, self.source.kind, self.source.path).tensors
        )
        with ThreadPoolExecutor(WRITERS) as pool:  # tensors are written and hashed while the next one is read
            pending: deque[Future] = deque()
            for number, tensor in enumerate(self._tensors(), 1):
                if tensor is not None:
                    if len(pending) == WRITERS:
                        pending.popleft().result()
                    pending.append(pool.submit(self._write, tensor))
                if progress is not None:
                    progress(number, total)
            for future in pending:
                future.result()
        return self._finish(facts(), files)

    def _tensors(self) -> Iterator[ConvertedTensor | None]:
        if self.texts is None:
            return converted_tensors(self.source, self.dtype, self.quantize, self.is_written)
        return calibrated(self.source, self.dtype, self.quantize, self.texts, self.is_written)

    def is_written(self, path: str, layer: int | None) -> bool:
        """Return whether the files of a tensor of the base tree are whole, by their hashes."""
        hashes = self._written.get((path, layer))
        if hashes is None:
            return False
        if all((file := self.stage / name).is_file() and sha256(file) == known for name, known in hashes.items()):
            return True
        del self._written[path, layer]
        return False

    def _write(self, tensor: ConvertedTensor) -> None:
        hashes = {}
        for path, value in tensor.arrays.items():
            rank = len(self.shapes[f"base/{path}"][0])
            file = store.chunk_file(self.stage / store.PARAMS, f"base/{path}", rank, tensor.layer)
            hashes[file.relative_to(self.stage).as_posix()] = _write_array(file, value)
        line = json.dumps({"path": tensor.path, "layer": tensor.layer, "sha256": hashes})
        with self._lock:
            self._written[tensor.path, tensor.layer] = hashes
            with (self.stage / _WRITTEN).open("a") as record:
                record.write(line + "\n")

    def _finish(self, facts: Json, files: Mapping[str, bytes]) -> Path:
        for name, content in files.items():
            (self.stage / name).write_bytes(content)
        store.write_header(self.stage, ModelConfig(self.source.backbone).to_dict(), facts, self.arrays)
        known = {name: value for hashes in self._written.values() for name, value in hashes.items()}
        store.write_manifest(self.stage, known, leave_out=(_BEGUN, _WRITTEN))
        (self.stage / _BEGUN).unlink()
        (self.stage / _WRITTEN).unlink(missing_ok=True)
        if self.directory.exists():
            self.directory.rmdir()
        self.stage.rename(self.directory)
        return self.directory


def _read_record(file: Path) -> dict[tuple[str, int | None], dict[str, str]]:
    """Return the hashes of files by (path, layer) of their tensor; a line that a kill cut off is dropped."""
    found: dict[tuple[str, int | None], dict[str, str]] = {}
    whole = []
    for line in file.read_text().splitlines() if file.is_file() else ():
        try:
            entry = json.loads(line)
            found[entry["path"], entry["layer"]] = dict(entry["sha256"])
        except (ValueError, KeyError, TypeError):
            continue
        whole.append(line + "\n")
    if whole:
        partial = file.with_suffix(".partial")
        partial.write_text("".join(whole))
        partial.rename(file)
    else:
        file.unlink(missing_ok=True)
    return found


def _placeholders(folder: Path, shapes: Mapping[str, tuple[tuple[int, ...], np.dtype]]) -> None:
    """Write an Orbax checkpoint of arrays without their numbers: a file an array and layer is still to come."""
    tree: Params = {}
    for name, (_, dtype) in shapes.items():
        key_map.set_param(tree, name, np.zeros(1, dtype))
    # That there is nothing to merge without OCDBT, Orbax finds worth a warning.
    with quiet_orbax(), ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=False)) as checkpointer:
        checkpointer.save(folder, tree)
    for name, (shape, _) in shapes.items():
        array = folder / name.replace("/", ".")
        spec = json.loads((array / ".zarray").read_text())
        chunks = [1, *shape[1:]] if name.startswith("base/layers/") else list(shape)
        spec |= {"shape": list(shape), "chunks": chunks, "compressor": None}
        (array / "0").unlink()
        (array / ".zarray").write_text(json.dumps(spec))


def _write_array(file: Path, value: HostArray) -> str:
    """Write an array's bytes under a name that appears when they are all there; return their SHA-256."""
    partial = file.with_name(f".{file.name}.partial")
    content = _contiguous(value).view(np.uint8)
    content.tofile(partial)
    partial.rename(file)
    return hashlib.sha256(content.data).hexdigest()


def _contiguous(value: HostArray) -> HostArray:
    """Return the same bytes row by row; a large transpose in strips that stay in the cache, five times as fast."""
    if value.ndim != 2 or value.flags.c_contiguous:
        return np.ascontiguousarray(value)
    value = value.view(f"u{value.itemsize}")  # which NumPy moves faster than a bfloat16
    copy = np.empty(value.shape, value.dtype)
    for at in range(0, value.shape[1], 32):
        copy[:, at : at + 32] = value[:, at : at + 32]
    return copy
