"""Seed-OSS (ByteDance, 2025): Llama's layout, with a bias on queries, keys and values."""

from __future__ import annotations

from sst_jax.families import qwen2
from sst_jax.families.base import ConfigFormat, Family, GGUFFormat, TokenFacts, TorchExport
from sst_jax.families.common import (
    LLAMA_ALLOWED,
    LLAMA_UNWRITTEN,
    TINY,
    global_decoder,
    read_llama_config,
    read_llama_metadata,
    shape_fields,
    write_llama_config,
)
from sst_jax.model.backbone import BackboneConfig
from sst_jax.types import FieldValue


def _preset(*shape: int, **fields: FieldValue) -> BackboneConfig:
    """Return a size: num_layers, d_model, d_ff, num_heads, num_kv_heads, head_dim."""
    return global_decoder("seed_oss", qwen2.BLOCK, shape, **{"tied_head": False, **fields})


PRESETS = {
    "seed-oss-36b": _preset(
        64, 5120, 27_648, 80, 8, 128, vocab_size=155_136, max_positions=524_288, rope_theta_global=10_000_000.0
    ),
    "tiny-seed-oss": _preset(2, 64, 128, 4, 2, 16, **TINY),
}

PARAMS = tuple(
    spec._replace(gguf="blk.{layer}.post_attention_norm.weight") if spec.path == "layers/pre_ffn_norm/scale" else spec
    for spec in qwen2.PARAMS
)

FAMILY = Family(
    name="seed_oss",
    title="Seed-OSS",
    block=qwen2.BLOCK,
    presets=PRESETS,
    params=PARAMS,
    config=ConfigFormat(
        model_type="seed_oss",
        architecture="SeedOssForCausalLM",
        fields=shape_fields(64, 4096, 27_648, 80, 8, 128, 155_136, 1e-6, 524_288),
        allowed={
            **LLAMA_ALLOWED,
            "attention_bias": (True,),  # the default of its class
            "attention_out_bias": (False, None),
            "mlp_bias": (False, None),
        },
        unwritten=LLAMA_UNWRITTEN,
        read=read_llama_config,
        write=write_llama_config,
    ),
    gguf=GGUFFormat("seed_oss", read_llama_metadata),
    tokens=TokenFacts(turn_ends=("<seed:eos>",)),
    torch=TorchExport("modeling_sst_seed_oss.py", "SSTSeedOss"),
)
