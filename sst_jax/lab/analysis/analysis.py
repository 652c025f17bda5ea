"""An analysis as a call: texts at several iteration depths, from the model to the report.

from sst_jax.lab.analysis.analysis import AnalysisConfig, run
result = run(sst_jax.load("runs/27b"), AnalysisConfig(task="gsm8k", depths=(1, 2, 4)), Path("runs/27b/basins"))
"""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from sst_jax.console import extras
from sst_jax.console.command import write_json
from sst_jax.console.progress import bar
from sst_jax.console.version import VERSION
from sst_jax.errors import InputError
from sst_jax.files import read_json
from sst_jax.inference.halting_probe import Probe
from sst_jax.inference.model import Model
from sst_jax.lab.analysis import findings, report, texts
from sst_jax.lab.analysis.collect import Settings, Text
from sst_jax.lab.analysis.collection import collect
from sst_jax.types import Json

RESULT = "result.json"
CONTINUED = 3  # prompts whose continuations at two depths stand side by side


@dataclasses.dataclass(frozen=True)
class AnalysisConfig:
    """What is run, and how it is compared.

    prompts, task   a file of prompts, or the name of a task of `evaluate`: one of the two
    text            what follows a task's questions: "generated", or "worked", the worked answer
    data            folder with the task's file; None: from the hub, or embedded
    limit           only the first prompts (0: all)
    format          of a task's prompts, "plain" or "chat"; None: as the run was trained, else plain
    depths          ascending; the first is compared with the others
    layer           in which shifts are tested; negative: from the last one
    The others are those of `collect.Settings`.

    Raises: InputError naming the setting, by the flag of `analyze` that sets it; and where the extra is not installed.
    """

    prompts: str | None = None
    task: str | None = None
    text: str = "generated"
    data: str | None = None
    limit: int = 50
    format: str | None = None
    depths: tuple[int, ...] = (1, 4)
    max_new_tokens: int = 64
    between: str = "runs"
    what: str = "output"
    layer: int = -1
    controls: int = 10
    rounding: bool = True
    batch_size: int = 4

    def __post_init__(self) -> None:
        for name, least in (("limit", 0), ("max_new_tokens", 1), ("controls", 0), ("batch_size", 1)):
            if getattr(self, name) < least:
                raise InputError(f"--{name.replace('_', '-')} {getattr(self, name)} must be at least {least}")
        if len(self.depths) < 2 or list(self.depths) != sorted(set(self.depths)):
            raise InputError(f"--depths {self.spelled}: give two or more depths in ascending order, such as 1,4")
        if (self.prompts is None) == (self.task is None):
            raise InputError("give one of --prompts and --task")
        if self.prompts is not None:
            for name, usual in (("data", None), ("format", None), ("text", "generated")):
                if getattr(self, name) != usual:
                    raise InputError(f"--{name} goes with --task")
        extras.check(("sklearn", "diptest", "tensorstore"), "analysis", "the analysis")

    @property
    def spelled(self) -> str:
        """The depths as the flag takes them."""
        return ",".join(map(str, self.depths))

    @property
    def worked(self) -> bool:
        """Whether worked answers follow the questions."""
        return self.text == "worked"

    def collected(self) -> Settings:
        """Return what a collection depends on besides the texts and the model."""
        return Settings(
            self.depths, self.between, self.what, self.rounding, self.controls, self.max_new_tokens, self.batch_size
        )

    def to_json(self) -> Json:
        """Return the settings as result.json records them, by the names of the flags."""
        record = dataclasses.asdict(self) | {"depths": self.spelled, "no_rounding": not self.rounding}
        del record["rounding"]
        return record

    def command(self, model: Model, out: Path) -> str:
        """Return the command that runs this analysis."""
        given = [f"--model {shlex.quote(str(model.provenance.run or model.provenance.path))}"]
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value == field.default:
                continue
            flag = f"--{field.name.replace('_', '-')}"
            if field.name == "rounding":
                given.append("--no-rounding")
            else:
                given.append(f"{flag} {shlex.quote(self.spelled if field.name == 'depths' else str(value))}")
        return f"sst-jax analyze {' '.join(given)} --out {shlex.quote(str(out))}"


