"""Mistral (arXiv 2310.06825): Llama's layout; its first sizes attend within a sliding window in every layer."""

from __future__ import annotations

from sst_jax.families.base import ConfigFormat, Family, Fields, JsonObject, TokenFacts, TorchExport, Wrapper
from sst_jax.families.common import (
    LLAMA_ALLOWED,
    LLAMA_BLOCK,
    LLAMA_PARAMS,
    LLAMA_UNWRITTEN,
    TINY,
    global_decoder,
    positive_number,
    read_llama_config,
    shape_fields,
    split_by,
    split_case,
    window_fields,
    write_llama_config,
)
from sst_jax.model.backbone import BackboneConfig
from sst_jax.types import FieldValue, Json


def _preset(*shape: int, **fields: FieldValue) -> BackboneConfig:
    """Return a size: num_layers, d_model, d_ff, num_heads, num_kv_heads, head_dim."""
    return global_decoder("mistral", LLAMA_BLOCK, shape, **{"norm_eps": 1e-5, "tied_head": False, **fields})


def _all_local(window: int, layers: int, theta: float) -> Fields:
    return {"window": window, "layer_types": ("local",) * layers, "rope_theta_local": theta, "rope_theta_global": theta}


PRESETS = {
    "mistral-7b-v0.1": _preset(
        32, 4096, 14_336, 32, 8, 128, vocab_size=32_000, max_positions=32_768, **_all_local(4096, 32, 10_000.0)
    ),
    "mistral-7b-v0.3": _preset(
        32, 4096, 14_336, 32, 8, 128, vocab_size=32_768, max_positions=32_768, rope_theta_global=1_000_000.0
    ),
    "ministral-8b": _preset(
        36, 4096, 12_288, 32, 8, 128, vocab_size=131_072, max_positions=32_768, rope_theta_global=100_000_000.0
    ),
    "mistral-nemo": _preset(
        40, 5120, 14_336, 32, 8, 128, vocab_size=131_072, max_positions=131_072, rope_theta_global=1_000_000.0
    ),
    "mistral-small-24b": _preset(
        40, 5120, 32_768, 32, 8, 128, vocab_size=131_072, max_positions=32_768, rope_theta_global=100_000_000.0
    ),
    "tiny-mistral": _preset(2, 64, 128, 4, 2, 16, **_all_local(16, 2, 10_000.0), **TINY),
}


def _read_config(config: JsonObject, fields: Fields, where: str) -> Fields:
    window, layers = config.get("sliding_window", 4096), fields["num_layers"]
    found = read_llama_config(config, fields, where)
    if window is None:
        return found
    window = positive_number({"sliding_window": window}, "sliding_window", 4096, where)
    return {**found, **window_fields(["local"] * layers, window, {**fields, **found}, where)}


def _write_config(backbone: BackboneConfig) -> Json:
    return {**write_llama_config(backbone), "sliding_window": backbone.window}


LAYOUTS = {
    "multimodal": "language_model.model.",  # Mistral3ForConditionalGeneration, as on the hub
    "multimodal_v5": "model.language_model.",  # the same, as transformers 5 names it in memory
}


def _wrap(text: Json, dtype: str) -> Json:
    """Return the multimodal config.json around a text config, with the smallest vision tower, of which no weight is in
    the checkpoint: text is computed exactly, and images mean nothing to such an export.
    """
    vision = {
        "model_type": "pixtral", "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1,
        "num_attention_heads": 1, "head_dim": 8, "image_size": 28, "patch_size": 14,
    }  # fmt: skip
    return {
        "architectures": ["Mistral3ForConditionalGeneration"],
        "model_type": "mistral3",
        "text_config": text,
        "vision_config": vision,
        "tie_word_embeddings": text["tie_word_embeddings"],
        "dtype": dtype,
        "torch_dtype": dtype,
    }


WRAPPER = Wrapper("mistral3", "text_config", _wrap)

FAMILY = Family(
    name="mistral",
    title="Mistral",
    block=LLAMA_BLOCK,
    presets=PRESETS,
    params=LLAMA_PARAMS,
    layouts=LAYOUTS,
    config=ConfigFormat(
        model_type="mistral",
        architecture="MistralForCausalLM",
        fields=shape_fields(32, 4096, 14_336, 32, 8, None, 32_000, 1e-6, 131_072),
        allowed=LLAMA_ALLOWED,
        unwritten=LLAMA_UNWRITTEN,
        read=_read_config,
        write=_write_config,
        wrapper=WRAPPER,
    ),
    # Its GGUF files call themselves llama's, and are read as such.
    tokens=TokenFacts(
        turn_ends=(),
        splittings={"tekken": split_by(split_case(r"\p{N}"), ignore_merges=True)._replace(add_bos=True)},
    ),
    torch=TorchExport("modeling_sst_mistral.py", "SSTMistral"),
)
