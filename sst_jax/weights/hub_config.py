"""config.json of the hub's models to BackboneConfig and back; one `Dialect` for each model_type."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from sst_jax.errors import InputError
from sst_jax.model.config import FAMILIES, MAX_LAYERS, BackboneConfig

_KINDS = {"sliding_attention": "local", "full_attention": "global"}
_LLAMA3 = ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


class Dialect(NamedTuple):
    """How config.json speaks of one model_type.

    fields  of BackboneConfig, (their name, the default of transformers 5.23): the hub's configs leave many to them. A
            float default means that the field may be a float, None that it follows from the fields before it.
    only    what the block does not compute: the field must be absent or have one of these values
    read    (text config, fields so far, where) -> the rest of BackboneConfig's fields
    write   the same backwards
    """

    family: str
    architecture: str
    fields: dict[str, tuple[str, int | float | None]]
    only: dict[str, tuple[Any, ...]]
    read: Callable[[Mapping[str, Any], dict[str, Any], str], dict[str, Any]]
    write: Callable[[BackboneConfig], dict[str, Any]]


def _number(fields: Mapping[str, Any], name: str, default: int | float | None, where: str) -> Any:
    value = fields.get(name, default)
    kind = int if isinstance(default, int) else (int, float)
    # Fields reach array shapes and Python ranges: the bound keeps absurd claims out of both.
    if not isinstance(value, kind) or isinstance(value, bool) or not 0 < value < 2**40:
        raise InputError(f"{where}: {name}={value!r} must be a positive {'integer' if kind is int else 'number'}")
    return value if kind is int else float(value)


# ------------------------------------------------------------------------------------------------------- Gemma 3


def _gemma_rope(fields: Mapping[str, Any], where: str) -> tuple[float, float, float]:
    """(theta of local layers, theta of global layers, linear scale of global layers), from either style of config."""
    given = fields.get("rope_parameters") or {}
    if not isinstance(given, Mapping) or set(given) - set(_KINDS):
        raise InputError(f"{where}: rope_parameters={given!r} must have one entry per layer type ({', '.join(_KINDS)})")
    theta, scale = {}, {}
    for kind, older, default in (
        ("sliding_attention", "rope_local_base_freq", 10_000.0),
        ("full_attention", "rope_theta", 1_000_000.0),
    ):
        # Scaling in the older style is added to the global layers' entry and wins, as in transformers.
        scaling = fields.get("rope_scaling") if kind == "full_attention" else None
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
            theta[kind] = _number(rope, "rope_theta", default, f"{where}: {name}")
        else:
            theta[kind] = _number(fields, older, default, where)
        scale[kind] = _number(rope, "factor", None, f"{where}: {name}") if rope_type == "linear" else 1.0
    return theta["sliding_attention"], theta["full_attention"], scale["full_attention"]


def _read_gemma(text: Mapping[str, Any], fields: dict[str, Any], where: str) -> dict[str, Any]:
    layers, layer_types = fields["num_layers"], text.get("layer_types")
    if layer_types is None:
        pattern = _number(text, "sliding_window_pattern", 6, where)
        layer_types = ["sliding_attention" if (layer + 1) % pattern else "full_attention" for layer in range(layers)]
    if not isinstance(layer_types, list) or not all(kind in list(_KINDS) for kind in layer_types):
        raise InputError(f"{where}: layer_types must be a list of {' and '.join(_KINDS)}")
    local, glob, scale = _gemma_rope(text, where)
    return {
        "layer_types": tuple(_KINDS[kind] for kind in layer_types),
        "rope_theta_local": local, "rope_theta_global": glob, "rope_scale_global": scale,
    }  # fmt: skip


def _write_gemma(backbone: BackboneConfig) -> dict[str, Any]:
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


# -------------------------------------------------------------------------------------------- Llama 3 and Qwen 3


def _llama_rope(text: Mapping[str, Any], max_positions: int, where: str) -> dict[str, Any]:
    """theta and scaling of the one kind of layer, from either style of config."""
    name = "rope_scaling" if text.get("rope_scaling") else "rope_parameters"
    rope = text.get(name) or {}
    if not isinstance(rope, Mapping):
        raise InputError(f"{where}: {name}={rope!r} must be an object")
    kind, here = rope.get("rope_type", rope.get("type", "default")), f"{where}: {name}"
    unknown = set(rope) - {"rope_type", "type", "rope_theta", "factor", *_LLAMA3}
    if rope.get("partial_rotary_factor") in (None, 1):
        unknown -= {"partial_rotary_factor"}
    if kind not in ("default", "linear", "llama3") or unknown:
        raise InputError(
            f"{here}={rope!r} is unsupported; known are linear and llama3 scaling, of all of a head's dimensions"
        )
    holder, place = (rope, here) if "rope_theta" in rope else (text, where)
    facts = {"rope_theta_global": _number(holder, "rope_theta", 10_000.0, place)}
    if kind != "default":
        facts["rope_scale_global"] = _number(rope, "factor", None, here)
    if kind == "llama3":
        defaults = (None, None, max_positions)
        facts["rope_llama3"] = tuple(_number(rope, *part, here) for part in zip(_LLAMA3, defaults, strict=True))
    return facts


def _read_llama(text: Mapping[str, Any], fields: dict[str, Any], where: str) -> dict[str, Any]:
    tied, layer_types = text.get("tie_word_embeddings", False), text.get("layer_types")
    if not isinstance(tied, bool):
        raise InputError(f"{where}: tie_word_embeddings={tied!r} must be true or false")
    if layer_types is not None and layer_types != ["full_attention"] * fields["num_layers"]:
        raise InputError(f"{where}: layer_types must be full_attention for each of the layers")
    rope = _llama_rope(text, fields["max_positions"], where)
    return {"tied_head": tied, "query_pre_attn_scalar": float(fields["head_dim"]), **rope}


def _write_llama(backbone: BackboneConfig) -> dict[str, Any]:
    scaling = {"rope_type": "linear", "factor": backbone.rope_scale_global}
    if backbone.rope_llama3 is not None:
        scaling |= {"rope_type": "llama3", **dict(zip(_LLAMA3, backbone.rope_llama3, strict=True))}
    elif backbone.rope_scale_global == 1.0:
        scaling = None
    return {
        "tie_word_embeddings": backbone.tied_head,
        "rope_scaling": scaling,
        "rope_theta": backbone.rope_theta_global,
        # The vocabularies differ: generation_config.json, from the tokenizer, says which ids these are.
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }


_SHAPES = {
    "num_layers": "num_hidden_layers", "d_model": "hidden_size", "d_ff": "intermediate_size",
    "num_heads": "num_attention_heads", "num_kv_heads": "num_key_value_heads", "head_dim": "head_dim",
    "vocab_size": "vocab_size", "norm_eps": "rms_norm_eps", "max_positions": "max_position_embeddings",
}  # fmt: skip
_PLAIN = {"hidden_act": ("silu",), "attention_bias": (False, None)}
_REST = {"partial_rotary_factor": (None, 1), "quantization_config": (None,)}


def _fields(*defaults: int | float | None) -> dict[str, tuple[str, int | float | None]]:
    return {name: (_SHAPES[name], default) for name, default in zip(_SHAPES, defaults, strict=True)}


DIALECTS = {
    "gemma3_text": Dialect(
        "gemma3", "Gemma3ForCausalLM",
        _fields(26, 2304, 9216, 8, 4, 256, 262_208, 1e-6, 131_072)
        | {"window": ("sliding_window", 4096), "query_pre_attn_scalar": ("query_pre_attn_scalar", 256.0)},
        {
            "hidden_activation": ("gelu_pytorch_tanh",), "attention_bias": (False, None),
            "tie_word_embeddings": (True, None), "attn_logit_softcapping": (None,),
            "final_logit_softcapping": (None,), "use_bidirectional_attention": (False, None),
            "quantization_config": (None,),
        },
        _read_gemma, _write_gemma,
    ),
    "llama": Dialect(
        "llama", "LlamaForCausalLM", _fields(32, 4096, 11_008, 32, None, None, 32_000, 1e-6, 2048),
        _PLAIN | _REST | {"mlp_bias": (False, None)}, _read_llama, _write_llama,
    ),
    "qwen3": Dialect(
        "qwen3", "Qwen3ForCausalLM", _fields(32, 4096, 22_016, 32, 32, 128, 151_936, 1e-6, 32_768),
        _PLAIN | _REST | {"use_sliding_window": (False, None)}, _read_llama, _write_llama,
    ),
}  # fmt: skip


# -------------------------------------------------------------------------------------------------- both ways


def backbone_from_config(config: Mapping[str, Any], where: str = "config.json") -> BackboneConfig:
    """A config.json of transformers 4 or 5, of a model_type in DIALECTS or multimodal Gemma 3 ("gemma3").

    Absent fields take transformers' defaults, as they do there.

    Raises: InputError naming the field that is unsupported, misshapen or out of range.
    """
    model_type, text, levels = config.get("model_type"), config, [(where, config)]
    if model_type == "gemma3":
        text, where = config.get("text_config"), f"{where}: text_config"
        if not isinstance(text, Mapping):
            raise InputError(f"{where} is missing or not an object")
        model_type = text.get("model_type", "gemma3_text")
        levels.append((where, text))
    if model_type not in list(DIALECTS):
        known = ", ".join(map(repr, (*DIALECTS, "gemma3")))
        raise InputError(f"{where}: model_type={model_type!r} is unsupported; known are {known}")
    dialect = DIALECTS[model_type]
    for place, level in levels:
        for name, allowed in dialect.only.items():
            if name in level and level[name] not in allowed:
                raise InputError(f"{place}: {name}={level[name]!r} is unsupported; it must be {allowed[0]!r}")

    fields: dict[str, Any] = {}
    for name, (field, default) in dialect.fields.items():
        if default is None and text.get(field) is None:
            derived = {"num_kv_heads": fields["num_heads"], "head_dim": fields["d_model"] // fields["num_heads"]}
            fields[name] = derived[name]
        else:
            fields[name] = _number(text, field, 1 if default is None else default, where)
    if fields["num_layers"] > MAX_LAYERS:
        raise InputError(f"{where}: num_hidden_layers={fields['num_layers']} is beyond {MAX_LAYERS}")
    fields |= dialect.read(text, fields, where)
    try:
        return BackboneConfig(family=dialect.family, **{**FAMILIES[dialect.family], **fields})
    except InputError as error:
        raise InputError(f"{where}: {error}") from error


def config_json(backbone: BackboneConfig, dtype: str, layout: str = "text") -> dict[str, Any]:
    """The config.json of an exported backbone.

    For Gemma's multimodal layouts the same text config is wrapped as model_type "gemma3", the only one under which
    transformers looks for such keys (a Gemma3ForCausalLM finds none of them and stays random). It has the smallest
    possible vision tower, which is not in the checkpoint: AutoModelForCausalLM reports its weights as missing and
    computes text exactly; images mean nothing to such an export.

    Raises: InputError when the layout is not one of the family's.
    """
    model_type, dialect = next(item for item in DIALECTS.items() if item[1].family == backbone.family)
    if layout != "text" and backbone.family != "gemma3":
        raise InputError(f"key layout {layout!r} is Gemma 3's; of {backbone.family} there is 'text' only")
    text = {
        **{field: getattr(backbone, name) for name, (field, _) in dialect.fields.items()},
        **{name: allowed[0] for name, allowed in dialect.only.items() if name not in _REST},
        "architectures": [dialect.architecture],
        "model_type": model_type,
        **dialect.write(backbone),
        "dtype": dtype,
        "torch_dtype": dtype,
    }
    if layout == "text":
        return text
    del text["architectures"]
    vision = {
        "model_type": "siglip_vision_model", "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1,
        "num_attention_heads": 1, "image_size": 28, "patch_size": 14,
    }  # fmt: skip
    return {
        "architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3", "text_config": text,
        "vision_config": vision, "mm_tokens_per_image": 1, "tie_word_embeddings": True, "dtype": dtype,
        "torch_dtype": dtype,
    }  # fmt: skip
