"""One run, killed again and again: every restart goes on, and it ends where the undisturbed run ends, bit for bit.

    python -m tests.support.kills --kills 100 --workdir /tmp/kills --json kills.json

The tiny recipe with a checkpoint after every step. A kill is SIGKILL, SIGTERM, SIGINT or SIGUSR1 at a random moment:
while the program starts, while it trains, or while a checkpoint is being written. A run that was asked to stop ends
by itself, with exit code 1; SIGKILL asks nothing.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sst_jax.console.command import Parser, run, write_json
from sst_jax.errors import InputError
from sst_jax.training.telemetry import OF_THE_MACHINE

ROOT = Path(__file__).parents[2]
SETTINGS = {
    "train.save_every": 1, "train.eval_every": 20, "train.keep": 2, "train.sample_tokens": 2, "data.limit": 24,
    "data.heldout": 2, "data.batch_size": 2, "adapter.dropout": 0.1, "stream.alpha_warmup": 9,
}  # fmt: skip
MOMENTS = ("starting", "training", "training", "saving", "saving")
SIGNALS = (signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
TORN = "*.orbax-checkpoint-tmp"


def parser() -> Parser:
    parser = Parser(prog="python -m tests.support.kills", description=__doc__)
    parser.add_argument("--kills", type=int, default=100, metavar="N", help="kills that hit (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=0, metavar="N", help="steps of the run (default: 4 a kill)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workdir", required=True, metavar="DIR", help="where both runs and a cache of programs go")
    parser.add_argument("--json", metavar="FILE", help="write what happened to FILE")
    return parser


def main(argv: Sequence[str]) -> None:
    args = parser().parse_args(argv)
    result = kill(Path(args.workdir), args.kills, args.steps or 4 * args.kills, args.seed)
    print(
        f"{result['kills']} kills {result['by']}: {result['restarts']} restarts went on; parameters and metrics of "
        f"{result['steps']} steps equal the undisturbed run's ({result['seconds']:.0f} s)"
    )
    if args.json:
        write_json(args.json, result)


def kill(workdir: Path, kills: int, steps: int, seed: int, more: Sequence[str] = ()) -> dict[str, Any]:
    """Trains undisturbed, then with kills; raises InputError where the two differ or a restart fails.

    more: further --config.KEY=VALUE arguments.
    """
    started, rng, by = time.monotonic(), random.Random(seed), Counter()
    whole, killed = workdir / "whole", workdir / "killed"
    environment = {
        **os.environ, "JAX_PLATFORMS": "cpu", "JAX_COMPILATION_CACHE_DIR": str(workdir / "xla"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2", "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "0",
    }  # fmt: skip
    environment.pop("XLA_FLAGS", None)
    settings = [f"--config.{key}={value}" for key, value in (SETTINGS | {"train.steps": steps}).items()]
    command = [sys.executable, "-m", "sst_jax.train", "--config", "configs/tiny.py", *settings, *more, "--workdir"]

    def begin(folder: Path) -> subprocess.Popen:
        with (workdir / f"{folder.name}.log").open("a") as log:
            return subprocess.Popen([*command, str(folder)], cwd=ROOT, env=environment, stdout=log, stderr=log)

    workdir.mkdir(parents=True, exist_ok=True)
    before = time.monotonic()
    if begin(whole).wait():
        raise InputError(f"the undisturbed run failed: see {workdir / 'whole.log'}")
    undisturbed = time.monotonic() - before
    resumed = 0
    while sum(by.values()) < kills:
        first = newest(killed)
        said = len((workdir / "killed.log").read_text()) if first else 0
        process = begin(killed)
        moment = rng.choice(MOMENTS)
        number = signal.SIGKILL if moment == "starting" else rng.choice(SIGNALS)  # before the loop nothing asks to save
        hit = wait_for(process, killed, moment, first, rng, undisturbed)
        process.send_signal(number)
        status = process.wait()
        resumed += bool(first)
        if status not in (0, 1, -number) or (hit and number == signal.SIGKILL and status != -number):
            raise InputError(f"exit status {status} after {number.name}: see {workdir / 'killed.log'}")
        if status == 0:
            raise InputError(f"the run ended after {sum(by.values())} kills: give it more --steps")
        if status == 1 and "and saved at step" not in (workdir / "killed.log").read_text()[said:]:
            raise InputError(f"a restart failed: see {workdir / 'killed.log'}")
        by[f"{number.name} while {moment}"] += hit
    if begin(killed).wait():
        raise InputError(f"the last restart failed: see {workdir / 'killed.log'}")
    check(whole, killed, steps)
    return {
        "kills": sum(by.values()), "by": dict(sorted(by.items())), "restarts": resumed + 1, "steps": steps,
        "seconds": time.monotonic() - started,
    }  # fmt: skip


def wait_for(
    process: subprocess.Popen, folder: Path, moment: str, first: int, rng: random.Random, usual: float
) -> bool:
    """Waits for a random moment of a kind; whether it came before the process ended."""
    if moment == "starting":
        until = time.monotonic() + rng.uniform(0.0, 4.0)
        while time.monotonic() < until and newest(folder) == first and process.poll() is None:
            time.sleep(0.02)
        return process.poll() is None
    aim = first + rng.randrange(1, 4)  # steps from here
    begun, limit = time.time(), time.monotonic() + 120 + usual
    while process.poll() is None and time.monotonic() < limit:
        if moment == "training" and newest(folder) >= aim:
            time.sleep(rng.uniform(0.0, 0.3))
            break
        if moment == "saving" and newest(folder) >= aim - 1 and being_written(folder, begun):
            time.sleep(rng.choice((0.0, 0.0, rng.uniform(0.0, 0.05))))
            break
        time.sleep(0.002 if moment == "saving" else 0.02)
    return process.poll() is None


def being_written(folder: Path, begun: float) -> bool:
    """Whether a checkpoint is on its way, and not one that an earlier kill left behind."""
    try:
        return any(torn.stat().st_mtime > begun for torn in (folder / "checkpoints").glob(TORN))
    except FileNotFoundError:  # it has just been given its name
        return False


def newest(folder: Path) -> int:
    """The newest step that has a manifest, 0 where none has; damage is not looked for."""
    return max((int(file.stem) for file in (folder / "manifests").glob("*.json") if file.stem.isdigit()), default=0)


def check(whole: Path, killed: Path, steps: int) -> None:
    """Raises InputError unless two runs came to the same parameters and metrics, bit for bit."""
    import jax
    import numpy as np

    from sst_jax.inference.model import load
    from sst_jax.weights.checkpoint import read_metrics

    one, other = ({name: load(run).params[name] for name in ("adapter", "blend")} for run in (whole, killed))
    if not jax.tree.all(jax.tree.map(np.array_equal, one, other)):
        raise InputError("the parameters differ")
    lines = [
        [{key: value for key, value in line.items() if key not in OF_THE_MACHINE} for line in read_metrics(run)]
        for run in (whole, killed)
    ]
    if lines[0] != lines[1] or len(lines[0]) != steps + 1:
        raise InputError("the metrics differ")


if __name__ == "__main__":
    os.environ["JAX_PLATFORMS"] = "cpu"
    sys.exit(run(main))
