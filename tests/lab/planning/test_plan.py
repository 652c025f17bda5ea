"""plan: what it counts, what it refuses, and (where a compiler for CUDA is installed) what it says of the 27B step."""

import dataclasses
import importlib.util
import itertools
import json
import os
import pathlib
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from sst_jax import plan
from sst_jax.console.command import run
from sst_jax.families.registry import PRESETS
from sst_jax.lab.planning import compile as compiling
from sst_jax.lab.planning import targets
from sst_jax.lab.planning.collectives import sent
from sst_jax.lab.planning.count import count
from sst_jax.lab.planning.traffic import kernels, traffic
from sst_jax.model import sharding
from sst_jax.model.kernels import KERNELS
from sst_jax.model.quantization import storages
from sst_jax.model.quantization.base import StackedLinear
from sst_jax.model.quantization.nf4_product import LowRank
from sst_jax.model.sharding import MeshConfig
from sst_jax.training.recipe import read_recipe

ROOT = pathlib.Path(__file__).parents[3]
TINY, SST, BASELINE = (str(ROOT / "configs" / f"{name}.py") for name in ("tiny", "sst", "baseline"))
CUDA = any(importlib.util.find_spec(name) for name in ("jax_cuda13_plugin", "jax_cuda12_plugin"))
needs_cuda = pytest.mark.skipif(not CUDA, reason="planning for a GPU needs JAX's CUDA wheels: sst-jax[cuda]")


def work(function, *shapes, trips=1):
    return count(jax.make_jaxpr(function)(*[jnp.zeros(shape) for shape in shapes]), trips)


def test_a_product_is_two_flops_a_term_and_its_three_arrays():
    found = work(lambda a, b: a @ b, (3, 5), (5, 7))
    assert found.flops == 2 * 3 * 5 * 7
    assert found.bytes == 4 * (15 + 35 + 21)
    assert found.seconds(flops=1.0, bandwidth=1e9) == found.flops
    assert found.seconds(flops=1e9, bandwidth=1.0) == found.bytes


def test_scans_multiply_branches_take_the_costlier_and_loops_what_they_are_told():
    square = (4, 4)
    one = work(lambda a: a @ a, square).flops
    assert work(lambda a: jax.lax.scan(lambda c, _: (c @ c, None), a, None, length=6)[0], square).flops == 6 * one
    assert work(lambda a: jax.lax.cond(a[0, 0] > 0, lambda: a @ a @ a, lambda: a @ a), square).flops == 2 * one
    loop = work(lambda a: jax.lax.while_loop(lambda c: c[0, 0] < 1, lambda c: c @ c, a), square, trips=5)
    assert loop.flops == 5 * one
    inside = jax.checkpoint(jax.jit(lambda a: a @ a))
    assert work(jax.grad(lambda a: inside(a).sum()), square).flops >= 3 * one


def test_scores_of_attention_are_not_moved():
    shapes = (2, 64, 4, 16), (2, 64, 4, 16)
    found = work(lambda q, k: jnp.einsum("btnh,bsnh->bnts", q, k), *shapes)
    assert found.flops == 2 * 2 * 4 * 64 * 64 * 16
    assert found.bytes == 2 * 4 * 2 * 64 * 4 * 16


def test_a_decode_step_reads_its_caches():
    """Of one query a row the largest array is no score but the cache."""
    function, shapes = (lambda q, k: jnp.einsum("bnh,bsnh->bns", q, k)), ((2, 4, 16), (2, 64, 4, 16))
    jaxpr = jax.make_jaxpr(function)(*[jnp.zeros(shape) for shape in shapes])
    assert count(jaxpr, flash=False).bytes == 4 * (2 * 4 * 16 + 2 * 64 * 4 * 16 + 2 * 4 * 64)


@pytest.mark.parametrize("more", [[], ["--decode"]], ids=["training", "decoding"])
def test_what_the_compiler_finds_too_large_is_said_not_to_fit(more, tmp_path, capsys, monkeypatch):
    def too_large(*_, **__):
        raise compiling.TooLarge("RESOURCE_EXHAUSTED: 99 GiB of 32")

    monkeypatch.setattr(compiling, "plan_training", too_large)
    monkeypatch.setattr(compiling, "plan_decoding", too_large)
    written = tmp_path / "plan.json"
    assert run(plan.main, ["--config", TINY, "--target", "rtx-5090", *more, "--json", str(written)]) == 0
    assert "does not fit: RESOURCE_EXHAUSTED: 99 GiB of 32" in capsys.readouterr().out
    (record,) = json.loads(written.read_text())["plans"]
    assert record["fits"] is False


