"""A resumable evaluation: every item under every policy, in fixed batches, one line of JSON an outcome.

OUT/evaluation.json  what is measured, with the first prompt verbatim     OUT/outcomes.jsonl  a line an item and policy
OUT/items.jsonl      questions, references, orders of choices             OUT/result.json     scores

Batches are cut from the whole list of items, never from what is left of it, and a batch counts once all its lines
stand: a run that was killed resumes at the batch it was in, and computes the same shapes and so the same numbers.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, NamedTuple

from sst_jax.console.command import write_json
from sst_jax.data.documents import Item
from sst_jax.data.prompts import asked_with_room, render
from sst_jax.data.tasks import Task
from sst_jax.errors import InputError
from sst_jax.files import diff, read_json
from sst_jax.inference.model import Model
from sst_jax.inference.policies import Policy
from sst_jax.lab.evaluation.scoring import score_and_scales
from sst_jax.lab.evaluation.second_opinion import second_opinion
from sst_jax.model.scales import scalars
from sst_jax.types import Json

Outcome = Json
HEADER, ITEMS, OUTCOMES, RESULT = "evaluation.json", "items.jsonl", "outcomes.jsonl", "result.json"
VOLATILE = ("environment",)  # recorded, but free to differ when a run resumes


def prompt_sha256(tokens: Sequence[int]) -> str:
    """Return the digest by which an outcome identifies its prompt."""
    return hashlib.sha256(json.dumps(tokens).encode()).hexdigest()


class Batch(NamedTuple):
    """Items that are answered together under one policy."""

    policy: Policy
    items: Sequence[Item]

    @property
    def keys(self) -> list[tuple[str, str]]:
        return [(self.policy.name, item.id) for item in self.items]


def batches(policies: Sequence[Policy], items: Sequence[Item], size: int) -> list[Batch]:
    """Return the batches of the whole plan, policy by policy."""
    return [Batch(policy, items[start : start + size]) for policy in policies for start in range(0, len(items), size)]


class Folder:
    """An evaluation's folder, locked against a second process until `close`."""

    def __init__(self, path: Path, header: Json, items: Sequence[Item]):
        """Open a new folder, or one that holds an evaluation of the same settings.

        Raises: InputError with the differing settings, or when the folder holds something else, or is in use.
        """
        self.path = path
        check_folder(path, header)
        path.mkdir(parents=True, exist_ok=True)
        self._lock = locked(path)
        with (path / ITEMS).open("w", encoding="utf-8") as file:
            for item in items:
                problem = item.problem
                record = {"id": item.id, "question": problem.question, "reference": problem.result, "order": item.order}
                file.write(json.dumps(record) + "\n")
        write_json(path / HEADER, header)
        self._file: IO[str] | None = None

    def resume(self, plan: Sequence[Batch]) -> list[Outcome]:
        """Return the outcomes of complete batches; what a kill left of another batch is dropped from the file."""
        there = read_outcomes(self.path, torn=True)
        have = {(outcome["policy"], outcome["id"]) for outcome in there}
        whole = {key for batch in plan if have.issuperset(batch.keys) for key in batch.keys}
        kept = [outcome for outcome in there if (outcome["policy"], outcome["id"]) in whole]
        write_outcomes(self.path, kept)
        self._file = (self.path / OUTCOMES).open("a", encoding="utf-8")
        return kept

    def write(self, outcomes: Sequence[Outcome]) -> None:
        """Append a batch, after `resume`."""
        assert self._file is not None
        self._file.write("".join(json.dumps(outcome) + "\n" for outcome in outcomes))
        self._file.flush()

    def close(self) -> None:
        for file in (self._file, self._lock):
            if file is not None:
                file.close()


