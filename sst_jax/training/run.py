"""The run folder: who may write in it, what it records, and where a resumed run begins.

RUN/config.json       recipe and model config       RUN/metrics.jsonl    a line a logged step
RUN/base.json         the base it stands on         RUN/samples.jsonl    answers at several depths
RUN/environment.json  versions                      RUN/figures/         learning curve
RUN/checkpoints/      see weights/checkpoint.py     RUN/tensorboard/     the metrics again
RUN/bad_batches/      of steps that were skipped    RUN/stall.txt        stacks, where no step came for long
RUN/chat_template.jinja  the one of data.chat_template
RUN/tokenizer/        of an adapter that the run started from
RUN/best.json         the checkpoint that it opens as, where train.keep_best asks for the best one
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib.metadata
import json
import math
import platform
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

import jax
import numpy as np
from safetensors.numpy import save_file

from sst_jax.console.command import write_json
from sst_jax.data.chat_template import TEMPLATE_FILE
from sst_jax.data.tokenizer_identity import changes
from sst_jax.errors import InputError, RunInterrupted
from sst_jax.files import diff, read_json
from sst_jax.model.config import ModelConfig
from sst_jax.training.identity import check_changes
from sst_jax.training.loggers import LOGGERS, Logger
from sst_jax.training.recipe import RENAMED, RETIRED, default_record
from sst_jax.types import HostArrays, Json, ReadOnlyJson
from sst_jax.weights.checkpoint import BEST, newest_good, read_metrics
from sst_jax.weights.run_tokenizer import TOKENIZER_FOLDER

PACKAGES = ("sst-jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "transformers")
# Knobs that say how long a run is and what is seen of it: with --allow-changed it resumes with others.
RESUMABLE = tuple(
    f"train.{name}"
    for name in ("steps", "log_every", "eval_every", "sample_every", "save_every", "keep", "max_skipped", "loggers")
)


class RunFolder:
    """An open run folder, locked against a second process until `close`.

    Of the processes of one run the first writes; for the others, `writes=False`, nothing here does anything.
    """

    def __init__(
        self,
        path: Path,
        config: Json,
        base: Json,
        *,
        writes: bool = True,
        defaults: Json | None = None,
        allow_changed: bool = False,
    ):
        """Open a new folder, or one that holds a run of the same config on the same base and data.

        Args:
            path: the folder.
            config: what config.json holds: "recipe", and "model_config" and "data" where one model is trained.
            base: what base.json holds: which weights the run stands on, "path" and "digest" among it.
            writes: whether this process is the one that writes.
            defaults: as `check_recipe` takes them.
            allow_changed: whether a run resumes where base, data or RESUMABLE have changed, which config.json records.

        Raises: InputError with the differing keys, or when another process has the folder, or it holds something else.
        """
        self.path, self.writes = path, writes
        self._lock: TextIO | None = None
        self._metrics: TextIO | None = None
        self._loggers: list[Logger] = []
        if not writes:
            return
        differing = check(path, config, base, defaults, allow_changed)
        if not allow_changed:
            check_changes(str(path), differing)
        try:
            path.mkdir(parents=True, exist_ok=True)
            self._lock = (path / ".lock").open("w")
        except OSError as error:
            raise InputError(f"--workdir {path} cannot be written to: {error.strerror}") from None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._lock.close()
            raise InputError(
                f"another process is training in {path}: wait for it, or choose another --workdir"
            ) from None
        if not (path / "config.json").is_file():
            write_json(path / "base.json", base)
            write_json(path / "config.json", config)
        elif differing:
            self._record_changes(config, base, differing)
        write_json(path / "environment.json", environment())

    def _record_changes(self, config: Json, base: Json, differing: list[str]) -> None:
        """Write what a run resumes with, and under "changed" what it had before, and up to which step."""
        file, base_file = self.path / "config.json", self.path / "base.json"
        there, before = read_json(file), {"base": read_json(base_file)}
        names = ("data", "recipe") if any(what.startswith(RESUMABLE) for what in differing) else ("data",)
        before |= {key: there[key] for key in names if key in there}
        change = {"step": newest_good(self.path) or 0, "what": differing, "before": before}
        # The base first: killed in between, the same command comes here again.
        write_json(base_file, base)
        kept = {key: config[key] for key in names if key in there}
        write_json(file, {**there, **kept, "changed": [*there.get("changed", []), change]})

    def start_log(self, step: int, loggers: Sequence[str] = ()) -> None:
        """Open the logs, dropping what an interrupted run wrote of `step` and later.

        loggers: keys of `LOGGERS`.
        """
        if not self.writes:
            return
        for file, lines in (
            (self.path / "metrics.jsonl", read_metrics(self.path)),
            (self.samples_file, self.samples()),
        ):
            kept = [line for line in lines if line["step"] < step] if step else []
            temporary = file.with_suffix(".partial")
            temporary.write_text("".join(json.dumps(line) + "\n" for line in kept))
            temporary.replace(file)
        self._metrics = (self.path / "metrics.jsonl").open("a")
        config = read_json(self.path / "config.json")
        self._loggers = [LOGGERS[name](self.path, step, config) for name in loggers]

    def log(self, step: int, values: dict[str, float]) -> None:
        """Append a line of metrics; `start_log` comes before it."""
        if self._metrics is None:
            return
        values = {name: value for name, value in values.items() if math.isfinite(value)}  # JSON has no other
        self._metrics.write(json.dumps({"step": step, **values}) + "\n")
        self._metrics.flush()
        for logger in self._loggers:
            logger.log(step, values)

    def log_samples(self, step: int, samples: Sequence[Json]) -> None:
        """Append answers to samples.jsonl."""
        if not self.writes:
            return
        with self.samples_file.open("a") as file:
            file.writelines(json.dumps(sample) + "\n" for sample in samples)
        for logger in self._loggers:
            for sample in samples:
                logger.text(step, f"answer, depth {sample['depth']}", f"{sample['question']}\n{sample['answer']}")

    @property
    def samples_file(self) -> Path:
        return self.path / "samples.jsonl"

    def samples(self) -> list[Json]:
        """Return the answers in samples.jsonl that say of which step they are: those of version 0.1.0 do not."""
        lines = self.samples_file.read_text().splitlines() if self.samples_file.is_file() else []
        found = []
        for line in lines:
            with contextlib.suppress(ValueError):
                found.append(json.loads(line))
        return [sample for sample in found if isinstance(sample, dict) and isinstance(sample.get("step"), int)]

    def keep_template(self, source: str) -> None:
        """Keep the chat template that the run is trained with, so that it opens with it."""
        if self.writes:
            (self.path / TEMPLATE_FILE).write_text(source, encoding="utf-8")

    def keep_tokenizer(self, files: Mapping[str, bytes]) -> None:
        """Keep the tokenizer that the run is trained with, where it is not its base's."""
        if self.writes:
            (self.path / TOKENIZER_FOLDER).mkdir(exist_ok=True)
            for name, data in files.items():
                (self.path / TOKENIZER_FOLDER / name).write_bytes(data)

    def write_best(self, best: Json) -> None:
        """Record which checkpoint the run opens as."""
        if self.writes:
            write_json(self.path / BEST, best)

    def check_there(self) -> None:
        """Raise RunInterrupted where the folder has been removed under the run: saving would make half of it anew."""
        if self.writes and not (self.path / "config.json").is_file():
            raise RunInterrupted(
                f"the run folder {self.path} is gone: put it back, or begin again with the same command"
            )

    def keep_batch(self, step: int, batch: HostArrays, keep: int) -> Path:
        """Write a skipped step's batch to bad_batches/STEP.safetensors; of these the newest `keep` stay."""
        folder = self.path / "bad_batches"
        file = folder / f"{step}.safetensors"
        if self.writes:
            folder.mkdir(exist_ok=True)
            save_file({name: np.ascontiguousarray(value) for name, value in batch.items()}, file)
            for old in sorted(folder.glob("*.safetensors"), key=lambda old: int(old.stem))[:-keep]:
                old.unlink()
        return file

    def close(self) -> None:
        """Close the logs and unlock the folder."""
        for file in (self._metrics, *self._loggers, self._lock):
            if file is not None:
                file.close()


