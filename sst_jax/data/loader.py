"""Packed sequences from examples, as a grain iterator that resumes exactly, and fixed batches for held-out evaluation.

A batch is a dict of arrays [B, T]: tokens int32; segment_ids int32 (0 is padding, documents count from 1); positions
int32 (restart at 0 with every document); answer_mask bool (aligned with tokens, see `prompts.Example`).
"""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Iterable, Sequence
from typing import Any

import grain
import grain.experimental
import numpy as np

from sst_jax.data.documents import Document
from sst_jax.data.prompts import Example, render
from sst_jax.data.tokenizer import Tokenizer
from sst_jax.errors import InputError

PACKING_BINS = 64  # sequences filled at the same time: more bins waste less padding and delay documents longer
Batch = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Layout:
    """How documents are laid into batches.

    length      positions of a row
    batch_size  rows of a batch
    pack        whether a row holds several documents
    pad_id      token of positions that hold none

    Raises: InputError for a length or a batch below one.
    """

    length: int
    batch_size: int
    pack: bool = True
    pad_id: int = 0

    def __post_init__(self) -> None:
        _check_positive(length=self.length, batch_size=self.batch_size)


def prepare(
    documents: Iterable[Document],
    tokenizer: Tokenizer,
    length: int,
    format: str = "plain",
    overlong: str = "error",
    learn: str = "assistant",
) -> list[Example]:
    """Tokenise every document once and check it against the sequence length, before training begins.

    Args:
        documents: what is learned from.
        tokenizer: of the model.
        length: positions of a row.
        format: "plain" or "chat".
        overlong: "error" raises; "drop" leaves examples of more than `length` tokens out and logs how many.
        learn: as `prompts.render` takes it.

    Raises: InputError naming an over-long example and the length needed, or when no example is left.
    """
    if overlong not in ("error", "drop"):
        raise InputError(f"data.overlong={overlong!r} is not one of 'error', 'drop'")
    examples = [render(document, tokenizer, format, learn) for document in documents]
    if not examples:
        raise InputError("the dataset is empty")
    kept = [example for example in examples if len(example.tokens) <= length]
    if len(kept) == len(examples):
        return examples
    longest = max(examples, key=lambda example: len(example.tokens))
    count = len(examples) - len(kept)
    what = (
        f"{count} of {len(examples)} examples exceed data.length={length}; "
        f"the longest, {longest.id}, needs {len(longest.tokens)}"
    )
    if overlong == "error":
        raise InputError(f"{what}: raise data.length, or set data.overlong=drop")
    if not kept:
        raise InputError(f"{what}: dropping them leaves none")
    logging.getLogger(__name__).warning("dropped: %s", what)
    return kept


def rows(
    examples: Sequence[Example],
    layout: Layout,
    *,
    seed: int = 0,
    epochs: int | None = None,
    shard_index: int = 0,
    shard_count: int = 1,
) -> grain.DatasetIterator[Batch]:
    """Return an iterator over batches of packed sequences (layout.pack), or of one document a sequence.

    Every epoch is reshuffled. A shard takes every shard_count-th document of each epoch's order, so shards are disjoint
    within an epoch and together hold all of it. `get_state`/`set_state` (and `grain.checkpoint`) resume exactly, given
    the same arguments.

    Args:
        examples: the documents.
        layout: of the batches.
        seed: alone decides the order.
        epochs: how often every document comes; the last batch is filled with padding. None: without end.
        shard_index: which shard.
        shard_count: of how many.

    Raises: InputError for no examples, an example longer than the layout's rows, or a bad count.
    """
    _check_positive(epochs=epochs, shard_count=shard_count)
    if not 0 <= shard_index < shard_count:
        raise InputError(f"data.shard_index={shard_index} must be in [0, shard_count={shard_count})")
    if len(examples) < shard_count:
        raise InputError(f"a dataset of {len(examples)} examples cannot feed {shard_count} shard(s)")
    _check_lengths(examples, layout.length)
    documents = grain.MapDataset.source(examples).seed(seed).shuffle()[shard_index::shard_count].repeat(epochs)
    return _batches(documents, layout, seed)


def mixed_rows(
    sources: Sequence[Sequence[Example]], weights: Sequence[float], layout: Layout, *, seed: int = 0
) -> grain.DatasetIterator[Batch]:
    """Return `rows` without end of several sources, drawn from by weight whatever their sizes.

    Args:
        sources: documents; each source is reshuffled whenever it has been gone through.
        weights: of the sources; their proportions count.
        layout: of the batches.
        seed: alone decides the order.

    Raises: InputError for a source without examples, or an example longer than the layout's rows.
    """
    for examples in sources:
        if not examples:
            raise InputError("a source of the mixture is empty")
        _check_lengths(examples, layout.length)
    each = [
        grain.MapDataset.source(examples).seed(seed + number).shuffle().repeat(None)
        for number, examples in enumerate(sources)
    ]
    return _batches(grain.MapDataset.mix(each, weights), layout, seed)


