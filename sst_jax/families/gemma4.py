"""Gemma 4, dense (Google, 2026): global layers with wide heads of their own whose values are their keys, and a layer's
output times a number.

Its multimodal checkpoints are read for their text part. What the smaller members and the mixture need is not computed:
embeddings of each layer, keys and values shared between layers, experts.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import numpy as np

from sst_jax.errors import InputError
from sst_jax.families import gemma3
from sst_jax.families.base import (
    ConfigFormat,
    Family,
    Fields,
    GGUFFormat,
    JsonObject,
    Licence,
    Metadata,
    ParamSpec,
    Splitting,
    TokenFacts,
    TorchExport,
    Wrapper,
)
from sst_jax.families.common import KINDS, SHAPE, TINY, positive_number, shape_fields
from sst_jax.model.backbone import BackboneConfig
from sst_jax.types import FieldValue, Json

PARAMS = (
    *(row._replace(transform="copy") if row.transform == "norm" else row for row in gemma3.PARAMS),
    ParamSpec(
        "layers/layer_scalar/scale", "1", "model.layers.{layer}.layer_scalar", "blk.{layer}.layer_output_scale.weight",
        "copy",
    ),
)  # fmt: skip
BLOCK: Mapping[str, Any] = {
    "norm_offset": 0.0,
    "v_norm": True,
    "layer_scalar": True,
}

_SCALAR = 1.0  # queries and keys are normed, and their product is not scaled


def preset(family: str, *shape: int, kv: int, **fields: FieldValue) -> BackboneConfig:
    """Return a size.

    Args:
      family: its name.
      shape: num_layers, d_model, d_ff, num_heads, num_kv_heads, head_dim.
      kv: heads of keys of a global layer.
      fields: others of BackboneConfig.
    """
    published: Fields = {
        "query_pre_attn_scalar": _SCALAR,
        "window": 1024, "vocab_size": 262_144, "max_positions": 262_144, "global_head_dim": 512,
        "rope_angles_global": 64, "logit_cap": 30.0, "values_from_keys": True,
    }  # fmt: skip
    sizes = dict(zip(SHAPE, shape, strict=True))
    whole: Json = {"family": family, **BLOCK, **sizes, **published, "global_num_kv_heads": kv, **fields}
    return BackboneConfig(**whole)


_PATTERN = ("local", "local", "global") * 2
SMALL: Fields = {**TINY, "window": 16, "global_head_dim": 32, "rope_angles_global": 4}
PRESETS = {
    "gemma-4-31b": preset("gemma4", 60, 5376, 21_504, 32, 16, 256, kv=4),
    "tiny-gemma4": preset("gemma4", 6, 64, 128, 4, 2, 16, kv=1, layer_types=_PATTERN, **SMALL),
}

_SLIDING, _FULL = KINDS
# Fields of what is not computed, what they must be, and why.
_OWN_EMBEDDINGS = "layers that read embeddings of their own (E2B, E4B) are not computed"
_SHARED_KEYS = "layers that read the keys and values of others (E2B, E4B) are not computed"
_EXPERTS = "mixtures of experts (26B-A4B) are not computed"
_LACKING = {
    "hidden_size_per_layer_input": ((0, None), _OWN_EMBEDDINGS),
    "num_kv_shared_layers": ((0, None), _SHARED_KEYS),
    "enable_moe_block": ((False, None), _EXPERTS),
    "use_double_wide_mlp": ((False, None), "feed-forwards of two widths (E2B, E4B) are not computed"),
}


def _layer_types(config: JsonObject, layers: int, where: str) -> tuple[str, ...]:
    named = config.get("layer_types")
    if named is None:
        named = [_SLIDING if (layer + 1) % 6 else _FULL for layer in range(layers)]
        named[-1] = _FULL
    if not isinstance(named, list) or not all(kind in list(KINDS) for kind in named) or named[-1:] != [_FULL]:
        raise InputError(f"{where}: layer_types must be a list of {' and '.join(KINDS)} that ends in {_FULL}")
    return tuple(KINDS[kind] for kind in named)


def _global_shape(config: JsonObject, kinds: tuple[str, ...], shared: bool, where: str) -> Fields:
    """Return width and number of the heads of keys of global layers, as the hub or as transformers 5.24 spells them."""
    if config.get("per_layer_config") is None:
        found: Fields = {"global_head_dim": positive_number(config, "global_head_dim", 512, where)}
        if shared and config.get("num_global_key_value_heads") is not None:
            found["global_num_kv_heads"] = positive_number(config, "num_global_key_value_heads", 1, where)
        return found
    given, name = config["per_layer_config"], f"{where}: per_layer_config"
    own = {"head_dim", "num_key_value_heads"}
    layers = [str(layer) for layer, kind in enumerate(kinds) if kind == "global"]
    plain = isinstance(given, Mapping) and all(
        isinstance(part, Mapping) and set(part) <= own and str(layer).isdecimal() for layer, part in given.items()
    )
    by_layer = {str(int(layer)): dict(part) for layer, part in given.items()} if plain else {}
    parts = [by_layer.get(layer) for layer in layers]
    if not plain or set(by_layer) - set(layers) or any(part != parts[0] for part in parts):
        raise InputError(
            f"{name}={given!r} is unsupported; it must give all full_attention layers, and no others, one head_dim and "
            "num_key_value_heads"
        )
    part = parts[0] or {}
    found = {"global_head_dim": positive_number(part, "head_dim", config.get("head_dim", 256), name)}
    if "num_key_value_heads" in part:
        found["global_num_kv_heads"] = positive_number(part, "num_key_value_heads", 1, name)
        if not shared:
            raise InputError(f"{name}: num_key_value_heads is unsupported where attention_k_eq_v is false")
    return found


def _rope(config: JsonObject, head_dim: int, where: str) -> Fields:
    """Return the fields of RoPE; `head_dim` is that of global layers."""
    given = config.get("rope_parameters") or {
        _SLIDING: {"rope_type": "default", "rope_theta": 10_000.0},
        _FULL: {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1_000_000.0},
    }
    if not isinstance(given, Mapping) or set(given) - set(KINDS):
        raise InputError(f"{where}: rope_parameters={given!r} must have one entry per layer type ({', '.join(KINDS)})")
    fields: Fields = {}
    for kind, theta in ((_SLIDING, 10_000.0), (_FULL, 1_000_000.0)):
        rope, here = given.get(kind) or {}, f"{where}: rope_parameters.{kind}"
        if not isinstance(rope, Mapping):
            raise InputError(f"{here}={rope!r} must be an object")
        rope_type = rope.get("rope_type", "default")
        known = {"rope_type", "rope_theta"} | ({"partial_rotary_factor", "factor"} if kind == _FULL else set())
        if rope_type not in ("default", "proportional")[: 1 + (kind == _FULL)] or set(rope) - known:
            raise InputError(f"{here}={rope!r} is unsupported; known is proportional RoPE of full attention")
        fields[f"rope_theta_{KINDS[kind]}"] = positive_number(rope, "rope_theta", theta, here)
        if rope_type == "proportional":
            fields["rope_scale_global"] = positive_number(rope, "factor", 1.0, here)
            share = positive_number(rope, "partial_rotary_factor", 1.0, here)
            fields["rope_angles_global"] = int(share * head_dim // 2)
    return fields


def _read_config(config: JsonObject, fields: Fields, where: str, per_layer: int) -> Fields:
    """Return `ConfigFormat.read`; `per_layer` is transformers' default of hidden_size_per_layer_input."""
    for name, (allowed, why) in _LACKING.items():
        value = config.get(name, per_layer if name == "hidden_size_per_layer_input" else None)
        if value not in allowed:
            raise InputError(f"{where}: {name}={value!r} is unsupported; it must be {allowed[0]!r}: {why}")
    shared = config.get("attention_k_eq_v", False)
    if not isinstance(shared, bool):
        raise InputError(f"{where}: attention_k_eq_v={shared!r} must be true or false")
    cap, kinds = config.get("final_logit_softcapping"), _layer_types(config, fields["num_layers"], where)
    shape = _global_shape(config, kinds, shared, where)
    return {
        "layer_types": kinds,
        "query_pre_attn_scalar": _SCALAR,
        "values_from_keys": shared,
        "logit_cap": None if cap is None else positive_number(config, "final_logit_softcapping", 1.0, where),
        **shape,
        **_rope(config, shape["global_head_dim"], where),
    }


