"""Pointers that are followed k times, k told: words whose answers need several steps at one position.

A word is a table and queries about it. A symbol of the table is an arrow from a node to another, the arrows of a
permutation in random order; a query names a node and how many arrows are to be followed from it, and the answer, asked
where the query stands, is the node where that ends. A layer of attention follows an arrow; a word tells nothing of how
a table is composed with itself, so that who has fewer layers than arrows needs to go through them again.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from sst_jax.data.problems import SPLITS
from sst_jax.data.statetrack import Words, residues
from sst_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class Pointers:
    """nodes   of the table, which has as many arrows
    hops    arrows that a query asks for at most
    """

    name: str
    nodes: int
    hops: int

    @property
    def vocabulary(self) -> int:
        """Number of ids: an arrow each, then a query each; answers are the first ids, one a node."""
        return self.nodes * self.nodes + self.nodes * self.hops

    @property
    def chance(self) -> float:
        """Accuracy of a uniform guess."""
        return 1.0 / self.nodes

    def draw(self, split: str, rows: int, length: int, seed: tuple[int, ...]) -> Words:
        """Draw random words of one split, the same for the same arguments; a word's split is a hash of its symbols.

        Raises: InputError for another split, or a length that leaves no room for queries.
        """
        if split not in SPLITS:
            raise InputError(f"{self.name} has no split {split!r}; it has {', '.join(SPLITS)}")
        if length <= self.nodes:
            raise InputError(f"words of length {length}: {self.name} needs more than its {self.nodes} arrows")
        rng, found = np.random.default_rng(seed), Words(*(np.zeros((0, length), kind) for kind in "iib"))
        while len(found.symbols) < rows:
            fresh = self._words(rng, 2 * rows, length)
            kept = np.isin(residues(fresh.symbols), SPLITS[split])
            found = Words(*(np.concatenate([old, new[kept]]) for old, new in zip(found, fresh, strict=True)))
        return Words(*(part[:rows] for part in found))

    def _words(self, rng: np.random.Generator, rows: int, length: int) -> Words:
        nodes, queries = self.nodes, length - self.nodes
        table = rng.permuted(np.tile(np.arange(nodes, dtype=np.int32), (rows, 1)), axis=1)
        order = rng.permuted(np.tile(np.arange(nodes, dtype=np.int32), (rows, 1)), axis=1)
        arrows = order * nodes + np.take_along_axis(table, order, 1)
        start = rng.integers(0, nodes, (rows, queries), np.int32)
        hops = rng.integers(0, self.hops, (rows, queries), np.int32)
        asked = nodes * nodes + start * self.hops + hops
        node, answers = start, np.zeros_like(start)
        for hop in range(self.hops):
            node = np.take_along_axis(table, node, 1)
            answers = np.where(hops == hop, node, answers)
        nothing = np.zeros_like(arrows)
        return Words(
            np.concatenate([arrows, asked], 1),
            np.concatenate([nothing, answers], 1),
            np.concatenate([nothing, np.ones_like(answers)], 1).astype(bool),
        )


TASKS = {task.name: task for task in (Pointers("pointers", 8, 6),)}
