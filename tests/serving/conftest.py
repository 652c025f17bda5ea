"""A tiny model behind an engine, and a server in front of it."""

import pytest

import sst_jax
from sst_jax.serving.queue import Engine
from tests.support.server import start

ROWS, CAPACITY = 4, 512


@pytest.fixture(scope="session")
def model():
    return sst_jax.load("random:tiny").with_stream(alpha=0.05)


@pytest.fixture(scope="module")
def engine(model):
    engine = Engine(model, rows=ROWS, capacity=CAPACITY)
    yield engine
    engine.close(10)


@pytest.fixture(scope="module")
def client(engine):
    client, server, thread = start(engine, body=100_000, answers=16, depth=8)
    yield client
    server.should_exit = True
    thread.join(20)
