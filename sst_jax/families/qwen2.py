"""Qwen 2.5 (arXiv 2412.15115): Llama's layout, with a bias on queries, keys and values. Qwen 2 is the same."""

from __future__ import annotations

from sst_jax.families.base import ConfigFormat, Family, GGUFFormat, TokenFacts, TorchExport
from sst_jax.families.common import (
    LLAMA_ALLOWED,
    LLAMA_BLOCK,
    LLAMA_PARAMS,
    LLAMA_UNWRITTEN,
    TINY,
    global_decoder,
    layer_param,
    read_llama_config,
    read_llama_metadata,
    shape_fields,
    split_words,
    write_llama_config,
)
from sst_jax.model.backbone import BackboneConfig
from sst_jax.types import FieldValue

BLOCK = {**LLAMA_BLOCK, "qkv_bias": True}

PARAMS = (
    *LLAMA_PARAMS,
    layer_param("q/bias", "P", "self_attn.q_proj", "attn_q", "copy"),
    layer_param("k/bias", "Q", "self_attn.k_proj", "attn_k", "copy"),
    layer_param("v/bias", "Q", "self_attn.v_proj", "attn_v", "copy"),
)


def _preset(*shape: int, **fields: FieldValue) -> BackboneConfig:
    """Return a size: num_layers, d_model, d_ff, num_heads, num_kv_heads, head_dim."""
    published = {"vocab_size": 151_936, "max_positions": 32_768, "rope_theta_global": 1_000_000.0}
    return global_decoder("qwen2", BLOCK, shape, **{**published, **fields})


# The shapes of the Instruct checkpoints; base ones of 1.5B and of 7B and more say 131,072 positions.
_LARGE = {"vocab_size": 152_064, "tied_head": False}
PRESETS = {
    "qwen2.5-0.5b": _preset(24, 896, 4864, 14, 2, 64),
    "qwen2.5-1.5b": _preset(28, 1536, 8960, 12, 2, 128),
    "qwen2.5-3b": _preset(36, 2048, 11_008, 16, 2, 128),
    "qwen2.5-7b": _preset(28, 3584, 18_944, 28, 4, 128, **_LARGE),
    "qwen2.5-14b": _preset(48, 5120, 13_824, 40, 8, 128, **_LARGE),
    "qwen2.5-32b": _preset(64, 5120, 27_648, 40, 8, 128, **_LARGE),
    "qwen2.5-72b": _preset(80, 8192, 29_568, 64, 8, 128, **_LARGE),
    "tiny-qwen2": _preset(4, 64, 128, 4, 2, 16, tied_head=False, **TINY),
}

CONFIG = ConfigFormat(
    model_type="qwen2",
    architecture="Qwen2ForCausalLM",
    fields=shape_fields(32, 4096, 22_016, 32, 32, None, 151_936, 1e-6, 32_768),
    # Of transformers' classes this one alone has no attention_bias: q, k and v always have one.
    allowed={name: values for name, values in LLAMA_ALLOWED.items() if name != "attention_bias"}
    | {"use_sliding_window": (False, None)},
    unwritten=LLAMA_UNWRITTEN,
    read=read_llama_config,
    write=write_llama_config,
)


FAMILY = Family(
    name="qwen2",
    title="Qwen 2.5",
    block=BLOCK,
    presets=PRESETS,
    params=PARAMS,
    config=CONFIG,
    gguf=GGUFFormat("qwen2", read_llama_metadata),
    tokens=TokenFacts(
        turn_ends=("<|im_end|>",),
        text_ends=("<|endoftext|>",),
        splittings={"qwen2": split_words(r"\p{N}", {"type": "NFC"})},
    ),
    torch=TorchExport("modeling_sst_qwen2.py", "SSTQwen2"),
)
