"""What a finished run came to: answers to a held-out problem, result.json, a learning curve, and a summary."""

from __future__ import annotations

import dataclasses
import json
import shlex
from pathlib import Path

from sst_jax.console.command import called, write_json
from sst_jax.console.progress import counted, print_line
from sst_jax.data.documents import Document
from sst_jax.data.prompts import asked_tokens
from sst_jax.inference.model import Model
from sst_jax.training.figures import learning_curve, scales_figure
from sst_jax.training.run import RunFolder
from sst_jax.training.scoring import Score
from sst_jax.types import Json

SHOWN = 300  # characters of a held-out question that is asked again in what comes next


@dataclasses.dataclass(frozen=True)
class Sample:
    """An answer to a held-out question, at one iteration depth, by the model as it was after `step` steps."""

    question: str
    expected: str
    depth: int | str
    answer: str
    step: int = 0


@dataclasses.dataclass(frozen=True)
class RunResult:
    """What RUN/result.json holds.

    steps            steps done
    forward          the forward that trained
    heldout_forward  the forward that held-out losses were evaluated with
    heldout_loss     nats per answer token by step
    heldout_before   of these the one before the first step; heldout_after the one after the last
    skipped          steps that changed nothing, as their numbers were not finite
    seconds          spent training, over all processes that the run took one after another
    samples          answers to one held-out problem
    figure           path of the learning curve; None in processes that write nothing
    checkpoint       path of the checkpoint that the run opens as; None there too
    scores           of train.eval_task by step: questions answered right, and asked
    kept             step of the checkpoint that the run opens as, and that answered
    stopped_early    whether train.patience ended the run
    before           answers to the same problem before the first step, where train.sample_every asks for them
    """

    steps: int
    forward: str
    heldout_forward: str
    heldout_loss: dict[int, float]
    heldout_before: float
    heldout_after: float
    skipped: int
    seconds: float
    samples: list[Sample]
    figure: str | None = None
    checkpoint: str | None = None
    scores: dict[int, Score] = dataclasses.field(default_factory=dict)
    kept: int | None = None
    stopped_early: bool = False
    before: list[Sample] = dataclasses.field(default_factory=list)

    def to_json(self) -> Json:
        """Return the content of result.json."""
        return json.loads(json.dumps(dataclasses.asdict(self)))


def write_samples(model: Model, problem: Document, format: str, tokens: int, step: int) -> list[Sample]:
    """Return the answers that a model has after `step` steps to a problem, at depths 1 and 4 where it has a stream."""
    depths = [1, 4] if model.config.stream else [1]
    prompt = asked_tokens(problem, model.tokenizer, format)
    answers = model.generate([prompt] * len(depths), depth=depths, max_new_tokens=tokens)
    return [Sample(problem.question, problem.result, answer.depth, answer.text, step) for answer in answers]


def write_report(
    result: RunResult, folder: RunFolder, title: str, *, with_stream: bool, brief: bool = False
) -> RunResult:
    """Write samples.jsonl, the learning curve and result.json, and print a summary; return the result with paths."""
    workdir, there = folder.path, folder.samples()
    known = [(sample["step"], sample["depth"]) for sample in there]
    fresh = [sample for sample in result.samples if (sample.step, sample.depth) not in known]
    folder.log_samples(result.steps, [dataclasses.asdict(sample) for sample in fresh])
    figure = learning_curve(workdir, title, {step: (*score, *score.interval) for step, score in result.scores.items()})
    scales_figure(workdir, title)
    kept = result.steps if result.kept is None else result.kept
    result = dataclasses.replace(
        result,
        figure=str(figure),
        checkpoint=str(workdir / "checkpoints" / str(kept)),
        before=[Sample(**sample) for sample in there if sample["step"] == 0],
    )
    write_json(workdir / "result.json", result.to_json())
    print_line(describe(result, workdir, with_stream=with_stream, brief=brief))
    return result


def describe(result: RunResult, workdir: Path, *, with_stream: bool, brief: bool = False) -> str:
    """Return the summary that a person reads: losses, and unless `brief`, answers and the commands that come next."""
    before, after = result.heldout_before, result.heldout_after
    lines = [f"\nheld-out loss ({result.heldout_forward}): {before:.4f} -> {after:.4f} in {result.seconds:.0f} s"]
    best = min(result.heldout_loss, key=lambda step: result.heldout_loss[step])
    if best != result.steps:
        kept = workdir / "checkpoints" / str(best)
        lines[0] += f"; it was lowest at step {best}, {result.heldout_loss[best]:.4f}"
        lines[0] += f" ({kept})" * kept.is_dir()
    if result.scores:
        lines.append(f"accuracy: {result.scores[0]} before, {result.scores[result.steps]} after")
    if result.stopped_early:
        lines.append(f"stopped at step {result.steps}: the evaluations before were no better than that of step {best}")
    if result.kept not in (None, result.steps):
        lines.append(f"the run opens as its best checkpoint, {result.checkpoint}")
    if result.skipped:
        lines.append(f"{result.skipped} of {counted(result.steps, 'step')} skipped; batches: {workdir / 'bad_batches'}")
    first = result.samples[0]
    lines.append(f"learning curve: {result.figure}")
    if brief:
        return "\n".join(lines)
    lines += [f"\nQ: {first.question}\n(expected {first.expected})"]
    for when, samples in (("before training, ", result.before), ("", result.samples)):
        lines += [f"{when}depth {sample.depth}: {sample.answer.strip()}" for sample in samples]
    depth = " --depth 4" if with_stream else ""
    question = shlex.quote(first.question if 0 < len(first.question) <= SHOWN else "How many are 3 boxes of 4 pens?")
    run, merged = shlex.quote(str(workdir)), shlex.quote(f"{workdir}-merged")
    lines += [
        "\nnext:",
        f"  {called('generate')} --model {run}{depth} --question {question}",
        f"  {called('export')} --from {run} --to {merged} --format merged",
    ]
    return "\n".join(lines)
