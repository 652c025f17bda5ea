"""Metadata of GGUF files beyond what every family has: published sizes, and keys that are refused."""

import math

import pytest

from sst_jax.errors import InputError
from sst_jax.families.registry import BY_NAME, PRESETS
from sst_jax.weights.gguf import backbone_from_metadata
from tests.support.tiny_files import metadata


def pairs(preset, **changes):
    """The keys of a file; `changes` are some more, or None where one is left out."""
    architecture = BY_NAME[preset.family].gguf.architecture
    found = {f"{architecture}.{name}": value for name, value in {**metadata(preset), **changes}.items()}
    return {"general.architecture": architecture} | {key: value for key, value in found.items() if value is not None}


def read(preset, **changes):
    return backbone_from_metadata(pairs(preset, **changes), preset.vocab_size, "a.gguf", preset.tied_head)


@pytest.mark.parametrize("name", ["ministral-3-3b", "ministral-3-8b", "ministral-3-14b"])
def test_ministral_3_of_published_sizes_is_the_preset(name):
    assert read(PRESETS[name]) == PRESETS[name]


def test_ministral_3_scales_queries_by_yarns_original_positions():
    tiny, log16 = BY_NAME["ministral3"].tiny, math.log(16)
    assert read(tiny, **{"attention.temperature_length": 16}).query_scaling == (0.1, 16)
    assert read(tiny, **{"attention.temperature_scale": 0.0}).query_scaling is None
    assert read(tiny, **{"attention.temperature_scale": None}).query_scaling is None
    # As llama.cpp computes YaRN's attention factor: mscale is 1, mscale_all_dim what the file says.
    assert read(tiny, **{"rope.scaling.yarn_log_multiplier": None}).rope_magnitude == pytest.approx(1 + 0.1 * log16)
    assert read(tiny, **{"rope.scaling.yarn_log_multiplier": 0.5}).rope_magnitude == pytest.approx(
        (1 + 0.1 * log16) / (1 + 0.05 * log16)
    )
    with pytest.raises(InputError, match=r"mistral3\.attention\.temperature_length=32 is unsupported"):
        read(tiny, **{"attention.temperature_length": 32})
    with pytest.raises(InputError, match=r"mistral3\.attention\.temperature_scale=-1\.0 must be a positive float"):
        read(tiny, **{"attention.temperature_scale": -1.0})
    with pytest.raises(InputError, match=r"llama\.rope\.scaling\.yarn_log_multiplier=1\.0 is unknown"):
        read(BY_NAME["llama"].tiny, **{"rope.scaling.yarn_log_multiplier": 1.0})
