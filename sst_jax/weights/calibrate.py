"""Calibrated quantisation: numbers that fit what texts feed the linears (GPTQ, arXiv 2210.17323), layer by layer.

The texts run through the unquantised backbone, layer by layer as it is read. On the way each linear's inputs x leave
their Gram matrix, the sum of x^T x; the layer's linears are quantised for it, written, and forgotten.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np

from sst_jax.data.formats import ROW_FORMATS, read_row, recognise
from sst_jax.data.prompts import whole_text
from sst_jax.data.records import read_file
from sst_jax.data.tokenizer import Tokenizer
from sst_jax.errors import InputError
from sst_jax.files import sha256
from sst_jax.model import decoder, halves, kinds
from sst_jax.model.backbone import stack_name
from sst_jax.model.config import ModelConfig
from sst_jax.model.layers import ACTIVATIONS, Block, embed, to_float32
from sst_jax.model.quantization import gptq, storages
from sst_jax.types import AnyFloat, Gram, Hidden, Json, LinearInputs, Params, SegmentIds, Tokens
from sst_jax.weights import key_map
from sst_jax.weights.source import ConvertedTensor, Source, converted_tensors, lazy_base

ROW = 256  # tokens of a row
ROWS = 8  # rows that run at once
JSON_FILES = (".jsonl", ".ndjson", ".json")
OBSERVED = {"q": "q", "k": "q", "v": "q", "o": "o", "gate": "gate", "up": "gate", "down": "down"}  # who shares inputs


class Texts(NamedTuple):
    """Rows of texts back to back, without padding."""

    tokens: np.ndarray  # int32 [rows, 256]
    segment_ids: np.ndarray  # int32 [rows, 256], a number a text
    facts: Json  # what a base folder says of them


def read_texts(path: str | Path, tokenizer: Tokenizer, tokens: int) -> Texts:
    """Return about so many tokens of a file: a text file is one text; of JSON lines each is one, of any row format.

    Raises: InputError naming the file, and the line that is of no row format; when it does not fill a row of 256
    tokens.
    """
    file = Path(path)
    if tokens < ROW:
        raise InputError(f"--calibrate-tokens {tokens} must be at least {ROW}")
    rows, segments, total = [], [], 0
    for number, text in enumerate(_texts(file), start=1):
        rows.append(np.asarray(tokenizer.encode(text), np.int32))
        segments.append(np.full(len(rows[-1]), number, np.int32))
        total += len(rows[-1])
        if total >= tokens:
            break
    found = min(total, tokens) // ROW * ROW
    if not found:
        raise InputError(f"--calibrate {file} holds {total} tokens; a row of {ROW} is the least")
    laid, numbers = (np.concatenate(part)[:found].reshape(-1, ROW) for part in (rows, segments))
    return Texts(laid, numbers, {"file": file.name, "sha256": sha256(file), "tokens": found})


def _texts(file: Path) -> Iterator[str]:
    if file.suffix.lower() not in JSON_FILES:
        try:
            yield file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"--calibrate {file} cannot be read: {error}") from None
        return
    for record in read_file(file):
        yield whole_text(read_row(ROW_FORMATS[recognise(record)], record, file.name).problem)


class _KeepingInputs:
    """A block that keeps what its linear `o` is fed, which `attend` does not return."""

    def __init__(self, block: Block):
        self._block = block
        self.fed: LinearInputs | None = None

    def __getattr__(self, name: str) -> object:
        return getattr(self._block, name)

    def o(self, x: LinearInputs, drop: AnyFloat | None = None) -> AnyFloat:
        self.fed = x
        return self._block.o(x, drop)


def observe(
    layer: decoder.Layer, residuals: decoder.Residuals, extra: None, context: decoder.Context
) -> tuple[decoder.Residuals, dict[str, Gram]]:
    """Apply `plain`; the per-layer output of this rule are the Gram matrices [K, K] of OBSERVED's inputs."""
    (x,), block = residuals, layer.block
    keeping = _KeepingInputs(block)
    h, _ = halves.attend(layer._replace(block=cast(Block, keeping)), x, context)
    assert keeping.fed is not None  # `attend` ends with the linear o
    y = block.pre_ffn_norm(halves.residual_after_attention(layer, h)).astype(x.dtype)
    activation = ACTIVATIONS[context.config.backbone.activation]
    fed = {
        "q": block.pre_attn_norm(x).astype(x.dtype),
        "o": keeping.fed,
        "gate": y,
        "down": activation(block.gate(y)) * block.up(y),
    }
    o, _ = halves.feed(layer, h, context, x.dtype)  # whose products XLA shares with those above
    return (o,), {name: jnp.einsum("...i,...j->ij", to_float32(part), to_float32(part)) for name, part in fed.items()}


