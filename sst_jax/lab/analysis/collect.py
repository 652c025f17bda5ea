"""Hidden states of a text at several iteration depths, streamed to disk one problem at a time.

A known text is walked as decoding would walk it: the prompt at depth 1 (`stream.prompt`), then depth I at every
position from the first one that depth applies to. Position 0 is that one, the prompt's last, and predicts the first
token of the text. All positions of a layer are computed together (`model/rules.py`, `exact`).

What a depth's state is: by default (between="runs") each depth has a run of its own, so depth I is what a user of
`--depth I` would have; the states of earlier positions differ too. With between="iterations" one run at the greatest
depth is looked at after each of its iterations. At position 0 the two are the same.

    DIR/manifest.json                         the model and the settings; another manifest is refused
    DIR/00007/{text.json, states, ...}        problem 7, renamed into place once it is whole; arrays are Zarr
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sst_jax.console.command import write_json
from sst_jax.errors import InputError
from sst_jax.files import diff, read_json
from sst_jax.inference.decode_state import Cache
from sst_jax.inference.halting_probe import fingerprint
from sst_jax.inference.model import Model
from sst_jax.inference.prefill import capacity_for, chunk_context, padded, prefill
from sst_jax.inference.session import prompt_mode
from sst_jax.lab.analysis import controls
from sst_jax.model import decoder
from sst_jax.model.config import ModelConfig
from sst_jax.model.decoder import Context, Layer, Params, Residuals
from sst_jax.model.quantization import storages
from sst_jax.model.rules import exact, plain

TOP = 100  # likeliest tokens that are kept
MANIFEST, TEXT = "manifest.json", "text.json"


class Text(NamedTuple):
    """A prompt and, where it is given rather than generated, what follows it, as tokens."""

    id: str
    prompt: list[int]
    given: list[int] | None = None


@dataclasses.dataclass(frozen=True)
class Settings:
    """depths    ascending; the first is what the others are compared with
    between   "runs" or "iterations", see the module's docstring
    what      "output": the residual stream that a layer hands up; "memory": what its stream remembers
    rounding  walk each text once more in bfloat16, at the first depth, for the noise floor
    controls  how many problems are also walked with states that do not belong there
    new_tokens  of a generated text;  batch  problems walked together;  seed  of the controls
    """

    depths: tuple[int, ...] = (1, 4)
    between: str = "runs"
    what: str = "output"
    rounding: bool = True
    controls: int = 10
    new_tokens: int = 64
    batch: int = 4
    seed: int = 0


class DepthStates(NamedTuple):
    """One walk of a batch after one iteration of every position, in host memory."""

    states: np.ndarray  # [L, B, T, D]; of one problem [T, L, D]
    top_ids: np.ndarray  # int32 [B, T, TOP], the likeliest next tokens; of one problem [T, TOP]
    top_logits: np.ndarray

    def row(self, number: int, count: int) -> DepthStates:
        """One problem's `count` positions."""
        states = np.moveaxis(self.states[:, number, :count], 0, 1).astype(np.float32)
        return DepthStates(states, self.top_ids[number, :count], self.top_logits[number, :count].astype(np.float32))


# ------------------------------------------------------------------------------------------------------- Walking texts


def outputs(layer: Layer, residuals: Residuals, before: Any, context: Context) -> tuple[Residuals, jax.Array]:
    """A rule that leaves each layer's output behind, under the exact recurrence or without a stream."""
    residuals, _ = (plain if context.config.stream is None else exact)(layer, residuals, before, context)
    return residuals, residuals[0]


def remembered(layer: Layer, residuals: Residuals, before: Any, context: Context) -> tuple[Residuals, jax.Array]:
    """A rule that leaves each layer's memory behind; without a stream there is none, and it is the output."""
    if context.config.stream is None:
        return outputs(layer, residuals, before, context)
    residuals, left = exact(layer, residuals, before, context)
    return residuals, left.state_out


RULES = {"output": outputs, "memory": remembered}


