"""Windows that a recipe asks for: how far attention reaches, in every kernel, cache and forward."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sst_jax.errors import InputError
from sst_jax.inference import prefill
from sst_jax.inference.decode_state import decode_step_at_depth
from sst_jax.model import decoder, kernels, rules
from sst_jax.model.config import BackboneConfig, ModelConfig
from tests.support import naive, toys

WINDOWS = (1, 3, 2, 9, 3, 3, 1)  # of toys.BACKBONE, whose local layers see 6: the fourth stays at that
BACKBONE = dataclasses.replace(toys.BACKBONE, attention_window=WINDOWS)
SHALLOW = dataclasses.replace(toys.SHALLOW, attention_window=(2, 3, 5, 3))
FREE = {"alpha_range": (0.0, 1.0)}


def oracle(config, params, tokens, depths=1):
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    return naive.hidden(config, params, tokens, depths, toys.BOS)


def apart(got, expected):
    return np.linalg.norm(np.asarray(got, np.float64) - expected) / np.linalg.norm(expected)


def test_reach_is_the_sum_of_what_each_layer_looks_back():
    assert BACKBONE.windows == (1, 3, 2, 6, 3, 3, 1)
    assert BACKBONE.reach == 0 + 2 + 1 + 5 + 2 + 2 + 0
    assert dataclasses.replace(toys.BACKBONE, attention_window=(5,)).windows == (5,) * 7
    assert toys.BACKBONE.reach is None  # it has a global layer
    assert toys.BACKBONE.windows == (6, 6, 6, 6, 6, None, 6)


NO_TUPLES = [pytest.param(windows, marks=pytest.mark.wrong_types) for windows in (0, 2.0, True, "5")]


@pytest.mark.parametrize("windows", [(), (0,), (3, 2), (1, 2, 3, 4, 5, 6, 0), *NO_TUPLES])
def test_windows_that_are_none_are_refused(windows):
    with pytest.raises(InputError, match=r"attention_window=.*7 of them, one a layer"):
        dataclasses.replace(toys.BACKBONE, attention_window=windows)


def test_a_backbone_without_windows_of_its_own_is_written_as_before():
    written = ModelConfig(BACKBONE).to_dict()
    assert ModelConfig.from_dict(written).backbone == BACKBONE
    assert "attention_window" not in ModelConfig(toys.BACKBONE).to_dict()["backbone"]


@pytest.mark.parametrize(("stream", "forward"), [(None, "plain"), ({}, "exact"), ({}, "two_pass")])
def test_nothing_beyond_the_reach_moves_a_plain_model_and_a_stream_carries_it(stream, forward):
    """Logits at every position, of two texts that differ at one."""
    config = toys.config({**FREE, **stream} if stream is not None else None, BACKBONE)
    params, tokens, at = toys.params(config), toys.tokens(1, 40), 5
    other = tokens.copy()
    other[0, at] = tokens[0, at] + 1 if tokens[0, at] < 50 else 5
    one, two = (np.asarray(rules.logits(config, params, text, forward=forward))[0] for text in (tokens, other))
    moved = np.abs(one - two).max(-1)
    reach = BACKBONE.reach
    assert moved[:at].max() == 0.0
    assert moved[at + reach] > 1e-6  # the last one that attention reaches
    if stream is None:
        assert moved[at + reach + 1 :].max() == 0.0
    elif forward == "exact":
        assert moved[at + reach + 1 : at + reach + 9].min() > 1e-7
    else:
        assert moved[at + reach + 1] > 1e-7  # two passes carry a state one step further, and no more
        assert moved[at + 2 * reach + 2 :].max() == 0.0


@pytest.mark.parametrize(("stream", "depth"), [(None, 1), (FREE, 1), ({**FREE, "kv": "first"}, 3)])
def test_it_is_the_naive_masked_softmax(stream, depth, float64):
    """Rows by `exact`, which is tested against decoding and prefill below."""
    config = toys.config(stream, BACKBONE)
    params, tokens = toys.params(config, "float64"), toys.tokens(14)
    truth = oracle(config, params, tokens, depth)
    forward = "plain" if stream is None else "exact"
    got = toys.hidden_in_float64(config, params, tokens[None], forward=forward, depth=depth)[0]
    assert apart(got, truth) <= 1e-11
    unlimited = dataclasses.replace(config, backbone=toys.BACKBONE)
    assert apart(oracle(unlimited, params, tokens, depth), truth) > 1e-2


def test_links_look_through_the_same_windows(float64):
    config = toys.config({**FREE, "links": ((3, 1),)}, SHALLOW)
    params, tokens = toys.params(config, "float64"), toys.tokens(12)
    got = toys.hidden_in_float64(config, params, tokens[None], forward="exact", depth=2)[0]
    assert apart(got, oracle(config, params, tokens, 2)) <= 1e-11


@pytest.mark.fast_cases(1)
@pytest.mark.parametrize(("stream", "depth"), [(None, 1), ({**FREE, "alpha_init": 0.1}, 2)])
def test_chunked_prefill_and_decoding_see_what_whole_rows_see(stream, depth, float64):
    """A prompt in chunks of four, whose caches turn round, then position by position."""
    config = toys.in_float64(toys.config(stream, SHALLOW))
    params, tokens = toys.params(config, "float64"), toys.tokens(18)
    truth = oracle(config, params, tokens, depth)
    filled = prefill.prefill_chunks(
        config, params, jnp.asarray(tokens[None, :12]), jnp.array([12]), capacity=64, depth=depth, chunk=4
    )
    hidden, last = [], None
    for last in filled:
        hidden.append(np.asarray(last.positions[0]))
    cache, step = last.cache, toys.quick_jit(functools.partial(decode_step_at_depth, config))
    for token in tokens[12:]:
        out, cache = step(params, jnp.array([token]), cache, jnp.array([depth]))
        hidden.append(np.asarray(out))
    tolerance = 1e-11 if stream is None else 1e-4  # sweeps stop at stream.sweep_tolerance
    assert apart(np.concatenate(hidden), truth) <= tolerance


@pytest.mark.fast_cases(1)
@pytest.mark.parametrize("name", ["chunked", "splash_interpreted"])
def test_every_kernel_takes_windows_that_differ_by_layer(name):
    """cuDNN's is called as XLA's is, with the window as a number (test_kernels.py)."""
    head = 128 if name.startswith("splash") else 10
    backbone = dataclasses.replace(SHALLOW, head_dim=head, num_heads=2, num_kv_heads=2)
    config = toys.config(None, backbone)
    params, tokens = toys.params(config), toys.tokens(1, 30)
    assert name in kernels.KERNELS
    ours, xla = (rules.hidden(config, params, tokens, forward="plain", attention=each) for each in (name, "xla"))
    assert apart(ours, np.asarray(xla)) <= 1e-5
    wider = dataclasses.replace(config, backbone=dataclasses.replace(backbone, attention_window=None))
    assert apart(rules.hidden(wider, params, tokens, forward="plain"), np.asarray(xla)) > 1e-2


def test_a_plan_counts_each_kind_of_layer_as_often_as_it_runs():
    from sst_jax.lab.planning.programs import branches
    from sst_jax.model.attention import LAYER_KIND

    assert branches(toys.BACKBONE)[LAYER_KIND] == (6 / 7, 1 / 7)
    found = dict(zip(BACKBONE.attention_kinds, branches(BACKBONE)[LAYER_KIND], strict=True))
    assert found == {
        ("local", 1): 2 / 7, ("local", 2): 1 / 7, ("local", 3): 2 / 7, ("local", 6): 1 / 7, ("global", 3): 1 / 7,
    }  # fmt: skip
    numbers = decoder.kind_numbers(BACKBONE)
    pairs = zip(BACKBONE.layer_types, BACKBONE.windows, strict=True)
    assert [BACKBONE.attention_kinds[number] for number in numbers] == list(pairs)
    assert len(set(itertools.chain(numbers))) == 5
    assert isinstance(BACKBONE, BackboneConfig)