def check_recipe(
    path: Path, recipe: Json, defaults: Json | None = None, allow_changed: bool | None = None
) -> list[str]:
    """Check what can be said of a run folder before the model is read.

    Args:
        path: the run folder.
        recipe: of the run that is to train in it, as it is recorded.
        defaults: what a knob is that an earlier version did not record. None: the defaults of `recipe.defaults`.
        allow_changed: whether knobs of RESUMABLE may differ; None: they may not, and nothing can be said to allow it.

    Returns:
        Which of these differ, each in words.

    Raises: InputError unless `path` is new, empty, or holds a run of the same recipe.
    """
    if path.exists() and not path.is_dir():
        raise InputError(f"--workdir {path} is not a folder")
    if not (path / "config.json").is_file():
        strangers = sorted(entry.name for entry in path.iterdir() if entry.name != ".lock") if path.is_dir() else []
        # A run that was killed before its first record leaves base.json alone.
        if strangers and strangers != ["base.json"]:
            raise InputError(f"--workdir {path} holds {strangers[0]} but no run: choose an empty folder")
        return []
    if defaults is None:
        defaults = default_record()
    there = read_json(path / "config.json").get("recipe") or {}
    before, now = comparable(there, defaults), comparable(recipe, defaults)
    differing = [name for name in RESUMABLE if before.get(name) != now.get(name)]
    words = [f"{name} ({before.get(name)!r} there, {now.get(name)!r} now)" for name in differing]
    if allow_changed:
        before |= {name: now[name] for name in differing}
    elif allow_changed is not None and differing and before | {name: now[name] for name in differing} == now:
        check_changes(str(path), words)
    _check_same(path, {"recipe": before}, {"recipe": now})
    return words