@pytest.mark.parametrize("name", [name for name, target in targets.TARGETS.items() if target.platform == "cuda"])
def test_descriptions_of_gpus_are_complete(name):
    text = targets.config_text(targets.find(name))
    assert text.count("{") == text.count("}")
    assert 'platform_name: "CUDA"' in text
    assert ": 0\n" not in text
    gpu_info = pytest.importorskip("jax._src.pallas.triton.gpu_info", reason="this jax asks for no card's name")
    (title,) = re.findall(r'device_description_str: "(.*)"', text)
    assert gpu_info.gpu_version_from_device_kind(title) is not None, "or kernels do not compile for the described card"


@pytest.mark.parametrize(
    ("arguments", "culprit"),
    [
        (["--config", TINY, "--target", "abacus"], "abacus"),
        (["--config", TINY, "--target", "v5e-8x2"], "v5e-8x2"),
        (["--config", TINY, "--config.mesh.fsdp=0"], "mesh (data=1, fsdp=0"),
        (["--config", TINY, "--efficiency", "2"], "--efficiency"),
        (["--config", TINY, "--decode", "--depth", "0"], "--depth"),
        (["--config", f"{SST}:size=9b"], "9b"),
        (["--config", TINY, "--config.model.source=somewhere/unknown"], "somewhere/unknown"),
        ([], "--config"),
    ],
)
def test_refuses_in_one_line(arguments, culprit, capsys):
    assert run(plan.main, arguments) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert culprit in message


def test_several_gpus_are_one_of_them_so_many_times():
    one, eight = targets.find("h100"), targets.find("h100x8")
    assert eight.chips == 8
    assert targets.config_text(eight) == targets.config_text(one)


@needs_cuda
def test_cudnn_s_attention_sends_nothing_between_gpus():
    """Its rows and heads lie on the devices that compute them, forward and backward."""
    target = targets.find("rtx-pro-6000x8")
    mesh = compiling.mesh_on(target, MeshConfig(fsdp=4, tensor=2))

    def array(dtype, *shape):
        spec = sharding.spec(mesh, ("rows", None, "heads", None)[: len(shape)], shape)
        return jax.ShapeDtypeStruct(shape, dtype, sharding=jax.sharding.NamedSharding(mesh, spec))

    def loss(*arrays):
        return KERNELS["cudnn"](*arrays, 0.1, 64).astype(jnp.float32).sum()

    arrays = [array(jnp.bfloat16, 8, 256, heads, 128) for heads in (8, 4, 4)] + [array(jnp.int32, 8, 256)]
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh), compiling.described(target):
        text = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).trace(*arrays).lower().compile().as_text()
    assert text.count("__cudnn") == 2
    assert sent(text, mesh.size) == {}


@needs_cuda
@pytest.mark.slow
def test_what_eight_gpus_send_is_what_the_formula_says(tmp_path):
    """docs/scaling.md: twice the base as it is stored, and LoRA's factors and their gradients."""
    record = planned(
        tmp_path, "--config.model.source=google/gemma-3-1b-pt", "--config.data.batch_size=8", "--target", "h100x8"
    )
    linears, lora = 1_152 * (1_024 + 512 + 1_024 + 3 * 6_912) * 26, 32 * 26 * (2 * 2_176 + 2 * 1_408 + 3 * 8_064)
    expected = 2 * 7 / 8 * (linears * 4.25 / 8 + 2 * lora)
    assert 0.9 * expected < record["sent"]["all-gather"] < 1.3 * expected
    assert record["mesh"] == {"data": 1, "fsdp": 8, "tensor": 1}


@pytest.mark.skipif(CUDA, reason="the CUDA wheels are installed")
def test_says_which_extra_is_missing(capsys):
    assert run(plan.main, ["--config", TINY, "--target", "h100"]) == 2
    assert "sst-jax[cuda]" in capsys.readouterr().err


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is not None, reason="the TPU wheels are installed")
def test_says_which_extra_is_missing_for_tpu(capsys):
    assert run(plan.main, ["--config", TINY, "--config.data.batch_size=8", "--target", "v5e-8"]) == 2
    assert "sst-jax[tpu]" in capsys.readouterr().err


