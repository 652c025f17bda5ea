"""Hugging Face folders: bit-for-bit round trips, the hub's configs, and every way in which a folder can be broken."""

import json
import struct
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

import sst_jax
from sst_jax.errors import InputError
from sst_jax.families.registry import PRESETS
from sst_jax.weights import huggingface, key_map
from sst_jax.weights.huggingface import (
    INDEX,
    FolderExtras,
    backbone_from_config,
    config_json,
    open_folder,
    resolve_hub,
    write_folder,
)
from sst_jax.weights.references import NO_TOWER, vision_tensors
from sst_jax.weights.source import digest, fill_base
from tests.support import checkpoints

# ----------------------------------------------------------------------------------------------------- round trips


def multimodal(state, layout, dtype=np.float32):
    """A text state dict under multimodal names, with pieces of a vision tower and a tied head beside it."""
    top = "model." if layout == "multimodal_v5" else ""
    renamed = {key.replace("model.", key_map.LAYOUTS[layout], 1): value for key, value in state.items()}
    assert not set(renamed) & set(state)
    renamed[f"{top}vision_tower.vision_model.embeddings.patch_embedding.bias"] = np.ones((8,), dtype)
    renamed[f"{top}multi_modal_projector.mm_input_projection_weight"] = np.ones((8, 24), dtype)
    head = "lm_head.weight" if layout == "multimodal_v5" else "language_model.lm_head.weight"
    renamed[head] = renamed[key_map.LAYOUTS[layout] + "embed_tokens.weight"]
    return renamed


def without_extras(raw):
    return {k: v for k, v in raw.items() if "vision_tower" not in k and "multi_modal" not in k and "lm_head" not in k}


@pytest.mark.parametrize("layout", list(key_map.LAYOUTS))
@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_round_trip_is_bit_for_bit(tmp_path, layout, shards, dtype):
    target = np.float32 if dtype == "float32" else ml_dtypes.bfloat16
    state = checkpoints.random_state(dtype=target)
    if layout != "text":
        state = multimodal(state, layout, target)
    config = config_json(checkpoints.BACKBONE, dtype, layout)
    source = open_folder(checkpoints.write_checkpoint(tmp_path / "in", state, config=config, shards=shards))
    assert (source.layout, source.dtype, source.backbone) == (layout, dtype, checkpoints.BACKBONE)
    base = fill_base(source, dtype)
    limit = 2e9 if shards == 1 else 9000
    write_folder(tmp_path / "out", source.backbone, base, source.dtype, layout=source.layout, shard_bytes=limit)
    assert checkpoints.read_raw(tmp_path / "out") == without_extras(checkpoints.read_raw(tmp_path / "in"))
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1 or shards == 1
    assert open_folder(tmp_path / "out").backbone == checkpoints.BACKBONE


