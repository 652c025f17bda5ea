"""Streams between layers against the naive decoder, token by token; and which positions a link reaches."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sst_jax.errors import InputError
from sst_jax.model import decoder, links, rules
from sst_jax.model.config import ModelConfig
from tests.support import naive, toys

FREE = {"alpha_range": (0.0, 1.0)}
# Recirculation (arXiv 2608.17981) as a stream.
RECIRCULATION = {
    "links": ((2, 0),), "timing": "same", "site": "output", "state": "block", "norm": "match", "alpha": 0.15,
    "ramp": 10, "readout": "first",
}  # fmt: skip
# (fields, backbone, depth): late to early, early to late, several at once; every value of every option.
CASES = {
    "next": ({**FREE, "links": ((3, 1),)}, toys.SHALLOW, 1),
    "inside": ({**FREE, "links": ((2, 1),), "kv": "first"}, toys.SHALLOW, 2),
    "both": ({**FREE, "links": ((2, 0), (3, 1)), "state": "block", "site": "output"}, toys.SHALLOW, 2),
    "same": ({**FREE, "links": ((3, 0),), "timing": "same", "norm": "rms", "kv": "first"}, toys.SHALLOW, 3),
    "recirculation": (RECIRCULATION, toys.SHALLOW, 2),
    "recirculation-llama": ({**RECIRCULATION, "readout": "last", "initial": "skip_bos"}, toys.LLAMA, 3),
    "first": ({**FREE, "links": ((2, 1), (0, 2)), "timing": "next", "readout": "first", "ramp": 3}, toys.LLAMA, 2),
    "tanh": ({"gate": "tanh", "links": ((2, 0), (2, 2)), "initial": "own", "learn_gain": True}, toys.LLAMA, 2),
}
LENGTH = 12  # positions, two windows


def text(length=LENGTH, seed=0):
    tokens = toys.tokens(length, seed=seed)
    tokens[[0, length // 2]] = toys.BOS
    return tokens


def oracle(config, params, tokens, depth):
    return naive.hidden(
        config, jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params), tokens, depth, toys.BOS
    )


def apart(got, expected):
    return np.linalg.norm(np.asarray(got, np.float64) - expected) / np.linalg.norm(expected)


@pytest.mark.fast_cases(3)
@pytest.mark.parametrize("name", CASES)
def test_exact_is_the_naive_recurrence(name, float64):
    """And passes of the whole stack end there, after one more than there are steps."""
    fields, backbone, depth = CASES[name]
    config, tokens = toys.config(fields, backbone), text()
    params = toys.params(config, "float64")
    truth = oracle(config, params, tokens, depth)
    exact = toys.hidden_in_float64(config, params, tokens[None], forward="exact", depth=depth)[0]
    assert apart(exact, truth) <= 1e-11
    passes = LENGTH * depth + 1
    swept = toys.hidden_in_float64(config, params, tokens[None], forward="k_pass", passes=passes, depth=depth)[0]
    assert apart(swept, truth) <= 1e-11
    assert apart(oracle(toys.config(None, backbone), params, tokens, 1), truth) > 0.003  # the link matters


def scans(jaxpr, above=()):
    """Yield the lengths of every scan of a program, from the outermost one on."""
    for equation in jaxpr.eqns:
        inside = (*above, equation.params["length"]) if equation.primitive.name == "scan" else above
        if equation.primitive.name == "scan":
            yield inside
        for part in jax.tree.leaves(list(equation.params.values())):
            inner = getattr(part, "jaxpr", part)
            if hasattr(inner, "eqns"):
                yield from scans(inner, inside)


def test_exact_runs_the_layers_between_a_link_s_ends_alone_step_by_step():
    """Of four layers two at each of 24 steps; the one below and the one above once, at all steps together."""
    fields, backbone, depth = CASES["inside"]
    config = toys.config(fields, backbone)
    program = jax.make_jaxpr(lambda params: rules.hidden(config, params, text()[None], forward="exact", depth=depth))
    found = list(scans(program(toys.params(config)).jaxpr))
    assert found.count((1,)) == 3  # the third is of chunks of steps
    assert {np.prod(lengths) for lengths in found if lengths[-1] == 2} == {2 * LENGTH * depth}
    assert all(backbone.num_layers not in lengths for lengths in found)


def test_passes_of_a_prompt_go_through_the_layers_between_a_link_s_ends_alone():
    """The two of four in the first pass and in the loop of the others; the one below and the one above once."""
    fields, backbone, depth = CASES["inside"]
    config = toys.config(fields, backbone)
    context = decoder.row_context(config, text()[None], depth=depth)
    program = jax.make_jaxpr(lambda params: links.fixed_point_stack(params, text()[None], context, cap=9).x)
    assert sorted(scans(program(toys.params(config)).jaxpr)) == [(1,), (1,), (2,), (2,)]


@pytest.mark.parametrize("name", ["both", "recirculation-llama"])
def test_float32_stays_within_a_hundred_thousandth(name):
    fields, backbone, depth = CASES[name]
    config, tokens = toys.config(fields, backbone), text()
    params = toys.params(config)
    exact = rules.hidden(config, params, tokens[None], forward="exact", depth=depth)[0]
    assert apart(exact, oracle(config, params, tokens, depth)) <= 1e-5


def test_documents_do_not_meet(float64):
    """Packed between padding, each document is what the naive decoder makes of it alone; by passes too."""
    config = toys.config({**FREE, "links": ((2, 0),), "state": "block"}, toys.LLAMA)
    params = toys.params(config, "float64")
    segments = np.repeat([0, 1, 2, 0], [1, 5, 6, 2])[None]
    tokens = toys.tokens(*segments.shape)
    for forward, passes in (("exact", 2), ("k_pass", 30)):
        out = toys.hidden_in_float64(
            config, params, tokens, forward=forward, passes=passes, depth=2, segment_ids=segments
        )
        for document in (1, 2):
            inside = segments == document
            assert apart(np.asarray(out)[inside], oracle(config, params, tokens[inside], 2)) <= 1e-11, forward


def test_a_link_from_a_layer_to_itself_is_the_stream_as_it_was():
    """Links of some layers to themselves are bit for bit `layers`."""
    own, pairs = (0, 2), ((0, 0), (2, 2))
    plain, linked = (
        toys.config({"state": "block", **named}, toys.SHALLOW) for named in ({"layers": own}, {"links": pairs})
    )
    params, tokens = toys.params(plain), toys.tokens(2, 10)
    for forward in ("local", "exact"):
        here, there = (rules.hidden(config, params, tokens, forward=forward) for config in (plain, linked))
        assert np.array_equal(here, there), forward


@pytest.mark.optimised
@pytest.mark.parametrize("forward", ["two_pass", "exact"])
def test_alpha_0_is_the_plain_backbone_bit_for_bit(forward):
    """Fixed at 0, and learned at 0 by a gate, where the same program with another alpha is not plain."""
    off = toys.config(None, toys.LLAMA)
    params, tokens = toys.params(off), toys.tokens(2, 10)
    plain = rules.logits(off, params, tokens, forward="plain")
    fixed = toys.config({"alpha": 0.0, "links": ((2, 0),), "norm": "match"}, toys.LLAMA)
    assert np.array_equal(plain, rules.logits(fixed, params, tokens, forward=forward))
    gated = toys.config({"gate": "tanh", "links": ((2, 0),), "norm": "match"}, toys.LLAMA)
    fresh = {**params, "blend": decoder.init_blend(gated, jax.random.key(0))}
    assert np.array_equal(fresh["blend"]["theta"], np.zeros_like(fresh["blend"]["theta"]))
    opened = {**params, "blend": {"theta": jnp.full_like(fresh["blend"]["theta"], 0.1)}}
    at_0 = rules.logits(gated, fresh, tokens, forward=forward)
    # A step at a time attends in products of other shapes, whose sums round otherwise.
    assert np.allclose(plain, at_0, atol=0.0 if forward == "two_pass" else 1e-4, rtol=0)
    assert np.abs(plain - rules.logits(gated, opened, tokens, forward=forward)).max() > 1e-2


REACH = [  # timing, depth, readout -> the positions whose logits move when the source's state at position 4 does
    ("both", 1, "last", [5, 6, 7]),
    ("next", 1, "last", [5, 6, 7]),
    ("same", 1, "last", []),
    ("both", 2, "last", [4, 5, 6, 7]),
    ("both", 2, "first", [5, 6, 7]),
    ("next", 2, "first", [5]),
    ("next", 2, "last", []),
    ("same", 2, "last", [4, 5, 6, 7]),
    ("same", 2, "first", [5, 6, 7]),
]


@pytest.mark.parametrize(("timing", "depth", "readout", "reached"), REACH)
def test_a_state_enters_where_the_timing_says(timing, depth, readout, reached, float64):
    """Position 4's source state is moved after its first iteration: who reads it?

    Under "same" it enters position 4's second iteration, whose keys later positions see; with readout="first" position
    4's own logits were given before. Under "next" it is moved after the last iteration, which position 5's first one
    reads; position 5's second reads nothing, and overwrites its keys and state, so that there the reach ends.
    """
    fields = {"links": ((2, 0),), "alpha": 0.3, "timing": timing, "readout": readout, "state": "block"}
    config = toys.in_float64(toys.config(fields, toys.LLAMA))
    params, tokens = toys.params(config, "float64"), toys.tokens(1, 8)
    step = 4 * depth + (depth - 1 if timing == "next" else 0)

    def hidden(size):
        def moved(entering):  # [L, B, S, D] as they enter: one step later
            return entering.at[0, :, min(step + 1, entering.shape[2] - 1)].add(size)

        context = decoder.row_context(config, tokens, depth=depth)
        settled = links.fixed_point_stack(params, tokens, context, cap=8 * depth + 1, intervene=moved)
        return decoder.read_out(config, params, settled.x, depth)[0, :, 0]

    still, moved = toys.quick_jit(hidden)(0.0), toys.quick_jit(hidden)(1.0)
    changed = np.flatnonzero(np.abs(np.asarray(moved - still)).max(axis=-1) > 1e-9).tolist()
    assert changed == reached


def test_local_is_refused_by_name():
    config = toys.config({"links": ((2, 0),)}, toys.LLAMA)
    with pytest.raises(InputError, match=r"local.*links.*k_pass or exact"):
        rules.hidden(config, toys.params(config), toys.tokens(1, 4), forward="local")


def test_links_beyond_the_backbone_are_named():
    with pytest.raises(InputError, match=r"stream.links names layer 3; the backbone has layers 0 to 2"):
        toys.config({"links": ((3, 0),)}, toys.LLAMA)
    assert ModelConfig.from_dict(toys.config(RECIRCULATION, toys.LLAMA).to_dict()).stream.links == ((2, 0),)


@pytest.mark.parametrize("forward", ["k_pass", "exact"])
def test_gradients_are_finite_differences(forward, float64):
    backbone = dataclasses.replace(toys.LLAMA, num_layers=2, layer_types=())
    config = toys.config({**FREE, "links": ((1, 0),), "state": "block", "norm": "match"}, backbone)
    params, tokens = toys.params(config, "float64"), toys.tokens(1, 5)
    weights = np.random.default_rng(1).standard_normal((5, backbone.d_model))

    def loss(blend):
        out = rules.hidden(toys.in_float64(config), {**params, "blend": blend}, tokens, forward=forward, remat="layer")
        return (out[0] * weights).sum()

    function = toys.quick_jit(jax.value_and_grad(loss))
    gradient = function(params["blend"])[1]["theta"]
    direction = jnp.asarray(np.random.default_rng(2).standard_normal(gradient.shape))
    ahead, behind = (function({"theta": params["blend"]["theta"] + by * direction})[0] for by in (1e-5, -1e-5))
    assert abs(jnp.vdot(gradient, direction) / ((ahead - behind) / 2e-5) - 1) <= 1e-6
    assert np.array_equal(gradient[1], np.zeros_like(gradient[1]))  # no link leads to layer 1
