"""A folder without a tokenizer: logits, conversion, export and generation from tokens go, text is refused by name."""

import json

import numpy as np
import pytest

import sst_jax
from sst_jax import convert, export, generate, train
from sst_jax.console.command import run
from sst_jax.errors import InputError
from tests.support.runs import SMALL, TINY

TOKENS = [[5, 17, 3, 44, 29, 8]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny Llama as transformers saves it, weights and configs alone, and its logits there."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=24, intermediate_size=44, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, bos_token_id=1, eos_token_id=7,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).eval()
    path = tmp_path_factory.mktemp("bare")
    model.save_pretrained(path)
    with torch.no_grad():
        greedy = model.generate(torch.tensor(TOKENS), max_new_tokens=40, do_sample=False)[0, len(TOKENS[0]) :]
        return path, model(torch.tensor(TOKENS)).logits.numpy(), greedy.tolist()


def test_logits_and_tokens_are_transformers_own(folder):
    path, logits, greedy = folder
    model = sst_jax.load(path, "float32")
    np.testing.assert_allclose(model.logits(TOKENS, forward="plain"), logits, atol=2e-5)
    (answer,) = model.generate(TOKENS, max_new_tokens=40)
    assert answer.tokens == (greedy if 7 not in greedy else greedy[: greedy.index(7) + 1])[: len(answer.tokens)]
    assert answer.text == ""
    assert model.tokenizer.stop_ids == {7}


def test_text_is_refused_by_name(folder, capsys):
    path, _, _ = folder
    model = sst_jax.load(path, "float32")
    for ask in (
        lambda: model.generate(["hello"]),
        lambda: model.tokenizer.encode("hello"),
        lambda: model.tokenizer.chat([{"role": "user", "content": "hello"}]),
    ):
        with pytest.raises(InputError, match=f"{path} holds no tokenizer, so it takes tokens and no text: put tok"):
            ask()
    assert run(generate.main, ["--model", str(path), "--prompt", "hello"]) == 2
    assert "holds no tokenizer" in capsys.readouterr().err


def test_it_is_not_trained_on_text(folder, tmp_path, capsys):
    path, _, _ = folder
    flags = ["--config", TINY, *SMALL, f"--config.model.source={path}", "--workdir", str(tmp_path / "run")]
    assert run(train.main, flags) == 2
    assert "holds no tokenizer" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_it_is_converted_and_exported(folder, tmp_path):
    path, logits, _ = folder
    assert run(convert.main, ["--from", str(path), "--to", str(tmp_path / "base")]) == 0
    converted = sst_jax.load(tmp_path / "base", "float32")
    np.testing.assert_allclose(converted.logits(TOKENS, forward="plain"), logits, atol=2e-5)
    assert converted.tokenizer.stop_ids == {7}
    out = tmp_path / "merged"
    assert run(export.main, ["--from", str(tmp_path / "base"), "--to", str(out), "--format", "merged"]) == 0
    assert not list(out.glob("tokenizer*"))
    assert json.loads((out / "generation_config.json").read_text())["eos_token_id"] in (7, [7])
    np.testing.assert_allclose(sst_jax.load(out, "float32").logits(TOKENS, forward="plain"), logits, atol=2e-5)
