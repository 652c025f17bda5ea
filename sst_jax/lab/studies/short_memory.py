"""Language models from scratch whose attention reaches a few positions back: what a stream gives back of the rest.

A protocol file says everything before the first outcome: data, model, arms, seeds, and what is compared. Texts are
GSM8K's, a document a row, in a BPE made of the training texts. Every weight trains; all arms of a seed see the same
documents in the same order, and differ in what `Arm` says alone. `memory_tables.py` makes tables of the outcomes.

RUN/ARM-SEED/params.safetensors   the weights      RUN/ARM-SEED/training.json   what was trained, and its cost
RUN/ARM-SEED/losses.npz           nats of every token of every held-out document, [documents, T - 1], by `MEASURED`,
                                  and "donor", the document whose states each one is given, [documents]
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from sst_jax.console.command import write_json
from sst_jax.data.records import read_file
from sst_jax.errors import InputError
from sst_jax.files import read_json
from sst_jax.lab.planning.count import count
from sst_jax.lab.studies.scratch import load_params, save_params
from sst_jax.model import decoder, rules, walk
from sst_jax.model.config import BackboneConfig, ModelConfig, StreamConfig, from_mapping
from sst_jax.model.decoder import Context, Layer, Params, Residuals
from sst_jax.model.halves import attend, residual_after_attention
from sst_jax.model.loops import chunked_scan
from sst_jax.model.passes import recurrent_step
from sst_jax.model.state import Masks, shift_right
from sst_jax.types import Fraction, Hidden, Json, Losses

END = 0  # the token behind a document, which is learned too, and padding behind that
MEASURED = ("own", "off", "zeroed", "shuffled")  # and "zeroed at P", "shuffled at P": at one position alone
STREAM, PLAIN = "stream", "plain"  # the arms that a protocol has in any case; of the first alone all of these


@dataclasses.dataclass(frozen=True)
class Arm:
    """What sets an arm apart.

    stream            fields of its `StreamConfig`; None: no stream
    forward           that trains
    attention_window  as in `BackboneConfig`; None: attention sees everything before
    steps             of the protocol's, as a multiple
    d_ff              what the feed-forward is wider by
    """

    stream: Json | None = None
    forward: str = "exact"
    attention_window: int | tuple[int, ...] | None = None
    steps: float = 1.0
    d_ff: int = 0


@dataclasses.dataclass(frozen=True)
class Protocol:
    """A study, as its file says it.

    about       what was known when it was written
    vocabulary  entries of the BPE
    length      tokens of a row: a document is cut there
    heldout     documents of the test split, its first ones
    model       layers, d_model, d_ff, heads
    train       steps, batch_size, learning_rate, warmup_steps
    seeds       of weights and order
    arms        by name
    against     arms that `stream` is compared with: each is to be beaten
    full        the arm whose attention sees everything: what the window took is plain - full
    cuts        positions at which alone the state is taken away, in documents that go on for `after` more
    after       tokens behind a cut that are looked at
    sha256      of the file
    """

    about: str
    vocabulary: int
    length: int
    heldout: int
    model: dict[str, int]
    train: dict[str, float]
    seeds: tuple[int, ...]
    arms: dict[str, Arm]
    against: tuple[str, ...]
    full: str
    cuts: tuple[int, ...] = (32, 48, 64)
    after: int = 96
    sha256: str = ""


def read_protocol(path: Path) -> Protocol:
    """Return the protocol in a file. Raises: InputError naming the file and the key."""
    found, digest = read_json(path), hashlib.sha256(path.read_bytes()).hexdigest()
    try:
        arms = {name: from_mapping(Arm, fields) for name, fields in found.pop("arms", {}).items()}
        protocol = from_mapping(Protocol, {**found, "arms": {}, "sha256": digest})
        protocol = dataclasses.replace(protocol, arms=arms)
        for name in (*protocol.against, protocol.full, STREAM, PLAIN):
            if name not in arms:
                raise InputError(f"{name!r} is none of the arms {', '.join(arms)}")
        for name in arms:
            model_config(protocol, name)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    return protocol


def model_config(protocol: Protocol, name: str) -> ModelConfig:
    """Return an arm's model: a small Gemma 3 whose layers are all global, but for the window that is asked for."""
    arm, own = protocol.arms[name], protocol.model
    windows = arm.attention_window
    backbone = BackboneConfig(
        num_layers=own["layers"],
        d_model=own["d_model"],
        d_ff=own["d_ff"] + arm.d_ff,
        num_heads=own["heads"],
        num_kv_heads=own["heads"],
        head_dim=own["d_model"] // own["heads"],
        vocab_size=protocol.vocabulary,
        query_pre_attn_scalar=own["d_model"] / own["heads"],
        rope_theta_global=10_000.0,
        attention_window=(windows,) if isinstance(windows, int) else windows,
    )
    return ModelConfig(backbone, None if arm.stream is None else from_mapping(StreamConfig, arm.stream))


