"""Perplexity over windows of long texts, by position: one model under several settings of its stream, paired.

A window is a document's next `window` tokens, with BOS in front where the vocabulary has one; all its tokens but the
first are scored, each given the window before it, under the recurrence itself (`exact`). Settings are fixed, with what
is compared, before the first outcome is read: a protocol file holds them (`protocol.py`), its SHA-256 is in the result.

OUT/evaluation.json  windows, settings, model      OUT/outcomes.jsonl  a line a window and setting, nats by position
OUT/by_position.png  the differences, drawn
OUT/result.json      perplexities, differences from the baseline with intervals over documents, by position
"""

from __future__ import annotations

import functools
import hashlib
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sst_jax.console.command import write_json
from sst_jax.console.progress import bar
from sst_jax.data.records import READERS, Record, check_text, read_file
from sst_jax.errors import InputError
from sst_jax.inference.decode_state import decode_step_at_depth
from sst_jax.inference.kv_cache import Cache, init_cache
from sst_jax.inference.model import Model
from sst_jax.inference.prefill import capacity_for
from sst_jax.lab.evaluation import runner, text_summary
from sst_jax.lab.evaluation.protocol import Protocol, Setting
from sst_jax.lab.evaluation.scoring import CHUNK, token_scores
from sst_jax.model import decoder, links, rules
from sst_jax.model.config import ModelConfig
from sst_jax.model.layers import to_float32
from sst_jax.model.scales import LayerScales, scalars
from sst_jax.training.run import environment
from sst_jax.types import (
    BlockLosses,
    Hidden,
    Json,
    Params,
    PastStates,
    RandomKey,
    RowHidden,
    RowStates,
    ScalarInt,
    Tokens,
)

FIGURE = "by_position.png"
EARLIER = 16  # positions, of states="earlier"


class Window(NamedTuple):
    """A window of a document."""

    id: str
    document: int
    kind: str
    tokens: list[int]


# ------------------------------------------------------------------------------------------------------------- Windows


def read_documents(path: str | Path) -> list[Json]:
    """Return the documents of a file as {"text": ..., "kind": ...}.

    Each row of a .jsonl, .json, .csv or .parquet is one, by its fields "text" and "kind" (which it may lack); any other
    file is one document of plain text.

    Raises: InputError naming the file and the line.
    """
    file = Path(path).expanduser()
    if file.suffix.lower() in READERS:
        return [_document(record) for record in read_file(file)]
    check_text(file)
    try:
        return [{"text": file.read_text(encoding="utf-8-sig"), "kind": "text"}]
    except UnicodeDecodeError as error:
        raise InputError(f"{file}: not UTF-8 ({error})") from None


def _document(record: Record) -> Json:
    row = record.value
    if not isinstance(row, dict) or not isinstance(row.get("text"), str):
        raise InputError(f'{record.where}: a document is {{"text": "..."}}')
    return {"text": row["text"], "kind": str(row.get("kind", "text"))}


