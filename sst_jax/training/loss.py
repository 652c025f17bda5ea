"""The loss: cross-entropy on answer tokens only, a chunk of the vocabulary's rows at a time.

Logits of a whole batch would be B*T*V numbers, 2 GiB at 2,048 positions of Gemma. Here the scored positions are moved
to the front, and a scan over chunks of positions computes logits for those chunks that hold any.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax

from sst_jax.model.sharding import constrain

CHUNK = 128


def _chunked(hidden: jax.Array, embedding: jax.Array, targets: jax.Array, scored: jax.Array, with_gradient: bool):
    """Per-position losses [M], and where asked their gradients with respect to hidden, [M, D]."""
    count, width = hidden.shape
    chunk = min(CHUNK, count)
    order = jnp.argsort(~scored, stable=True)
    padded = jnp.pad(order, (0, -count % chunk))
    table = embedding.astype(hidden.dtype)
    out = jnp.promote_types(hidden.dtype, jnp.float32)

    def losses(x: jax.Array, y: jax.Array) -> jax.Array:
        logits = jnp.einsum("md,vd->mv", x, table, preferred_element_type=out)
        return optax.losses.softmax_cross_entropy_with_integer_labels(logits, y)

    def compute(index: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        x, y = constrain(hidden[index], "scored", None), targets[index]
        if not with_gradient:
            return losses(x, y), None
        nll, pull = jax.vjp(lambda x: losses(x, y), x)
        return nll, pull(jnp.ones_like(nll))[0]

    def skip(index: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        return jnp.zeros(chunk, out), jnp.zeros((chunk, width), hidden.dtype) if with_gradient else None

    def body(_: None, index: jax.Array) -> tuple[None, tuple]:
        return None, jax.lax.cond(scored[index].any(), compute, skip, index)

    _, (nll, gradient) = jax.lax.scan(body, None, padded.reshape(-1, chunk))
    back = jnp.argsort(order)
    nll = jnp.where(scored, nll.reshape(-1)[back], 0.0)
    if with_gradient:
        gradient = jnp.where(scored[:, None], gradient.reshape(-1, width)[back], 0.0).astype(hidden.dtype)
    return nll, gradient


@jax.custom_vjp
def token_losses(hidden: jax.Array, embedding: jax.Array, targets: jax.Array, scored: jax.Array) -> jax.Array:
    """Cross-entropy in nats, [M], of targets [M] under the tied head; 0 where `scored` [M] is False.

    hidden [M, D] is normed; embedding [V, D] is frozen and gets no gradient. The gradient with respect to hidden is
    computed with the loss, so that the backward pass repeats no product with the vocabulary.
    """
    return _chunked(hidden, embedding, targets, scored, with_gradient=False)[0]


def _forward(hidden: jax.Array, embedding: jax.Array, targets: jax.Array, scored: jax.Array):
    return _chunked(hidden, embedding, targets, scored, with_gradient=True)


def _backward(gradient: jax.Array, cotangent: jax.Array):
    return (cotangent[:, None] * gradient).astype(gradient.dtype), None, None, None


token_losses.defvjp(_forward, _backward)


def answer_losses(hidden: jax.Array, embedding: jax.Array, tokens: jax.Array, answer_mask: jax.Array) -> jax.Array:
    """Losses [B, T] of the tokens that `answer_mask` [B, T] marks, each predicted from the position before it."""
    x, y, scored = hidden[:, :-1], jnp.asarray(tokens)[:, 1:], jnp.asarray(answer_mask)[:, 1:]
    nll = token_losses(x.reshape(-1, x.shape[-1]), embedding, y.reshape(-1), scored.reshape(-1))
    return jnp.pad(nll.reshape(y.shape), ((0, 0), (1, 0)))
