"""LoRA's gradients in a walk, collected a chunk at a time: what each position would have added up, and no other."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sst_jax.model.collected import Pair, Taken, enter, leave, side_by_side, tickets
from sst_jax.model.loops import over_chunks

STEPS, ROWS, INPUTS, OUTPUTS, RANK = 11, 2, 6, (5, 7), 3


@pytest.fixture
def problem(float64):
    rng = np.random.default_rng(0)
    pairs = tuple(
        Pair(jnp.asarray(rng.standard_normal((INPUTS, RANK))), jnp.asarray(rng.standard_normal((RANK, each))), scale)
        for each, scale in zip(OUTPUTS, (1.0, 0.5), strict=True)
    )
    back = jnp.asarray(rng.standard_normal((sum(OUTPUTS), INPUTS)) * 0.1)
    return pairs, back, jnp.asarray(rng.standard_normal((ROWS, STEPS, INPUTS)))


def walk(problem, adapted, own):
    """A recurrence through linears of one input, in chunks of which the last is padded."""
    _, back, xs = problem

    def through(m, part):
        def step(m, both):
            x, ticket = both
            m = jnp.tanh(adapted(x + m, ticket) @ back)
            return m, m

        return jax.lax.scan(step, m, (part, own(len(part))))

    return jnp.sin(over_chunks(through, jnp.zeros((ROWS, INPUTS)), xs, chunk=4, recompute=True)).sum()


def test_the_gradient_of_a_walk_is_what_its_positions_add_up(problem):
    pairs, back, xs = problem

    def plain(values, xs):
        def adapted(x, _):
            return jnp.concatenate([x @ a @ b * pair.scale for (a, b), pair in zip(values, pairs, strict=True)], -1)

        return walk((pairs, back, xs), adapted, lambda steps: jnp.zeros(steps))

    def collected(values, xs):
        own = tuple(Pair(a, b, pair.scale) for (a, b), pair in zip(values, pairs, strict=True))
        factors = side_by_side(own, values, 4)  # a rank that is filled up

        def adapted(x, ticket):
            x = enter(x, ticket.inputs)
            low = jnp.split(x @ factors.down, 2, axis=-1)
            up = jnp.split(factors.up, [OUTPUTS[0]], axis=-1)
            return leave(jnp.concatenate([z @ b for z, b in zip(low, up, strict=True)], -1), ticket.cotangents)

        return walk((pairs, back, xs), adapted, lambda steps: tickets(own, factors, (steps, ROWS)))

    values = tuple((pair.a, pair.b) for pair in pairs)
    (ours, our_gradient), (theirs, their_gradient) = (
        jax.jit(jax.value_and_grad(one, argnums=(0, 1)))(values, xs) for one in (collected, plain)
    )
    assert abs(ours - theirs) <= 1e-12
    for mine, reference in zip(jax.tree.leaves(our_gradient), jax.tree.leaves(their_gradient), strict=True):
        assert np.abs(reference).max() > 0.01
        assert np.abs(mine - reference).max() <= 1e-12


def test_a_position_that_is_taken_has_its_gradient_and_no_slice_is_kept(float64):
    h = jnp.asarray(np.random.default_rng(1).standard_normal((5, 2, 3)))

    def loss(h, taken):
        def step(m, own):
            at, x = own
            one = jax.checkpoint(lambda m, at, x: jnp.tanh(m + Taken(constant, at, x).here()[:, 0]), prevent_cse=False)
            m = one(m, at, x) if taken else jnp.tanh(m + x)
            return m, m

        constant = jax.lax.stop_gradient(h)
        return (jax.lax.scan(step, jnp.zeros(h.shape[1:]), (jnp.arange(len(h)), h))[1] ** 2).sum()

    ours, theirs = (jax.grad(loss)(h, taken) for taken in (True, False))
    assert np.abs(ours - theirs).max() <= 1e-14
    _, pull = jax.vjp(lambda h: loss(h, True), h)
    shapes = [np.shape(leaf) for leaf in jax.tree.leaves(pull)]
    assert shapes.count(h.shape) == 3  # the chunk itself, the carries, and what leaves the steps