def test_the_baseline_differs_from_the_recipe_in_one_line():
    from sst_jax.families.registry import PRESETS
    from sst_jax.files import diff
    from sst_jax.training.recipe import read
    from sst_jax.weights.loading import resolve

    for size in [name for name in PRESETS if not name.startswith("tiny")]:
        on, off = (json.loads(read(f"{path}:size={size}", []).to_json_best_effort()) for path in (SST, BASELINE))
        assert diff(on, off) == [("stream.on", True, False)]
        assert on["data"]["batch_size"] * on["optimizer"]["accumulate"] == 32
        assert resolve(on["model"]["source"]).backbone == PRESETS[size]


def environment():
    """That of a process which imports this package, and all others from where this process does."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}


def test_a_process_of_its_own_finds_wheels_in_a_folder_of_their_own(tmp_path, monkeypatch):
    """As `pip install --target` puts them there, for a PYTHONPATH that names it."""
    (tmp_path / "wheel.py").touch()
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    command = [sys.executable, "-c", "import sst_jax, wheel; print(sst_jax.__file__, wheel.__file__)"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path.parent, env=environment())
    assert done.stdout.split() == [str(ROOT / "sst_jax" / "__init__.py"), str(tmp_path / "wheel.py")]


def planned(tmp_path, *arguments):
    """A plan from a process of its own, whose peak memory is that of the compile; GiB where bytes were."""
    out = tmp_path / "plan.json"
    code = "import sys, resource; from sst_jax import plan; plan.main(sys.argv[1:]); "
    code += "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    command = [sys.executable, "-c", code, "--config", SST, *arguments, "--json", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment())
    assert done.returncode == 0, done.stderr[-2000:]
    print(done.stdout)
    record = json.loads(out.read_text())["plans"][0]
    for name in ("arguments", "temporaries", "peak", "margin"):
        record[name] /= 2**30
    return record | {"host": int(done.stdout.split()[-1]) / 2**20}


PLAIN = "--config.optimizer.accumulate=1"


@needs_cuda
@pytest.mark.slow
@pytest.mark.optimised
@pytest.mark.parametrize(
    ("batch", "quantize", "target", "bar"),
    [
        (1, "nf4", "rtx-pro-6000", 21.5),
        (4, "nf4", "rtx-pro-6000", 27.0),
        (4, "none", "rtx-pro-6000", 62.0),
        (1, "nf4", "rtx-4090", 21.5),
    ],
)
def test_the_27b_two_pass_step_fits(tmp_path, batch, quantize, target, bar):
    knobs = (PLAIN, f"--config.data.batch_size={batch}", f"--config.model.quantize={quantize}")
    record = planned(tmp_path, *knobs, "--target", target)
    assert record["peak"] <= bar
    assert record["fits"]
    assert sum(record["argument_kinds"].values()) / 2**30 == pytest.approx(record["arguments"], rel=0.01)
    assert record["attention"] == "cudnn"
    assert record["host"] <= 2.0


@needs_cuda
@pytest.mark.slow
@pytest.mark.optimised
def test_inputs_of_layers_can_wait_in_the_hosts_memory(tmp_path):
    kept, offloaded = (
        planned(tmp_path, PLAIN, "--config.data.batch_size=4", f"--config.train.remat={remat}")
        for remat in ("layer", "offload")
    )
    streams = 2 * 62 * 4 * 1024 * 5376 * 2 / 2**30  # of both passes, in bfloat16
    assert kept["temporaries"] - offloaded["temporaries"] >= 0.9 * streams
    assert kept["flops"] == offloaded["flops"]


@needs_cuda
@pytest.mark.slow
@pytest.mark.optimised
def test_exact_needs_less_than_two_passes_at_scale(tmp_path):
    knobs = (PLAIN, "--config.data.batch_size=32", "--config.data.length=256")
    two = planned(tmp_path, *knobs, "--config.stream.forward=two_pass")
    exact = planned(tmp_path, *knobs, "--config.stream.forward=exact", "--config.train.remat=memories")
    assert exact["peak"] <= 26.0
    assert exact["bytes_moved"] <= 14e12
    assert exact["kernels"] <= 1.0e6
    assert exact["flops"] <= 0.7 * two["flops"]


@needs_cuda
@pytest.mark.slow
@pytest.mark.optimised
def test_a_position_of_exact_launches_few_kernels(monkeypatch):
    """Of one layer, its walk forward, again for gradients, and backward together, two positions a turn."""
    seen = []
    monkeypatch.setattr(compiling, "traffic", lambda *found: seen.append(found) or traffic(*found))
    knobs = ("stream.forward=exact", "train.remat=memories", "data.batch_size=32", "data.length=64")
    recipe = read_recipe(SST, [f"--config.{knob}" for knob in knobs])
    widths = {"d_model": 1024, "d_ff": 2048, "num_heads": 4, "num_kv_heads": 2, "vocab_size": 512}
    backbone = dataclasses.replace(PRESETS["27b"], num_layers=2, layer_types=("local", "local"), **widths)
    compiling.plan_training(recipe, backbone, targets.find("rtx-pro-6000"))
    positions = 2 * 64
    launched = sum(one.times for one in kernels(*seen[-1]) if one.times >= positions / 2) / positions
    print(f"{launched} kernels")
    assert launched <= 44


@needs_cuda
@pytest.mark.slow
@pytest.mark.optimised
def test_decoding_reads_the_base_once_an_iteration(tmp_path):
    one, four = (planned(tmp_path, "--decode", "--depth", str(depth)) for depth in (1, 4))
    assert one["fits"]
    assert 3.5 < four["flops"] / one["flops"] < 4.0


@needs_cuda
@pytest.mark.slow
@pytest.mark.optimised
@pytest.mark.parametrize(
    ("quantize", "target", "rows", "gigabytes", "kernels"),
    [
        ("nf4", "rtx-pro-6000", 1, 19.0, 3_000),
        ("nf4", "rtx-pro-6000", 8, 35.0, 5_200),
        ("none", "h200", 1, 60.0, 3_200),
    ],
)
def test_a_token_of_the_27b_reads_its_weights_once_and_copies_no_caches(
    tmp_path, quantize, target, rows, gigabytes, kernels
):
    knobs = (f"--config.model.quantize={quantize}", "--target", target)
    record = planned(tmp_path, "--decode", "--rows", str(rows), *knobs)
    assert record["bytes_moved"] <= gigabytes * 1e9
    assert record["kernels"] <= kernels
    assert record["temporaries"] <= 0.3
    if quantize == "nf4":
        prefill = record["programs"]["prefill"]
        assert prefill["bytes_moved"] <= 300e9
        assert prefill["kernels"] <= 10_000


@needs_cuda
@pytest.mark.slow
@pytest.mark.optimised
def test_held_out_evaluation_of_the_27b_takes_minutes(tmp_path):
    phases = planned(tmp_path)["phases"]
    assert phases["evaluation"] / phases["evaluations"] <= 5 * 60
    assert phases["sum"] == pytest.approx(phases["training"] + phases["evaluation"] + phases["compile"])


@needs_cuda
@pytest.mark.parametrize("target", ["a100-80g", "rtx-4090", "h100", "rtx-pro-6000"])
def test_the_nf4_product_compiles_for_every_generation(target):
    """Capabilities 8.0, 8.9, 9.0 and 12.0, forward and backward, both kinds, one and three linears, with LoRA."""
    target = targets.find(target)
    mesh = compiling.mesh_on(target, MeshConfig())
    place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    for kind, outputs in itertools.product(("nf4", "nf4_double"), [(512,), (512, 128, 256)]):
        storage = storages.get(kind)

        def both(x, dy, stacks, storage=storage, outputs=outputs):
            linears = [
                StackedLinear(
                    stack,
                    jnp.int32(1),
                    storage.kernel({name: part[1] for name, part in stack.items()}, jnp.bfloat16),
                    storage,
                )
                for stack in stacks
            ]
            y, pull = jax.vjp(lambda x: storages.products(x, linears), x)
            factors = LowRank(jnp.ones((256, 16 * len(linears)), x.dtype), jnp.ones((16, sum(outputs)), x.dtype))
            adapted, pull_adapted = jax.vjp(lambda x: storages.adapted_products(x, linears, factors), x)
            return y, pull(dy), adapted, pull_adapted(jnp.concatenate(dy, axis=-1))

        shapes = (
            jax.ShapeDtypeStruct((8, 256), jnp.bfloat16),
            tuple(jax.ShapeDtypeStruct((8, each), jnp.bfloat16) for each in outputs),
            [storage.abstract((2, 256, each)) for each in outputs],
        )
        placed = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), shapes)
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh), compiling.described(target):
            text = jax.jit(both).trace(*placed).lower().compile().as_text()
        assert text.count('custom_call_target="__gpu$xla.gpu.triton"') == 4
