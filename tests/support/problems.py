"""Files of problems that look like the real data sets, and the real GSM8K where it lies beside the project."""

import json
import os
from pathlib import Path

from sst_jax.data.datasets import DATASETS
from tests.support import ROOT

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


def load_gsm8k(path=None, split="train"):
    """The problems of GSM8K's split in a folder, or on the hub."""
    return DATASETS["gsm8k"].source.problems(split, path, "data.path")


def write_lines(file, lines):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return file


def real_gsm8k():
    """The folder of the real GSM8K, $SST_GSM8K_DIR or ../shared/data/gsm8k, or None."""
    beside = ROOT.parent / "shared" / "data" / "gsm8k"
    for folder in filter(None, (os.environ.get("SST_GSM8K_DIR"), beside)):
        if (Path(folder) / "train.jsonl").is_file():
            return Path(folder)
    return None


def write_gsm8k(folder):
    """A folder of forty rows to train on and seven to test on, none in both."""
    for split, count in (("train", 40), ("test", 7)):
        write_lines(folder / f"{split}.jsonl", gsm8k_lines(split, count))
    return folder