def test_shards_are_packed_up_to_the_limit_and_indexed(tmp_path):
    base = fill_base(open_folder(checkpoints.write_checkpoint(tmp_path / "in", checkpoints.random_state())), "bfloat16")
    write_folder(tmp_path / "out", checkpoints.BACKBONE, base, "bfloat16", shard_bytes=20_000)
    index = json.loads((tmp_path / "out" / INDEX).read_text())
    sizes = {}
    for file in (tmp_path / "out").glob("*.safetensors"):
        state = load_file(file)
        assert {index["weight_map"][key] for key in state} == {file.name}
        sizes[file.name] = sum(value.nbytes for value in state.values())
    assert sorted(set(index["weight_map"].values())) == sorted(sizes)
    assert max(sizes.values()) <= 20_000
    assert sum(sizes.values()) == index["metadata"]["total_size"] == 2 * checkpoints.BACKBONE.num_params
    assert len(sizes) == -(-sum(sizes.values()) // 20_000) or len(sizes) <= 1.3 * sum(sizes.values()) / 20_000


def test_every_array_lands_in_its_slot(tmp_path):
    state = checkpoints.random_state(dtype=np.float32)
    base = fill_base(open_folder(checkpoints.write_checkpoint(tmp_path, state)), "float32")
    np.testing.assert_array_equal(base["embed"]["embedding"], state["model.embed_tokens.weight"])
    np.testing.assert_array_equal(base["final_norm"]["scale"], state["model.norm.weight"])
    layers = base["layers"]
    for slot, key in {
        ("q", "kernel"): "self_attn.q_proj", ("k", "kernel"): "self_attn.k_proj", ("v", "kernel"): "self_attn.v_proj",
        ("o", "kernel"): "self_attn.o_proj", ("gate", "kernel"): "mlp.gate_proj", ("up", "kernel"): "mlp.up_proj",
        ("down", "kernel"): "mlp.down_proj", ("q_norm", "scale"): "self_attn.q_norm",
        ("k_norm", "scale"): "self_attn.k_norm", ("pre_attn_norm", "scale"): "input_layernorm",
        ("post_attn_norm", "scale"): "post_attention_layernorm",
        ("pre_ffn_norm", "scale"): "pre_feedforward_layernorm",
        ("post_ffn_norm", "scale"): "post_feedforward_layernorm",
    }.items():  # fmt: skip
        stacked = layers[slot[0]][slot[1]]
        for layer in range(checkpoints.BACKBONE.num_layers):
            wanted = state[f"model.layers.{layer}.{key}.weight"]
            np.testing.assert_array_equal(stacked[layer], wanted.T)
    assert len(layers) == 13


def test_dtypes_convert_on_the_way_in(tmp_path):
    state = checkpoints.random_state(dtype=np.float32)
    state["model.norm.weight"] = state["model.norm.weight"].astype(np.float16)
    source = open_folder(checkpoints.write_checkpoint(tmp_path, state))
    assert source.dtype == "float32"
    base = fill_base(source, "bfloat16")
    embedding = base["embed"]["embedding"]
    assert embedding.dtype == ml_dtypes.bfloat16
    assert embedding.tobytes() == state["model.embed_tokens.weight"].astype(ml_dtypes.bfloat16).tobytes()
    assert base["final_norm"]["scale"].tobytes() == state["model.norm.weight"].astype(ml_dtypes.bfloat16).tobytes()
    with pytest.raises(InputError, match="float64"):
        fill_base(source, "float64")


def test_float16_is_read_into_float32(tmp_path):
    """A base is float32 or bfloat16, and the first holds every float16 number."""
    state = checkpoints.random_state(dtype=np.float16)
    source = open_folder(checkpoints.write_checkpoint(tmp_path, state))
    assert source.dtype == "float32"
    embedding = fill_base(source, source.dtype)["embed"]["embedding"]
    np.testing.assert_array_equal(embedding, state["model.embed_tokens.weight"].astype(np.float32))


@pytest.mark.parametrize("shards", [1, 3])
def test_frequencies_of_rope_are_computed_and_not_read(tmp_path, shards):
    """transformers before 4.32 saved them, in float32; what they are saved as does not change the model's type."""
    state, ones = checkpoints.random_state(), np.ones(4, np.float32)
    names = ("layers.0.self_attn.rotary_emb", "rotary_emb", "rotary_emb_local")
    buffers = {f"model.{name}.inv_freq": ones for name in names} | {"model.rotary_emb.original_inv_freq": ones}
    old = open_folder(checkpoints.write_checkpoint(tmp_path / "old", {**state, **buffers}, shards=shards))
    assert {tensor.name for tensor in old.tensors()} == set(state)
    assert old.dtype == "bfloat16"
    assert vision_tensors(old) == NO_TOWER
    assert fill_base(old, "float32").keys() == {"embed", "final_norm", "layers"}
    odd = checkpoints.write_checkpoint(tmp_path / "odd", {**state, "model.rotary_emb.scale": ones})
    with pytest.raises(InputError, match=r"unknown key model\.rotary_emb\.scale"):
        fill_base(open_folder(odd), "float32")


def test_progress_counts_up_to_the_whole(tmp_path):
    source = open_folder(checkpoints.write_checkpoint(tmp_path / "in", checkpoints.random_state()))
    calls = []
    base = fill_base(source, "float32", progress=lambda *call: calls.append(call))
    assert [total for _, total in calls] == [4 * checkpoints.BACKBONE.num_params] * len(calls)
    assert calls[-1][0] == calls[-1][1]
    assert [done for done, _ in calls] == sorted(done for done, _ in calls)
    calls.clear()
    write_folder(
        tmp_path / "out", checkpoints.BACKBONE, base, "float32", shard_bytes=30_000, progress=lambda *c: calls.append(c)
    )
    assert len(calls) > 2
    assert calls[-1] == (4 * checkpoints.BACKBONE.num_params,) * 2


def test_digest_depends_on_names_and_bytes_only(tmp_path):
    one = open_folder(checkpoints.write_checkpoint(tmp_path / "one", checkpoints.random_state(), shards=2))
    two = open_folder(checkpoints.write_checkpoint(tmp_path / "two", checkpoints.random_state(), shards=2))
    other = open_folder(checkpoints.write_checkpoint(tmp_path / "other", checkpoints.random_state(seed=1), shards=2))
    assert digest(one.files) == digest(reversed(two.files))
    assert digest(one.files) != digest(other.files)
    assert [file.suffix for file in one.files] == [".json", ".safetensors", ".safetensors"]
    (tmp_path / "a").write_bytes(b"xy")
    (tmp_path / "b").write_bytes(b"z")
    before = digest([tmp_path / "a", tmp_path / "b"])
    (tmp_path / "a").write_bytes(b"x")
    (tmp_path / "b").write_bytes(b"yz")
    assert digest([tmp_path / "a", tmp_path / "b"]) != before
    calls = []
    digest(one.files, progress=lambda *call: calls.append(call))
    assert calls[-1][0] == calls[-1][1] == sum(file.stat().st_size for file in one.files)


# ------------------------------------------------------------------------------------------- against transformers


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shard_size", ["1GB", "20KB"])
def test_save_pretrained_round_trip(torch_model, tmp_path, dtype, shard_size):
    torch = pytest.importorskip("torch")
    import copy

    model = copy.deepcopy(torch_model).to(getattr(torch, dtype))
    model.save_pretrained(tmp_path / "in", max_shard_size=shard_size)
    source = open_folder(tmp_path / "in")
    assert source.backbone == checkpoints.BACKBONE
    assert (source.layout, source.dtype) == ("text", dtype)
    assert (len(source.files) > 2) == (shard_size == "20KB")
    write_folder(tmp_path / "out", source.backbone, fill_base(source, dtype), dtype, shard_bytes=25_000)
    assert checkpoints.read_raw(tmp_path / "out") == checkpoints.read_raw(tmp_path / "in")


@pytest.mark.parametrize("layout", list(key_map.LAYOUTS))
def test_transformers_loads_the_export_and_computes_the_same(torch_model, tmp_path, layout):
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    torch_model.save_pretrained(tmp_path / "in")
    source = open_folder(tmp_path / "in")
    base = fill_base(source, "float32")
    write_folder(tmp_path / "out", source.backbone, base, "float32", layout=layout, shard_bytes=25_000)
    loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    missing = {key for key in report["missing_keys"] if "vision_tower" not in key and "multi_modal" not in key}
    assert not missing
    assert not report["unexpected_keys"]
    assert loaded.dtype == torch.float32
    tokens = torch.arange(40)[None] % 60
    with torch.no_grad():
        ours, theirs = loaded.eval()(input_ids=tokens).logits, torch_model(input_ids=tokens).logits
    assert theirs.std() > 0.1
    assert torch.equal(ours, theirs)
    if layout == "text":
        assert type(loaded).__name__ == "Gemma3ForCausalLM"
        assert not report["missing_keys"]


def test_nothing_here_imports_torch(tmp_path):
    import subprocess

    folder = checkpoints.write_checkpoint(tmp_path, checkpoints.random_state())
    code = (
        "import sys\nfrom sst_jax.weights import huggingface, source\n"
        "source.fill_base(huggingface.open_folder(sys.argv[1]), 'bfloat16')\n"
        "print(sorted({'torch', 'transformers', 'tensorflow', 'gguf', 'orbax'} & set(sys.modules)))"
    )
    root = Path(sst_jax.__file__).parents[1]
    run = subprocess.run([sys.executable, "-c", code, folder], capture_output=True, text=True, check=True, cwd=root)
    assert run.stdout.strip() == "[]"


# --------------------------------------------------------------------------------------------------------- configs

LAYER_TYPES_270M = (["sliding_attention"] * 5 + ["full_attention"]) * 3
VISION = {
    "hidden_size": 1152, "image_size": 896, "intermediate_size": 4304, "model_type": "siglip_vision_model",
    "num_attention_heads": 16, "num_hidden_layers": 27, "patch_size": 14, "vision_use_head": False,
}  # fmt: skip
SCALING = {"factor": 8.0, "rope_type": "linear"}


def multimodal_config(**text):
    return {
        "architectures": ["Gemma3ForConditionalGeneration"], "boi_token_index": 255999, "eoi_token_index": 256000,
        "eos_token_id": [1, 106], "image_token_index": 262144, "initializer_range": 0.02, "mm_tokens_per_image": 256,
        "model_type": "gemma3", "text_config": {"model_type": "gemma3_text", "rope_scaling": SCALING, **text},
        "torch_dtype": "bfloat16", "transformers_version": "4.50.0.dev0", "vision_config": VISION,
    }  # fmt: skip


# As published on the hub: the text-only sizes spell everything out, the multimodal ones lean on defaults.
HUB = {
    "270m": {
        "_sliding_window_pattern": 6, "architectures": ["Gemma3ForCausalLM"], "attention_bias": False,
        "attention_dropout": 0.0, "attn_logit_softcapping": None, "bos_token_id": 2, "eos_token_id": 1,
        "final_logit_softcapping": None, "head_dim": 256, "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size": 640, "initializer_range": 0.02, "intermediate_size": 2048, "layer_types": LAYER_TYPES_270M,
        "max_position_embeddings": 32768, "model_type": "gemma3_text", "num_attention_heads": 4,
        "num_hidden_layers": 18, "num_key_value_heads": 1, "pad_token_id": 0, "query_pre_attn_scalar": 256,
        "rms_norm_eps": 1e-06, "rope_local_base_freq": 10000.0, "rope_scaling": None, "rope_theta": 1000000.0,
        "sliding_window": 512, "torch_dtype": "bfloat16", "transformers_version": "4.55.0.dev0",
        "use_bidirectional_attention": False, "use_cache": True, "vocab_size": 262144,
    },
    "1b": {
        "architectures": ["Gemma3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
        "attn_logit_softcapping": None, "bos_token_id": 2, "cache_implementation": "hybrid", "eos_token_id": [1, 106],
        "final_logit_softcapping": None, "head_dim": 256, "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size": 1152, "initializer_range": 0.02, "intermediate_size": 6912, "max_position_embeddings": 32768,
        "model_type": "gemma3_text", "num_attention_heads": 4, "num_hidden_layers": 26, "num_key_value_heads": 1,
        "pad_token_id": 0, "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-06, "rope_local_base_freq": 10000,
        "rope_scaling": None, "rope_theta": 1000000, "sliding_window": 512, "sliding_window_pattern": 6,
        "torch_dtype": "bfloat16", "transformers_version": "4.50.0.dev0", "use_cache": True, "vocab_size": 262144,
    },
    "4b": multimodal_config(hidden_size=2560, intermediate_size=10240, num_hidden_layers=34, sliding_window=1024),
    "12b": multimodal_config(
        hidden_size=3840, intermediate_size=15360, num_attention_heads=16, num_hidden_layers=48,
        num_key_value_heads=8, sliding_window=1024,
    ),
    "27b": multimodal_config(
        head_dim=128, hidden_size=5376, intermediate_size=21504, num_attention_heads=32, num_hidden_layers=62,
        num_key_value_heads=16, query_pre_attn_scalar=168, sliding_window=1024,
    ),
}  # fmt: skip


@pytest.mark.parametrize("size", list(HUB))
def test_hub_configs_are_the_presets(size):
    assert backbone_from_config(HUB[size]) == PRESETS[size]


@pytest.mark.parametrize("size", list(HUB))
def test_transformers_5_rewrites_the_hub_configs_to_the_same_backbone(size):
    transformers = pytest.importorskip("transformers")
    kind = transformers.Gemma3Config if HUB[size]["model_type"] == "gemma3" else transformers.Gemma3TextConfig
    rewritten = json.loads(kind(**json.loads(json.dumps(HUB[size]))).to_json_string(use_diff=False))
    assert "rope_parameters" in rewritten.get("text_config", rewritten)
    assert backbone_from_config(rewritten) == PRESETS[size]


@pytest.mark.parametrize("layout", list(key_map.LAYOUTS))
@pytest.mark.parametrize("size", [name for name, preset in PRESETS.items() if preset.family == "gemma3"])
def test_written_configs_are_read_back_by_us_and_by_transformers(size, layout):
    transformers = pytest.importorskip("transformers")
    config = json.loads(json.dumps(config_json(PRESETS[size], "bfloat16", layout)))
    assert backbone_from_config(config) == PRESETS[size]
    kind = transformers.Gemma3TextConfig if layout == "text" else transformers.Gemma3Config
    assert backbone_from_config(kind(**config).to_dict()) == PRESETS[size]


SMALL = HUB["1b"]
NEW_STYLE = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 12_000.0},
    "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 2e6},
}


