"""What a finished run came to: answers to a held-out problem, result.json, a learning curve, and a summary."""

from __future__ import annotations

import dataclasses
import json
import shlex
from pathlib import Path

from sst_jax.console.command import called, write_json
from sst_jax.console.progress import print_line
from sst_jax.data.documents import Document
from sst_jax.data.prompts import asked_tokens
from sst_jax.inference.model import Model
from sst_jax.model.config import ModelConfig
from sst_jax.training.figures import learning_curve, scales_figure
from sst_jax.types import Json

SHOWN = 300  # characters of a held-out question that is asked again in what comes next


@dataclasses.dataclass(frozen=True)
class Sample:
    """An answer to a held-out question, at one iteration depth."""

    question: str
    expected: str
    depth: int | str
    answer: str


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
    checkpoint       path of the last checkpoint; None there too
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

    def to_json(self) -> Json:
        """Return the content of result.json."""
        return json.loads(json.dumps(dataclasses.asdict(self)))


def write_samples(model: Model, problem: Document, format: str, tokens: int) -> list[Sample]:
    """Return the model's answers of at most `tokens` tokens to a problem, at depths 1 and 4 where it has a stream."""
    depths = [1, 4] if model.config.stream else [1]
    prompt = asked_tokens(problem, model.tokenizer, format)
    answers = model.generate([prompt] * len(depths), depth=depths, max_new_tokens=tokens)
    return [Sample(problem.question, problem.result, answer.depth, answer.text) for answer in answers]


def write_report(result: RunResult, workdir: Path, config: ModelConfig) -> RunResult:
    """Write samples.jsonl, the learning curve and result.json, and print a summary; return the result with paths."""
    with (workdir / "samples.jsonl").open("w") as file:
        file.writelines(json.dumps(dataclasses.asdict(sample)) + "\n" for sample in result.samples)
    title = f"{config.backbone.family}, {result.forward}"
    figure = learning_curve(workdir, title)
    scales_figure(workdir, title)
    checkpoint = workdir / "checkpoints" / str(result.steps)
    result = dataclasses.replace(result, figure=str(figure), checkpoint=str(checkpoint))
    write_json(workdir / "result.json", result.to_json())
    print_line(describe(result, workdir, with_stream=config.stream is not None))
    return result


def describe(result: RunResult, workdir: Path, *, with_stream: bool) -> str:
    """Return the summary that a person reads: losses, answers, and the commands that come next."""
    before, after = result.heldout_before, result.heldout_after
    lines = [f"\nheld-out loss ({result.heldout_forward}): {before:.4f} -> {after:.4f} in {result.seconds:.0f} s"]
    best = min(result.heldout_loss, key=lambda step: result.heldout_loss[step])
    if best != result.steps:
        kept = workdir / "checkpoints" / str(best)
        lines[0] += f"; it was lowest at step {best}, {result.heldout_loss[best]:.4f}"
        lines[0] += f" ({kept})" * kept.is_dir()
    if result.skipped:
        lines.append(f"{result.skipped} of {result.steps} steps were skipped; batches: {workdir / 'bad_batches'}")
    first = result.samples[0]
    lines += [f"learning curve: {result.figure}", f"\nQ: {first.question}\n(expected {first.expected})"]
    lines += [f"depth {sample.depth}: {sample.answer.strip()}" for sample in result.samples]
    depth = " --depth 4" if with_stream else ""
    question = shlex.quote(first.question if 0 < len(first.question) <= SHOWN else "How many are 3 boxes of 4 pens?")
    run, merged = shlex.quote(str(workdir)), shlex.quote(f"{workdir}-merged")
    lines += [
        "\nnext:",
        f"  {called('generate')} --model {run}{depth} --question {question}",
        f"  {called('export')} --from {run} --to {merged} --format merged",
    ]
    return "\n".join(lines)
