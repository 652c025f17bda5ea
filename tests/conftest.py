"""For all rooms: tests run on the CPU, whose arithmetic their tolerances are made for."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import pytest
import toys


@pytest.fixture
def float64(monkeypatch):
    """JAX in 64-bit mode, attention's softmax included, for the length of one test."""
    monkeypatch.setattr(jax.nn, "dot_product_attention", toys.attention_in_float64)
    with jax.enable_x64(True):
        yield
