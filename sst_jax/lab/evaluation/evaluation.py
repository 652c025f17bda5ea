"""An evaluation as a call: a model on a task of this project, item by item, under one or more depth policies.

from sst_jax.lab.evaluation import EvalConfig, run
result = run(sst_jax.load("runs/27b"), EvalConfig("gsm8k", policies=("1", "4")), Path("runs/27b/gsm8k"))
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from sst_jax.console.command import write_json
from sst_jax.console.progress import bar
from sst_jax.data import tasks
from sst_jax.data.documents import Item
from sst_jax.data.template_date import date_of, fix_date, parse_date, reads_date
from sst_jax.data.tokenizer import Tokenizer
from sst_jax.errors import InputError
from sst_jax.files import read_json
from sst_jax.inference.halting_probe import Probe
from sst_jax.inference.model import Model
from sst_jax.inference.policies import Policy, check_distinct, parse
from sst_jax.inference.session import check_policy
from sst_jax.lab.evaluation import contamination, runner
from sst_jax.lab.evaluation.second_opinion import second_opinion_by
from sst_jax.lab.evaluation.summary import summarise
from sst_jax.training.run import environment
from sst_jax.types import Json

MEASURES = ("answers", "loss")
IDENTITY = ("kind", "path", "digest", "dtype", "quantize", "run", "step")


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """What is measured, and how. Greedy and zero-shot.

    task            a name that `tasks.find` knows, or a file of one's own and a grade, "FILE:GRADE"
    measure         "answers": texts, read and graded; "loss": of the worked answers, in nats
    policies        depth policies, each a `Policy` or its spelling, such as "4" or "probe:FILE"
    data            folder with the task's file; None: from the hub, or embedded
    limit           only the first items (0: all)
    format          of prompts, "plain" or "chat"; None: as the run was trained, else plain
    max_new_tokens  room for an answer; None: the task's
    batch_size      items answered together
    allow_overlap   measure a run that was trained on test questions, and record it
    allow_code      whether a file of the user's may grade: "FILE:python:GRADE.py" as the task

    Raises: InputError naming the setting, by the flag of `evaluate` that sets it.
    """

    task: str
    measure: str = "answers"
    policies: Sequence[Policy | str] = ("1",)
    data: str | None = None
    limit: int = 0
    format: str | None = None
    max_new_tokens: int | None = None
    batch_size: int = 8
    allow_overlap: bool = False
    allow_code: bool = False

    def __post_init__(self) -> None:
        spelled = tuple(parse(policy, files=True) if isinstance(policy, str) else policy for policy in self.policies)
        object.__setattr__(self, "policies", spelled)
        check_distinct(spelled)
        if self.measure not in MEASURES:
            raise InputError(f"--measure {self.measure} is not one of {', '.join(MEASURES)}")
        for name, least in (("limit", 0), ("batch_size", 1), ("max_new_tokens", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise InputError(f"--{name.replace('_', '-')} {value} is too small")

    @property
    def parsed(self) -> tuple[Policy, ...]:
        """The policies, none of them a spelling any more."""
        return tuple(policy for policy in self.policies if isinstance(policy, Policy))

    @property
    def depths(self) -> str:
        """The policies' names in one line."""
        return ",".join(policy.name for policy in self.parsed)


class TaskItems(NamedTuple):
    """A task with all its items, and those that are measured."""

    task: tasks.Task
    every: list[Item]
    items: list[Item]


def read_task(config: EvalConfig) -> TaskItems:
    """Return the items that a config asks for, before any model is read.

    Raises: InputError where its settings do not go together, or the items cannot be read.
    """
    task = tasks.find(config.task, config.allow_code)
    if config.measure == "loss" and not task.worked:
        raise InputError(f"--measure loss needs worked answers, which {task.name} has none of")
    if config.measure == "loss" and not all(policy.is_flat for policy in config.parsed):
        raise InputError(f"--depth {config.depths}: a known text is scored at flat depths, such as 1,2,4")
    every = task.read(config.data)
    return TaskItems(task, every, every[: config.limit or None])