def _write_config(backbone: BackboneConfig) -> Json:
    names = {ours: theirs for theirs, ours in KINDS.items()}
    head_dim = backbone.global_head_dim or backbone.head_dim
    full: Json = {"rope_type": "default", "rope_theta": backbone.rope_theta_global}
    if backbone.rope_angles_global is not None:
        share = 2 * backbone.rope_angles_global / head_dim
        full |= {"rope_type": "proportional", "partial_rotary_factor": share}
        if backbone.rope_scale_global != 1.0:
            full["factor"] = backbone.rope_scale_global
    return {
        **{name: allowed[0] for name, (allowed, _) in _LACKING.items()},
        "layer_types": [names[kind] for kind in backbone.layer_types],
        "attention_k_eq_v": backbone.values_from_keys,
        "global_head_dim": head_dim,
        "num_global_key_value_heads": backbone.global_num_kv_heads,
        "final_logit_softcapping": backbone.logit_cap,
        "rope_parameters": {
            _SLIDING: {"rope_type": "default", "rope_theta": backbone.rope_theta_local},
            _FULL: full,
        },
        "bos_token_id": 2,
        "eos_token_id": 1,
        "pad_token_id": 0,
    }


def _wrap(text: Json, dtype: str, model_type: str, architecture: str) -> Json:
    """Return the multimodal config.json around a text config; without towers, which transformers does without."""
    return {
        "architectures": [architecture],
        "model_type": model_type,
        "text_config": text,
        "vision_config": None,
        "audio_config": None,
        "tie_word_embeddings": True,
        "dtype": dtype,
        "torch_dtype": dtype,
    }


