"""Tiny folders and GGUF files of every family, and vocabularies for the latter."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file
from tokenizers import pre_tokenizers

from sst_jax.families.registry import BY_NAME
from sst_jax.weights import key_map
from sst_jax.weights.hub_config import config_json


def drawn(backbone, dtype=np.float32, seed=0):
    """A state dict with sharp attention, norms away from one and biases that matter."""
    rng, state = np.random.default_rng(seed), {}
    for key, entry in key_map.expected(backbone).items():
        value, name = rng.standard_normal(entry.shape), entry.row.path.split("/")
        if name[-1] == "scale":
            value = 0.2 * value + 1.0 - backbone.norm_offset
            if name[-2].removeprefix("global_") in ("q_norm", "k_norm"):
                # As sharp where scores are not divided by sqrt(H), which checkpoints have in these scales.
                whole = (backbone.query_pre_attn_scalar / entry.shape[0]) ** 0.25 if backbone.v_norm else 1.0
                value = (value + 0.3) * whole
        elif name[-1] == "bias":
            value *= 0.5
        else:
            value *= (1.2 if name[-2] in ("q", "k") else 1.0) * entry.shape[-1] ** -0.5
        state[key] = value.astype(np.float32).astype(dtype)
    return state


def written(folder, backbone, state, dtype="float32"):
    folder.mkdir()
    for whole, parts in key_map.fused_keys(backbone).items():
        state = {**state, whole: np.concatenate([state[part.key] for part in parts])}
        state = {key: value for key, value in state.items() if key not in [part.key for part in parts]}
    (folder / "config.json").write_text(json.dumps(config_json(backbone, dtype)))
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def metadata(backbone):
    """{key without its architecture: value}, as the family's converter writes them."""
    pairs = {
        "block_count": backbone.num_layers, "embedding_length": backbone.d_model, "feed_forward_length": backbone.d_ff,
        "attention.head_count": backbone.num_heads, "attention.head_count_kv": backbone.num_kv_heads,
        "attention.key_length": backbone.head_dim, "context_length": backbone.max_positions,
        "attention.layer_norm_rms_epsilon": backbone.norm_eps, "rope.freq_base": backbone.rope_theta_global,
    }  # fmt: skip
    if backbone.window is not None:
        pairs["attention.sliding_window"] = backbone.window
    if backbone.global_head_dim is not None:
        kinds, heads = backbone.layer_types, backbone.global_num_kv_heads
        pairs |= {
            "attention.key_length": backbone.global_head_dim, "attention.value_length": backbone.global_head_dim,
            "attention.key_length_swa": backbone.head_dim, "attention.value_length_swa": backbone.head_dim,
            "attention.sliding_window_pattern": [kind == "local" for kind in kinds],
            "attention.shared_kv_layers": 0, "embedding_length_per_layer_input": 0,
            "rope.dimension_count": backbone.global_head_dim, "rope.dimension_count_swa": backbone.head_dim,
            "rope.freq_base_swa": backbone.rope_theta_local, "final_logit_softcapping": backbone.logit_cap,
        }  # fmt: skip
        if heads is not None:
            own = {"local": backbone.num_kv_heads, "global": heads}
            pairs["attention.head_count_kv"] = [own[kind] for kind in kinds]
    if backbone.family == "granite":
        pairs |= {
            "attention.scale": backbone.query_pre_attn_scalar**-0.5, "embedding_scale": backbone.embed_multiplier,
            "residual_scale": backbone.residual_scale, "logit_scale": backbone.logit_divisor,
        }  # fmt: skip
    if backbone.rope_yarn is not None:
        pairs |= {
            "rope.scaling.type": "yarn", "rope.scaling.factor": backbone.rope_scale_global,
            "rope.scaling.original_context_length": backbone.rope_yarn[2],
        }  # fmt: skip
    if backbone.query_scaling is not None:
        pairs |= {
            "attention.temperature_scale": backbone.query_scaling[0], "rope.scaling.yarn_log_multiplier": 1.0,
            "rope.scaling.yarn_beta_fast": 32.0, "rope.scaling.yarn_beta_slow": 1.0,
        }  # fmt: skip
    if backbone.rope_short:
        pairs |= {
            "rope.dimension_count": backbone.rotary_dims, "rope.scaling.attn_factor": backbone.rope_magnitude,
            "rope.scaling.original_context_length": backbone.rope_original,
        }  # fmt: skip
    return pairs


