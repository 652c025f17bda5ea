"""The backbone against transformers' own on tiny random models: norm, RoPE, attention, layer, logits, text."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sst_jax.model import decoder, halves, rules
from sst_jax.model.attention import Sequences, attend_sequences, ropes
from sst_jax.model.config import ModelConfig
from sst_jax.model.layers import RMSNorm, rotate
from sst_jax.weights.huggingface import open_folder
from sst_jax.weights.source import fill_base

torch = pytest.importorskip("torch", reason="the reference is PyTorch: extra `torch`")
transformers = pytest.importorskip("transformers")

SHAPES = {
    "grouped": {"num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 10},
    "one kv head": {"num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 16},
    "no groups": {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 12},
}
GEMMA = {
    "sliding_window": 7, "query_pre_attn_scalar": 9, "tie_word_embeddings": True,
    "rope_parameters": {
        "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1_000_000.0},
    },
}  # fmt: skip
# The longest texts below are eight times as long as what this scaling calls the original length.
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10_000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
CASES = {
    **{f"gemma3, {shape}": ("Gemma3", "Gemma3TextConfig", shape, GEMMA) for shape in SHAPES},
    "llama, tied": ("Llama", "LlamaConfig", "grouped", {"tie_word_embeddings": True}),
    "llama, llama3": ("Llama", "LlamaConfig", "one kv head", {"rope_parameters": LLAMA3}),
    "qwen3": ("Qwen3", "Qwen3Config", "grouped", {"tie_word_embeddings": False}),
}  # fmt: skip


@pytest.fixture(scope="module", params=CASES)
def pair(request, tmp_path_factory):
    """(transformers' model, our config, our params): seven layers, sharp attention, norms away from one."""
    family, config_class, shape, facts = CASES[request.param]
    config = getattr(transformers, config_class)(
        vocab_size=99,
        hidden_size=48,
        intermediate_size=56,
        num_hidden_layers=7,
        max_position_embeddings=1024,
        attn_implementation="eager",
        **SHAPES[shape],
        **facts,
    )
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name:
                factor = 1.3 if "q_norm" in name or "k_norm" in name else 1.0
                weight.normal_(factor - (family == "Gemma3"), 0.2)
            else:
                sharper = 1.2 if family == "Llama" and ("q_proj" in name or "k_proj" in name) else 1.0
                weight.normal_(0.0, sharper * weight.shape[-1] ** -0.5)
    folder = tmp_path_factory.mktemp("reference")
    model.save_pretrained(folder)
    source = open_folder(folder)
    if family == "Gemma3":
        assert sorted(set(source.backbone.layer_types)) == ["global", "local"]
        assert source.backbone.rope_scale_global == 8.0
    base = jax.tree.map(jnp.asarray, fill_base(source, "float32"))
    assert ("head" in base) == (not config.tie_word_embeddings)
    return model, ModelConfig(source.backbone), {"base": base, "adapter": {}, "blend": {}}


def ids(rows, length, seed=0):
    return np.random.default_rng(seed).integers(3, 99, (rows, length)).astype(np.int32)


@pytest.mark.fast_cases(9)
@pytest.mark.parametrize("length", [5, 40, 530])
def test_logits(pair, length):
    """Shorter than the window, longer, and a prompt of over 500 tokens.

    Over 530 positions float32 alone puts transformers 1e-5 to 2e-5 away from itself in float64, more or less by CPU:
    there we may be as far as that, and not farther.
    """
    theirs, config, params = pair
    tokens = ids(2, length)
    with torch.no_grad():
        expected = theirs(torch.tensor(tokens)).logits.numpy()
        truth = theirs.double()(torch.tensor(tokens)).logits.numpy()
        theirs.float()
    got = np.asarray(rules.logits(config, params, tokens, forward="plain"))
    assert np.abs(expected).max() > 1
    rounding = np.abs(expected - truth).max()
    assert np.abs(got - truth).max() <= max(2e-5, 1.5 * rounding)
    assert np.abs(got - expected).max() <= max(2e-5, 2.5 * rounding)
    assert rounding <= 3e-5


def test_attention_is_not_near_uniform(pair):
    """Or the other tests would pass whatever it computes."""
    theirs, _, _ = pair
    with torch.no_grad():
        weights = theirs(torch.tensor(ids(1, 40)), output_attentions=True).attentions
    assert max(float(layer[0, :, -1].max()) for layer in weights) > 0.4


def test_norm(pair):
    theirs, config, params = pair
    x = np.random.default_rng(1).normal(size=(2, 3, 48)).astype(np.float32) * 30
    norm = RMSNorm(48, config.backbone.norm_eps, config.backbone.norm_offset, jnp.float32)
    norm.scale[...] = params["base"]["layers"]["pre_attn_norm"]["scale"][2]
    with torch.no_grad():
        expected = theirs.model.layers[2].input_layernorm(torch.tensor(x)).numpy()
    np.testing.assert_allclose(norm(jnp.asarray(x)), expected, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize(("kind", "name"), [(0, "sliding_attention"), (1, "full_attention")])
def test_rotation(pair, kind, name):
    from transformers.models.gemma3.modeling_gemma3 import apply_rotary_pos_emb

    theirs, config, _ = pair
    if kind == 0 and config.backbone.window is None:
        pytest.skip("this family has no local layers")
    size = config.backbone.head_dim
    positions = np.array([[0, 1, 17, 400, 1001]])
    x = np.random.default_rng(1).normal(size=(1, 5, 3, size)).astype(np.float32)
    of_kind = () if config.backbone.window is None else (name,)
    cos, sin = theirs.model.rotary_emb(torch.tensor(x), torch.tensor(positions), *of_kind)
    expected, _ = apply_rotary_pos_emb(torch.tensor(x), torch.tensor(x), cos, sin, unsqueeze_dim=2)
    got = rotate(jnp.asarray(x), ropes(config.backbone, jnp.asarray(positions))[kind])
    np.testing.assert_allclose(got, expected.numpy(), atol=2e-6)


@pytest.mark.parametrize("number", [4, 5], ids=["local", "global"])
def test_layer_and_its_attention(pair, number):
    """One layer alone: attention's output before its projection's norm, and the whole layer."""
    theirs, config, params = pair
    x = np.random.default_rng(3).normal(size=(2, 30, 48)).astype(np.float32)
    captured = {}
    layer = theirs.model.layers[number]
    hook = layer.self_attn.register_forward_hook(lambda module, given, out: captured.update(out=out[0]))
    inner = layer.register_forward_pre_hook(lambda module, given: (torch.tensor(x), *given[1:]))
    after = layer.register_forward_hook(lambda module, given, out: captured.update(layer=out))
    with torch.no_grad():
        theirs(torch.tensor(ids(2, 30)))
    for handle in (hook, inner, after):
        handle.remove()
    expected = captured["layer"] if isinstance(captured["layer"], torch.Tensor) else captured["layer"][0]

    seen = {}

    def rule(unpacked, residuals, extra, context):
        qkv = halves.project(unpacked, jnp.asarray(x), context)
        rows = Sequences(context.ropes, context.segment_ids)
        out, _ = attend_sequences(config.backbone, unpacked.kind, qkv, rows)
        (o,), _ = rules.plain(unpacked, (jnp.asarray(x),), None, context)
        return residuals, (unpacked.block.o(out), o)

    context = decoder.row_context(config, jnp.asarray(ids(2, 30)))
    _, (seen["attention"], seen["layer"]) = decoder.run_layers(params, rule, (), context)
    np.testing.assert_allclose(seen["attention"][number], captured["out"].numpy(), atol=1e-5)
    np.testing.assert_allclose(seen["layer"][number], expected.numpy(), atol=2e-5)


@pytest.mark.parametrize("pair", ["gemma3, grouped", "llama, llama3", "qwen3"], indirect=True)
def test_greedy_text_past_the_window(pair):
    from sst_jax.inference.sampling import Sampling
    from tests.support.decoding import generate as generate_tokens

    theirs, config, params = pair
    prompt = ids(1, 19)
    with torch.no_grad():
        expected = theirs.generate(torch.tensor(prompt), max_new_tokens=33, do_sample=False, eos_token_id=None)
    pieces = generate_tokens(
        config,
        params,
        [prompt[0].tolist()],
        depth=[1],
        max_new_tokens=33,
        sampling=Sampling(),
        seeds=[0],
        stop_ids=(),
        pad_id=0,
    )
    got = np.concatenate([piece.tokens for piece in pieces], axis=1)[0]
    assert got.tolist() == expected[0, 19:].tolist()


def test_bfloat16_stays_as_close_as_the_reference_does(pair):
    """Against float32 transformers; transformers' own bfloat16 sets the scale of what rounding costs."""
    theirs, config, params = pair
    tokens = ids(2, 40)
    with torch.no_grad():
        truth = theirs(torch.tensor(tokens)).logits.numpy()
        rounded = theirs.to(torch.bfloat16)(torch.tensor(tokens)).logits.float().numpy()
        theirs.to(torch.float32)
    narrow = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    ours = np.asarray(rules.logits(dataclasses.replace(config, dtype="bfloat16"), narrow, tokens, forward="plain"))
    assert np.linalg.norm(ours - truth) <= 1.2 * np.linalg.norm(rounded - truth)


def test_block_is_a_module_whose_variables_fall_into_three_trees():
    from sst_jax.families.registry import PRESETS
    from sst_jax.model.config import AdapterConfig, StreamConfig
    from sst_jax.model.layers import Adapter, Base, Blend, Block

    config = ModelConfig(PRESETS["27b"], StreamConfig(), AdapterConfig(rank=32))
    block = nnx.eval_shape(lambda: Block(config, jnp.bfloat16, nnx.Rngs(0)))
    _, base, adapter, blend = nnx.split(block, Base, Adapter, Blend)
    assert len(jax.tree.leaves(base)) == 13
    assert len(jax.tree.leaves(adapter)) == 14
    (theta,) = jax.tree.leaves(blend)
    assert theta.shape == (5376,)
    assert 62 * theta.size == 333_312  # the paper's count of added parameters


@pytest.mark.parametrize(
    ("name", "millions"),
    [
        ("270m", 268),
        ("1b", 1000),
        ("4b", 3880),
        ("12b", 11766),
        ("27b", 27009),
        ("smollm2-135m", 135),
        ("smollm2-360m", 362),
        ("smollm2-1.7b", 1711),
        ("llama-3.2-1b", 1236),
        ("llama-3.2-3b", 3213),
        ("llama-3.1-8b", 8030),
        ("qwen3-0.6b", 596),
        ("qwen3-1.7b", 1721),
        ("qwen3-4b", 4022),
        ("qwen3-8b", 8191),
        ("qwen3-14b", 14_768),
        ("qwen3-32b", 32_762),
        ("llama-3.3-70b", 70_554),
    ],
)
def test_presets_have_the_published_size(name, millions):
    from sst_jax.families.registry import PRESETS

    assert round(PRESETS[name].num_params / 1e6) == millions
    shapes = decoder.abstract_params(ModelConfig(PRESETS[name]), jnp.bfloat16)
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes["base"])) == PRESETS[name].num_params
