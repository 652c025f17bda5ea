"""Checkpoints of a training run: what training changes, the optimizer, the data iterator's place. Never the base.

    RUN/config.json       the resolved recipe and the model's config
    RUN/base.json         which base the run stands on: path, type, digest
    RUN/checkpoints/STEP/ Orbax: trainable, optimizer, data, meta
    RUN/manifests/STEP.json  SHA-256 of every file of that step, written last: without it a step does not count

Orbax restores a flipped byte in silence; the manifest is how a damaged step is noticed and the one before it used.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Protocol, TypeVar, runtime_checkable

import jax
import orbax.checkpoint as ocp

from sst_jax.console.command import write_json
from sst_jax.errors import InputError, RunInterrupted
from sst_jax.files import disk_error, quiet_orbax, read_json, sha256
from sst_jax.model.sharding import sharding_of
from sst_jax.types import AnyArray, Json, Params

log = logging.getLogger(__name__)
Tree = TypeVar("Tree")
BEST = "best.json"  # in a run folder: {"step": ..., ...} of the checkpoint that it opens as
TORN = ".orbax-checkpoint-tmp"  # ends the name of a step that is being written


@runtime_checkable
class DataIterator(Protocol):
    """An iterator that says where it is, as grain's do."""

    def get_state(self) -> Json: ...
    def set_state(self, state: Json) -> None: ...


class Checkpoints:
    """The checkpoints of one run folder.

    Saving is synchronous: adapters and their optimizer are megabytes, and a step that returned is on disk.
    """

    def __init__(self, run: Path, keep: int = 2):
        self.folder = (run / "checkpoints").absolute()
        self.manifests = (run / "manifests").absolute()
        self.keep = keep
        self.best: int | None = None  # a step that stays whatever `keep` says
        if not jax.process_index():  # what a killed save left behind takes room
            for torn in self.folder.glob(f"*{TORN}"):
                shutil.rmtree(torn, ignore_errors=True)
        options = ocp.CheckpointManagerOptions(enable_async_checkpointing=False, create=True)
        self.manager = ocp.CheckpointManager(self.folder, options=options)

    def save(self, step: int, trainable: Params, optimizer: Tree, iterator: DataIterator, meta: Json) -> None:
        """Write the step, then its manifest; only then older steps beyond `keep` go.

        Raises: RunInterrupted where the disk does not take it; the checkpoints before it stay.
        """
        try:
            self._save(step, trainable, optimizer, iterator, meta)
        except (OSError, ValueError) as error:  # ValueError is TensorStore's for all that a disk may say
            shutil.rmtree(self.folder / f"{step}{TORN}", ignore_errors=True)
            reason = disk_error(error) or " ".join(str(error).split())[-200:]
            raise RunInterrupted(
                f"checkpoint {self.folder / str(step)} cannot be written: {reason}\nThe newest good one is "
                f"{self.latest_good() or 'the beginning'}; make room or repair the disk, then the same command resumes"
            ) from error

    def _save(self, step: int, trainable: Params, optimizer: Tree, iterator: DataIterator, meta: Json) -> None:
        import grain

        if step in self.manager.all_steps():  # a step that had been found damaged
            self.manager.delete(step)
        items = {
            "trainable": ocp.args.StandardSave(trainable),
            "optimizer": ocp.args.StandardSave(optimizer),
            "meta": ocp.args.JsonSave(meta),
            "data": grain.checkpoint.CheckpointSave(iterator),
        }
        with quiet_orbax():
            self.manager.save(step, args=ocp.args.Composite(**items), force=True)
            self.manager.wait_until_finished()
        if not jax.process_index():  # the first process vouches for what all have written
            files = {name: sha256(file) for name, file in _files(self.folder / str(step))}
            write_json(self.manifests / f"{step}.json", {"sha256": files})
        # Not left to Orbax, which would remove the last good step before the manifest makes this one count.
        # Later steps were found damaged, or the run would have gone on from them: none of those to keep.
        steps = sorted(self.manager.all_steps())
        end = steps.index(step) + 1
        for old in steps[: max(end - self.keep, 0)] + steps[end:]:
            if old != self.best:
                self.manager.delete(old)
        kept = set(self.manager.all_steps())
        for manifest in () if jax.process_index() else self.manifests.glob("*.json"):
            if manifest.stem.isdigit() and int(manifest.stem) not in kept:
                manifest.unlink()

    def latest_good(self) -> int | None:
        """Return the newest step whose files are all as they were written; warn of those that are passed over."""
        return newest_good(self.folder.parent, warn=log.warning)

    def restore(
        self, step: int, trainable: Params, optimizer: Tree, iterator: DataIterator
    ) -> tuple[Params, Tree, Json]:
        """Return (trainable, optimizer, meta), shaped and placed as the given trees; set the iterator to its place."""
        restored = self.manager.restore(
            step,
            args=ocp.args.Composite(
                trainable=ocp.args.StandardRestore(_abstract(trainable)),
                optimizer=ocp.args.StandardRestore(_abstract(optimizer)),
                meta=ocp.args.JsonRestore(),
            ),
        )
        # Every process goes through the same batches, so any number of them resumes from the place of the first.
        (place,) = (self.folder / str(step) / "data").glob("process_0-of-*.json")
        iterator.set_state(read_json(place))
        return restored["trainable"], restored["optimizer"], restored["meta"]

    def optimizer_fields(self, step: int) -> set[str]:
        """Return the names at the top of a step's optimizer state.

        Raises: InputError where the step does not say.
        """
        file = self.folder / str(step) / "optimizer" / "_METADATA"
        try:
            return {leaf["key_metadata"][0]["key"] for leaf in read_json(file)["tree_metadata"].values()}
        except (KeyError, IndexError, TypeError, AttributeError):
            raise InputError(f"{file} does not say what it holds") from None

    def close(self) -> None:
        self.manager.close()


