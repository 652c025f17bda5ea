"""Where each tensor of a checkpoint belongs in the base tree, read in both directions, by the families' own tables.

The base tree is nested dicts with layers stacked on axis 0; linear kernels are [in, out], the transpose of PyTorch's.
Converting only renames, transposes and stacks, so a round trip is bit for bit. GGUF is read-only: it stores Gemma's
norm weights as 1 + w and Llama's rotated pairs side by side, which the transforms take back.

Hugging Face checkpoints of one family may come with several spellings of the same keys, its layouts ("text" is all
families'; `families.registry.LAYOUTS`).
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Generic, NamedTuple, Protocol, TypeVar, runtime_checkable

import jax
import numpy as np

from sst_jax.errors import InputError
from sst_jax.families.base import ParamSpec
from sst_jax.families.registry import IGNORED, LAYOUTS, family_of
from sst_jax.model.backbone import GLOBAL, BackboneConfig, stack_name
from sst_jax.types import HostArray, LayerStack, Params


def _halves(kernel: HostArray, head_dim: int) -> HostArray:
    """Return rows of each head [N * H, D] in the order of GGUF's Llama, pairs side by side, as first halves then
    second.
    """
    pairs = kernel.reshape(-1, head_dim // 2, 2, *kernel.shape[1:])
    return pairs.swapaxes(1, 2).reshape(kernel.shape)


# From disk into the tree, (array, head_dim). Hugging Face's are all their own inverse, so writing uses the same ones.
TRANSFORMS: dict[str, dict[str, Callable[[HostArray, int], HostArray]]] = {
    "huggingface": {
        "copy": lambda x, _: x,
        "norm": lambda x, _: x,
        "transpose": lambda x, _: x.T,
        "rotary": lambda x, _: x.T,
    },
    "gguf": {
        "copy": lambda x, _: x,
        "norm": lambda x, _: x - np.float32(1),
        "transpose": lambda x, _: x.T,
        "rotary": lambda x, head_dim: _halves(x, head_dim).T,
    },
}

LAYERS = "layers/"  # what paths of arrays that are stacked begin with
HEADS = {"huggingface": ("lm_head.weight", "language_model.lm_head.weight"), "gguf": ("output.weight",)}


class CheckpointKey(NamedTuple):
    """One tensor on disk: its key (layout "text" for Hugging Face), its shape there, and its place in the tree."""

    key: str
    shape: tuple[int, ...]
    row: ParamSpec
    layer: int | None  # its place in the stack, which is the layer's number where all layers are one stack


@runtime_checkable
class TensorHeader(Protocol):
    """What is asked of a tensor to give it its place; `source.Tensor` is one."""

    @property
    def name(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def file(self) -> Path: ...


Header = TypeVar("Header", bound=TensorHeader)


@dataclasses.dataclass(frozen=True)
class Binding(Generic[Header]):
    """The tensors of a source, each with its place; `head` is a tied output head, to be compared and dropped."""

    tensors: list[tuple[Header, CheckpointKey]]
    head: Header | None


def table(config: BackboneConfig) -> tuple[ParamSpec, ...]:
    """Return the arrays of a config's base tree: its family's, without the output head where it is tied.

    Where kinds of layers have shapes of their own, those of layers are there once for each kind.
    """
    rows = tuple(row for row in family_of(config).params if not (config.tied_head and row.path == "head/embedding"))
    if not config.has_stacks_by_kind:
        return rows
    found = [row for row in rows if not row.path.startswith(LAYERS)]
    for kind in dict.fromkeys(config.layer_types):
        linears = config.of_kind(kind).linear_shapes
        for row in rows:
            name = row.path.removeprefix(LAYERS)
            if row.path.startswith(LAYERS) and (name.partition("/")[0] in linears or not name.endswith("/kernel")):
                found.append(row._replace(path=LAYERS + stack_name(kind, name)))
    return tuple(found)


def own_shape(row: ParamSpec, config: BackboneConfig) -> BackboneConfig:
    """Return the backbone whose sizes an array's are: the config's, or that of its kind of layers."""
    if not config.has_stacks_by_kind or not row.path.startswith(LAYERS):
        return config
    return config.of_kind("global" if row.path.startswith(LAYERS + GLOBAL) else "local")


def stack_of(row: ParamSpec, config: BackboneConfig) -> tuple[int, ...]:
    """Return the numbers of the layers whose arrays are in a row's stack."""
    return config.stack_layers(row.path.removeprefix(LAYERS))


def param_shape(row: ParamSpec, config: BackboneConfig) -> tuple[int, ...]:
    """Return the shape of an array of the base tree, [L, ...] under "layers/"."""
    one = own_shape(row, config)
    sizes = {
        "V": one.vocab_size,
        "D": one.d_model,
        "F": one.d_ff,
        "H": one.head_dim,
        "P": one.num_heads * one.head_dim,
        "Q": one.num_kv_heads * one.head_dim,
        "1": 1,
    }
    stack = (len(stack_of(row, config)),) if row.path.startswith(LAYERS) else ()
    return (*stack, *(sizes[axis] for axis in row.axes))


def transform(row: ParamSpec, config: BackboneConfig, kind: str) -> Callable[[HostArray], HostArray]:
    """Return the transform from the tensor on disk to one layer's array, and for "huggingface" its inverse."""
    head_dim = own_shape(row, config).head_dim
    return lambda value: TRANSFORMS[kind][row.transform](value, head_dim)


