"""Tiny Gemma-3 checkpoints for the weights tests: made with numpy alone, and (where torch is) with transformers."""

import json
import types
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from sst_jax.model.config import BackboneConfig
from sst_jax.weights import huggingface, key_map

# Eight layers so that a global one has local ones on both sides; sizes that no two axes share.
BACKBONE = BackboneConfig(
    num_layers=8,
    d_model=24,
    d_ff=44,
    num_heads=6,
    num_kv_heads=2,
    head_dim=10,
    vocab_size=67,
    window=5,
    query_pre_attn_scalar=9.0,
    rope_scale_global=8.0,
    max_positions=300,
)


def random_state(backbone=BACKBONE, dtype=ml_dtypes.bfloat16, layout="text", seed=0):
    """A state dict {key: array}, as PyTorch would save it."""
    rng = np.random.default_rng(seed)
    return {
        key_map.relayout(key, layout): rng.standard_normal(entry.shape).astype(np.float32).astype(dtype)
        for key, entry in key_map.expected(backbone).items()
    }


def write_checkpoint(folder, state, backbone=BACKBONE, config=None, shards=1):
    """Saves a state dict as a Hugging Face folder of `shards` files."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = huggingface.config_json(backbone, "bfloat16") if config is None else config
    (folder / "config.json").write_text(json.dumps(config))
    keys = list(state)
    if shards == 1:
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    weight_map = {}
    for number in range(shards):
        name = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        part = keys[number::shards]
        save_file({key: state[key] for key in part}, folder / name, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(part, name))
    (folder / huggingface.INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def read_raw(folder):
    """{key: (dtype, shape, bytes)} of every tensor of a folder."""
    raw = {}
    for file in sorted(Path(folder).glob("*.safetensors")):
        with safe_open(file, framework="numpy") as reader:
            for key in reader.keys():  # noqa: SIM118 (not a dict)
                assert key not in raw
                value = reader.get_tensor(key)
                raw[key] = (str(value.dtype), value.shape, value.tobytes())
    return raw


@pytest.fixture(scope="session")
def tiny():
    """The helpers above as one object: importable from any test without making tests a package."""
    return types.SimpleNamespace(
        backbone=BACKBONE, random_state=random_state, write_checkpoint=write_checkpoint, read_raw=read_raw
    )


@pytest.fixture(scope="session")
def torch_model():
    """A random Gemma3ForCausalLM in float32 whose norms are away from zero."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    config = transformers.Gemma3TextConfig(
        vocab_size=67,
        hidden_size=24,
        intermediate_size=44,
        num_hidden_layers=8,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=10,
        sliding_window=5,
        query_pre_attn_scalar=9,
        max_position_embeddings=300,
        rope_scaling={"rope_type": "linear", "factor": 8.0},
    )
    torch.manual_seed(0)
    model = transformers.Gemma3ForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
    return model