@functools.partial(jax.jit, static_argnames=("config", "rule", "copies", "depth", "every", "bos_id", "dtype"))
def run_texts(
    config: ModelConfig,
    params: Params,
    tokens: jax.Array,
    count: jax.Array,
    cache: Cache,
    options: Any = None,
    *,
    rule: Callable[..., tuple[Residuals, jax.Array]] = outputs,
    copies: int = 1,
    depth: int = 1,
    every: bool = False,
    bos_id: int | None = None,
    dtype: str = "float32",
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Right-padded texts tokens [B, T], `count` [B] of whose positions are real, on from the caches of their prompts.

    rule: what is kept of each layer, [B, T*I, D], of `num_residuals` residuals; the last one's logits are kept.
    every: look after each of K = I iterations, else after the last one only, K = 1.

    Returns states [L, B, T, K, D], and the TOP likeliest next tokens and their logits [B, T, K, TOP].
    """
    batch, length = tokens.shape
    depth = depth if config.stream is not None else 1
    context = chunk_context(config, tokens, count, cache, fresh=False, depth=depth, bos_id=bos_id)
    context = dataclasses.replace(context, options=options)
    first = 0 if every else depth - 1

    def looked_at(steps: jax.Array) -> jax.Array:
        return steps.reshape(batch, length, depth, -1)[:, :, first:]

    def keeping(*arguments: Any) -> tuple[Residuals, jax.Array]:
        residuals, kept = rule(*arguments)
        return residuals, looked_at(kept)

    x = jnp.repeat(decoder.embed(config, params, tokens, jnp.dtype(dtype)), depth, axis=1)
    residuals, states = decoder.run_layers(params, keeping, (x,) * copies, context, cache.state)
    hidden = decoder.final_norm(config, params, looked_at(residuals[-1]))
    # One row at a time, so that a vocabulary's worth of logits exists for one row's positions only.
    top_logits, top_ids = jax.lax.map(
        lambda row: jax.lax.top_k(decoder.head(params, row), min(TOP, config.backbone.vocab_size)), hidden
    )
    return states, top_ids, top_logits


def split(model: Model, text: Text, answer: Sequence[int]) -> tuple[list[int], list[int], list[int]]:
    """(prefix, walked, predicted) tokens: walked[t] stands at position t and predicts predicted[t].

    Raises: InputError where a prompt or a text is too short to have a position to look at.
    """
    whole = [*text.prompt, *answer]
    start = len(text.prompt) - (prompt_mode(model.config) != "none")
    if not start or len(whole) < start + 2:
        raise InputError(f"{text.id}: a prompt of {len(text.prompt)} and a text of {len(answer)} tokens are too short")
    return whole[:start], whole[start:-1], whole[start + 1 :]


class Batch(NamedTuple):
    """Texts of one batch, padded to the whole collection's shapes."""

    prefix: np.ndarray  # int32 [B, P]
    prefix_count: np.ndarray  # [B]
    walked: np.ndarray  # int32 [B, T]
    count: np.ndarray  # [B]
    predicted: list[list[int]]

    @classmethod
    def of(cls, model: Model, texts: Sequence[Text], answers: Sequence[Sequence[int]], shape: tuple[int, int]) -> Batch:
        parts = [split(model, text, answer) for text, answer in zip(texts, answers, strict=True)]

        def rows(number: int, width: int) -> tuple[np.ndarray, np.ndarray]:
            filled = np.full((len(parts), width), model.tokenizer.pad_id, np.int32)
            for row, part in zip(filled, parts, strict=True):
                row[: len(part[number])] = part[number]
            return filled, np.array([len(part[number]) for part in parts], np.int32)

        return cls(*rows(0, shape[0]), *rows(1, shape[1]), [part[2] for part in parts])


class Walker:
    """Walks batches through one model at any depth."""

    def __init__(self, model: Model, settings: Settings, capacity: int):
        self.model, self.settings, self.capacity = model, settings, capacity
        self._bases: dict[str, Params] = {model.dtype: model.params["base"]}

    def __call__(
        self,
        batch: Batch,
        depth: int,
        *,
        every: bool = False,
        config: ModelConfig | None = None,
        dtype: str | None = None,
        rule: Any = None,
        **more: Any,
    ) -> list[DepthStates]:
        """The batch after its last iteration, or after `every` one. config, dtype: other than the model's own."""
        config, dtype = config or self.model.config, dtype or self.model.dtype
        params, bos_id = self._params(config, dtype), self.model.tokenizer.bos_id
        _, cache = prefill(
            config,
            params,
            batch.prefix,
            batch.prefix_count,
            capacity=self.capacity,
            depth=depth if prompt_mode(config) == "all" else 1,
            bos_id=bos_id,
            dtype=dtype,
        )
        states, *top = run_texts(
            config,
            params,
            batch.walked,
            batch.count,
            cache,
            depth=depth,
            every=every,
            bos_id=bos_id,
            dtype=dtype,
            rule=rule or RULES[self.settings.what],
            **more,
        )
        states, (ids, logits) = np.asarray(states), map(np.asarray, top)
        return [DepthStates(states[..., k, :], ids[:, :, k], logits[:, :, k]) for k in range(ids.shape[2])]

    def _params(self, config: ModelConfig, dtype: str) -> Params:
        """The model's parameters as `config` takes them, the base in `dtype`."""
        if dtype not in self._bases:
            self._bases[dtype] = storages.cast(self.model.params["base"], dtype)
        blend = {name: self.model.params["blend"][name] for name in decoder.abstract_params(config)["blend"]}
        return {**self.model.params, "base": self._bases[dtype], "blend": blend}


# ------------------------------------------------------------------------------------------------------------- On disk


class Problem(NamedTuple):
    """What was collected of one problem, float32 unless said; I counts depths."""

    id: str
    prefix: list[int]  # tokens, see `split`
    walked: list[int]
    predicted: list[int]
    states: np.ndarray  # [I, T, L, D]
    top_ids: np.ndarray  # int32 [I, T, TOP]
    top_logits: np.ndarray  # [I, T, TOP]
    rounded: np.ndarray | None  # [T, L, D], the first depth in bfloat16
    controls: dict[str, Any]  # what `controls.collect_batch` found


def store(folder: Path, name: str) -> Any:
    """The tensorstore spec of a Zarr array."""
    return {"driver": "zarr3", "kvstore": {"driver": "file", "path": str((folder / name).absolute())}}


def write_array(folder: Path, name: str, value: np.ndarray) -> None:
    import tensorstore

    array = tensorstore.open(store(folder, name), create=True, dtype=value.dtype.name, shape=value.shape).result()
    array.write(value).result()


def read_array(folder: Path, name: str) -> np.ndarray:
    """Raises: InputError naming the array that is missing or damaged."""
    import tensorstore

    try:
        return tensorstore.open(store(folder, name)).result().read().result()
    except ValueError as error:
        raise InputError(f"{folder / name} cannot be read: {' '.join(str(error).split())[:200]}") from None


class Collection:
    """A folder of collected problems."""

    def __init__(self, path: Path):
        self.path = path

    def begin(self, manifest: dict[str, Any]) -> None:
        """Opens the folder for these settings.

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
        """Puts a problem into its place, whole or not at all."""
        partial = self.path / f".{number:05d}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        for name in ("states", "top_ids", "top_logits", "rounded"):
            value = getattr(problem, name)
            if value is not None:
                write_array(partial, name, value)
        names = ("id", "prefix", "walked", "predicted", "controls")
        write_json(partial / TEXT, {name: getattr(problem, name) for name in names})
        partial.rename(self.folder(number))

    def read(self, number: int) -> Problem:
        """Raises: InputError on what is missing or damaged, and where a state is not a number."""
        folder = self.folder(number)
        text = read_json(folder / TEXT)
        arrays = {name: read_array(folder, name) for name in ("states", "top_ids", "top_logits")}
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
    """Raises: InputError naming the first position and layer whose state is not a number."""
    for name in ("states", "rounded"):
        value = getattr(problem, name)
        if value is not None and not np.isfinite(value).all():
            *_, position, layer, _ = np.argwhere(~np.isfinite(value))[0]
            raise InputError(f"{folder}: {name} of {problem.id}, position {position}, layer {layer}, are not numbers")


# ----------------------------------------------------------------------------------------------------------- The whole


def manifest_of(model: Model, texts: Sequence[Text], settings: Settings) -> dict[str, Any]:
    """What says that a collection goes on: the model, the settings, the texts."""
    return {
        "model": fingerprint(model),
        "problems": len(texts),
        "texts": hashlib.sha256(json.dumps(texts).encode()).hexdigest(),
        **dataclasses.asdict(settings),
    }


def collect(
    model: Model, texts: Sequence[Text], settings: Settings, path: Path, advance: Callable[[int], Any] = lambda _: None
) -> Collection:
    """Walks all texts at all depths into a folder; goes on where an earlier call with the same settings stopped.

    Problems are cut into the same batches each time, and a batch that a kill interrupted is computed again.

    Raises: InputError as `Collection.begin`, `split`, and on a text longer than the model's positions.
    """
    collection = Collection(path)
    shape = shape_of(model, texts, settings)
    collection.begin(manifest_of(model, texts, settings))
    walker = Walker(model, settings, capacity_for(shape[0]))
    for start in range(0, len(texts), settings.batch):
        numbers = range(start, min(start + settings.batch, len(texts)))
        if not all(map(collection.has, numbers)):
            part = texts[numbers.start : numbers.stop]
            batch = Batch.of(model, part, answers(model, part, settings), shape)
            for number in filter(collection.has, numbers):
                shutil.rmtree(collection.folder(number))
            for number, problem in zip(numbers, look(walker, part, batch, numbers), strict=True):
                collection.write(number, problem)
        advance(len(numbers))
    return collection


def shape_of(model: Model, texts: Sequence[Text], settings: Settings) -> tuple[int, int]:
    """Positions of prefixes and of walked texts, padded, the same for all batches.

    Raises: InputError on a text that is too short, or too long for the model.
    """
    if not texts:
        raise InputError("there are no texts to look at")
    longest, most = [0, 0], model.config.backbone.max_positions
    for text in texts:
        answer = text.given if text.given is not None else [model.tokenizer.pad_id] * settings.new_tokens
        prefix, walked, _ = split(model, text, answer)
        if len(prefix) + len(walked) > most:
            raise InputError(f"{text.id}: {len(prefix) + len(walked)} positions exceed the model's {most}")
        longest = [max(longest[0], len(prefix)), max(longest[1], len(walked))]
    return padded(longest[0]), padded(longest[1])


def answers(model: Model, texts: Sequence[Text], settings: Settings) -> list[list[int]]:
    """What follows each prompt: as given, else greedy at the first depth."""
    wanting = [row for row, text in enumerate(texts) if text.given is None]
    found = [text.given for text in texts]
    if wanting:
        written = model.generate(
            [texts[row].prompt for row in wanting], depth=settings.depths[0], max_new_tokens=settings.new_tokens
        )
        for row, answer in zip(wanting, written, strict=True):
            found[row] = answer.tokens
    return found


def look(walker: Walker, texts: Sequence[Text], batch: Batch, numbers: range) -> Iterator[Problem]:
    """Everything that is kept of a batch, problem by problem; `numbers` are the problems' places in the collection."""
    settings = walker.settings
    if settings.between == "iterations":
        every = walker(batch, settings.depths[-1], every=True)
        walks = [every[depth - 1] for depth in settings.depths]
    else:
        walks = [each for depth in settings.depths for each in walker(batch, depth)]
    rounded = walker(batch, settings.depths[0], dtype="bfloat16")[0] if settings.rounding else None
    controlled: list[dict[str, Any]] = [{}] * len(texts)
    if numbers.start < settings.controls:
        controlled = controls.collect_batch(walker, batch, walks[0], walks[-1])
    for row, text in enumerate(texts):
        count = int(batch.count[row])
        parts = (np.stack(parts) for parts in zip(*(run_texts.row(row, count) for run_texts in walks), strict=True))
        yield Problem(
            text.id,
            batch.prefix[row, : batch.prefix_count[row]].tolist(),
            batch.walked[row, :count].tolist(),
            batch.predicted[row],
            *parts,
            None if rounded is None else rounded.row(row, count).states,
            controlled[row],
        )