def test_rope_is_read_from_either_style():
    def rope(**fields):
        config = {k: v for k, v in SMALL.items() if not k.startswith("rope")}
        read = backbone_from_config({**config, **fields})
        return read.rope_theta_local, read.rope_theta_global, read.rope_scale_global

    assert rope() == (10_000.0, 1e6, 1.0)
    assert rope(rope_theta=2e6, rope_local_base_freq=12_000, rope_scaling={"type": "linear", "factor": 4}) == (
        12_000.0,
        2e6,
        4.0,
    )
    assert rope(rope_parameters=NEW_STYLE) == (12_000.0, 2e6, 4.0)
    assert rope(rope_parameters={}, rope_theta=3e6) == (10_000.0, 3e6, 1.0)
    assert rope(rope_parameters=NEW_STYLE, rope_scaling={"factor": 2.0}) == (12_000.0, 2e6, 2.0)


def test_layer_types_come_from_the_list_or_the_pattern():
    pattern = backbone_from_config({**SMALL, "num_hidden_layers": 5, "sliding_window_pattern": 2})
    assert pattern.layer_types == ("local", "global", "local", "global", "local")
    listed = ["full_attention", "sliding_attention"]
    assert backbone_from_config({**SMALL, "num_hidden_layers": 2, "layer_types": listed}).layer_types == (
        "global",
        "local",
    )


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_type": "qwen3_moe"}, "model_type='qwen3_moe'"),
        ({"model_type": None}, "model_type=None"),
        ({"model_type": "gemma3"}, "text_config is missing"),
        ({"model_type": "gemma3", "text_config": {"model_type": "gemma2"}}, "text_config: model_type='gemma2'"),
        ({"model_type": "gemma3", "text_config": {}, "tie_word_embeddings": False}, "tie_word_embeddings=False"),
        ({"model_type": "gemma3", "text_config": {"hidden_size": 0}}, "text_config: hidden_size=0"),
        ({"attn_logit_softcapping": 50.0}, r"attn_logit_softcapping=50\.0"),
        ({"final_logit_softcapping": 30.0}, r"final_logit_softcapping=30\.0"),
        ({"attention_bias": True}, "attention_bias=True"),
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention=True"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings=False"),
        ({"hidden_activation": "silu"}, "hidden_activation='silu'"),
        ({"quantization_config": {"load_in_4bit": True}}, "quantization_config="),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 8.0}}, "rope_scaling=.*yarn.*unsupported"),
        ({"rope_scaling": {"rope_type": "linear"}}, "rope_scaling: factor=None"),
        ({"rope_scaling": {"rope_type": "linear", "factor": -1}}, "rope_scaling: factor=-1"),
        ({"rope_scaling": "linear"}, "rope_scaling='linear'"),
        ({"rope_parameters": {"rope_theta": 1e6}}, "rope_parameters=.*one entry per layer type"),
        ({"rope_parameters": [1]}, "rope_parameters="),
        ({"rope_parameters": {"full_attention": 3}}, r"rope_parameters\.full_attention=3"),
        ({"rope_parameters": {"sliding_attention": {"rope_type": "linear", "factor": 2.0}}}, r"\.sliding_attention="),
        ({"rope_parameters": {"full_attention": {"partial_rotary_factor": 0.5}}}, "partial_rotary_factor"),
        ({"rope_theta": "1e6"}, "rope_theta='1e6'"),
        ({"hidden_size": "640"}, "hidden_size='640'"),
        ({"hidden_size": True}, "hidden_size=True"),
        ({"head_dim": None}, "head_dim=None"),
        ({"head_dim": 7}, "head_dim=7"),
        ({"num_key_value_heads": 3}, "num_kv_heads=3"),
        ({"sliding_window": None}, "sliding_window=None"),
        ({"sliding_window_pattern": 0}, "sliding_window_pattern=0"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps=nan"),
        ({"vocab_size": 2**63}, "vocab_size="),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers=1000000000"),
        ({"num_hidden_layers": 3, "layer_types": ["full_attention"]}, "layer_types has 1 entries"),
        ({"layer_types": ["chunked_attention"] * 26}, "layer_types must be a list"),
        ({"layer_types": "full_attention"}, "layer_types must be a list"),
    ],
)
def test_unsupported_fields_are_named(fields, message):
    with pytest.raises(InputError, match=message) as caught:
        backbone_from_config({**SMALL, **fields}, "some/config.json")
    assert str(caught.value).startswith("some/config.json")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=5,
)
FIELDS = [*SMALL, "text_config", "layer_types", "rope_parameters", "quantization_config"]


