"""Configs: JSON round trips, and bad values named by their field."""

import dataclasses
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sst_jax.errors import InputError
from sst_jax.families.registry import PRESETS
from sst_jax.model.config import LINEARS, AdapterConfig, BackboneConfig, ModelConfig, StreamConfig, canonical_text

residuals = st.builds(
    StreamConfig,
    state=st.sampled_from(["ffn", "block"]),
    norm=st.sampled_from(["none", "rms", "match"]),
    alpha=st.none() | st.floats(0, 1),
    alpha_range=st.tuples(st.floats(0, 0.02), st.floats(0.03, 1)),
    granularity=st.sampled_from(["dimension", "layer", "scalar"]),
    gain=st.floats(-10, 10),
    learn_gain=st.booleans(),
    decay=st.floats(0, 0.99),
    initial=st.sampled_from(["none", "zero", "own", "skip_bos"]),
    layers=st.none() | st.lists(st.integers(0, 17), unique=True).map(tuple),
    ramp=st.sampled_from([0.0, 10.0]),
    timing=st.sampled_from(["both", "next", "same"]),
)
adapters = st.builds(
    AdapterConfig, rank=st.integers(0, 64), targets=st.lists(st.sampled_from(LINEARS), unique=True).map(tuple)
)


@given(st.sampled_from(list(PRESETS)), st.none() | residuals, adapters)
def test_a_config_survives_json(name, stream, adapter):
    stream = stream if stream is None or name == "270m" else dataclasses.replace(stream, layers=None)
    config = ModelConfig(PRESETS[name], stream, adapter)
    assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.wrong_types
@pytest.mark.parametrize(
    ("fields", "culprit"),
    [
        ({"state": "mlp"}, "stream.state"),
        ({"norm": "layer"}, "stream.norm"),
        ({"granularity": "head"}, "stream.granularity"),
        ({"initial": "one"}, "stream.initial"),
        ({"propagate": "loop"}, "stream.propagate"),
        ({"dtype": "float16"}, "stream.dtype"),
        ({"iterate_prompt": "some"}, "stream.iterate_prompt"),
        ({"kv": "last"}, "stream.kv"),
        ({"prefill": "magic"}, "stream.prefill"),
        ({"alpha": -0.1}, "stream.alpha"),
        ({"alpha": float("nan")}, "stream.alpha"),
        ({"alpha": "high"}, "stream.alpha"),
        ({"alpha_range": ("low", "high")}, "stream.alpha_range"),
        ({"layers": 3}, "stream.layers"),
        ({"layers": ("first",)}, "stream.layers"),
        ({"decay": None}, "stream.decay"),
        ({"alpha_range": (0.5, 0.1)}, "stream.alpha_range"),
        ({"alpha_range": (0.1,)}, "stream.alpha_range"),
        ({"alpha_init": 0.2}, "stream.alpha_init"),
        ({"decay": 1.0}, "stream.decay"),
        ({"gain": float("inf")}, "stream.gain"),
        ({"alpha_warmup": -1}, "stream.alpha_warmup"),
        ({"sweep_tolerance": 0.0}, "stream.sweep_tolerance"),
        ({"sweep_cap": 1}, "stream.sweep_cap"),
        ({"ramp": -1}, "stream.ramp"),
        ({"gate": "relu"}, "stream.gate"),
        ({"timing": "never"}, "stream.timing"),
        ({"site": "input"}, "stream.site"),
        ({"readout": "all"}, "stream.readout"),
        ({"links": ()}, "stream.links is empty"),
        ({"links": (11, 4)}, "stream.links"),
        ({"links": ((11, "4"),)}, "stream.links"),
        ({"links": ((5, 1), (6, 1))}, "two links into layer 1"),
        ({"links": ((5, 1),), "layers": (1,)}, "links name the layers"),
        ({"links": ((5, 1),), "decay": 0.5}, "stream.decay"),
    ],
)
def test_bad_stream_fields_are_named(fields, culprit):
    with pytest.raises(InputError, match=culprit):
        StreamConfig(**fields)


@pytest.mark.wrong_types
@pytest.mark.parametrize(
    ("fields", "culprit"),
    [
        ({"num_layers": 0}, "backbone.num_layers"),
        ({"d_model": 2.5}, "backbone.d_model"),
        ({"num_kv_heads": 3}, "backbone.num_heads"),
        ({"head_dim": 7}, "backbone.head_dim"),
        ({"layer_types": ("local",)}, "backbone.layer_types"),
        ({"layer_types": ("cross",) * 7}, "backbone.layer_types"),
        ({"family": None}, "backbone.family"),
        ({"query_pre_attn_scalar": 0.0}, "backbone.query_pre_attn_scalar"),
        ({"rope_theta_global": "1e6"}, "backbone.rope_theta_global"),
        ({"rope_scale_global": -8.0}, "backbone.rope_scale_global"),
        ({"rope_llama3": (4.0, 1.0, 8192)}, "backbone.rope_llama3"),
        ({"rope_llama3": (1.0, 4.0)}, "backbone.rope_llama3"),
        ({"window": None}, "backbone.window"),
        ({"window": 0}, "backbone.window"),
        ({"activation": "relu"}, "backbone.activation"),
        ({"norm_offset": float("nan")}, "backbone.norm_offset"),
        ({"tied_head": None}, "backbone.tied_head"),
    ],
)
def test_bad_backbone_fields_are_named(fields, culprit):
    with pytest.raises(InputError, match=culprit):
        dataclasses.replace(PRESETS["tiny"], **fields)