# -------------------------------------------------------------------------------------------------------------- Texts


class Rows(NamedTuple):
    """Documents, a row each, int32 [documents, T]; `real` bool: whether a token is the document's, its end included."""

    tokens: np.ndarray
    real: np.ndarray


class Texts(NamedTuple):
    """What is trained on, and what is held out."""

    train: Rows
    heldout: Rows


def read_problems(folder: Path, split: str) -> list[Json]:
    """Return the rows of one of GSM8K's files. Raises: InputError where the folder lacks it."""
    file = folder / f"{split}.jsonl"
    if not file.is_file():
        raise InputError(f"--data {folder} lacks {split}.jsonl of GSM8K")
    return [record.value for record in read_file(file)]


def read_texts(protocol: Protocol, folder: Path) -> Texts:
    """Return GSM8K's problems with their solutions as rows. Raises: InputError where the folder lacks a file."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    texts = {
        split: [f"{problem['question']}\n{problem['answer']}" for problem in read_problems(folder, split)]
        for split in ("train", "test")
    }
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=protocol.vocabulary, special_tokens=["<end>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts["train"], trainer)

    def rows(texts: Sequence[str]) -> Rows:
        tokens = np.full((len(texts), protocol.length), END, np.int32)
        real = np.zeros(tokens.shape, bool)
        for row, found in enumerate(tokenizer.encode_batch(list(texts))):
            ids = [*found.ids, END][: protocol.length]
            tokens[row, : len(ids)], real[row, : len(ids)] = ids, True
        return Rows(tokens, real)

    return Texts(rows(texts["train"]), rows(texts["test"][: protocol.heldout]))


def distance_to_last(rows: Rows) -> np.ndarray:
    """Return how many positions before the one that predicts a token it last stood, int32 [documents, T - 1]; 0: never.

    What is predicted from position t is token t + 1; a distance of d says that token t - d was the same one.
    """
    tokens, found = rows.tokens, np.zeros((len(rows.tokens), rows.tokens.shape[1] - 1), np.int32)
    for row, ids in enumerate(tokens):
        last: dict[int, int] = {}
        for place, token in enumerate(ids.tolist()):
            if place and token in last:
                found[row, place - 1] = place - last[token]
            last[token] = place
    return found


# ----------------------------------------------------------------------------------------------------------- Training


def losses_of(logits: jax.Array, tokens: jax.Array) -> Losses:
    """Return nats of every token but a row's first, [B, T - 1]."""
    return optax.losses.softmax_cross_entropy_with_integer_labels(logits[:, :-1], tokens[:, 1:])


@functools.cache
def optimizer_of(peak: float, warmup: int, steps: int) -> optax.GradientTransformation:
    """Return Adam, its rate rising over warmup_steps and falling along a cosine."""
    rate = optax.warmup_cosine_decay_schedule(0.0, peak, warmup, steps, peak / 30)
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rate))


def train_step(
    config: ModelConfig, forward: str, optimizer: optax.GradientTransformation, state: tuple, rows: Rows
) -> tuple[tuple, Fraction]:
    """Return parameters and optimizer state after a step on the mean loss over all tokens but the first, and that."""
    params, memo = state

    def mean_loss(params: Params) -> Fraction:
        tokens = jnp.asarray(rows.tokens)
        segments = jnp.asarray(rows.real, jnp.int32)
        name = forward if config.stream is not None else "plain"
        nats = losses_of(rules.logits(config, params, tokens, forward=name, segment_ids=segments), tokens)
        return (nats * rows.real[:, 1:]).sum() / rows.real[:, 1:].sum()

    loss, gradient = jax.value_and_grad(mean_loss)(params)
    updates, memo = optimizer.update(gradient, memo, params)
    return (optax.apply_updates(params, updates), memo), loss


