"""What several families share: the Llama layout of tensors, of config.json and of GGUF metadata."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from sst_jax.errors import InputError
from sst_jax.families.base import Fields, JsonObject, Metadata, ParamSpec, Splitting
from sst_jax.model.backbone import BackboneConfig
from sst_jax.types import FieldValue, Json

# ---------------------------------------------------------------------------------------------------------- tensors


def layer_param(path: str, axes: str, huggingface: str, gguf: str, transform: str) -> ParamSpec:
    """Return an array of every layer, whose last part is "bias" where its path's is, "weight" elsewhere."""
    last = "bias" if path.endswith("/bias") else "weight"
    return ParamSpec(
        f"layers/{path}",
        axes,
        f"model.layers.{{layer}}.{huggingface}.{last}",
        f"blk.{{layer}}.{gguf}.{last}",
        transform,
    )


LLAMA_PARAMS = (
    ParamSpec("embed/embedding", "VD", "model.embed_tokens.weight", "token_embd.weight", "copy"),
    ParamSpec("head/embedding", "VD", "lm_head.weight", "output.weight", "copy"),
    ParamSpec("final_norm/scale", "D", "model.norm.weight", "output_norm.weight", "copy"),
    layer_param("pre_attn_norm/scale", "D", "input_layernorm", "attn_norm", "copy"),
    layer_param("q/kernel", "DP", "self_attn.q_proj", "attn_q", "transpose"),
    layer_param("k/kernel", "DQ", "self_attn.k_proj", "attn_k", "transpose"),
    layer_param("v/kernel", "DQ", "self_attn.v_proj", "attn_v", "transpose"),
    layer_param("o/kernel", "PD", "self_attn.o_proj", "attn_output", "transpose"),
    layer_param("pre_ffn_norm/scale", "D", "post_attention_layernorm", "ffn_norm", "copy"),
    layer_param("gate/kernel", "DF", "mlp.gate_proj", "ffn_gate", "transpose"),
    layer_param("up/kernel", "DF", "mlp.up_proj", "ffn_up", "transpose"),
    layer_param("down/kernel", "FD", "mlp.down_proj", "ffn_down", "transpose"),
)

# ------------------------------------------------------------------------------------------------------ block, shapes

LLAMA_BLOCK: Mapping[str, Any] = {
    "norm_offset": 0.0,
    "post_norms": False,
    "qk_norm": False,
    "activation": "silu",
    "scale_embedding": False,
    "window": None,
}
TINY: Mapping[str, Any] = {"vocab_size": 262, "max_positions": 4096}  # the byte tokenizer's vocabulary


SHAPE = ("num_layers", "d_model", "d_ff", "num_heads", "num_kv_heads", "head_dim")


def global_decoder(
    family: str,
    block: Mapping[str, Any],
    shape: tuple[int, ...],
    **fields: FieldValue,
) -> BackboneConfig:
    """Return a decoder with global attention only, whose queries are scaled by its head_dim.

    Args:
      family: its name.
      block: what its block computes, as fields of BackboneConfig.
      shape: num_layers, d_model, d_ff, num_heads, num_kv_heads, head_dim.
      fields: others of BackboneConfig.
    """
    sizes = dict(zip(SHAPE, shape, strict=True))
    own = {"query_pre_attn_scalar": float(shape[-1]), "family": family}
    whole: Json = {**own, **sizes, **block, **fields}
    return BackboneConfig(**whole)


# ------------------------------------------------------------------------------------------------------ config.json


def positive_number(fields: JsonObject, name: str, default: float | None, where: str) -> Any:
    """Return a positive number of a JSON object: an int where its default is one, else a float.

    Raises: InputError naming the field.
    """
    value = fields.get(name, default)
    kind = int if isinstance(default, int) else (int, float)
    # Fields reach array shapes and Python ranges: the bound keeps absurd claims out of both.
    if not isinstance(value, kind) or isinstance(value, bool) or not 0 < value < 2**40:
        raise InputError(f"{where}: {name}={value!r} must be a positive {'integer' if kind is int else 'number'}")
    return value if kind is int else float(value)


_SHAPES = {
    "num_layers": "num_hidden_layers",
    "d_model": "hidden_size",
    "d_ff": "intermediate_size",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "vocab_size": "vocab_size",
    "norm_eps": "rms_norm_eps",
    "max_positions": "max_position_embeddings",
}


def shape_fields(*defaults: int | float | None) -> dict[str, tuple[str, int | float | None]]:
    """Return `ConfigFormat.fields` of the shapes that all families have, from transformers' defaults.

    They are those of num_layers, d_model, d_ff, num_heads, num_kv_heads, head_dim, vocab_size, norm_eps and
    max_positions.
    """
    return {name: (_SHAPES[name], default) for name, default in zip(_SHAPES, defaults, strict=True)}


