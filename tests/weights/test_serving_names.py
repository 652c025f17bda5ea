"""A merged export in vLLM's and SGLang's naming, and an sst export that they refuse; neither is installed.

Their loaders put what a checkpoint calls q_proj, k_proj and v_proj into one parameter, qkv_proj, and gate_proj and
up_proj into gate_up_proj; every other name must be a parameter's. What parameters there are, by the architecture in
config.json, is read off `vllm/model_executor/models` (registry.py, llama.py, gemma3.py, gemma4.py, qwen2.py, qwen3.py,
olmo2.py, granite.py, phi3.py, seed_oss.py) and `sglang/srt/models` (llama.py, gemma3_causal.py and the same names).
"""

import json
from collections import Counter

import pytest

from sst_jax.families.registry import BY_NAME
from sst_jax.model.config import StreamConfig
from sst_jax.weights import card
from tests.support.checkpoints import read_raw
from tests.support.torch_exports import model, write

LLAMA = {
    "self_attn.qkv_proj.weight", "self_attn.o_proj.weight", "mlp.gate_up_proj.weight", "mlp.down_proj.weight",
    "input_layernorm.weight", "post_attention_layernorm.weight",
}  # fmt: skip
HEAD_NORMS = {"self_attn.q_norm.weight", "self_attn.k_norm.weight"}
BIASES = {"self_attn.qkv_proj.bias"}
OLMO = (LLAMA - {"input_layernorm.weight"}) | HEAD_NORMS | {"post_feedforward_layernorm.weight"}
GEMMA = LLAMA | HEAD_NORMS | {"pre_feedforward_layernorm.weight", "post_feedforward_layernorm.weight"}
# Architecture -> parameters of a layer. SmolLM3 goes by the transformers backend of both, whose names are the same.
PARAMETERS = {
    "Gemma3ForCausalLM": GEMMA,
    "Gemma4ForCausalLM": GEMMA | {"layer_scalar"},
    "Gemma4UnifiedForCausalLM": GEMMA | {"layer_scalar"},
    "LlamaForCausalLM": LLAMA,
    "MistralForCausalLM": LLAMA,
    "Ministral3ForCausalLM": LLAMA,
    "SmolLM3ForCausalLM": LLAMA,
    "GraniteForCausalLM": LLAMA,
    "Phi3ForCausalLM": LLAMA,
    "Qwen2ForCausalLM": LLAMA | BIASES,
    "SeedOssForCausalLM": LLAMA | BIASES,
    "Qwen3ForCausalLM": LLAMA | HEAD_NORMS,
    "Olmo2ForCausalLM": OLMO,
    "Olmo3ForCausalLM": OLMO,
}
PACKED = {"q_proj": "qkv_proj", "k_proj": "qkv_proj", "v_proj": "qkv_proj", "gate_proj": "gate_up_proj",
          "up_proj": "gate_up_proj"}  # fmt: skip
SHARDS = {"qkv_proj": 3, "gate_up_proj": 2}


def exported(name, folder, kind):
    backbone = BY_NAME[name].tiny
    ours = model({} if kind == "sst" else None, backbone, rank=0)
    return write(ours, folder, kind), backbone


@pytest.mark.parametrize("name", BY_NAME)
def test_every_tensor_is_a_parameter_there_and_every_parameter_is_filled(name, tmp_path):
    folder, backbone = exported(name, tmp_path / "merged", "merged")
    config = json.loads((folder / "config.json").read_text())
    (architecture,) = config["architectures"]
    expected = {f"model.layers.{at}.{part}" for at in range(backbone.num_layers) for part in PARAMETERS[architecture]}
    expected |= {"model.embed_tokens.weight", "model.norm.weight"}
    if not config["tie_word_embeddings"]:
        expected.add("lm_head.weight")
    filled = Counter()
    for key in read_raw(folder):
        *before, last, kind = key.split(".")
        filled[".".join([*before, PACKED.get(last, last), kind])] += 1
        if last == "k_proj" and config.get("attention_k_eq_v"):  # of full attention it is loaded as the values too
            filled[".".join([*before, "qkv_proj", kind])] += config["layer_types"][int(before[2])] == "full_attention"
    assert set(filled) == expected
    for parameter, count in filled.items():
        packed = parameter.split(".")[-2]
        assert count == (1 if architecture == "Phi3ForCausalLM" else SHARDS.get(packed, 1)), parameter


@pytest.mark.parametrize("name", BY_NAME)
def test_an_export_with_the_stream_is_refused_there_and_says_where_it_runs(name, tmp_path):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("torch")
    folder, _ = exported(name, tmp_path / "sst", "sst")
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"][0] not in PARAMETERS  # so neither takes it for the backbone
    with pytest.raises(ValueError, match="trust_remote_code"):
        transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
    reference = config["auto_map"]["AutoModelForCausalLM"]
    loaded = transformers.dynamic_module_utils.get_class_from_dynamic_module(reference, folder)
    assert not loaded.is_backend_compatible()  # what vLLM's transformers backend asks
    page = (folder / "README.md").read_text()
    assert "The stream runs in transformers with `trust_remote_code=True`, and nowhere else." in page


def test_a_card_says_options_in_words():
    options = card._options(StreamConfig(links=((5, 2), (3, 0)), alpha_range=(0.0, 1.0)))
    assert {name: options[name] for name in ("alpha", "layers", "links", "alpha_range", "learn_gain", "state")} == {
        "alpha": "learned", "layers": "all", "links": "5 -> 2, 3 -> 0", "alpha_range": "0.0, 1.0", "learn_gain": "no",
        "state": "ffn",
    }  # fmt: skip
    assert card._options(StreamConfig(alpha=0.1))["links"] == "each layer to itself"
    assert [card._data_name(data) for data in ({"name": "auto"}, {"name": "auto", "path": "a"}, {"name": "rooms"})] == [
        "words", "auto", "rooms"
    ]  # fmt: skip
