"""Byte-pair vocabularies of GGUF files, as the tokenizers library's JSON: byte-level, or text with byte fallback."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from sst_jax.data.vocabulary import (
    CONTROL,
    SPACE,
    UNKNOWN,
    USER_DEFINED,
    added_token,
    adds_bos,
    bos_template,
    splitting_of,
)
from sst_jax.errors import InputError
from sst_jax.families.base import Splitting
from sst_jax.families.registry import SPLITTINGS
from sst_jax.types import Json

MODELS = ("gpt2", "gemma4")  # `tokenizer.ggml.model` of such files


def _pairs(tokens: Sequence[str], types: Sequence[int], merges: Sequence[str]) -> list[list[str]]:
    """Return the merges, each of two tokens.

    Raises: InputError where they are not, or the other lists disagree.
    """
    ids, pairs = set(tokens), [merge.split(" ") for merge in merges]
    if not len(ids) == len(tokens) == len(types) > 0:
        raise InputError(f"GGUF vocabulary has {len(tokens)} tokens, {len(ids)} different ones, and {len(types)} types")
    for pair in pairs:
        if len(pair) != 2 or not {*pair, "".join(pair)} <= ids:
            raise InputError(f"GGUF vocabulary has the merge {' '.join(pair)!r}, which is not of two of its tokens")
    return pairs


def _decoder(splitting: Splitting) -> Json:
    if not splitting.byte_fallback:
        return {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
    spaces = {"type": "Replace", "pattern": {"String": SPACE}, "content": " "}
    return {"type": "Sequence", "decoders": [spaces, {"type": "ByteFallback"}, {"type": "Fuse"}]}


def to_tokenizers_json(facts: Mapping[str, Any]) -> bytes:
    """Return a `tokenizer.json` from the `tokenizer.ggml.*` facts of a GGUF whose model is one of MODELS.

    Raises: InputError when its way of splitting text is not one of SPLITTINGS, or its parts disagree.
    """
    tokens, types, merges = (facts[f"tokenizer.ggml.{key}"] for key in ("tokens", "token_type", "merges"))
    pre = splitting_of(facts)
    if pre is None or pre not in SPLITTINGS:
        known, given = ", ".join(map(repr, SPLITTINGS)), facts.get("tokenizer.ggml.pre")
        raise InputError(f"tokenizer.ggml.pre={given!r} is unsupported; known are {known}")
    pairs, splitting = _pairs(tokens, types, merges), SPLITTINGS[pre]
    bos_id = facts.get("tokenizer.ggml.bos_token_id") if adds_bos(facts) else None
    unknown = facts.get("tokenizer.ggml.unknown_token_id") if splitting.byte_fallback else None
    cuts = splitting.pre_tokenizers
    tokenizer: dict[str, Any] = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            added_token(index, token, special=kind != USER_DEFINED)
            for index, (token, kind) in enumerate(zip(tokens, types, strict=True))
            if kind in (CONTROL, USER_DEFINED) or (kind == UNKNOWN and splitting.byte_fallback)
        ],
        "normalizer": splitting.normalizer,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": cuts} if cuts else None,
        "post_processor": bos_template(None if bos_id is None else tokens[bos_id], bos_id),
        "decoder": _decoder(splitting),
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None if unknown is None else tokens[unknown],
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": splitting.byte_fallback,
            "byte_fallback": splitting.byte_fallback,
            "ignore_merges": splitting.ignore_merges,
            "vocab": {token: index for index, token in enumerate(tokens)},
            "merges": pairs,
        },
    }
    return json.dumps(tokenizer, ensure_ascii=False).encode("utf-8")
