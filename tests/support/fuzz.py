"""Damaged and hostile files against every reader: each either loads or is refused with an `InputError`.

    python -m tests.support.fuzz --count 100000            all targets in turn, in worker processes that are watched
    python -m tests.support.fuzz --only GGUF --count 500   one of them; "rows": all that are named "rows: ..."
    python -m tests.support.fuzz --case gguf/4711          one case again, with its traceback

A target is a small valid folder and what opens it. A case is one of its files mutated, by a random generator that its
name seeds: bits, lengths, chunks, JSON values, names that lead elsewhere. What counts as a crash:

    another exception than InputError, and more than SECONDS of time
    memory: Python's and numpy's peak beyond twice the folder's bytes, over what the valid folder takes and SLACK;
            or a growth of the process beyond NATIVE, for libraries that allocate by themselves
    a file opened outside the folder, a process, a connection, a pickle, code that lies in the folder
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import re
import resource
import signal
import struct
import subprocess
import sys
import tempfile
import time
import traceback
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sst_jax.console.command import Parser, run, write_json
from sst_jax.console.progress import bar
from sst_jax.errors import InputError
from tests.support.fuzz_rows import row_targets

SECONDS = 5.0
SLACK, NATIVE = 1 << 17, 1 << 26


class Target(NamedTuple):
    """`files` of a valid folder, of which those in `mutable` are mutated; `read` opens the folder.

    share: how often it is drawn. sign: puts right what vouches for the files, so that a mutation gets past it.
    factor: bytes of memory that a byte of the folder may take. Tokens, as lists of several stages, take more than text.
    """

    name: str
    files: dict[str, bytes]
    mutable: tuple[str, ...]
    read: Callable[[Path], Any]
    share: int = 4
    sign: Callable[[Path], None] | None = None
    factor: int = 2


class Crash(Exception):
    """What a reader may not do."""


class Allocation(Crash):
    """Too much memory."""


class Hang(BaseException):
    """Too long; no Exception, as readers turn those into their own."""


# ------------------------------------------------------------------------------------------------------ mutations

NUMBERS = (
    0,
    1,
    2,
    127,
    128,
    255,
    256,
    2**15,
    2**16,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**40,
    2**60,
    2**63 - 1,
    2**63,
    2**64 - 1,
)
VALUES = (
    None,
    True,
    False,
    0,
    1,
    -1,
    2,
    3,
    7,
    2**31,
    2**40 - 1,
    2**53,
    2**63,
    2**64,
    10**30,
    -(2**63),
    0.5,
    -0.5,
    1e-320,
    1e308,
    float("nan"),
    float("inf"),
    "",
    "a",
    "0",
    "..",
    "../../etc/passwd",
    "/etc/passwd",
    "a/b",
    "\0",
    "\ud800",
    "x" * 3000,
    [],
    {},
    [[]],
    [0],
    [-1],
    [2**40],
    [0, 2**62],
    ["a"],
    {"a": {}},
    {"": None},
    "float32",
    "BF16",
    "I64",
    [1, 1],
    [[0, 0]],
)
TEXTS = (
    b"",
    b"\0",
    b"\n",
    b"\xff",
    b"\xc3\x28",
    b"{",
    b"}",
    b"[",
    b"]",
    b'"',
    b"\\",
    b",",
    b":",
    b"NaN",
    b"1e999",
    b"-",
    b"null",
    b"9" * 30,
    b"9" * 5000,
    b"[" * 3000,
    b'{"a":' * 3000,
    b"../../etc/passwd",
    b"/etc/passwd",
    b"\\ud800",
    b"\xef\xbb\xbf",
    b"\r\n",
    b"\xe2\x80\xa8",
    b"####",
    b"a" * 2000,
)


def mutate(rng: random.Random, data: bytes, others: Sequence[bytes]) -> bytes:
    """One to three mutations; `others` are files to splice from."""
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        structured = rng.random() < 0.5 and mutate_structure(rng, data)
        data = structured or rng.choice(BYTES)(rng, data, others)
    return data


def flip(rng: random.Random, data: bytes, others: Sequence[bytes]) -> bytes:
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 8))):
        if out:
            out[_place(rng, out)] ^= 1 << rng.randrange(8)
    return bytes(out)


def overwrite(rng: random.Random, data: bytes, others: Sequence[bytes]) -> bytes:
    """Puts a remarkable number somewhere, mostly over what looks like a length."""
    width = rng.choice((1, 2, 4, 8, 8))
    if len(data) < width:
        return data
    at = rng.randrange(len(data) - width + 1)
    if width == 8 and rng.random() < 0.8:
        for _ in range(200):
            at = min(_place(rng, data), len(data) - 8)
            if 0 < int.from_bytes(data[at : at + 8], "little") <= len(data):
                break
    number = rng.choice((*NUMBERS, len(data), len(data) - at, int.from_bytes(data[at : at + width], "little") + 1))
    return data[:at] + (number % (1 << 8 * width)).to_bytes(width, "little") + data[at + width :]


def truncate(rng: random.Random, data: bytes, others: Sequence[bytes]) -> bytes:
    return data[: rng.randrange(len(data) + 1)] if rng.random() < 0.7 else data[: -rng.choice((1, 2, 8, 64))]


def extend(rng: random.Random, data: bytes, others: Sequence[bytes]) -> bytes:
    return data + (bytes(rng.choice((1, 8, 100, 1000))) if rng.random() < 0.5 else rng.randbytes(rng.randrange(1, 64)))


def repeat(rng: random.Random, data: bytes, others: Sequence[bytes]) -> bytes:
    first, last = _span(rng, data)
    return data[:last] + data[first:last] * rng.choice((1, 1, 2, 5)) + data[last:]


def remove(rng: random.Random, data: bytes, others: Sequence[bytes]) -> bytes:
    first, last = _span(rng, data)
    return data[:first] + data[last:]


def splice(rng: random.Random, data: bytes, others: Sequence[bytes]) -> bytes:
    other = rng.choice(others)
    first, last = _span(rng, other)
    at = _place(rng, data)
    return data[:at] + other[first:last] + data[at + (last - first) * rng.randrange(2) :]


def insert(rng: random.Random, data: bytes, others: Sequence[bytes]) -> bytes:
    at = _place(rng, data)
    return data[:at] + rng.choice(TEXTS) + data[at:]


def renumber(rng: random.Random, data: bytes, others: Sequence[bytes]) -> bytes:
    """Replaces a number that is written out."""
    found = list(re.finditer(rb"-?\d+(\.\d+)?", data[: 1 << 14]))
    if not found:
        return flip(rng, data, others)
    start, end = rng.choice(found).span()
    number = rng.choice((*map(str, NUMBERS), "-1", "1e999", "1e-999", "0.5", "NaN", "9" * 400, "9" * 5000))
    return data[:start] + number.encode() + data[end:]


BYTES = (flip, overwrite, overwrite, truncate, extend, repeat, remove, splice, insert, renumber)


def _place(rng: random.Random, data: bytes | bytearray) -> int:
    """An offset, more often near the beginning, where headers are."""
    return rng.randrange(min(len(data), rng.choice((32, 512, 1 << 13, 1 << 30)))) if data else 0


def _span(rng: random.Random, data: bytes) -> tuple[int, int]:
    first = _place(rng, data)
    return first, min(len(data), first + rng.choice((1, 4, 8, 40, 300, 5000)))


def mutate_structure(rng: random.Random, data: bytes) -> bytes | None:
    """A change inside a JSON document, or inside the JSON header of a safetensors file; None where there is neither."""
    length = int.from_bytes(data[:8], "little")
    head, body, rest = b"", data, b""
    if data[8:9] == b"{" and length < len(data):
        head, body, rest = data[:8], data[8 : 8 + length], data[8 + length :]
    try:
        content = json.loads(body)
    except (ValueError, RecursionError):
        return None
    if not isinstance(content, dict | list) or not content:
        return None
    _change(rng, content)
    text = json.dumps(content).encode()
    return struct.pack("<Q", len(text)) + text + rest if head else text


def _change(rng: random.Random, content: Any) -> None:
    """Replaces, removes, copies or renames one value of a tree of dicts and lists, in place."""
    parents, stack = [], [content]
    while stack:
        node = stack.pop()
        if node:
            parents.append(node)
        stack += [
            child for child in (node.values() if isinstance(node, dict) else node) if isinstance(child, dict | list)
        ]
    # A parent first and then one of its values, or a vocabulary would draw all the changes to itself.
    parent = rng.choice(parents)
    key = rng.choice(list(parent)) if isinstance(parent, dict) else rng.randrange(len(parent))
    kind = rng.random()
    if kind < 0.55:
        parent[key] = rng.choice(VALUES)
    elif kind < 0.65:
        parent[key] = _near(rng, parent[key])
    elif kind < 0.75:
        del parent[key]
    elif kind < 0.85:
        other = rng.choice(parents)
        parent[key] = json.loads(json.dumps(rng.choice(list(other.values() if isinstance(other, dict) else other))))
    elif isinstance(parent, dict):
        parent[rng.choice(("", "a", "..", "base/x", f"{key}.", str(key)[1:], "/etc/passwd", "\0"))] = parent[key]
    else:
        parent.extend(parent[: rng.choice((1, 10, 300))])


def _near(rng: random.Random, value: Any) -> Any:
    if isinstance(value, bool) or value is None:
        return not value
    if isinstance(value, int | float):
        return rng.choice((value + 1, value - 1, -value, value * 2, value * 1000, float(value), str(value), [value]))
    if isinstance(value, str):
        return rng.choice((value + "a", value[:-1], value.upper(), value * 50, [value], f"../{value}", f"/{value}"))
    return rng.choice(([value], {"a": value}, str(value)))


# -------------------------------------------------------------------------------------------------------- targets


def targets(folder: Path) -> list[Target]:
    """All targets; `folder` is where their valid folders are made, and what other folders refer to stays there."""
    import dataclasses

    from sst_jax.data.prompts import read_prompts
    from sst_jax.data.records import read_csv
    from sst_jax.data.tasks import find
    from sst_jax.data.tokenizer import load_tokenizer
    from sst_jax.data.vocabulary import from_model_proto
    from sst_jax.lab.evaluation.runner import read_outcomes
    from sst_jax.model.config import ModelConfig
    from sst_jax.weights import huggingface, store
    from sst_jax.weights.checkpoint import newest_good, read_metrics
    from sst_jax.weights.hub_config import backbone_from_config
    from sst_jax.weights.loading import open_model, resolve
    from tests.support import torch_exports as exports
    from tests.support.problems import load_gsm8k

    two_layers = {"num_layers": 2, "layer_types": ("local", "global"), "d_model": 12, "d_ff": 8, "head_dim": 4}
    backbone = dataclasses.replace(exports.SHALLOW, num_heads=3, num_kv_heads=1, **two_layers)
    ours = exports.model({}, backbone, rank=2, path=str(folder / "plain"))
    plain = exports.model(None, backbone, rank=0, dtype="bfloat16")

    def model(path: Path) -> None:
        reference = resolve(path)
        reference.dtype, reference.backbone  # noqa: B018
        reference.open("float32")

    def files(name: str) -> dict[str, bytes]:
        root = folder / name
        return {
            file.relative_to(root).as_posix(): file.read_bytes() for file in sorted(root.rglob("*")) if file.is_file()
        }

    exports.write(plain, folder / "plain", "merged", dtype="bfloat16")
    opened = open_model(folder / "plain", "float32")
    adapted = exports.model({}, backbone, rank=2, **{**opened.provenance.to_json(), "path": str(folder / "plain")})
    exports.write(ours, folder / "sst", "sst", keep_lora=True)
    exports.write(ours, folder / "merged", "merged")
    exports.write(adapted, folder / "adapter", "adapter")
    huggingface.write_folder(
        folder / "shards",
        backbone,
        plain.params["base"],
        "bfloat16",
        shard_bytes=4_000,
        extras=huggingface.FolderExtras(plain.tokenizer.export_files()),
    )
    ours.save(folder / "base")
    weights, folders = "model.safetensors", ("plain", "sst", "merged", "adapter", "shards", "base")
    plain_files, sst, merged, adapter, shards, base = map(files, folders)

    def sign_base(path: Path) -> None:
        signed = {file.relative_to(path).as_posix(): store.sha256(file) for file in store._files(path)}
        (path / store.MANIFEST).write_text(json.dumps({"sha256": signed}))

    found = [
        Target("safetensors", plain_files, (weights,), model, 8),
        Target("index", shards, (huggingface.INDEX,), model, 6),
        Target("hub config", plain_files, ("config.json",), model, 6),
        Target("sst folder", sst, ("config.json", weights), model),
        Target("merged folder", merged, ("stream.json", "stream.safetensors"), model),
        Target("adapter", adapter, ("adapter_config.json", "adapter_model.safetensors", "stream.json"), model),
        Target("base folder", base, tuple(base), model, 1),
        Target("signed base folder", base, tuple(base), model, 1, sign_base),
        Target("config", {"config.json": _json(ours.config.to_dict())}, ("config.json",),
               lambda path: ModelConfig.from_dict(store.read_json(path / "config.json")), 12),
        Target("bare hub config", plain_files, ("config.json",),
               lambda path: backbone_from_config(store.read_json(path / "config.json")), 12),
        Target("tokenizer.json", exports.model().tokenizer.export_files(), ("tokenizer.json", "tokenizer_config.json"),
               lambda path: load_tokenizer(path).encode("a b"), 6),
    ]  # fmt: skip
    question = {"question": "Tom has 3 pens and buys 4. How many?", "answer": "3 + 4 = <<3+4=7>>7.\n#### 7"}
    lines = "".join(json.dumps(question) + "\n" for _ in range(4)).encode()
    choices = {"question": "What is blue?", "answerKey": "B", "choices": {"text": ["sun", "sky"], "label": ["A", "B"]}}
    arc = "".join(json.dumps(choices) + "\n" for _ in range(3)).encode()
    gpqa = b'Question,Correct Answer,Incorrect Answer 1,Incorrect Answer 2,Incorrect Answer 3\nWhy?,a,b,c,"d\ne"\n'
    found += [
        Target("ARC", {"ARC-Challenge-Test.jsonl": arc}, ("ARC-Challenge-Test.jsonl",),
               lambda path: find("arc_challenge").read(str(path)), 8),
        Target("GPQA", {"gpqa_diamond.csv": gpqa}, ("gpqa_diamond.csv",),
               lambda path: find("gpqa_diamond").read(str(path)), 8),
        Target("prompts", {"a.jsonl": b'{"prompt": "2 + 2 ="}\n{"prompt": "a"}\n'}, ("a.jsonl",),
               lambda path: read_prompts(str(path / "a.jsonl")), 8),
        Target("outcomes", {"outcomes.jsonl": b'{"id": "a/0", "policy": "1"}\n{"id": "a/1", "policy": "1"}\n'},
               ("outcomes.jsonl",), lambda path: read_outcomes(path, torn=True), 8),
        Target("JSON lines", {"train.jsonl": lines}, ("train.jsonl",), lambda path: load_gsm8k(str(path)), 20),
        Target("CSV", {"a.csv": b'question,answer\n"1, 2?",3\nx,"y\nz"\n'}, ("a.csv",),
               lambda path: list(read_csv(path / "a.csv")), 8),
        Target("metrics", {"metrics.jsonl": b'{"step": 1, "loss": 0.5}\n{"step": 2, "loss": 0.25}\n'},
               ("metrics.jsonl",), read_metrics, 8),
    ]  # fmt: skip
    for name, file in (("GGUF", gemma_gguf(folder)), ("GGUF, byte-level", llama_gguf(folder))):
        found.append(Target(name, {"model.gguf": file}, ("model.gguf",), lambda path: model(path / "model.gguf"), 8))
        found.append(
            Target(
                f"{name}, tokenizer",
                {"model.gguf": file},
                ("model.gguf",),
                lambda path: load_tokenizer(path / "model.gguf"),
            )
        )
    spm = load_tokenizer(folder / "gemma.gguf").files()
    found += [
        Target("tokenizer.model", spm, tuple(spm), lambda path: load_tokenizer(path).encode("a b"), 8),
        Target("tokenizer.model, exported", spm, ("tokenizer.model",),
               lambda path: from_model_proto((path / "tokenizer.model").read_bytes()), 12),
    ]  # fmt: skip
    trained = run_folder(folder, ours)
    found += [
        Target("run", trained, ("config.json", "base.json"), model, 1),
        Target("run's checkpoints", trained, tuple(name for name in trained if "/" in name), newest_good, 2),
    ]
    return found


def rows() -> list[Target]:
    """Rows and tasks of one's own, which no model has to be made for."""
    return [Target(*fields, factor=100) for fields in row_targets()]


