"""A tiny random Gemma 3 of transformers, where torch is installed."""

import pytest


@pytest.fixture(scope="session")
def torch_model():
    """A random Gemma3ForCausalLM in float32 whose norms are away from zero."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    config = transformers.Gemma3TextConfig(
        vocab_size=67,
        hidden_size=24,
        intermediate_size=44,
        num_hidden_layers=8,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=10,
        sliding_window=5,
        query_pre_attn_scalar=9,
        max_position_embeddings=300,
        rope_scaling={"rope_type": "linear", "factor": 8.0},
    )
    torch.manual_seed(0)
    model = transformers.Gemma3ForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
    return model
