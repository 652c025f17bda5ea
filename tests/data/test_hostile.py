"""Inputs made to take long or to take much; random mutations (`tests/support/fuzz.py`) do not find them."""

import struct
import time

import pytest

from sst_jax.data.gguf_header import metadata_of
from sst_jax.data.records import read_csv, read_jsonl
from sst_jax.data.vocabulary import from_model_proto
from sst_jax.errors import InputError
from tests.support.problems import load_gsm8k


@pytest.fixture(autouse=True)
def in_two_seconds():
    started = time.monotonic()
    yield
    assert time.monotonic() - started < 2.0


@pytest.mark.parametrize("text", ["<" * 300_000, "<<1" * 100_000, "<<" + "1" * 300_000, "<<>" * 100_000])
def test_a_solution_of_opened_marks(tmp_path, text):
    (tmp_path / "train.jsonl").write_text(f'{{"question": "1 + 1?", "answer": "{text}#### 2"}}\n')
    assert load_gsm8k(str(tmp_path))[0].result == "2"


@pytest.mark.parametrize("line", [b"[" * 1_000_000, b'{"a":' * 200_000, b"9" * 1_000_000, b'"' + b"\\" * 1_000_001])
def test_lines_that_no_parser_likes(tmp_path, line):
    (tmp_path / "a.jsonl").write_bytes(line)
    with pytest.raises(InputError, match=r"a\.jsonl, line 1"):
        list(read_jsonl(tmp_path / "a.jsonl"))


def test_a_cell_without_an_end(tmp_path):
    (tmp_path / "a.csv").write_text('a,b\n1,"' + "x\n" * 200_000)
    with pytest.raises(InputError, match=r"a\.csv"):
        list(read_csv(tmp_path / "a.csv"))


def test_a_number_without_an_end_in_a_sentencepiece_model():
    with pytest.raises(InputError, match="64 bits"):
        from_model_proto(b"\x80" * 1_000_000)


def test_arrays_of_arrays_in_a_gguf(tmp_path):
    nested = struct.pack("<IQ", 9, 1) * 100_000
    pair = struct.pack("<Q", 1) + b"k" + struct.pack("<I", 9) + nested
    (tmp_path / "a.gguf").write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + pair)
    with pytest.raises(InputError, match="unknown or nested"):
        metadata_of(tmp_path / "a.gguf")
