"""Where a run's metrics go beside metrics.jsonl: TensorBoard, Weights & Biases. One interface, an entry each."""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Protocol, runtime_checkable

from sst_jax.console import extras
from sst_jax.console.command import write_json
from sst_jax.files import read_json
from sst_jax.types import Json

WANDB_FILE = "wandb.json"  # in the run folder: the run's id there, by which a resumed run continues it
WANDB_PROJECT = "sst_jax"  # unless WANDB_PROJECT says otherwise


@runtime_checkable
class Logger(Protocol):
    """Takes a run's metrics. It is opened anew by each process that the run takes, one after another."""

    def log(self, step: int, values: Mapping[str, float]) -> None: ...
    def text(self, step: int, name: str, text: str) -> None: ...
    def close(self) -> None: ...


class TensorBoard:
    """Event files in RUN/tensorboard."""

    def __init__(self, run: Path, step: int, config: Json):
        from tensorboardX import SummaryWriter  # seconds, where PyTorch is installed, which it imports

        self._writer = SummaryWriter(str(run / "tensorboard"), purge_step=step)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def text(self, step: int, name: str, text: str) -> None:
        self._writer.add_text(name, text, step)

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """A run of Weights & Biases, its id kept in RUN/wandb.json. Its own environment variables apply.

    There a step is never taken back: what a killed run logged after its last checkpoint stays, and the same steps of
    the run that resumes, which are the same numbers, are left out.
    """

    def __init__(self, run: Path, step: int, config: Json):
        wandb = extras.require("wandb", "wandb", "train.loggers=wandb")
        file = run / WANDB_FILE
        identity = read_json(file)["id"] if file.is_file() else uuid.uuid4().hex[:8]
        write_json(file, {"id": identity})
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", WANDB_PROJECT),
            id=identity,
            name=run.name,
            resume="allow",
            dir=str(run),
            config=config,
        )
        self._html = wandb.Html

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def text(self, step: int, name: str, text: str) -> None:
        escaped = text.replace("&", "&amp;").replace("<", "&lt;")
        self._run.log({name: self._html(f"<pre>{escaped}</pre>")}, step=step)

    def close(self) -> None:
        self._run.finish()


# Name -> (run folder, first step that is to come, what the run's config.json holds) -> a logger.
LOGGERS: Mapping[str, Callable[[Path, int, Json], Logger]] = MappingProxyType(
    {"tensorboard": TensorBoard, "wandb": WeightsAndBiases}
)


def check_loggers(names: Sequence[str]) -> None:
    """Raise InputError where a logger's package is not installed."""
    if "wandb" in names:
        extras.check(("wandb",), "wandb", "train.loggers=wandb")
