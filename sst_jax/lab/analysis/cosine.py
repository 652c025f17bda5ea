"""Cosine similarity of hidden states, and its distance from 1."""

from __future__ import annotations

import numpy as np


def cosine_distance(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return 1 - cosine of vectors along the last axis, [...] from [..., D], without cancellation where they nearly
    agree."""
    a, b = (np.asarray(side, np.float64) for side in (a, b))
    a, b = (side / np.maximum(np.linalg.norm(side, axis=-1, keepdims=True), 1e-300) for side in (a, b))
    return 0.5 * np.sum(np.square(a - b), axis=-1)


def cosine_similarity(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return the cosine of vectors along the last axis, [...] from [..., D]."""
    return 1.0 - cosine_distance(a, b)
