"""GPTQ (arXiv 2210.17323): errors of a linear's weights, weighted by the second moments of its inputs."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from sst_jax.errors import InputError
from sst_jax.types import Gram, Scalar

DAMPING = (0.01, 0.1, 1.0)  # of a Gram matrix's mean square, added to its diagonal: GPTQ's, and more where that fails


def compensation(gram: Gram) -> Gram:
    """Return the upper triangular U [in, in] of GPTQ, float32: transpose(U) U is the inverse of the damped Gram.

    `gram` [in, in] is the sum of x^T x over a linear's inputs x [..., in]. An error e in the weights of input i is best
    compensated by subtracting e U[i, j] / U[i, i] from those of every later input j.

    Raises: InputError when no damping makes it positive definite, as when an input was not finite.
    """
    gram = gram.astype(jnp.float32)
    mean = jnp.mean(jnp.diagonal(gram))
    for damping in DAMPING:
        factor = _compensation(gram, jnp.where(mean > 0, damping * mean, 1.0))
        if bool(jnp.isfinite(factor).all()):
            return factor
    raise InputError("what a linear is fed by the calibration's texts is not finite, or not numerically positive")


@jax.jit
def _compensation(gram: Gram, damping: Scalar) -> Gram:
    # With the axes reversed a Cholesky factor is upper triangular, and its inverse is U: no matrix but it is inverted.
    eye = jnp.eye(len(gram), dtype=gram.dtype)
    upper = jnp.linalg.cholesky((gram + damping * eye)[::-1, ::-1])[::-1, ::-1]
    return jax.scipy.linalg.solve_triangular(upper, eye)
