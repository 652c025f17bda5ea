"""The families that are known, and the look-ups over them. A new family is one more entry of FAMILIES."""

from __future__ import annotations

from collections.abc import Mapping

from sst_jax.errors import InputError
from sst_jax.families import (
    gemma3,
    gemma4,
    gemma4_unified,
    granite,
    llama,
    ministral3,
    mistral,
    olmo2,
    olmo3,
    phi3,
    qwen2,
    qwen3,
    seed_oss,
    smollm3,
)
from sst_jax.families.base import Family, Splitting
from sst_jax.model.backbone import BackboneConfig

FAMILIES: tuple[Family, ...] = (
    gemma3.FAMILY,
    llama.FAMILY,
    qwen3.FAMILY,
    qwen2.FAMILY,
    ministral3.FAMILY,
    mistral.FAMILY,
    smollm3.FAMILY,
    granite.FAMILY,
    olmo2.FAMILY,
    olmo3.FAMILY,
    seed_oss.FAMILY,
    phi3.FAMILY,
    gemma4.FAMILY,
    gemma4_unified.FAMILY,
)

BY_NAME: Mapping[str, Family] = {family.name: family for family in FAMILIES}
BY_MODEL_TYPE: Mapping[str, Family] = {family.config.model_type: family for family in FAMILIES}
# Of families that share a wrapper the last is meant where its text part names no model type.
BY_WRAPPER: Mapping[str, Family] = {
    family.config.wrapper.model_type: family for family in FAMILIES if family.config.wrapper is not None
}
BY_GGUF: Mapping[str, Family] = {family.gguf.architecture: family for family in FAMILIES if family.gguf is not None}

PRESETS: Mapping[str, BackboneConfig] = {name: preset for family in FAMILIES for name, preset in family.presets.items()}
# What hub ids of the presets hold, in small letters.
HUB_NAMES: Mapping[str, BackboneConfig] = {
    family.hub_prefix + name: preset
    for family in FAMILIES
    for name, preset in family.presets.items()
    if not name.startswith("tiny")
}

# Tokens that end a chat turn, and those that end a text, in the order of the families.
TURN_ENDS = tuple(dict.fromkeys(token for family in FAMILIES for token in family.tokens.turn_ends))
TEXT_ENDS = tuple(dict.fromkeys(token for family in FAMILIES for token in family.tokens.text_ends))
SPLITTINGS: Mapping[str, Splitting] = {
    name: splitting for family in FAMILIES for name, splitting in family.tokens.splittings.items()
}

# Spellings of Hugging Face keys: layout -> what every key of a decoder begins with; "text" is all families'.
LAYOUTS: Mapping[str, str] = {
    "text": "model.",
    **{layout: prefix for family in FAMILIES for layout, prefix in family.layouts.items()},
}
# Beginnings of the keys that are no part of a decoder, by kind of checkpoint.
IGNORED: Mapping[str, tuple[str, ...]] = {
    kind: tuple(prefix for family in FAMILIES for prefix in family.ignored.get(kind, ()))
    for kind in ("huggingface", "gguf")
}
# Python packages that hold a GGUF file: module -> its name there, None where the module assembles it.
PACKAGES: Mapping[str, str | None] = {
    module: file for family in FAMILIES if family.gguf is not None for module, file in family.gguf.packages.items()
}


def family_of(backbone: BackboneConfig) -> Family:
    """Return the family of a backbone.

    Raises: InputError where it is unknown.
    """
    if backbone.family not in BY_NAME:
        raise InputError(f"backbone.family={backbone.family!r} is not one of {', '.join(map(repr, BY_NAME))}")
    return BY_NAME[backbone.family]


def backbone(family: str, **fields: object) -> BackboneConfig:
    """Return a member of a family: what its block computes, and other fields of BackboneConfig."""
    return BackboneConfig(**{**BY_NAME[family].block, **fields, "family": family})
