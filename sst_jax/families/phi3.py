"""Phi-3 (arXiv 2404.14219), Phi-4 and Phi-4-mini: Llama's layout with fused linears, partial rotation and LongRoPE."""

from __future__ import annotations

import math

from sst_jax.errors import InputError
from sst_jax.families.base import (
    ConfigFormat,
    Family,
    Fields,
    Fused,
    GGUFFormat,
    JsonObject,
    Metadata,
    TokenFacts,
    TorchExport,
)
from sst_jax.families.common import (
    LLAMA_BLOCK,
    LLAMA_PARAMS,
    TINY,
    global_decoder,
    positive_number,
    read_tied,
    rope_object,
    rope_theta,
    shape_fields,
    split_by,
    split_case,
    split_words,
    window_fields,
    write_llama_config,
)
from sst_jax.model.backbone import BackboneConfig
from sst_jax.types import FieldValue, Json


def _preset(*shape: int, **fields: FieldValue) -> BackboneConfig:
    """Return a size: num_layers, d_model, d_ff, num_heads, num_kv_heads, head_dim."""
    published = {"vocab_size": 32_064, "norm_eps": 1e-5, "max_positions": 4096, "tied_head": False}
    return global_decoder("phi3", LLAMA_BLOCK, shape, **{**published, "rope_theta_global": 10_000.0, **fields})


def _magnitude(factor: float, original: int) -> float:
    """Return what LongRoPE multiplies cosines and sines by where no `attention_factor` is given."""
    return 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))


def _sliding(layers: int) -> Fields:
    return {"window": 2047, "layer_types": ("local",) * layers}


# LongRoPE's divisors of Phi-4-mini beyond 4,096 positions, from its config.json.
_PHI_4_MINI_LONG = (
    1.0, 1.118320672, 1.250641126, 1.398617824, 1.564103225, 1.74916897, 1.956131817, 2.187582649, 2.446418898,
    2.735880826, 3.059592084, 3.421605075, 3.826451687, 4.279200023, 4.785517845, 5.351743533, 5.984965424,
    6.693110555, 7.485043894, 8.370679318, 9.36110372, 10.4687158, 11.70738129, 13.09260651, 14.64173252,
    16.37415215, 18.31155283, 20.47818807, 22.90118105, 25.61086418, 28.64115884, 32.03, 32.1, 32.13, 32.23, 32.6,
    32.61, 32.64, 32.66, 32.7, 32.71, 32.93, 32.97, 33.28, 33.49, 33.5, 44.16, 47.77,
)  # fmt: skip

PRESETS = {
    "phi-3-mini-4k": _preset(32, 3072, 8192, 32, 32, 96, **_sliding(32)),
    "phi-3-medium-4k": _preset(40, 5120, 17_920, 40, 10, 128, **_sliding(40)),
    "phi-4": _preset(
        40, 5120, 17_920, 40, 10, 128, vocab_size=100_352, max_positions=16_384, rope_theta_global=250_000.0
    ),
    "phi-4-mini": _preset(
        32, 3072, 8192, 24, 8, 128, vocab_size=200_064, max_positions=131_072, tied_head=True, rotary_dims=96,
        rope_original=4096, rope_magnitude=_magnitude(32, 4096), rope_short=(1.0,) * 48, rope_long=_PHI_4_MINI_LONG,
    ),
    "tiny-phi3": _preset(
        2, 64, 128, 4, 2, 16, rotary_dims=12, rope_original=1024, rope_magnitude=1.125,
        rope_short=(1.0, 1.25, 1.5, 1.75, 2.0, 2.5), rope_long=(1.0, 2.0, 4.0, 8.0, 16.0, 32.0),
        **{**TINY, "tied_head": True},
    ),
}  # fmt: skip

_WINDOW = "attention.sliding_window"
_LENGTH = "original_max_position_embeddings"
_LONGROPE = {
    "rope_type", "type", "rope_theta", "partial_rotary_factor", "short_factor", "long_factor", "factor",
    "attention_factor", _LENGTH,
}  # fmt: skip


