"""Metadata of GGUF files beyond what every family has: published sizes, and keys that are refused."""

import dataclasses
import math

import numpy as np
import pytest

from sst_jax.errors import InputError
from sst_jax.families.registry import BY_NAME, PRESETS
from sst_jax.weights.gguf import backbone_from_metadata
from tests.support.tiny_files import metadata, rope_angles


def pairs(preset, **changes):
    """The keys of a file; `changes` are some more, or None where one is left out."""
    architecture = BY_NAME[preset.family].gguf.architecture
    found = {f"{architecture}.{name}": value for name, value in {**metadata(preset), **changes}.items()}
    arrays = {key: np.array(value) if isinstance(value, list) else value for key, value in found.items()}
    return {"general.architecture": architecture} | {key: value for key, value in arrays.items() if value is not None}


def read(preset, factors=None, tensors=(), **changes):
    keys = pairs(preset, **changes)
    return backbone_from_metadata(keys, preset.vocab_size, "a.gguf", preset.tied_head, factors, tensors=tensors)


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


def read_gemma4(preset=BY_NAME["gemma4"].tiny, **changes):
    return read(preset, rope_angles(preset), **changes)


def test_gemma_4_31b_is_the_preset():
    assert read_gemma4(PRESETS["gemma-4-31b"]) == PRESETS["gemma-4-31b"]


def test_gemma_4_of_12b_is_read_as_gemma_4():
    """The architecture does not say that pictures and sounds enter without a tower; the text part is the same."""
    unified = PRESETS["gemma-4-12b"]
    plain = dataclasses.replace(unified, family="gemma4")
    assert read_gemma4(plain) == plain


def test_gemma_4s_tensors_tell_which_angles_turn_and_where_values_are_from():
    tiny = BY_NAME["gemma4"].tiny
    own = dataclasses.replace(tiny, values_from_keys=False, global_num_kv_heads=None)
    assert read(own, rope_angles(own), ("blk.2.attn_v.weight", "blk.5.attn_v.weight")) == own
    all_turn = read(tiny, np.ones(16, np.float32))
    assert all_turn.rope_angles_global == 16
    ends, holes = rope_angles(tiny), rope_angles(tiny)[::-1]
    for wrong in (ends[:-1], holes, ends * 2, np.where(ends == 1, 1, 8).astype(np.float32)):
        with pytest.raises(
            InputError, match=r"a\.gguf: key rope_freqs\.weight is unsupported; it must hold 16 numbers"
        ):
            read(tiny, wrong)
    with pytest.raises(InputError, match=r"key rope_freqs\.weight is missing"):
        read(tiny)


def test_gemma_4s_optional_keys():
    assert read_gemma4(**{"final_logit_softcapping": None}).logit_cap is None
    assert read_gemma4(**{"rope.freq_base_swa": None}).rope_theta_local == 1_000_000.0  # as llama.cpp
    same = read_gemma4(**{"attention.head_count_kv": 2})
    assert (same.num_kv_heads, same.global_num_kv_heads) == (2, None)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"embedding_length_per_layer_input": 256}, "embedding_length_per_layer_input=256 is unsupported: .*E2B, E4B"),
        ({"attention.shared_kv_layers": 20}, "shared_kv_layers=20 is unsupported: .*keys and values of others"),
        ({"expert_count": 128}, "expert_count=128 is unsupported: mixtures of experts"),
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping is set; softcapping is unsupported"),
        ({"rope.scaling.factor": 2.0}, "scaling.factor=2.0 is unsupported"),
        ({"attention.key_length_swa": None}, "key_length_swa is missing"),
        ({"attention.value_length_swa": 8}, "value_length_swa=8 is unsupported; it must be a head's width, 16"),
        ({"attention.value_length": 8}, "key_length and value_length differ"),
        ({"rope.dimension_count": 16}, "dimension_count=16 is unsupported; it must be a head's width, 32"),
        ({"attention.sliding_window_pattern": [True] * 6}, "sliding_window_pattern=array.* must say of 6 layers"),
        ({"attention.sliding_window_pattern": [False] * 5}, "sliding_window_pattern=array.* must say of 6 layers"),
        ({"attention.sliding_window_pattern": None}, "sliding_window_pattern=None must say of 6 layers"),
        ({"attention.head_count_kv": [2, 1, 1, 2, 2, 1]}, "head_count_kv=array.* must be 6 numbers"),
        ({"attention.head_count_kv": [2, 2, 1]}, "head_count_kv=array.* must be 6 numbers"),
        ({"feed_forward_length": [128] * 60}, "feed_forward_length=array.* must be a positive int"),
    ],
)
def test_what_gemma_4s_metadata_may_not_say(changes, message):
    with pytest.raises(InputError, match=rf"a\.gguf: metadata keys? gemma4\..*{message}") as caught:
        read_gemma4(**changes)
    assert "\n" not in str(caught.value)
