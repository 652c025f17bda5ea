"""The name table: complete, unambiguous, and the same in both directions."""

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sst_jax.errors import InputError
from sst_jax.families.registry import BY_NAME, PRESETS
from sst_jax.model.config import BackboneConfig, ModelConfig
from sst_jax.model.decoder import abstract_params
from sst_jax.weights import key_map


class Header(NamedTuple):
    name: str
    shape: tuple
    file: Any = Path("weights.safetensors")


@st.composite
def backbones(draw, families=tuple(BY_NAME)):
    family = draw(st.sampled_from(families))
    (heads, kv_heads), half = draw(st.sampled_from([(1, 1), (4, 1), (6, 3), (8, 8)])), draw(st.integers(1, 4))
    size = st.integers(1, 40)
    return BackboneConfig(
        num_layers=draw(st.integers(1, 13)),
        d_model=draw(size),
        d_ff=draw(size),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=2 * half,
        vocab_size=draw(size),
        query_pre_attn_scalar=1.0,
        family=family,
        tied_head=BY_NAME[family].always_tied or draw(st.booleans()),
        **{"window": 4, **BY_NAME[family].block},
    )


def headers(config, kind="huggingface", layout="text"):
    spell = (lambda key: key_map.relayout(key, layout)) if kind == "huggingface" else (lambda key: key)
    return [Header(spell(key), entry.shape) for key, entry in key_map.expected(config, kind).items()]


@given(backbones(["gemma3"]), st.sampled_from(list(key_map.LAYOUTS)))
def test_keys_are_read_back_from_every_layout(config, layout):
    keys = list(key_map.expected(config))
    spelled = [key_map.relayout(key, layout) for key in keys]
    assert len(set(spelled)) == len(spelled) == 2 + 13 * config.num_layers
    assert [key_map.normalise(key) for key in spelled] == [(key, layout) for key in keys]
    assert key_map.detect_layout(spelled) == layout


@pytest.mark.slow
@given(backbones(), st.sampled_from(["huggingface", "gguf"]), st.randoms())
@settings(deadline=None)
def test_every_place_in_the_tree_is_filled_once_in_any_order(config, kind, random):
    shuffled = headers(config, kind)
    random.shuffle(shuffled)
    bound = key_map.bind(shuffled, config, kind, "here")
    places = sorted((entry.row.path, entry.layer or 0) for _, entry in bound.tensors)
    shapes = jax.tree_util.tree_leaves_with_path(abstract_params(ModelConfig(config))["base"])
    slots = ["/".join(part.key for part in path) for path, _ in shapes]
    assert places == sorted(
        (slot, layer) for slot in slots for layer in range(config.num_layers if slot.startswith("layers/") else 1)
    )
    assert bound.head is None


@given(backbones(), st.data())
def test_shapes_on_disk_transform_to_shapes_in_the_tree(config, data):
    entry = data.draw(st.sampled_from(list(key_map.expected(config).values())))
    value = np.arange(np.prod(entry.shape), dtype=np.float32).reshape(entry.shape)
    transform = key_map.transform(entry.row, config, "huggingface")
    stacked = () if entry.layer is None else (config.num_layers,)
    assert (*stacked, *transform(value).shape) == key_map.param_shape(entry.row, config)
    np.testing.assert_array_equal(transform(transform(value)), value)  # writing is reading backwards


def test_linear_shapes_agree_with_the_config():
    for preset in PRESETS.values():
        for row in key_map.table(preset):
            linear = row.path.removeprefix("layers/").removesuffix("/kernel")
            if linear in preset.linear_shapes:
                layers = len(preset.stack_layers(linear))
                assert key_map.param_shape(row, preset) == (layers, *preset.linear_shapes[linear])
        total = sum(int(np.prod(key_map.param_shape(row, preset))) for row in key_map.table(preset))
        assert total == preset.num_params


def test_gguf_norms_lose_the_one_that_gguf_adds():
    weight = np.array([-0.5, 0.0, 0.25, 3.0], np.float32)
    for row in BY_NAME["gemma3"].params:
        assert (row.transform == "norm") == row.path.endswith("scale")
        if row.transform == "norm":
            np.testing.assert_array_equal(key_map.transform(row, TINY, "gguf")(weight + 1), weight)


