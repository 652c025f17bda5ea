"""Depth policies: how they are spelled, and what they do against a loop over `cache.step` written by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sst_jax.errors import InputError
from sst_jax.inference.decode_state import decode_step_at_depth
from sst_jax.inference.policies import (
    Policy,
    as_policy,
    first_token,
    flat,
    parse,
    parse_list,
    probe,
    until_confident,
    until_stable,
)
from sst_jax.inference.prefill import prefill
from sst_jax.inference.sampling import Sampling
from sst_jax.model import decoder
from tests.support import toys
from tests.support.decoding import generate as generate_tokens

STEP = jax.jit(decode_step_at_depth, static_argnames=("config", "start"))
PROMPTS = [toys.tokens(1, size, seed=size)[0].tolist() for size in (4, 11, 7, 3)]
NEW = 9
TOLERANCE = 0.35  # at which the toys below stop at different depths
SURE = 0.1  # the same, a probability


def setting(**more):
    config = toys.config({"alpha": 0.3, **more})
    return config, toys.params(config)


def generate(config, params, prompts, policies, new=NEW, stop_ids=()):
    """(tokens, depths) of every row."""
    chunks = list(
        generate_tokens(
            config,
            params,
            prompts,
            depth=policies,
            max_new_tokens=new,
            sampling=Sampling(),
            seeds=range(len(prompts)),
            stop_ids=stop_ids,
            pad_id=0,
        )
    )
    tokens, depths = (np.concatenate([getattr(chunk, name) for chunk in chunks], 1) for name in ("tokens", "depths"))
    return [(row[row >= 0].tolist(), depth[row >= 0].tolist()) for row, depth in zip(tokens, depths, strict=True)]


def filled(config, params, prompt):
    """`prefill` of one prompt, padded so that all of them are one program."""
    tokens = np.zeros((1, 64), np.int32)
    tokens[0, : len(prompt)] = prompt
    return prefill(config, params, tokens, np.array([len(prompt)], np.int32), capacity=64)


def by_hand(config, params, prompt, policy, new=NEW):
    """One row: every depth at every position from a fresh copy of the caches, and the policy's rule in Python."""
    hidden, cache = filled(config, params, prompt)
    token, out, depths = prompt[-1], [], []
    limit = policy.first if config.stream.iterate_prompt == "last" else 1
    start, fresh = 1, config.stream.iterate_prompt == "none"
    for _ in range(new):
        before = hidden if start else None
        for depth in range(1, limit + 1):
            given = {"start": start, "hidden": hidden if start else None}
            hidden_at, cache_at = STEP(config, params, jnp.array([token]), cache, jnp.array([depth]), **given)
            still = depth > 1 and np.linalg.norm(hidden_at - before) <= policy.threshold * np.linalg.norm(hidden_at)
            before = hidden_at
            if policy.halt == "until_stable" and still:
                break
            sure = float(jax.nn.softmax(decoder.head(config, params, hidden_at)[0]).max())
            if policy.halt == "until_confident" and sure >= policy.threshold:
                break
        hidden, cache, start = hidden_at, cache_at, 0
        token = int(decoder.head(config, params, hidden)[0].argmax())
        out.append(token)
        depths.append(depth)
        limit, fresh = (policy.first if fresh else policy.rest), False
    return out, depths


POLICIES = [flat(1), flat(4), first_token(4), until_stable(TOLERANCE, 6)]


@pytest.mark.slow
@pytest.mark.parametrize(("prompt", "kv"), [("last", "overwrite"), ("none", "first")])
def test_each_row_follows_its_own_policy(prompt, kv):
    """Four policies in one batch of unequal prompts, against the loop by hand, and alone: tokens and depths."""
    config, params = setting(iterate_prompt=prompt, kv=kv)
    together = generate(config, params, PROMPTS, POLICIES)
    for row, policy in enumerate(POLICIES):
        assert together[row] == by_hand(config, params, PROMPTS[row], policy)
        assert together[row] == generate(config, params, [PROMPTS[row]], [policy])[0]
    depths = [set(depths) for _, depths in together]
    assert depths[:3] == [{1}, {4} if prompt == "last" else {1, 4}, {1, 4}]
    assert together[2][1].count(4) == 1
    assert len(depths[3]) > 1, "the tolerance should bite at some positions and not at others"
    assert max(depths[3]) <= 6


