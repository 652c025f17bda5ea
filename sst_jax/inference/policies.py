"""Depth policies: how often the stack runs at each position of an answer.

    flat(I)                  "4"                    I times at every position
    first_token(I)           "first_token:4"        I times where the first new token comes from, once from then on
    until(rule, x, I)        "until_stable:0.01:4"  until a halting rule ends it, at most I times: HALTING_RULES;
                             "until_confident:0.9:4"  here until the next token has this probability
    probe(select, first)                            chosen, once a sequence, from the states at the first position
                             "probe:FILE"           the same by a probe's file (`inference/halting_probe.py`)

A policy is data, four numbers a row of a batch, so rows of different policies share one compiled program. "First" is
the first position that depth applies to: the prompt's last one, or, with stream.iterate_prompt="none", the first
token's own.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sst_jax.errors import InputError
from sst_jax.types import AnyRowFloats, AnyRowInts, LayerStates, RowBools, RowHidden, RowLogits, RowStates, ScalarInt

# ------------------------------------------------------------------------------------------------------ Halting rules


class StepSeen(NamedTuple):
    """What a halting rule sees of a batch after an iteration at one position.

    iteration  int32 [], iterations at the position so far, counted from 1
    hidden     [B, D], the normed final hidden state of this iteration
    previous   [B, D], that of the iteration before; of no meaning at iteration 1
    states     [L, B, D], each layer's state; None without a stream
    logits     () -> [B, V], the next token's; computed when it is called
    threshold  [B], each row's parameter
    """

    iteration: ScalarInt
    hidden: RowHidden
    previous: RowHidden
    states: RowStates | None
    logits: Callable[[], RowLogits]
    threshold: AnyRowFloats


class HaltingRule(NamedTuple):
    """When a position has had enough iterations.

    halt          StepSeen -> bool [B]
    symbol        what the threshold is called in a spelling
    most          the largest threshold that makes sense; all must be above 0
    reads_logits  it calls `seen.logits`: it is then evaluated only while a row that has this rule is iterating
    """

    halt: Callable[[StepSeen], RowBools]
    symbol: str
    most: float = math.inf
    reads_logits: bool = False


def is_stable(seen: StepSeen) -> RowBools:
    """Halt when an iteration moved the hidden state by at most the threshold's share of its length.

    There are at least two iterations, as the first has nothing to be compared with.
    """
    new, old = seen.hidden.astype(jnp.float32), seen.previous.astype(jnp.float32)
    share = jnp.linalg.norm(new - old, axis=-1) / jnp.maximum(jnp.linalg.norm(new, axis=-1), 1e-30)
    return (share <= seen.threshold) & (seen.iteration > 1)


def is_confident(seen: StepSeen) -> RowBools:
    """Halt when the next token's largest probability reaches the threshold; the first iteration may be enough."""
    logits = seen.logits()
    return jnp.exp(jnp.max(logits, axis=-1) - jax.nn.logsumexp(logits, axis=-1)) >= seen.threshold


HALTING_RULES = {
    "until_stable": HaltingRule(is_stable, "TOL"),
    "until_confident": HaltingRule(is_confident, "P", most=1.0, reads_logits=True),
}


class Halting(NamedTuple):
    """The halting rules of the rows of a batch, [B] each: data of a compiled program."""

    rule: AnyRowInts  # its place in HALTING_RULES, counted from 1; 0 is none
    threshold: AnyRowFloats


READS_LOGITS = "halting_logits"  # scope of the branches (no row has such a rule, one has)


def halted(halting: Halting, seen: StepSeen, active: RowBools) -> RowBools:
    """Return which of the rows that are `active` have a rule that ends their iterations here."""
    ended = jnp.zeros_like(active)
    for number, rule in enumerate(HALTING_RULES.values(), 1):
        mine = active & (halting.rule == number)
        if rule.reads_logits:
            with jax.named_scope(READS_LOGITS):
                found = jax.lax.cond(jnp.any(mine), lambda rule=rule: rule.halt(seen), lambda: jnp.zeros_like(active))
        else:
            found = rule.halt(seen)
        ended |= mine & found
    return ended


# ----------------------------------------------------------------------------------------------------------- Policies


@dataclasses.dataclass(frozen=True)
class Policy:
    """At most `first` iterations at the first position and `rest` at all later ones, under a `name` such as "4".

    halt, threshold  one of HALTING_RULES, which may end a position's iterations earlier, and its parameter
    select_depth     from the states [L, D] after the first position to what replaces `rest`; called on the host
    """

    name: str
    first: int
    rest: int
    halt: str | None = None
    threshold: float = 0.0
    select_depth: Callable[[LayerStates], int] | None = None

    def __post_init__(self) -> None:
        for field in ("first", "rest"):
            value = getattr(self, field)
            if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
                raise InputError(f"depth={self.name}: {value!r} must be an integer of at least 1")
        if self.halt is None:
            return
        rule = HALTING_RULES[self.halt]
        if not 0.0 < self.threshold <= rule.most or math.isinf(self.threshold):
            bound = "" if math.isinf(rule.most) else f" and at most {rule.most:g}"
            raise InputError(f"depth={self.name}: {rule.symbol} must be a number above 0{bound}")

    @property
    def max_depth(self) -> int:
        """The most iterations that are known beforehand; what `select_depth` returns is not."""
        return max(self.first, self.rest)

    @property
    def is_flat(self) -> bool:
        return self.first == self.rest and self.halt is None and self.select_depth is None