def rope_angles(backbone):
    """What converters write for the angles of a global head: 1 for those that turn, and an endless divisor."""
    turning = np.arange(backbone.global_head_dim // 2) < backbone.rope_angles_global
    return np.where(turning, np.float32(1), np.float32(1e30))


def gguf_file(
    file,
    backbone,
    state,
    vocabulary: Mapping[str, Any] | None = None,
    more: Mapping[str, Any] | None = None,
    tensors: Mapping[str, Any] | None = None,
    **split,
):
    """A state dict as a GGUF, as the family's converter writes it.

    vocabulary: {key behind "tokenizer.ggml."}; more: metadata that is added; tensors: those that are added.
    """
    gguf = pytest.importorskip("gguf")
    family = BY_NAME[backbone.family]
    writer = gguf.GGUFWriter(file, family.gguf.architecture, **split)
    pairs = {f"{family.gguf.architecture}.{key}": value for key, value in (metadata(backbone) | (more or {})).items()}
    for key, value in (pairs | {f"tokenizer.ggml.{key}": value for key, value in (vocabulary or {}).items()}).items():
        add = {
            int: writer.add_uint32, float: writer.add_float32, str: writer.add_string, bool: writer.add_bool,
            list: writer.add_array,
        }[type(value)]  # fmt: skip
        add(key, value)
    for name in ("short", "long") if backbone.rope_short else ():
        writer.add_tensor(f"rope_factors_{name}.weight", np.float32(getattr(backbone, f"rope_{name}")))
    if backbone.rope_angles_global is not None:
        writer.add_tensor("rope_freqs.weight", rope_angles(backbone))
    for name, value in (tensors or {}).items():
        writer.add_tensor(name, value)
    fused = {part.key: whole for whole, parts in key_map.fused_keys(backbone, "gguf").items() for part in parts}
    together: dict = {}
    names = key_map.expected(backbone, "gguf")  # in the same order
    for (key, entry), name in zip(key_map.expected(backbone).items(), names, strict=True):
        value = state[key]
        if entry.row.transform == "norm":
            value = value + np.float32(1)
        elif entry.row.transform == "rotary":  # halves become neighbours
            heads = len(value) // backbone.head_dim
            value = value.reshape(heads, 2, -1, value.shape[-1]).swapaxes(1, 2).reshape(value.shape)
        if name in fused:
            together.setdefault(fused[name], []).append(value)
        else:
            writer.add_tensor(name, np.ascontiguousarray(value))
    for name, parts in together.items():
        writer.add_tensor(name, np.concatenate(parts))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


CONTROL: Sequence[str] = ("<s>", "</s>", "<pad>", "<|im_start|>", "<|im_end|>")


def byte_level(pre, **changes):
    """A byte-level vocabulary of 262 tokens, of which "ab" is the only merge."""
    tokens = [*CONTROL, *sorted(pre_tokenizers.ByteLevel.alphabet()), "ab"]
    types = [3 if token in CONTROL else 1 for token in tokens]
    return {
        "model": "gpt2", "pre": pre, "tokens": tokens, "token_type": types, "merges": ["a b"], "bos_token_id": 0,
        "eos_token_id": 1, "padding_token_id": 2, **changes,
    }  # fmt: skip


def gemma4(**changes):
    """Gemma 4's kind of vocabulary: merges of text, the mark of a space, bytes for the rest."""
    pieces = ["▁", "a", "b", "c", "▁a", "ab", "▁ab", "\n", "\n\n", "\t"]
    tokens = ["<pad>", "<eos>", "<bos>", "<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    return {
        "model": "gemma4", "tokens": tokens, "scores": [0.0] * len(tokens), "merges": ["▁ a", "a b", "▁a b", "\n \n"],
        "token_type": [3, 3, 3, 2, *[6] * 256, *[1] * len(pieces)], "bos_token_id": 2, "eos_token_id": 1,
        "padding_token_id": 0, "unknown_token_id": 3, "add_space_prefix": False, "add_bos_token": True, **changes,
    }  # fmt: skip


def sentencepiece(**changes):
    """A SentencePiece vocabulary of 262 pieces: bytes, and a few pieces with the mark of a space."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "▁a"]
    return {
        "model": "llama", "tokens": tokens, "token_type": [2, 3, 3, *[6] * 256, 1, 1, 1], "bos_token_id": 1,
        "scores": [0.0] * 259 + [-1.0, -2.0, -0.5], "eos_token_id": 2, "unknown_token_id": 0, **changes,
    }  # fmt: skip
