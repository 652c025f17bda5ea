"""What programs are compiled for: the described platform, its options, and where they may be given."""

import jax
import jax.numpy as jnp
import pytest

from sst_jax.inference import prefill, programs
from sst_jax.lab.evaluation import scoring
from sst_jax.model import compiler

NAME = "xla_gpu_dot_merger_threshold_mb"


def test_the_platform_is_the_described_one_or_the_device_s():
    assert compiler.platform() == "cpu"
    with compiler.compiled_for("cuda"):
        assert compiler.platform() == "cuda"
        assert compiler.compiler_options(compiler.platform()) == {NAME: 0}
    assert compiler.platform() == "cpu"
    assert compiler.compiler_options("cpu") == compiler.compiler_options("tpu") == {}


def test_what_is_traced_for_one_platform_is_traced_again_for_another():
    @jax.jit
    def of_platform(x):
        return x + (1 if compiler.platform() == "cuda" else 2)

    assert of_platform(0) == 2
    with compiler.compiled_for("cuda"):
        assert of_platform(0) == 1


@pytest.fixture
def asked(monkeypatch):
    """The options that programs are compiled with, which no compiler here knows."""
    seen = []
    jit = jax.jit

    def recording(function, *, compiler_options=None, **settings):
        seen.append(compiler_options)
        return jit(function, **settings)

    monkeypatch.setattr(jax, "jit", recording)
    return seen


def test_a_program_takes_the_options_of_the_platform_that_calls_it(asked):
    @compiler.program(static_argnames=("more",))
    def add(x, *, more):
        return x + more

    with compiler.compiled_for("cuda"):
        assert add(jnp.float32(1), more=2) == 3
    assert asked == [None, {NAME: 0}]
    assert jax.make_jaxpr(lambda x: add(x, more=3))(1.0).jaxpr is not None  # within another, that one's options hold
    assert asked == [None, {NAME: 0}]


@pytest.mark.parametrize(
    "one", [programs.begin, programs.decode_chunk, prefill.fill_chunk, programs.score_positions, scoring._score]
)
def test_what_runs_on_the_device_is_compiled_with_its_options(one):
    assert isinstance(one, compiler.Program)