@given(st.dictionaries(st.sampled_from(FIELDS), JSON, max_size=3), st.sampled_from(["1b", "4b"]))
@settings(deadline=None)
def test_any_config_is_read_or_refused(fields, size):
    config = json.loads(json.dumps(HUB[size]))
    (config["text_config"] if size == "4b" else config).update(fields)
    try:
        backbone = backbone_from_config(config)
    except InputError:
        return
    assert backbone_from_config(json.loads(json.dumps(config_json(backbone, "float32")))) == backbone


# -------------------------------------------------------------------------------------------------- broken folders


@pytest.fixture
def folder(tmp_path):
    return checkpoints.write_checkpoint(tmp_path / "model", checkpoints.random_state())


@pytest.fixture
def sharded(tmp_path):
    return checkpoints.write_checkpoint(tmp_path / "model", checkpoints.random_state(), shards=2)


def rewrite(folder, change):
    """Changes the state dict of a single-file folder."""
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors")


def test_headers_are_all_checked_before_any_weight_is_read(folder, monkeypatch):
    rewrite(folder, lambda state: state.pop("model.layers.7.mlp.up_proj.weight"))
    source = open_folder(folder)
    monkeypatch.setattr(huggingface, "safe_open", None)  # reading a weight would fail otherwise than with InputError
    with pytest.raises(InputError, match=r"model: key model\.layers\.7\.mlp\.up_proj\.weight is missing"):
        fill_base(source, "float32")


