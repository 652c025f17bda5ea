"""Ministral 3 (Mistral AI, 2025): Mistral's layout with YaRN, and queries scaled by their position.

Its checkpoints are multimodal, and are read for their text part.
"""

from __future__ import annotations

from sst_jax.families import llama, mistral
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
    rope_object,
    shape_fields,
    write_llama_config,
    yarn_magnitude,
)
from sst_jax.model.backbone import BackboneConfig
from sst_jax.types import FieldValue, Json

_BETA, _LENGTH = "llama_4_scaling_beta", "original_max_position_embeddings"
# What its class takes where a config says nothing of RoPE.
_ROPE = {
    "rope_type": "yarn", "rope_theta": 1_000_000.0, "factor": 16.0, _LENGTH: 16_384, "beta_fast": 32.0,
    "beta_slow": 1.0, "mscale_all_dim": 1.0, "mscale": 1.0, _BETA: 0.1,
}  # fmt: skip


def _preset(*shape: int, **fields: FieldValue) -> BackboneConfig:
    """Return a size: num_layers, d_model, d_ff, num_heads, num_kv_heads, head_dim."""
    published: Fields = {"vocab_size": 131_072, "norm_eps": 1e-5, "max_positions": 262_144}
    scaled: Fields = {"rope_scale_global": 16.0, "rope_yarn": (32.0, 1.0, 16_384), "query_scaling": (0.1, 16_384)}
    return global_decoder("ministral3", LLAMA_BLOCK, shape, **{**published, **scaled, **fields})


PRESETS = {
    "ministral-3-3b": _preset(26, 3072, 9216, 32, 8, 128),
    "ministral-3-8b": _preset(34, 4096, 14_336, 32, 8, 128, tied_head=False),
    "ministral-3-14b": _preset(40, 5120, 16_384, 32, 8, 128, tied_head=False, rope_theta_global=1_000_000_000.0),
    "tiny-ministral3": _preset(
        2, 64, 128, 4, 2, 16, rope_yarn=(32.0, 1.0, 16), query_scaling=(0.1, 16), tied_head=False, **TINY
    ),
}


def _read_config(config: JsonObject, fields: Fields, where: str) -> Fields:
    if not config.get("rope_parameters") and not config.get("rope_scaling"):
        config = {**config, "rope_parameters": _ROPE}
    rope, here = rope_object(config, where)
    own = {name: value for name, value in rope.items() if name not in (_BETA, "max_position_embeddings")}
    found = read_llama_config({**config, "rope_parameters": own, "rope_scaling": None}, fields, where)
    length = positive_number(rope, _LENGTH, fields["max_positions"], here)
    return {**found, "query_scaling": (positive_number(rope, _BETA, None, here), length)}


def _write_config(backbone: BackboneConfig) -> Json:
    written = write_llama_config(backbone)
    rope = {**(written.pop("rope_scaling") or {"rope_type": "default"}), "rope_theta": written.pop("rope_theta")}
    if backbone.query_scaling is not None:
        rope[_BETA], rope[_LENGTH] = backbone.query_scaling
    return {**written, "rope_parameters": rope}


_LOG_MULTIPLIER = "scaling.yarn_log_multiplier"  # what config.json calls mscale_all_dim; mscale is 1


def _read_metadata(metadata: Metadata, fields: Fields) -> Fields:
    """Return `GGUFFormat.read`: queries are scaled by the positions that YaRN takes for the original ones."""
    found = read_llama_metadata(metadata, fields)
    length = metadata.number("rope.scaling.original_context_length", default=fields["max_positions"])
    if metadata.scalar("attention.temperature_length") not in (None, length):
        raise metadata.error("attention.temperature_length", f"is unsupported; it must be the original {length}")
    if metadata.scalar("attention.temperature_scale"):
        found["query_scaling"] = (metadata.number("attention.temperature_scale", float), length)
    if "rope_yarn" in fields and metadata.scalar(f"rope.{_LOG_MULTIPLIER}"):
        scale, factor = metadata.number(f"rope.{_LOG_MULTIPLIER}", float), fields["rope_scale_global"]
        found["rope_magnitude"] = yarn_magnitude(factor) / yarn_magnitude(factor, scale)
    return found


FAMILY = Family(
    name="ministral3",
    title="Ministral 3",
    block=LLAMA_BLOCK,
    presets=PRESETS,
    params=llama.PARAMS,
    layouts=mistral.LAYOUTS,
    config=ConfigFormat(
        model_type="ministral3",
        architecture="Ministral3ForCausalLM",
        fields=shape_fields(34, 4096, 14_336, 32, 8, 128, 131_072, 1e-5, 262_144),
        allowed={**LLAMA_ALLOWED, "sliding_window": (None,)},
        unwritten=LLAMA_UNWRITTEN,
        read=_read_config,
        write=_write_config,
        wrapper=mistral.WRAPPER,
    ),
    gguf=GGUFFormat("mistral3", _read_metadata, rope_keys=(_LOG_MULTIPLIER,)),
    tokens=TokenFacts(turn_ends=()),
    torch=TorchExport("modeling_sst_ministral3.py", "SSTMinistral3"),
)
