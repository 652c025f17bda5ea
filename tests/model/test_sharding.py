"""A mesh changes where numbers are computed, and none of the numbers."""

import json
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from sst_jax.errors import InputError
from sst_jax.families.registry import PRESETS
from sst_jax.model import sharding
from sst_jax.model.config import AdapterConfig, ModelConfig, StreamConfig
from sst_jax.model.decoder import init_params
from sst_jax.model.quantization import storages
from sst_jax.model.sharding import AXES, MeshConfig

TESTS = pathlib.Path(__file__).parents[1]


def on_eight(*cases, float64=False, **environment):
    """What tests/support/eight_devices.py prints for cases, from a process with eight devices."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
    flags += " --xla_backend_optimization_level=0"
    paths = os.pathsep.join([str(TESTS.parent), str(TESTS)])
    env = {
        **os.environ,
        "XLA_FLAGS": flags,
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": paths,
        "JAX_ENABLE_X64": str(int(float64)),
        **environment,
    }
    command = [sys.executable, str(TESTS / "support" / "eight_devices.py"), *cases]
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def assert_equal_within(results, bar):
    worst = {case: max(found.values()) for case, found in results.items()}
    assert max(worst.values()) <= bar, results


@pytest.mark.slow
def test_all_axes_at_once():
    assert_equal_within(on_eight("2,2,2:two_pass:nf4"), 1e-5)


MESHES = ("8,1,1", "1,8,1", "1,1,8", "2,2,2")


@pytest.mark.slow
@pytest.mark.parametrize("forward", ["two_pass", "exact"])
def test_every_axis_alone_and_all_mixed(forward):
    assert_equal_within(on_eight(*[f"{mesh}:{forward}:nf4" for mesh in MESHES]), 1e-5)
    assert_equal_within(on_eight(*[f"{mesh}:{forward}:float64" for mesh in MESHES], float64=True), 1e-11)


@pytest.mark.slow
def test_steps_and_decoding_on_every_axis():
    cases = [f"{mesh}:{what}" for what in ("step.two_pass:nf4", "decode:float32") for mesh in MESHES]
    assert_equal_within(on_eight(*cases), 1e-5)


@pytest.mark.slow
def test_stacks_by_kind_on_four_devices():
    """Logits, and what caches of two shapes decode: of global layers the heads are other ones, and fewer."""
    found = on_eight("1,4,1:decode:float32", "2,1,2:decode:float32", "1,2,2:two_pass:nf4", STACKS_BY_KIND="1")
    gradient = found["1,2,2:two_pass:nf4"].pop("gradient")
    assert_equal_within(found, 1e-5)
    assert gradient <= 3e-5


@pytest.mark.slow
def test_saved_on_eight_is_read_on_one_and_on_two_bit_for_bit():
    cases = ["1,8,1:restored:1,1,1", "1,8,1:restored:1,2,1", "2,2,2:restored:1,1,2", "1,1,1:restored:2,4,1"]
    assert_equal_within(on_eight(*cases), 0.0)


@pytest.mark.slow
def test_a_kernel_that_cannot_be_cut_runs_on_each_device_s_rows_and_heads():
    assert_equal_within(on_eight(*[f"{mesh}:kernel:splash_interpreted" for mesh in ("1,4,1", "1,2,4")]), 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("forward", ["two_pass", "exact"])
def test_weights_are_gathered_once_a_layer_and_not_at_every_position(forward):
    """What is gathered beside weights grows with the rows, so the bytes may not even double where these triple."""
    found = on_eight(f"1,8,1:gathered:{forward}")[f"1,8,1:gathered:{forward}"]
    assert 0 < found["1"] <= found["3"] < 1.5 * found["1"]


def abstract(sizes):
    return jax.sharding.AbstractMesh(tuple(sizes), AXES)


@pytest.mark.parametrize("kind", ["none", "nf4", "nf4_double"])
def test_of_the_27b_no_large_array_is_left_whole(kind):
    """What a device holds is its share and little more: scales of scales and some blocks' scales are left whole."""
    config = ModelConfig(PRESETS["27b"], StreamConfig(), AdapterConfig(rank=32))

    def parameters():
        params = init_params(config, jax.random.key(0), np.dtype("bfloat16"))
        base = params["base"]
        return {**params, "base": {**base, "layers": storages.quantise_layers(base["layers"], kind)}}

    shapes = jax.eval_shape(parameters)
    for sizes in ((1, 8, 1), (1, 1, 8), (1, 4, 2), (2, 2, 2), (1, 32, 1), (1, 16, 2)):
        mesh = abstract(sizes)
        places = jax.tree.leaves(sharding.shardings(mesh, shapes))
        whole = held = 0
        for leaf, place in zip(jax.tree.leaves(shapes), places, strict=True):
            whole += leaf.size * leaf.dtype.itemsize
            held += np.prod(place.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        spread = sizes[1] * sizes[2]
        # LoRA's factors are spread over `fsdp` whole, and over `tensor` on one of their two sides.
        assert held / whole < 1.01 / spread + (0.03 if sizes[2] > 1 else 0.001)


def test_the_table_puts_heads_and_widths_on_tensor_and_every_parameter_on_fsdp():
    mesh = abstract((1, 4, 2))

    def found(path, shape):
        return sharding.spec(mesh, sharding.axes_of(tuple(path.split("/")), len(shape)), shape)

    both = ("tensor", "fsdp")
    assert found("base/layers/q/kernel", (3, 64, 64)) == PartitionSpec(None, None, both)
    assert found("base/layers/down/codes", (3, 64, 64)) == PartitionSpec(None, ("tensor",), ("fsdp",))
    assert found("base/layers/down/scales", (3, 3, 64)) == PartitionSpec(None, None, ("fsdp",))  # 3 blocks stay whole
    assert found("optimizer/mu/gate/lora_a", (3, 64, 4)) == PartitionSpec(None, ("fsdp",), None)
    assert found("base/embed/embedding", (90, 64)) == PartitionSpec(("tensor",), None)  # 90 does not divide by 8
    assert found("blend/theta", (3, 64)) == PartitionSpec(None, None)
    assert found("kv/local_k", (3, 8, 6, 2, 16)) == PartitionSpec(None, ("fsdp",), None, ("tensor",), None)


@pytest.mark.parametrize(
    ("fields", "culprit"),
    [
        ({"fsdp": 0}, "fsdp=0"),
        ({"data": -1, "fsdp": -1}, "at most|one of them"),
        ({"fsdp": 3}, "mesh.fsdp=3"),
        ({"processes": 2}, "mesh.coordinator"),
        ({"coordinator": "a:1", "processes": 2, "process": 2}, "mesh.process=2"),
    ],
)
def test_a_mesh_that_cannot_be_is_refused(fields, culprit):
    with pytest.raises(InputError, match=culprit):
        sharding.make_mesh(MeshConfig(**fields), jax.devices()[:1])


@pytest.mark.parametrize(
    ("sizes", "batch", "culprit"),
    [
        ((2, 4, 1), 12, r"data.batch_size=12 .* = 8"),
        ((1, 10, 1), 10, "mesh.fsdp=10 .* d_model of 5376"),
        ((1, 1, 32), 1, "mesh.tensor=32 .* num_kv_heads of 16"),
    ],
)
def test_what_does_not_divide_is_named(sizes, batch, culprit):
    with pytest.raises(InputError, match=culprit):
        sharding.check(abstract(sizes), PRESETS["27b"], batch)
