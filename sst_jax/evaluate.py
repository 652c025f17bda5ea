"""Measures a model on a task, item by item, under one or more depth policies.

  python -m sst_jax.evaluate --model runs/27b --task gsm8k --depth 1,2,3,4 --out runs/27b/gsm8k
  python -m sst_jax.evaluate --model runs/27b --task gpqa_diamond --data DIR --depth 1,2,3,4 --out runs/27b/gpqa
  python -m sst_jax.evaluate --model runs/270m --task gsm8k --data DIR --measure loss --out runs/270m/loss
  python -m sst_jax.evaluate --model runs/27b --tasks arc_easy,hellaswag --depth 1,4 --out runs/27b/harness

Zero-shot and greedy. The same command on the same folder goes on where it stopped. --task takes this project's tasks:
gsm8k, gpqa_diamond, arc_challenge, math_500, words; gsm8k:result and words:result for models that write no steps; and
the stories boxes, shelves, rooms, chain, lamp and clock, as rooms:8. --tasks takes the names of lm-evaluation-harness
(extra `eval`).
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sst_jax.console.command import Parser, folder_for, run, write_json
from sst_jax.errors import InputError


def parser() -> Parser:
    parser = Parser(prog="python -m sst_jax.evaluate", description=__doc__)
    add = parser.add_argument
    add("--model", required=True, metavar="MODEL", help="folder, hub id, GGUF file or training run")
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--task", metavar="NAME", help="one of this project's tasks")
    which.add_argument("--tasks", metavar="A,B", help="tasks of lm-evaluation-harness")
    add("--out", required=True, metavar="DIR", help="outcomes.jsonl and result.json go here")
    add("--depth", default="1", metavar="P,Q", help="policies: 1,4,first_token:4,until_stable:0.01:4,probe:FILE")
    add("--data", metavar="DIR", help="folder with the task's file (default: from the hub)")
    add("--limit", type=int, default=0, metavar="N", help="only the first N items (0: all)")
    add("--format", choices=("plain", "chat"), help="of prompts (default: as the run was trained, else plain)")
    add("--measure", choices=("answers", "loss"), default="answers", help="loss: of the worked answers, in nats")
    add("--max-new-tokens", type=int, metavar="N", help="room for an answer (default: the task's)")
    add("--batch-size", type=int, default=8, metavar="B", help="items answered together (default: 8)")
    add("--dtype", choices=("float32", "bfloat16"), help="default: float32 on a CPU, else bfloat16")
    add("--allow-overlap", action="store_true", help="evaluate a run that was trained on the test, and record it")
    add("--fewshot", type=int, metavar="K", help="examples in the prompt (--tasks only; default: the task's)")
    add("--include", metavar="DIR", help="folder with task files of your own (--tasks only)")
    add("--json", metavar="FILE", help="write the result here too (always in DIR/result.json)")
    return parser


def main(argv: Sequence[str]) -> None:
    args = parser().parse_args(argv)
    check_sizes(args)
    if args.max_new_tokens is not None and args.max_new_tokens < 1:
        raise InputError(f"--max-new-tokens {args.max_new_tokens} is too small")

    from sst_jax.inference.policies import parse_list

    policies = parse_list(args.depth, files=True)
    result = through_harness(args, policies) if args.tasks else own_task(args, policies)
    if args.json:
        write_json(args.json, result)


def check_sizes(args: Any) -> None:
    """Raises: InputError."""
    for name, least in (("limit", 0), ("batch_size", 1)):
        if getattr(args, name) < least:
            raise InputError(f"--{name.replace('_', '-')} {getattr(args, name)} is too small")


class Asked(NamedTuple):
    """A task with all its items, those that are to be measured, and what of the settings no model has a part in."""

    task: Any
    every: list[Any]
    items: list[Any]
    settings: dict[str, Any]


def asked(args: Any, policies: Sequence[Any]) -> Asked:
    """What --task, --data, --limit, --measure and --batch-size ask for, before any model is read.

    Raises: InputError where they do not go together, or the items cannot be read.
    """
    from sst_jax.lab.evaluation import tasks

    task = tasks.find(args.task)
    if args.measure == "loss" and not task.worked:
        raise InputError(f"--measure loss needs worked answers, which {task.name} has none of")
    if args.measure == "loss" and not all(policy.is_flat for policy in policies):
        raise InputError(f"--depth {args.depth}: a known text is scored at flat depths, such as 1,2,4")
    every = task.read(args.data)
    items = every[: args.limit or None]
    settings = {
        "task": task.name,
        "measure": args.measure,
        "policies": [policy.name for policy in policies],
        "items": len(items),
        "items_sha256": tasks.items_digest(items),
        "data": args.data,
        "batch_size": args.batch_size,
    }
    return Asked(task, every, items, settings)


def open_model(args: Any, policies: Sequence[Any]) -> tuple[Any, str]:
    """The model, and the format of prompts.

    Raises: InputError where a policy needs a stream that the model does not have.
    """
    from sst_jax.inference.halting_probe import Probe
    from sst_jax.inference.model import load

    model = load(args.model, args.dtype)
    deep = [policy.name for policy in policies if policy.max_depth > 1]
    if deep and model.config.stream is None:
        raise InputError(f"--depth {deep[0]} needs a model with a stream; {args.model} is a plain backbone")
    for policy in policies:
        if isinstance(policy.select_depth, Probe):
            policy.select_depth.check(model)
    return model, args.format or model.prompts


def identity(model: Any) -> dict[str, Any]:
    """What says which model it is: of the base, and of the run's checkpoint where it is one."""
    names = ("kind", "path", "digest", "dtype", "quantize", "run", "step")
    return {name: model.facts.get(name) for name in names}