def _read_config(config: JsonObject, fields: Fields, where: str) -> Fields:
    rope, here = rope_object(config, where)
    layers, window = fields["num_layers"], config.get("sliding_window")
    holder, place = (rope, here) if "partial_rotary_factor" in rope else (config, where)
    rotated = int(fields["head_dim"] * positive_number(holder, "partial_rotary_factor", 1.0, place))
    found: Fields = {
        "tied_head": read_tied(config, where),
        "query_pre_attn_scalar": float(fields["head_dim"]),
        "rope_theta_global": rope_theta(config, rope, where, here),
        "rotary_dims": None if rotated == fields["head_dim"] else rotated,
    }
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "longrope", "su", "yarn") or set(rope) - _LONGROPE:  # its class takes all three for one
        raise InputError(f"{here}={rope!r} is unsupported; known is longrope scaling")
    if kind != "default":
        found |= _longrope(config, rope, fields["max_positions"], here)
    if window is None:
        return found
    window = positive_number({"sliding_window": window}, "sliding_window", 4096, where)
    return {**found, **window_fields(["local"] * layers, window, {**fields, **found}, where)}


def _longrope(config: JsonObject, rope: JsonObject, max_positions: int, here: str) -> Fields:
    """Return the fields of BackboneConfig that an object of LongRoPE gives."""
    original = int(positive_number({_LENGTH: config.get(_LENGTH) or rope.get(_LENGTH)}, _LENGTH, 4096, here))
    factor = max_positions / original
    if rope.get("factor") is not None:
        factor = positive_number(rope, "factor", None, here)
    divisors = {}
    for name in ("short_factor", "long_factor"):
        numbers = rope.get(name)
        if not isinstance(numbers, list):
            raise InputError(f"{here}: {name}={numbers!r} must be a list of numbers")
        divisors[name] = tuple(numbers)
    return {
        "rope_short": divisors["short_factor"],
        "rope_long": divisors["long_factor"],
        "rope_original": original,
        "rope_magnitude": positive_number(rope, "attention_factor", None, here)
        if rope.get("attention_factor") is not None
        else _magnitude(factor, original),
    }


def _write_config(backbone: BackboneConfig) -> Json:
    written: Json = {**write_llama_config(backbone), "sliding_window": backbone.window}
    if backbone.rotary_dims is not None:
        written["partial_rotary_factor"] = backbone.rotary_dims / backbone.head_dim
    written[_LENGTH] = backbone.rope_original or backbone.max_positions
    if backbone.rope_short:
        written["rope_scaling"] = {
            "rope_type": "longrope",
            "short_factor": list(backbone.rope_short),
            "long_factor": list(backbone.rope_long),
            "attention_factor": backbone.rope_magnitude,
        }
    return written


def _read_metadata(metadata: Metadata, fields: Fields) -> Fields:
    head_dim = fields["d_model"] // fields["num_heads"]
    rotated, window = metadata.number("rope.dimension_count", default=head_dim), metadata.scalar(_WINDOW)
    found: Fields = {
        "num_kv_heads": metadata.number("attention.head_count_kv", default=fields["num_heads"]),
        "head_dim": head_dim,
        "rope_theta_global": metadata.number("rope.freq_base", float, 10_000.0),
        "query_pre_attn_scalar": float(head_dim),
        "rotary_dims": None if rotated == head_dim else rotated,
    }
    if not window:
        return found
    kinds = ["local"] * fields["num_layers"]
    return {**found, **window_fields(kinds, metadata.number(_WINDOW), {**fields, **found}, metadata.where)}


FAMILY = Family(
    name="phi3",
    title="Phi",
    block=LLAMA_BLOCK,
    presets=PRESETS,
    params=LLAMA_PARAMS,
    fused=(
        Fused(
            "model.layers.{layer}.self_attn.qkv_proj.weight",
            "blk.{layer}.attn_qkv.weight",
            ("layers/q/kernel", "layers/k/kernel", "layers/v/kernel"),
        ),
        Fused(
            "model.layers.{layer}.mlp.gate_up_proj.weight",
            "blk.{layer}.ffn_up.weight",
            ("layers/gate/kernel", "layers/up/kernel"),
        ),
    ),
    config=ConfigFormat(
        model_type="phi3",
        architecture="Phi3ForCausalLM",
        fields=shape_fields(32, 3072, 8192, 32, None, None, 32_064, 1e-5, 4096),
        allowed={"hidden_act": ("silu",), "attention_bias": (False, None), "quantization_config": (None,)},
        unwritten=("quantization_config",),
        read=_read_config,
        write=_write_config,
    ),
    gguf=GGUFFormat("phi3", _read_metadata, longrope=True),
    tokens=TokenFacts(
        turn_ends=("<|end|>", "<|im_end|>"),
        splittings={
            "dbrx": split_words(r"\p{N}{1,3}"),  # Phi-4
            "gpt-4o": split_by(split_case(r"\p{N}{1,3}", r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?")),  # Phi-4-mini
        },
    ),
    torch=TorchExport("modeling_sst_phi3.py", "SSTPhi3"),
)
