"""The forwards: `exact` against a naive token-by-token reading of the mechanism, all others against `exact`."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sst_jax.errors import InputError
from sst_jax.model import rules
from tests.support import naive, toys

# Every pair of options once, and the linear carry with everything that it can meet.
COMBINATIONS = [
    *toys.covering(),
    {"state": "block", "decay": 0.4, "initial": "own", "alpha_range": (0.0, 1.0), "learn_gain": True, "gain": 1.3},
]


def described(fields):
    return "-".join(str(value).replace(" ", "") for name, value in fields.items() if name != "alpha_range")


def wide(config, params, tokens, name, **settings):
    """Hidden states [T, D] of one document, in float64."""
    out = toys.hidden_in_float64(config, params, tokens[None], forward=name, **settings)
    return np.asarray(out[0])


def text(length, seed=0):
    """A document with a BOS where it belongs and another one where it does not."""
    tokens = toys.tokens(length, seed=seed)
    tokens[[0, length // 2]] = toys.BOS
    return tokens


@pytest.mark.parametrize(
    "number",
    [pytest.param(number, marks=[pytest.mark.slow] if number % 3 else []) for number in range(len(COMBINATIONS))],
    ids=lambda number: described(COMBINATIONS[number]),
)
def test_every_forward_converges_to_the_naive_recurrence(number, float64):
    """After one pass more than there are steps nothing is left of the approximation, whatever the options.

    `exact` has it at once. Depths 1 and 2, k_pass and local take turns.
    """
    config = toys.config(COMBINATIONS[number])
    params = toys.params(config, "float64")
    length, depth = [(8, 1), (4, 2)][number % 2]
    approximate = ["k_pass", "local"][number // 2 % 2]
    tokens = text(length)
    numbers = jax.tree.map(np.asarray, params)
    truth = naive.hidden(config, numbers, tokens, depth, toys.BOS)
    for name, passes in (("exact", 2), (approximate, 9)):
        out = wide(config, params, tokens, name, passes=passes, depth=depth)
        assert np.abs(out - truth).max() <= 1e-11, name
    # Not for want of a stream that matters.
    assert np.abs(naive.hidden(toys.config(None), numbers, tokens) - truth).max() > 0.01


@pytest.mark.parametrize(
    ("fields", "depth"),
    [
        (None, 1),
        ({}, 1),
        ({"kv": "overwrite"}, 3),
        ({"kv": "first", "state": "block"}, 3),
        ({"initial": "skip_bos", "norm": "match", "decay": 0.4}, 3),
    ],
)
def test_exact_is_the_naive_recurrence_beyond_the_window(fields, depth, float64):
    """Over 40 positions, several windows and checkpointed chunks long."""
    config = toys.config(None if fields is None else {"alpha_range": (0.0, 1.0), **fields})
    params = toys.params(config, "float64")
    tokens = text(40)
    truth = naive.hidden(config, jax.tree.map(np.asarray, params), tokens, depth, toys.BOS)
    out = wide(config, params, tokens, "plain" if fields is None else "exact", depth=depth)
    assert np.abs(out - truth).max() <= 1e-10


@pytest.mark.parametrize("depth", [1, 2])
def test_states_are_the_naive_memories(depth, float64):
    """What `states` shows is what each layer holds after each iteration, and the last pass's where passes are few."""
    config = toys.config({"alpha_range": (0.0, 1.0), "decay": 0.4})
    params, tokens, memories = toys.params(config, "float64"), text(4), {}
    naive.hidden(config, jax.tree.map(np.asarray, params), tokens, depth, toys.BOS, memories=memories)
    layers = range(config.backbone.num_layers)
    truth = np.array([[[memories[layer, t, i] for i in range(depth)] for t in range(4)] for layer in layers])
    states = toys.quick_jit(rules.states, *rules.SETTINGS)
    for name, passes in (("exact", 2), ("local", 9)):
        out = states(toys.in_float64(config), params, tokens[None], forward=name, passes=passes, depth=depth)
        assert np.abs(np.asarray(out[:, 0]) - truth).max() <= 1e-11, name


@pytest.mark.parametrize("depth", [1, 2])
def test_exact_starts_anew_with_every_document(depth, float64):
    """Documents with padding before, between and behind are each what the naive recurrence makes of them alone."""
    config = toys.config({"alpha_range": (0.0, 1.0), "initial": "own", "decay": 0.3})
    params = toys.params(config, "float64")
    segments = np.repeat([0, 1, 2, 0, 3, 0], [3, 9, 8, 2, 7, 4])[None]
    tokens = toys.tokens(*segments.shape)
    out = toys.hidden_in_float64(config, params, tokens, forward="exact", depth=depth, segment_ids=segments)
    numbers = jax.tree.map(np.asarray, params)
    for document in (1, 2, 3):
        truth = naive.hidden(config, numbers, tokens[segments == document], depth)
        assert np.abs(np.asarray(out)[segments == document] - truth).max() <= 1e-11


ORDERS = [
    ("two_pass", 2, 2.0, 0.1, {}),
    ("two_pass", 2, 2.0, 0.1, {"state": "block", "propagate": "scan"}),
    ("two_pass", 2, 2.0, 0.1, {"state": "block", "propagate": "shift"}),
    ("k_pass", 3, 3.0, 0.2, {}),
    ("k_pass", 4, 4.0, 0.2, {}),
    ("local", 2, 2.0, 0.1, {}),
]