def test_keys_are_refused_with_their_file(folder):
    rewrite(folder, lambda state: state.update({"model.layers.0.extra.weight": np.ones(3, np.float32)}))
    with pytest.raises(InputError, match=r"model\.safetensors: unknown key model\.layers\.0\.extra\.weight"):
        fill_base(open_folder(folder), "float32")


def test_a_wrong_shape_names_found_and_expected(folder):
    key = "model.layers.2.self_attn.k_proj.weight"
    rewrite(folder, lambda state: state.update({key: np.ascontiguousarray(state[key].T)}))
    message = r"model\.safetensors: key model\.layers\.2.*has shape \[24, 20\], expected \[20, 24\]"
    with pytest.raises(InputError, match=message):
        fill_base(open_folder(folder), "float32")


def test_a_duplicate_across_shards_names_both_files(sharded):
    name = "model-00002-of-00002.safetensors"
    state = load_file(sharded / name)
    state["model.embed_tokens.weight"] = load_file(sharded / "model-00001-of-00002.safetensors")[
        "model.embed_tokens.weight"
    ]
    save_file(state, sharded / name)
    with pytest.raises(InputError, match=rf"{name}: key model\.embed_tokens\.weight is a duplicate .*00001-of-00002"):
        fill_base(open_folder(sharded), "float32")


@pytest.mark.parametrize("key", ["lm_head.weight", "language_model.lm_head.weight"])
def test_a_head_is_dropped_when_tied_and_refused_when_not(tmp_path, key):
    layout = "multimodal" if "language" in key else "text"
    state = checkpoints.random_state(layout=layout)
    plain = fill_base(open_folder(checkpoints.write_checkpoint(tmp_path / "plain", state)), "float32")
    embedding = state[key_map.relayout("model.embed_tokens.weight", layout)]
    tied = open_folder(checkpoints.write_checkpoint(tmp_path / "tied", {**state, key: embedding}))
    filled = fill_base(tied, "float32")
    np.testing.assert_array_equal(filled["embed"]["embedding"], plain["embed"]["embedding"])
    assert set(filled) == set(plain)
    head = embedding.copy()
    head[-1, -1] += 1
    untied = open_folder(checkpoints.write_checkpoint(tmp_path / "untied", {**state, key: head}))
    with pytest.raises(InputError, match=rf"{key} differs from .*embed_tokens"):
        fill_base(untied, "float32")