@pytest.mark.fast_cases(1)
@pytest.mark.parametrize("prompt", ["last", "none"])
def test_a_confident_position_stops_iterating(prompt):
    """Beside rows of other policies, against the loop by hand, and alone: tokens and depths."""
    config, params = setting(iterate_prompt=prompt)
    policies = [until_confident(SURE, 6), until_stable(TOLERANCE, 6), flat(2), until_confident(1.0, 3)]
    together = generate(config, params, PROMPTS, policies)
    for row, policy in enumerate(policies):
        assert together[row] == by_hand(config, params, PROMPTS[row], policy)
        assert together[row] == generate(config, params, [PROMPTS[row]], [policy])[0]
    sure = together[0][1]
    assert min(sure) == 1, "the first iteration may be enough"
    assert max(sure) > 1, "the threshold should bite at some positions and not at others"
    assert set(together[3][1][1:]) == {3}


def test_a_row_that_has_ended_leaves_the_depths_of_the_others_alone():
    config, params = setting()
    free = generate(config, params, PROMPTS, POLICIES)
    stop = free[1][0][2]
    ended = generate(config, params, PROMPTS, POLICIES, stop_ids=(stop,))
    for (tokens, depths), (all_tokens, all_depths) in zip(ended, free, strict=True):
        size = all_tokens.index(stop) + 1 if stop in all_tokens else len(all_tokens)
        assert tokens == all_tokens[:size]
        assert depths == all_depths[:size]


@pytest.mark.parametrize("prompt", ["last", pytest.param("none", marks=pytest.mark.slow)])
def test_a_probe_sees_the_states_of_the_first_position_and_chooses_the_rest(prompt):
    config, params = setting(iterate_prompt=prompt)
    seen = []

    def choose(states):
        seen.append(states)
        return 3

    rows = generate(config, params, PROMPTS[:2], [probe(choose, first=2), flat(1)])
    assert rows[0] == by_hand(config, params, PROMPTS[0], Policy("by hand", 2, 3))
    assert rows[1] == by_hand(config, params, PROMPTS[1], flat(1))
    assert rows[0][1] == ([2] + [3] * 8 if prompt == "last" else [1, 2] + [3] * 7)
    tokens = PROMPTS[0] if prompt == "last" else PROMPTS[0] + rows[0][0][:1]
    size = len(tokens)
    # The states after those two iterations, from a step that nothing else follows.
    before = tokens if prompt == "last" else tokens[:-1]
    hidden, cache = filled(config, params, before)
    start = 1 if prompt == "last" else 0
    _, cache = STEP(
        config,
        params,
        np.array(tokens[-1:], np.int32),
        cache,
        np.array([2]),
        start=start,
        hidden=hidden if start else None,
    )
    assert cache.length.tolist() == [size]
    assert len(seen) == 1
    np.testing.assert_allclose(seen[0], cache.state[:, 0], atol=1e-3)


def test_a_probe_that_chooses_nonsense_is_refused():
    config, params = setting()
    with pytest.raises(InputError, match="at least 1"):
        generate(config, params, PROMPTS[:1], [probe(lambda states: 0)])


def test_a_prompt_at_one_depth_has_no_tolerance():
    config, params = setting(iterate_prompt="all")
    with pytest.raises(InputError, match="until_stable"):
        generate(config, params, PROMPTS[:1], [until_stable(0.1, 3)])


@pytest.mark.parametrize(
    ("text", "policy"),
    [
        ("1", flat(1)),
        ("4", flat(4)),
        (" 2", flat(2)),
        ("first_token:3", first_token(3)),
        ("until_stable:0.01:4", until_stable(0.01, 4)),
        ("until_stable:1e-3:2", until_stable(0.001, 2)),
        ("until_confident:0.9:4", until_confident(0.9, 4)),
    ],
)
def test_spellings_are_read_and_written(text, policy):
    assert parse(text) == policy
    assert parse(policy.name) == policy
    assert as_policy(policy) is policy
    assert as_policy(text) == policy


def test_a_comma_list():
    assert parse_list("1,4,until_stable:0.01:4") == [flat(1), flat(4), until_stable(0.01, 4)]
    with pytest.raises(InputError, match="twice"):
        parse_list("1,2,1")


@pytest.mark.parametrize(
    "text",
    [
        "0",
        "-1",
        "two",
        "",
        "1.5",
        "first_token",
        "first_token:0",
        "first_token:1:2",
        "until_stable:4",
        "until_stable:0:4",
        "until_stable:nan:4",
        "until_stable:-1:4",
        "until_stable:inf:4",
        "until_stable:0.1:0",
        "until_stable:0.1:2.5",
        "probe:x",
        "4:1",
        "1,2",
    ],
)
def test_what_is_no_policy_is_quoted(text):
    with pytest.raises(InputError, match="depth="):
        parse(text)
    with pytest.raises(InputError, match="twice" if text == "1,2" else "depth="):
        parse_list(f"1,{text}")