def config_format(model_type: str, prefix: str, window: int, max_positions: int, per_layer: int) -> ConfigFormat:
    """Return how config.json states a member.

    Args:
      model_type: of the whole model; the text part's has _text behind it.
      prefix: of the names of transformers' classes.
      window: transformers' default, as the following.
      max_positions: positions.
      per_layer: width of the embeddings of each layer.
    """
    return ConfigFormat(
        model_type=f"{model_type}_text",
        architecture=f"{prefix}ForCausalLM",
        fields={
            **shape_fields(30, 2304, 9216, 8, 4, 256, 262_144, 1e-6, max_positions),
            "window": ("sliding_window", window),
        },
        allowed={
            "hidden_activation": ("gelu_pytorch_tanh",),
            "attention_bias": (False, None),
            "tie_word_embeddings": (True, None),
            "use_bidirectional_attention": ("vision", None),  # of pictures, which are not read
            "quantization_config": (None,),
        },
        unwritten=("quantization_config",),
        read=functools.partial(_read_config, per_layer=per_layer),
        write=_write_config,
        wrapper=Wrapper(
            model_type,
            "text_config",
            functools.partial(_wrap, model_type=model_type, architecture=f"{prefix}ForConditionalGeneration"),
        ),
    )


def _kv_heads(metadata: Metadata, kinds: tuple[str, ...]) -> Fields:
    """Return the heads of keys of both kinds of layers: one number for all, or one a layer."""
    name = "attention.head_count_kv"
    given = metadata.value(name)
    if not isinstance(given, np.ndarray):
        return {"num_kv_heads": metadata.number(name)}
    found = {
        kind: {int(heads) for heads, of in zip(given.flat, kinds, strict=False) if of == kind} for kind in set(kinds)
    }
    if given.shape != (len(kinds),) or any(len(heads) != 1 or min(heads) < 1 for heads in found.values()):
        raise metadata.error(name, f"must be {len(kinds)} numbers, those of sliding layers equal and those of others")
    (of_global,) = found["global"]
    return {"num_kv_heads": min(found.get("local", {of_global})), "global_num_kv_heads": of_global}


