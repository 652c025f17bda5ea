"""The loss: cross-entropy on answer tokens only, a tile of positions and vocabulary entries at a time.

Logits of a whole batch would be B*T*V numbers, 2 GiB at 2,048 positions of Gemma. Here the scored positions are moved
to the front; for every block of ROWS of them that holds any, a scan goes over the vocabulary, COLUMNS entries at a
time, and keeps a running softmax: its largest logit, its sum, and the mean embedding under it, which is the gradient
(as attention does in arXiv 2205.14135). What exists at one time is a tile of logits, whatever the vocabulary's size,
and a block reads the table once, where blocks of whole rows of logits read and repack it for each of two products.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import optax
from jax.typing import DTypeLike

from sst_jax.model.layers import capped
from sst_jax.model.sharding import constrain, on_a_mesh
from sst_jax.types import (
    AnswerMask,
    AnyFloat,
    BlockHidden,
    BlockLosses,
    FlatHidden,
    FlatIndex,
    FlatLosses,
    FlatMask,
    FlatTokens,
    HeadTable,
    Hidden,
    Losses,
    ScalarInt,
    Tokens,
)

ROWS = 256
FEW = 32  # learned positions of a whole batch, where answers are a word: one block, in a tenth of the time on a CPU
COLUMNS = 8192
MESH_ROWS = 128  # with whole rows of logits: a table that is cut over devices is not scanned


def _chunked(
    hidden: FlatHidden,
    embedding: HeadTable,
    targets: FlatTokens,
    scored: FlatMask,
    cap: float | None,
    with_gradient: bool,
) -> tuple[FlatLosses, FlatHidden | None]:
    """Return per-position losses and, where asked, their gradients with respect to hidden."""
    targets, scored = jnp.asarray(targets), jnp.asarray(scored)  # a traced index does not index numpy's arrays
    count, width = hidden.shape
    whole = on_a_mesh() or len(embedding) <= COLUMNS
    order = jnp.argsort(~scored, stable=True)
    out = jnp.promote_types(hidden.dtype, jnp.float32)
    block = _whole_block if whole else _tiled_block

    def blocks(index: FlatIndex, rows: int) -> tuple[FlatLosses, FlatHidden | None]:
        """Return the losses at an index of positions and their gradients, from blocks of so many of them."""
        padded = jnp.pad(index, (0, -len(index) % rows))

        def compute(index: FlatIndex) -> tuple[BlockLosses, BlockHidden | None]:
            return block(constrain(hidden[index], "scored", None), embedding, targets[index], out, cap, with_gradient)

        def skip(index: FlatIndex) -> tuple[BlockLosses, BlockHidden | None]:
            return jnp.zeros(rows, out), jnp.zeros((rows, width), hidden.dtype) if with_gradient else None

        def body(_: None, index: FlatIndex) -> tuple[None, tuple]:
            return None, jax.lax.cond(scored[index].any(), compute, skip, index)

        found = jax.lax.scan(body, None, padded.reshape(-1, rows))[1]
        return jax.tree.map(lambda part: part.reshape(-1, *part.shape[2:])[: len(index)], found)

    def one(order: FlatIndex) -> tuple[FlatLosses, FlatHidden | None]:
        found = blocks(order[:FEW], FEW)
        return jax.tree.map(lambda part: jnp.zeros((count, *part.shape[1:]), part.dtype).at[:FEW].set(part), found)

    def several(order: FlatIndex) -> tuple[FlatLosses, FlatHidden | None]:
        return blocks(order, min(MESH_ROWS if whole else ROWS, count))

    if whole or count <= FEW:
        nll, gradient = several(order)
    else:
        nll, gradient = jax.lax.cond(scored.sum() <= FEW, one, several, order)
    back = jnp.argsort(order)
    nll = jnp.where(scored, nll[back], 0.0)
    if gradient is not None:
        gradient = jnp.where(scored[:, None], gradient[back], 0.0).astype(hidden.dtype)
    return nll, gradient


def _whole_block(
    x: FlatHidden, embedding: HeadTable, y: FlatTokens, out: DTypeLike, cap: float | None, with_gradient: bool
) -> tuple[FlatLosses, FlatHidden | None]:
    """Return the losses of a block of positions and their gradients, from all of its logits [M, V]."""
    table = embedding.astype(x.dtype)

    def losses(x: FlatHidden) -> FlatLosses:
        logits = capped(jnp.einsum("md,vd->mv", x, table, preferred_element_type=out), cap)
        return optax.losses.softmax_cross_entropy_with_integer_labels(logits, y)

    if not with_gradient:
        return losses(x), None
    nll, pull = jax.vjp(losses, x)
    return nll, pull(jnp.ones_like(nll))[0]


def _tiled_block(
    x: FlatHidden, embedding: HeadTable, y: FlatTokens, out: DTypeLike, cap: float | None, with_gradient: bool
) -> tuple[FlatLosses, FlatHidden | None]:
    """Return what `_whole_block` does, from tiles of logits, [M, COLUMNS] each."""
    size = len(embedding)
    tiles = -(-size // COLUMNS)

    def tile(carry: tuple, number: ScalarInt) -> tuple[tuple, None]:
        top, total, rounded_total, mean = carry
        # The last tile begins early enough to be whole, and leaves out what the one before has had.
        start = jnp.minimum(number * COLUMNS, size - COLUMNS)
        table = jax.lax.dynamic_slice_in_dim(embedding, start, COLUMNS).astype(x.dtype)
        logits = capped(jnp.einsum("md,vd->mv", x, table, preferred_element_type=out), cap)
        slope = _slope(logits, cap)
        if size % COLUMNS:
            logits = jnp.where(start + jnp.arange(COLUMNS) >= number * COLUMNS, logits, -jnp.inf)
        highest = jnp.maximum(top, logits.max(axis=1))
        fade, weights = jnp.exp(top - highest), jnp.exp(logits - highest[:, None])
        total = total * fade + weights.sum(axis=1)
        if with_gradient:
            # The mean divides by the sum of the weights as rounded, so that it is one of embeddings whatever the type.
            weights = weights.astype(x.dtype)
            rounded_total = rounded_total * fade + weights.sum(axis=1, dtype=out)
            if slope is not None:
                weights = (weights * slope).astype(x.dtype)
            mean = mean * fade[:, None] + jnp.einsum("mv,vd->md", weights, table, preferred_element_type=out)
        return (highest, total, rounded_total, mean), None

    zeros = jnp.zeros(len(x), out)
    start = (jnp.full(len(x), -jnp.inf, out), zeros, zeros, jnp.zeros(x.shape, out))
    (top, total, rounded_total, mean), _ = jax.lax.scan(tile, start, jnp.arange(tiles))
    own = embedding[y].astype(x.dtype)
    logits = capped(jnp.einsum("md,md->m", x, own, preferred_element_type=out), cap)
    nll, slope = jnp.log(total) + top - logits, _slope(logits, cap)
    if slope is not None:
        own = own * slope[:, None]
    return nll, (mean / rounded_total[:, None] - own).astype(x.dtype) if with_gradient else None


def _slope(logits: AnyFloat, cap: float | None) -> AnyFloat | None:
    """Return the derivative of capped logits with respect to what they were before; None where none are capped."""
    return None if cap is None else 1.0 - jnp.square(logits / cap)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def token_losses(
    hidden: FlatHidden, embedding: HeadTable, targets: FlatTokens, scored: FlatMask, cap: float | None = None
) -> FlatLosses:
    """Return the cross-entropy of targets under the output head.

    The gradient with respect to hidden is computed with the loss, so that the backward pass repeats no product with
    the vocabulary.

    Args:
        hidden: normed hidden states, [M, D].
        embedding: the head's table, [V, D]; frozen, it gets no gradient.
        targets: token ids, [M].
        scored: which of them are learned, [M].
        cap: where logits are capped softly; None: nowhere.

    Returns:
        Nats, [M]; 0 where `scored` is False.
    """
    return _chunked(hidden, embedding, targets, scored, cap, with_gradient=False)[0]


def _forward(
    hidden: FlatHidden, embedding: HeadTable, targets: FlatTokens, scored: FlatMask, cap: float | None = None
) -> tuple[FlatLosses, FlatHidden | None]:
    return _chunked(hidden, embedding, targets, scored, cap, with_gradient=True)


def _backward(cap: float | None, gradient: FlatHidden, cotangent: FlatLosses) -> tuple[FlatHidden, None, None, None]:
    return (cotangent[:, None] * gradient).astype(gradient.dtype), None, None, None


token_losses.defvjp(_forward, _backward)


def answer_losses(
    hidden: Hidden, embedding: HeadTable, tokens: Tokens, answer_mask: AnswerMask, cap: float | None = None
) -> Losses:
    """Return the losses of learned tokens, each predicted from the position before it.

    Args:
        hidden: normed hidden states, [B, T, D].
        embedding: the head's table, [V, D].
        tokens: token ids, [B, T].
        answer_mask: which of them are learned, [B, T].
        cap: where logits are capped softly, as for `token_losses`.

    Returns:
        Nats, [B, T]; 0 where nothing is learned.
    """
    x, y, scored = hidden[:, :-1], tokens[:, 1:], answer_mask[:, 1:]
    nll = token_losses(x.reshape(-1, x.shape[-1]), embedding, y.reshape(-1), scored.reshape(-1), cap)
    return jnp.pad(nll.reshape(y.shape), ((0, 0), (1, 0)))
