"""Answers of a batch of prompts, by `inference.session` alone."""

from collections.abc import Iterator, Sequence

from sst_jax.inference.policies import Policy, as_policy
from sst_jax.inference.programs import SampledTokens
from sst_jax.inference.sampling import Sampling, SpecialTokens
from sst_jax.inference.session import GREEDY, Request, generate_tokens


def generate(
    config,
    params,
    prompts: Sequence[Sequence[int]],
    *,
    depth: Sequence[int | str | Policy] = (),
    max_new_tokens: int,
    sampling: Sampling = GREEDY,
    seeds: Sequence[int] = (),
    stop_ids: Sequence[int] = (),
    pad_id: int = 0,
) -> Iterator[SampledTokens]:
    """Yield the chunks of tokens of one request a prompt; greedy, at depth 1, with seed 0 where nothing is said."""
    requests = [
        Request(tuple(prompt), max_new_tokens, as_policy(policy), sampling, seed)
        for prompt, policy, seed in zip(prompts, depth or [1] * len(prompts), seeds or [0] * len(prompts), strict=True)
    ]
    return generate_tokens(config, params, requests, special=SpecialTokens(tuple(stop_ids)), pad_id=pad_id)
