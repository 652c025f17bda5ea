"""Watch over a run while it trains: signals that ask it to stop, a deadline for that, and stalls."""

from __future__ import annotations

import contextlib
import dataclasses
import faulthandler
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

import jax
import numpy as np
from jax.experimental import multihost_utils

from sst_jax.errors import InputError

# SIGUSR1 is what SLURM's --signal usually sends ahead of the time limit.
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


@dataclasses.dataclass(frozen=True)
class Watch:
    """How a run is watched, which does not change what it computes.

    stop_within    seconds for the last save once a signal has come, 0: as long as it takes. Past them the run ends
                   without a save, as it would under a scheduler that kills it, and says so.
    stall_minutes  minutes without a finished step after which the stacks of all threads are written down, 0: never
    """

    stop_within: float = 0.0
    stall_minutes: float = 15.0

    def __post_init__(self) -> None:
        for field, flag in (("stop_within", "--stop-within"), ("stall_minutes", "--stall-minutes")):
            if not 0 <= getattr(self, field) < float("inf"):
                raise InputError(f"{flag} {getattr(self, field)} must be a number from 0 on")


class StopSignals:
    """Within `with`, a signal of SIGNALS sets `requested` to its name; a second SIGINT interrupts at once.

    A signal to another process of the run does not count here: this one's own first SIGINT still asks for a save.

    within: seconds from the first signal to the end of the process, saved or not; 0 sets no deadline.
    """

    def __init__(self, within: float = 0.0):
        self.requested: str | None = None
        self._within, self._interrupts = within, 0
        self._timer: threading.Timer | None = None

    def __enter__(self) -> StopSignals:
        self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, *exception: object) -> None:
        if self._timer is not None:
            self._timer.cancel()
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._interrupts += number == signal.SIGINT
        if number == signal.SIGINT and self._interrupts > 1:
            raise KeyboardInterrupt
        if self._timer is None and self._within:
            timer = threading.Timer(self._within, self._give_up)
            timer.daemon = True
            timer.start()
            self._timer = timer
        self.requested = signal.Signals(number).name
        if self._interrupts == 1 and number == signal.SIGINT:
            print("finishing this step, then saving; Ctrl-C again ends at once, unsaved", file=sys.stderr, flush=True)

    def _give_up(self) -> None:
        print(
            f"no save within {self._within:g} s of {self.requested} (--stop-within): ending without; the same command "
            "resumes from the newest checkpoint",
            file=sys.stderr,
            flush=True,
        )
        os._exit(1)  # the main thread may be inside a computation that no exception reaches

    def now(self) -> bool:
        """Return whether to stop: the same answer in all processes of a run, which must ask equally often."""
        if jax.process_count() > 1:
            asked = np.asarray(multihost_utils.process_allgather(np.array(self.requested is not None)))
            if asked.any() and self.requested is None:
                self.requested = "a signal to another process"
        return self.requested is not None


class StallWatchdog:
    """Reports when no `beat` comes for `minutes`, and writes every thread's stack to RUN/stall.txt. It ends nothing."""

    def __init__(self, run: Path, minutes: float):
        self.file, self.seconds = run / "stall.txt", 60.0 * minutes
        self._last = time.monotonic()

    def beat(self) -> None:
        """Note that a step is done, or a part of one."""
        self._last = time.monotonic()

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Watch for stalls within a `with` block."""
        over = threading.Event()
        thread = threading.Thread(target=self._watch, args=(over,), daemon=True)
        self.beat()
        if self.seconds:
            thread.start()
        try:
            yield
        finally:
            over.set()

    def _watch(self, over: threading.Event) -> None:
        reported = None  # the beat before the last stall that was reported: each is reported once
        while not over.wait(max(self._last + self.seconds - time.monotonic(), self.seconds / 10)):
            last = self._last
            if time.monotonic() - last < self.seconds or reported == last:
                continue
            reported = last
            with self.file.open("a") as file:
                file.write(f"{time.strftime('%F %T')}: nothing for {time.monotonic() - last:.0f} s\n")
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
            print(
                f"no step has finished for {(time.monotonic() - last) / 60:.1f} minutes (--stall-minutes); "
                f"what every thread is doing is in {self.file}",
                file=sys.stderr,
                flush=True,
            )
