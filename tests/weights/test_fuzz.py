"""Readers under fuzz: a short run of `tests/support/fuzz.py`, and what tells a crash. The long one is a command."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("gguf")

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1"}

GUARDED = """
import os, pathlib, pickle, subprocess, sys, tempfile, time
import numpy as np
from sst_jax.errors import InputError
from tests.support import fuzz

class Opens:
    def __reduce__(self):
        return (open, ("/etc/hostname",))

def fail(error):
    raise error

READERS = {
    "KeyError": lambda folder: {}["a"],
    "RecursionError": lambda folder: fail(RecursionError("deep")),
    "took more than": lambda folder: time.sleep(3),
    "are allowed": lambda folder: np.empty(10_000_000, np.uint8),
    "left its folder: open /etc/hosts": lambda folder: open("/etc/hosts").close(),
    "pickle.find_class": lambda folder: pickle.loads(pickle.dumps(Opens())),
    "subprocess.Popen": lambda folder: subprocess.run(["true"]),
    "ran ": lambda folder: exec(compile((folder / "model.py").read_text(), folder / "model.py", "exec")),
}
fuzz.SECONDS = 0.3
folder = pathlib.Path(sys.argv[1])
(folder / "model.py").write_text("pass")
guard = fuzz.Guard(folder)
for expected, read in READERS.items():
    try:
        guard.read(read, folder, 1_000_000)
    except fuzz.Crash as crash:
        assert expected in str(crash), (expected, str(crash))
    else:
        raise AssertionError(f"{expected} was not noticed")
assert guard.read(lambda folder: (folder / "model.py").read_bytes(), folder, 1_000_000)[0]
assert not guard.read(lambda folder: fail(InputError("refused")), folder, 1_000_000)[0]
"""


def test_the_guard_notices_what_a_reader_may_not_do(tmp_path):
    subprocess.run([sys.executable, "-c", GUARDED, str(tmp_path)], check=True, cwd=ROOT, env=ENVIRONMENT, timeout=120)


def fuzz(tmp_path, *arguments):
    command = [sys.executable, "-m", "tests.support.fuzz", "--json", str(tmp_path / "result.json"), *arguments]
    ended = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=1200)
    return ended, json.loads((tmp_path / "result.json").read_text())


@pytest.mark.slow
def test_six_hundred_mutations(tmp_path):
    ended, result = fuzz(tmp_path, "--count", "600")
    assert ended.returncode == 0, ended.stdout
    assert result["cases"] == 600
    assert result["loaded"] > 60  # or the mutations never get past the first check
    assert result["refused"] > 300


@pytest.mark.slow
def test_ten_thousand_others(tmp_path):
    ended, result = fuzz(tmp_path, "--count", "10000", "--first", "100000")
    assert ended.returncode == 0, ended.stdout
    assert result["cases"] == 10_000


@pytest.mark.slow
def test_two_thousand_mutated_files_of_rows(tmp_path):
    ended, result = fuzz(tmp_path, "--only", "rows", "--count", "2000")
    assert ended.returncode == 0, ended.stdout
    assert result["cases"] == 2000
    assert result["loaded"] > 200
    assert result["refused"] > 1000