def locked(path: Path) -> IO[str]:
    """Return a lock on the folder `path`, for as long as the file that is returned is open.

    Raises: InputError when another process has it.
    """
    lock = (path / ".lock").open("w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        lock.close()
        raise InputError(f"another process is evaluating into {path}: wait for it, or choose another --out") from None
    return lock


def check_folder(path: Path, header: Json) -> None:
    """Raise InputError unless `path` is new, empty, or holds an evaluation of the same settings."""
    if path.exists() and not path.is_dir():
        raise InputError(f"--out {path} is not a folder")
    if not (path / HEADER).is_file():
        strangers = (
            [entry.name for entry in path.iterdir() if entry.name not in (".lock", ITEMS)] if path.is_dir() else []
        )
        if strangers:
            raise InputError(f"--out {path} holds {sorted(strangers)[0]} but no evaluation: choose an empty folder")
        return
    there, now = read_json(path / HEADER), json.loads(json.dumps(header))
    changed = [found for found in diff(there, now) if found[0].split(".")[0] not in VOLATILE]
    if changed:
        shown = "; ".join(f"{key}: {old!r} there, {new!r} now" for key, old, new in changed[:4])
        raise InputError(f"--out {path} holds another evaluation ({shown}): use its settings or another folder")


def read_outcomes(path: Path, torn: bool = False) -> list[Outcome]:
    """Return the outcomes in a folder. `torn`: a last line that a kill cut off is left out.

    Raises: InputError naming the line that is not an outcome.
    """
    file = path / OUTCOMES
    lines = file.read_bytes().split(b"\n") if file.is_file() else []
    outcomes = []
    for number, line in enumerate(lines, 1):
        if not line:
            continue
        try:
            outcome = json.loads(line)
            if not isinstance(outcome, dict) or not {"id", "policy"} <= outcome.keys():
                raise ValueError("needs the fields id and policy")
        except (ValueError, RecursionError) as error:
            if torn and number == len(lines):
                break
            raise InputError(f"{file}, line {number}: not an outcome ({error})") from None
        outcomes.append(outcome)
    return outcomes


def write_outcomes(path: Path, outcomes: Sequence[Outcome]) -> None:
    """Write a folder's outcomes anew, whole or not at all."""
    file = path / OUTCOMES
    temporary = file.with_suffix(".partial")
    temporary.write_text("".join(json.dumps(outcome) + "\n" for outcome in outcomes), encoding="utf-8")
    temporary.replace(file)


def run_batches(
    folder: Folder, plan: Sequence[Batch], measure: Callable[[Batch], list[Outcome]], advance: Callable[[int], object]
) -> list[Outcome]:
    """Return all outcomes of a plan in its order. `advance` takes the items of each batch, those on disk first."""
    outcomes = folder.resume(plan)
    advance(len(outcomes))
    done = {(outcome["policy"], outcome["id"]) for outcome in outcomes}
    for batch in plan:
        if not done.issuperset(batch.keys):
            fresh = measure(batch)
            folder.write(fresh)
            outcomes += fresh
            advance(len(fresh))
    return outcomes


def prompts(model: Model, items: Sequence[Item], format: str, room: int) -> dict[str, list[int]]:
    """Return prompt tokens by item id.

    Raises: InputError when the longest leaves less than `room` positions to answer in.
    """
    most = model.config.backbone.position_limit
    found = asked_with_room(items, model.tokenizer, format, room, most, f"--max-new-tokens {room}")
    return {item.id: prompt for item, prompt in zip(items, found, strict=True)}


def answer(
    model: Model,
    task: Task,
    prompt: dict[str, list[int]],
    stop: Sequence[str],
    max_new_tokens: int,
    check: bool,
    batch: Batch,
) -> list[Outcome]:
    """Return greedy answers to a batch, read by both filters; `check`: with a second opinion where the task has one."""
    started, found = time.monotonic(), {}
    stream = model.generate_iter(
        [prompt[item.id] for item in batch.items], depth=batch.policy, max_new_tokens=max_new_tokens, stop=stop
    )
    for piece in stream:
        if piece.generation is not None:
            found[piece.index] = piece.generation, time.monotonic() - started
    outcomes = []
    for row, item in enumerate(batch.items):
        generation, seconds = found[row]
        reference, text = item.problem.result, generation.text
        strict, flexible = (task.grading.extract(text, way) for way in (True, False))
        outcomes.append(
            {
                "id": item.id,
                "policy": batch.policy.name,
                "prompt_sha256": prompt_sha256(prompt[item.id]),
                "prompt_tokens": generation.prompt_tokens,
                "output": text,
                "new_tokens": len(generation.tokens),
                "truncated": not generation.finished,
                "depth": sum(generation.depths) / len(generation.depths),
                "seconds": seconds,  # from the batch's start, which all its rows share, to this answer's end
                "reference": reference,
                "strict": strict,
                "flexible": flexible,
                "correct": task.grading.is_right(strict, item, text),
                "correct_flexible": task.grading.is_right(flexible, item, text),
                "second_opinion": second_opinion(text, reference) if check and task.grading.checkable else None,
            }
        )
    return outcomes


def losses(model: Model, format: str, batch: Batch) -> list[Outcome]:
    """Return losses of the worked answers of a batch, in nats, at the policy's depth at every position, and whether
    greedy decoding at that depth would have written them token for token.
    """
    started = time.monotonic()
    examples = [render(item.problem, model.tokenizer, format, learn="last") for item in batch.items]
    # The answer is one run of tokens; what follows it, the chat template's newline, is not scored.
    spans = [example.answer_mask.nonzero()[0] for example in examples]
    rows = [example.tokens[: span[-1] + 1].tolist() for example, span in zip(examples, spans, strict=True)]
    scores, scales = score_and_scales(model, rows, [int(span[0]) for span in spans], batch.policy.first)
    rms = {name: float(f"{value:.5g}") for name, value in scalars(scales).items()}
    of_batch = {"rms": rms, "rms_positions": sum(map(len, rows))}  # of all its items; told with the first
    seconds = time.monotonic() - started
    return [
        {
            "id": item.id,
            "policy": batch.policy.name,
            "prompt_sha256": prompt_sha256(row[: span[0]]),
            "loss": -float(scored.logprobs.sum(dtype="float64")),
            "answer_tokens": len(span),
            "greedy": bool(scored.greedy.all()),
            "seconds": seconds / len(examples),
            **(of_batch if row is rows[0] else {}),
        }
        for item, row, span, scored in zip(batch.items, rows, spans, scores, strict=True)
    ]


def by_policy(outcomes: Sequence[Outcome]) -> Iterator[tuple[str, list[Outcome]]]:
    """Yield (policy, its outcomes) in the order in which policies first occur."""
    for policy in dict.fromkeys(outcome["policy"] for outcome in outcomes):
        yield policy, [outcome for outcome in outcomes if outcome["policy"] == policy]