@pytest.mark.fast_cases(3)
@pytest.mark.parametrize(("name", "passes", "order", "within", "fields"), ORDERS)
def test_error_falls_with_alpha_to_the_power_of_the_passes(name, passes, order, within, fields, float64):
    """The slope of log error over log alpha. Alpha is a parameter here, so that one compilation serves all five."""
    config = toys.config({"alpha_range": (0.0, 1.0), "granularity": "scalar", **fields}, toys.SHALLOW)
    params, tokens = toys.params(config, "float64"), toys.tokens(32)
    alphas, errors = np.geomspace(0.003, 0.05, 5), []
    for alpha in alphas:
        mine = {**params, "blend": {"theta": jnp.full(1, np.log(alpha / (1 - alpha)))}}
        difference = wide(config, mine, tokens, name, passes=passes) - wide(config, mine, tokens, "exact")
        errors.append(np.linalg.norm(difference))
    slope = np.polyfit(np.log(alphas), np.log(errors), 1)[0]
    print(f"{name}, {passes} passes, {fields}: slope {slope:.3f}")
    assert abs(slope - order) <= within


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("name", [name for name in rules.FORWARDS if name != "plain"])
def test_every_rule_at_alpha_0_is_the_plain_backbone(name, depth, float64):
    """Alpha is learned here, so it is an argument of the compiled program, and no program can leave the stream out.

    The same program with another alpha is far from plain: the blend that alpha turns off was in it.
    """
    fields = {"norm": "match", "initial": "own", "decay": 0.3, "state": "block", "learn_gain": True, "gain": 1.3}
    off, on = toys.config(None), toys.config({"alpha_range": (0.0, 1.0), **fields})
    params, tokens = toys.params(on, "float64"), text(24)
    plain = wide(off, {**params, "blend": {}}, tokens, "plain")
    at_0 = {**params, "blend": {**params["blend"], "theta": jnp.full_like(params["blend"]["theta"], -jnp.inf)}}
    assert np.abs(wide(on, at_0, tokens, name, depth=depth) - plain).max() <= 1e-12
    assert np.abs(wide(on, params, tokens, name, depth=depth) - plain).max() > 0.1


@pytest.mark.optimised
@pytest.mark.parametrize(
    ("name", "depth", "dtype"),
    [("two_pass", 1, "float32"), ("local", 1, "bfloat16"), ("exact", 1, "float32"), ("k_pass", 2, "bfloat16")],
)
def test_alpha_fixed_at_0_is_the_plain_backbone_bit_for_bit(name, depth, dtype):
    """Passes at depth 1 run their rules; `exact` and deeper ones may be replaced by `plain`, to the same end."""
    off, on = (dataclasses.replace(toys.config(stream), dtype=dtype) for stream in (None, {"alpha": 0.0}))
    params, tokens = toys.params(off, dtype), toys.tokens(2, 24)
    plain = rules.logits(off, params, tokens, forward="plain")
    assert np.array_equal(plain, rules.logits(on, params, tokens, forward=name, depth=depth))


@pytest.mark.parametrize("name", ["two_pass", "exact"])
def test_without_a_stream_every_forward_is_plain(name):
    config = toys.config(None)
    params, tokens = toys.params(config), toys.tokens(2, 24)
    plain = rules.logits(config, params, tokens, forward="plain")
    assert np.array_equal(plain, rules.logits(config, params, tokens, forward=name))


def test_plain_leaves_the_stream_out():
    with_stream, without = toys.config({}), toys.config(None)
    params, tokens = toys.params(with_stream), toys.tokens(2, 24)
    plain = rules.logits(with_stream, params, tokens, forward="plain")
    assert np.array_equal(plain, rules.logits(without, {**params, "blend": {}}, tokens, forward="plain"))


@pytest.mark.slow
def test_all_forwards_drop_the_same_units(float64):
    """With LoRA dropout on, enough passes still end where `exact` does; the masks matter, and follow their key."""
    config = toys.config({"alpha_range": (0.0, 1.0)}, dropout=0.5)
    params, tokens = toys.params(config, "float64"), toys.tokens(8)
    key = jax.random.key(3)
    exact = wide(config, params, tokens, "exact", dropout_key=key)
    for name in ("k_pass", "local"):
        assert np.abs(wide(config, params, tokens, name, passes=8, dropout_key=key) - exact).max() <= 1e-11
    assert np.abs(wide(config, params, tokens, "exact", dropout_key=jax.random.key(4)) - exact).max() > 0.1
    assert np.abs(wide(config, params, tokens, "exact") - exact).max() > 0.1


def test_dropout_keeps_the_adapter_s_mean():
    """Each kept input of an adapter is scaled up by 1 / (1 - rate), the others are 0."""
    from sst_jax.model import decoder

    config = toys.config(None, dropout=0.25)
    seen = {}

    def look(layer, residuals, extra, context):
        seen.update({name: mask.shape for name, mask in layer.drop.items()})
        return residuals, layer.drop

    tokens = toys.tokens(200, 4)
    context = dataclasses.replace(decoder.row_context(config, tokens), dropout_key=jax.random.key(0))
    params = toys.params(config)
    _, drop = jax.jit(lambda: decoder.run_layers(params, look, (), context))()
    assert seen["down"] == (200, 1, toys.BACKBONE.d_ff)
    for mask in drop.values():
        assert set(np.unique(mask)) == {np.float32(0), np.float32(1 / 0.75)}
        assert abs(mask.mean() - 1) < 0.02


@pytest.mark.parametrize(
    ("settings", "culprit"),
    [
        ({"forward": "sideways"}, "forward"),
        ({"passes": 0}, "passes"),
        ({"depth": 0}, "depth"),
        ({"forward": "plain", "depth": 2}, "depth"),
    ],
)
def test_settings_that_do_not_fit_are_named(settings, culprit):
    config = toys.config({})
    with pytest.raises(InputError, match=culprit):
        rules.logits(config, toys.params(config), toys.tokens(1, 4), **settings)
