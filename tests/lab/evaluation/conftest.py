"""A made-up GSM8K, and a tiny model with a stream."""

import pytest

import sst_jax
from tests.support.problems import write_gsm8k


@pytest.fixture(scope="session")
def gsm8k(tmp_path_factory):
    """A folder with train.jsonl and test.jsonl that share no question."""
    return write_gsm8k(tmp_path_factory.mktemp("gsm8k"))


@pytest.fixture(scope="session")
def plain():
    return sst_jax.load("random:tiny")


@pytest.fixture(scope="session")
def streaming(plain):
    """With a stream strong enough that depth changes answers."""
    return plain.with_stream(alpha=0.5)
