"""How far a run has come: what a checkpoint says beside its arrays, and the seconds spent."""

from __future__ import annotations

import dataclasses
import datetime
import sys
import time

from sst_jax.console.progress import print_line
from sst_jax.types import Json


@dataclasses.dataclass
class Progress:
    """How far a run has come, beside its arrays: a checkpoint's metadata.

    step               steps done
    heldout            held-out losses by step
    seconds            spent in the loop, up to the last save
    skipped            steps skipped so far, as their numbers were not finite
    consecutive_skips  of these, the ones just before this step
    pending            metrics of a step that was saved before its held-out loss was known; None where none is
    scores             task scores by step: (right, asked)
    """

    step: int = 0
    heldout: dict[int, float] = dataclasses.field(default_factory=dict)
    seconds: float = 0.0
    skipped: int = 0
    consecutive_skips: int = 0
    pending: dict[str, float] | None = None
    scores: dict[int, tuple[int, int]] = dataclasses.field(default_factory=dict)

    def to_json(self) -> Json:
        """Return everything but the step, which a checkpoint's name says."""
        saved = {
            "heldout": {str(step): loss for step, loss in self.heldout.items()},
            "seconds": self.seconds,
            "skipped": self.skipped,
            "consecutive_skips": self.consecutive_skips,
            "scores": {str(step): list(score) for step, score in self.scores.items()},
        }
        return saved if self.pending is None else {**saved, "pending": self.pending}

    @classmethod
    def from_json(cls, step: int, saved: Json) -> Progress:
        """Return what `to_json` made of it, or version 0.1.0, which wrote "in_a_row" and "unfinished"."""
        return cls(
            step,
            {int(at): loss for at, loss in saved["heldout"].items()},
            saved["seconds"],
            saved["skipped"],
            saved["consecutive_skips"] if "consecutive_skips" in saved else saved.get("in_a_row", 0),
            saved.get("pending", saved.get("unfinished")),
            {int(at): (right, asked) for at, (right, asked) in saved.get("scores", {}).items()},
        )


def in_millions(count: int) -> str:
    """Return a number of parameters as it is read: "268M", or all of its digits below a million."""
    return f"{count / 1e6:,.0f}M" if count >= 1_000_000 else f"{count:,}"


class StepLines:
    """A line now and then on how training goes, for logs: a terminal has a progress bar.

    steps  of the run
    done   of them, before this process
    """

    EVERY = 30.0  # seconds between two lines

    def __init__(self, steps: int, done: int):
        self._steps, self._first = steps, done
        self._wanted = not sys.stderr.isatty()
        self._start = self._last = time.monotonic()

    def tell(self, step: int, loss: float, tokens_per_second: float) -> None:
        """Say how a step went, unless a line came a moment ago."""
        now = time.monotonic()
        if not self._wanted or now - self._last < self.EVERY:
            return
        self._last = now
        left = (now - self._start) / (step - self._first) * (self._steps - step)
        print_line(
            f"step {step} of {self._steps}: loss {loss:.4f}, {tokens_per_second:.0f} tokens/s, "
            f"about {datetime.timedelta(seconds=round(left))} left"
        )


class Clock:
    """Seconds of a run over all its processes, one after another."""

    def __init__(self, before: float):
        self._start = time.monotonic() - before

    def seconds(self) -> float:
        return time.monotonic() - self._start