def own_task(args: Any, policies: Sequence[Any]) -> dict[str, Any]:
    """One of this project's tasks."""
    # Everything that can be wrong with the input shows before the model is read.
    for flag in ("fewshot", "include"):
        if getattr(args, flag) is not None:
            raise InputError(f"--{flag} goes with --tasks")
    task, every, items, settings = asked(args, policies)

    from sst_jax.console.progress import bar
    from sst_jax.lab.evaluation import contamination, runner
    from sst_jax.lab.evaluation.extractors import second_opinion_by
    from sst_jax.lab.evaluation.summary import summarise
    from sst_jax.training.run import environment

    out = Path(args.out)
    model, format = open_model(args, policies)
    overlap = contamination.check(model.facts.get("recipe"), every, args.allow_overlap)
    answering = args.measure == "answers"
    room = (args.max_new_tokens or task.max_new_tokens) if answering else 0
    # A base model goes on to ask itself the next question; the harness stops GSM8K at the same word.
    stop = ["Question:"] if answering and format == "plain" else []
    prompt = runner.prompts(model, items, format, room)
    header = {
        **settings,
        "model": identity(model),
        "format": format,
        "stop": stop,
        "max_new_tokens": room,
        "first_prompt": model.tokenizer.decode(prompt[items[0].id]),
        "first_prompt_tokens": prompt[items[0].id],
        "second_opinion_by": second_opinion_by() if answering and task.checkable else None,
        "environment": environment(),
    }
    plan = runner.batches(policies, items, args.batch_size)
    measure = functools.partial(runner.losses, model, format)
    if answering:
        check = header["second_opinion_by"] is not None
        measure = functools.partial(runner.answer, model, task, prompt, stop, room, check)
    folder = runner.Folder(out, header, items)
    try:
        with bar(len(policies) * len(items), f"{task.name}, depth {args.depth}", "item") as meter:
            outcomes = runner.run(folder, plan, measure, meter.update)
    finally:
        folder.close()
    result = {**header, **summarise(items, outcomes, args.measure), "overlap": overlap}
    write_json(out / runner.RESULT, result)
    report(result, out)
    return result


