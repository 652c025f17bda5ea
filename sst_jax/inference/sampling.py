"""From logits to the next token."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from sst_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class Sampling:
    """Greedy at temperature 0; otherwise softmax(logits / temperature), cut to the top_k best (0: all) and to the
    smallest set of tokens whose probability reaches top_p (1: all), in that order."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if not self.temperature >= 0.0:
            raise InputError(f"temperature={self.temperature} must be >= 0")
        if self.top_k < 0:
            raise InputError(f"top_k={self.top_k} must be >= 0")
        if not 0.0 < self.top_p <= 1.0:
            raise InputError(f"top_p={self.top_p} must be in (0, 1]")


def sample(sampling: Sampling, logits: jax.Array, keys: jax.Array) -> jax.Array:
    """Next tokens int32 [B] from logits [B, V]; row b draws from keys[b] alone, whatever its neighbours do."""
    if sampling.temperature == 0.0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = logits / sampling.temperature
    if sampling.top_k or sampling.top_p < 1.0:
        ordered = jnp.sort(logits, axis=-1)[:, ::-1]
        if sampling.top_k:
            ordered = jnp.where(jnp.arange(ordered.shape[-1]) < sampling.top_k, ordered, -jnp.inf)
        before = jnp.cumsum(jax.nn.softmax(ordered, axis=-1), axis=-1) - jax.nn.softmax(ordered, axis=-1)
        kept = (before < sampling.top_p) & jnp.isfinite(ordered)
        floor = jnp.min(jnp.where(kept, ordered, jnp.inf), axis=-1, keepdims=True)
        logits = jnp.where(logits >= floor, logits, -jnp.inf)
    return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)
