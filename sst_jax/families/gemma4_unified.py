"""Gemma 4 12B (Google, 2026): the block of `gemma4`, whose pictures and sounds enter without a tower."""

from __future__ import annotations

from sst_jax.families import gemma4
from sst_jax.families.base import Family, TorchExport

PRESETS = {
    "gemma-4-12b": gemma4.preset("gemma4_unified", 48, 3840, 15_360, 16, 8, 256, kv=1),
    "tiny-gemma4-unified": gemma4.preset(
        "gemma4_unified", 2, 64, 128, 4, 2, 16, kv=1, layer_types=("local", "global"), **gemma4.SMALL
    ),
}

FAMILY = Family(
    name="gemma4_unified",
    title="Gemma 4 unified",
    block=gemma4.BLOCK,
    presets=PRESETS,
    params=gemma4.PARAMS,
    layouts=gemma4.LAYOUTS,
    ignored={"huggingface": ("model.vision_embedder.", "model.embed_vision.", "model.embed_audio.")},
    config=gemma4.config_format("gemma4_unified", "Gemma4Unified", 1024, 262_144, 0),
    tokens=gemma4.TOKENS,  # its GGUF files call themselves gemma4's, and are read as such
    licence=gemma4.LICENCE,
    torch=TorchExport("modeling_sst_gemma4_unified.py", "SSTGemma4Unified"),
)
