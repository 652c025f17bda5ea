"""Stacks by kind of layer: for backbones whose global layers have other shapes than their local ones.

What has one shape in all layers is stacked over all of them, [L, ...]: states, the blend. The parameters of each kind
are a stack of their own, those of global layers under names that begin with GLOBAL, and so are keys and values
(`ByKind`). The scan over layers becomes one over periods of the pattern, such as five local layers and a global one,
with a scan over each run of equal layers inside: every layer's kind is known when its program is written, nothing is
padded, and where a period has one run of each kind no stack is copied.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from sst_jax.model.backbone import GLOBAL, stack_name
from sst_jax.types import Params

Carry = TypeVar("Carry")
Body = Callable[[Carry, Any], tuple[Carry, Any]]  # of one layer, as `jax.lax.scan` takes it


class ByKind(NamedTuple):
    """What has another shape in local than in global layers; of one layer, or of a run of them, the other is None."""

    local: Any
    glob: Any

    @classmethod
    def of(cls, kind: str, value: Any) -> ByKind:
        """Return a value of layers of one kind."""
        return cls(None, value) if kind == "global" else cls(value, None)

    def get(self, kind: str) -> Any:
        """Return the value of a kind of layers."""
        return self.glob if kind == "global" else self.local


class Run(NamedTuple):
    """Equal layers in a row, within a period."""

    kind: str
    start: int  # in the period
    first: int  # among the period's layers of its kind
    layers: int


def _is_by_kind(leaf: object) -> bool:
    return isinstance(leaf, ByKind)


def of_kind(stacks: Params, kind: str) -> Params:
    """Return the stacks of a kind of layers, under their plain names."""
    if kind == "global":
        return {name.removeprefix(GLOBAL): leaf for name, leaf in stacks.items() if name.startswith(GLOBAL)}
    return {name: leaf for name, leaf in stacks.items() if not name.startswith(GLOBAL)}


def joined(stacks: Mapping[str, Params]) -> Params:
    """Return the stacks of every kind as one tree: `of_kind` backwards."""
    return {stack_name(kind, name): leaf for kind, tree in stacks.items() for name, leaf in tree.items()}


def periods_of(layer_types: Sequence[str]) -> tuple[int, tuple[Run, ...]]:
    """Return how often the shortest pattern of layers repeats, and its runs; once where nothing repeats."""
    layers = len(layer_types)
    sizes = (size for size in range(1, layers + 1) if layers % size == 0)
    size = next(size for size in sizes if list(layer_types) == list(layer_types[:size]) * (layers // size))
    runs: list[Run] = []
    for at, kind in enumerate(layer_types[:size]):
        if runs and runs[-1].kind == kind:
            runs[-1] = runs[-1]._replace(layers=runs[-1].layers + 1)
        else:
            runs.append(Run(kind, at, list(layer_types[:at]).count(kind), 1))
    return layers // size, tuple(runs)


def among(layer_types: Sequence[str], kind: str, layers: slice, stacks: Any) -> Any:
    """Return of stacks of one kind [L of the kind, ...] those of its layers that are among `layers` of all."""
    first, end = (list(layer_types[:at]).count(kind) for at in (layers.start, layers.stop))
    return jax.tree.map(lambda part: part[first:end], stacks)


def scan_kinds(
    layer_types: Sequence[str], bodies: Mapping[str, Body], own: Mapping[str, Any], shared: Any, carry: Carry
) -> tuple[Carry, Any]:
    """Run a layer's body through all layers, as `jax.lax.scan` would if they had one shape.

    Args:
      layer_types: the kind of every layer.
      bodies: of each kind, (carry, (a layer of `own`, a layer of `shared`)) -> (carry, outputs).
      own: stacks of each kind [L of the kind, ...].
      shared: stacks of all layers [L, ...]; a `ByKind` in it has one for each kind.
      carry: into the first layer.

    Returns:
      The carry behind the last layer, and the outputs of all, stacked as `shared` is; what bodies return as `ByKind`
      is so again.
    """
    periods, runs = periods_of(layer_types)

    def folded(tree: Any) -> Any:  # [L, ...] -> [periods, layers of a period, ...]
        return jax.tree.map(lambda part: part.reshape(periods, -1, *part.shape[1:]), tree)

    def cut(part: Any, run: Run) -> Any:  # of one period
        if _is_by_kind(part):
            return jax.tree.map(lambda one: one[run.first : run.first + run.layers], part.get(run.kind))
        return part[run.start : run.start + run.layers]

    def period(carry: Carry, stacks: tuple) -> tuple[Carry, tuple]:
        own, shared = stacks
        outputs = []
        for run in runs:
            mine = jax.tree.map(lambda part, run=run: part[run.first : run.first + run.layers], own[run.kind])
            ours = jax.tree.map(lambda part, run=run: cut(part, run), shared, is_leaf=_is_by_kind)
            carry, out = jax.lax.scan(bodies[run.kind], carry, (mine, ours))
            outputs.append(out)
        return carry, tuple(outputs)

    stacks = (folded(dict(own)), folded(shared))
    if periods == 1:
        carry, outputs = period(carry, jax.tree.map(lambda part: part[0], stacks))
        outputs = jax.tree.map(lambda part: part[None], outputs)
    else:
        carry, outputs = jax.lax.scan(period, carry, stacks)

    def together(parts: Sequence[Any]) -> Any:  # [periods, layers of a run, ...] of every run -> [L, ...]
        whole = jnp.concatenate(parts, axis=1) if len(parts) > 1 else parts[0]
        return whole.reshape(-1, *whole.shape[2:])

    def join(*parts: Any) -> Any:
        if not _is_by_kind(parts[0]):
            return together(parts)
        found = {}
        for kind in ("local", "global"):
            mine = [part.get(kind) for part, run in zip(parts, runs, strict=True) if run.kind == kind]
            found[kind] = jax.tree.map(lambda *those: together(those), *mine) if mine else None
        return ByKind(found["local"], found["global"])

    return carry, jax.tree.map(join, *outputs, is_leaf=_is_by_kind)


def concatenated(parts: Sequence[Any]) -> Any:
    """Return stacks of some layers after those of others as one, of what each kind has alone by kind."""

    def join(*stacks: Any) -> Any:
        if not _is_by_kind(stacks[0]):
            return jnp.concatenate(stacks)
        there = ([stack.get(kind) for stack in stacks if stack.get(kind) is not None] for kind in ("local", "global"))
        return ByKind(*(jax.tree.map(lambda *those: jnp.concatenate(those), *mine) if mine else None for mine in there))

    return jax.tree.map(join, *parts, is_leaf=_is_by_kind)


def in_order(layer_types: Sequence[str], stacks: Mapping[str, Any]) -> Any:
    """Return stacks [L of a kind, ...] of one shape as one over all layers [L, ...]."""
    kinds = np.array(layer_types)
    order = np.argsort(np.concatenate([np.flatnonzero(kinds == kind) for kind in stacks]), kind="stable")
    return jax.tree.map(lambda *parts: jnp.concatenate(parts)[order], *stacks.values())
