"""Folders as fine-tunes leave them: shards of every float type, vocabularies that were padded or resized."""

import numpy as np
import pytest

import sst_jax
from sst_jax.errors import InputError
from tests.support.template_folders import SPECIALS, TEMPLATES, WORDS, write_byte_level

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

PIECES = len(SPECIALS) + 256 + len(WORDS)
TEXT = "Zwölf Boxkämpfer"


def saved(folder, rows, dtype=torch.float32, tokens=()):
    """A tiny Llama of so many rows as transformers saves it, in shards; `tokens` are added to its vocabulary."""
    write_byte_level(folder, TEMPLATES["chatml"], more=tokens)
    config = transformers.LlamaConfig(
        vocab_size=PIECES, hidden_size=24, intermediate_size=44, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config)
    if rows != PIECES:
        model.resize_token_embeddings(rows)
    model = model.to(dtype).eval()
    model.save_pretrained(folder, max_shard_size="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    return model.float()


def logits(model, ids):
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0].numpy()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_shards_of_a_padded_vocabulary(tmp_path, dtype):
    """64 rows more than tokens, as training in multiples of 64 leaves them: nothing names them, all have logits."""
    theirs = saved(tmp_path, PIECES + 64, getattr(torch, dtype))
    ours = sst_jax.load(tmp_path, "float32")
    ids = ours.tokenizer.encode(TEXT)
    assert ids == transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)(TEXT)["input_ids"]
    found = ours.logits([ids], forward="plain")[0]
    assert found.shape == (len(ids), PIECES + 64)
    np.testing.assert_allclose(found, logits(theirs, ids), atol=2e-5)


def test_a_vocabulary_that_grew_with_its_embedding(tmp_path):
    theirs = saved(tmp_path, PIECES + 1, tokens=["<|new|>"])
    ours = sst_jax.load(tmp_path, "float32")
    ids = ours.tokenizer.encode(f"a<|new|>{TEXT}", parse_special=True)
    assert PIECES in ids
    np.testing.assert_allclose(ours.logits([ids], forward="plain")[0], logits(theirs, ids), atol=2e-5)


def test_a_vocabulary_that_grew_alone(tmp_path):
    theirs = saved(tmp_path, PIECES, tokens=["<|new|>"])
    ours = sst_jax.load(tmp_path, "float32")
    ids = ours.tokenizer.encode(TEXT)
    np.testing.assert_allclose(ours.logits([ids], forward="plain")[0], logits(theirs, ids), atol=2e-5)
    with pytest.raises(InputError, match=rf"'<\|new\|>' has the id {PIECES}, and the model's embedding has {PIECES}"):
        ours.tokenizer.encode("<|new|>", parse_special=True)