def _read_metadata(metadata: Metadata, fields: Fields) -> Fields:
    """Return `GGUFFormat.read`, of the keys that llama.cpp's converter writes for the dense members."""
    layers, pattern = fields["num_layers"], metadata.value("attention.sliding_window_pattern")
    if not isinstance(pattern, np.ndarray) or pattern.shape != (layers,) or pattern[-1]:
        name = "attention.sliding_window_pattern"
        raise metadata.error(name, f"must say of {layers} layers which slide, and the last one must not")
    kinds = tuple("local" if sliding else "global" for sliding in pattern)
    if "rope_scale_global" in fields:
        raise metadata.error("rope.scaling.factor", "is unsupported: Gemma 4 is not scaled")
    shape: Fields = {
        "head_dim": metadata.number("attention.key_length_swa"),
        "global_head_dim": metadata.number("attention.key_length"),
    }
    for name, expected in (
        ("attention.value_length_swa", shape["head_dim"]),
        ("rope.dimension_count_swa", shape["head_dim"]),
        ("rope.dimension_count", shape["global_head_dim"]),
    ):
        if metadata.scalar(name) not in (None, expected):
            raise metadata.error(name, f"is unsupported; it must be a head's width, {expected}")
    theta = metadata.number("rope.freq_base", float, 10_000.0)
    cap = metadata.scalar("final_logit_softcapping")
    return {
        **shape,
        **_kv_heads(metadata, kinds),
        "layer_types": kinds,
        "window": metadata.number("attention.sliding_window"),
        "query_pre_attn_scalar": _SCALAR,
        "rope_theta_global": theta,
        "rope_theta_local": metadata.number("rope.freq_base_swa", float, theta),
        "logit_cap": metadata.number("final_logit_softcapping", float) if cap else None,
        # As llama.cpp: global layers without a linear for values take the keys'.
        "values_from_keys": not any(
            f"blk.{layer}.attn_v.weight" in metadata.tensors for layer in range(layers) if kinds[layer] == "global"
        ),
    }


LAYOUTS = {"multimodal_v5": "model.language_model."}
_SPACES = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}
TOKENS = TokenFacts(
    turn_ends=("<turn|>",), splittings={"gemma4": Splitting([], _SPACES, byte_fallback=True, add_bos=True)}
)
LICENCE = Licence("apache-2.0", "A derivative of Gemma 4, which is under the Apache licence, version 2.0.")

FAMILY = Family(
    name="gemma4",
    title="Gemma 4",
    block=BLOCK,
    presets=PRESETS,
    params=PARAMS,
    layouts=LAYOUTS,
    ignored={
        "huggingface": ("model.vision_tower.", "model.embed_vision.", "model.audio_tower.", "model.embed_audio."),
    },
    config=config_format("gemma4", "Gemma4", 512, 131_072, 256),
    gguf=GGUFFormat(
        "gemma4",
        _read_metadata,
        rope_angles=True,
        logit_cap=True,
        lacking={
            "embedding_length_per_layer_input": _OWN_EMBEDDINGS,
            "attention.shared_kv_layers": _SHARED_KEYS,
            "expert_count": _EXPERTS,
        },
    ),
    tokens=TOKENS,
    licence=LICENCE,
    torch=TorchExport("modeling_sst_gemma4.py", "SSTGemma4"),
)