def comparable(recorded: Json, defaults: Json) -> Json:
    """Return a recorded recipe, of whatever version, as knobs by their present dotted names, all of them.

    A knob that it lacks has its default; one that is no more is left out where it had no effect.
    """
    knobs = {RENAMED.get(key, key): value for key, value in _by_dotted_name(recorded)}
    kept = {key: value for key, value in knobs.items() if key not in RETIRED or RETIRED[key] != value}
    return {**dict(_by_dotted_name(defaults)), **kept}


def _by_dotted_name(tree: ReadOnlyJson, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _by_dotted_name(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def check(path: Path, config: Json, base: Json, defaults: Json | None, allow_changed: bool) -> list[str]:
    """Return in words what of a run's inputs differs from those of the run that a folder holds; of a new one nothing.

    Raises: InputError unless `path` is new, empty, or holds a run of the same config.
    """
    knobs = check_recipe(path, config["recipe"], defaults, allow_changed)
    if not (path / "config.json").is_file():
        return []
    there = read_json(path / "config.json")
    if "model_config" in there and "model_config" in config:  # read, so that fields of later versions are there too
        models = [ModelConfig.from_dict(record["model_config"]).to_dict() for record in (there, config)]
        _check_same(path, *({"model_config": json.loads(json.dumps(model))} for model in models))
    recorded, differing = read_json(path / "base.json"), knobs
    if recorded.get("digest") != base["digest"]:
        differing.append(
            f"base ({recorded.get('path')}, {str(recorded.get('digest'))[:12]} there, {base['path']}, "
            f"{base['digest'][:12]} now)"
        )
    data = there.get("data")  # None of version 0.1.0
    return differing + (changes(data, config.get("data", {})) if isinstance(data, dict) else [])


def _check_same(path: Path, there: Json, now: Json) -> None:
    """Raise InputError with the first differences of two configs."""
    differences = diff(there, now)
    if differences:
        shown = "; ".join(f"{key}: {old!r} there, {new!r} now" for key, old, new in differences[:6])
        more = f" and {len(differences) - 6} more" if len(differences) > 6 else ""
        raise InputError(
            f"{path} holds a run of another config ({shown}{more}): use its values or another --workdir; to train on "
            "from it, name it as model.source there"
        )


def environment() -> Json:
    """Return the versions and devices of this process."""
    versions: dict[str, str | None] = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    devices = [device.device_kind for device in jax.devices()]
    return {
        "python": platform.python_version(),
        "machine": platform.machine(),
        "devices": devices,
        "versions": versions,
    }
