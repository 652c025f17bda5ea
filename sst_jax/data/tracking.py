"""State-tracking stories in English: the question asks for a state that the text never writes out.

boxes    three boxes hold an object each and are swapped pair by pair: words in the group S3
shelves  the same with five shelves: words in S5
rooms    four people walk between rooms, or go where another one is
chain    a number is added to and multiplied, and only its last digit is asked for: hidden intermediate results
lamp     a switch is pressed or left alone: parity
clock    hours pass on a clock of twelve: modular running sums

A name with steps, "boxes:1-4" or "boxes:16", says how many changes a story has; without them it has 1 to 4. Which split
a story belongs to is a hash of its text, so no question is in two splits, whatever the seeds.
"""

from __future__ import annotations

import functools
import hashlib
import random
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

from sst_jax.data.documents import Problem
from sst_jax.data.problems import RESIDUES, SPLITS
from sst_jax.errors import InputError

STEPS = (1, 4)
COLOURS = ("red", "blue", "green", "black", "white")
THINGS = ("key", "coin", "ball", "ring", "book", "cup", "pen", "hat", "shoe", "map", "egg", "bell")
PEOPLE = ("Ann", "Ben", "Dan", "Eva", "Jack", "Lucy", "Mary", "Tom")
ROOMS = ("kitchen", "garden", "office", "garage")
UNITS = (3, 7, 9)  # factors that are invertible modulo ten

Story = tuple[str, str]  # question, result


def swaps(places: int, noun: str, rng: random.Random, steps: int) -> Story:
    """Return a story of objects in `places` coloured places, and swaps of two of them."""
    colours, held = COLOURS[:places], rng.sample(THINGS, places)
    holds = [f"the {colour} {noun} has the {thing}" for colour, thing in zip(colours, held, strict=True)]
    text = [f"{', '.join(holds).capitalize()}."]
    for _ in range(steps):
        a, b = rng.sample(range(places), 2)
        held[a], held[b] = held[b], held[a]
        text.append(f"Swap {colours[a]} and {colours[b]}.")
    asked = rng.randrange(places)
    return " ".join([*text, f"What is in the {colours[asked]} {noun}?"]), held[asked]


def rooms(rng: random.Random, steps: int) -> Story:
    """Return a story of four people; each step one changes rooms, half of the time to where another one is."""
    people = rng.sample(PEOPLE, 4)
    place = {person: rng.choice(ROOMS) for person in people}
    text = [f"{person} is in the {place[person]}." for person in people]
    for _ in range(steps):
        apart = [(one, other) for one in people for other in people if place[one] != place[other]]
        if apart and rng.random() < 0.5:
            mover, host = rng.choice(apart)
            place[mover] = place[host]
            text.append(f"{mover} goes to {host}.")
        else:
            mover = rng.choice(people)
            place[mover] = rng.choice([room for room in ROOMS if room != place[mover]])
            text.append(f"{mover} goes to the {place[mover]}.")
    asked = rng.choice(people)
    return " ".join([*text, f"Where is {asked}?"]), place[asked]


def chain(rng: random.Random, steps: int) -> Story:
    """Return a story of a number modulo ten under additions and multiplications."""
    value = rng.randrange(10)
    text = [f"Begin with {value}."]
    for _ in range(steps):
        if rng.random() < 0.5:
            number = rng.randrange(1, 10)
            value = (value + number) % 10
            text.append(f"Add {number}.")
        else:
            number = rng.choice(UNITS)
            value = value * number % 10
            text.append(f"Multiply by {number}.")
    return " ".join([*text, "What is the last digit?"]), str(value)


def lamp(rng: random.Random, steps: int) -> Story:
    """Return a story of a lamp whose switch people press or leave alone."""
    on = rng.random() < 0.5
    text = [f"The lamp in the {rng.choice(ROOMS)} is {'on' if on else 'off'}."]
    for _ in range(steps):
        press = rng.random() < 0.5
        on ^= press
        text.append(f"{rng.choice(PEOPLE)} {'presses' if press else 'waits'}.")
    return " ".join([*text, "Is the lamp on or off?"]), "on" if on else "off"


def clock(rng: random.Random, steps: int) -> Story:
    """Return a story of a clock of twelve hours."""
    hour = rng.randrange(12)
    text = [f"It is {hour or 12} o'clock."]
    for _ in range(steps):
        passing = rng.randrange(1, 12)
        hour = (hour + passing) % 12
        text.append(f"{passing} hours pass.")
    return " ".join([*text, "What does the clock show?"]), str(hour or 12)


STORIES: dict[str, Callable[[random.Random, int], Story]] = {
    "boxes": functools.partial(swaps, 3, "box"),
    "shelves": functools.partial(swaps, 5, "shelf"),
    "rooms": rooms,
    "chain": chain,
    "lamp": lamp,
    "clock": clock,
}


class Spec(NamedTuple):
    """A kind of story with fewest to most steps."""

    kind: str
    fewest: int
    most: int


def parse(name: str) -> Spec | None:
    """Return the stories that `name` asks for ("boxes", "boxes:6", "boxes:1-4"), or None for other names.

    Raises: InputError where what follows the colon is no number of steps.
    """
    kind, colon, steps = name.partition(":")
    if kind not in STORIES:
        return None
    if not colon:
        return Spec(kind, *STEPS)
    found = re.fullmatch(r"(\d+)(?:-(\d+))?", steps)
    fewest, most = (int(found[1]), int(found[2] or found[1])) if found else (0, 0)
    if not 1 <= fewest <= most:
        raise InputError(f"{name}: write {kind}:6 for six steps or {kind}:1-4 for one to four, not {steps!r}")
    return Spec(kind, fewest, most)


class Stories(Sequence[Problem]):
    """Problems without a worked solution, made on access: story i depends on (spec, split, seed, i) alone."""

    def __init__(self, spec: Spec, split: str, count: int, seed: int = 0):
        if split not in SPLITS:
            raise InputError(f"{spec.kind} has no split {split!r}; it has {', '.join(SPLITS)}")
        if count < 1:
            raise InputError(f"{spec.kind}: count={count} must be positive")
        self.spec, self.split, self.size, self.seed = spec, split, count, seed

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Problem:  # type: ignore[override]  # no slices
        if not 0 <= index < self.size:
            raise IndexError(index)
        kind, fewest, most = self.spec
        rng = random.Random(f"{kind}/{fewest}-{most}/{self.split}/{self.seed}/{index}")
        while True:  # until the story belongs to the split
            question, result = STORIES[kind](rng, rng.randint(fewest, most))
            if residue(question) in SPLITS[self.split]:
                return Problem(f"{kind}/{fewest}-{most}/{self.split}/{self.seed}-{index}", question, "", result)


def residue(text: str) -> int:
    """Return the hash class of a text, which decides its split."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") % RESIDUES
