"""Rows of one's own and tasks of one's own as targets of `tests/support/fuzz.py`: every format in every container."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": [{"type": "text", "text": "Hi!"}]},
    {"role": "assistant", "content": "Hello."},
    {"role": "user", "content": "Bye"},
    {"role": "assistant", "content": "See you."},
]
ROWS = {
    "messages": {"messages": TALK},
    "sharegpt": {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
    "prompt_completion": {"prompt": "1 + 1 =", "completion": " 2"},
    "prompt_completion messages": {"prompt": TALK[:2], "completion": TALK[2:3]},
    "instruction": {"instruction": "Sort.", "input": "2 1", "output": "1 2"},
    "question_answer": {"question": "Why?", "answer": "So."},
    "gsm8k": {"question": "Why?", "answer": "1 + 1 = <<1+1=2>>2\n#### 2"},
    "text": {"text": "A text."},
}
TASKS = {
    "exact": {"prompt": "The capital of Italy is", "answer": "Rome", "id": "italy"},
    "number": {"question": "2 + 2?", "answer": 4},
    "choice": {"prompt": "Which is blue?", "choices": ["grass", "the sky"], "answer": "B"},
    "math": {"messages": TALK[:2], "answer": "\\frac{1}{2}"},
    "regex:(\\d+)": {"prompt": "a", "answer": "1"},
}


def lines(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def as_csv(rows: list[dict[str, Any]]) -> bytes:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def as_parquet(rows: list[dict[str, Any]]) -> bytes:
    import pyarrow
    from pyarrow import parquet

    sink = io.BytesIO()
    parquet.write_table(pyarrow.Table.from_pylist(rows), sink)
    return sink.getvalue()


def read_rows(file: Path) -> None:
    """Read a file as `train` does, and put every document into tokens."""
    from sst_jax.data.byte_tokenizer import ByteTokenizer
    from sst_jax.data.documents import Conversation
    from sst_jax.data.own import Rows
    from sst_jax.data.prompts import render

    for document in Rows(str(file)).read().documents:
        for format in ("chat",) if isinstance(document, Conversation) else ("plain", "chat"):
            tokens, mask, _ = render(document, ByteTokenizer(), format)
            assert tokens.shape == mask.shape
            assert tokens.min() >= 0


def read_task(file: Path, grade: str) -> None:
    """Read a file as `evaluate` does, ask its questions and grade an answer to each."""
    from sst_jax.data.byte_tokenizer import ByteTokenizer
    from sst_jax.data.prompts import asked_tokens
    from sst_jax.data.tasks import find

    task = find(f"{file}:{grade}")
    for item in task.read(None):
        asked_tokens(item.problem, ByteTokenizer(), "chat")
        for strict in (True, False):
            task.grading.is_right(task.grading.extract(item.problem.result, strict), item, item.problem.result)


def row_targets() -> list[tuple[str, dict[str, bytes], tuple[str, ...], Callable[[Path], Any], int]]:
    """Return the fields of `fuzz.Target`, all of them named "rows: ..."."""
    import sst_jax.data.own
    import sst_jax.data.tasks  # noqa: F401  # which import JAX, for seconds that no reader may take

    found = []

    def add(name: str, file: str, content: bytes, read: Callable[[Path], Any], share: int) -> None:
        found.append((f"rows: {name}", {file: content}, (file,), lambda path: read(path / file), share))

    for format, row in ROWS.items():
        add(format, "a.jsonl", lines([row] * 3), read_rows, 3)
    flat = ROWS["instruction"]
    add("csv", "a.csv", as_csv([flat] * 3), read_rows, 3)
    add("json", "a.json", json.dumps([ROWS["messages"]] * 2).encode(), read_rows, 3)
    add("parquet", "a.parquet", as_parquet([flat] * 3), read_rows, 1)
    for grade, row in TASKS.items():
        add(f"task {grade.partition(':')[0]}", "a.jsonl", lines([row]),
            lambda file, grade=grade: read_task(file, grade), 2)  # fmt: skip
    return found
