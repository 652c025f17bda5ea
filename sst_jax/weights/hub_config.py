"""config.json of the hub's models to BackboneConfig and back, by the families' own readers and writers."""

from __future__ import annotations

from collections.abc import Mapping

from sst_jax.errors import InputError
from sst_jax.families.base import ConfigFormat, JsonObject
from sst_jax.families.common import positive_number
from sst_jax.families.registry import BY_MODEL_TYPE, BY_WRAPPER, family_of
from sst_jax.model.config import MAX_LAYERS, BackboneConfig
from sst_jax.types import Json
from sst_jax.weights import prequantised

_EXPERTS = "mixtures of experts are not computed"
# What the blocks here lack for model types that people are likely to try.
_LACKING = {
    "gemma2": "its attention and its logits are soft-capped",
    "gemma3n": "its layers read embeddings of their own",
    "gemma3n_text": "its layers read embeddings of their own",
    **dict.fromkeys(
        (
            "mixtral", "qwen2_moe", "qwen3_moe", "phimoe", "granitemoe", "granitemoehybrid", "olmoe", "deepseek_v2",
            "deepseek_v3", "gpt_oss", "llama4", "llama4_text", "glm4_moe", "mistral4",
        ),
        _EXPERTS,
    ),
    **dict.fromkeys(("qwen3_next", "qwen3_5", "qwen3_5_text", "mamba", "mamba2", "falcon_h1", "zamba2", "bamba"),
                    "its layers have linear recurrences in the place of attention"),
}  # fmt: skip
# Why other storages are not read.
_STORAGES = {
    "gptq": "; gptq's are integers with zero points, in an order of their own",
    "awq": "; awq's are integers with zero points, packed in an order of their own",
    "bitsandbytes": ", not its fp4, its 8 bits, or storage in other types than bytes",
}


def backbone_from_config(config: JsonObject, where: str = "config.json") -> BackboneConfig:
    """Read a config.json of transformers 4 or 5, of a known family's model_type or of a larger model around one.

    Absent fields take transformers' defaults, as they do there.

    Raises: InputError naming the field that is unsupported, misshapen or out of range.
    """
    model_type, text, levels = config.get("model_type"), config, [(where, config)]
    if model_type in list(BY_WRAPPER):
        family = BY_WRAPPER[model_type]
        assert family.config.wrapper is not None  # BY_WRAPPER holds the families with one
        part = family.config.wrapper.part
        inner, where = config.get(part), f"{where}: {part}"
        if not isinstance(inner, Mapping):
            raise InputError(f"{where} is missing or not an object")
        text = inner
        model_type = text.get("model_type", family.config.model_type)
        levels.append((where, text))
    if model_type not in list(BY_MODEL_TYPE):
        known = ", ".join(map(repr, (*BY_MODEL_TYPE, *BY_WRAPPER)))
        why = f"; {_LACKING[model_type]}" if isinstance(model_type, str) and model_type in _LACKING else ""
        raise InputError(f"{where}: model_type={model_type!r} is unsupported; known are {known}{why}")
    family = BY_MODEL_TYPE[model_type]
    for place, level in levels:
        for name, allowed in family.config.allowed.items():
            if name == "quantization_config" and prequantised.kind_of(level.get(name)) is not None and level is config:
                continue
            if name in level and level[name] not in allowed:
                raise _unsupported(place, name, level[name], allowed[0])
    fields = _number_fields(family.config, text, where)
    if fields["num_layers"] > MAX_LAYERS:
        raise InputError(f"{where}: num_hidden_layers={fields['num_layers']} is beyond {MAX_LAYERS}")
    fields |= family.config.read(text, fields, where)
    try:
        return BackboneConfig(family=family.name, **{**family.block, **fields})
    except InputError as error:
        raise InputError(f"{where}: {error}") from error


def _unsupported(place: str, name: str, value: object, allowed: object) -> InputError:
    """Return the error of a field that has another value than is known."""
    if name == "quantization_config":
        method = value.get("quant_method") if isinstance(value, Mapping) else None
        shown = "{...}" if method is None else repr(str(method)[:40])
        return InputError(
            f"{place}: quantization_config={shown} is unsupported: give the unquantised original, and quantise that "
            "(convert --quantize nf4, or model.quantize); read are nf4 of bitsandbytes, and 8-bit floats"
            f"{_STORAGES.get(str(method), '')}"
        )
    shown = repr(value) if len(repr(value)) <= 100 else f"{repr(value)[:100]}..."
    return InputError(f"{place}: {name}={shown} is unsupported; it must be {allowed!r}")


def _number_fields(format: ConfigFormat, config: JsonObject, where: str) -> Json:
    """Return the fields of BackboneConfig that config.json states one by one, as numbers."""
    fields: Json = {}
    for name, (field, default) in format.fields.items():
        if default is None and config.get(field) is None:
            derived = {"num_kv_heads": fields["num_heads"], "head_dim": fields["d_model"] // fields["num_heads"]}
            fields[name] = derived[name]
        else:
            fields[name] = positive_number(config, field, 1 if default is None else default, where)
    return fields


def config_json(backbone: BackboneConfig, dtype: str, layout: str = "text") -> Json:
    """Return the config.json of an exported backbone, wrapped as its family says in layouts other than "text".

    Raises: InputError when the layout is not one of the family's.
    """
    family = family_of(backbone)
    if layout != "text" and layout not in family.layouts:
        known = ", ".join(map(repr, ("text", *family.layouts)))
        raise InputError(f"key layout {layout!r} is not one of {family.title}'s, {known}")
    format = family.config
    text = {
        **{field: getattr(backbone, name) for name, (field, _) in format.fields.items()},
        **{name: allowed[0] for name, allowed in format.allowed.items() if name not in format.unwritten},
        "architectures": [format.architecture],
        "model_type": format.model_type,
        **format.write(backbone),
        "dtype": dtype,
        "torch_dtype": dtype,
    }
    if layout == "text":
        return text
    if format.wrapper is None:
        raise InputError(f"{backbone.family} has no {layout} layout")
    del text["architectures"]
    return format.wrapper.write(text, dtype)
