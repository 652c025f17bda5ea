"""A storage of linears is one file: a toy one, registered here, goes wherever NF4 goes."""

import dataclasses
import re
from pathlib import Path
from types import MappingProxyType

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sst_jax
from sst_jax.data.tokenizer import ByteTokenizer
from sst_jax.errors import InputError
from sst_jax.families.registry import PRESETS
from sst_jax.inference.model import Model
from sst_jax.lab.planning import programs
from sst_jax.model import rules, sharding
from sst_jax.model.config import ModelConfig
from sst_jax.model.quantization import nf4, storages
from sst_jax.model.quantization.base import BLOCKS, PER_OUTPUT, LinearStorage
from sst_jax.weights import huggingface, lora, store
from sst_jax.weights.loading import open_model
from sst_jax.weights.source import fill_base
from tests.support import toys

PACKAGE = Path(sst_jax.__file__).parent


class Int8(LinearStorage):
    """Eight bits a weight and a scale an output; multiplied as it is stored where `fused`."""

    name = "toy_int8"
    axes = MappingProxyType({"eighths": BLOCKS, "output_scale": PER_OUTPUT})

    def __init__(self, fused=False):
        self.fused, self.products = fused, 0

    def quantise(self, kernel):
        scale = jnp.abs(kernel).max(axis=-2).astype(jnp.float32) / 127
        return {"eighths": jnp.round(kernel / scale[..., None, :]).astype(jnp.int8), "output_scale": scale}

    def kernel(self, leaf, dtype):
        return (leaf["eighths"] * leaf["output_scale"][..., None, :]).astype(dtype)

    def product(self, x, leaf):
        self.products += 1
        return (x @ leaf["eighths"].astype(x.dtype)) * leaf["output_scale"].astype(x.dtype)


@pytest.fixture(params=[False, True], ids=["unpacked", "fused"])
def int8(request, monkeypatch):
    monkeypatch.setattr(storages, "STORAGES", dict(storages.STORAGES))
    jax.clear_caches()  # compiled functions know storages by name
    return storages.register(Int8(request.param))


def apart(ours, theirs):
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    return np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)


@pytest.mark.fast_cases(2)
@pytest.mark.parametrize("forward", ["plain", "two_pass", "exact"])
def test_a_forward_on_a_storage_is_the_forward_on_what_it_stands_for(int8, forward):
    config = toys.config({"alpha": 0.3})
    params, tokens = toys.params(config), toys.tokens(2, 24)
    base = {**params["base"], "layers": storages.quantise_layers(params["base"]["layers"], "toy_int8")}
    assert storages.kind_of(base) == "toy_int8"
    values = {**base, "layers": storages.dequantise(base["layers"], jnp.float32)}
    ours, theirs, exact = (
        rules.logits(config, {**params, "base": tree}, tokens, forward=forward)
        for tree in (base, values, params["base"])
    )
    assert apart(ours, theirs) < 1e-5 < apart(ours, exact)
    assert bool(int8.products) == int8.fused


def test_a_storage_goes_through_loading_saving_and_opening(int8, tmp_path):
    opened = open_model("random:tiny", "float32", "toy_int8")
    assert opened.params["base"]["layers"]["gate"]["eighths"].dtype == np.int8
    store.save_base(
        tmp_path / "base", opened.config.to_dict(), opened.params, {"kind": "random"}, ByteTokenizer().files()
    )
    again = sst_jax.load(tmp_path / "base", "bfloat16")  # the floats of the rest are narrowed, the linears are not
    assert storages.kind_of(again.params["base"]) == "toy_int8"
    assert again.params["base"]["layers"]["q"]["output_scale"].dtype == np.float32
    assert again.params["base"]["embed"]["embedding"].dtype == jnp.bfloat16
    layers = sst_jax.load(tmp_path / "base", "float32").params["base"]["layers"]
    assert jax.tree.all(jax.tree.map(np.array_equal, layers, opened.params["base"]["layers"]))
    model = Model(*opened)
    assert apart(sst_jax.load(tmp_path / "base", "float32").logits([[5, 6, 7]]), model.logits([[5, 6, 7]])) < 1e-5
    merged = lora.merge(opened.params["base"], {}, opened.config.adapter)["layers"]["down"]["kernel"]
    plain = open_model("random:tiny", "float32").params["base"]["layers"]["down"]["kernel"]
    assert merged.shape == plain.shape
    assert apart(merged[1], plain[1]) < 0.01