@pytest.mark.wrong_types
@pytest.mark.parametrize(
    ("fields", "culprit"),
    [
        ({"rank": -1}, "adapter.rank"),
        ({"rank": 1.5}, "adapter.rank"),
        ({"alpha": float("inf")}, "adapter.alpha"),
        ({"targets": ("q", "head")}, "adapter.targets"),
        ({"dropout": 1.0}, "adapter.dropout"),
    ],
)
def test_bad_adapter_fields_are_named(fields, culprit):
    with pytest.raises(InputError, match=culprit):
        AdapterConfig(**fields)


@pytest.mark.wrong_types
def test_unknown_and_missing_fields_are_named():
    good = ModelConfig(PRESETS["tiny"], StreamConfig()).to_dict()
    with pytest.raises(InputError, match="sate"):
        ModelConfig.from_dict({**good, "stream": {"sate": "ffn"}})
    with pytest.raises(InputError, match="extra"):
        ModelConfig.from_dict({**good, "extra": 1})
    with pytest.raises(InputError, match="backbone"):
        ModelConfig.from_dict({"stream": None})
    with pytest.raises(InputError, match="d_model, head_dim"):
        ModelConfig.from_dict({"backbone": {"num_layers": 3}})
    with pytest.raises(InputError, match="StreamConfig"):
        ModelConfig.from_dict({**good, "stream": "on"})
    with pytest.raises(InputError, match="layer 7"):
        ModelConfig(PRESETS["tiny"], StreamConfig(layers=(7,)))


def test_configs_from_before_there_were_families_are_gemmas():
    now = ModelConfig(PRESETS["270m"]).to_dict()
    facts = (
        "rope_llama3",
        "norm_offset",
        "post_norms",
        "qk_norm",
        "activation",
        "scale_embedding",
        "tied_head",
    )
    then = {**now, "backbone": {name: value for name, value in now["backbone"].items() if name not in facts}}
    assert ModelConfig.from_dict(then).backbone == PRESETS["270m"]


def test_without_a_window_all_layers_are_global():
    assert set(PRESETS["smollm2-135m"].layer_types) == {"global"}


def test_layers_are_five_local_to_one_global():
    kinds = BackboneConfig(**{**dataclasses.asdict(PRESETS["27b"]), "layer_types": ()}).layer_types
    assert kinds.count("global") == 10
    assert [index for index, kind in enumerate(kinds) if kind == "global"] == list(range(5, 62, 6))


def test_what_opening_a_model_adds_is_not_recorded():
    """Files, digests of the repr and recorded configs know nothing of it; a compiled program does."""
    recorded = ModelConfig(PRESETS["tiny"], StreamConfig())
    opened = dataclasses.replace(recorded, bos_id=2, dtype="bfloat16")
    assert opened.to_dict() == recorded.to_dict()
    assert repr(opened) == repr(recorded)
    assert ModelConfig.from_dict(opened.to_dict()) == recorded
    assert opened != recorded
    assert len({recorded, opened, dataclasses.replace(recorded, bos_id=2, dtype="bfloat16")}) == 2
    with pytest.raises(InputError, match="bos_id"):
        ModelConfig.from_dict({**recorded.to_dict(), "bos_id": 2})


def test_a_field_that_came_later_is_written_down_only_where_it_says_something():
    """So that configs and digests which version 0.1.0 recorded stay those of the same models."""
    without = ModelConfig(PRESETS["tiny-llama"])
    assert "qkv_bias" not in without.to_dict()["backbone"]
    later = {field.name: field.default for field in dataclasses.fields(BackboneConfig) if "since" in field.metadata}
    assert "qkv_bias" in later
    shown = "".join(f", {name}={default!r}" for name, default in later.items())
    assert shown in repr(without)
    assert canonical_text(without) == repr(without).replace(shown, "")
    biased = dataclasses.replace(without, backbone=dataclasses.replace(without.backbone, qkv_bias=True))
    assert biased.to_dict()["backbone"]["qkv_bias"] is True
    assert ModelConfig.from_dict(json.loads(json.dumps(biased.to_dict()))) == biased
    assert canonical_text(biased) == repr(without).replace(shown, ", qkv_bias=True")
    assert biased.backbone.num_params == without.backbone.num_params + 4 * (64 + 2 * 32)