LLAMA_ALLOWED: Mapping[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "attention_bias": (False, None),
    "partial_rotary_factor": (None, 1),
    "quantization_config": (None,),
}
LLAMA_UNWRITTEN = ("partial_rotary_factor", "quantization_config")
_LLAMA3 = ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
_YARN = {
    "beta_fast", "beta_slow", "original_max_position_embeddings", "attention_factor", "mscale", "mscale_all_dim",
}  # fmt: skip
_KNOWN = {"default": set(), "linear": {"factor"}, "llama3": {"factor", *_LLAMA3}, "yarn": {"factor", *_YARN}}
THETA = 10_000.0  # where a config says none


def rope_object(config: JsonObject, where: str) -> tuple[JsonObject, str]:
    """Return what a config says of RoPE in either style, "rope_scaling" or "rope_parameters", and where.

    Raises: InputError where it is no object.
    """
    name = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"
    rope = config.get(name) or {}
    if not isinstance(rope, Mapping):
        raise InputError(f"{where}: {name}={rope!r} must be an object")
    return rope, f"{where}: {name}"


def rope_theta(config: JsonObject, rope: JsonObject, where: str, here: str, default: float = THETA) -> float:
    """Return the base of RoPE's exponents, from its object or from beside it.

    Args:
      config: a config.json.
      rope: its object of RoPE.
      where: the name of the first in messages.
      here: of the second.
      default: transformers' for the model type.
    """
    inside = "rope_theta" in rope
    return positive_number(rope if inside else config, "rope_theta", default, here if inside else where)


def rope_scaling_fields(config: JsonObject, rope: JsonObject, max_positions: int, where: str, here: str) -> Fields:
    """Return the fields of BackboneConfig that an object of RoPE gives, without theta.

    Args:
      config: a config.json; its original_max_position_embeddings goes before the object's, as in transformers.
      rope: the object.
      max_positions: of the config, for an object that does not say how many there were first.
      where: the name of the config in messages.
      here: of the object.

    Raises: InputError naming the scaling, or its field, that is not known.
    """
    kind = rope.get("rope_type", rope.get("type", "default"))
    known = _KNOWN.get(kind if isinstance(kind, str) else "")
    unknown = set(rope) - {"rope_type", "type", "rope_theta", "factor", *(_LLAMA3 if kind != "yarn" else ())}
    if rope.get("partial_rotary_factor") in (None, 1):
        unknown -= {"partial_rotary_factor"}
    if known is None or unknown - known:
        raise InputError(
            f"{here}={rope!r} is unsupported; known are linear, llama3 and yarn scaling, of all of a head's dimensions"
        )
    if kind == "default":
        return {}
    fields: Fields = {"rope_scale_global": positive_number(rope, "factor", None, here)}
    if kind == "linear":
        return fields
    name = "original_max_position_embeddings"
    aside = config.get(name) is not None
    original = positive_number(config if aside else rope, name, max_positions, where if aside else here)
    if kind == "llama3":
        bands = (positive_number(rope, factor, None, here) for factor in _LLAMA3[:2])
        return {**fields, "rope_llama3": (*bands, original)}
    betas = {name: rope[name] if rope.get(name) else default for name, default in _BETAS.items()}
    fast, slow = (positive_number(betas, name, None, here) for name in _BETAS)
    fields["rope_yarn"] = (fast, slow, original)
    return {**fields, "rope_magnitude": _yarn_magnitude(rope, fields["rope_scale_global"], here)}


_BETAS = {"beta_fast": 32.0, "beta_slow": 1.0}


def _yarn_magnitude(rope: JsonObject, factor: float, here: str) -> float:
    """Return YaRN's attention factor: the one that is given, or the paper's of the scaling factor."""
    if rope.get("attention_factor") is not None:
        return positive_number(rope, "attention_factor", 1.0, here)
    if rope.get("mscale") and rope.get("mscale_all_dim"):
        scales = (positive_number(rope, name, 1.0, here) for name in ("mscale", "mscale_all_dim"))
        above, below = (yarn_magnitude(factor, scale) for scale in scales)
        return above / below
    return yarn_magnitude(factor)


def yarn_magnitude(factor: float, scale: float = 1.0) -> float:
    """Return the attention factor of YaRN's paper (arXiv 2309.00071, eq. 22) for a scaling factor.

    `scale` multiplies its logarithm: the mscale of DeepSeek's configs.
    """
    return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0


def read_tied(config: JsonObject, where: str, default: bool = False) -> bool:
    """Return whether the head is the embedding.

    Raises: InputError where the field is no truth value.
    """
    tied = config.get("tie_word_embeddings", default)
    if not isinstance(tied, bool):
        raise InputError(f"{where}: tie_word_embeddings={tied!r} must be true or false")
    return tied


def read_llama_config(
    config: JsonObject, fields: Fields, where: str, theta: float = THETA, tied: bool = False
) -> Fields:
    """Return `ConfigFormat.read` of a decoder with global attention only.

    Args:
      config: a config.json.
      fields: the numbers that have been read.
      where: its name in messages.
      theta: of a config without one.
      tied: whether the head is, of a config that does not say.
    """
    layer_types = config.get("layer_types")
    if layer_types is not None and layer_types != ["full_attention"] * fields["num_layers"]:
        raise InputError(f"{where}: layer_types must be full_attention for each of the layers")
    rope, here = rope_object(config, where)
    return {
        "tied_head": read_tied(config, where, tied),
        "query_pre_attn_scalar": float(fields["head_dim"]),
        "rope_theta_global": rope_theta(config, rope, where, here, theta),
        **rope_scaling_fields(config, rope, fields["max_positions"], where, here),
    }


