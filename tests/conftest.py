"""For all rooms: tests run on the CPU, whose arithmetic their tolerances are made for."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import pytest


@pytest.fixture
def float64():
    """JAX in 64-bit mode for the length of one test."""
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="module")
def quick_compiles():
    """XLA compiles in half the time, and the code may be slow: for modules of many small programs."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(autouse=True, scope="module")
def forget_programs():
    """Modules share few compiled programs, and thousands of them would fill the memory of a small machine."""
    yield
    jax.clear_caches()
