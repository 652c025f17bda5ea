"""What no block here computes is refused, in one line that names model type, field and value; nothing is guessed."""

import json

import pytest

from sst_jax.errors import InputError
from sst_jax.families.registry import BY_MODEL_TYPE, BY_NAME
from sst_jax.weights.hub_config import backbone_from_config, config_json
from sst_jax.weights.huggingface import open_folder

CLASSES = (
    "gemma", "gemma2", "gemma3n_text", "mixtral", "qwen2_moe", "qwen3_moe", "qwen3_next", "deepseek_v3",
    "gpt2", "gpt_neox", "gpt_oss", "phi", "phimoe", "falcon", "cohere", "cohere2", "stablelm", "starcoder2", "glm4",
    "nemotron", "exaone4", "granitemoe", "llama4_text", "olmo", "ministral", "mamba", "bloom", "opt", "arcee",
)  # fmt: skip
_TINY = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 262}


@pytest.mark.parametrize("model_type", CLASSES)
def test_a_class_that_is_not_known_is_refused_by_its_name(model_type, tmp_path):
    transformers = pytest.importorskip("transformers")
    config = json.loads(transformers.AutoConfig.for_model(model_type).to_json_string(use_diff=False))
    (tmp_path / "config.json").write_text(json.dumps({**config, **_TINY}))
    with pytest.raises(InputError, match=f"model_type='{model_type}' is unsupported") as caught:
        open_folder(tmp_path)
    assert str(caught.value).startswith(str(tmp_path / "config.json"))
    assert "\n" not in str(caught.value)


def test_what_is_lacking_is_said():
    for model_type, words in (
        ("gemma3n", "embeddings of their own"),
        ("mixtral", "experts"),
        ("gemma2", "soft-capped"),
    ):
        with pytest.raises(InputError, match=words):
            backbone_from_config({"model_type": model_type})


@pytest.mark.parametrize(
    ("family", "field", "value"),
    [
        ("llama", "attention_bias", True),
        ("llama", "mlp_bias", True),
        ("llama", "hidden_act", "gelu"),
        ("llama", "rope_scaling", {"rope_type": "dynamic", "factor": 2.0}),
        ("llama", "rope_scaling", {"rope_type": "yarn", "factor": 2.0, "truncate": False}),
        ("qwen2", "use_sliding_window", True),
        ("qwen2", "rope_scaling", {"type": "mrope", "mrope_section": [16, 24, 24]}),
        ("qwen3", "attention_bias", True),
        ("mistral", "hidden_act", "gelu"),
        ("mistral", "rope_scaling", {"rope_type": "linear", "factor": 2.0}),  # of layers with a window
        ("ministral3", "sliding_window", 64),
        ("smollm3", "use_sliding_window", True),
        ("smollm3", "no_rope_layers", [1]),
        ("granite", "mlp_bias", True),
        ("olmo2", "attention_bias", True),
        ("olmo3", "rope_parameters", {"sliding_attention": {"rope_type": "linear", "factor": 2.0}}),
        ("seed_oss", "attention_bias", False),
        ("seed_oss", "attention_out_bias", True),
        ("phi3", "rope_scaling", {"rope_type": "linear", "factor": 2.0}),
        ("gemma4", "hidden_size_per_layer_input", 256),
        ("gemma4", "num_kv_shared_layers", 2),
        ("gemma4", "enable_moe_block", True),
        ("gemma4", "use_bidirectional_attention", "all"),
        ("gemma4", "rope_parameters", {"full_attention": {"rope_type": "linear", "factor": 2.0}}),
        ("gemma4", "per_layer_config", {"2": {"head_dim": 32}, "5": {"head_dim": 64}}),
        ("gemma4", "layer_types", ["full_attention"] * 5 + ["sliding_attention"]),
        ("gemma3", "final_logit_softcapping", 30.0),
        ("gemma3", "attn_logit_softcapping", 50.0),
    ],
)
def test_a_field_of_a_known_class_is_refused_by_its_name(family, field, value):
    known = config_json(BY_NAME[family].tiny, "float32")
    if field == "rope_parameters":
        known.pop("rope_scaling", None)
    backbone_from_config(known)
    with pytest.raises(InputError) as caught:
        backbone_from_config({**known, field: value})
    said = str(caught.value)
    assert field in said or "sliding_attention" in said
    assert "\n" not in said


def test_no_class_is_both_known_and_refused():
    assert not set(CLASSES) & set(BY_MODEL_TYPE)
