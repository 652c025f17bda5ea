"""LoRA in a walk from position to position: its gradients are collected, and computed a chunk of positions at a time.

Each position would add to every factor's gradient in float32: a product of few rows, which reads and writes the whole
gradient. So the step leaves what these products read, a linear's input and its output's cotangent, and a chunk makes
one product of all its positions.

They leave the step as the gradient of a `Ticket`: zeros that enter the step, and that nothing reads. Each is entered
once, or gradients would be added up that belong side by side.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sst_jax.model.quantization.nf4_product import LowRank, up_transposed
from sst_jax.types import AnyFloat


class Pair(NamedTuple):
    """The LoRA factors of a linear as they are trained, and what their product is multiplied by."""

    a: AnyFloat
    b: AnyFloat
    scale: float


class Ticket(NamedTuple):
    """Zeros in the shape of what linears of one input see, [..., in], and of their outputs' cotangents, [..., out]."""

    inputs: AnyFloat
    cotangents: AnyFloat


class Walked(NamedTuple):
    """LoRA of linears of one input in a step: side by side as it multiplies, and where its gradient is left."""

    factors: LowRank
    ticket: Ticket


class Taken(NamedTuple):
    """One position of a chunk's arrays, read where the chunk has it, as often as a gradient wants it.

    A slice that a scan makes would be kept for its gradient once more, at every position.

    whole    arrays [steps, B, ...]: constants
    at       the position
    ticket   where the gradient of the one array is left, [B, ...]; None: there is none
    """

    whole: Any
    at: jax.Array
    ticket: AnyFloat | None = None

    def here(self) -> Any:
        """Return the position's arrays, [B, 1, ...]."""
        one = jax.tree.map(lambda part: jax.lax.dynamic_index_in_dim(part, self.at, keepdims=False), self.whole)
        one = one if self.ticket is None else leave(one, self.ticket)
        return jax.tree.map(lambda part: part[:, None], one)


def here(value: Any) -> Any:
    """Return what is taken, or the value where it is at hand."""
    return value.here() if isinstance(value, Taken) else value


@jax.custom_vjp
def enter(x: AnyFloat, ticket: AnyFloat) -> AnyFloat:
    """Return x, whose value is left as the ticket's gradient."""
    return x


def _enter_forward(x: AnyFloat, ticket: AnyFloat) -> tuple[AnyFloat, AnyFloat]:
    return x, x


def _enter_backward(x: AnyFloat, dx: AnyFloat) -> tuple[AnyFloat, AnyFloat]:
    return dx, x


enter.defvjp(_enter_forward, _enter_backward)


@jax.custom_vjp
def leave(y: AnyFloat, ticket: AnyFloat) -> AnyFloat:
    """Return y, whose cotangent is left as the ticket's gradient."""
    return y


def _leave_forward(y: AnyFloat, ticket: AnyFloat) -> tuple[AnyFloat, None]:
    return y, None


def _leave_backward(_: None, dy: AnyFloat) -> tuple[AnyFloat, AnyFloat]:
    return dy, dy


leave.defvjp(_leave_forward, _leave_backward)


def side_by_side(pairs: tuple[Pair, ...], narrow: tuple[tuple[AnyFloat, AnyFloat], ...], rank: int) -> LowRank:
    """Return the factors of linears of one input, cast already, as one product takes them.

    Args:
      pairs: of the linears, for their scales.
      narrow: A and B of each, cast.
      rank: R of `LowRank`, at least that of the factors.
    """
    down = [jnp.pad(a, ((0, 0), (0, rank - a.shape[1]))) for a, _ in narrow]
    scaled = [b if pair.scale == 1.0 else b * pair.scale for pair, (_, b) in zip(pairs, narrow, strict=True)]
    up = [jnp.pad(b, ((0, rank - b.shape[0]), (0, 0))) for b in scaled]
    return jax.lax.stop_gradient(LowRank(jnp.concatenate(down, axis=1), jnp.concatenate(up, axis=1)))


def tickets(pairs: tuple[Pair, ...], factors: LowRank, shape: tuple[int, ...]) -> Ticket:
    """Return a ticket for every step of a chunk; what is left there becomes the gradient of the pairs.

    Args:
      pairs: of linears of one input.
      factors: the same, as `side_by_side` returns them.
      shape: in front of inputs and outputs: (steps, rows).
    """
    values = tuple((pair.a, pair.b) for pair in pairs)
    return _tickets(values, factors, tuple(pair.scale for pair in pairs), shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _tickets(values: tuple, factors: LowRank, scales: tuple[float, ...], shape: tuple[int, ...]) -> Ticket:
    down, up = factors
    return Ticket(jnp.zeros((*shape, len(down)), down.dtype), jnp.zeros((*shape, up.shape[1]), up.dtype))


def _tickets_forward(values: tuple, factors: LowRank, scales: tuple[float, ...], shape: tuple[int, ...]) -> tuple:
    return _tickets(values, factors, scales, shape), (values, factors)


def _tickets_backward(scales: tuple[float, ...], shape: tuple[int, ...], saved: tuple, left: Ticket) -> tuple:
    values, factors = saved
    z, dy = (part.reshape(-1, part.shape[-1]) for part in left)
    outputs, count = [b.shape[1] for _, b in values], len(values)
    low, dlow = (z @ factors.down).reshape(len(z), count, -1), up_transposed(dy, factors.up, outputs)
    wide: dict[str, Any] = {"preferred_element_type": values[0][0].dtype}
    da = jnp.einsum("mi,gmr->gir", z, dlow, **wide)
    if len(set(outputs)) == 1:  # as there
        db = list(jnp.einsum("mgr,mgn->grn", low, dy.reshape(len(dy), count, -1), **wide))
    else:
        parts = jnp.split(dy, np.cumsum(outputs)[:-1], axis=1)
        db = [jnp.einsum("mr,mn->rn", low[:, place], part, **wide) for place, part in enumerate(parts)]
    gradients = tuple(
        (da[place, :, : a.shape[1]], scales[place] * db[place][: a.shape[1]]) for place, (a, _) in enumerate(values)
    )
    return gradients, None


_tickets.defvjp(_tickets_forward, _tickets_backward)
