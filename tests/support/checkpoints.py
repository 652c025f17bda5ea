"""Tiny Gemma-3 checkpoints in Hugging Face's form, made with numpy alone."""

import json
from pathlib import Path

import ml_dtypes
import numpy as np
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
