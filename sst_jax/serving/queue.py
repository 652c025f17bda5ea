"""Continuous batching: a fixed number of cache rows that are decoded together, and requests that come and go.

Between two chunks of decoding, waiting prompts are prefilled (no more than a prefill chunk at a time, so that running
answers do not stand still for long) and put into free rows. A prompt is prefilled alone and all rows are always decoded
together, so the shapes that an answer is computed in do not depend on who else is there, and neither do its bits.
"""

from __future__ import annotations

import collections
import functools
import threading
import time
import traceback
from collections.abc import Callable, Generator, Sequence

import jax
import numpy as np

from sst_jax.errors import InputError
from sst_jax.inference.detokenizer import IncrementalDetokenizer
from sst_jax.inference.model import Model
from sst_jax.inference.prefill import CHUNK as PREFILL
from sst_jax.inference.prefill import capacity_for
from sst_jax.inference.programs import SampledTokens, each_score
from sst_jax.inference.sampling import Scores
from sst_jax.inference.session import PrefilledPrompt, Request, Session
from sst_jax.types import HostInts

CHUNK = 8  # tokens between two looks at who has ended and who is waiting
TOP = 20  # top tokens that come with a score


class Job:
    """A request on its way. `answer` grows; `error` says what went wrong; once `ended`, none of it changes any more.

    emit(text, reason, count) is called with every piece of new text and how many tokens there are by then, which do not
    change any more, and with the last one why no more will come: "stop", "length" or "error". A reader in another
    thread goes by that: `answer` may be ahead of what it has been told.
    """

    def __init__(self, request: Request, answer: IncrementalDetokenizer, emit: Callable[[str, str | None, int], None]):
        self.request, self.answer, self.emit = request, answer, emit
        self.scores: list[Scores] = []  # one a new token
        self.prompt_scores: list[Scores] = []  # one a prompt token but the first
        self.error: str | None = None
        self.cancelled = self.ended = False


class Busy(RuntimeError):
    """Too many requests are waiting."""


class Closing(RuntimeError):
    """The engine takes no more requests."""


class Reading:
    """A job whose prompt is being prefilled, a part at a time."""

    def __init__(self, job: Job, parts: Generator[int, None, PrefilledPrompt]):
        self.job, self.parts = job, parts


