"""OLMo 2 (arXiv 2501.00656): norms behind attention and the feed-forward and none before, queries and keys normed over
all heads at once.
"""

from __future__ import annotations

import numpy as np

from sst_jax.families.base import ConfigFormat, Family, Fields, GGUFFormat, Metadata, TokenFacts, TorchExport
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

BLOCK = {**LLAMA_BLOCK, "pre_norms": False, "post_norms": True, "qk_norm": True, "qk_norm_whole": True}

_BEFORE = ("layers/pre_attn_norm/scale", "layers/pre_ffn_norm/scale")
PARAMS = (
    *(spec for spec in LLAMA_PARAMS if spec.path not in _BEFORE),
    layer_param("q_norm/scale", "P", "self_attn.q_norm", "attn_q_norm", "copy"),
    layer_param("k_norm/scale", "Q", "self_attn.k_norm", "attn_k_norm", "copy"),
    layer_param("post_attn_norm/scale", "D", "post_attention_layernorm", "post_attention_norm", "copy"),
    layer_param("post_ffn_norm/scale", "D", "post_feedforward_layernorm", "post_ffw_norm", "copy"),
)


def preset(family: str, *shape: int, **fields: FieldValue) -> BackboneConfig:
    """Return a size: num_layers, d_model, d_ff, num_heads, num_kv_heads, head_dim."""
    published = {"rope_theta_global": 500_000.0, "tied_head": False}
    return global_decoder(family, BLOCK, shape, **{**published, **fields})


_OLMO2: Fields = {"vocab_size": 100_352, "max_positions": 4096}
PRESETS = {
    "olmo-2-0425-1b": preset("olmo2", 16, 2048, 8192, 16, 16, 128, **_OLMO2),
    "olmo-2-1124-7b": preset("olmo2", 32, 4096, 11_008, 32, 32, 128, **_OLMO2),
    "olmo-2-1124-13b": preset("olmo2", 40, 5120, 13_824, 40, 40, 128, **_OLMO2),
    "olmo-2-0325-32b": preset("olmo2", 64, 5120, 27_648, 40, 8, 128, **_OLMO2),
    "tiny-olmo2": preset("olmo2", 2, 64, 128, 4, 2, 16, **TINY),
}


def read_metadata(metadata: Metadata, fields: Fields) -> Fields:
    """Return `GGUFFormat.read` of OLMo 2, and of OLMo 3, whose files say the same architecture and have a window."""
    layers, name = fields["num_layers"], "attention.sliding_window"
    found = read_llama_metadata(metadata.without(name), fields)
    if not metadata.scalar(name):
        return {**found, "family": "olmo2"}
    pattern = metadata.value(f"{name}_pattern", [(layer + 1) % 4 != 0 for layer in range(layers)])
    if not isinstance(pattern, list | np.ndarray) or len(pattern) != layers:
        raise metadata.error(f"{name}_pattern", f"must be a list of {layers} truth values")
    return {
        **found,
        "family": "olmo3",
        "layer_types": tuple("local" if sliding else "global" for sliding in pattern),
        "window": metadata.number(name),
        "rope_theta_local": found["rope_theta_global"],
    }


FAMILY = Family(
    name="olmo2",
    title="OLMo 2",
    block=BLOCK,
    presets=PRESETS,
    params=PARAMS,
    config=ConfigFormat(
        model_type="olmo2",
        architecture="Olmo2ForCausalLM",
        fields=shape_fields(32, 4096, 11_008, 32, None, None, 50_304, 1e-5, 2048),
        allowed=LLAMA_ALLOWED,
        unwritten=LLAMA_UNWRITTEN,
        read=read_llama_config,
        write=write_llama_config,
    ),
    gguf=GGUFFormat("olmo2", read_metadata),
    tokens=TokenFacts(turn_ends=(), splittings={"dbrx": split_words(r"\p{N}{1,3}")}),
    torch=TorchExport("modeling_sst_olmo2.py", "SSTOlmo2"),
)
