"""State-tracking tasks for tiny models: words over small alphabets whose answer is the state of an automaton.

s3, s5       a symbol is a permutation of three or five things; the answer is the product so far
parity       of the ones so far
mod5         the sum of the digits so far, modulo five
sums         the same modulo seven
arithmetic   additions and multiplications modulo ten; only where "=" stands is the value asked for, and it is never
             written, so that every intermediate result is hidden

The answer at a position is the state after the symbol there. A model without a recurrence has to compute the whole word
again at every position, and one that is trained at one length has not seen longer ones. `data/tracking.py` has the same
automata as stories in English, for pretrained models.
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import NamedTuple

import numpy as np

from sst_jax.data.problems import RESIDUES, SPLITS
from sst_jax.errors import InputError

SHORTEST = 8  # symbols of a word
QUERIES = 0.25  # share of "=" among the symbols of arithmetic


@dataclasses.dataclass(frozen=True)
class Automaton:
    """table int32 [states, symbols]: table[state, symbol] is the state after it. A word begins in state 0.

    query: the last symbol is one at which alone the state is asked, and which does not change it.
    """

    name: str
    table: np.ndarray
    query: bool = False

    @property
    def vocabulary(self) -> int:
        """Number of ids that a model needs; symbols and states share them."""
        return max(self.table.shape)

    @property
    def chance(self) -> float:
        """Accuracy of a uniform guess."""
        return 1.0 / len(self.table)


class Words(NamedTuple):
    """symbols and the states after them, int32 [B, T]; asked bool [B, T]: where the state is the answer."""

    symbols: np.ndarray
    states: np.ndarray
    asked: np.ndarray


def group(size: int) -> np.ndarray:
    """Return the multiplication table of the permutations of `size` things.

    table[a, b] is "a, then b"; 0 is the identity.
    """
    elements = list(itertools.permutations(range(size)))
    index = {element: number for number, element in enumerate(elements)}
    return np.array([[index[tuple(b[i] for i in a)] for b in elements] for a in elements], np.int32)


def cyclic(modulus: int) -> np.ndarray:
    """Return the table of sums modulo `modulus`."""
    return np.add.outer(np.arange(modulus), np.arange(modulus)).astype(np.int32) % modulus


def calculator() -> np.ndarray:
    """Return the table modulo ten: add 1 to 9, multiply by 3, 7 or 9 (invertible), and "=", which keeps the value."""
    value = np.arange(10)[:, None]
    return np.hstack([(value + np.arange(1, 10)) % 10, value * np.array([3, 7, 9]) % 10, value]).astype(np.int32)


TASKS = {
    task.name: task
    for task in (
        Automaton("s3", group(3)),
        Automaton("s5", group(5)),
        Automaton("parity", cyclic(2)),
        Automaton("mod5", cyclic(5)),
        Automaton("sums", cyclic(7)),
        Automaton("arithmetic", calculator(), query=True),
    )
}


def find(name: str) -> Automaton:
    """Return the task of that name. Raises: InputError with the known names."""
    if name not in TASKS:
        raise InputError(f"task.name={name!r} is not one of {', '.join(map(repr, TASKS))}")
    return TASKS[name]


def draw(task: Automaton, split: str, rows: int, length: int, seed: tuple[int, ...]) -> Words:
    """Draw random words of one split, the same for the same arguments.

    A word's split is a hash of its symbols, so no word is in two of them.
    Raises: InputError for another split, or a length too short for words of every split.
    """
    if split not in SPLITS:
        raise InputError(f"{task.name} has no split {split!r}; it has {', '.join(SPLITS)}")
    if length < SHORTEST:
        raise InputError(f"words of length {length}: needs at least {SHORTEST}, so that every split has many")
    rng, symbols = np.random.default_rng(seed), np.zeros((0, length), np.int32)
    while len(symbols) < rows:
        fresh = _symbols(task, rng, 2 * rows, length)
        symbols = np.concatenate([symbols, fresh[np.isin(residues(fresh), SPLITS[split])]])
    return follow(task, symbols[:rows])


def follow(task: Automaton, symbols: np.ndarray) -> Words:
    """Return the words [B, T] with the state after every symbol."""
    states, state = np.zeros_like(symbols), np.zeros(len(symbols), np.int32)
    for position, column in enumerate(symbols.T):
        states[:, position] = state = task.table[state, column]
    asked = symbols == task.table.shape[1] - 1 if task.query else np.ones(symbols.shape, bool)
    return Words(symbols, states, asked)


def reread(task: Automaton, words: Words, times: int) -> Words:
    """Return the same words with the states that result if every symbol is repeated `times` times."""
    return words._replace(states=follow(task, np.repeat(words.symbols, times, axis=1)).states[:, times - 1 :: times])


def right(words: Words, guesses: np.ndarray) -> np.ndarray:
    """Return bool [..., B, T]: whether guesses [..., B, T] were asked for and equal the state."""
    return words.asked & (guesses == words.states)


def residues(symbols: np.ndarray) -> np.ndarray:
    """Return the hash class [B] of each word [B, T], which decides its split: a polynomial hash, mixed (splitmix64)."""
    value = np.full(len(symbols), symbols.shape[1], np.uint64)
    for column in symbols.T:
        value = value * np.uint64(0x9E3779B97F4A7C15) + column.astype(np.uint64) + np.uint64(1)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        value = (value ^ value >> np.uint64(shift)) * np.uint64(factor)
    return ((value ^ value >> np.uint64(31)) % np.uint64(RESIDUES)).astype(np.int64)


def _symbols(task: Automaton, rng: np.random.Generator, rows: int, length: int) -> np.ndarray:
    symbols = rng.integers(0, task.table.shape[1] - task.query, (rows, length), np.int32)
    if task.query:  # never at the beginning, always at the end
        where = rng.random((rows, length)) < QUERIES
        where[:, 0], where[:, -1] = False, True
        symbols[where] = task.table.shape[1] - 1
    return symbols