class Engine:
    """Runs jobs in a thread of its own. All methods may be called from any thread.

    rows: answers that are decoded together. capacity: positions of each, prompt and answer; rounded up.
    waiting: requests that may wait for a row.
    """

    def __init__(self, model: Model, *, rows: int = 8, capacity: int = 4096, waiting: int = 256):
        self.model, self.rows, self.waiting = model, rows, waiting
        self.capacity = min(capacity_for(capacity), model.config.backbone.position_limit)
        self.answered = self.tokens = 0  # of jobs that have ended well
        self.session = Session(
            model.config,
            model.params,
            rows=rows,
            capacity=capacity_for(self.capacity),
            special=model.special_tokens,
            pad_id=model.tokenizer.pad_id,
            chunk=CHUNK,
            top=min(TOP, model.config.backbone.vocab_size),
        )
        self._queue: collections.deque[Job] = collections.deque()
        self._seated: dict[int, Job] = {}
        self._reading: Reading | None = None
        self._kept: tuple[tuple, PrefilledPrompt] | None = None  # the newest prompt, for more samples of it
        self._closing = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def submit(self, requests: Sequence[Request], emit: Callable[[Job, str, str | None, int], None]) -> list[Job]:
        """Queue requests, all or none. `emit(job, text, reason, count)` is called in the engine's thread, see `Job`.

        Raises: InputError where prompt and answer exceed the capacity; Busy; Closing.
        """
        for request in requests:
            if len(request.tokens) + request.max_new_tokens > self.capacity:
                raise InputError(
                    f"a prompt of {len(request.tokens)} tokens and {request.max_new_tokens} new ones exceed this "
                    f"server's {self.capacity} positions"
                )
        jobs = []
        for request in requests:
            answer = IncrementalDetokenizer(self.model.tokenizer, request.stop, request.tokens)
            job = Job(request, answer, lambda text, reason, count: None)
            job.emit = functools.partial(emit, job)
            jobs.append(job)
        with self._changed:
            if self._closing:
                raise Closing("shutting down: no more requests are taken")
            if len(self._queue) + len(jobs) > self.waiting:
                raise Busy(f"{len(self._queue)} requests are waiting already, and {self.waiting} may")
            self._queue.extend(jobs)
            self._changed.notify()
        return jobs

    def cancel(self, jobs: Sequence[Job]) -> None:
        """Drop jobs: their rows are free before the next chunk, their places in the queue at once."""
        for job in jobs:
            job.cancelled = True
        with self._changed:
            waiting = [job for job in self._queue if not job.cancelled]
            self._queue.clear()
            self._queue.extend(waiting)

    def close(self, seconds: float) -> bool:
        """Take no more requests, finish those there are within `seconds`, and return whether all were finished.

        What runs or waits beyond the deadline ends with an error.
        """
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join(seconds)
        if not self._thread.is_alive():
            return True
        with self._changed:
            reading = [self._reading.job] if self._reading else []
            unfinished = [*self._queue, *reading, *self._seated.values()]
        for job in unfinished:
            if not job.ended:
                self._fail(job, "the server was shut down before this was finished")
        self.cancel(unfinished)
        self._thread.join()
        return False

    @property
    def closing(self) -> bool:
        return self._closing

    def load(self) -> dict[str, int]:
        """Return the numbers of running and waiting requests, and of rows."""
        return {"running": len(self._seated), "waiting": len(self._queue), "rows": self.rows}

    def _run(self) -> None:
        while self._await_work():
            self._admit()
            if self._seated:
                self._decode()

    def _await_work(self) -> bool:
        """Wait until there is something to do; False once the engine is closed and idle."""
        with self._changed:
            while not (self._queue or self._reading or self._seated):
                if self._closing:
                    return False
                self._changed.wait()
        return True

    def _admit(self) -> None:
        """Prefill waiting prompts into free rows, as far as a chunk's worth of positions goes."""
        budget = PREFILL
        while budget > 0 and len(self._seated) < self.rows:
            if self._reading is None:
                with self._changed:
                    if not self._queue:
                        return
                    self._reading = self._read(self._queue.popleft())
            job = self._reading.job
            try:
                if job.cancelled:
                    self._reading = None
                    continue
                budget -= next(self._reading.parts)
            except StopIteration as read:
                self._begin(job, read.value)  # which may compile; until then `close` finds the job here
                self._reading = None
            except Exception as error:  # of this request alone; the others are decoded further
                traceback.print_exc()
                self._reading = None
                self._fail(job, f"the engine failed: {type(error).__name__}")

    def _read(self, job: Job) -> Reading:
        """Return a job with its prompt's parts still before it; of a prompt that is kept there are none."""
        request = job.request
        key = self.session.prompt_key(request)

        def parts() -> Generator[int, None, PrefilledPrompt]:
            if self._kept is None or self._kept[0] != key:
                self._kept = None  # its memory is needed
                prompt = yield from self.session.prefill_prompt(request)
                self._kept = key, prompt
            return self._kept[1]

        return Reading(job, parts())

    def _begin(self, job: Job, prompt: PrefilledPrompt) -> None:
        """Give a job whose prompt has been read a row, and its first token."""
        if job.cancelled:
            return
        job.prompt_scores = prompt.scores
        if job.request.max_new_tokens == 0:
            self._tell(job, [], [], [], True)
            return
        try:
            row, sampled = self.session.admit(job.request, prompt)
        except Exception as error:
            traceback.print_exc()
            self._fail(job, f"the engine failed: {type(error).__name__}")
            return
        self._seated[row] = job
        self._pass_on(sampled, {0: job})
        self._leave()

    def _decode(self) -> None:
        """Decode one chunk of tokens for all rows."""
        try:
            sampled = self.session.step()
        except Exception as error:  # the caches were donated and are gone
            traceback.print_exc()
            for job in self._seated.values():
                self._fail(job, f"the engine failed: {type(error).__name__}")
            self._seated = {}
            self.session.reset()
            return
        self._pass_on(sampled, self._seated)
        self._leave()

    def _pass_on(self, sampled: SampledTokens, jobs: dict[int, Job]) -> None:
        for row, job in jobs.items():
            tokens, scores = np.asarray(sampled.tokens[row]), []
            if job.request.scored:
                new = jax.tree.map(lambda part, row=row: part[row], sampled.scores)
                scores = each_score(new, int((tokens >= 0).sum()))
            if not job.cancelled:
                self._tell(job, tokens, np.asarray(sampled.depths[row]), scores, bool(sampled.done[row]))

    def _leave(self) -> None:
        """Free the rows of jobs that have ended or were cancelled."""
        gone = [row for row, job in self._seated.items() if job.ended or job.cancelled]
        for row in gone:
            del self._seated[row]
        self.session.stop(gone)

    def _tell(
        self,
        job: Job,
        tokens: Sequence[int] | HostInts,
        depths: Sequence[int] | HostInts,
        scores: list[Scores],
        last: bool,
    ) -> None:
        job.scores += scores
        text = job.answer.add(tokens, depths, last)
        if job.answer.ended:
            del job.scores[len(job.answer.tokens) :]
            self.answered += 1
            self.tokens += len(job.answer.tokens)
            job.ended = True
        job.emit(text, job.answer.ended, len(job.answer.tokens))

    def _fail(self, job: Job, reason: str) -> None:
        job.error = reason
        job.ended = True
        job.emit("", "error", 0)


def answers(engine: Engine, requests: Sequence[Request], seconds: float = 600.0) -> list[Job]:
    """Run requests to their end and return their jobs, in order.

    Raises: TimeoutError; as `Engine.submit`.
    """
    moved = threading.Condition()

    def emit(job: Job, text: str, reason: str | None, count: int) -> None:
        with moved:
            moved.notify()

    jobs, deadline = engine.submit(requests, emit), time.monotonic() + seconds
    with moved:
        while not all(job.ended for job in jobs):
            if not moved.wait(deadline - time.monotonic()):
                engine.cancel(jobs)
                raise TimeoutError(f"{sum(not job.ended for job in jobs)} of {len(jobs)} answers took too long")
    return jobs
