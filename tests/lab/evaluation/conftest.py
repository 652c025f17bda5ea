"""Data that looks like the real thing, and a tiny model with a stream."""

import json

import pytest

import sst_jax

GPQA = ("Record ID", "Question", "Correct Answer", "Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3")


def gsm8k_lines(split, count):
    """Problems of a made-up split in GSM8K's form."""
    return [
        {
            "question": f"The {split} baker bakes {n} trays of {n + 3} rolls and sells {n}. How many are left?",
            "answer": f"He bakes {n} * {n + 3} = <<{n}*{n + 3}={n * (n + 3)}>>{n * (n + 3)}.\n#### {n * (n + 3) - n:,}",
        }
        for n in range(2, 2 + count)
    ]


def write_lines(file, lines):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return file


@pytest.fixture(scope="session")
def gsm8k(tmp_path_factory):
    """A folder with train.jsonl and test.jsonl that share no question."""
    folder = tmp_path_factory.mktemp("gsm8k")
    for split, count in (("train", 40), ("test", 7)):
        write_lines(folder / f"{split}.jsonl", gsm8k_lines(split, count))
    return folder


@pytest.fixture(scope="session")
def plain():
    return sst_jax.load("random:tiny")


@pytest.fixture(scope="session")
def streaming(plain):
    """With a stream strong enough that depth changes answers."""
    return plain.with_stream(alpha=0.5)