def test_a_quantised_dtype_is_named(folder):
    key = "model.layers.0.mlp.up_proj.weight"
    rewrite(folder, lambda state: state.update({key: np.zeros((44, 24), np.uint8)}))
    with pytest.raises(InputError, match=rf"{key} has dtype U8"):
        open_folder(folder)


@pytest.mark.parametrize("keep", [0, 4, 8, 100, 3000, -1])
def test_a_truncated_file_is_called_truncated(sharded, keep):
    file = sharded / "model-00002-of-00002.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:keep])
    with pytest.raises(InputError, match=r"00002-of-00002\.safetensors is truncated"):
        open_folder(sharded)


def test_trailing_bytes_are_refused(folder):
    with (folder / "model.safetensors").open("ab") as stream:
        stream.write(b"\0" * 16)
    with pytest.raises(InputError, match=r"model\.safetensors is not a valid safetensors file"):
        open_folder(folder)


SPACE = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]


@pytest.fixture(scope="session")
def small_file(tmp_path_factory):
    file = tmp_path_factory.mktemp("safetensors") / "x.safetensors"
    save_file({"model.norm.weight": np.ones((3,), np.float32), "b": np.ones((2, 2), np.float32)}, file)
    return file.read_bytes()


@given(st.data())
@settings(max_examples=150, deadline=None, suppress_health_check=SPACE)
def test_damaged_headers_are_input_errors(small_file, tmp_path_factory, data):
    content = bytearray(small_file)
    for _ in range(data.draw(st.integers(0, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    content = content[: data.draw(st.integers(0, len(content)))]
    file = tmp_path_factory.getbasetemp() / "damaged.safetensors"
    file.write_bytes(bytes(content))
    try:
        tensors = huggingface.headers(file)
    except InputError as error:
        assert str(file) in str(error)  # noqa: PT017 (no error is fine too)
    else:
        for tensor in tensors:
            assert tensor.read().shape == tensor.shape


@given(st.dictionaries(st.sampled_from(["a", "b", "__metadata__"]), JSON, max_size=3) | JSON)
@settings(max_examples=150, deadline=None, suppress_health_check=SPACE)
def test_nonsense_headers_are_input_errors(tmp_path_factory, header):
    text = json.dumps(header).encode()
    file = tmp_path_factory.getbasetemp() / "nonsense.safetensors"
    file.write_bytes(struct.pack("<Q", len(text)) + text + b"\0" * 8)
    with pytest.raises(InputError, match=r"nonsense\.safetensors"):
        huggingface.headers(file)


def test_a_header_nested_too_deeply_is_an_input_error(folder):
    text = b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text)
    with pytest.raises(InputError, match="not a valid safetensors file"):
        open_folder(folder)


def edit_index(folder, change):
    index = json.loads((folder / INDEX).read_text())
    change(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index))


@pytest.mark.parametrize(
    "name", ["../x.safetensors", "/etc/x.safetensors", "a/x.safetensors", "..", "", "a\0.safetensors", 3, None, "x.bin"]
)
def test_index_names_stay_in_the_folder(sharded, name):
    (sharded.parent / "x.safetensors").write_bytes((sharded / "model-00001-of-00002.safetensors").read_bytes())
    edit_index(sharded, lambda weights: weights.update({"model.norm.weight": name}))
    with pytest.raises(InputError, match=r"index\.json: model\.norm\.weight points to .*, not to a \.safetensors file"):
        open_folder(sharded)


def test_an_index_naming_a_missing_file(sharded):
    (sharded / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(InputError, match=r"index\.json names model-00002-of-00002\.safetensors, which is missing"):
        open_folder(sharded)


def test_an_index_pointing_into_the_wrong_shard(sharded):
    weights = json.loads((sharded / INDEX).read_text())["weight_map"]
    key, other = "model.embed_tokens.weight", "model-00002-of-00002.safetensors"
    assert weights[key] != other
    edit_index(sharded, lambda weights: weights.update({key: other}))
    with pytest.raises(InputError, match=rf"says that {other} holds {key}, but it does not"):
        open_folder(sharded)


@pytest.mark.parametrize("content", ["{", "[]", '"x"', "\xff", '{"weight_map": []}', '{"weight_map": {}}', "[" * 9999])
def test_a_malformed_index_is_named(sharded, content):
    (sharded / INDEX).write_bytes(content.encode("latin-1"))
    with pytest.raises(InputError, match=r"model\.safetensors\.index\.json"):
        open_folder(sharded)


@pytest.mark.parametrize("content", ["{", "[]", "\xff", "", "nul"])
def test_a_malformed_config_is_named(folder, content):
    (folder / "config.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(InputError, match=r"config\.json"):
        open_folder(folder)


def test_missing_pieces_are_named(folder, tmp_path):
    with pytest.raises(InputError, match="nowhere is not a folder"):
        open_folder(tmp_path / "nowhere")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(InputError, match="has no safetensors weights"):
        open_folder(folder)
    (folder / "config.json").unlink()
    with pytest.raises(InputError, match=r"config\.json is missing"):
        open_folder(folder)


def test_one_file_of_any_name_will_do_but_two_are_ambiguous(folder):
    (folder / "model.safetensors").rename(folder / "weights.safetensors")
    assert open_folder(folder).files[1].name == "weights.safetensors"
    (folder / "more.safetensors").write_bytes((folder / "weights.safetensors").read_bytes())
    with pytest.raises(InputError, match="2 safetensors files and no"):
        open_folder(folder)


# --------------------------------------------------------------------------------------------------------- writing


def test_writing_refuses_to_overwrite(tmp_path, folder, monkeypatch):
    base = fill_base(open_folder(folder), "bfloat16")
    before = sorted(tmp_path.rglob("*"))
    with monkeypatch.context() as patch:
        patch.setattr(huggingface, "save_file", None)  # it must refuse before the work of writing, not after
        with pytest.raises(InputError, match="model is not empty"):
            write_folder(folder, checkpoints.BACKBONE, base, "bfloat16")
    with pytest.raises(InputError, match=r"config\.json exists and is not a folder"):
        write_folder(folder / "config.json", checkpoints.BACKBONE, base, "bfloat16")
    with pytest.raises(InputError, match="cannot write"):
        write_folder(folder / "config.json" / "below", checkpoints.BACKBONE, base, "bfloat16")
    assert sorted(tmp_path.rglob("*")) == before
    (tmp_path / "empty").mkdir()
    write_folder(tmp_path / "empty", checkpoints.BACKBONE, base, "bfloat16")
    assert open_folder(tmp_path / "empty").backbone == checkpoints.BACKBONE


def test_a_failed_write_leaves_nothing(tmp_path, folder, monkeypatch):
    base = fill_base(open_folder(folder), "bfloat16")
    calls = []

    def fail_late(*args, **kwargs):
        calls.append(args)
        if len(calls) == 3:
            raise OSError("disk full")
        save_file(*args, **kwargs)

    monkeypatch.setattr(huggingface, "save_file", fail_late)
    with pytest.raises(OSError, match="disk full"):
        write_folder(tmp_path / "out", checkpoints.BACKBONE, base, "bfloat16", shard_bytes=20_000)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_one_shard_is_in_memory_at_a_time(tmp_path, folder, monkeypatch):
    base = fill_base(open_folder(folder), "bfloat16")
    sizes = []

    def watch(state, *args, **kwargs):
        sizes.append(sum(value.nbytes for value in state.values()))
        save_file(state, *args, **kwargs)

    monkeypatch.setattr(huggingface, "save_file", watch)
    write_folder(tmp_path / "out", checkpoints.BACKBONE, base, "bfloat16", shard_bytes=20_000)
    assert len(sizes) > 2
    assert max(sizes) <= 20_000


def test_a_misshapen_base_is_refused(tmp_path, folder):
    base = fill_base(open_folder(folder), "bfloat16")
    base["layers"]["q"]["kernel"] = base["layers"]["q"]["kernel"].swapaxes(1, 2)
    with pytest.raises(InputError, match=r"layers/q/kernel has shape \[8, 60, 24\], expected \[8, 24, 60\]"):
        write_folder(tmp_path / "out", checkpoints.BACKBONE, base, "bfloat16")
    del base["layers"]["q"]
    with pytest.raises(InputError, match="no slot layers/q/kernel"):
        write_folder(tmp_path / "out", checkpoints.BACKBONE, base, "bfloat16")
    assert not (tmp_path / "out").exists()


def test_extras_go_in_beside(tmp_path, folder):
    jnp = pytest.importorskip("jax.numpy")
    base = fill_base(open_folder(folder), "bfloat16")
    base["final_norm"]["scale"] = jnp.asarray(base["final_norm"]["scale"])
    write_folder(
        tmp_path / "out",
        checkpoints.BACKBONE,
        base,
        "bfloat16",
        extras=FolderExtras(
            files={"tokenizer.json": b"{}", "generation_config.json": b'{"eos_token_id": [1, 106]}'},
            tensors={"model.blend.theta": np.ones((8, 24), np.float32)},
            config={"model_type": "sst_gemma3", "auto_map": {}, "dtype": "float32"},
        ),
    )
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == b"{}"
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text()) == {"eos_token_id": [1, 106]}
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["model_type"] == "sst_gemma3"
    assert {config.get("dtype"), config.get("torch_dtype")} - {None} == {"bfloat16"}  # what was written
    raw = checkpoints.read_raw(tmp_path / "out")
    assert raw.pop("model.blend.theta")[:2] == ("float32", (8, 24))
    assert raw == checkpoints.read_raw(folder)
    for name in ("../x", "config.json", "model.safetensors", "a/b", ""):
        with pytest.raises(InputError, match="extra file"):
            write_folder(
                tmp_path / "bad",
                checkpoints.BACKBONE,
                base,
                "bfloat16",
                shard_bytes=2e4,
                extras=FolderExtras(files={name: b""}),
            )
    with pytest.raises(InputError, match="would replace"):
        write_folder(
            tmp_path / "bad",
            checkpoints.BACKBONE,
            base,
            "bfloat16",
            extras=FolderExtras(tensors={"model.norm.weight": np.ones(1)}),
        )
    assert not list(tmp_path.rglob("x"))


# ------------------------------------------------------------------------------------------------------------- hub


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A fake `snapshot_download`: hub(cached=..., online=...) are folders or exceptions; calls are recorded."""
    import huggingface_hub
    from huggingface_hub import errors

    state = {"cached": errors.LocalEntryNotFoundError("not cached"), "online": ConnectionError("no route"), "calls": []}

    def snapshot_download(repo_id, *, revision=None, allow_patterns, local_files_only=False):
        state["calls"].append((local_files_only, allow_patterns))
        answer = state["cached" if local_files_only else "online"]
        if callable(answer):
            answer = answer(allow_patterns)
        if isinstance(answer, Exception):
            raise answer
        return str(answer)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return state


def http_error(kind):
    try:
        import httpx2 as httpx  # what huggingface_hub 2 brings
    except ImportError:
        import httpx

    return kind("refused", response=httpx.Response(403, request=httpx.Request("GET", "https://huggingface.co")))


def test_a_cached_snapshot_needs_no_network(hub, folder):
    hub["cached"] = folder
    assert resolve_hub("google/gemma-3-1b-pt") == folder
    assert [offline for offline, _ in hub["calls"]] == [True]


def test_an_uncached_or_incomplete_snapshot_is_downloaded(hub, folder, tmp_path):
    hub["online"] = folder
    sharded = checkpoints.write_checkpoint(tmp_path / "sharded", checkpoints.random_state(), shards=2)
    assert resolve_hub("google/gemma-3-1b-pt") == folder
    partial = tmp_path / "partial"
    partial.mkdir()
    (partial / "config.json").write_text("{}")
    hub["cached"] = partial
    assert resolve_hub("google/gemma-3-1b-pt") == folder
    (sharded / "config.json").unlink()
    hub["cached"] = sharded
    assert resolve_hub("google/gemma-3-1b-pt") == folder
    assert not any("bin" in pattern or pattern == "*" for _, patterns in hub["calls"] for pattern in patterns)
    assert {"*.safetensors", "*.json"} < set(hub["calls"][0][1])


def test_a_snapshot_with_weights_but_no_network_will_do(hub, folder):
    from huggingface_hub import errors

    def cached(patterns):
        return folder if "config.json" in patterns else errors.LocalEntryNotFoundError("incomplete")

    hub["cached"] = cached
    assert resolve_hub("google/gemma-3-1b-pt") == folder


def test_hub_failures_say_how_to_mend_them(hub):
    from huggingface_hub import errors

    hub["online"] = http_error(errors.GatedRepoError)
    with pytest.raises(
        InputError, match=r"google/gemma-3-27b-pt is gated: accept its licence at .*hf auth login.*local"
    ):
        resolve_hub("google/gemma-3-27b-pt")
    hub["online"] = http_error(errors.RepositoryNotFoundError)
    with pytest.raises(InputError, match=r"nobody/nothing .*is missing or private.*local folder"):
        resolve_hub("nobody/nothing")
    hub["online"] = http_error(errors.RevisionNotFoundError)
    with pytest.raises(InputError, match=r"revision v9"):
        resolve_hub("google/gemma-3-1b-pt", revision="v9")
    hub["online"] = errors.OfflineModeIsEnabled("offline mode")
    with pytest.raises(InputError, match=r"is not cached and cannot be fetched \(offline mode\)"):
        resolve_hub("google/gemma-3-1b-pt")
    hub["online"] = OSError("")
    with pytest.raises(InputError, match=r"cannot be fetched \(OSError\)"):
        resolve_hub("google/gemma-3-1b-pt")


@pytest.mark.parametrize("name", ["./not/here", "a/b/c", "", "white space/x", "-dash"])
def test_what_cannot_be_a_hub_id_is_refused_without_a_request(name):
    with pytest.raises(InputError, match="is neither a local folder nor a hub id"):
        resolve_hub(name)


def test_offline_and_uncached_with_the_real_client(tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(InputError, match="google/gemma-3-1b-pt is not cached and cannot be fetched"):
        resolve_hub("google/gemma-3-1b-pt")


def test_a_real_cache_is_read_offline(tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    commit, repo = "0" * 40, tmp_path / "models--google--gemma-3-tiny"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text(commit)
    snapshot = checkpoints.write_checkpoint(repo / "snapshots" / commit, checkpoints.random_state(), shards=2)
    assert resolve_hub("google/gemma-3-tiny") == snapshot
    (snapshot / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(InputError, match=r"model-00002-of-00002.*missing|cannot be fetched"):
        open_folder(resolve_hub("google/gemma-3-tiny"))