def cut(model: Model, documents: Sequence[Json], protocol: Protocol) -> list[Window]:
    """Return the windows of a protocol: every document's first, then every one's second, to the number asked for.

    Raises: InputError where no document fills a window.
    """
    bos = [] if model.tokenizer.bos_id is None else [model.tokenizer.bos_id]
    size, ids = protocol.window - len(bos), []
    for record in documents:
        tokens = model.tokenizer.encode(record["text"])
        ids.append(tokens[len(bos) :] if tokens[: len(bos)] == bos else tokens)
    found = []
    for number in range(max((len(tokens) // size for tokens in ids), default=0)):
        for document, tokens in enumerate(ids):
            part = tokens[number * size : (number + 1) * size]
            if len(part) == size:
                kind = documents[document]["kind"]
                found.append(Window(f"{document}:{number}", document, kind, [*bos, *part]))
    if not found:
        raise InputError(f"--data: no document fills a window of {protocol.window} tokens: choose a smaller --window")
    return found[: protocol.windows or None]


# ------------------------------------------------------------------------------------------------------------- Scoring


def with_setting(model: Model, setting: Setting) -> Model:
    """Return the model under a setting: its own stream, none, or a fresh one with the setting's fields."""
    if isinstance(setting.stream, str):
        return model
    return model.without_stream() if setting.stream is None else model.with_stream(**setting.stream)


def earlier_states(layers: int, rows: int, size: int, delay: int) -> links.StepIntervention:
    """Return the intervention by which the states of `delay` steps before enter, once there are so many."""

    def change(ring: PastStates, entering: RowStates, number: ScalarInt) -> tuple:
        old = ring[number % delay]
        return ring.at[number % delay].set(entering), jnp.where(number < delay, entering, old.astype(entering.dtype))

    return links.StepIntervention(jnp.zeros((delay, layers, rows, size)), change)


def random_states(key: RandomKey) -> links.StepIntervention:
    """Return the intervention by which random directions of the states' own lengths enter."""

    def change(memo: None, entering: RowStates, number: ScalarInt) -> tuple:
        noise = jax.random.normal(jax.random.fold_in(key, number), entering.shape)
        length = jnp.linalg.norm(to_float32(entering), axis=-1, keepdims=True)
        return memo, (noise * length / jnp.linalg.norm(noise, axis=-1, keepdims=True)).astype(entering.dtype)

    return links.StepIntervention(None, change)


def decoded(config: ModelConfig, params: Params, tokens: Tokens, depth: int, prompt: int) -> Hidden:
    """Return normed hidden states of a text whose first `prompt` positions are read as `iterate_prompt` has a prompt.

    That is at depth 1, or at the `depth` of the positions behind them.
    """
    rows, length = tokens.shape
    iterated = "none" if config.stream is None else config.stream.iterate_prompt
    start = {"all": 0, "last": prompt - 1, "none": prompt}[iterated]

    def one(cache: Cache, column: tuple) -> tuple[Cache, RowHidden]:
        token, place = column
        depths = jnp.full(rows, jnp.where(place >= start, depth, 1))
        hidden, cache = decode_step_at_depth(config, params, token, cache, depths)
        return cache, hidden

    cache = init_cache(config, rows, capacity_for(length))
    _, positions = jax.lax.scan(one, cache, (tokens.T, jnp.arange(length)))
    return jnp.moveaxis(positions, 0, 1)


@functools.partial(jax.jit, static_argnames=("config", "depth", "prompt", "states"))
def score_windows(
    config: ModelConfig, params: Params, tokens: Tokens, *, depth: int, prompt: int = 0, states: str = "own"
) -> tuple[BlockLosses, LayerScales | None]:
    """Return the nats of every token of whole windows but the first, flat, [B * (T-1)], and the scale of residual
    stream and states, by layer and iteration, where own states enter a text that is read as a whole.

    Args:
        config: of the model.
        params: the three trees.
        tokens: [B, T].
        depth: iterations of every position, or of those behind the prompt.
        prompt: positions that are read as a prompt.
        states: which states enter, as `Setting` says.
    """
    (rows, length), scales = tokens.shape, None
    if prompt:
        hidden = decoded(config, params, tokens, depth, prompt)
    elif states == "own":
        forward = "plain" if config.stream is None else "exact"
        hidden, scales = rules.hidden_and_scales(config, params, tokens, forward=forward, depth=depth)
    else:
        context = decoder.row_context(config, tokens, depth=depth)
        layers, size = config.backbone.num_layers, config.backbone.d_model
        wrong = random_states(jax.random.key(0))
        if states == "earlier":
            wrong = earlier_states(layers, rows, size, EARLIER * depth)
        hidden = links.scan_stack(params, tokens, context, intervene=wrong).hidden[:, :, 0]
    places = (jnp.arange(rows)[:, None] * length + jnp.arange(length - 1)).reshape(-1)
    padded = jnp.pad(places, (0, -len(places) % CHUNK))
    return -token_scores(config, params, hidden, tokens, padded)[0][: len(places)], scales


def measure(model: Model, setting: Setting, windows: Sequence[Window]) -> list[Json]:
    """Return the outcomes of a batch of windows under one setting."""
    started, under = time.monotonic(), with_setting(model, setting)
    tokens = np.array([window.tokens for window in windows], np.int32)
    nats, scales = score_windows(
        under.config, under.params, tokens, depth=setting.depth, prompt=setting.prompt, states=setting.states
    )
    losses = np.asarray(nats, np.float64).reshape(len(windows), -1)
    rms = {} if scales is None else {"rms": {name: round(value, 4) for name, value in scalars(scales).items()}}
    seconds = (time.monotonic() - started) / len(windows)
    return [
        {
            "id": window.id,
            "policy": setting.name,
            "document": window.document,
            "kind": window.kind,
            "loss": float(row.sum()),
            "answer_tokens": len(row),
            "nats": [round(value, 5) for value in row.tolist()],
            "seconds": seconds,
            **(rms if window is windows[0] else {}),  # of the batch
        }
        for window, row in zip(windows, losses, strict=True)
    ]


# ----------------------------------------------------------------------------------------------------------- The whole


def plan(protocol: Protocol, windows: Sequence[Window]) -> Iterator[tuple[str, list[Setting], list[Window]]]:
    """Yield (stage, settings, windows): "choose" on documents of even number and "test" on the others, or "all"."""
    halves = [[window for window in windows if window.document % 2 == odd] for odd in (0, 1)]
    if not protocol.choose:
        yield "all", list(protocol.settings.values()), list(windows)
        return
    if not all(halves):
        raise InputError("the protocol chooses on one half of the documents and tests on the other: there is only one")
    among = [protocol.baseline, *protocol.choose["among"]]
    yield "choose", [protocol.settings[name] for name in among], halves[0]
    yield "test", [], halves[1]  # whose settings depend on what was chosen


def run(model: Model, protocol: Protocol, out: Path) -> Json:
    """Measure a model under a protocol into a folder; resume what an earlier call left there.

    Returns: what OUT/result.json holds.

    Raises: InputError where the data, a setting or the folder does not fit.
    """
    windows = cut(model, read_documents(protocol.data), protocol)
    for setting in protocol.settings.values():
        setting.check(with_setting(model, setting).config)
    header = {
        "task": "text",
        "measure": "loss",
        "policies": list(protocol.settings),
        "items": len(windows),
        "items_sha256": hashlib.sha256(json.dumps([window.tokens for window in windows]).encode()).hexdigest(),
        "protocol": protocol.to_json(),
        "protocol_sha256": protocol.sha256,
        "model": {
            name: getattr(model.provenance, name) for name in ("kind", "path", "digest", "quantize", "run", "step")
        },
        "environment": environment(),
    }
    runner.check_folder(out, header)
    out.mkdir(parents=True, exist_ok=True)
    lock = runner.locked(out)
    write_json(out / runner.HEADER, header)
    stages: Json = {}
    try:
        outcomes = Outcomes(out)
        for stage, settings, some in plan(protocol, windows):
            chosen = None
            if stage == "test":
                chosen = text_summary.best(stages["choose"], protocol.baseline)
                settings = protocol.tested(chosen)
                for setting in settings:
                    setting.check(with_setting(model, setting).config)
            found = outcomes.collect(model, protocol, stage, settings, some)
            stages[stage] = text_summary.summarise(found, protocol.baseline)
            stages[stage].update({"chosen": chosen} if chosen else {})
    finally:
        lock.close()
    final = stages.get("test") or stages["all"]
    result = {**header, "policies": final["policies"], "stages": stages}
    text_summary.figure(result, out / FIGURE)
    write_json(out / runner.RESULT, result)
    return result


class Outcomes:
    """The lines of OUT/outcomes.jsonl: what is there is not measured again."""

    def __init__(self, folder: Path):
        """Read what an earlier call has left; a line that a kill cut off is dropped from the file."""
        self.file = folder / runner.OUTCOMES
        whole = runner.read_outcomes(folder, torn=True)
        runner.write_outcomes(folder, whole)
        self.there = {(line["stage"], line["policy"], line["id"]): line for line in whole}

    def collect(
        self, model: Model, protocol: Protocol, stage: str, settings: Sequence[Setting], windows: Sequence[Window]
    ) -> dict[str, list[Json]]:
        """Return the outcomes of settings over windows, by setting, in the order of the windows."""
        with bar(len(settings) * len(windows), f"text, {stage}", "window") as meter:
            for setting in settings:
                for start in range(0, len(windows), protocol.batch_size):
                    batch = windows[start : start + protocol.batch_size]
                    if not all((stage, setting.name, window.id) in self.there for window in batch):
                        lines = [{"stage": stage, **line} for line in measure(model, setting, batch)]
                        fresh = {(stage, line["policy"], line["id"]): line for line in lines}
                        fresh = {key: line for key, line in fresh.items() if key not in self.there}
                        with self.file.open("a", encoding="utf-8") as file:
                            file.writelines(json.dumps(line) + "\n" for line in fresh.values())
                        self.there.update(fresh)
                    meter.update(len(batch))
        return {
            setting.name: [self.there[stage, setting.name, window.id] for window in windows] for setting in settings
        }