def write_rope_scaling(backbone: BackboneConfig) -> Json | None:
    """Return config.json's "rope_scaling", of global layers; None where nothing is scaled."""
    factor = backbone.rope_scale_global
    if backbone.rope_llama3 is not None:
        return {"rope_type": "llama3", "factor": factor, **dict(zip(_LLAMA3, backbone.rope_llama3, strict=True))}
    if backbone.rope_yarn is not None:
        fast, slow, original = backbone.rope_yarn
        return {
            "rope_type": "yarn",
            "factor": factor,
            "beta_fast": fast,
            "beta_slow": slow,
            "original_max_position_embeddings": original,
            "attention_factor": backbone.rope_magnitude,
        }
    return None if factor == 1.0 else {"rope_type": "linear", "factor": factor}


def write_llama_config(backbone: BackboneConfig) -> Json:
    """Return `ConfigFormat.write` of a decoder with global attention only."""
    return {
        "tie_word_embeddings": backbone.tied_head,
        "rope_scaling": write_rope_scaling(backbone),
        "rope_theta": backbone.rope_theta_global,
        # The vocabularies differ: generation_config.json, from the tokenizer, says which ids these are.
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }


KINDS = {"sliding_attention": "local", "full_attention": "global"}  # of layers, in config.json and here


def window_fields(kinds: Sequence[str], window: int, fields: Fields, where: str) -> Fields:
    """Return the fields of a decoder whose sliding layers rotate as its global ones would.

    Layers whose window no text fills are global.

    Args:
      kinds: "local" or "global" of each layer.
      window: of the local ones.
      fields: what has been read, RoPE's among them.
      where: the name of the config in messages.

    Raises: InputError where sliding layers are to be scaled, which they are not here.
    """
    if "local" not in kinds or window >= fields["max_positions"]:
        return {"layer_types": ("global",) * len(kinds)}
    if {"rope_scale_global", "rope_llama3", "rope_yarn", "rope_short"} & set(fields):
        raise InputError(f"{where}: rope_scaling of layers with a sliding window is unsupported")
    return {"layer_types": tuple(kinds), "window": window, "rope_theta_local": fields["rope_theta_global"]}


# ------------------------------------------------------------------------------------------------------------- GGUF


def read_llama_metadata(metadata: Metadata, fields: Fields) -> Fields:
    """Return `GGUFFormat.read` of a decoder with global attention only."""
    head_dim = metadata.number("attention.key_length", default=fields["d_model"] // fields["num_heads"])
    for name, allowed, problem in (
        ("expert_count", (None, 0), "is unsupported: mixtures of experts are not read"),
        ("rope.dimension_count", (None, head_dim), f"is unsupported: all {head_dim} dimensions of a head are rotated"),
        ("attention.sliding_window", (None, 0), "is unsupported: attention is global here"),
        (
            "rope.dimension_count_swa",
            (None, head_dim),
            f"is unsupported: all {head_dim} dimensions of a head are rotated",
        ),
        ("rope.freq_base_swa", (None,), "is unsupported: attention is global here"),
    ):
        if metadata.scalar(name) not in allowed:
            raise metadata.error(name, problem)
    return {
        "num_kv_heads": metadata.number("attention.head_count_kv", default=fields["num_heads"]),
        "head_dim": head_dim,
        "rope_theta_global": metadata.number("rope.freq_base", float, 10_000.0),
        "query_pre_attn_scalar": float(head_dim),
    }


ROPE_LLAMA3 = (1.0, 4.0, 8192)  # the only low and high factors and original length that were published

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_SYMBOLS = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def split_words(digits: str, normalizer: Json | None = None, ignore_merges: bool = False) -> Splitting:
    """Return words as GPT-4 cuts them, with numbers cut as the pattern `digits` says."""
    return split_by(f"{_CONTRACTIONS}|{digits}|{_SYMBOLS}", normalizer, ignore_merges)


def split_by(pattern: str, normalizer: Json | None = None, ignore_merges: bool = False) -> Splitting:
    """Return words that a pattern finds, as bytes."""
    return Splitting(
        [
            {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False},
            {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
        ],
        normalizer,
        ignore_merges,
    )


def split_case(digits: str, ending: str = "") -> str:
    """Return the pattern of vocabularies that begin a word at a capital letter.

    Args:
      digits: how numbers are cut.
      ending: what a word may end with.
    """
    above, below = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
    words = (f"{above}*{below}+", f"{above}+{below}*")
    rest = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    return "|".join((*(rf"[^\r\n\p{{L}}\p{{N}}]?{word}{ending}" for word in words), digits, rest))