def train(protocol: Protocol, name: str, seed: int, texts: Texts, target: Path) -> None:
    """Train one arm with one seed; training.json comes last and says that it is done."""
    arm, config = protocol.arms[name], model_config(protocol, name)
    steps, rows = round(protocol.train["steps"] * arm.steps), int(protocol.train["batch_size"])
    optimizer = optimizer_of(protocol.train["learning_rate"], int(protocol.train["warmup_steps"]), steps)
    params = jax.jit(lambda key: decoder.init_params(config, key))(jax.random.key(seed))
    state = params, optimizer.init(params)
    began, worked, losses = time.monotonic(), time.process_time(), []
    function, step = compiled(config, arm.forward, optimizer)
    work = None
    for number in range(steps):
        drawn = np.random.default_rng((seed, number)).integers(0, len(texts.train.tokens), rows)
        batch = Rows(texts.train.tokens[drawn], texts.train.real[drawn])
        if work is None:
            work = count(jax.make_jaxpr(function)(state, batch)).flops
        state, loss = step(state, batch)
        losses.append(float(loss))
        if number % 50 == 49:
            print(f"{name}-{seed} {number + 1}/{steps}: {np.mean(losses[-50:]):.4f}", flush=True)
    target.mkdir(parents=True, exist_ok=True)
    save_params(target, state[0])
    facts = {
        "arm": name, "seed": seed, "steps": steps, "protocol": protocol.sha256, "step_flops": work,
        "windows": config.backbone.windows, "reach": config.backbone.reach,
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(state[0])), "losses": losses,
        "alpha": _alphas(config, state[0]),
        "seconds": time.monotonic() - began, "core_seconds": time.process_time() - worked,
    }  # fmt: skip
    write_json(target / "training.json", facts)


@functools.cache
def compiled(
    config: ModelConfig, forward: str, optimizer: optax.GradientTransformation
) -> tuple[Callable[..., tuple], Callable[..., tuple]]:
    """Return the train step of an arm, as it is and compiled once for all seeds."""
    function = functools.partial(train_step, config, forward, optimizer)
    return function, jax.jit(function, donate_argnums=(0,))


def _alphas(config: ModelConfig, params: Params) -> list[float]:
    """Return the mean alpha of each layer."""
    from sst_jax.model.state import learned_alpha

    if config.stream is None or "theta" not in params["blend"]:
        return []
    return learned_alpha(config.stream, params["blend"]["theta"], None).mean(-1).tolist()


# ---------------------------------------------------------------------------------------------------------- Measuring


def measure(protocol: Protocol, name: str, texts: Texts, target: Path, rows: int = 50) -> None:
    """Measure a trained arm into losses.npz."""
    config = model_config(protocol, name)
    params = load_params(target, config)
    found: dict[str, list[np.ndarray]] = {}
    heldout = texts.heldout
    for first in range(0, len(heldout.tokens), rows):
        # Rows are paired with their neighbours for states of another document, so the last batch is filled up.
        index = np.arange(first, first + rows) % len(heldout.tokens)
        batch = Rows(heldout.tokens[index], heldout.real[index])
        kept = min(rows, len(heldout.tokens) - first)
        changed = name == STREAM
        for key, nats in measured(config, params, batch, protocol.cuts if changed else None).items():
            found.setdefault(key, []).append(np.asarray(nats[:kept]))
        found.setdefault("donor", []).append(np.roll(index, 1)[:kept])
    partial = target / "losses.partial.npz"
    arrays: Any = {key: np.concatenate(parts) for key, parts in found.items()}
    np.savez_compressed(partial, **arrays)
    partial.replace(target / "losses.npz")


