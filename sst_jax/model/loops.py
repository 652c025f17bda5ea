"""Two loops that know nothing of the stream: a scan in chunks, and an iteration to a fixed point."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from sst_jax.types import Scalar, ScalarBool, ScalarInt

SLOW = 0.7  # of the distance before: what still converges falls faster, by three or more times in all that was seen

Carry = TypeVar("Carry")
Inputs = TypeVar("Inputs")
Outputs = TypeVar("Outputs")


def chunked_scan(
    step: Callable[[Carry, Inputs], tuple[Carry, Outputs]],
    init: Carry,
    xs: Inputs,
    *,
    chunk: int,
    recompute: bool = False,
    name: str | None = None,
) -> Outputs:
    """Scan over axis 1 of arrays, chunk after chunk.

    Args:
      step: (carry, x) -> (carry, y), as for `jax.lax.scan`; x and y are without the scanned axis.
      init, xs, chunk, recompute, name: as for `over_chunks`.

    Returns:
      The y of all steps, as `over_chunks`.
    """

    def through(carry: Carry, part: Inputs) -> tuple[Carry, Outputs]:
        return jax.lax.scan(step, carry, part)

    return over_chunks(through, init, xs, chunk=chunk, recompute=recompute, name=name)


def over_chunks(
    through: Callable[[Carry, Inputs], tuple[Carry, Outputs]],
    init: Carry,
    xs: Inputs,
    *,
    chunk: int,
    recompute: bool = False,
    name: str | None = None,
) -> Outputs:
    """Go through arrays along axis 1, chunk after chunk.

    Args:
      through: (carry, the chunk's x) -> (carry, the chunk's y), the steps in front, as of one `jax.lax.scan`.
      init: the first carry.
      xs: arrays [B, steps, ...]; the last chunk is padded with zeros, whose outputs are cut off.
      chunk: steps of a chunk, at most; all chunks are of one size.
      recompute: keep only the carries between chunks for gradients, and run a chunk's steps again.
      name: under which `jax.checkpoint` policies know the carries between chunks; None: none.

    Returns:
      The y of all steps, [B, steps, ...]. The last carry has seen the padding, and is not returned.
    """
    steps = jax.tree.leaves(xs)[0].shape[1]
    size = -(-steps // -(-steps // chunk))  # chunks of about one size, so that hardly a step is padding
    padding = -steps % size

    def cut(part: jax.Array) -> jax.Array:  # [B, steps, ...] -> [chunks, size, B, ...]
        part = jnp.pad(part, ((0, 0), (0, padding), *[(0, 0)] * (part.ndim - 2)))
        return jnp.moveaxis(part, 1, 0).reshape(-1, size, part.shape[0], *part.shape[2:])

    if recompute:
        through = jax.checkpoint(through, prevent_cse=False)

    def one_chunk(carry: Carry, part: Inputs) -> tuple[Carry, Outputs]:
        return through(carry if name is None else checkpoint_name(carry, name), part)

    _, ys = jax.lax.scan(one_chunk, init, jax.tree.map(cut, xs))
    return jax.tree.map(lambda y: jnp.moveaxis(y.reshape(-1, *y.shape[2:])[:steps], 0, 1), ys)


def fixed_point(
    evaluate: Callable[[Carry], tuple[Outputs, Carry]],
    outputs: Outputs,
    s: Carry,
    *,
    distance: Callable[[Carry, Carry], Scalar],
    tolerance: float,
    cap: int,
    rounding: float = 0.0,
) -> tuple[Outputs, ScalarInt, ScalarBool]:
    """Iterate a function until what it is fed back converges. Not differentiable.

    Args:
      evaluate: s -> (outputs, next s).
      outputs, s: what a first evaluation has given, which counts as one.
      distance: (next s, s) -> how far apart they are, float32 [].
      tolerance: at or below which distance it has converged.
      cap: evaluations at most, the first included.
      rounding: the most that rounding within an evaluation can make of the distance: at or below it, a distance that
        falls by less than SLOW has converged too.

    Returns:
      The outputs of the last evaluation, how many there were (int32 []), and whether the last two agree (bool []).
    """

    def converged(carry: tuple) -> jax.Array:
        *_, change, former = carry
        return (change <= tolerance) | ((change <= rounding) & (change > SLOW * former))

    def moving(carry: tuple) -> jax.Array:
        return ~converged(carry) & (carry[0] < cap)

    def again(carry: tuple) -> tuple:
        count, _, s, former, _ = carry
        outputs, new = evaluate(s)
        return count + 1, outputs, new, distance(new, s).astype(jnp.float32), former

    never = jnp.float32(jnp.inf)
    last = jax.lax.while_loop(moving, again, (jnp.int32(1), outputs, s, never, never))
    return last[1], last[0], converged(last)