def read_questions(config: AnalysisConfig) -> list[texts.Question]:
    """Return the prompts or questions that a config asks for, before any model is read.

    Raises: InputError as `texts.from_file` and `texts.from_task`.
    """
    if config.prompts is not None:
        found = texts.from_file(config.prompts)
    else:
        found = texts.from_task(config.task or "", config.data, config.worked)
    return found[: config.limit or None]


def check_model(model: Model, config: AnalysisConfig, probe: Probe | None = None) -> None:
    """Raise InputError where a model has no stream or no such layer, or the probe is another model's."""
    layers = model.config.backbone.num_layers
    if model.config.stream is None:
        name = model.provenance.path or "of these parameters"
        raise InputError(f"--model {name} has no stream: there is nothing that further iterations could change")
    if model.config.stream.is_linked and config.controls:
        raise InputError(
            f"--controls {config.controls}: states are swapped inside a layer, and stream.links="
            f"{model.config.stream.links} carry them between layers: use --controls 0"
        )
    if not -layers <= config.layer < layers:
        raise InputError(f"--layer {config.layer}: the model has layers 0 to {layers - 1}")
    if probe is not None:
        probe.check(model)


def run(
    model: Model,
    config: AnalysisConfig,
    out: Path,
    questions: list[texts.Question] | None = None,
    probe: Probe | None = None,
) -> Json:
    """Analyze a model into a folder; resume what an earlier call with the same settings left there.

    Args:
        model: with a stream.
        config: what is run and compared.
        out: a folder that is new, empty, or holds an analysis of the same settings, texts and model.
        questions: the texts, where `read_questions(config)` has read them already; None: they are read here.
        probe: one whose scores the page shows too.

    Returns:
        What DIR/result.json holds. DIR/report.html is the page, DIR/figures/ its figures, DIR/collected/ the states.

    Raises: InputError as `read_questions` and `check_model`, and where the folder holds something else.
    """
    questions = read_questions(config) if questions is None else questions
    check_model(model, config, probe)
    settings, layer = config.collected(), config.layer % model.config.backbone.num_layers
    asked = texts.tokenised(questions, model, config.format, config.worked)
    with bar(len(asked), f"running texts at depths {config.spelled}", "problem") as meter:
        collection = collect(model, asked, settings, out / "collected", meter.update)
    with bar(len(asked), "measuring", "problem") as meter:
        found = findings.measure(model, collection, settings, layer, meter.update)
    recorded = {**config.to_json(), "out": str(out), "probe": None if probe is None else probe.path}
    before = read_json(out / RESULT) if (out / RESULT).is_file() else {}
    result = {
        "model": {**model.provenance.to_json(), "recipe": None},
        "settings": recorded,
        "command": config.command(model, out),
        "date": before.get("date") or f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",  # when it was run first
        "version": VERSION,
        **found.result,
        "continuations": continuations(model, asked, config),
    }
    write_json(out / RESULT, result)
    report.write(out, found._replace(result=result), model, probe)
    return result


def continuations(model: Model, asked: Sequence[Text], config: AnalysisConfig) -> list[Json]:
    """Return what the model writes after some prompts at the first depth and at the last, greedily.

    Prompts that leave no room for it are left out.
    """
    most = model.config.backbone.position_limit - config.max_new_tokens
    asked = [text for text in asked if len(text.prompt) <= most][:CONTINUED]
    if not asked:
        return []
    depths = [config.depths[0], config.depths[-1]]
    prompts = [text.prompt for text in asked for _ in depths]
    answers = iter(model.generate(prompts, depth=depths * len(asked), max_new_tokens=config.max_new_tokens))
    return [
        {
            "id": text.id,
            "prompt": model.tokenizer.decode(text.prompt),
            "answers": [{"depth": depth, "text": next(answers).text} for depth in depths],
        }
        for text in asked
    ]