def test_a_storage_is_read_from_a_checkpoint_and_its_bytes_are_planned(int8, tmp_path, monkeypatch):
    plain = open_model("random:tiny", "float32")
    huggingface.write_folder(tmp_path / "plain", plain.config.backbone, plain.params["base"], "float32")
    base = fill_base(huggingface.open_folder(tmp_path / "plain"), "float32", quantize="toy_int8")
    expected = jax.jit(lambda layers: storages.quantise_layers(layers, "toy_int8"))(plain.params["base"]["layers"])
    assert jax.tree.structure(base["layers"]) == jax.tree.structure(expected)
    assert jax.tree.all(jax.tree.map(lambda a, b: np.allclose(a, b, atol=1), base["layers"], expected))
    config = ModelConfig(PRESETS["270m"])
    planned = jax.eval_shape(lambda: programs.abstract_parameters(config, "bfloat16", "toy_int8")[0]["layers"]["up"])
    inputs, outputs = config.backbone.linear_shapes["up"]
    layers = config.backbone.num_layers
    expected_bytes = layers * (inputs * outputs + 4 * outputs)
    assert sum(leaf.size * leaf.dtype.itemsize for leaf in planned.values()) == expected_bytes
    assert int8.num_bytes((layers, inputs, outputs)) == expected_bytes


def test_a_mesh_places_the_arrays_of_a_storage_along_their_kernel(int8):
    assert sharding.axes_of(("base", "layers", "down", "eighths"), 3) == (None, "summed", "model")
    assert sharding.axes_of(("base", "layers", "down", "output_scale"), 2) == (None, "model")
    assert sharding.axes_of(("base", "layers", "up", "output_scale"), 2) == (None, "width")
    assert sharding.axes_of(("base", "layers", "down", "codes"), 3) == (None, "summed", "model")


@pytest.mark.parametrize("kind", ["none", "nf4", "nf4_double"])
def test_every_storage_says_shapes_bytes_and_axes_as_they_are(kind):
    storage, kernel = storages.get(kind), jax.random.normal(jax.random.key(0), (2, 128, 300))
    leaf = jax.jit(storage.quantise)(kernel)
    assert {name: (part.shape, part.dtype) for name, part in leaf.items()} == {
        name: (part.shape, part.dtype) for name, part in storage.abstract(kernel.shape).items()
    }
    assert set(leaf) == set(storage.axes)
    assert storage.num_bytes(kernel.shape) == sum(part.nbytes for part in leaf.values())
    assert storage.kernel_shape(leaf) == kernel.shape
    assert storages.storage_of({**leaf, "bias": jnp.zeros(300)}) is storage
    strips = [jax.jit(storage.quantise)(kernel[..., at : at + storage.group]) for at in range(0, 300, storage.group)]
    for name, part in leaf.items():
        assert np.array_equal(np.concatenate([strip[name] for strip in strips], axis=-1), part)


def test_biases_beside_a_linear_stay():
    layers = {"q": {"kernel": jnp.ones((64, 4)), "bias": jnp.arange(4.0)}, "norm": {"scale": jnp.ones(4)}}
    stored = storages.quantise_layers(layers, "nf4")
    assert np.array_equal(stored["q"]["bias"], layers["q"]["bias"])
    back = storages.dequantise(stored, jnp.float32)
    assert jax.tree.all(jax.tree.map(np.array_equal, back, layers))


def test_what_cannot_be_registered_or_named_is_refused(int8):
    with pytest.raises(ValueError, match="already"):
        storages.register(Int8())
    clashing = Int8()
    clashing.name, clashing.axes = "clashing", {"codes": PER_OUTPUT}
    with pytest.raises(ValueError, match="'codes' is taken"):
        storages.register(clashing)
    with pytest.raises(InputError, match=r"quantize='int3' is not one of none, nf4, nf4_double, toy_int8"):
        storages.get("int3")
    with pytest.raises(InputError, match="cannot be fitted"):
        int8.quantise_for(jnp.ones((2, 2)), jnp.eye(2))


def test_nothing_outside_a_storages_file_knows_the_names_of_its_arrays():
    names = {name for kind in nf4.KINDS for name in storages.get(kind).axes}
    spelled = re.compile("|".join(rf"[\"'/.]{name}[\"'/]" for name in names))
    for file in PACKAGE.rglob("*.py"):
        if file != Path(nf4.__file__):
            assert not spelled.findall(file.read_text()), file
    assert spelled.findall(Path(nf4.__file__).read_text())


def test_passes_share_one_unpacked_kernel():
    """Of each of a layer's seven linears, however many passes there are; their products are not shared."""
    backbone = dataclasses.replace(toys.BACKBONE, d_model=64, d_ff=64, num_heads=4, head_dim=16)
    config = toys.config({"alpha": 0.3}, backbone)
    params, tokens = toys.params(config), toys.tokens(1, 8)
    base = {**params["base"], "layers": storages.quantise_layers(params["base"]["layers"], "nf4")}

    def unpacked(passes):
        def forward(base):
            return rules.logits(config, {**params, "base": base}, tokens, forward="k_pass", passes=passes)

        return str(jax.make_jaxpr(forward)(base)).count("reduce_precision[")

    assert unpacked(2) == unpacked(4) == 7
