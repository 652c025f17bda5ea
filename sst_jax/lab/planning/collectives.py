"""What devices send one another in a compiled program, read from its text as XLA prints it (HLO).

Bytes are those that one device sends, in the ring algorithms: of n devices' parts, (n - 1)/n of the whole for an
all-gather, reduce-scatter or all-to-all, twice that for an all-reduce, everything for a permutation. A loop counts as
often as it runs where that is known, or else once; a branch counts as its costlier side.
"""

from __future__ import annotations

import functools
import math
import re

KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_ARRAY = re.compile(r"\b(pred|bf16|c64|[suf]\d+)\w*\[([\d,]*)\]")
_OPERATION = re.compile(r"^\s+(?:ROOT )?%?[\w.\-]+ = (.*?) ([a-z][\w\-]*)\(")
_CALLED = re.compile(r"\b(calls|to_apply|body|condition|\w+_computations?)=(?:\{([^}]*)\}|%?([\w.\-]+))")
_KNOWN = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_CONSTANT = re.compile(r" = s32\[\]\S* constant\((\d+)\)")

Sent = dict[str, tuple[str, float]]  # (kind, bytes) by a name for each collective


def sent(hlo: str, devices: int) -> dict[str, float]:
    """Return bytes that each device sends when the program runs once, by kind of collective; kinds it lacks are left
    out.
    """
    bodies, entry = _computations(hlo)

    @functools.cache
    def traverse(name: str) -> Sent:
        found: Sent = {}
        for number, line in enumerate(bodies.get(name, ())):
            operation = _OPERATION.match(line)
            if operation is None:
                continue
            result, kind = operation.groups()
            base = kind.removesuffix("-start")
            if base in KINDS:
                # TPU's compiler writes a collective out once for each piece of work that it overlaps with.
                channel = re.search(r"channel_id=(\d+)", line)
                label = f"{base} {channel.group(1)}" if channel else f"{name} {number}"
                found[label] = base, _bytes(base, result, kind != base, line, devices)
                continue
            called = {role: _names(several or one) for role, several, one in _CALLED.findall(line)}
            parts = [traverse(each) for names in called.values() for each in names]
            if kind == "conditional":
                parts = [max(parts, key=_total)]
            if kind == "while":
                times = _trips(line, bodies[called["condition"][0]])
                parts = [
                    {f"{name} {number} {label}": (each, size * times) for label, (each, size) in part.items()}
                    for part in parts
                ]
            for part in parts:
                found |= part
        return found

    total = dict.fromkeys(KINDS, 0.0)
    for kind, size in traverse(entry).values():
        total[kind] += size
    return {kind: size for kind, size in total.items() if size}


def _names(text: str) -> list[str]:
    return [part.strip(" %") for part in text.split(",")]


def _total(found: Sent) -> float:
    return sum(size for _, size in found.values())


def _trips(line: str, condition: list[str]) -> int:
    """Return a loop's trip count: as CUDA's and the CPU's compilers note it, or the one constant of its condition."""
    known = _KNOWN.search(line)
    if known:
        return int(known.group(1))
    limits = [int(found.group(1)) for found in map(_CONSTANT.search, condition) if found]
    return limits[0] if len(limits) == 1 else 1


def _computations(hlo: str) -> tuple[dict[str, list[str]], str]:
    """Return the lines of every computation by name, and the name of the one that the program begins with."""
    bodies: dict[str, list[str]] = {}
    name = entry = ""
    for line in hlo.splitlines():
        found = _COMPUTATION.match(line)
        if found:
            name = found.group(1)
            entry = name if line.startswith("ENTRY") else entry
            bodies[name] = []
        elif name:
            bodies[name].append(line)
    return bodies, entry


def _bytes(kind: str, result: str, started: bool, line: str, devices: int) -> float:
    """Return the bytes that one device sends for one collective, from the type of its result."""
    size = sum(
        math.prod(int(part) for part in shape.split(",") if part) * _bits(dtype) / 8
        for dtype, shape in _ARRAY.findall(result)
    )
    group = _group(line, devices)
    if kind == "collective-permute":
        return size / 2 if started else size  # started, the result holds what is sent beside what comes
    if kind == "all-gather" and started:
        size *= group / (group + 1)
    whole = size * group if kind == "reduce-scatter" else size
    return (2 if kind == "all-reduce" else 1) * whole * (group - 1) / group


def _bits(dtype: str) -> int:
    return 8 if dtype == "pred" else int(re.sub(r"\D", "", dtype))


def _group(line: str, devices: int) -> int:
    """Return the number of devices in a replica group, from any of its three spellings."""
    mesh = re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", line)
    if mesh:
        sizes = dict(part.split("=") for part in mesh.group(1).replace("'", "").split(","))
        return math.prod(int(sizes[axis]) for axis in mesh.group(2).replace("'", "").split(","))
    iota = re.search(r"replica_groups=\[\d+,(\d+)\]", line)
    if iota:
        return int(iota.group(1))
    listed = re.search(r"replica_groups=\{\{([\d,]+)\}", line)
    return listed.group(1).count(",") + 1 if listed else devices
