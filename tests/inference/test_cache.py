"""Prefill and one-token steps against `exact` over the whole text, in float64, where nothing hides behind rounding."""

import jax.numpy as jnp
import numpy as np
import pytest
import toys

from sst_jax.inference.cache import init_cache, prefill, step

STEP = toys.quick_jit(step, "config", "start", "bos_id", "dtype")
PREFILL = toys.quick_jit(prefill, "config", "capacity", "depth", "bos_id", "dtype")
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
        hidden, cache = STEP(config, params, token, cache, alive, bos_id=toys.BOS, dtype="float64")
        yield position, hidden


def worst_step(config, params, cache, tokens, depth, truth):
    errors = []
    for position, hidden in follow(config, params, cache, tokens, depth):
        errors += [np.abs(hidden[row] - truth[row, at]).max() for row, at in enumerate(position) if at < TOTAL]
    return max(errors)


@pytest.mark.parametrize(
    ("name", "depth"),
    [("plain", 1), ("ffn", 1), ("ffn", 3), ("block-first", 3), ("match-decay-own", 3), ("rms-skip_bos", 3),
     ("block-zero", 3)],
)  # fmt: skip
def test_steps_continue_what_exact_computes(name, depth, float64):
    """From prompts of unequal lengths, and from nothing, past the window."""
    config = toys.config(STREAMS[name])
    params, tokens = toys.params(config, "float64"), rows()
    forward = "plain" if config.stream is None else "exact"
    truth = np.asarray(
        toys.hidden_in_float64(config, params, tokens, forward=forward, depth=depth, bos_id=toys.BOS)
    )  # fmt: skip
    hidden, cache = PREFILL(
        config, params, tokens[:, : LENGTHS.max()], LENGTHS, capacity=CAPACITY, depth=depth, bos_id=toys.BOS,
        dtype="float64",
    )  # fmt: skip
    assert np.abs(hidden - truth[np.arange(3), LENGTHS - 1]).max() <= 1e-11
    assert worst_step(config, params, cache, tokens, depth, truth) <= 1e-11
    empty = init_cache(config, 3, CAPACITY, jnp.dtype("float64"))
    assert worst_step(config, params, empty, tokens, depth, truth) <= 1e-11


def test_rows_of_different_depths_do_not_meet():
    """One batch at depths 1, 2 and 3 is, bit for bit, what each depth gives on its own."""
    config = toys.config(STREAMS["ffn"])
    params, tokens = toys.params(config), rows()

    def run(depths):
        cache, out = init_cache(config, 3, CAPACITY, jnp.dtype("float32")), []
        for at in range(10):
            hidden, cache = STEP(config, params, tokens[:, at], cache, jnp.asarray(depths))
            out.append(hidden)
        return np.stack(out)

    mixed = run([1, 2, 3])
    for row, depth in enumerate((1, 2, 3)):
        assert np.array_equal(mixed[:, row], run([depth] * 3)[:, row])
