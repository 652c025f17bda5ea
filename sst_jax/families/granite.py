"""Granite 3 (IBM, 2024): Llama's layout, with factors on embeddings, scores, residuals and logits."""

from __future__ import annotations

from sst_jax.families import llama
from sst_jax.families.base import (
    ConfigFormat,
    Family,
    Fields,
    GGUFFormat,
    JsonObject,
    Metadata,
    TokenFacts,
    TorchExport,
)
from sst_jax.families.common import (
    LLAMA_ALLOWED,
    LLAMA_BLOCK,
    LLAMA_UNWRITTEN,
    TINY,
    global_decoder,
    positive_number,
    read_llama_config,
    read_llama_metadata,
    shape_fields,
    write_llama_config,
)
from sst_jax.model.backbone import BackboneConfig
from sst_jax.types import FieldValue, Json

_FACTORS = {
    "embed_multiplier": "embedding_multiplier",
    "residual_scale": "residual_multiplier",
    "logit_divisor": "logits_scaling",
}


def _preset(*shape: int, scores: float, **fields: FieldValue) -> BackboneConfig:
    """Return a size: num_layers, d_model, d_ff, num_heads, num_kv_heads, head_dim; `scores` multiplies them."""
    return global_decoder("granite", LLAMA_BLOCK, shape, **{"query_pre_attn_scalar": scores**-2, **fields})


_GRANITE3: Fields = {
    "vocab_size": 49_159,
    "norm_eps": 1e-5,
    "max_positions": 131_072,
    "rope_theta_global": 10_000_000.0,
    "embed_multiplier": 12.0,
    "residual_scale": 0.22,
}
PRESETS = {
    "granite-3.3-2b": _preset(40, 2048, 8192, 32, 8, 64, scores=0.015625, logit_divisor=8.0, **_GRANITE3),
    "granite-3.3-8b": _preset(40, 4096, 12_800, 32, 8, 128, scores=0.0078125, logit_divisor=16.0, **_GRANITE3),
    "tiny-granite": _preset(
        2, 64, 128, 4, 2, 16, scores=0.125, embed_multiplier=3.0, residual_scale=0.75, logit_divisor=0.5, **TINY
    ),
}


def _read_config(config: JsonObject, fields: Fields, where: str) -> Fields:
    scores = positive_number(config, "attention_multiplier", 1.0, where)
    return {**read_llama_config(config, fields, where), "query_pre_attn_scalar": scores**-2}


def _write_config(backbone: BackboneConfig) -> Json:
    return {**write_llama_config(backbone), "attention_multiplier": backbone.query_pre_attn_scalar**-0.5}


def _read_metadata(metadata: Metadata, fields: Fields) -> Fields:
    return {
        **read_llama_metadata(metadata, fields),
        "query_pre_attn_scalar": metadata.number("attention.scale", float) ** -2,
        "embed_multiplier": metadata.number("embedding_scale", float, 1.0),
        "residual_scale": metadata.number("residual_scale", float, 1.0),
        "logit_divisor": metadata.number("logit_scale", float, 1.0),
    }


FAMILY = Family(
    name="granite",
    title="Granite",
    block=LLAMA_BLOCK,
    presets=PRESETS,
    params=llama.PARAMS,
    config=ConfigFormat(
        model_type="granite",
        architecture="GraniteForCausalLM",
        fields={
            **shape_fields(32, 4096, 11_008, 32, None, None, 32_000, 1e-6, 2048),
            **{name: (field, 1.0) for name, field in _FACTORS.items()},
        },
        allowed={**LLAMA_ALLOWED, "mlp_bias": (False, None)},
        unwritten=LLAMA_UNWRITTEN,
        read=_read_config,
        write=_write_config,
    ),
    gguf=GGUFFormat("granite", _read_metadata),
    tokens=TokenFacts(turn_ends=(), splittings={"refact": llama.DIGITS_ALONE}),
    torch=TorchExport("modeling_sst_granite.py", "SSTGranite"),
)
