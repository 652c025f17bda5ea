"""Bytes that a compiled program moves and kernels that it launches, counted from its optimised HLO.

XLA reports neither for CUDA. Every instruction of the entry and of the loops is one kernel, which reads its operands
and writes its result once: a fusion that only slices an operand reads the slice, an update in place writes the update,
and one of our kernels over a stack of layers reads one layer. Caches between kernels are ignored, and so is what a
kernel reads twice.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

_BYTES = {"pred": 1.0, "s4": 0.5, "u4": 0.5, "s2": 0.25, "u2": 0.25, "bf16": 2.0, "token": 0.0, "opaque": 0.0}
# Without a kernel of their own.
_FREE = (
    "parameter", "constant", "get-tuple-element", "tuple", "bitcast", "after-all", "opt-barrier", "partition-id",
    "replica-id",
)  # fmt: skip
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
_INSTRUCTION = re.compile(r"^\s*(ROOT )?%?([\w.\-]+) = (.*)$")


@dataclasses.dataclass(frozen=True)
class _Instruction:
    shape: str
    op: str
    operands: tuple[str, ...]
    inside: str  # the parentheses' text
    attributes: str
    is_root: bool

    def called(self, key: str) -> str:
        """Return the name of a computation that an attribute names."""
        found = re.search(key + r"=%?([\w.\-]+)", self.attributes)
        if found is None:
            raise ValueError(f"{self.op} without {key}")
        return found.group(1)


_Computation = dict[str, _Instruction]


class Kernel(NamedTuple):
    """One instruction that runs on the device: bytes of a run, and how often it runs."""

    name: str
    op: str
    read: float
    written: float
    times: float


class Traffic(NamedTuple):
    """What a program moves and launches."""

    bytes: float
    kernels: float


@dataclasses.dataclass(frozen=True)
class Assumed:
    """What no HLO says of how a program runs.

    trips     turns of loops without a known number of them, by how many such loops are around each: the last counts for
              all that are deeper
    branches  for conditionals in a named scope, how often each of their branches (false, true) runs; of all others the
              one that moves most is counted
    """

    trips: tuple[float, ...] = (1.0,)
    branches: Mapping[str, Sequence[float]] = dataclasses.field(default_factory=dict)


def traffic(text: str, assumed: Assumed | None = None) -> Traffic:
    """Return what a program moves and launches, from its optimised HLO as text."""
    found = kernels(text, assumed)
    return Traffic(sum((one.read + one.written) * one.times for one in found), sum(one.times for one in found))


def kernels(text: str, assumed: Assumed | None = None) -> list[Kernel]:
    """Return every kernel of a program, those of its loops once with the times that they run."""
    computations, entry = _parse(text)
    return list(_walk(computations, entry, 1.0, 0, assumed or Assumed()))


def _parse(text: str) -> tuple[dict[str, _Computation], str]:
    computations: dict[str, _Computation] = {}
    current, entry = None, ""
    for line in text.splitlines():
        if header := _COMPUTATION.match(line):
            current = computations.setdefault(header.group(2), {})
            entry = header.group(2) if header.group(1) else entry
        elif line.startswith("}"):
            current = None
        elif current is not None and (found := _INSTRUCTION.match(line)):
            root, name, rest = found.groups()
            shape, rest = _split(rest) if rest.startswith("(") else rest.split(" ", 1)
            op, _, _ = rest.partition("(")
            inside, attributes = _split(rest[len(op) :])
            operands = tuple(re.findall(r"%([\w.\-]+)", inside))
            current[name] = _Instruction(shape, op.strip(), operands, inside[1:-1], attributes, bool(root))
    return computations, entry


def _split(text: str) -> tuple[str, str]:
    """Return a text up to where its first parenthesis closes, and the rest."""
    depth = 0
    for place, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if depth == 0:
            return text[: place + 1], text[place + 1 :].lstrip()
    return text, ""


def _size(shape: str) -> float:
    """Return the bytes of a shape, or of all shapes of a tuple."""
    total = 0.0
    for kind, sizes in re.findall(r"([a-z][a-z0-9]*)\[([0-9,]*)\]", shape):
        each = _BYTES.get(kind)
        if each is None:
            bits = re.match(r"[a-z]+(\d+)", kind)
            each = int(bits.group(1)) / 8 if bits else 0.0
        total += each * math.prod(int(size) for size in sizes.split(",") if size)
    return total


def _walk(
    computations: dict[str, _Computation], name: str, times: float, unknown: int, assumed: Assumed
) -> Iterator[Kernel]:
    body = computations[name]
    for key, one in body.items():
        if one.op == "while":
            known = re.search(r'known_trip_count":\s*\{"n":"(\d+)"', one.attributes)
            turns = float(known.group(1)) if known else assumed.trips[min(unknown, len(assumed.trips) - 1)]
            deeper = unknown if known else unknown + 1
            yield from _walk(computations, one.called("body"), times * turns, deeper, assumed)
            if not known:
                yield from _walk(computations, one.called("condition"), times * turns, deeper, assumed)
        elif one.op == "conditional":
            sides = [list(_walk(computations, side, times, unknown, assumed)) for side in _branches(one)]
            yield from _chosen(one, sides, assumed)
        elif one.op == "call":
            yield from _walk(computations, one.called("to_apply"), times, unknown, assumed)
        elif one.op in ("fusion", "fusion-start"):
            read, written = _fused(computations[one.called("calls")])
            yield Kernel(key, one.op, read, written, times)
        elif one.op == "async-start":
            yield from _walk(computations, one.called("calls"), times, unknown, assumed)
        elif one.op not in _FREE and not one.op.endswith("-done"):
            yield Kernel(key, one.op, *_moved(one, body), times)


def _branches(one: _Instruction) -> list[str]:
    """Return the computations of a conditional, of false and of true in this order where it has these two."""
    listed = re.search(r"branch_computations=\{([^}]*)\}", one.attributes)
    if listed:
        return re.findall(r"%?([\w.\-]+)", listed.group(1))
    return [one.called("false_computation"), one.called("true_computation")]


def _chosen(one: _Instruction, sides: list[list[Kernel]], assumed: Assumed) -> Iterator[Kernel]:
    for scope, shares in assumed.branches.items():
        if re.search(rf'op_name="[^"]*\b{scope}/', one.attributes):
            for share, side in zip(shares, sides, strict=True):
                yield from (kernel._replace(times=kernel.times * share) for kernel in side)
            return
    yield from max(sides, key=lambda side: sum((kernel.read + kernel.written) * kernel.times for kernel in side))


def _fused(body: _Computation) -> tuple[float, float]:
    """Return what a fusion reads and writes."""
    users = collections.defaultdict(list)
    for one in body.values():
        for operand in one.operands:
            users[operand].append(one)
    names = {id(one): name for name, one in body.items()}

    def read(name: str) -> float:
        whole, found = _size(body[name].shape), 0.0
        for user in users[name]:
            if user.op in ("bitcast", "reshape"):
                found += read(names[id(user)])
            elif user.op == "broadcast" and "dimensions={0" in user.attributes:  # layers, each repeated within itself
                found += read(names[id(user)]) * whole / _size(user.shape)
            elif user.op in ("dynamic-slice", "slice", "gather") and user.operands[0] == name:
                found += _size(user.shape)
            elif user.op not in ("dynamic-update-slice", "scatter") or user.operands[0] != name:
                return whole
        return min(whole, found)

    def written(one: _Instruction) -> float:
        if one.op == "tuple":
            return sum(written(body[part]) for part in one.operands)
        if one.op in ("bitcast", "copy") and body[one.operands[0]].op == "dynamic-update-slice":
            return written(body[one.operands[0]])
        if one.op == "dynamic-update-slice":
            return _size(body[one.operands[1]].shape)
        if one.op == "scatter":
            return _size(body[one.operands[2]].shape)
        return _size(one.shape)

    root = next(one for one in body.values() if one.is_root)
    return sum(read(name) for name, one in body.items() if one.op == "parameter"), written(root)


def _moved(one: _Instruction, body: _Computation) -> tuple[float, float]:
    """Return what an instruction that is not fused reads and writes."""
    shapes = [body[name].shape for name in one.operands if name in body]
    written = _size(one.shape)
    if one.op == "dynamic-slice":
        return written, written
    if one.op == "dynamic-update-slice":
        update = _size(shapes[1])
        return update, update
    if one.op == "custom-call":
        if "__cublas" in one.attributes and one.shape.startswith("("):  # the last result is its workspace
            written = _size(one.shape.rsplit(", ", 1)[0])
        if "triton" in one.attributes:
            return sum(_one_layer(shapes)), written
    return sum(map(_size, shapes)), written


def _one_layer(shapes: list[str]) -> Iterator[float]:
    """Yield the bytes that our kernels read of each operand: of a stack of layers, [L, ., .], one layer."""
    layers = next((found.group(1) for shape in shapes if (found := re.match(r"u8\[(\d+),\d+,\d+\]", shape))), None)
    for shape in shapes:
        stacked = layers is not None and re.match(rf"\w+\[{layers},\d+,\d+\]", shape)
        yield _size(shape) / int(layers) if layers is not None and stacked else _size(shape)
