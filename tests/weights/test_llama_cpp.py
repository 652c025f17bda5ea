"""GGUF files against llama.cpp itself (pip install xllamacpp), which reads the same file: its tokens and its logits.

It is asked to compute in float32: its caches would be in half precision, which alone moves log-probabilities by 8e-3.
GELU is a table in half precision there whatever is asked, which moves Gemma's by 2e-3. Ours takes the same table here;
what is left, 9e-4, are numbers that fall on the other side of a half-precision one.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sst_jax
from sst_jax.families.registry import BY_NAME
from sst_jax.model import layers
from sst_jax.model.layers import rope_frequencies
from tests.support.tiny_files import byte_level, drawn, gemma4, gguf_file, sentencepiece

xllamacpp = pytest.importorskip("xllamacpp", reason="llama.cpp is not installed: pip install xllamacpp")

NEW = 4  # tokens that are decoded one by one
TEXTS = ("the cab sat", " Zwölf 😀\n\n\tBoxkämpfer", "a ab abc " * 12)  # the last one is longer than every window


def _llama3_tensor(backbone):
    """What converters write for Llama 3's scaling by 8: a divisor for each frequency."""
    plain = rope_frequencies(backbone.head_dim, backbone.rope_theta_global, 1.0)
    bands = BY_NAME["llama"].gguf.rope_llama3
    return {"rope_freqs.weight": np.float32(plain / rope_frequencies(backbone.head_dim, 1e4, 8.0, bands))}


CASES = {
    "llama, llama-bpe": ("llama", byte_level("llama-bpe"), {}),
    "llama, llama-bpe without BOS": ("llama", byte_level("llama-bpe", add_bos_token=False), {"rope.freq_base": 1e4}),
    "llama, llama3 scaling": ("llama", byte_level("llama-bpe", add_bos_token=True), {"rope.freq_base": 1e4}),
    "llama, linear scaling, SentencePiece": (
        "llama", sentencepiece(), {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0},
    ),
    "llama, linear scaling as in 2023": (
        "llama", sentencepiece(add_bos_token=False), {"rope.scale_linear": 4.0, "rope.dimension_count": 16},
    ),
    "llama, no scaling, no space": (
        "llama", sentencepiece(add_space_prefix=False), {"rope.scaling.type": "none", "rope.scaling.factor": 4.0},
    ),
    "llama, yarn": (
        "llama", byte_level("smollm"),
        {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 64},
    ),
    "qwen2": ("qwen2", byte_level("qwen2"), {}),
    "qwen3, linear scaling": (
        "qwen3", byte_level("qwen2"), {"rope.scaling.type": "linear", "rope.scaling.factor": 2.0},
    ),
    "qwen3, BOS": ("qwen3", byte_level("qwen2", add_bos_token=True), {}),
    "smollm3": ("smollm3", byte_level("llama-bpe"), {}),
    "granite": ("granite", byte_level("refact"), {}),
    "olmo2": ("olmo2", byte_level("dbrx"), {}),
    "olmo3": ("olmo3", byte_level("dbrx"), {}),
    "seed_oss": ("seed_oss", byte_level("qwen2"), {}),
    "phi3, longrope": ("phi3", sentencepiece(), {}),
    "ministral3": ("ministral3", byte_level("tekken"), {}),
    "ministral3, YaRN's magnitude": ("ministral3", byte_level("tekken"), {"rope.scaling.yarn_log_multiplier": 0.0}),
    "gemma3": ("gemma3", sentencepiece(add_space_prefix=False), {}),
    "gemma3, linear scaling": (
        "gemma3", sentencepiece(add_space_prefix=False), {"rope.scaling.type": "linear", "rope.scaling.factor": 8.0},
    ),
    "gemma4": ("gemma4", gemma4(), {}),
    "gemma4, values of their own": ("gemma4", gemma4(), {"rope.freq_base_swa": 2e4}),
}  # fmt: skip


def gelu_by_table(x):
    """What llama.cpp looks up between -10 and 10: GELU of x in half precision, rounded to it."""
    rounded = jax.nn.gelu(x.astype(jnp.float16).astype(jnp.float32), approximate=True)
    return jnp.where(jnp.abs(x) < 10, rounded.astype(jnp.float16).astype(jnp.float32), jnp.maximum(x, 0))


@pytest.fixture
def table(monkeypatch):
    """GELU by that table, in programs that other tests do not share."""
    monkeypatch.setitem(layers.ACTIVATIONS, "gelu_tanh", gelu_by_table)
    jax.clear_caches()
    yield
    jax.clear_caches()


def server(file):
    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.n_parallel = str(file), 512, 1
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1  # several would spin for each other
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.warmup, params.fit_params = False, False
    return xllamacpp.Server(params)


def asked(llama, text, forced, size):
    """(number of prompt tokens, log-probabilities [NEW, V]) after a text that goes on with NEW times one token."""
    body = {
        "prompt": text, "n_predict": NEW, "temperature": 0, "n_probs": size, "post_sampling_probs": False,
        "logit_bias": [[forced, 1000.0]], "ignore_eos": True, "cache_prompt": False,
    }  # fmt: skip
    answer = llama.handle_completions(body)
    (choice,) = answer["choices"]
    found = np.full((NEW, size), np.nan)
    for row, part in zip(found, choice["logprobs"]["content"][:NEW], strict=True):
        assert part["id"] == forced
        for token in part["top_logprobs"]:
            row[token["id"]] = token["logprob"]
    return answer["usage"]["prompt_tokens"], found


@pytest.mark.usefixtures("table")
@pytest.mark.parametrize("name", CASES)
def test_log_probabilities_are_llama_cpps(name, tmp_path):
    family, vocabulary, more = CASES[name]
    backbone = BY_NAME[family].tiny
    if "llama3" in name:
        backbone = dataclasses.replace(backbone, rope_theta_global=1e4)
    if family == "gemma4":
        backbone = dataclasses.replace(backbone, vocab_size=len(vocabulary["tokens"]))
    if "of their own" in name:
        backbone = dataclasses.replace(backbone, values_from_keys=False, global_num_kv_heads=None)
    file = gguf_file(
        tmp_path / "tiny.gguf", backbone, drawn(backbone), vocabulary, more,
        _llama3_tensor(backbone) if "llama3" in name else None,
    )  # fmt: skip
    model, llama = sst_jax.load(file, "float32"), server(file)
    size, forced = backbone.vocab_size, model.tokenizer.encode_text("q")[-1]
    worst = 0.0
    for text in TEXTS:
        tokens = model.tokenizer.encode(text)
        count, theirs = asked(llama, text, forced, size)
        assert count == len(tokens), text
        logits = model.logits([tokens + [forced] * (NEW - 1)], forward="plain")[0]
        ours = np.asarray(jax.nn.log_softmax(logits))[-NEW:]
        assert np.isfinite(theirs).all()
        worst = max(worst, np.abs(ours - theirs).max())
    print(f"{name}: {worst:.1e}")
    assert worst <= (1e-3 if family.startswith("gemma") else 1e-4)
