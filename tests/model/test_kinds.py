"""Stacks by kind of layer, and what else Gemma 4's block has: against loops, and against the naive decoder."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sst_jax.errors import InputError
from sst_jax.inference.kv_cache import bytes_per_sequence, init_cache
from sst_jax.inference.prefill import prefill
from sst_jax.model import decoder, kinds, rules
from sst_jax.model.kinds import ByKind
from sst_jax.model.quantization import storages
from tests.support import naive, toys

FREE = {"alpha_range": (0.0, 1.0)}
LENGTH = 9  # longer than the window


@pytest.mark.parametrize(
    "types", ["LLGLLG", "LGLLG", "GLL", "LL", "GG", "LGLG", "GLLGLLG"], ids=lambda types: f"{len(types)} {types}"
)
def test_a_scan_over_periods_is_a_loop_over_layers(types):
    names = ["global" if kind == "G" else "local" for kind in types]
    rng, size = np.random.default_rng(0), {"local": 2, "global": 3}
    own = {kind: rng.standard_normal((names.count(kind), size[kind])) for kind in dict.fromkeys(names)}
    shared = {"every": rng.standard_normal((len(names), 4)), "mine": ByKind(own.get("local"), own.get("global"))}

    def body(kind):
        def one(carry, slices):
            mine, ours = slices
            left = {"number": ours["every"] + carry, "kv": ByKind.of(kind, mine * carry), "none": None}
            return carry * 0.9 + mine.sum() + (mine * ours["mine"]).sum(), left

        return one

    start = jnp.asarray(0.7)
    bodies = {kind: body(kind) for kind in own}
    carry, left = jax.jit(lambda: kinds.scan_kinds(names, bodies, own, shared, start))()
    at, expected, numbers, kv = dict.fromkeys(own, 0), start, [], {kind: [] for kind in own}
    for layer, kind in enumerate(names):
        mine = own[kind][at[kind]]
        at[kind] += 1
        expected, one = bodies[kind](expected, (mine, {"every": shared["every"][layer], "mine": mine}))
        numbers.append(one["number"])
        kv[kind].append(one["kv"].get(kind))
    np.testing.assert_allclose(carry, expected, rtol=1e-6)
    np.testing.assert_allclose(left["number"], np.stack(numbers), rtol=1e-5)
    for kind in ("local", "global"):
        found = left["kv"].get(kind)
        assert (found is None) == (kind not in kv)
        if kind in kv:
            np.testing.assert_allclose(found, np.stack(kv[kind]), rtol=1e-5)


def test_periods_are_the_shortest_and_no_stack_is_cut_where_each_kind_has_one_run():
    types = (("local",) * 5 + ("global",)) * 10
    assert kinds.periods_of(types) == (10, (kinds.Run("local", 0, 0, 5), kinds.Run("global", 5, 0, 1)))
    assert kinds.periods_of(("local", "global", "local")) == (
        1,
        (kinds.Run("local", 0, 0, 1), kinds.Run("global", 1, 0, 1), kinds.Run("local", 2, 1, 1)),
    )


@pytest.mark.fast_cases(1)
@pytest.mark.parametrize(
    ("fields", "name", "depth"),
    [
        pytest.param({}, "exact", 2, id="exact"),
        pytest.param({"state": "block", "norm": "none", "initial": "own", "decay": 0.3}, "local", 1, id="linear carry"),
        pytest.param(
            {"state": "block", "site": "output", "norm": "match"}, "k_pass", 1, marks=pytest.mark.slow, id="output"
        ),
        pytest.param({"links": ((3, 1), (1, 2)), "state": "block"}, "exact", 2, marks=pytest.mark.slow, id="links"),
    ],
)
def test_every_forward_is_the_naive_recurrence(fields, name, depth, float64):
    config = toys.config({**FREE, **fields}, toys.GEMMA4)
    params, tokens = toys.params(config, "float64"), toys.tokens(LENGTH)
    truth = naive.hidden(config, jax.tree.map(np.asarray, params), tokens, depth)
    out = toys.hidden_in_float64(config, params, tokens[None], forward=name, passes=LENGTH + 1, depth=depth)
    assert np.abs(np.asarray(out[0]) - truth).max() <= 1e-11


_SLOW = {"marks": pytest.mark.slow}


@pytest.mark.parametrize(
    "change",
    [
        pytest.param({"values_from_keys": False}, id="values"),
        pytest.param({"v_norm": False}, id="v_norm", **_SLOW),
        pytest.param({"layer_scalar": False}, id="layer_scalar", **_SLOW),
        pytest.param({"logit_cap": None}, id="logit_cap", **_SLOW),
        pytest.param({"rope_angles_global": None}, id="angles", **_SLOW),
        pytest.param({"global_num_kv_heads": None}, id="heads", **_SLOW),
        pytest.param({"global_head_dim": None, "global_num_kv_heads": None, "values_from_keys": False}, id="one stack"),
    ],
)
def test_each_fact_is_computed_on_its_own(change, float64):
    """One at a time turned off, against the naive reading of the same mixture."""
    layers = {"num_layers": 2, "layer_types": ("local", "global")}
    config = toys.config(None, dataclasses.replace(toys.GEMMA4, **layers, **change))
    params, tokens = toys.params(config, "float64"), toys.tokens(LENGTH)
    truth = naive.logits(config, jax.tree.map(np.asarray, params), tokens)
    logits = toys.quick_jit(functools.partial(rules.logits, forward="plain"), "config")
    assert np.abs(np.asarray(logits(toys.in_float64(config), params, tokens[None])[0]) - truth).max() <= 1e-11


@pytest.mark.slow
@pytest.mark.parametrize("fields", [{}, {"state": "block", "norm": "none"}], ids=["ffn", "linear carry"])
def test_the_error_of_two_passes_falls_with_alpha_squared(fields, float64):
    config = toys.config({**FREE, "granularity": "scalar", **fields}, toys.GEMMA4)
    slope = toys.two_pass_slope(config, toys.params(config, "float64"), toys.tokens(1, 32))
    print(f"{fields}: slope {slope:.3f}")
    assert abs(slope - 2.0) <= 0.1


@pytest.mark.slow
def test_gradients_are_finite_differences(float64):
    """Of LoRA in both kinds of layers and of the blend, recomputed, through a linear carry with a scalar in it."""
    config = toys.config({**FREE, "state": "block", "norm": "none"}, toys.GEMMA4)
    params, tokens = toys.params(config, "float64"), toys.tokens(1, 8)
    base, trainable = params["base"], {name: params[name] for name in ("adapter", "blend")}
    weights = np.random.default_rng(1).standard_normal((8, config.backbone.d_model))

    @toys.quick_jit
    @jax.value_and_grad
    def loss(trainable):
        mine = {"base": base, **trainable}
        out = rules.hidden(toys.in_float64(config), mine, tokens, forward="two_pass", remat="layer")
        return (out[0] * weights).sum()

    _, gradient = loss(trainable)
    assert all(float(jnp.abs(leaf).max()) > 0 for leaf in jax.tree.leaves(gradient))
    assert {"q", "global_q", "global_down"} <= set(gradient["adapter"])
    assert "global_v" not in gradient["adapter"]
    rng, size = np.random.default_rng(2), 1e-7
    way = jax.tree.map(lambda leaf: jnp.asarray(rng.standard_normal(leaf.shape)), trainable)

    def moved(size):
        return loss(jax.tree.map(lambda leaf, step: leaf + size * step, trainable, way))[0]

    ahead, behind = moved(size), moved(-size)
    along = sum(jax.tree.leaves(jax.tree.map(lambda a, b: (a * b).sum(), gradient, way)))
    assert float((ahead - behind) / (2 * size)) == pytest.approx(float(along), rel=1e-6)


@pytest.mark.slow
def test_caches_have_each_kinds_heads_and_a_prompt_fills_them_as_decoding_does(float64):
    config = dataclasses.replace(toys.config({**FREE}, toys.GEMMA4), dtype="float64")
    params, tokens = toys.params(config, "float64"), toys.tokens(1, 16)
    cache = init_cache(config, 3, 40)
    assert cache.kv.local_k.shape == (2, 3, 6, 2, 10)
    assert cache.kv.global_v.shape == (2, 3, 40, 1, 14)
    sizes = bytes_per_sequence(config, 40)
    assert (sizes["local"], sizes["global"]) == (2 * 2 * 6 * 20 * 8, 2 * 2 * 40 * 14 * 8)
    found = {}
    for how in ("sweeps", "sequential"):
        mine = dataclasses.replace(
            config, stream=dataclasses.replace(config.stream, prefill=how, sweep_tolerance=1e-12)
        )
        found[how] = prefill(mine, params, tokens, np.array([13]), capacity=16, chunk=8)
    for one, other in zip(*map(jax.tree.leaves, found.values()), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-9)
    truth = naive.hidden(config, jax.tree.map(np.asarray, params), tokens[0, :13])
    assert np.abs(np.asarray(found["sequential"][0][0]) - truth[-1]).max() <= 1e-9


@pytest.mark.slow
def test_nf4_holds_the_linears_of_both_kinds():
    """And a layer finds its own numbers in its stack: as kernels that were dequantised beforehand give."""
    shapes = {"d_model": 64, "d_ff": 64, "num_heads": 2, "num_kv_heads": 1, "head_dim": 32, "global_head_dim": 64}
    backbone = dataclasses.replace(toys.GEMMA4, **shapes)
    config = toys.config(FREE, backbone)
    params, tokens = toys.params(config), toys.tokens(1, LENGTH)
    layers = storages.quantise_layers(params["base"]["layers"])
    assert {name for name, leaf in layers.items() if storages.is_quantised(leaf)} == set(backbone.linear_shapes)
    plain = storages.dequantise(layers, jnp.float32)
    one, other = (
        rules.logits(config, {**params, "base": {**params["base"], "layers": tree}}, tokens, forward="local")
        for tree in (layers, plain)
    )
    np.testing.assert_allclose(one, other, atol=1e-5)
    assert np.abs(one).max() <= backbone.logit_cap


def test_parameters_are_counted_and_the_blend_is_in_the_layers_order():
    config = toys.config(FREE, toys.GEMMA4)
    params = decoder.abstract_params(config)
    assert sum(leaf.size for leaf in jax.tree.leaves(params["base"])) == toys.GEMMA4.num_params
    assert params["blend"]["theta"].shape == (4, toys.GEMMA4.d_model)
    assert params["base"]["layers"]["global_layer_scalar"]["scale"].shape == (2, 1)
    stacks = {"local": {"x": jnp.array([0, 1, 3])}, "global": {"x": jnp.array([2, 4])}}
    types = ("local", "local", "global", "local", "global")
    assert kinds.in_order(types, stacks)["x"].tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"global_head_dim": None}, "global_num_kv_heads=1 needs global_head_dim"),
        ({"global_head_dim": 15}, "global_head_dim=15 must be even"),
        ({"global_num_kv_heads": 4}, "multiple of global_num_kv_heads=4"),
        ({"rope_angles_global": 8}, "rope_angles_global=8 must be at most 7"),
        ({"logit_cap": 0.0}, "logit_cap=0.0 must be positive"),
    ],
)
def test_what_does_not_fit_is_named(change, words):
    with pytest.raises(InputError, match=words):
        dataclasses.replace(toys.GEMMA4, **change)
