"""Folders whose linears were quantised before: NF4 and 8-bit floats, built by hand and by bitsandbytes."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from sst_jax.errors import InputError
from sst_jax.families.registry import PRESETS
from sst_jax.model import rules
from sst_jax.model.config import ModelConfig
from sst_jax.model.quantization import nf4
from sst_jax.weights import key_map
from sst_jax.weights.hub_config import config_json
from sst_jax.weights.huggingface import open_folder
from sst_jax.weights.source import fill_base
from tests.support import toys

BACKBONE = dataclasses.replace(PRESETS["tiny-llama"], num_layers=1, d_ff=192, layer_types=("global",))
BNB = {
    "quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False, "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_quant_storage": "uint8", "bnb_4bit_use_double_quant": False,
}  # fmt: skip
FP8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}


def weights(seed=0):
    rng, state = np.random.default_rng(seed), {}
    for key, entry in key_map.expected(BACKBONE).items():
        state[key] = (rng.standard_normal(entry.shape) * entry.shape[-1] ** -0.5).astype(np.float32)
    return state


def folder_of(path, state, quantization=None):
    path.mkdir()
    config = config_json(BACKBONE, "float32")
    if quantization is not None:
        config["quantization_config"] = quantization
    (path / "config.json").write_text(json.dumps(config))
    save_file({key: np.ascontiguousarray(value) for key, value in state.items()}, path / "model.safetensors")
    return path


def linears(state):
    return [key for key in state if key.endswith("_proj.weight")]


def in_nf4(weight, nested, dtype="float32"):
    """A linear as bitsandbytes lays it out, and the numbers that it stands for, from the definition alone."""
    blocks = weight.reshape(-1, 64)
    absmax = np.abs(blocks).max(1)
    codes = np.abs(blocks[..., None] / absmax[:, None, None] - nf4.LEVELS).argmin(-1).astype(np.uint8).reshape(-1)
    document = {"quant_type": "nf4", "blocksize": 64, "dtype": dtype, "shape": list(weight.shape)}
    parts = {"": ((codes[::2] << 4) | codes[1::2])[:, None], ".quant_map": nf4.LEVELS, ".absmax": absmax}
    if nested:
        offset, table = absmax.mean(), np.linspace(-1, 1, 256, dtype=np.float32)
        largest = np.abs(absmax - offset).max()
        places = np.abs(((absmax - offset) / largest)[:, None] - table).argmin(1).astype(np.uint8)
        parts |= {".absmax": places, ".nested_absmax": np.array([largest], np.float32), ".nested_quant_map": table}
        document |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": float(offset)}
        absmax = table[places] * largest + np.float32(offset)
    parts[".quant_state.bitsandbytes__nf4"] = np.frombuffer(json.dumps(document).encode(), np.uint8)
    return parts, (nf4.LEVELS[codes].reshape(-1, 64) * absmax[:, None]).reshape(weight.shape)


@pytest.mark.parametrize("nested", [False, True])
def test_a_bitsandbytes_folder_is_read_as_the_numbers_that_it_stands_for(nested, tmp_path):
    plain = weights()
    stored, meant = dict(plain), dict(plain)
    for key in linears(plain):
        parts, meant[key] = in_nf4(plain[key], nested)
        del stored[key]
        stored |= {key + name: value for name, value in parts.items()}
    source = open_folder(folder_of(tmp_path / "bnb", stored, BNB))
    assert (source.backbone, source.dtype) == (BACKBONE, "float32")
    got, expected = (fill_base(one, "float32") for one in (source, open_folder(folder_of(tmp_path / "meant", meant))))
    jax.tree.map(np.testing.assert_array_equal, got, expected)
    # Quantised here again, it has the codes of its original, and its scales rounded once.
    ours = fill_base(open_folder(folder_of(tmp_path / "plain", plain)), "float32", quantize="nf4")["layers"]
    again = fill_base(source, "float32", quantize="nf4")["layers"]
    for name in ("q", "k", "v", "o", "gate", "up", "down"):
        np.testing.assert_array_equal(again[name]["codes"], ours[name]["codes"])
        if not nested:
            np.testing.assert_array_equal(again[name]["scales"], ours[name]["scales"])


@pytest.mark.parametrize("scales", ["block", "row", "tensor"])
def test_eight_bit_floats_are_multiplied_by_their_scales(scales, tmp_path):
    plain = weights()
    stored, meant = dict(plain), dict(plain)
    for key in linears(plain):
        weight = plain[key]
        factor = {
            "block": np.full([-(-size // 128) for size in weight.shape], 0.5, np.float32),
            "row": np.full((len(weight), 1), 0.5, np.float32), "tensor": np.float32([0.5]),
        }[scales]  # fmt: skip
        factor *= 1 + np.arange(factor.size, dtype=np.float32).reshape(factor.shape)
        wide = factor if scales != "block" else np.repeat(np.repeat(factor, 128, 0), 128, 1)
        wide = wide[: weight.shape[0], : weight.shape[1]] if scales == "block" else wide
        stored[key] = (weight / wide).astype(ml_dtypes.float8_e4m3fn)
        meant[key] = stored[key].astype(np.float32) * wide
        stored[key.replace(".weight", ".weight_scale_inv" if scales == "block" else ".weight_scale")] = factor
    got = fill_base(open_folder(folder_of(tmp_path / "fp8", stored, FP8)), "float32")
    expected = fill_base(open_folder(folder_of(tmp_path / "meant", meant)), "float32")
    jax.tree.map(np.testing.assert_array_equal, got, expected)
    assert np.abs(got["layers"]["down"]["kernel"][0].T - plain[linears(plain)[-1]]).max() < 0.05


@pytest.mark.parametrize(
    ("quantization", "message"),
    [
        ({"quant_method": "gptq", "bits": 4}, "'gptq' is unsupported.*zero points"),
        ({"quant_method": "awq", "bits": 4}, "'awq' is unsupported.*zero points"),
        ({"quant_method": "mxfp4"}, "'mxfp4' is unsupported"),
        ({"quant_method": "compressed-tensors", "format": "pack-quantized"}, "'compressed-tensors' is unsupported"),
        ({**BNB, "bnb_4bit_quant_type": "fp4"}, "'bitsandbytes' is unsupported.*not its fp4"),
        ({**BNB, "load_in_4bit": False, "load_in_8bit": True}, "'bitsandbytes' is unsupported.*8 bits"),
    ],
)
def test_other_storages_are_refused_by_their_name(quantization, message, tmp_path):
    with pytest.raises(InputError, match=message):
        open_folder(folder_of(tmp_path / "folder", weights(), quantization))


def test_what_is_missing_beside_a_quantised_linear_is_named(tmp_path):
    plain = weights()
    key = linears(plain)[0]
    parts, _ = in_nf4(plain.pop(key), nested=False)
    parts.pop(".absmax")
    with pytest.raises(InputError, match=r"q_proj\.weight\.absmax is missing"):
        open_folder(folder_of(tmp_path / "bnb", plain | {key + name: value for name, value in parts.items()}, BNB))
    plain[key] = np.zeros((64, 64), ml_dtypes.float8_e4m3fn)
    with pytest.raises(InputError, match=r"q_proj\.weight_scale_inv is missing"):
        open_folder(folder_of(tmp_path / "fp8", plain, FP8))


def test_half_precision_is_read_without_loss(tmp_path):
    state = {key: value.astype(np.float16) for key, value in weights().items()}
    got = fill_base(open_folder(folder_of(tmp_path / "half", state)), "float32")
    np.testing.assert_array_equal(got["layers"]["q"]["kernel"][0].T, state[linears(state)[0]].astype(np.float32))


def test_a_pickle_is_refused_with_the_reason(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(config_json(BACKBONE, "float32")))
    (tmp_path / "pytorch_model-00001-of-00002.bin").write_bytes(b"")
    with pytest.raises(InputError, match=r"pytorch_model-00001-of-00002\.bin is a pickle, which can run any program"):
        open_folder(tmp_path)


# ------------------------------------------------------------------------------------------------------ bitsandbytes


def test_codes_are_those_of_bitsandbytes():
    """But at exact ties, of which there are none among drawn numbers."""
    functional = pytest.importorskip("bitsandbytes").functional
    torch = pytest.importorskip("torch")
    weight = np.random.default_rng(0).standard_normal((256, 512)).astype(np.float32)
    packed, state = functional.quantize_4bit(torch.from_numpy(weight), blocksize=64, quant_type="nf4")
    codes = packed.numpy().reshape(-1)
    theirs = np.stack([codes >> 4, codes & 15], -1).reshape(weight.shape)
    leaf = nf4.quantise(jnp.asarray(weight.T))
    ours = np.asarray(leaf["codes"])
    ours = np.stack([ours & 15, ours >> 4], 1).reshape(512, 256).T
    assert np.count_nonzero(ours != theirs) == 0
    scales = state.absmax.numpy().reshape(256, -1).T
    np.testing.assert_array_equal(np.asarray(leaf["scales"]), scales.astype(ml_dtypes.bfloat16))
    np.testing.assert_array_equal(state.code.numpy(), nf4.LEVELS)


@pytest.mark.parametrize("nested", [False, True])
def test_logits_of_a_bitsandbytes_folder_are_transformers(nested, tmp_path):
    pytest.importorskip("bitsandbytes")
    pytest.importorskip("accelerate")
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    plain = folder_of(tmp_path / "plain", weights())
    how = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=nested,
        bnb_4bit_compute_dtype=torch.float32,
    )  # fmt: skip
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        plain, quantization_config=how, device_map="cpu", dtype=torch.float32
    )
    theirs.save_pretrained(tmp_path / "bnb")
    tokens = toys.tokens(2, 40, vocabulary=262)
    with torch.no_grad():
        # In training its linears multiply in float32; else this CPU's kernel may round to bfloat16.
        expected = theirs.train()(torch.tensor(tokens).long()).logits.float().numpy()
    base = jax.tree.map(jnp.asarray, fill_base(open_folder(tmp_path / "bnb"), "float32"))
    params = {"base": base, "adapter": {}, "blend": {}}
    got = np.asarray(rules.logits(ModelConfig(BACKBONE), params, tokens, forward="plain"))
    print(f"nested={nested}: largest difference {np.abs(got - expected).max():.2e} of {np.abs(expected).max():.2f}")
    assert np.abs(got - expected).max() <= 1e-3