def newest_good(run: Path, warn: Callable[[str], None] = log.warning) -> int | None:
    """Return the newest step of a run folder that its manifest vouches for, or None."""
    folder = run / "checkpoints"
    if not folder.is_dir():
        return None
    steps = sorted((int(entry.name) for entry in folder.iterdir() if entry.name.isdigit()), reverse=True)
    for step in steps:
        problem = damage(run, step)
        if problem is None:
            return step
        warn(f"checkpoint {folder / str(step)} is not used: {problem}")
    return None


def damage(run: Path, step: int) -> str | None:
    """Return what is wrong with a step's files, or None."""
    manifest, folder = run / "manifests" / f"{step}.json", run / "checkpoints" / str(step)
    if not manifest.is_file():
        return "its manifest is missing, so it was never finished"
    try:
        listed = read_json(manifest)["sha256"]
        present = dict(_files(folder))
        if sorted(listed) != sorted(present):
            return f"its files are not those of its manifest: {sorted(set(listed) ^ set(present))[0]}"
        for name, expected in listed.items():
            if sha256(present[name]) != expected:
                return f"{name} has changed since it was written"
    except (InputError, KeyError, TypeError, AttributeError) as error:
        return f"its manifest is unreadable ({error})"
    except OSError as error:
        return f"it cannot be read ({error})"
    return None


def restore_trainable(run: Path, step: int, trainable: Params) -> Params:
    """Return adapter and blend of a step, in the shapes of `trainable`, without optimizer or data.

    Raises: InputError where the step holds others than those.
    """
    folder = (run / "checkpoints" / str(step) / "trainable").absolute()
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            return checkpointer.restore(folder, _abstract(trainable))
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{folder} does not hold what {run / 'config.json'} says was trained") from error


def chosen_step(run: Path) -> int | None:
    """Return the step that a run opens as: its best one where it has recorded that and the step is good, else the
    newest good one; None where there is none.
    """
    if (run / BEST).is_file():
        best = read_json(run / BEST).get("step")
        if isinstance(best, int) and damage(run, best) is None:
            return best
        log.warning(f"checkpoint {best}, which {run / BEST} names, is not used: it is not there, or damaged")
    return newest_good(run)


def read_metrics(run: Path) -> list[Json]:
    """Return the lines of a run's metrics.jsonl; a last line cut off by a kill is left out.

    Raises: InputError naming a line that is none of metrics.
    """
    file = run / "metrics.jsonl"
    *whole, torn = file.read_bytes().split(b"\n") if file.is_file() else [b""]
    lines = []
    for number, text in enumerate([*whole, torn], 1):
        try:
            line = json.loads(text)
            if not isinstance(line, dict) or not isinstance(line.get("step"), int):
                raise ValueError("needs a step")
            lines.append(line)
        except (ValueError, RecursionError) as error:
            if number <= len(whole):
                raise InputError(f"{file}, line {number}: not a line of metrics ({error}); remove it") from None
    return lines


def _files(folder: Path) -> list[tuple[str, Path]]:
    return [(file.relative_to(folder).as_posix(), file) for file in sorted(folder.rglob("*")) if file.is_file()]


def _abstract(tree: Tree) -> Tree:
    """Return shapes, types and this mesh's placement, so that a checkpoint opens on another topology."""

    def one(path: tuple, x: AnyArray | jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(
            x.shape, x.dtype, sharding=getattr(x, "sharding", None) or sharding_of(path, x.shape)
        )

    return jax.tree_util.tree_map_with_path(one, tree)
