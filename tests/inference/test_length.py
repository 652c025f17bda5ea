"""Long texts: one program from the second chunk on, and memory that does not grow."""

import dataclasses
import resource

import jax
import numpy as np
import pytest

from sst_jax.families.registry import PRESETS
from sst_jax.inference.prefill import prefill
from sst_jax.inference.sampling import Sampling
from sst_jax.model import decoder
from sst_jax.model.config import ModelConfig, StreamConfig
from tests.support import toys
from tests.support.decoding import generate as generate_tokens

pytestmark = [pytest.mark.slow, pytest.mark.optimised]

TINY = ModelConfig(dataclasses.replace(PRESETS["tiny"], max_positions=10_000), StreamConfig())


@pytest.fixture
def compiled():
    """Durations of what the backend compiles, as they come."""
    found = []

    def listen(event, seconds, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            found.append(seconds)

    jax.monitoring.register_event_duration_secs_listener(listen)
    return found


def peak():
    """MiB that this process has ever held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def live():
    return sum(array.nbytes for array in jax.live_arrays())


def test_8k_tokens_compile_once_and_keep_their_memory(compiled):
    params = decoder.init_params(TINY, jax.random.key(0))
    prompt = toys.tokens(1, 20, vocabulary=262)[0].tolist()
    running = generate_tokens(
        TINY,
        params,
        [prompt],
        depth=[2],
        max_new_tokens=8192,
        sampling=Sampling(),
        seeds=[0],
        stop_ids=(),
        pad_id=0,
    )
    sizes, memory, programs = [], [], []
    for chunk in running:
        sizes.append(chunk.tokens.shape[1])
        memory.append(live())
        programs.append(len(compiled))
        if len(sizes) == 8:
            early = peak()
    assert sum(sizes) >= 8192
    assert programs[1] == programs[-1], "something was compiled after the first chunk"
    assert programs[1] > 0
    assert memory[2] == memory[-1]
    assert peak() - early < 16


def test_an_8k_prompt_is_filled_by_few_programs_in_bounded_memory(compiled):
    """Never T x T: at 8192 positions one head's scores alone would take 256 MiB. And what longer chunks give."""
    params = decoder.init_params(TINY, jax.random.key(0))
    tokens = toys.tokens(1, 8192, vocabulary=262)
    lengths = np.array([8192], np.int32)
    small, _ = prefill(TINY, params, tokens[:, :1024], np.array([1024]), capacity=8192)
    jax.block_until_ready(small)
    before, programs = peak(), len(compiled)
    hidden, cache = prefill(TINY, params, tokens, lengths, capacity=8192)
    jax.block_until_ready(hidden)
    assert len(compiled) == programs, "other chunks of a prompt need no program of their own"
    assert peak() - before < 96
    assert cache.length.tolist() == [8192]
    other, _ = prefill(TINY, params, tokens, lengths, capacity=8192, chunk=2048)
    assert np.linalg.norm(hidden - other) <= 1e-5 * np.linalg.norm(other)


def test_prompts_of_many_lengths_share_their_programs(compiled):
    params = decoder.init_params(TINY, jax.random.key(0))

    def answer(size):
        prompt = toys.tokens(1, size, seed=size, vocabulary=262)[0].tolist()
        for _ in generate_tokens(
            TINY,
            params,
            [prompt],
            depth=[1],
            max_new_tokens=20,
            sampling=Sampling(),
            seeds=[0],
            stop_ids=(),
            pad_id=0,
        ):
            pass

    answer(30)
    first = len(compiled)
    for size in (1, 2, 17, 31, 44):
        answer(size)
    assert len(compiled) == first
