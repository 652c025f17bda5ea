"""Prefill and one-token steps against `exact` over the whole text, in float64, where nothing hides behind rounding."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sst_jax.families.registry import PRESETS
from sst_jax.inference.decode_state import decode_step_at_depth
from sst_jax.inference.kv_cache import bytes_per_sequence, init_cache
from sst_jax.inference.prefill import capacity_for, padded, prefill
from sst_jax.model import rules
from sst_jax.model.config import ModelConfig, StreamConfig
from tests.support import toys

STEP = toys.quick_jit(decode_step_at_depth, "config", "start")
PREFILL = toys.quick_jit(prefill, "config", "capacity", "depth", "chunk")
LENGTHS = np.array([4, 6, 9], np.int32)  # prompts below, at and beyond the window of 6
TOTAL, CAPACITY = 18, 24

# Every value of every option that decoding treats in code of its own.
STREAMS = {
    "plain": None,
    "ffn": {"alpha_range": (0.0, 1.0)},
    "block-first": {"alpha_range": (0.0, 1.0), "state": "block", "kv": "first", "granularity": "scalar"},
    "match-decay-own": {"alpha": 0.3, "norm": "match", "decay": 0.4, "initial": "own"},
    "rms-skip_bos": {
        "alpha_range": (0.0, 1.0), "norm": "rms", "initial": "skip_bos", "learn_gain": True, "layers": (0, 2, 5)
    },
    "block-zero": {"alpha_range": (0.0, 1.0), "state": "block", "decay": 0.4, "initial": "zero", "gain": 0.7},
}  # fmt: skip
# Between layers: next token and next iteration; and Recirculation, whose logits come from the first iteration.
STREAMS["link"] = {"alpha_range": (0.0, 1.0), "links": ((5, 2), (3, 0)), "initial": "own"}
STREAMS["recirculation"] = {
    "alpha": 0.15, "links": ((5, 2),), "timing": "same", "site": "output", "state": "block", "norm": "match",
    "ramp": 10, "readout": "first",
}  # fmt: skip
for fields in STREAMS.values():
    if fields is not None:
        fields["prefill"] = "sequential"


def rows():
    """Three texts with a BOS at the head, at a prompt's end and among the generated tokens."""
    tokens = toys.tokens(3, TOTAL)
    tokens[0, 0] = tokens[1, 5] = tokens[2, 12] = toys.BOS
    return tokens


def follow(config, params, cache, tokens, depth):
    """Steps through what is left of each row; yields (position of each row, hidden states [B, D])."""
    depths = jnp.full(len(tokens), depth, jnp.int32)
    while (cache.length < TOTAL).any():
        position = np.asarray(cache.length)
        token = tokens[np.arange(len(tokens)), np.minimum(position, TOTAL - 1)]
        alive = jnp.where(position < TOTAL, depths, 0)  # depth 0 leaves a finished row as it is
        hidden, cache = STEP(config, params, token, cache, alive)
        yield position, hidden


def worst_step(config, params, cache, tokens, depth, truth):
    errors = []
    for position, hidden in follow(config, params, cache, tokens, depth):
        errors += [np.abs(hidden[row] - truth[row, at]).max() for row, at in enumerate(position) if at < TOTAL]
    return max(errors)


@pytest.mark.fast_cases(3)
@pytest.mark.parametrize(
    ("name", "depth"),
    [
        ("plain", 1),
        ("ffn", 1),
        ("ffn", 3),
        ("block-first", 3),
        ("match-decay-own", 3),
        ("rms-skip_bos", 3),
        ("block-zero", 3),
        ("link", 2),
        ("recirculation", 2),
    ],
)
def test_steps_continue_what_exact_computes(name, depth, float64):
    """From prompts of unequal lengths, and from nothing, past the window."""
    config = toys.in_float64(toys.config(STREAMS[name]))
    params, tokens = toys.params(config, "float64"), rows()
    forward = "plain" if config.stream is None else "exact"
    truth = np.asarray(toys.hidden_in_float64(config, params, tokens, forward=forward, depth=depth))
    hidden, cache = PREFILL(
        config,
        params,
        tokens[:, : LENGTHS.max()],
        LENGTHS,
        capacity=CAPACITY,
        depth=depth,
    )
    assert np.abs(hidden - truth[np.arange(3), LENGTHS - 1]).max() <= 1e-11
    assert worst_step(config, params, cache, tokens, depth, truth) <= 1e-11
    empty = init_cache(config, 3, CAPACITY)
    assert worst_step(config, params, empty, tokens, depth, truth) <= 1e-11


def test_rows_of_different_depths_do_not_meet():
    """One batch at depths 1, 2 and 3 is, bit for bit, what each depth gives on its own."""
    config = toys.config(STREAMS["ffn"])
    params, tokens = toys.params(config), rows()

    def run(depths):
        cache, out = init_cache(config, 3, CAPACITY), []
        for at in range(10):
            hidden, cache = STEP(config, params, tokens[:, at], cache, jnp.asarray(depths))
            out.append(hidden)
        return np.stack(out)

    mixed = run([1, 2, 3])
    for row, depth in enumerate((1, 2, 3)):
        assert np.array_equal(mixed[:, row], run([depth] * 3)[:, row])