def measured(config: ModelConfig, params: Params, batch: Rows, cuts: Sequence[int] | None) -> dict[str, jax.Array]:
    """Return nats of every token [B, T - 1] under what the model is, and with its states taken away or exchanged.

    Args:
      config: of the model.
      params: the three trees.
      batch: rows; a row's states are exchanged for those of the row before.
      cuts: positions at which alone states are exchanged; None: none are taken away or exchanged anywhere.
    """
    tokens, segments = jnp.asarray(batch.tokens), jnp.asarray(batch.real, jnp.int32)
    if config.stream is None or cuts is None:
        forward = "plain" if config.stream is None else "exact"
        return {"own": losses_of(_logits(config, forward, params, tokens, segments), tokens)}
    off = dataclasses.replace(config, stream=None)
    none = dataclasses.replace(config, stream=dataclasses.replace(config.stream, gain=0.0))
    found = {
        "own": _logits(config, "exact", params, tokens, segments),
        "off": _logits(off, "plain", {**params, "blend": {}}, tokens, segments),
        "zeroed": _logits(none, "exact", params, tokens, segments),
    }
    everywhere = jnp.ones(tokens.shape, bool)
    found["shuffled"] = exchanged(config, params, tokens, segments, everywhere, zero=False)
    for cut in cuts:
        here = jnp.zeros(tokens.shape, bool).at[:, cut].set(True)
        for key, zero in (("zeroed", True), ("shuffled", False)):
            found[f"{key} at {cut}"] = exchanged(config, params, tokens, segments, here, zero=zero)
    return {key: losses_of(logits, tokens) for key, logits in found.items()}


@functools.partial(jax.jit, static_argnums=(0, 1))
def _logits(config: ModelConfig, forward: str, params: Params, tokens: jax.Array, segments: jax.Array) -> jax.Array:
    return rules.logits(config, params, tokens, forward=forward, segment_ids=segments)


@functools.partial(jax.jit, static_argnames=("config", "zero"))
def exchanged(
    config: ModelConfig, params: Params, tokens: jax.Array, segments: jax.Array, where: jax.Array, *, zero: bool
) -> jax.Array:
    """Return logits [B, T, V] where the states entering some positions are zero, or those of the row before.

    The recurrence runs on from what was put in, so that an exchange at one position shows in all later ones. Where the
    other row has ended by then, its states are those of padding: rows are to be looked at where both go on.

    Args:
      config: of a model with a stream.
      params: the three trees.
      tokens: [B, T].
      segments: 1 on what is the document's, else 0.
      where: the positions, bool [B, T].
      zero: whether the states are zero.
    """
    masks_where = where[..., None]

    def rule(layer: Layer, residuals: Residuals, extra: None, context: Context) -> tuple[Residuals, None]:
        clean, edited = residuals
        h, _ = attend(layer, clean, context)
        o_clean, states = walk.scan_positions(layer, clean, residual_after_attention(layer, h), context)
        entering = shift_right(context.stream, clean, states, layer.stream.masks)
        other = jnp.zeros_like(entering) if zero else jnp.roll(entering, 1, axis=0)
        h, _ = attend(layer, edited, context)
        return (
            o_clean,
            scan_with(layer, edited, residual_after_attention(layer, h), other, masks_where, context),
        ), None

    context = decoder.row_context(config, tokens, segments)
    context = dataclasses.replace(context, options=rules.Intervened())
    hidden, _ = decoder.run(params, rule, tokens, context)
    return decoder.head(config, params, hidden[:, :, 0])


def scan_with(layer: Layer, x: Hidden, h: Hidden, other: Hidden, where: jax.Array, context: Context) -> Hidden:
    """Return o of the feed-forward, position after position, entered by `other` where `where` [B, T, 1] says."""

    def step(m: jax.Array, inputs: tuple) -> tuple[jax.Array, jax.Array]:
        h, other, where, *mine = jax.tree.map(lambda part: part[:, None], inputs)
        masks = Masks(*mine)
        s = jnp.where(where, other, jnp.where(masks.has_state, m[:, None], 0.0))
        o, m = recurrent_step(layer, h, s, masks, context, x.dtype)
        return m[:, 0], o[:, 0]

    inputs = (h, other, where, *layer.stream.masks)
    return chunked_scan(step, jnp.zeros_like(other[:, 0]), inputs, chunk=walk.CHUNK)
