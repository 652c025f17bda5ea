"""Depth policies: how often the stack runs at each position of an answer.

    flat(I)                   "4"                   I times at every position
    first_token(I)            "first_token:4"       I times where the first new token comes from, once from then on
    until_stable(tol, most)   "until_stable:0.01:4" until the final hidden state moves by a share of at most tol
    probe(choose, first)                            chosen, once a sequence, from the states at the first position
                          "probe:FILE"              the same by a probe's file (`inference/halting_probe.py`)

A policy is data, three numbers a row of a batch, so rows of different policies share one compiled program. "First" is
the first position that depth applies to: the prompt's last one, or, with stream.prompt="none", the first token's own.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import numpy as np

from sst_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class Policy:
    """At most `first` iterations at the first position and `rest` at all later ones, under a `name` such as "4".

    tolerance  above 0: a position stops early, see `until_stable`.
    select_depth  from the states [L, D] after the first position to what replaces `rest`; called on the host.
    """

    name: str
    first: int
    rest: int
    tolerance: float = 0.0
    select_depth: Callable[[np.ndarray], int] | None = None

    def __post_init__(self) -> None:
        for name in ("first", "rest"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
                raise InputError(f"depth={self.name}: {value!r} must be an integer of at least 1")
        if not (math.isfinite(self.tolerance) and self.tolerance >= 0.0):
            raise InputError(f"depth={self.name}: the tolerance {self.tolerance} must be a number above 0")

    @property
    def max_depth(self) -> int:
        """The most iterations that it is sure not to exceed; `select_depth` is not known before."""
        return max(self.first, self.rest)

    @property
    def is_flat(self) -> bool:
        return self.first == self.rest and self.tolerance == 0.0 and self.select_depth is None


class DepthBudget(NamedTuple):
    """Policies of the rows of a batch, [B] each: iterations at the next position, at those after it, and tolerance."""

    now: jax.Array
    rest: jax.Array
    tolerance: jax.Array


def flat(depth: int) -> Policy:
    """`depth` iterations at every position."""
    return Policy(str(depth), depth, depth)


def first_token(depth: int) -> Policy:
    """`depth` iterations where the first new token comes from, one at every later position."""
    return Policy(f"first_token:{depth}", depth, 1)


def until_stable(tolerance: float, most: int) -> Policy:
    """At every position until an iteration moves the normed final hidden state by at most `tolerance` of its length.

    At least two iterations (there is nothing to compare the first with), and never more than `most`.
    Raises: InputError where tolerance is not above 0.
    """
    name = f"until_stable:{tolerance:g}:{most}"
    if not tolerance > 0.0:
        raise InputError(f"depth={name}: the tolerance must be a number above 0")
    return Policy(name, most, most, tolerance)


def probe(choose: Callable[[np.ndarray], int], first: int = 1) -> Policy:
    """`first` iterations at the first position; from there on as many as `choose` says, given the states [L, D] then.

    Raises: InputError, when generating, where the choice is not an integer of at least 1.
    """
    return Policy(f"probe:{getattr(choose, '__name__', 'choose')}", first, 1, select_depth=choose)


def selected_depth(policy: Policy, states: np.ndarray) -> int:
    """What `policy.select_depth` says of the states [L, D], checked."""
    return dataclasses.replace(policy, rest=policy.select_depth(states)).rest


# What may be spelled in a command or a request, each with its parameters' names and types.
SPELLINGS = {"first_token": (first_token, ("I", int)), "until_stable": (until_stable, ("TOL", float), ("MOST", int))}

# By the word in front of a file's name: what reads the policy of that file. `inference/halting_probe.py` registers
# "probe" when it is imported.
FILES: dict[str, Callable[[str], Policy]] = {}


def parse(text: str, files: bool = False) -> Policy:
    """The policy of one spelling: "4", "first_token:4" or "until_stable:0.01:4".

    files: "probe:FILE" is taken too. Not from a stranger's request, which should open no files.
    Raises: InputError that quotes the text and lists the spellings; as `probe.load`.
    """
    name, *given = text.strip().split(":")
    if files and name in FILES:
        return FILES[name](":".join(given))
    known = "I, " + ", ".join(":".join([key, *(part[0] for part in rest)]) for key, (_, *rest) in SPELLINGS.items())
    make, *parameters = SPELLINGS.get(name, (flat, ("I", int)))
    given = given if name in SPELLINGS else [name, *given]
    if len(given) != len(parameters):
        raise InputError(f"depth={text!r} is not one of {known}")
    try:
        values = [kind(value) for (_, kind), value in zip(parameters, given, strict=True)]
    except ValueError:
        raise InputError(f"depth={text!r} is not one of {known}") from None
    return make(*values)


def parse_list(text: str, files: bool = False) -> list[Policy]:
    """The policies of a comma list: "1,4,until_stable:0.01:4"; `files` as for `parse`.

    Raises: InputError as `parse`, and where one is named twice.
    """
    policies = [parse(part, files) for part in text.split(",")]
    for number, policy in enumerate(policies):
        if policy in policies[:number]:
            raise InputError(f"depth={text!r} names {policy.name} twice")
    return policies


def as_policy(depth: int | str | Policy) -> Policy:
    """A policy from whatever `depth` may be given as.

    Raises: InputError as `parse`.
    """
    if isinstance(depth, Policy):
        return depth
    return parse(depth) if isinstance(depth, str) else flat(depth)


def depth_budget(policies: Sequence[Policy]) -> DepthBudget:
    """Rows that have their first position still before them."""
    columns = zip(*((policy.first, policy.rest, policy.tolerance) for policy in policies), strict=True)
    return DepthBudget(*(np.asarray(column, kind) for column, kind in zip(columns, ("i4", "i4", "f4"), strict=True)))