@pytest.mark.fast_cases(1)
@pytest.mark.parametrize("kv", ["overwrite", "first"])
@pytest.mark.parametrize("depth", [1, 4])
def test_float32_stays_within_a_hundred_thousandth_of_exact(depth, kv):
    """As decoding runs: prompts solved by sweeps, in two chunks, below, at and beyond the window; then step by step."""
    config = toys.config({"kv": kv})
    params, tokens = toys.params(config), rows()
    truth = np.asarray(rules.hidden(config, params, tokens, forward="exact", depth=depth))
    hidden, cache = PREFILL(
        config, params, tokens[:, : LENGTHS.max()], LENGTHS, capacity=CAPACITY, depth=depth, chunk=5
    )
    found = [(row, LENGTHS[row] - 1, hidden[row]) for row in range(3)]
    for position, hidden in follow(config, params, cache, tokens, depth):
        found += [(row, at, hidden[row]) for row, at in enumerate(position) if at < TOTAL]
    assert len(found) == 3 + 3 * TOTAL - LENGTHS.sum()
    for row, at, value in found:
        assert np.linalg.norm(value - truth[row, at]) <= 1e-5 * np.linalg.norm(truth[row, at])


CHUNKED = {**{name: (fields, toys.BACKBONE) for name, fields in STREAMS.items()}, "llama": (STREAMS["ffn"], toys.LLAMA)}


@pytest.mark.parametrize(
    ("name", "depth", "method"),
    [
        ("plain", 1, "sequential"),
        ("block-first", 3, "sweeps"),
        pytest.param("llama", 3, "sequential", marks=pytest.mark.slow),
        pytest.param("match-decay-own", 1, "sequential", marks=pytest.mark.slow),
        pytest.param("rms-skip_bos", 3, "sequential", marks=pytest.mark.slow),
        pytest.param("block-zero", 1, "sweeps", marks=pytest.mark.slow),
        ("link", 1, "sweeps"),
        pytest.param("recirculation", 2, "sweeps", marks=pytest.mark.slow),
    ],
)
def test_chunks_hand_on_what_a_whole_prompt_gives(name, depth, method, float64):
    """Chunks of 6 at a window of 6: one prompt ends in the first, one in the second, and in the third rings turn.

    The last positions, and what decoding makes of the caches, are those of `exact` over the whole text.
    """
    fields, backbone = CHUNKED[name]
    if fields is not None:
        fields = {**fields, "prefill": method, "sweep_tolerance": 1e-13, "sweep_cap": 60}
    config = toys.in_float64(toys.config(fields, backbone))
    params, tokens = toys.params(config, "float64"), rows()
    tokens[2, 11] = toys.BOS  # the last position of a chunk
    truth = np.asarray(
        toys.hidden_in_float64(config, params, tokens, forward="exact" if fields else "plain", depth=depth)
    )
    lengths = np.array([4, 8, 16], np.int32)
    hidden, cache = PREFILL(
        config,
        params,
        tokens[:, :16],
        lengths,
        capacity=CAPACITY,
        depth=depth,
        chunk=6,
    )
    assert np.abs(hidden - truth[np.arange(3), lengths - 1]).max() <= 1e-11
    assert cache.length.tolist() == lengths.tolist()
    assert worst_step(config, params, cache, tokens, depth, truth) <= 1e-11


def test_lengths_are_rounded_to_few():
    sizes = {padded(length) for length in range(1, 2000)}
    assert {size % 512 for size in sizes} == {0, 64, 128, 256}
    for length in range(1, 2000):
        assert length <= padded(length) < max(64, 2 * length) + 1
        assert padded(length) <= capacity_for(length)
        assert all(padded(shorter) <= capacity_for(length) for shorter in range(1, length, 37))


@pytest.mark.parametrize("capacity", [100, 500])
def test_bytes_of_a_sequence_are_those_of_its_arrays(capacity):
    """Only what global layers keep grows with the capacity."""
    config = toys.config({"dtype": "bfloat16"})
    found = bytes_per_sequence(config, capacity)
    cache = init_cache(config, 1, capacity)
    counted = sum(leaf.nbytes for leaf in jax.tree.leaves((cache.kv, cache.state)))
    assert sum(found.values()) == counted
    assert found == {"state": 7 * 32 * 2, "local": 6 * 2 * 6 * 20 * 4, "global": 1 * 2 * capacity * 20 * 4}


def test_at_27b_only_global_layers_grow_with_the_text():
    """651 KiB of states in bfloat16, as published."""
    config = ModelConfig(PRESETS["27b"], StreamConfig(dtype="bfloat16"), dtype="bfloat16")
    short, long = (bytes_per_sequence(config, length) for length in (8192, 32_768))
    assert short["state"] == long["state"] == 62 * 5376 * 2 == 651 * 1024
    assert short["local"] == long["local"] == 52 * 2 * 1024 * 16 * 128 * 2
    assert long["global"] == 4 * short["global"] == 10 * 2 * 32_768 * 16 * 128 * 2
    wider = dataclasses.replace(config, stream=StreamConfig())
    assert bytes_per_sequence(wider, 8192)["state"] == 2 * short["state"]