def settings(config: EvalConfig, items: Sequence[Item]) -> Json:
    """Return what evaluation.json records of a config, apart from what depends on the model."""
    return {
        "task": config.task,
        "measure": config.measure,
        "policies": [policy.name for policy in config.parsed],
        "items": len(items),
        "items_sha256": tasks.items_digest(items),
        "data": config.data,
        "batch_size": config.batch_size,
    }


def finished(config: EvalConfig, out: Path) -> Json | None:
    """Return the result that a folder holds of the same settings, without reading a model; None where it does not."""
    if not (out / runner.RESULT).is_file():
        return None
    there = read_json(out / runner.HEADER)
    wanted = settings(config, read_task(config).items)
    return read_json(out / runner.RESULT) if all(there.get(key) == value for key, value in wanted.items()) else None


def check_model(model: Model, policies: Sequence[Policy]) -> None:
    """Raise InputError where a policy needs a stream that the model lacks, or its probe is another model's."""
    for policy in policies:
        check_policy(model.config, policy)
        if isinstance(policy.select_depth, Probe):
            policy.select_depth.check(model)


def identity(model: Model) -> Json:
    """Return what says which model it is: of the base, and of the run's checkpoint where it is one."""
    return {name: getattr(model.provenance, name) for name in IDENTITY}


def fixed_date(tokenizer: Tokenizer, there: Json | None, where: Path, format: str) -> Json:
    """Return the date that a chat template writes into the prompts, as it is recorded, and have it write this one.

    That is the date of an evaluation that resumes, of the run that trained the model, or the present.

    Args:
        tokenizer: of the model.
        there: what the folder holds of an evaluation that resumes; None: it holds none.
        where: the file that says so.
        format: "plain", where nothing is written, or "chat".
    """
    if format != "chat" or not reads_date(tokenizer):
        return {}
    if there is not None and there.get("date") is None:  # of version 0.1.0
        return {}
    text = date_of(tokenizer) if there is None else str(there["date"])
    fix_date(tokenizer, parse_date(text, f"{where}: date"))
    return {"date": text}


def run(model: Model, config: EvalConfig, out: Path, read: TaskItems | None = None) -> Json:
    """Evaluate a model into a folder; resume what an earlier call with the same settings left there.

    Args:
        model: with a stream where a policy iterates.
        config: what is measured.
        out: a folder that is new, empty, or holds an evaluation of the same settings and model.
        read: the items, where `read_task(config)` has read them already; None: they are read here.

    Returns:
        What DIR/result.json holds: the settings, scores by policy, and the overlap with training data.

    Raises: InputError as `read_task` and `check_model`, where the folder holds something else, and on test questions
        in the training data unless `allow_overlap`.
    """
    task, every, items = read or read_task(config)
    check_model(model, config.parsed)
    format = config.format or model.prompt_format
    trained_on = contamination.recipes_of(model.provenance)
    overlap = contamination.check(trained_on, every, config.allow_overlap)
    answering = config.measure == "answers"
    room = (config.max_new_tokens or task.max_new_tokens) if answering else 0
    stop = tasks.stops(format) if answering else []
    file = out / runner.HEADER
    date = fixed_date(model.tokenizer, read_json(file) if file.is_file() else None, file, format)
    prompt = runner.prompts(model, items, format, room)
    header = {
        **settings(config, items),
        "model": identity(model),
        "format": format,
        "stop": stop,
        "max_new_tokens": room,
        "first_prompt": model.tokenizer.decode(prompt[items[0].id]),
        "first_prompt_tokens": prompt[items[0].id],
        **date,
        "second_opinion_by": second_opinion_by() if answering and task.grading.checkable else None,
        "environment": environment(),
    }
    measure = functools.partial(runner.losses, model, format)
    if answering:
        check = header["second_opinion_by"] is not None
        measure = functools.partial(runner.answer, model, task, prompt, stop, room, check)
    folder = runner.Folder(out, header, items)
    try:
        with bar(len(config.policies) * len(items), f"{task.name}, depth {config.depths}", "item") as meter:
            plan = runner.batches(config.parsed, items, config.batch_size)
            outcomes = runner.run_batches(folder, plan, measure, meter.update)
    finally:
        folder.close()
    result = {**header, **summarise(items, outcomes, config.measure), "overlap": overlap}
    write_json(out / runner.RESULT, result)
    return result