def expected(config: BackboneConfig, kind: str = "huggingface") -> dict[str, CheckpointKey]:
    """Return every key that a checkpoint of `kind` ("huggingface", "gguf") must hold, layer by layer."""
    rows = table(config)
    stacked = {row: stack_of(row, config) for row in rows if row.path.startswith(LAYERS)}
    shapes = {row: param_shape(row, config) for row in rows}
    order: list[tuple[ParamSpec, int | None]] = [(row, None) for row in rows if row not in stacked]
    order += [(row, layer) for layer in range(config.num_layers) for row in stacked if layer in stacked[row]]
    entries = {}
    for row, layer in order:
        shape = shapes[row][0 if layer is None else 1 :]
        key, place = getattr(row, kind).format(layer=layer), None if layer is None else stacked[row].index(layer)
        entries[key] = CheckpointKey(key, shape[::-1] if row.path.endswith("/kernel") else shape, row, place)
    return entries


def fused_keys(config: BackboneConfig, kind: str = "huggingface") -> dict[str, list[CheckpointKey]]:
    """Return the keys of tensors that hold several linears, with the entries of their parts in order."""
    family, places = family_of(config), expected(config, kind)
    by_place = {(entry.row.path, entry.layer): entry for entry in places.values()}
    return {
        getattr(whole, kind).format(layer=layer): [by_place[part, layer] for part in whole.parts]
        for layer in range(config.num_layers)
        for whole in family.fused
    }


def normalise(key: str, kind: str = "huggingface") -> tuple[str | None, str | None]:
    """Return (key in the layout "text", layout of the key); the key is None for parts of a vision tower, which are
    skipped.

    The layout is None where the key does not tell: vision, a tied head, anything unknown, and all of GGUF.
    """
    if key.startswith(IGNORED[kind]):
        return None, None
    if kind == "huggingface":
        for layout in sorted(LAYOUTS, key=lambda layout: len(LAYOUTS[layout]), reverse=True):  # the longest first
            if key.startswith(LAYOUTS[layout]):
                return LAYOUTS["text"] + key.removeprefix(LAYOUTS[layout]), layout
    return key, None


def relayout(key: str, layout: str) -> str:
    """Return the key of layout "text", spelled in another layout: `normalise` backwards.

    Raises: InputError for an unknown layout.
    """
    if layout not in LAYOUTS:
        raise InputError(f"key layout {layout!r} is not one of {', '.join(LAYOUTS)}")
    text = LAYOUTS["text"]
    return LAYOUTS[layout] + key.removeprefix(text) if key.startswith(text) else key


def detect_layout(keys: Iterable[str]) -> str:
    """Return the layout that most keys are in; "text" where none tells."""
    counts = Counter(layout for key in keys if (layout := normalise(key)[1]) is not None)
    return counts.most_common(1)[0][0] if counts else "text"


def bind(tensors: Iterable[Header], config: BackboneConfig, kind: str, where: str | Path) -> Binding[Header]:
    """Give every tensor its place, looking at headers only.

    Raises: InputError naming key and file for an unknown, duplicate, missing or wrongly shaped key and for a
    checkpoint that mixes key layouts.
    """
    tensors = list(tensors)
    layout = detect_layout(tensor.name for tensor in tensors) if kind == "huggingface" else None
    places = expected(config, kind)
    embedding = next(entry for entry in places.values() if entry.row.path == "embed/embedding")
    found: dict[str, Header] = {}
    for tensor in tensors:
        key, spelled = normalise(tensor.name, kind)
        if key is None:
            continue
        if key in places:
            entry = places[key]
        elif key in HEADS[kind]:
            key, entry = HEADS[kind][0], embedding
        else:
            biased = f"; {family_of(config).title} has no such bias" if key.endswith(".bias") else ""
            raise InputError(f"{tensor.file}: unknown key {tensor.name}{biased}")
        if key in found:
            raise InputError(
                f"{tensor.file}: key {tensor.name} is a duplicate of {found[key].name} in {found[key].file}"
            )
        if spelled not in (None, layout):
            raise InputError(f"{tensor.file}: key {tensor.name} has the layout {spelled}, other keys have {layout}")
        if tuple(tensor.shape) != entry.shape:
            raise InputError(
                f"{tensor.file}: key {tensor.name} has shape {list(tensor.shape)}, expected {list(entry.shape)} for "
                f"{entry.row.path} of this config"
            )
        found[key] = tensor
    head = found.pop(HEADS[kind][0], None) if config.tied_head else None
    missing = [key for key in places if key not in found]
    if missing:
        key = relayout(missing[0], layout) if layout else missing[0]
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise InputError(f"{where}: key {key}{more} is missing")
    return Binding([(tensor, places[key]) for key, tensor in found.items()], head)


def get_param(tree: Params, slot: str) -> Any:
    """Return the array at a slash-separated path of nested dicts.

    Raises: InputError naming the slot when it is absent.
    """
    for part in slot.split("/"):
        if not isinstance(tree, Mapping) or part not in tree:
            raise InputError(f"the base tree has no slot {slot}")
        tree = tree[part]
    return tree


def set_param(tree: Params, slot: str, value: LayerStack | jax.ShapeDtypeStruct) -> None:
    """Put an array at a slash-separated path, making the dicts on the way."""
    *parents, last = slot.split("/")
    for part in parents:
        tree = tree.setdefault(part, {})
    tree[last] = value