def _json(value: Any) -> bytes:
    return json.dumps(value).encode()


def gemma_gguf(folder: Path) -> bytes:
    """A Gemma 3 in two types, with a SentencePiece vocabulary of bytes."""
    from sst_jax.data.vocabulary import BYTE, CONTROL, UNKNOWN

    specials = ["<pad>", "<eos>", "<bos>", "<unk>"]
    tokens = [*specials, *(f"<0x{byte:02X}>" for byte in range(256))]
    facts = {
        "model": "llama", "tokens": tokens, "scores": [-1.0] * len(tokens), "padding_token_id": 0, "eos_token_id": 1,
        "token_type": [CONTROL] * 3 + [UNKNOWN] + [BYTE] * 256, "bos_token_id": 2, "unknown_token_id": 3,
        "add_bos_token": True,
    }  # fmt: skip
    keys = {"attention.sliding_window": 5, "rope.scaling.type": "linear", "rope.scaling.factor": 8.0}
    return _gguf(folder / "gemma.gguf", "gemma3", keys, facts)


def llama_gguf(folder: Path) -> bytes:
    """A Llama with a byte-level vocabulary."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    tokens = ["<|end|>", *bytes_to_unicode().values(), "th", "the"]
    facts = {
        "model": "gpt2", "pre": "smollm", "tokens": tokens, "merges": ["t h", "th e"], "bos_token_id": 0,
        "eos_token_id": 0, "token_type": [3] + [1] * (len(tokens) - 1), "add_bos_token": False,
    }  # fmt: skip
    return _gguf(folder / "llama.gguf", "llama", {}, facts)


def _gguf(file: Path, family: str, keys: dict[str, Any], facts: dict[str, Any]) -> bytes:
    import dataclasses

    import gguf
    import numpy as np

    from sst_jax.families.registry import BY_NAME
    from sst_jax.weights import key_map
    from tests.support import toys

    sizes = {"num_layers": 1, "d_model": 32, "d_ff": 32, "num_heads": 2, "num_kv_heads": 1, "head_dim": 16}
    backbone = dataclasses.replace(
        toys.BACKBONE,
        family=family,
        layer_types=(),
        vocab_size=len(facts["tokens"]),
        **{**BY_NAME[family].block, **sizes},
    )
    keys = {
        "block_count": 1, "embedding_length": 32, "feed_forward_length": 32, "attention.head_count": 2,
        "attention.head_count_kv": 1, "attention.key_length": 16, "attention.value_length": 16, "context_length": 300,
        "attention.layer_norm_rms_epsilon": 1e-6, "rope.freq_base": 1e6, **keys,
    }  # fmt: skip
    writer = gguf.GGUFWriter(file, family)
    kinds = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    pairs = {f"{family}.{key}": value for key, value in keys.items()}
    pairs |= {f"tokenizer.ggml.{key}": value for key, value in facts.items()}
    for key, value in pairs.items():
        kinds.get(type(value), writer.add_array)(key, value)
    rng = np.random.default_rng(0)
    for key, entry in key_map.expected(backbone, "gguf").items():
        value = rng.standard_normal(entry.shape).astype(np.float32)
        if value.ndim == 2:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(key, gguf.quants.quantize(value, kind), raw_dtype=kind)
        else:
            writer.add_tensor(key, value)
    for write in (
        writer.write_header_to_file,
        writer.write_kv_data_to_file,
        writer.write_tensors_to_file,
        writer.close,
    ):
        write()
    return file.read_bytes()


def run_folder(folder: Path, ours: Any) -> dict[str, bytes]:
    """A run that stands on the folder "plain", with two checkpoints."""
    import grain
    import optax

    from sst_jax.training.step import init_state
    from sst_jax.weights.checkpoint import Checkpoints
    from sst_jax.weights.loading import open_model

    root = folder / "run"
    write_json(root / "base.json", open_model(folder / "plain", "float32").provenance.base_record())
    write_json(root / "config.json", {"recipe": {}, "model_config": ours.config.to_dict()})
    state = init_state({name: ours.params[name] for name in ("adapter", "blend")}, optax.sgd(1.0))
    checkpoints = Checkpoints(root)
    for step in (1, 2):
        iterator = iter(grain.MapDataset.range(9).to_iter_dataset())
        checkpoints.save(step, state.trainable, state.optimizer, iterator, {"heldout": {}, "seconds": 0.0})
    checkpoints.close()
    return {file.relative_to(root).as_posix(): file.read_bytes() for file in sorted(root.rglob("*")) if file.is_file()}


# --------------------------------------------------------------------------------------------------------- guards


class Guard:
    """Runs a reader on a folder; raises `Crash` for what it may not do. One a process: an audit hook stays."""

    def __init__(self, folder: Path):
        import huggingface_hub.constants as hub

        places = (folder, sys.prefix, sys.base_prefix, Path(__file__).parents[2], hub.HF_HOME, "/proc", "/sys")
        self.inside = ("/dev/null", *(os.path.realpath(place) + os.sep for place in places))
        self.folder, self.watching, self.escapes = "", False, []
        tracemalloc.start()
        signal.signal(signal.SIGALRM, self._alarm)
        sys.addaudithook(self._audit)

    def _alarm(self, number: int, frame: Any) -> None:
        raise Hang

    def _audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.watching:
            return
        if event in (
            "subprocess.Popen",
            "os.system",
            "os.exec",
            "os.posix_spawn",
            "socket.connect",
            "pickle.find_class",
        ):
            self.escapes.append(f"{event} {arguments[:1]}")
        elif event == "open" and isinstance(arguments[0], str | bytes | os.PathLike):
            path = os.path.realpath(os.fsdecode(arguments[0]))
            if not path.startswith(self.inside):
                self.escapes.append(f"open {path}")
        elif event == "exec" and str(getattr(arguments[0], "co_filename", "")).startswith(self.folder):
            self.escapes.append(f"ran {arguments[0].co_filename}")

    def read(self, read: Callable[[Path], Any], folder: Path, allowed: int | None) -> tuple[bool, int]:
        """(whether it loaded, the peak of traced memory in bytes); `allowed` bytes, or None for no limit."""
        self.folder, self.escapes = str(folder), []
        before, resident = tracemalloc.get_traced_memory()[0], _resident()
        tracemalloc.reset_peak()
        loaded, crash = False, None
        self.watching = True
        signal.setitimer(signal.ITIMER_REAL, SECONDS)
        try:
            read(folder)
            loaded = True
        except InputError:
            pass
        except Hang:
            crash = f"took more than {SECONDS} s"
        except (Exception, RecursionError) as error:
            crash = "".join(traceback.format_exception(error))
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            self.watching = False
        peak = tracemalloc.get_traced_memory()[1] - before
        if crash:
            raise Crash(crash)
        if self.escapes:
            raise Crash(f"left its folder: {', '.join(sorted(set(self.escapes)))}")
        if allowed is not None and peak > allowed:
            raise Allocation(f"took {peak} bytes, {allowed} are allowed")
        if allowed is not None and _resident() - resident > allowed + NATIVE:
            raise Allocation(f"the process grew by {_resident() - resident} bytes")
        return loaded, peak


def _resident() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class Bench:
    """The targets in a scratch folder, ready for their cases."""

    def __init__(self, folder: Path, only: str | None = None):
        tempfile.tempdir = str(folder / "tmp")
        (folder / "tmp").mkdir()
        (folder / "made").mkdir()
        made = rows() if (only or "").startswith("rows") else [*targets(folder / "made"), *rows()]
        chosen = [target for target in made if only in (None, target.name, target.name.partition(":")[0])]
        self.targets = {target.name: target for target in chosen}
        self.guard, self.places, self.usual = Guard(folder), {}, {}
        self.pool = [target.files[name] for target in self.targets.values() for name in target.mutable]
        for number, target in enumerate(self.targets.values()):
            place = self.places[target.name] = folder / "read" / str(number)
            for name, content in target.files.items():
                (place / name).parent.mkdir(parents=True, exist_ok=True)
                (place / name).write_bytes(content)
            self.guard.read(target.read, place, None)  # whatever is imported late is imported now
            loaded, self.usual[target.name] = self.guard.read(target.read, place, None)
            assert loaded, f"{target.name}: its own valid folder is refused"
        self.order = [name for target in self.targets.values() for name in [target.name] * target.share]

    def mutation(self, case: str) -> tuple[Target, str, bytes]:
        """(target, file, its bytes) of a case, "TARGET/NUMBER"."""
        target, rng = self.targets[case.rpartition("/")[0]], random.Random(case)
        name = rng.choice(target.mutable)
        return target, name, mutate(rng, target.files[name], self.pool)

    def run(self, case: str) -> bool:
        """Whether a case loaded; raises `Crash`."""
        target, name, content = self.mutation(case)
        place, sign = self.places[target.name], target.sign or (lambda place: None)
        size = sum(map(len, target.files.values())) - len(target.files[name]) + len(content)
        allowed = self.usual[target.name] + target.factor * size + SLACK
        (place / name).write_bytes(content)
        sign(place)
        try:
            return self.guard.read(target.read, place, allowed)[0]
        except Allocation:  # of a program that was compiled, or a module imported: not so the second time
            return self.guard.read(target.read, place, allowed)[0]
        finally:
            (place / name).write_bytes(target.files[name])
            sign(place)

    def case(self, number: int) -> str:
        """The name of the case that stands at `number` in a run over all targets."""
        return f"{self.order[number % len(self.order)]}/{number}"


# -------------------------------------------------------------------------------------------------------- running


def parser() -> Parser:
    parser = Parser(prog="python -m tests.support.fuzz", description=__doc__)
    parser.add_argument("--count", type=int, default=100_000, metavar="N", help="cases (default: %(default)s)")
    parser.add_argument("--first", type=int, default=0, metavar="N", help="number of the first case")
    parser.add_argument(
        "--only", metavar="TARGET", help="cases of one target, or of all that are named so before a colon"
    )
    parser.add_argument("--case", metavar="TARGET/N", help="one case, in this process")
    parser.add_argument("--keep", metavar="DIR", help="put the files that crash a reader here")
    parser.add_argument("--json", metavar="FILE", help="write counts, rate and crashes to FILE")
    parser.add_argument("--worker", metavar="FILE", help=argparse.SUPPRESS)
    return parser


def main(argv: Sequence[str]) -> None:
    args = parser().parse_args(argv)
    if args.worker or args.case:
        with scratch() as folder:
            work(args, Bench(folder, args.only))
        return
    started, first, end = time.monotonic(), args.first, args.first + args.count
    counts: Counter[str] = Counter()
    crashes: list[dict[str, str]] = []
    with scratch() as folder, bar(args.count, "fuzzing", "case") as meter:
        while first < end:
            record = folder / "record.jsonl"
            record.touch()
            more = [
                part for name in ("only", "keep") if (value := getattr(args, name)) for part in (f"--{name}", value)
            ]
            command = ["--count", str(end - first), "--first", str(first), "--worker", str(record), *more]
            with (folder / "stderr").open("w") as errors:
                process = subprocess.Popen([sys.executable, "-m", "tests.support.fuzz", *command], stderr=errors)
                status = watch(
                    process, record, lambda done, first=first: meter.update(done - meter.n - args.first + first)
                )
            lines = [json.loads(line) for line in record.read_text().splitlines()]
            record.unlink()
            begun = [line for line in lines if "outcome" not in line]
            ended = [line for line in lines if "outcome" in line]
            counts.update(line["outcome"] for line in ended)
            crashes += [line for line in ended if line["outcome"] == "crash"]
            if status and not begun:
                raise RuntimeError(f"the worker cannot start:\n{(folder / 'stderr').read_text()[-3000:]}")
            if len(begun) > len(ended):  # the worker died of it
                counts["crash"] += 1
                crashes.append({**begun[-1], "outcome": "crash", "why": f"the process ended with status {status}"})
            first += len(begun)
    seconds = time.monotonic() - started
    cases = sum(counts.values())
    result = {"cases": cases, **counts, "seconds": seconds, "per_second": cases / seconds, "crashes": crashes}
    for crash in crashes:
        print(f"CRASH {crash['case']}: {crash['why'].strip().splitlines()[-1]}")
    print(f"{cases:,} cases in {seconds:,.0f} s: {counts['loaded']:,} loaded, {counts['refused']:,} refused, "
          f"{counts['crash']:,} crashes")  # fmt: skip
    if args.json:
        write_json(args.json, result)
    if crashes:
        raise InputError(f"{len(crashes)} cases crash a reader")


def watch(process: subprocess.Popen, record: Path, progress: Callable[[int], None]) -> int:
    """Waits for a worker, and kills one that has begun no new case for a minute: no Python runs there any more."""
    size, since = 0, time.monotonic()
    while process.poll() is None:
        time.sleep(0.5)
        if record.stat().st_size != size:
            size, since = record.stat().st_size, time.monotonic()
            progress(record.read_bytes().count(b"outcome"))
        elif time.monotonic() - since > (60 if size else 300):  # making the valid folders takes longer
            process.kill()
    return process.returncode


def work(args: argparse.Namespace, bench: Bench) -> None:
    """Runs cases in this process, with a line in the record before and after each."""
    if args.case:
        print("loaded" if bench.run(args.case) else "refused")
        return
    # What a native library asks for beyond this fails at once.
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + (2 << 30), resource.RLIM_INFINITY))
    with open(args.worker, "w", buffering=1) as record:
        for number in range(args.first, args.first + args.count):
            case = bench.case(number)
            record.write(json.dumps({"case": case}) + "\n")
            try:
                ended = {"case": case, "outcome": "loaded" if bench.run(case) else "refused"}
            except Crash as crash:
                ended = {"case": case, "outcome": "crash", "why": str(crash)}
                if args.keep:
                    _, name, content = bench.mutation(case)
                    kept = Path(args.keep) / case.replace("/", "-") / name
                    kept.parent.mkdir(parents=True, exist_ok=True)
                    kept.write_bytes(content)
            record.write(json.dumps(ended) + "\n")


@contextlib.contextmanager
def scratch() -> Iterator[Path]:
    """A folder in memory where there is one."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None) as folder:
        yield Path(folder)


if __name__ == "__main__":
    os.environ |= {"JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1"}
    sys.exit(run(main))