class DepthBudget(NamedTuple):
    """Policies of the rows of a batch: the most iterations [B] at the next position and at those after it."""

    now: AnyRowInts
    rest: AnyRowInts
    halting: Halting


def flat(depth: int) -> Policy:
    """Return the policy of `depth` iterations at every position."""
    return Policy(str(depth), depth, depth)


def first_token(depth: int) -> Policy:
    """Return the policy of `depth` iterations where the first new token comes from, one at every later position."""
    return Policy(f"first_token:{depth}", depth, 1)


def until(rule: str, threshold: float, max_depth: int) -> Policy:
    """Return the policy that iterates at every position until a rule of HALTING_RULES holds, `max_depth` times at most.

    Raises: InputError where the threshold is out of the rule's range, or max_depth below 1.
    """
    return Policy(f"{rule}:{threshold:g}:{max_depth}", max_depth, max_depth, rule, threshold)


until_stable = functools.partial(until, "until_stable")
until_confident = functools.partial(until, "until_confident")


def probe(select_depth: Callable[[LayerStates], int], first: int = 1) -> Policy:
    """Return the policy of `first` iterations at the first position, and from there on as many as are chosen.

    Args:
        select_depth: from the states [L, D] after the first position to the number of iterations.
        first: iterations at the first position.

    Raises: InputError, when generating, where the choice is not an integer of at least 1.
    """
    return Policy(f"probe:{getattr(select_depth, '__name__', 'select')}", first, 1, select_depth=select_depth)


def selected_depth(policy: Policy, states: LayerStates) -> int:
    """Return what `policy.select_depth` chooses for the states [L, D], checked."""
    if policy.select_depth is None:
        raise ValueError(f"the policy {policy.name} does not choose from states")
    return dataclasses.replace(policy, rest=policy.select_depth(states)).rest


def depth_budget(policies: Sequence[Policy]) -> DepthBudget:
    """Return the policies of rows whose first position is still before them, as data."""
    numbers: dict[str | None, int] = {None: 0}
    numbers.update({name: number for number, name in enumerate(HALTING_RULES, 1)})
    halting = Halting(
        np.array([numbers[policy.halt] for policy in policies], np.int32),
        np.array([policy.threshold for policy in policies], np.float32),
    )
    first, rest = ([getattr(policy, name) for policy in policies] for name in ("first", "rest"))
    return DepthBudget(np.array(first, np.int32), np.array(rest, np.int32), halting)


# ---------------------------------------------------------------------------------------------------------- Spellings

Parameter = tuple[str, Callable[[str], float]]

# What may be spelled in a command or a request: what makes the policy, and its parameters' names and types.
SPELLINGS: dict[str, tuple[Callable[..., Policy], tuple[Parameter, ...]]] = {
    "first_token": (first_token, (("I", int),)),
    **{
        name: (functools.partial(until, name), ((rule.symbol, float), ("I", int)))
        for name, rule in HALTING_RULES.items()
    },
}

# By the word in front of a file's name: what reads the policy of that file. `inference/halting_probe.py` registers
# "probe" when it is imported.
FILES: dict[str, Callable[[str], Policy]] = {}


def spellings() -> str:
    """Return the spellings that `parse` takes, as a list to be shown."""
    return ", ".join(["I", *(":".join([name, *(part[0] for part in rest)]) for name, (_, rest) in SPELLINGS.items())])


def parse(text: str, files: bool = False) -> Policy:
    """Return the policy of one spelling: "4", "first_token:4" or "until_stable:0.01:4".

    files: "probe:FILE" is taken too. Not from a stranger's request, which should open no files.
    Raises: InputError that quotes the text and lists the spellings; as `halting_probe.load`.
    """
    name, *given = text.strip().split(":")
    if files and name in FILES:
        return FILES[name](":".join(given))
    make, parameters = SPELLINGS.get(name, (flat, (("I", int),)))
    given = given if name in SPELLINGS else [name, *given]
    try:
        values = [kind(value) for (_, kind), value in zip(parameters, given, strict=True)]
    except ValueError:
        raise InputError(f"depth={text!r} is not one of {spellings()}") from None
    return make(*values)


def parse_list(text: str, files: bool = False) -> list[Policy]:
    """Return the policies of a comma list: "1,4,until_stable:0.01:4"; `files` as for `parse`.

    Raises: InputError as `parse`, and where one is named twice.
    """
    policies = [parse(part, files) for part in text.split(",")]
    check_distinct(policies)
    return policies


def check_distinct(policies: Sequence[Policy]) -> None:
    """Raise InputError where a policy is there twice."""
    for number, policy in enumerate(policies):
        if policy in policies[:number]:
            raise InputError(f"depth={','.join(each.name for each in policies)!r} names {policy.name} twice")


def as_policy(depth: int | str | Policy) -> Policy:
    """Return the policy that `depth` is, spells or counts.

    Raises: InputError as `parse`.
    """
    if isinstance(depth, Policy):
        return depth
    return parse(depth) if isinstance(depth, str) else flat(depth)