def test_the_three_layouts_by_example():
    normal = "model.layers.3.self_attn.q_proj.weight"
    assert key_map.normalise(normal) == (normal, "text")
    assert key_map.normalise("language_model." + normal) == (normal, "multimodal")
    assert key_map.normalise("model.language_model.layers.3.self_attn.q_proj.weight") == (normal, "multimodal_v5")
    for vision in (
        "vision_tower.vision_model.embeddings.patch_embedding.weight",
        "model.vision_tower.vision_model.post_layernorm.bias",
        "multi_modal_projector.mm_soft_emb_norm.weight",
        "model.multi_modal_projector.mm_input_projection_weight",
    ):
        assert key_map.normalise(vision) == (None, None)
    with pytest.raises(InputError, match="sideways"):
        key_map.relayout(normal, "sideways")


TINY = PRESETS["tiny"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda hs: [*hs, Header("model.layers.0.self_attn.q_proj.bias", (64,))],
            r"unknown key .*q_proj\.bias; Gemma 3 has no",
        ),
        (lambda hs: [*hs, Header("model.layers.7.mlp.up_proj.weight", (128, 64))], r"unknown key model\.layers\.7"),
        (lambda hs: [*hs, Header("model.layers.00.mlp.up_proj.weight", (128, 64))], r"unknown key model\.layers\.00"),
        (
            lambda hs: [*hs, Header("encoder.weight", (1,), "other.safetensors")],
            r"other\.safetensors: unknown key encod",
        ),
        (lambda hs: hs[1:], r"here: key model\.embed_tokens\.weight is missing"),
        (lambda hs: hs[:-3], r"model\.layers\.6\.mlp\.up_proj\.weight and 2 more is missing"),
        (lambda hs: [], r"model\.embed_tokens\.weight and 92 more is missing"),
        (lambda hs: [*hs, hs[5]], r"is a duplicate of model\.layers\.0\.self_attn\.v_proj\.weight in weights"),
        (lambda hs: [*hs, Header("language_model." + hs[5].name, hs[5].shape)], "language_model.*is a duplicate of"),
        (lambda hs: [*hs[:-1], Header("language_model." + hs[-1].name, hs[-1].shape)], "has the layout multimodal"),
        (lambda hs: [Header(hs[0].name, (263, 64)), *hs[1:]], r"shape \[263, 64\], expected \[262, 64\]"),
        (lambda hs: [Header(hs[0].name, (262 * 64,)), *hs[1:]], r"shape \[16768\], expected \[262, 64\]"),
        (lambda hs: [*hs, Header("lm_head.weight", (64, 262))], r"lm_head\.weight has shape \[64, 262\]"),
        (
            lambda hs: [*hs, Header("lm_head.weight", (262, 64)), Header("language_model.lm_head.weight", (262, 64))],
            r"language_model\.lm_head\.weight is a duplicate",
        ),
    ],
)
def test_bad_keys_are_named(change, message):
    with pytest.raises(InputError, match=message):
        key_map.bind(change(headers(TINY)), TINY, "huggingface", "here")


def test_a_missing_key_is_named_in_the_layout_of_the_checkpoint():
    with pytest.raises(InputError, match=r"key language_model\.model\.embed_tokens\.weight is missing"):
        key_map.bind(headers(TINY, layout="multimodal")[1:], TINY, "huggingface", "here")


def test_a_transposed_kernel_is_refused_where_shapes_can_tell():
    square = dataclasses.replace(TINY, d_ff=TINY.d_model)
    flipped = [Header(h.name, h.shape[::-1]) for h in headers(square)]
    with pytest.raises(InputError, match="expected"):
        key_map.bind(flipped, square, "huggingface", "here")


@given(st.text(max_size=60), st.lists(st.integers(0, 2**63), max_size=4))
def test_a_stray_key_is_either_vision_or_refused(key, shape):
    stray = Header(key, tuple(shape))
    if key.startswith(key_map.IGNORED["huggingface"]):
        key_map.bind([*headers(TINY), stray], TINY, "huggingface", "here")
    else:
        with pytest.raises(InputError):
            key_map.bind([*headers(TINY), stray], TINY, "huggingface", "here")
