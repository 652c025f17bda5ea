"""OLMo 3 (Ai2, 2025): OLMo 2's block, three sliding layers to one global one, of which only this one is scaled."""

from __future__ import annotations

from collections.abc import Mapping

from sst_jax.errors import InputError
from sst_jax.families import olmo2
from sst_jax.families.base import ConfigFormat, Family, Fields, GGUFFormat, JsonObject, TokenFacts, TorchExport
from sst_jax.families.common import (
    KINDS,
    LLAMA_ALLOWED,
    LLAMA_UNWRITTEN,
    TINY,
    positive_number,
    read_tied,
    rope_scaling_fields,
    shape_fields,
    write_llama_config,
)
from sst_jax.model.backbone import BackboneConfig
from sst_jax.types import FieldValue, Json

_THETA = 500_000.0
_SLIDING, _FULL = KINDS


def _kinds(layers: int) -> tuple[str, ...]:
    """Return what each layer is where a config does not say."""
    return tuple("local" if (layer + 1) % 4 else "global" for layer in range(layers))


def _preset(*shape: int, window: int, **fields: FieldValue) -> BackboneConfig:
    """Return a size: num_layers, d_model, d_ff, num_heads, num_kv_heads, head_dim."""
    local: Fields = {"window": window, "layer_types": _kinds(shape[0]), "rope_theta_local": _THETA}
    return olmo2.preset("olmo3", *shape, **{**local, **fields})


_OLMO3: Fields = {
    "vocab_size": 100_278,
    "max_positions": 65_536,
    "rope_scale_global": 8.0,
    "rope_yarn": (32.0, 1.0, 8192),
    "rope_magnitude": 1.2079441541679836,
}
PRESETS = {
    "olmo-3-1025-7b": _preset(32, 4096, 11_008, 32, 32, 128, window=4096, **_OLMO3),
    "olmo-3-1125-32b": _preset(64, 5120, 27_648, 40, 8, 128, window=4096, **_OLMO3),
    "tiny-olmo3": _preset(4, 64, 128, 4, 2, 16, window=16, **{**_OLMO3, "rope_yarn": (32.0, 1.0, 64), **TINY}),
}


def _read_config(config: JsonObject, fields: Fields, where: str) -> Fields:
    layers, named = fields["num_layers"], config.get("layer_types")
    if named is not None and (not isinstance(named, list) or not all(kind in list(KINDS) for kind in named)):
        raise InputError(f"{where}: layer_types must be a list of {' and '.join(KINDS)}")
    given = config.get("rope_parameters") or {}
    if not isinstance(given, Mapping) or set(given) - set(KINDS):
        raise InputError(f"{where}: rope_parameters={given!r} must have one entry per layer type ({', '.join(KINDS)})")
    scaling, ropes = config.get("rope_scaling") or {}, {}
    for kind in KINDS:
        rope = given.get(kind) or {}
        if not isinstance(rope, Mapping) or not isinstance(scaling, Mapping):
            raise InputError(f"{where}: rope_scaling and rope_parameters.{kind} must be objects")
        # Scaling in the older style is the global layers' alone, and theta beside it too, as in transformers.
        ropes[kind] = {**rope, **(scaling if kind == _FULL else {})}
        beside = config.get("rope_theta", _THETA) if kind == _FULL else _THETA
        ropes[kind].setdefault("rope_theta", beside)
    here = {kind: f"{where}: rope of {kind}" for kind in KINDS}
    found = {
        kind: rope_scaling_fields(config, ropes[kind], fields["max_positions"], where, here[kind]) for kind in KINDS
    }
    if found[_SLIDING]:
        raise InputError(f"{here[_SLIDING]}={ropes[_SLIDING]!r} is unsupported: sliding layers are not scaled")
    theta = {kind: positive_number(ropes[kind], "rope_theta", _THETA, here[kind]) for kind in KINDS}
    return {
        "tied_head": read_tied(config, where),
        "query_pre_attn_scalar": float(fields["head_dim"]),
        "layer_types": _kinds(layers) if named is None else tuple(KINDS[kind] for kind in named),
        "rope_theta_local": theta[_SLIDING],
        "rope_theta_global": theta[_FULL],
        **found[_FULL],
    }


def _write_config(backbone: BackboneConfig) -> Json:
    names = {ours: theirs for theirs, ours in KINDS.items()}
    written: Json = {**write_llama_config(backbone), "layer_types": [names[kind] for kind in backbone.layer_types]}
    if backbone.rope_theta_local != _THETA:  # for which the older style has no place
        scaling = written.pop("rope_scaling") or {"rope_type": "default"}
        written["rope_parameters"] = {
            _SLIDING: {"rope_type": "default", "rope_theta": backbone.rope_theta_local},
            _FULL: {**scaling, "rope_theta": written.pop("rope_theta")},
        }
    return written


FAMILY = Family(
    name="olmo3",
    title="OLMo 3",
    block=olmo2.BLOCK,
    presets=PRESETS,
    params=olmo2.PARAMS,
    config=ConfigFormat(
        model_type="olmo3",
        architecture="Olmo3ForCausalLM",
        fields={
            **shape_fields(32, 4096, 11_008, 32, None, None, 50_304, 1e-5, 2048),
            "window": ("sliding_window", 4096),
        },
        allowed=LLAMA_ALLOWED,
        unwritten=LLAMA_UNWRITTEN,
        read=_read_config,
        write=_write_config,
    ),
    gguf=GGUFFormat("olmo2", olmo2.read_metadata),
    tokens=TokenFacts(turn_ends=("<|im_end|>",)),
    torch=TorchExport("modeling_sst_olmo3.py", "SSTOlmo3"),
)