def report(result: dict[str, Any], out: Path) -> None:
    """The summary that a person reads."""
    print(f"{result['task']}, {result['items']} items, {result['format']} prompts, {result['model']['path']}")
    for policy, found in result["policies"].items():
        if result["measure"] == "loss":
            loss = found["nats_per_token"]
            low, high = ("-" if loss[end] is None else f"{loss[end]:.4f}" for end in ("low", "high"))
            print(
                f"depth {policy:<20} loss {loss['value']:.4f} [{low}, {high}] nats per token; "
                f"written greedily {found['greedy']['value']:.1%}"
            )
            continue
        strict, flexible = found["strict"], found["flexible"]
        print(
            f"depth {policy:<20} {strict['value']:6.1%} [{strict['low']:.1%}, {strict['high']:.1%}] strict, "
            f"{flexible['value']:.1%} flexible; unparsed {found['unparsed']['strict']}, truncated {found['truncated']}"
        )
        opinion = found["second_opinion"]
        apart = len(opinion["only_strict_says_right"]), len(opinion["only_second_says_right"])
        if opinion["asked"]:
            print(
                f"{'':26} {result['second_opinion_by']} agrees on {opinion['asked'] - sum(apart)} of "
                f"{opinion['asked']}; "
                f"it rejects {apart[0]} right ones and accepts {apart[1]} wrong ones"
            )
    for change in result.get("between_policies", []):
        print(
            f"depth {change['from']} -> {change['to']}: {change['broken']} broken, {change['mended']} mended, "
            f"p {change['p']:.3g}, Holm {change['p_holm']:.3g}"
        )
    if "oracle" in result:
        union, noise = result["oracle"]["union"], result["oracle"]["noise_control"]
        print(
            f"oracle, not a score: right at any depth {union['value']:.1%}; by redrawing as many answers at random "
            f"{noise['value']:.1%} [{noise['low']:.1%}, {noise['high']:.1%}]"
        )
    overlap = result["overlap"]
    shared = f"{len(overlap['same_question'])} test questions in training" if overlap["checked"] else overlap["reason"]
    print(f"train/test overlap: {shared}\noutcomes: {out}")


def through_harness(args: Any, policies: Sequence[Any]) -> dict[str, Any]:
    """Tasks of lm-evaluation-harness, once for each depth."""
    for flag, usual in (("data", None), ("measure", "answers"), ("max_new_tokens", None), ("allow_overlap", False)):
        if getattr(args, flag) != usual:
            raise InputError(
                f"--{flag.replace('_', '-')} goes with --task; the harness's tasks say such things themselves"
            )
    if not all(policy.is_flat for policy in policies):
        raise InputError(f"--depth {args.depth}: the harness runs at flat depths, such as 1,2,4")
    try:
        from sst_jax.lab.evaluation import harness
    except ImportError as error:
        raise InputError(f"--tasks needs lm-evaluation-harness: pip install 'sst-jax[eval]' ({error})") from None
    from sst_jax.lab.evaluation import runner

    out = folder_for("--out", args.out)
    if (out / runner.HEADER).is_file():
        raise InputError(f"--out {out} holds an evaluation of --task: choose another folder")
    names = [name for name in args.tasks.split(",") if name]
    manager = harness.task_manager(args.include)
    harness.check_names(manager, names)
    model, format = open_model(args, policies)
    header = {
        "tasks": names,
        "model": identity(model),
        "format": format, "limit": args.limit, "fewshot": args.fewshot, "batch_size": args.batch_size,
        "include": harness.definitions(args.include),
    }  # fmt: skip
    found = {}
    with runner.locked(out):
        for policy in policies:
            found[policy.name] = harness.measure(
                model,
                policy.first,
                names,
                manager,
                out,
                header,
                chat=format == "chat",
                limit=args.limit or None,
                fewshot=args.fewshot,
                batch_size=args.batch_size,
            )
        # What other depths came to earlier, under the same settings, stays in the result.
        result = {**header, "policies": harness.measured(out, header)}
        write_json(out / "result.json", result)
    for policy, results in found.items():
        for task, metrics in results.items():
            shown = ", ".join(f"{name} {value:.4f}" for name, value in metrics.items() if isinstance(value, float))
            print(f"depth {policy:<6} {task}: {shown}")
    return result


if __name__ == "__main__":
    sys.exit(run(main))