@functools.partial(jax.jit, static_argnums=0)
def through(
    config: ModelConfig, layer: Params, x: Hidden, tokens: Tokens, segment_ids: SegmentIds
) -> tuple[Hidden, dict[str, Gram]]:
    """Return x [B, T, D] behind a layer (kernels and norms, unstacked), and the Gram matrices [K, K] of OBSERVED."""
    context = decoder.row_context(config, tokens, segment_ids)
    params = {"base": {"layers": jax.tree.map(lambda part: part[None], layer)}, "adapter": {}, "blend": {}}
    residuals: decoder.Residuals = (x,)
    residuals, grams = decoder.run_layers(params, observe, residuals, context)
    return residuals[0], {name: gram[0] for name, gram in grams.items()}


def calibrated(
    source: Source, dtype: str, quantize: str, texts: Texts, done: Callable[[str, int | None], bool]
) -> Iterator[ConvertedTensor | None]:
    """Yield `converted_tensors` with every linear quantised for the inputs that the texts give it, layer by layer.

    Computes in float32. Memory: the texts' states [rows, 256, D], a layer, and a few times its largest Gram matrix.

    Raises: InputError as `source.converted_tensors` and `gptq.compensation`.
    """
    backbone, storage = source.backbone, storages.get(quantize)
    bound = key_map.bind(source.tensors(), backbone, source.kind, source.path)

    def is_linear(slot: str, layer: int | None) -> bool:
        return layer is not None and slot.endswith("/kernel")

    def elsewhere(slot: str, layer: int | None) -> bool:
        return is_linear(slot, layer) or done(slot, layer)

    rest = converted_tensors(source, dtype, "none", elsewhere)
    for piece, (_, entry) in zip(rest, bound.tensors, strict=True):
        if not is_linear(entry.row.path, entry.layer):
            yield piece

    base = lazy_base(source)
    used, tokens = np.unique(texts.tokens, return_inverse=True)
    table, layers = jnp.asarray(base["embed"]["embedding"][used]), base["layers"]
    del base  # the tables, of which a few rows are used
    rows, cuts = tokens.reshape(-1, ROW), range(ROWS, len(texts.tokens), ROWS)
    states = [embed(backbone, table, jnp.asarray(part), jnp.float32) for part in np.split(rows, cuts)]
    batches = [np.split(part, cuts) for part in (texts.tokens, texts.segment_ids)]
    for number, kind in enumerate(backbone.layer_types):
        nope = (0,) if number in backbone.nope_layers else ()
        one = backbone.of_kind(kind) if backbone.has_stacks_by_kind else backbone
        config = ModelConfig(dataclasses.replace(one, num_layers=1, layer_types=(kind,), nope_layers=nope))
        place, own = number, layers
        if backbone.has_stacks_by_kind:
            place, own = backbone.layer_types[:number].count(kind), kinds.of_kind(layers, kind)
        layer = {
            name: {part: jnp.asarray(stack[place], jnp.float32) for part, stack in leaf.items()}
            for name, leaf in own.items()
        }
        grams: dict[str, jax.Array] = {}
        for at, (x, rows, segment_ids) in enumerate(zip(states, *batches, strict=True)):
            states[at], found = through(config, layer, x, rows, segment_ids)
            grams = {name: gram + grams.get(name, 0.0) for name, gram in found.items()}
        factors: dict[str, jax.Array] = {}
        for name, observed in OBSERVED.items():
            stack = stack_name(kind, name) if backbone.has_stacks_by_kind else name
            slot = f"layers/{stack}/kernel"
            if name not in layer:  # values that are made of keys
                continue
            if done(slot, place):
                yield None
                continue
            if observed not in factors:
                factors = {observed: gptq.compensation(grams.pop(observed))}  # one at a time, they are large
            leaf = storage.quantise_for(layer[name]["kernel"], factors[observed])
            yield ConvertedTensor(
                slot, place, {f"layers/{stack}/{part}": np.asarray(value) for part, value in leaf.items()}
            )
