"""Qwen 3 (arXiv 2505.09388): Llama's layout, with each head's queries and keys normed."""

from __future__ import annotations

from sst_jax.families.base import ConfigFormat, Family, GGUFFormat, TokenFacts, TorchExport
from sst_jax.families.common import (
    LLAMA_ALLOWED,
    LLAMA_BLOCK,
    LLAMA_PARAMS,
    LLAMA_UNWRITTEN,
    ROPE_LLAMA3,
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

BLOCK = {**LLAMA_BLOCK, "qk_norm": True}
PARAMS = (
    *LLAMA_PARAMS,
    layer_param("q_norm/scale", "H", "self_attn.q_norm", "attn_q_norm", "copy"),
    layer_param("k_norm/scale", "H", "self_attn.k_norm", "attn_k_norm", "copy"),
)


def _preset(*shape: int, **fields: FieldValue) -> BackboneConfig:
    """Return a size: num_layers, d_model, d_ff, num_heads, num_kv_heads, head_dim."""
    published = {"vocab_size": 151_936, "max_positions": 40_960, "rope_theta_global": 1_000_000.0}
    return global_decoder("qwen3", BLOCK, shape, **{**published, **fields})


PRESETS = {
    "qwen3-0.6b": _preset(28, 1024, 3072, 16, 8, 128),
    "qwen3-1.7b": _preset(28, 2048, 6144, 16, 8, 128),
    "qwen3-4b": _preset(36, 2560, 9728, 32, 8, 128),
    "qwen3-8b": _preset(36, 4096, 12_288, 32, 8, 128, tied_head=False),
    "qwen3-14b": _preset(40, 5120, 17_408, 40, 8, 128, tied_head=False),
    "qwen3-32b": _preset(64, 5120, 25_600, 64, 8, 128, tied_head=False),
    "tiny-qwen3": _preset(4, 64, 128, 4, 2, 16, tied_head=False, **TINY),
}

FAMILY = Family(
    name="qwen3",
    title="Qwen 3",
    block=BLOCK,
    presets=PRESETS,
    params=PARAMS,
    config=ConfigFormat(
        model_type="qwen3",
        architecture="Qwen3ForCausalLM",
        fields=shape_fields(32, 4096, 22_016, 32, 32, 128, 151_936, 1e-6, 32_768),
        allowed={**LLAMA_ALLOWED, "use_sliding_window": (False, None)},
        unwritten=LLAMA_UNWRITTEN,
        read=read_llama_config,
        write=write_llama_config,
    ),
    gguf=GGUFFormat("qwen3", read_llama_metadata, ROPE_LLAMA3),
    tokens=TokenFacts(
        turn_ends=("<|im_end|>",),
        text_ends=("<|endoftext|>",),
        splittings={"qwen2": split_words(r"\p{N}", {"type": "NFC"})},
    ),
    torch=TorchExport("modeling_sst_qwen3.py", "SSTQwen3"),
)
