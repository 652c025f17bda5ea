"""SmolLM3 (Hugging Face, 2025): Llama's layout, where every fourth layer does not rotate (NoPE, arXiv 2501.18795)."""

from __future__ import annotations

from sst_jax.errors import InputError
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


def _every(interval: int, layers: int) -> tuple[int, ...]:
    """Return the layers that do not rotate."""
    return tuple(range(interval - 1, layers, interval))


def _preset(*shape: int, nope: int, **fields: FieldValue) -> BackboneConfig:
    """Return a size: num_layers, d_model, d_ff, num_heads, num_kv_heads, head_dim."""
    return global_decoder("smollm3", LLAMA_BLOCK, shape, nope_layers=_every(nope, shape[0]), **fields)


PRESETS = {
    "smollm3-3b": _preset(
        36, 2048, 11_008, 16, 4, 128, nope=4, vocab_size=128_256, max_positions=65_536, rope_theta_global=5_000_000.0
    ),
    "tiny-smollm3": _preset(4, 64, 128, 4, 2, 16, nope=4, **TINY),
}


def _read_config(config: JsonObject, fields: Fields, where: str) -> Fields:
    layers, rotates = fields["num_layers"], config.get("no_rope_layers")
    nope = _every(positive_number(config, "no_rope_layer_interval", 4, where), layers)
    if rotates is not None:  # of each layer 1 where it rotates, whatever the name says
        if not isinstance(rotates, list) or len(rotates) < layers or any(flag not in (0, 1) for flag in rotates):
            raise InputError(f"{where}: no_rope_layers={rotates!r} must be a list of 0 or 1 for each of the layers")
        nope = tuple(layer for layer in range(layers) if not rotates[layer])
    return {"nope_layers": nope, **read_llama_config(config, fields, where, theta=2_000_000.0, tied=True)}


def _write_config(backbone: BackboneConfig) -> Json:
    rotates = [int(layer not in backbone.nope_layers) for layer in range(backbone.num_layers)]
    return {**write_llama_config(backbone), "no_rope_layers": rotates}


def _read_metadata(metadata: Metadata, fields: Fields) -> Fields:
    # llama.cpp counts by four, whatever the file says.
    return {"nope_layers": _every(4, fields["num_layers"]), **read_llama_metadata(metadata, fields)}


FAMILY = Family(
    name="smollm3",
    title="SmolLM3",
    block=LLAMA_BLOCK,
    presets=PRESETS,
    params=llama.PARAMS,
    config=ConfigFormat(
        model_type="smollm3",
        architecture="SmolLM3ForCausalLM",
        fields=shape_fields(36, 2048, 11_008, 16, 4, None, 128_256, 1e-6, 32_768),
        allowed={**LLAMA_ALLOWED, "mlp_bias": (False, None), "use_sliding_window": (False, None)},
        unwritten=LLAMA_UNWRITTEN,
        read=_read_config,
        write=_write_config,
    ),
    gguf=GGUFFormat("smollm3", _read_metadata),
    tokens=TokenFacts(turn_ends=("<|im_end|>",)),
    torch=TorchExport("modeling_sst_smollm3.py", "SSTSmolLM3"),
)