def _batches(documents: grain.MapDataset, layout: Layout, seed: int) -> grain.DatasetIterator[Batch]:
    """Return batches of rows that hold the documents in their order."""
    length, batch_size = layout.length, layout.batch_size
    # All examples are in memory: threads that read ahead would only add cost.
    options = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
    if layout.pack:
        dataset = grain.experimental.FirstFitPackIterDataset(
            documents.map(_document).to_iter_dataset(options),
            length_struct={"tokens": length, "answer_mask": length},
            num_packing_bins=max(PACKING_BINS, batch_size),
            seed=seed,
        ).map(_packed_row)
    else:
        dataset = documents.map(functools.partial(_row, length=length)).to_iter_dataset(options)
    fill = functools.partial(grain.experimental.batch_and_pad, batch_size=batch_size)
    return iter(dataset.batch(batch_size, batch_fn=fill).map(functools.partial(_set_padding, pad_id=layout.pad_id)))


def fixed_batches(examples: Sequence[Example], layout: Layout, *, even: int | None = None) -> list[dict[str, Any]]:
    """Return all examples once, in their order, as a list of batches; the last is filled with padding.

    Each batch has one more entry, "ids": for each row the example ids of its segments 1, 2, ... in order. Where the
    layout packs, a document goes into the first row with room for it.

    Args:
        examples: to lay out.
        layout: of the batches.
        even: make as many batches, but with fewer rows each where that saves padding: a multiple of this number; None:
            all have `layout.batch_size` rows.

    Raises: InputError for no examples or one longer than the layout's rows.
    """
    length, batch_size = layout.length, layout.batch_size
    if not examples:
        raise InputError("the dataset is empty")
    _check_lengths(examples, length)
    groups: list[list[Example]] = []
    room: list[int] = []
    for example in examples:
        size = len(example.tokens)
        place = next((row for row, free in enumerate(room) if free >= size), None) if layout.pack else None
        if place is None:
            place = len(room)
            groups.append([])
            room.append(length)
        groups[place].append(example)
        room[place] -= size
    if even is not None:
        count = -(-len(groups) // batch_size)
        batch_size = -(-len(groups) // (count * even)) * even
    groups += [[]] * (-len(groups) % batch_size)
    batches = []
    for start in range(0, len(groups), batch_size):
        members = groups[start : start + batch_size]
        batch = {
            key: np.stack(values) for key, values in _transpose([_lay_out(group, length) for group in members]).items()
        }
        batches.append(
            _set_padding(batch, layout.pad_id) | {"ids": [[example.id for example in group] for group in members]}
        )
    return batches


def _check_positive(**counts: int | None) -> None:
    for name, value in counts.items():
        if value is not None and value < 1:
            raise InputError(f"data.{name}={value} must be positive")


def _check_lengths(examples: Sequence[Example], length: int) -> None:
    for example in examples:
        if len(example.tokens) > length:
            raise InputError(f"example {example.id} needs data.length={len(example.tokens)}, more than {length}")


def _document(example: Example) -> Batch:
    return {"tokens": example.tokens, "answer_mask": example.answer_mask}


def _packed_row(row: Batch) -> Batch:
    return {
        "tokens": row["tokens"],
        "segment_ids": row["tokens_segment_ids"],
        "positions": row["tokens_positions"],
        "answer_mask": row["answer_mask"],
    }


def _lay_out(documents: Sequence[Example], length: int) -> Batch:
    """Return one sequence [T] that holds the documents one after another."""
    row = {key: np.zeros(length, np.int32) for key in ("tokens", "segment_ids", "positions")}
    row["answer_mask"] = np.zeros(length, bool)
    start = 0
    for segment, example in enumerate(documents, start=1):
        span = slice(start, start + len(example.tokens))
        row["tokens"][span], row["answer_mask"][span] = example.tokens, example.answer_mask
        row["segment_ids"][span], row["positions"][span] = segment, np.arange(len(example.tokens))
        start = span.stop
    return row


def _row(example: Example, length: int) -> Batch:
    return _lay_out([example], length)


def _transpose(rows: Sequence[Batch]) -> dict[str, list[np.ndarray]]:
    return {key: [row[key] for row in rows] for key in rows[0]}


def _set_padding(batch: Batch, pad_id: int) -> Batch:
    return batch | {"tokens": np.where(batch["segment_ids"] > 0, batch["tokens"], np.int32(pad_id))}
