"""Collected hidden states: a folder with one problem of a data set, at several iteration depths, in each entry.

DIR/manifest.json                         the model and the settings; another manifest is refused
DIR/00007/{text.json, states, ...}        problem 7, renamed into place once it is whole; arrays are Zarr
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tensorstore

from sst_jax.console.command import write_json
from sst_jax.errors import InputError
from sst_jax.files import diff, read_json
from sst_jax.inference.halting_probe import fingerprint
from sst_jax.inference.model import Model
from sst_jax.inference.prefill import capacity_for, padded
from sst_jax.lab.analysis import controls
from sst_jax.lab.analysis.collect import Batch, Settings, Text, TextRunner, split
from sst_jax.types import Json

MANIFEST, TEXT = "manifest.json", "text.json"
# Keys of TEXT, and the fields of a `Problem` that they hold.
WRITTEN = {"id": "id", "prefix": "prefix", "walked": "inputs", "predicted": "predicted", "controls": "controls"}


class Problem(NamedTuple):
    """What was collected of one problem, float32 unless said; I counts depths."""

    id: str
    prefix: list[int]  # tokens, see `split`
    inputs: list[int]  # in files "walked", as version 0.1.0 called them
    predicted: list[int]
    states: np.ndarray  # [I, T, L, D]
    top_ids: np.ndarray  # int32 [I, T, TOP]
    top_logits: np.ndarray  # [I, T, TOP]
    rounded: np.ndarray | None  # [T, L, D], the first depth in bfloat16
    controls: Json  # what `controls.collect_batch` found


def store(folder: Path, name: str) -> Json:
    """Return the tensorstore spec of a Zarr array."""
    return {"driver": "zarr3", "kvstore": {"driver": "file", "path": str((folder / name).absolute())}}


def write_array(folder: Path, name: str, value: np.ndarray) -> None:
    """Write an array as Zarr."""
    array = tensorstore.open(store(folder, name), create=True, dtype=value.dtype.name, shape=value.shape).result()
    array.write(value).result()


def read_array(folder: Path, name: str) -> np.ndarray:
    """Read an array. Raises: InputError naming the array that is missing or damaged."""
    try:
        return tensorstore.open(store(folder, name)).result().read().result()
    except ValueError as error:
        raise InputError(f"{folder / name} cannot be read: {' '.join(str(error).split())[:200]}") from None


class Collection:
    """A folder of collected problems."""

    def __init__(self, path: Path):
        self.path = path

    def begin(self, manifest: Json) -> None:
        """Open the folder for these settings.

        Raises: InputError where it holds a collection of others, naming one, or something else.
        """
        if not (self.path / MANIFEST).is_file():
            if self.path.is_dir() and any(self.path.iterdir()):
                raise InputError(f"{self.path} holds something that is no collection: choose an empty folder")
            self.path.mkdir(parents=True, exist_ok=True)
            write_json(self.path / MANIFEST, manifest)
            return
        for key, there, now in diff(read_json(self.path / MANIFEST), json.loads(json.dumps(manifest))):
            raise InputError(
                f"{self.path} was collected with {key} = {str(there)[:80]}, now {str(now)[:80]}: use its settings or "
                "another --out"
            )

    def folder(self, number: int) -> Path:
        return self.path / f"{number:05d}"

    def has(self, number: int) -> bool:
        return self.folder(number).is_dir()

    def write(self, number: int, problem: Problem) -> None:
        """Put a problem into its place, whole or not at all."""
        partial = self.path / f".{number:05d}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        for name in ("states", "top_ids", "top_logits", "rounded"):
            value = getattr(problem, name)
            if value is not None:
                write_array(partial, name, value)
        write_json(partial / TEXT, {key: getattr(problem, name) for key, name in WRITTEN.items()})
        partial.rename(self.folder(number))

    def read(self, number: int) -> Problem:
        """Read a problem.

        Raises: InputError on what is missing or damaged, and where a state is not a number.
        """
        folder = self.folder(number)
        text = {WRITTEN.get(key, key): value for key, value in read_json(folder / TEXT).items()}
        arrays: Json = {name: read_array(folder, name) for name in ("states", "top_ids", "top_logits")}
        rounded = read_array(folder, "rounded") if (folder / "rounded").is_dir() else None
        problem = Problem(**text, **arrays, rounded=rounded)
        check_finite(folder, problem)
        return problem

    def __iter__(self) -> Iterator[Problem]:
        for number in range(len(self)):
            yield self.read(number)

    def __len__(self) -> int:
        return read_json(self.path / MANIFEST)["problems"]


def check_finite(folder: Path, problem: Problem) -> None:
    """Raise InputError naming the first position and layer whose state is not a number."""
    for name in ("states", "rounded"):
        value = getattr(problem, name)
        if value is not None and not np.isfinite(value).all():
            *_, position, layer, _ = np.argwhere(~np.isfinite(value))[0]
            raise InputError(f"{folder}: {name} of {problem.id}, position {position}, layer {layer}, are not numbers")


# ----------------------------------------------------------------------------------------------------------- The whole


def manifest_of(model: Model, texts: Sequence[Text], settings: Settings) -> Json:
    """Return what identifies a collection when it is resumed: the model, the settings, the texts."""
    return {
        "model": fingerprint(model),
        "problems": len(texts),
        "texts": hashlib.sha256(json.dumps(texts).encode()).hexdigest(),
        **dataclasses.asdict(settings),
    }


def collect(
    model: Model,
    texts: Sequence[Text],
    settings: Settings,
    path: Path,
    advance: Callable[[int], object] = lambda _: None,
) -> Collection:
    """Run all texts at all depths into a folder; resume where an earlier call with the same settings stopped.

    Problems are cut into the same batches each time, and a batch that a kill interrupted is computed again.

    Raises: InputError as `Collection.begin`, `split`, and on a text longer than the model's positions.
    """
    collection = Collection(path)
    shape = shape_of(model, texts, settings)
    collection.begin(manifest_of(model, texts, settings))
    runner = TextRunner(model, settings, capacity_for(shape[0]))
    for start in range(0, len(texts), settings.batch):
        numbers = range(start, min(start + settings.batch, len(texts)))
        if not all(map(collection.has, numbers)):
            part = texts[numbers.start : numbers.stop]
            batch = Batch.of(model, part, answers(model, part, settings), shape)
            for number in filter(collection.has, numbers):
                shutil.rmtree(collection.folder(number))
            for number, problem in zip(numbers, collected_problems(runner, part, batch, numbers), strict=True):
                collection.write(number, problem)
        advance(len(numbers))
    return collection


def shape_of(model: Model, texts: Sequence[Text], settings: Settings) -> tuple[int, int]:
    """Return positions of prefixes and of the texts after them, padded, the same for all batches.

    Raises: InputError on a text that is too short, or too long for the model.
    """
    if not texts:
        raise InputError("there are no texts to run")
    longest, most = [0, 0], model.config.backbone.position_limit
    for text in texts:
        answer = text.given if text.given is not None else [model.tokenizer.pad_id] * settings.new_tokens
        prefix, inputs, _ = split(model, text, answer)
        if len(prefix) + len(inputs) > most:
            raise InputError(f"{text.id}: {len(prefix) + len(inputs)} positions exceed the model's {most}")
        longest = [max(longest[0], len(prefix)), max(longest[1], len(inputs))]
    return padded(longest[0]), padded(longest[1])


def answers(model: Model, texts: Sequence[Text], settings: Settings) -> list[list[int]]:
    """Return what follows each prompt: as given, else greedy at the first depth."""
    wanting = [row for row, text in enumerate(texts) if text.given is None]
    found = [text.given or [] for text in texts]
    if wanting:
        written = model.generate(
            [texts[row].prompt for row in wanting], depth=settings.depths[0], max_new_tokens=settings.new_tokens
        )
        for row, answer in zip(wanting, written, strict=True):
            found[row] = answer.tokens
    return found


def collected_problems(runner: TextRunner, texts: Sequence[Text], batch: Batch, numbers: range) -> Iterator[Problem]:
    """Yield everything that is kept of a batch, problem by problem; `numbers` are the problems' places in the
    collection.
    """
    settings = runner.settings
    if settings.between == "iterations":
        every = runner(batch, settings.depths[-1], every=True)
        runs = [every[depth - 1] for depth in settings.depths]
    else:
        runs = [each for depth in settings.depths for each in runner(batch, depth)]
    narrow = dataclasses.replace(runner.model.config, dtype="bfloat16")
    rounded = runner(batch, settings.depths[0], config=narrow)[0] if settings.rounding else None
    controlled: list[Json] = [{}] * len(texts)
    if numbers.start < settings.controls:
        controlled = controls.collect_batch(runner, batch, runs[0], runs[-1])
    for row, text in enumerate(texts):
        count = int(batch.counts[row])
        seen = [one.row(row, count) for one in runs]
        yield Problem(
            text.id,
            batch.prefix[row, : batch.prefix_counts[row]].tolist(),
            batch.inputs[row, :count].tolist(),
            batch.predicted[row],
            np.stack([one.states for one in seen]),
            np.stack([one.top_ids for one in seen]),
            np.stack([one.top_logits for one in seen]),
            None if rounded is None else rounded.row(row, count).states,
            controlled[row],
        )
