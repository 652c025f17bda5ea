"""The split of a run's data into documents that it trains on and those held out."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path

from sst_jax.data import datasets, loader, own
from sst_jax.data.documents import Document
from sst_jax.data.own import Found, Rows
from sst_jax.data.prompts import Example
from sst_jax.data.tokenizer import Tokenizer
from sst_jax.errors import InputError
from sst_jax.training.sections import DataConfig

HELDOUT = "data.heldout_path"


@dataclasses.dataclass(frozen=True)
class Split:
    """What a run learns from, and what it is evaluated on.

    training  a sequence for each source that is drawn from by a weight of its own; one where there are no weights
    heldout   never trained on
    name      of the data set, or of the row format
    seen      what was found at each path, in words
    """

    training: tuple[Sequence[Document], ...]
    heldout: Sequence[Document]
    name: str
    seen: tuple[str, ...] = ()


def split_problems(data: DataConfig, seed: int) -> Split:
    """Return (training, held-out) documents, drawn apart by `seed`.

    Those of GSM8K are both from the training split, so that the test split stays unseen until `evaluate`; the embedded
    problems' held-out ones come from other templates and numbers, and those of stories from their validation split. Of
    rows of one's own a part of every source is held out, or the rows of a file of their own.

    Raises: InputError when the data are missing, empty, of no known form, or too few to hold any out.
    """
    dataset = datasets.find(data.dataset)
    if dataset is not None and not (data.is_auto and not _is_gsm8k(data)):
        training, heldout = dataset.source.training(data.path, data.heldout, data.limit, seed)
        return Split((training,), heldout, data.dataset)
    return _own(data, seed)


def prepare_split(split: Split, data: DataConfig, tokenizer: Tokenizer) -> tuple[list[list[Example]], list[Example]]:
    """Return the examples of every source, and the held-out ones.

    Raises: InputError naming a document that does not fit, or cannot be put into words.
    """
    prepare = functools.partial(
        loader.prepare,
        tokenizer=tokenizer,
        length=data.length,
        format=data.format,
        overlong=data.overlong,
        learn=data.learn,
    )
    return [prepare(documents) for documents in split.training], prepare(split.heldout)


def _is_gsm8k(data: DataConfig) -> bool:
    """Whether `auto` means GSM8K: its id on the hub, or a folder with its training file; without a path, no rows."""
    if not data.path or data.path == datasets.GSM8K_HUB:
        return True
    folder = Path(data.path).expanduser()
    plain = not (data.columns or data.weights or data.heldout_path or data.heldout_share)
    if not (plain and (folder / datasets.GSM8K_TRAIN).is_file()):
        return False
    return Rows(data.path).read().format == own.GSM8K


def _own(data: DataConfig, seed: int) -> Split:
    if ":" in data.name:
        raise InputError(f"data.name={data.name!r}: only GSM8K's answers have a result to be told from their steps")
    columns, paths = own.parse_columns(data.columns), own.parse_paths(data.path)
    format = own.AUTO if data.is_auto else data.name
    if data.weights and len(data.weights) != len(paths):
        raise InputError(f"data.weights={data.weights} must be as many as data.path has paths, {len(paths)}")

    def read(path: str, setting: str = "data.path") -> Found:
        return Rows(path, format, data.config, data.split, columns, setting).read()

    found = [read(path) for path in paths]
    training: list[Sequence[Document]] = [source.documents for source in found]
    heldout: list[Document] = []
    if data.heldout_path:
        apart = read(data.heldout_path, HELDOUT)
        heldout, found = list(apart.documents), [*found, apart]
    else:
        each = -(-data.heldout // len(paths))
        pairs = [own.hold_out(source.documents, each, data.heldout_share, seed) for source in found]
        training, heldout = [pair[0] for pair in pairs], [document for pair in pairs for document in pair[1]]
    if data.limit:
        training = [documents[: -(-data.limit // len(paths))] for documents in training]
    if not data.weights:
        training = [[document for documents in training for document in documents]]
    names = list(dict.fromkeys(source.format for source in found))
    return Split(tuple(training), heldout, " and ".join(names), tuple(map(str, found)))
